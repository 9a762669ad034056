"""From the end of a chunk's capture to an alert in a subscriber's hands: real processes, embedded bus, real time.

The daemon runs as its own process with the built-in model. This process publishes the chunks of many streams when
their last sample would have been captured, spread evenly over the chunk's length, and reads the alert topic as any
subscriber would. Loud synthetic shots come in random streams.

    python -m tests.benchmarks.bench_latency [--streams 50] [--seconds 40]
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from detector import alert as alerts
from detector.audio import float_to_int16
from detector.bus.embedded import EmbeddedBus
from detector.chunk import CHUNK_SAMPLES, CHUNK_SECONDS, Chunk, encode
from detector.demo import free_port, wait_ready
from tests.sounds import SHOT_SAMPLES, street_shot

SHOT_EVERY_CHUNKS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=40.0)
    options = parser.parse_args()
    rng = np.random.default_rng(1)
    rounds = round(options.seconds / CHUNK_SECONDS)
    shots = [street_shot(rng) for _ in range(8)]
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        # an eager threshold: what is measured is how long an alert takes, not what the model makes of these shots
        eager = {"DETECTOR__DECISION__OPEN_THRESHOLD": "0.05", "DETECTOR__LOG__LEVEL": "WARNING"}
        environ = {**os.environ, **eager, "DETECTOR__CONSOLE__PORT": str(port)}
        command = [sys.executable, "-m", "detector", "run", "--bus-path", str(folder / "bus.sqlite3")]
        with (folder / "detector.log").open("wb") as log:
            daemon = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
        wait_ready(daemon, port, folder)
        bus = EmbeddedBus(folder / "bus.sqlite3")
        consumer = bus.consumer(["gunfire.alerts"], None)
        latencies: list[float] = []
        ended = threading.Event()

        def subscribe() -> None:
            while not ended.is_set():
                for record in consumer.poll(0.2):
                    now = time.time()
                    alert = alerts.decode(record.key, record.value, record.headers)
                    if alert.state == "opened":
                        # the example ends with its chunk, so the decision's sample is the capture's end
                        latencies.append(
                            now - alert.onset_at_ns / 1e9 - (alert.decided_sample - alert.onset_sample) / 16e3
                        )

        subscriber = threading.Thread(target=subscribe)
        subscriber.start()
        producer = bus.producer()
        began, late = time.time() + 0.5, 0.0
        for seq in range(rounds):
            for i in range(options.streams):
                noise = rng.normal(0, 0.002, CHUNK_SAMPLES)
                if seq > 1 and (seq + i) % SHOT_EVERY_CHUNKS == 0:
                    at = int(rng.integers(0, CHUNK_SAMPLES - SHOT_SAMPLES))
                    noise[at : at + SHOT_SAMPLES] += shots[int(rng.integers(len(shots)))]
                begins = began + (seq + i / options.streams) * CHUNK_SECONDS
                chunk = Chunk(f"sensor-{i:03}", "bench", seq, int(begins * 1e9), float_to_int16(noise))
                key, value, headers = encode(chunk)
                wait = begins + CHUNK_SECONDS - time.time()
                if wait > 0:
                    time.sleep(wait)
                late = max(late, -wait)
                producer.send("audio.chunks", key, value, headers)
                producer.flush()
        time.sleep(2.0)
        ended.set()
        subscriber.join()
        daemon.send_signal(signal.SIGTERM)
        code = daemon.wait(30)
        producer.close()
        consumer.close()
        bus.close()
    fired = sum((seq + i) % SHOT_EVERY_CHUNKS == 0 for seq in range(2, rounds) for i in range(options.streams))
    ms = np.sort(latencies) * 1000
    print(f"{options.streams} streams, {rounds * options.streams} chunks, {fired} with shots, {len(ms)} alerts opened")
    print(f"capture end to subscriber: p50 {np.percentile(ms, 50):.0f} ms, p90 {np.percentile(ms, 90):.0f} ms, "
          f"p99 {np.percentile(ms, 99):.0f} ms, worst {ms[-1]:.0f} ms")  # fmt: skip
    print(f"producer late by at most {late * 1000:.0f} ms (counted in the above); daemon ended with exit code {code}")


if __name__ == "__main__":
    main()
