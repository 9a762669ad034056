"""Front end: the graph's time an example against NumPy's. ``python -m tests.benchmarks.bench_front_end``

Two references, as "NumPy front end" can mean two things: the published ``mel_features.py`` as it stands, which builds
window and mel matrix in every call, and the leanest float64 NumPy that keeps them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import click
import numpy as np
import tensorflow as tf

from detector.audio import int16_to_float
from detector.embedders.log_mel import log_mel, log_mel_examples
from detector.embedders.params import EXAMPLE_SAMPLES, FrontEndParams


def lean(pcm: np.ndarray) -> None:
    for row in pcm:
        log_mel_examples(int16_to_float(row))


def as_published(pcm: np.ndarray) -> None:
    """Tables made in every call, the mel matrix column by column."""
    params = FrontEndParams()
    for row in pcm:
        x = int16_to_float(row)
        frames = np.lib.stride_tricks.sliding_window_view(x, params.window_samples)[:: params.hop_samples]
        magnitude = np.abs(np.fft.rfft(frames * params.hann(), params.fft_samples))
        hz_to_mel = lambda hz: 1127.0 * np.log(1.0 + hz / 700.0)  # noqa: E731
        bins_mel = hz_to_mel(np.linspace(0.0, params.sample_rate_hz / 2.0, params.spectrum_bins))
        edges = np.linspace(hz_to_mel(params.mel_min_hz), hz_to_mel(params.mel_max_hz), params.mel_bands + 2)
        mel = np.empty((params.spectrum_bins, params.mel_bands))
        for i in range(params.mel_bands):
            low, centre, high = edges[i : i + 3]
            mel[:, i] = np.maximum(
                0.0, np.minimum((bins_mel - low) / (centre - low), (high - bins_mel) / (high - centre))
            )
        mel[0] = 0.0
        np.log(magnitude @ mel + params.log_offset)


def times_seconds(work: Callable[[], object], rounds: int) -> list[float]:
    work()
    measured = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        measured.append(time.perf_counter() - start)
    return measured


@click.command()
@click.option("--batch", default=64, show_default=True, help="Examples in a batch.")
@click.option("--rounds", default=40, show_default=True)
def main(batch: int, rounds: int) -> None:
    pcm = np.random.default_rng(0).integers(-20_000, 20_000, (batch, EXAMPLE_SAMPLES), np.int16)
    graph = tf.function(log_mel).get_concrete_function(tf.TensorSpec([batch, EXAMPLE_SAMPLES], tf.int16))
    results = {
        "numpy, as published": times_seconds(lambda: as_published(pcm), max(3, rounds // 8)),
        "numpy, tables kept": times_seconds(lambda: lean(pcm), max(3, rounds // 4)),
        "graph": times_seconds(lambda: graph(tf.constant(pcm)).numpy(), rounds),
    }
    expected = np.concatenate([log_mel_examples(int16_to_float(row)) for row in pcm])
    worst = float(np.abs(graph(tf.constant(pcm)).numpy() - expected).max())
    in_graph = statistics.median(results["graph"])
    for name, measured in results.items():
        median, best = statistics.median(measured), min(measured)
        click.echo(
            f"{name:22s} median {median / batch * 1e6:8.1f} us/example, best {best / batch * 1e6:8.1f}; "
            f"{median / in_graph:5.1f} x the graph's"
        )
    click.echo(f"batch {batch}; largest difference from float64: {worst:.1e}")


if __name__ == "__main__":
    main()
