"""What everything around the network costs: chunks in to alerts out, against the bare network, in one run.

The bare network is VGGish in float32 on log-mel examples that lie ready, batch 64. The pipeline does all the rest too:
it decodes 64 wire records, cuts examples, computes log-mel, embeds, forms windows, runs an LSTM, decides and encodes
alerts. Both take turns, so that a machine that slows down slows both. A chunk holds two examples at
the default hop of 0.48 s: the network gets as many.

    python tests/benchmarks/bench_pipeline.py [--rounds 12] [--batch 64]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf

from detector import alert as alerts
from detector.chunk import CHUNK_SAMPLES, CHUNK_SECONDS, Chunk, decode, encode
from detector.classifiers import build_classifier, weights
from detector.config import load_settings
from detector.embedders.vggish import VGGISH_SHAPES, Vggish
from detector.model import Model, save_package
from detector.pipeline import pipeline_for
from detector.stream import Arrival

LABELS = ["Gunshot, gunfire", "Machine gun", "Fireworks", "Explosion"]


def seeded_vggish() -> dict[str, np.ndarray]:
    """Weights of VGGish's shapes; what they are makes no difference to the time."""
    rng = np.random.default_rng(1)
    return {
        name: rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / max(1, np.prod(shape[:-1]))))
        for name, shape in VGGISH_SHAPES.items()
    }


def vggish_package(folder: Path, tensors: dict[str, np.ndarray]) -> Model:
    params = {"cells": 256, "layers": 1, "classes": len(LABELS), "input_size": 128}
    draft = {
        "format_version": 1, "name": "bench", "version": "0", "license": "Apache-2.0", "labels": LABELS,
        "family": LABELS[:2], "look_alikes": LABELS[2:], "embedder": {"kind": "vggish"},
        "classifier": {"kind": "lstm", "params": params},
        "decision": {"open_threshold": 0.5, "close_threshold": 0.3},
        "training": {"command": "none", "data": ["none"], "date": "2026-01-01"},
    }  # fmt: skip
    return save_package(
        folder, draft, classifier_weights=weights(build_classifier("lstm", params, seed=1)), embedder_weights=tensors
    )


def records(batch: int, rounds: int) -> list[list[tuple]]:
    rng = np.random.default_rng(2)
    sounds = [rng.integers(-3000, 3000, CHUNK_SAMPLES).astype(np.int16) for _ in range(batch)]
    return [
        [encode(Chunk(f"sensor-{i}", "s", seq, seq * 960_000_000, np.roll(pcm, seq))) for i, pcm in enumerate(sounds)]
        for seq in range(rounds)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    tensors = seeded_vggish()
    with tempfile.TemporaryDirectory() as folder:
        model = vggish_package(Path(folder) / "package", tensors)
    model.warm_up(options.batch)
    settings = load_settings(None, {"DETECTOR__BATCH__MAX_BATCH": str(options.batch)})
    pipeline = pipeline_for(model, settings)
    network = Vggish(tensors)
    spec = tf.TensorSpec([options.batch, 96, 64], tf.float32)
    bare = tf.function(lambda x: network(x)).get_concrete_function(spec)
    log_mel = tf.random.normal([options.batch, 96, 64], -3.0, 1.0, seed=1)
    told, batches = 0, round(CHUNK_SECONDS / settings.batch.hop_seconds)

    def run_pipeline(wire: list[tuple]) -> None:
        nonlocal told
        for key, value, headers in wire:
            pipeline.submit(Arrival(decode(key, value, headers)))
        for one in pipeline.run():
            alerts.encode(one.alert)
            told += 1

    warm, *rounds = records(options.batch, options.rounds + 1)
    run_pipeline(warm)
    bare(log_mel).numpy()
    bare_seconds, pipeline_seconds = [], []
    for wire in rounds:
        start = time.perf_counter()
        for _ in range(batches):
            bare(log_mel).numpy()
        middle = time.perf_counter()
        run_pipeline(wire)
        bare_seconds.append(middle - start)
        pipeline_seconds.append(time.perf_counter() - middle)
    ratios = [b / p for b, p in zip(bare_seconds, pipeline_seconds, strict=True)]
    examples = options.batch * batches
    print(f"bare VGGish, float32, batch {options.batch}: {examples / statistics.median(bare_seconds):.0f} examples/s")
    print(f"chunks in to alerts out:         {examples / statistics.median(pipeline_seconds):.0f} examples/s, "
          f"{told} alert events, hop {settings.batch.hop_seconds} s")  # fmt: skip
    print(
        f"ratio: {statistics.median(ratios):.3f}, median of {len(ratios)} pairs ({min(ratios):.3f}-{max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
