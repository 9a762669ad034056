"""Kafka's share of the work: what a real broker beside it lets one process produce and consume, and what a chunk costs.

    python tests/benchmarks/bench_kafka.py [--chunks 12000] [--rounds 3] [--only produce consume ...]

PCM chunks of 30,720 bytes with their headers, eight partitions, broker (``deploy/kafka``) on the same machine. Every
figure is a process of its own; rate by the wall clock, and CPU time of the whole process (the library's network thread
included), which other work on the machine sways less. The best of the rounds counts. On a machine that does other
things the rates by the wall clock say nothing; chunks a CPU second are then the nearer bound. Groups of figures:

* produce, consume: this project's path and, in the same round, the bare client with the same settings
* settings: what single settings of the client are worth
* session: the daemon's loop with a model that costs nothing
* share: CPU outside the network beside VGGish at batch 64
* processes: two processes at once

Exit code 1 below a target. ``confluent-kafka`` is measured beside them where it is installed; nothing here needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from detector.bus import open_bus
from detector.bus.base import TopicSettings
from detector.chunk import CHUNK_SAMPLES, Chunk, decode, encode
from detector.config import BusSettings, KafkaSettings, load_settings
from detector.errors import BusUnavailable
from detector.examples import ExampleAssembler

BROKER = Path(__file__).parents[2] / "deploy" / "kafka" / "broker.py"
PARTITIONS = 8
STREAMS = 256
GROUPS = ("produce", "consume", "settings", "session", "share", "processes")
CONSUME_TARGET, PRODUCE_TARGET, SHARE_TARGET = 7_000.0, 4_500.0, 0.10
_IDLE_SECONDS = 20.0
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Cost:
    """What ``chunks`` took one process."""

    chunks: int
    wall_seconds: float
    cpu_seconds: float

    @property
    def per_second(self) -> float:
        return self.chunks / self.wall_seconds

    @property
    def cpu_microseconds(self) -> float:
        return 1e6 * self.cpu_seconds / self.chunks


class _Meter:
    """Wall and CPU time of this process since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def cost(self, chunks: int) -> Cost:
        return Cost(chunks, time.perf_counter() - self._wall, time.process_time() - self._cpu)


# --- what a measured process does


def _settings(address: str, **more: Any) -> BusSettings:
    return BusSettings(kind="kafka", kafka=KafkaSettings(bootstrap_servers=(address,), **more))


def _chunks(count: int) -> Iterator[Chunk]:
    rng = np.random.default_rng(1)
    sounds = [rng.integers(-3000, 3000, CHUNK_SAMPLES).astype(np.int16) for _ in range(16)]
    started_ns = time.time_ns()
    for n in range(count):
        seq, stream = divmod(n, STREAMS)
        yield Chunk(f"sensor-{stream}", "bench", seq, started_ns + seq * 960_000_000, sounds[n % len(sounds)])


def produce(address: str, topic: str, count: int, more: dict[str, Any]) -> Cost:
    """Make, encode and send chunks through the Kafka bus."""
    bus = open_bus(_settings(address, **more))
    producer = bus.producer()
    producer.send(topic, *encode(next(_chunks(1))))
    producer.flush()
    meter = _Meter()
    for chunk in _chunks(count):
        producer.send(topic, *encode(chunk))
    producer.flush(300)
    cost = meter.cost(count)
    bus.close()
    return cost


def produce_bare(address: str, topic: str, count: int, more: dict[str, Any]) -> Cost:
    """The library alone, on records that lie ready."""
    import kafka

    wire = [encode(chunk) for chunk in _chunks(STREAMS)]
    ready = [(key, value, list(headers)) for key, value, headers in wire]
    config = {"batch_size": MIB, "linger_ms": 20, "max_request_size": 16 * MIB, "acks": "all", **more}
    client = kafka.KafkaProducer(bootstrap_servers=[address], **config)
    client.send(topic, ready[0][1], ready[0][0], ready[0][2]).get(30)
    meter = _Meter()
    for n in range(count):
        key, value, headers = ready[n % STREAMS]
        client.send(topic, value, key, headers)
    client.flush(300)
    cost = meter.cost(count)
    client.close()
    return cost


