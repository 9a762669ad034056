"""Does memory stay flat? The daemon's own loop with the built-in model on an embedded bus, chunk after chunk.

    python tests/benchmarks/bench_soak.py [--chunks 100000] [--streams 64]

Exits with 1 if the resident set grows by 2 % or more after the warm-up (the first tenth).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import psutil
from prometheus_client import CollectorRegistry

from detector.bus.embedded import EmbeddedBus
from detector.chunk import CHUNK_SAMPLES, Chunk, encode
from detector.config import load_settings
from detector.daemon import Session
from detector.metrics import Metrics
from detector.model import load_model
from detector.pipeline import pipeline_for
from detector.topics import topic_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--streams", type=int, default=64)
    options = parser.parse_args()
    settings = load_settings(None, {"DETECTOR__TOPICS__CHUNKS_RETENTION_SECONDS": "120"})
    model = load_model(settings.model.name)
    model.warm_up(settings.batch.max_batch)
    process = psutil.Process()
    rng = np.random.default_rng(1)
    sounds = [rng.normal(0, 300, CHUNK_SAMPLES).astype(np.int16) for _ in range(32)]
    for loud in sounds[:4]:
        loud[5000:7000] += (rng.normal(0, 1, 2000) * 9000 * np.exp(-np.arange(2000) / 300)).astype(np.int16)
    with tempfile.TemporaryDirectory() as folder:
        bus = EmbeddedBus(Path(folder) / "bus.sqlite3", retention_seconds=60, retention_bytes=300_000_000)
        bus.create_topics(topic_settings(settings.topics))
        producer = bus.producer()
        pipeline = pipeline_for(model, settings)
        metrics = Metrics(CollectorRegistry())
        session = Session(bus, settings, pipeline, metrics)
        samples: list[tuple[int, int]] = []
        sent, began = 0, time.perf_counter()
        next_sample = 0
        while sent < options.chunks:
            now_ns = time.time_ns()
            for _ in range(4):
                seq = sent // options.streams
                for i in range(options.streams):
                    chunk = Chunk(f"sensor-{i}", "soak", seq, now_ns, sounds[(seq * 7 + i) % len(sounds)])
                    producer.send("audio.chunks", *encode(chunk))
                sent += options.streams
            producer.flush()
            while session.step():
                pass
            if sent >= next_sample:
                samples.append((sent, process.memory_info().rss))
                next_sample += options.chunks // 40
        session.commit()
        seconds = time.perf_counter() - began
        analysed = pipeline.account.analysed
        told = sum(metrics.registry.get_sample_value("gunfire_alerts_published_total", {"state": s}) or 0 for s in
                   ("opened", "updated", "closed"))  # fmt: skip
        session.close()
        producer.close()
        bus.close()
    warm = [rss for chunks, rss in samples if chunks >= options.chunks // 10]
    tenth = max(1, len(warm) // 10)
    first, last = np.median(warm[:tenth]), np.median(warm[-tenth:])
    growth = last / first - 1
    for chunks, rss in samples[:: max(1, len(samples) // 10)]:
        print(f"{chunks:>8} chunks  {rss / 2**20:7.1f} MiB")
    print(f"{analysed} of {sent} chunks analysed, {told:.0f} alert events, {sent / seconds:.0f} chunks/s with the bus")
    print(
        f"resident set after warm-up: {first / 2**20:.1f} MiB, at the end {last / 2**20:.1f} MiB, growth {growth:+.2%}"
    )
    if growth >= 0.02 or analysed != sent:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
