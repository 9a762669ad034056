"""Training clips a second: our step against the starter code's graph, same LSTM model, same batch, same machine.

``python -m tests.benchmarks.bench_train_step --cells 1024 --batch 128``. The starter code's graph is built here as its
``train.py`` builds it: a TF1 session, ``dynamic_rnn`` over BasicLSTMCell steps, Adam, on clips padded to the 300 rows
that its reader makes of every clip (``--starter-rows``). Reading of records is left out on both sides.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import click
import numpy as np
import tensorflow as tf

from detector.classifiers import build_classifier, weights
from trainer.train_step import StepSettings, TrainStep

v1 = tf.compat.v1
ROWS, FEATURES, CLASSES, MIXTURES = 10, 128, 527, 2


class StackedCell:
    """MultiRNNCell of BasicLSTMCells, what ``dynamic_rnn`` needs of one."""

    def __init__(self, kernels: list[Any], biases: list[Any]) -> None:
        self._layers = list(zip(kernels, biases, strict=True))
        cells = [bias.shape[0] // 4 for bias in biases]
        self.state_size = tuple((c, c) for c in cells)
        self.output_size = cells[-1]

    def zero_state(self, batch: Any, dtype: Any) -> Any:
        return tuple((tf.zeros([batch, c], dtype), tf.zeros([batch, c], dtype)) for c, _ in self.state_size)

    def __call__(self, x: Any, state: Any, scope: Any = None) -> Any:
        new = []
        for (kernel, bias), (c, h) in zip(self._layers, state, strict=True):
            i, j, f, o = tf.split(v1.nn.bias_add(tf.matmul(tf.concat([x, h], 1), kernel), bias), 4, axis=1)
            c = c * tf.sigmoid(f + 1.0) + tf.sigmoid(i) * tf.tanh(j)
            x = tf.tanh(c) * tf.sigmoid(o)
            new.append((c, x))
        return x, tuple(new)


def starter_graph(
    initial: dict[str, np.ndarray], layers: int, inputs: tuple[Any, Any, Any], batch: int, clip: float = 1.0
) -> tuple[Any, Any]:
    """Loss and the operation that takes a step, in the present graph, on ``(B, T, D)`` floats, labels and lengths."""
    x_raw, y, num_frames = inputs
    named = {name: v1.get_variable(name, initializer=value, use_resource=False) for name, value in initial.items()}
    scope = "tower/rnn/multi_rnn_cell/cell_{}/basic_lstm_cell/"
    cell = StackedCell(
        [named[scope.format(i) + "kernel"] for i in range(layers)],
        [named[scope.format(i) + "bias"] for i in range(layers)],
    )
    x = tf.nn.l2_normalize(x_raw, 2)
    _, state = v1.nn.dynamic_rnn(cell, x, sequence_length=num_frames, dtype=tf.float32)
    h = state[-1][1]
    gates, experts = named["tower/gates/weights"], named["tower/experts/weights"]
    gating = tf.nn.softmax(tf.reshape(tf.matmul(h, gates), [-1, MIXTURES + 1]))
    expert = tf.matmul(h, experts) + named["tower/experts/biases"]
    expert = tf.sigmoid(tf.reshape(expert, [-1, MIXTURES]))
    p = tf.reshape(tf.reduce_sum(gating[:, :MIXTURES] * expert, 1), [-1, CLASSES])
    entropy = y * tf.math.log(p + 1e-5) + (1 - y) * tf.math.log(1 - p + 1e-5)
    loss = tf.reduce_mean(tf.reduce_sum(-entropy, 1))
    total = loss + 1e-8 * (tf.nn.l2_loss(gates) + tf.nn.l2_loss(experts))
    step = v1.train.get_or_create_global_step()
    rate = v1.train.exponential_decay(0.001, step * batch, 4_000_000, 0.95, staircase=True)
    optimizer = v1.train.AdamOptimizer(rate)
    gradients = optimizer.compute_gradients(total)
    clipped = [(tf.clip_by_norm(g, clip), v) for g, v in gradients]
    return loss, optimizer.apply_gradients(clipped, global_step=step)


def starter_step(
    initial: dict[str, np.ndarray], layers: int, rows: int, batch: int, clip: float = 1.0
) -> Callable[[np.ndarray, np.ndarray, np.ndarray], float]:
    """The starter code's graph from these weights; returns a function that takes one step and gives the loss."""
    graph = tf.Graph()
    with graph.as_default():
        x_raw = v1.placeholder(tf.float32, [None, rows, FEATURES])
        y, num_frames = v1.placeholder(tf.float32, [None, CLASSES]), v1.placeholder(tf.int32, [None])
        loss, train = starter_graph(initial, layers, (x_raw, y, num_frames), batch, clip)
        session = v1.Session(graph=graph)
        session.run(v1.global_variables_initializer())

    def run(x_value: np.ndarray, labels: np.ndarray, frames: np.ndarray) -> float:
        return float(session.run([loss, train], {x_raw: x_value, y: labels, num_frames: frames})[0])

    return run


def timed(step: Callable[[], float]) -> tuple[float, float]:
    """Loss and seconds of one step."""
    start = time.perf_counter()
    loss = step()
    return loss, time.perf_counter() - start


@click.command()
@click.option("--cells", default=1024, show_default=True)
@click.option("--layers", default=2, show_default=True)
@click.option("--batch", default=128, show_default=True)
@click.option("--starter-rows", default=300, show_default=True, help="Rows its reader pads clips to.")
@click.option("--mixed-precision", is_flag=True, help="Our products in bfloat16.")
@click.option("--seconds", default=10.0, show_default=True, help="Measured, both sides by turns.")
def main(cells: int, layers: int, batch: int, starter_rows: int, mixed_precision: bool, seconds: float) -> None:
    random = np.random.default_rng(0)
    bytes_ = random.integers(0, 256, (batch, ROWS, FEATURES), np.uint8)
    frames = np.full(batch, ROWS, np.int32)
    labels = random.random((batch, CLASSES)) < 0.004
    classifier = build_classifier("lstm", {"cells": cells, "layers": layers}, seed=1)
    padded = np.zeros((batch, starter_rows, FEATURES), np.float32)
    padded[:, :ROWS] = bytes_ * np.float32(4 / 255) + np.float32(4 / 512 - 2)
    starter = starter_step(weights(classifier), layers, starter_rows, batch)
    floats = labels.astype(np.float32)
    settings = StepSettings(batch_size=batch, base_learning_rate=0.001, mixed_precision=mixed_precision)
    step = TrainStep(classifier, settings)
    sides = (lambda: starter(padded, floats, frames), lambda: float(step(bytes_, labels, frames).loss))
    first = [timed(side)[0] for side in sides]  # traces
    pairs, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(pairs) < 5:  # by turns, so that a busy machine slows both alike
        pairs.append([timed(side) for side in sides])
    theirs, ours = (batch / statistics.median(pair[k][1] for pair in pairs) for k in (0, 1))
    ratio = statistics.median(pair[0][1] / pair[1][1] for pair in pairs)
    worst = max(abs(b[0] / a[0] - 1) for a, b in pairs[:4])
    worst = max(worst, abs(first[1] / first[0] - 1))
    click.echo(f"LSTM {cells} x {layers}, batch {batch}{', bfloat16 products' if mixed_precision else ''}")
    click.echo(f"starter code, {starter_rows} rows: {theirs:8.0f} clips/s")
    click.echo(f"this project, {ROWS} rows: {ours:8.0f} clips/s, {ratio:.2f} times as many")
    click.echo(f"losses of the first 5 steps differ by {worst:.1e}")


if __name__ == "__main__":
    main()