def consume(address: str, topic: str, count: int, upto: str, more: dict[str, Any]) -> Cost:
    """Poll the Kafka bus; ``upto`` is ``poll``, ``decode`` or ``examples``."""
    bus = open_bus(_settings(address, **more))
    consumer = bus.consumer([topic], None)
    streams: dict[str, ExampleAssembler] = {}
    got = 0
    meter: _Meter | None = None
    deadline = time.monotonic() + _IDLE_SECONDS
    while got < count:
        records = consumer.poll(1.0)
        if records:
            meter = meter or _Meter()
            deadline = time.monotonic() + _IDLE_SECONDS
        elif time.monotonic() > deadline:
            raise SystemExit(f"only {got} of {count} chunks came")
        for record in records:
            got += 1
            if upto == "poll":
                continue
            chunk = decode(record.key, record.value, record.headers)
            if upto == "examples":
                assembler = streams.get(chunk.stream_id)
                if assembler is None:
                    assembler = streams[chunk.stream_id] = ExampleAssembler()
                assembler.push(chunk.pcm, chunk.first_sample)
    assert meter is not None
    cost = meter.cost(got)
    bus.close()
    return cost


def consume_bare(address: str, topic: str, count: int, more: dict[str, Any]) -> Cost:
    import kafka

    config = {"max_partition_fetch_bytes": MIB, "isolation_level": "read_committed", **more}
    client = kafka.KafkaConsumer(bootstrap_servers=[address], enable_auto_commit=False, **config)
    partitions = [kafka.TopicPartition(topic, n) for n in range(PARTITIONS)]
    client.assign(partitions)
    client.seek_to_beginning(*partitions)
    got = 0
    meter: _Meter | None = None
    while got < count:
        answer = client.poll(timeout_ms=int(_IDLE_SECONDS * 1000), max_records=500)
        if not answer:
            raise SystemExit(f"only {got} of {count} chunks came")
        meter = meter or _Meter()
        got += sum(map(len, answer.values()))
    assert meter is not None
    cost = meter.cost(got)
    client.close()
    return cost


def consume_confluent(address: str, topic: str, count: int, more: dict[str, Any]) -> Cost:
    import confluent_kafka

    config = {"bootstrap.servers": address, "group.id": uuid.uuid4().hex, "enable.auto.commit": False, **more}
    client = confluent_kafka.Consumer(config)
    client.assign([confluent_kafka.TopicPartition(topic, n, 0) for n in range(PARTITIONS)])
    got = 0
    meter: _Meter | None = None
    while got < count:
        records = client.consume(500, _IDLE_SECONDS)
        if not records:
            raise SystemExit(f"only {got} of {count} chunks came")
        meter = meter or _Meter()
        for record in records:
            got += 1
            record.key(), record.value(), record.headers()
    assert meter is not None
    cost = meter.cost(got)
    client.close()
    return cost


class _NoModel:
    """Scores at no cost: what is left is everything around the network."""

    def embed(self, pcm: Any) -> Any:
        return np.zeros((len(pcm), 128), np.float32)

    def classify(self, windows: Any, num_frames: Any) -> Any:
        return np.full((len(windows), 3), 0.01, np.float32)


def session(address: str, topic: str, count: int, more: dict[str, Any]) -> Cost:
    """The daemon's loop: poll, decode, examples, windows, decision, commit; with a model that costs nothing."""
    from prometheus_client import CollectorRegistry

    from detector.alert import ModelIdentity
    from detector.daemon import Session
    from detector.decision import DecisionSettings
    from detector.metrics import Metrics
    from detector.pipeline import Pipeline
    from detector.topics import topic_settings

    environ = {
        "DETECTOR__TOPICS__CHUNKS": topic,
        "DETECTOR__DAEMON__GROUP": uuid.uuid4().hex,
        "DETECTOR__DAEMON__STREAM_IDLE_SECONDS": "86400",
        **{f"DETECTOR__DAEMON__{key}": value for key, value in more.items()},
    }
    settings = load_settings(None, environ)
    bus = open_bus(_settings(address))
    bus.create_topics(topic_settings(settings.topics))
    pipeline = Pipeline(
        _NoModel(),
        labels=("a", "b", "c"),
        model=ModelIdentity("none", "0", "0" * 64),
        window_examples=10,
        decision=DecisionSettings(open_threshold=0.5, close_threshold=0.3, family=(0, 1)),
        max_batch=settings.batch.max_batch,
        idle_seconds=86_400,
    )
    loop = Session(bus, settings, pipeline, Metrics(CollectorRegistry()))
    meter: _Meter | None = None
    deadline = time.monotonic() + _IDLE_SECONDS
    while pipeline.account.analysed < count:
        try:
            read = loop.step()
        except BusUnavailable:  # joining may still go on where the machine is busy; nothing is lost
            continue
        if read:
            meter = meter or _Meter()
            deadline = time.monotonic() + _IDLE_SECONDS
        elif time.monotonic() > deadline:
            raise SystemExit(f"only {pipeline.account.analysed} of {count} chunks were analysed")
    assert meter is not None
    cost = meter.cost(pipeline.account.analysed)
    loop.close()
    bus.close()
    return cost


