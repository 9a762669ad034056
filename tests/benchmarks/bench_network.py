"""Networks alone: examples a second at every batch size, and whether a batch shows in an example's bits.

``python -m tests.benchmarks.bench_network --network compact``; VGGish runs on random weights of its shape.
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

from detector.classifiers import build_classifier
from detector.embedders import build_network, tensor_shapes
from detector.embedders.embedder import Embedder
from detector.embedders.log_mel import log_mel
from detector.embedders.params import EXAMPLE_SAMPLES


def random_tensors(kind: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        name: (random.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / max(1, np.prod(shape[:-1])))))
        if len(shape) > 1
        else np.zeros(shape, np.float32)
        for name, shape in tensor_shapes(kind).items()
    }


def measure(name: str, call: Callable[..., Any], inputs: list[np.ndarray], sizes: list[int], seconds: float) -> None:
    """Prints one line a batch size; ``inputs`` hold the largest batch."""
    together: np.ndarray | None = None
    for size in sorted(sizes, reverse=True):
        specs = [tf.TensorSpec([size, *x.shape[1:]], x.dtype) for x in inputs]
        function = tf.function(lambda *x: call(*x)).get_concrete_function(*specs)
        parts = [
            function(*(tf.constant(x[i : i + size]) for x in inputs)).numpy()
            for i in range(0, len(inputs[0]) // size * size, size)
        ]
        found = np.concatenate(parts)
        together = found if together is None else together
        batch = [tf.constant(x[:size]) for x in inputs]
        times, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end or len(times) < 3:
            start = time.perf_counter()
            function(*batch).numpy()
            times.append(time.perf_counter() - start)
        median = statistics.median(times)
        bits = (
            "same bits"
            if np.array_equal(found, together[: len(found)])
            else (f"differs by up to {np.abs(found - together[: len(found)]).max():.0e}")
        )
        click.echo(
            f"{name:12s} batch {size:3d}: median {median * 1e3:9.2f} ms, {size / median:9.0f} examples/s "
            f"(best {size / min(times):.0f}); {bits}"
        )


@click.command()
@click.option("--network", type=click.Choice(["compact", "vggish"]), multiple=True, default=["compact", "vggish"])
@click.option("--max-batch", default=64, show_default=True)
@click.option("--threads", default=0, show_default=True, help="0 = all cores.")
@click.option("--seconds", default=2.0, show_default=True, help="Measured for each line.")
def main(network: tuple[str, ...], max_batch: int, threads: int, seconds: float) -> None:
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    click.echo(
        f"oneDNN {'off' if os.environ.get('TF_ENABLE_ONEDNN_OPTS') == '0' else 'on'}, threads {threads or 'all'}"
    )
    sizes = [1 << i for i in range(max_batch.bit_length()) if 1 << i <= max_batch]
    random = np.random.default_rng(1)
    levels = 10 ** random.uniform(1, 4, (max_batch, 1))
    pcm = np.clip(random.standard_normal((max_batch, EXAMPLE_SAMPLES)) * levels, -32768, 32767).astype(np.int16)
    examples = log_mel(tf.constant(pcm)).numpy()
    measure("front end", log_mel, [pcm], sizes, seconds)
    for kind in network:
        built = build_network(kind, random_tensors(kind))
        measure(kind, built, [examples], sizes, seconds)
        measure(f"{kind} + pcm", Embedder(built, None), [pcm], sizes[-1:], seconds)
    windows = random.standard_normal((max_batch, 10, 128)).astype(np.float32)
    frames = np.full(max_batch, 10, np.int32)
    classifier = build_classifier("lstm", {"classes": 8, "cells": 128, "layers": 1})
    measure("lstm 128x1", classifier, [windows, frames], sizes, seconds)


if __name__ == "__main__":
    main()
