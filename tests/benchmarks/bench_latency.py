"""From the end of a chunk's capture to an alert in a subscriber's hands: real processes, a real bus, real time.

The daemon runs as its own process with the built-in model. This process publishes the chunks of many streams when
their last sample would have been captured, spread evenly over the chunk's length, and reads the alert topic as any
subscriber would. Loud synthetic shots come in random streams.

    python -m tests.benchmarks.bench_latency [--streams 50] [--seconds 40] [--bus kafka] [--delivery exactly_once ...]
        [--rounds 3] [--light]

``--bus kafka`` starts a broker of its own. Several deliveries are measured in turns, ``--rounds`` times each, and what
exactly-once adds at the median is told from the pairs: on a shared machine that says more than two runs apart.
``--light``: a scorer without a network, so that the bus alone is seen. ``--pairs 200``: no daemon at all; one alert is
handed to the bus plainly, the next in a transaction with eight positions, in turns, each timed until a subscriber has
it. Exit code 1 where exactly-once adds over 50 ms.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from detector import alert as alerts
from detector.audio import float_to_int16
from detector.bus import open_bus
from detector.bus.base import Commit
from detector.chunk import CHUNK_SAMPLES, CHUNK_SECONDS, Chunk, encode
from detector.config import load_settings
from detector.daemon import topic_settings
from detector.demo import free_port, wait_ready
from tests.sounds import SHOT_SAMPLES, street_shot

SHOT_EVERY_CHUNKS = 6
ADDED_TARGET_SECONDS = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=40.0, help="of audio in each round")
    parser.add_argument("--bus", choices=("embedded", "kafka"), default="embedded")
    modes = ("at_least_once", "exactly_once")
    parser.add_argument("--delivery", nargs="+", choices=modes, default=["at_least_once"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--light", action="store_true", help="a scorer without a network")
    parser.add_argument("--pairs", type=int, default=0, help="time single alerts through the bus, so many pairs")
    options = parser.parse_args()
    if options.pairs:
        with tempfile.TemporaryDirectory() as name, bus_environ(options.bus, Path(name)) as environ:
            return pairs(environ, options.pairs)
    medians: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name, bus_environ(options.bus, Path(name)) as environ:
        for turn in range(options.rounds):
            for delivery in options.delivery:
                folder = Path(name) / f"{delivery}-{turn}"
                folder.mkdir()
                print(f"{options.bus} bus, {delivery}:")
                seconds = measure(folder, {**environ, **own_topics(delivery, turn)}, options)
                medians.setdefault(delivery, []).append(float(np.median(seconds)))
    if len(medians) < 2:
        return 0
    added = [b - a for a, b in zip(medians["at_least_once"], medians["exactly_once"], strict=True)]
    print(
        f"exactly-once adds {np.median(added) * 1000:.0f} ms at p50 "
        f"({', '.join(f'{a * 1000:.0f}' for a in added)} ms in {len(added)} pairs)"
    )
    return int(np.median(added) > ADDED_TARGET_SECONDS)


@contextlib.contextmanager
def bus_environ(kind: str, folder: Path) -> Iterator[dict[str, str]]:
    """The bus as environment of the detector; a broker lives while inside."""
    if kind == "embedded":
        yield {"DETECTOR__BUS__EMBEDDED__PATH": str(folder / "bus.sqlite3")}
        return
    from tests.faults.table import bus_environ as kafka_environ
    from tests.faults.table import cluster_of

    with cluster_of(folder / "kafka", 1) as cluster:
        yield kafka_environ(cluster)


def pairs(environ: dict[str, str], count: int) -> int:
    """Time from handing an alert to the bus until a subscriber has it, plainly and in a transaction, in turns."""
    settings = load_settings(None, {**environ, **own_topics("exactly_once", 0)})
    topics = settings.topics
    bus = open_bus(settings.bus)
    bus.create_topics(topic_settings(topics))
    reader = bus.consumer([topics.alerts], None)
    member = bus.consumer([topics.chunks], settings.daemon.group)
    while len(member.assignment()) < topics.partitions:
        member.poll(0.1)
    plain, transactional = bus.producer(), bus.producer(transactional_id="pairs")
    seconds: dict[str, list[float]] = {"plain": [], "transaction": []}
    for n in range(count + 10):
        for kind in seconds:
            value = f"{kind}-{n}".encode()
            arrived: list[float] = []

            def wait(value: bytes = value, arrived: list[float] = arrived) -> None:
                while not arrived:
                    if any(record.value == value for record in reader.poll(0.5)):
                        arrived.append(time.perf_counter())

            waiting = threading.Thread(target=wait)
            waiting.start()
            began = time.perf_counter()
            if kind == "plain":
                plain.send(topics.alerts, b"sensor-1", value)
            else:
                commits = {partition: Commit(n, "x" * 200) for partition in member.assignment()}
                transactional.send(topics.alerts, b"sensor-1", value)
                transactional.commit(member, commits)
            waiting.join()
            if n >= 10:  # the first ones find coordinators
                seconds[kind].append(arrived[0] - began)
            member.poll(0)
    bus.close()
    for kind, values in seconds.items():
        ms = np.asarray(values) * 1000
        print(
            f"{kind}: p50 {np.percentile(ms, 50):.1f} ms, p90 {np.percentile(ms, 90):.1f} ms, least {ms.min():.1f} ms"
        )
    added = np.subtract(seconds["transaction"], seconds["plain"])
    print(f"exactly-once adds {np.median(added) * 1000:.1f} ms at p50 ({count} pairs)")
    return int(np.median(added) > ADDED_TARGET_SECONDS)


def own_topics(delivery: str, turn: int) -> dict[str, str]:
    name = f"{delivery}.{turn}"
    return {
        "DETECTOR__DAEMON__DELIVERY": delivery,
        "DETECTOR__DAEMON__GROUP": name,
        "DETECTOR__TOPICS__CHUNKS": f"{name}.chunks",
        "DETECTOR__TOPICS__ALERTS": f"{name}.alerts",
        "DETECTOR__TOPICS__DEADLETTER": f"{name}.deadletter",
        # an eager threshold: what is measured is how long an alert takes, not what the model makes of these shots
        "DETECTOR__DECISION__OPEN_THRESHOLD": "0.05",
        "DETECTOR__LOG__LEVEL": "WARNING",
    }


def measure(folder: Path, environ: dict[str, str], options: argparse.Namespace) -> npt.NDArray[np.float64]:
    """One daemon, one round of audio; seconds from capture end to subscriber of each alert opened, sorted."""
    rng = np.random.default_rng(1)
    rounds = round(options.seconds / CHUNK_SECONDS)
    shots = [street_shot(rng) for _ in range(8)]
    port = free_port()
    settings = load_settings(None, environ)
    bus = open_bus(settings.bus)
    bus.create_topics(topic_settings(settings.topics))
    program = "tests.faults.crest_daemon" if options.light else "detector"
    with (folder / "detector.log").open("wb") as log:
        daemon = subprocess.Popen(
            [sys.executable, "-m", program, "run"],
            env={**os.environ, **environ, "DETECTOR__CONSOLE__PORT": str(port)},
            stdout=log,
            stderr=log,
        )
    wait_ready(daemon, port, folder)
    consumer = bus.consumer([settings.topics.alerts], None)
    latencies: list[float] = []
    ended = threading.Event()

    def subscribe() -> None:
        while not ended.is_set():
            for record in consumer.poll(0.2):
                now = time.time()
                alert = alerts.decode(record.key, record.value, record.headers)
                if alert.state == "opened":
                    # the example ends with its chunk, so the decision's sample is the capture's end
                    latencies.append(now - alert.onset_at_ns / 1e9 - (alert.decided_sample - alert.onset_sample) / 16e3)

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
            producer.send(settings.topics.chunks, key, value, headers)
            producer.flush()
    time.sleep(2.0)
    ended.set()
    subscriber.join()
    daemon.send_signal(signal.SIGTERM)
    code = daemon.wait(30)
    bus.close()
    tell(options.streams, rounds, np.sort(latencies), late, code)
    return np.sort(np.asarray(latencies))


def tell(streams: int, rounds: int, seconds: Sequence[float] | npt.NDArray[np.float64], late: float, code: int) -> None:
    fired = sum((seq + i) % SHOT_EVERY_CHUNKS == 0 for seq in range(2, rounds) for i in range(streams))
    ms = np.asarray(seconds) * 1000
    print(f"{streams} streams, {rounds * streams} chunks, {fired} with shots, {len(ms)} alerts opened")
    print(f"capture end to subscriber: p50 {np.percentile(ms, 50):.0f} ms, p90 {np.percentile(ms, 90):.0f} ms, "
          f"p99 {np.percentile(ms, 99):.0f} ms, worst {ms[-1]:.0f} ms")  # fmt: skip
    print(f"producer late by at most {late * 1000:.0f} ms (counted in the above); daemon ended with exit code {code}")


if __name__ == "__main__":
    sys.exit(main())
