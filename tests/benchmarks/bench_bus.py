"""How many chunks (30,720 bytes, six headers) the embedded bus takes and gives each second.

    python tests/benchmarks/bench_bus.py [--chunks 15000] [--path FILE]

Three figures: producing alone, consuming alone, and both at once in separate processes. Exit code 1 below 3,000/s.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing.queues import Queue
from pathlib import Path

from detector.bus.base import Headers, TopicSettings
from detector.bus.embedded import EmbeddedBus

TARGET_CHUNKS_PER_SECOND = 3000
RETENTION_BYTES = 1 << 30
HEADERS: Headers = tuple((name, b"0123456789abcdef") for name in ("v", "enc", "rate", "session", "seq", "captured_at"))


def produce(path: Path, chunks: int, results: Queue[float] | None = None) -> float:
    bus = EmbeddedBus(path, retention_bytes=RETENTION_BYTES)
    producer, value = bus.producer(), os.urandom(30_720)
    started = time.perf_counter()
    for n in range(chunks):
        producer.send("chunks", b"sensor-%d" % (n % 50), value, HEADERS)
    producer.flush(120)
    rate = chunks / (time.perf_counter() - started)
    bus.close()
    if results is not None:
        results.put(rate)
    return rate


def consume(path: Path, chunks: int) -> float:
    bus = EmbeddedBus(path)
    consumer = bus.consumer(["chunks"], None)
    started, got = 0.0, 0
    while got < chunks:
        records = consumer.poll(10)
        if not records:
            break
        started = started or time.perf_counter()
        got += len(records)
    rate = got / (time.perf_counter() - started)
    bus.close()
    if got < chunks:
        raise SystemExit(f"only {got} of {chunks} chunks came")
    return rate


def main() -> int:
    parser = argparse.ArgumentParser(description="Throughput of the embedded bus.")
    parser.add_argument("--chunks", type=int, default=15_000)
    parser.add_argument("--path", type=Path, help="bus file (default: a new one in the temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.path or Path(folder) / "bus.sqlite3"
        bus = EmbeddedBus(path)
        bus.create_topics({"chunks": TopicSettings()})
        figures = {"produce": produce(path, arguments.chunks), "consume": consume(path, arguments.chunks)}
        both_path = Path(folder) / "both.sqlite3"
        both = EmbeddedBus(both_path)
        both.create_topics({"chunks": TopicSettings()})
        context = multiprocessing.get_context("spawn")
        results: Queue[float] = context.Queue()
        writer = context.Process(target=produce, args=(both_path, arguments.chunks, results))
        writer.start()
        figures["consume, at once"] = consume(both_path, arguments.chunks)
        figures["produce, at once"] = results.get(timeout=60)
        writer.join()
        bus.close()
        both.close()
    for name, rate in figures.items():
        print(f"{name:18} {rate:9.0f} chunks/s  {rate / TARGET_CHUNKS_PER_SECOND:5.1f} x the target")
    return 0 if min(figures.values()) >= TARGET_CHUNKS_PER_SECOND else 1


if __name__ == "__main__":
    sys.exit(main())