def network(batch: int, rounds: int) -> Cost:
    """VGGish and an LSTM alone: CPU of ``embed`` and ``classify``, log-mel included."""
    from tests.benchmarks.bench_pipeline import seeded_vggish, vggish_package

    with tempfile.TemporaryDirectory() as folder:
        model = vggish_package(Path(folder) / "package", seeded_vggish())
    pcm = np.random.default_rng(1).integers(-3000, 3000, (batch, 15_600)).astype(np.int16)
    windows = np.zeros((batch, 10, 128), np.float32)
    frames = np.full(batch, 10, np.int32)
    model.embed(pcm)
    model.classify(windows, frames)
    meter = _Meter()
    for _ in range(rounds):
        model.embed(pcm)
        model.classify(windows, frames)
    return meter.cost(batch * rounds)


def _without_crc32c(function: Callable[..., Cost], *arguments: Any) -> Cost:
    """The library's own checksum, in Python, is what it takes without its extra ``crc32c``."""
    sys.modules["crc32c"] = None  # type: ignore[assignment]
    return function(*arguments)


# --- the driver


def _child(results: Any, function: Callable[..., Cost], arguments: tuple[Any, ...]) -> None:
    results.put(function(*arguments))


def in_processes(*calls: tuple[Any, ...]) -> list[Cost]:
    """Run each ``(function, *arguments)`` in a new process, all at once."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    children = [context.Process(target=_child, args=(results, function, rest)) for function, *rest in calls]
    for child in children:
        child.start()
    for child in children:
        child.join()
    if any(child.exitcode for child in children):
        raise SystemExit("a measured process failed; its error stands above")
    return [results.get(timeout=10) for _ in children]


@dataclass(slots=True)
class Table:
    """Figures as they come; keeps the best of the rounds."""

    rounds: int
    failed: int = 0

    def row(self, name: str, call: Callable[[], list[Cost]], target: float | None = None) -> Cost:
        """Print one figure: total rate of the processes, CPU of each chunk."""
        found = []
        for _ in range(self.rounds):
            costs = call()
            chunks = sum(c.chunks for c in costs)
            found.append(Cost(chunks, max(c.wall_seconds for c in costs), sum(c.cpu_seconds for c in costs)))
        fastest = max(found, key=lambda c: c.per_second)
        cheapest = min(found, key=lambda c: c.cpu_microseconds)
        verdict = ""
        if target is not None:
            met = fastest.per_second >= target
            self.failed += not met
            verdict = f"  target {target:,.0f}: {'met' if met else 'MISSED'}"
        print(
            f"{name:52} {fastest.per_second:9,.0f} chunks/s  {cheapest.cpu_microseconds:8.1f} us CPU a chunk "
            f"({1e6 / cheapest.cpu_microseconds:,.0f}/CPU s){verdict}",
            flush=True,
        )
        return cheapest


def broker_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deploy_kafka_broker", BROKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def broker(address: str | None) -> Iterator[str]:
    """The address of a broker: the one given, or one started for as long as this lasts."""
    if address is not None:
        yield address
        return
    module = broker_module()
    if missing := module.missing_tools():
        raise SystemExit(f"Not installed: {', '.join(missing)}. Debian: apt install openjdk-17-jre-headless maven")
    with tempfile.TemporaryDirectory(prefix="bench-kafka-") as folder:
        started = module.Broker(Path(folder), module.free_port())
        started.start()
        try:
            yield started.address
        finally:
            started.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description="Throughput with a Kafka broker on this machine.")
    parser.add_argument("--chunks", type=int, default=12_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--bootstrap", metavar="HOST:PORT", help="A broker that runs already; default: start one.")
    options = parser.parse_args()
    count, groups, table = options.chunks, set(options.only), Table(options.rounds)
    print(f"{count} chunks, best of {options.rounds}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    with broker(options.bootstrap) as address:
        admin = open_bus(_settings(address))

        def topic(partitions: int = PARTITIONS) -> str:
            name = f"bench-{uuid.uuid4().hex[:8]}"
            admin.create_topics({name: TopicSettings(partitions=partitions)})
            return name

        if "produce" in groups:
            table.row("produce: bare client", lambda: in_processes((produce_bare, address, topic(), count, {})))
            table.row(
                "produce: make, encode, send",
                lambda: in_processes((produce, address, topic(), count, {})),
                PRODUCE_TARGET,
            )
        filled = topic()
        if groups & {"consume", "settings", "session", "share"}:
            in_processes((produce, address, filled, count, {}))
        if "consume" in groups:
            table.row("consume: bare client", lambda: in_processes((consume_bare, address, filled, count, {})))
            for upto in ("poll", "decode", "examples"):
                table.row(
                    f"consume: bus, up to {upto}",
                    lambda upto=upto: in_processes((consume, address, filled, count, upto, {})),  # type: ignore[misc]
                    CONSUME_TARGET if upto == "examples" else None,
                )
            if importlib.util.find_spec("confluent_kafka") is not None:
                table.row(
                    "consume: confluent-kafka, for comparison",
                    lambda: in_processes((consume_confluent, address, filled, count, {})),
                )
        if "settings" in groups:
            for size in (256 * 1024, MIB, 8 * MIB):
                table.row(
                    f"consume: max_partition_fetch_bytes {size // 1024} KiB",
                    lambda size=size: in_processes(  # type: ignore[misc]
                        (consume, address, filled, count, "examples", {"max_partition_fetch_bytes": size})
                    ),
                )
            table.row(
                "consume: without crc32c",
                lambda: in_processes((_without_crc32c, consume, address, filled, min(count, 600), "examples", {})),
            )
            for size, linger in ((16 * 1024, 0), (64 * 1024, 5), (MIB, 0), (MIB, 5), (MIB, 20)):
                table.row(
                    f"produce, bare: batch_size {size // 1024} KiB, linger {linger} ms",
                    lambda size=size, linger=linger: in_processes(  # type: ignore[misc]
                        (produce_bare, address, topic(), count // 2, {"batch_size": size, "linger_ms": linger})
                    ),
                )
            table.row(
                "produce: without crc32c",
                lambda: in_processes((_without_crc32c, produce, address, topic(), min(count, 600), {})),
            )
        around: Cost | None = None
        if groups & {"session", "share"}:
            around = table.row(
                "session: the daemon's loop, a model at no cost",
                lambda: in_processes((session, address, filled, count, {})),
            )
            table.row(
                "session: the same, exactly once",
                lambda: in_processes((session, address, filled, count, {"DELIVERY": "exactly_once"})),
            )
        if "share" in groups and around is not None:
            alone = table.row("network: VGGish and LSTM, batch 64", lambda: in_processes((network, 64, 8)))
            share = around.cpu_microseconds / (around.cpu_microseconds + alone.cpu_microseconds)
            table.failed += share > SHARE_TARGET
            print(f"share of CPU outside the network: {share:.2%}  target at most {SHARE_TARGET:.0%}")
        if "processes" in groups:
            halves = [topic(), topic()]
            for name in halves:
                in_processes((produce, address, name, count, {}))
            table.row(
                "consume: two processes at once, up to examples",
                lambda: in_processes(*((consume, address, name, count, "examples", {}) for name in halves)),
            )
            table.row(
                "produce: two processes at once",
                lambda: in_processes(*((produce, address, topic(), count, {}) for _ in range(2))),
            )
        admin.close()
    print(f"load average at the end: {os.getloadavg()[0]:.1f}")
    return 1 if table.failed else 0


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the broker would be left behind
    sys.exit(main())
