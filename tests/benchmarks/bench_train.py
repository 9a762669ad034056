"""Training clips a second, reading included: `trainer train` against the starter code's reader and graph together.

``python -m tests.benchmarks.bench_train --cells 16 --batch 1024``: the same LstmModel, the same batch, the same files,
by turns. The starter code reads as its ``train.py`` does, with eight queue readers feeding the graph; ours is the
loop's own batches and step. Neither evaluates nor saves meanwhile; what each does before its second step is left out
(reading all files once, ours; filling the queue and tracing, both).
"""

from __future__ import annotations

import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import click
import numpy as np
import tensorflow as tf

from detector.classifiers import build_classifier, weights
from tests.benchmarks.bench_records import _BALANCED, starter_batch, timed_session
from tests.benchmarks.bench_train_step import CLASSES, starter_graph
from trainer.records import Batch, ClipSet, find_files, read_clips
from trainer.train_step import StepSettings, TrainStep

v1 = tf.compat.v1


Cost = tuple[float, float]
"""Clips a second, and processor seconds a clip: the latter hardly depends on what else the machine does."""


def theirs(files: list[str], initial: dict[str, np.ndarray], layers: int, batch: int, seconds: float) -> Cost:
    """Of the starter code."""
    with tf.Graph().as_default():
        (_, values, labels, frames), queue = starter_batch(files, batch)
        # train.py asks for labels and predictions with every step, to print how good the batch was
        loss, train = starter_graph(initial, layers, (values, tf.cast(labels, tf.float32), frames), batch)
        with v1.Session() as session:
            session.run([v1.global_variables_initializer(), v1.local_variables_initializer()])
            return timed_session(session, queue, lambda: session.run([train, loss, labels]), batch, seconds)


def ours(clips: ClipSet, step: TrainStep, batch: int, seconds: float) -> Cost:
    """Of the loop of ``trainer.train``."""
    a_pass = len(clips) // batch  # whole batches only, as the starter code's are

    def taken(number: int) -> Batch:
        epoch, place = divmod(number, a_pass)
        return clips.gather(clips.order(1, epoch)[place * batch : (place + 1) * batch])

    count, done, started, busy = 0, 0, 0.0, 0.0
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(taken, 0)
        while done < 1 or time.perf_counter() - started < seconds:
            given, count = upcoming.result(), count + 1
            upcoming = pool.submit(taken, count)
            float(step(given.features, given.labels, given.num_frames).loss)
            if count == 1:
                started, busy = time.perf_counter(), time.process_time()
            else:
                done += 1
        return done * batch / (time.perf_counter() - started), (time.process_time() - busy) / (done * batch)


@click.command()
@click.option("--cells", default=1024, show_default=True)
@click.option("--layers", default=2, show_default=True)
@click.option("--batch", default=1024, show_default=True)
@click.option("--mixed-precision", is_flag=True, help="Our products in bfloat16.")
@click.option("--seconds", default=10.0, show_default=True, help="Of each side in each round.")
@click.option("--rounds", default=3, show_default=True)
def main(cells: int, layers: int, batch: int, mixed_precision: bool, seconds: float, rounds: int) -> None:
    files = find_files(str(_BALANCED))
    clips = read_clips(files, classes=CLASSES)
    classifier = build_classifier("lstm", {"cells": cells, "layers": layers}, seed=1)
    initial = weights(classifier)
    settings = StepSettings(batch_size=batch, base_learning_rate=0.001, mixed_precision=mixed_precision)
    step = TrainStep(classifier, settings)
    pairs = [
        (theirs([str(path) for path in files], initial, layers, batch, seconds), ours(clips, step, batch, seconds))
        for _ in range(rounds)
    ]
    click.echo(
        f"LSTM {cells} x {layers}, batch {batch}{', bfloat16 products' if mixed_precision else ''}, with reading"
    )
    for k, name in enumerate(("starter code", "this project")):
        rate, cost = (statistics.median(pair[k][part] for pair in pairs) for part in (0, 1))
        click.echo(f"{name}: {rate:8.0f} clips/s, {cost * 1e6:8.0f} processor microseconds a clip")
    faster = [b[0] / a[0] for a, b in pairs]
    cheaper = [a[1] / b[1] for a, b in pairs]
    click.echo(f"{statistics.median(faster):.2f} times as fast ({', '.join(f'{each:.2f}' for each in faster)})")
    click.echo(f"{statistics.median(cheaper):.2f} times as cheap ({', '.join(f'{each:.2f}' for each in cheaper)})")


if __name__ == "__main__":
    main()
