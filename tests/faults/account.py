"""A load that is known in full, real detector processes, and the balance of what came of it.

Every chunk is a function of seed, stream and number, so each alert is known beforehand: one unbroken pipeline over the
records that the topic holds gives the reference. What the detectors published, however often they died, must be that
very set. The load leaves no gaps to hide in: a shot every few chunks puts every chunk into the window of some alert,
whose scores tell if one was left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from detector import alert as alerts
from detector.bus import open_bus
from detector.bus.base import Bus, Producer, Record, TopicPartition
from detector.chunk import CHUNK_SAMPLES, CHUNK_SECONDS, decode
from detector.config import Settings, load_settings
from detector.decision import DecisionSettings
from detector.errors import BusError, BusUnavailable, ChunkError
from detector.pipeline import Pipeline
from detector.stream import Arrival
from detector.topics import topic_settings
from producers.publish import Publisher, Report
from producers.source import Block
from tests.scorers import IDENTITY, LABELS, CrestScorer

REPOSITORY = Path(__file__).parents[2]
START_NS = 1_790_000_000_000_000_000
SHOT_EVERY_CHUNKS = 6
DEADLINE_SECONDS = 120.0
PARTITIONS = 4
DECISION = DecisionSettings(
    open_threshold=0.6, close_threshold=0.4, family=(0, 1), look_alikes=(2,), hold_seconds=1.5, max_alert_seconds=20.0,
    support_window_examples=3,
)  # fmt: skip
_NOISES = 32
_ENVIRON = {
    "DETECTOR__TOPICS__PARTITIONS": str(PARTITIONS),
    "DETECTOR__DECISION__OPEN_THRESHOLD": str(DECISION.open_threshold),
    "DETECTOR__DECISION__CLOSE_THRESHOLD": str(DECISION.close_threshold),
    "DETECTOR__DECISION__HOLD_SECONDS": str(DECISION.hold_seconds),
    "DETECTOR__DECISION__MAX_ALERT_SECONDS": str(DECISION.max_alert_seconds),
    "DETECTOR__DAEMON__STREAM_IDLE_SECONDS": "86400",
    "DETECTOR__LOG__LEVEL": "INFO",
}


def until(
    condition: object, what: str, deadline_seconds: float = DEADLINE_SECONDS, pause_seconds: float = 0.05
) -> None:
    """Wait for ``condition()``; AssertionError names ``what`` if it does not come."""
    assert callable(condition)
    deadline = time.monotonic() + deadline_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {deadline_seconds:g} s: {what}"
        time.sleep(pause_seconds)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Load:
    """Chunks of many streams at a pace, by the producers' own publisher, on a thread; and now and then a junk record.

    Args:
        rate: chunks a second, over all streams.
        junk_every: one record in so many is no chunk; 0: none.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        seed: int = 1,
        streams: int = 12,
        rate: float = 60.0,
        junk_every: int = 40,
        spool_seconds: float = 600.0,
        chunks: int | None = None,
    ) -> None:
        self._settings = settings
        self._seed = seed
        self._rate = rate
        self._junk_every = junk_every
        self._chunks = chunks
        rng = np.random.default_rng(seed)
        self._noise = [rng.normal(0, 200, CHUNK_SAMPLES) for _ in range(_NOISES)]
        tail = np.arange(4000)
        self._shot = rng.normal(0, 1, len(tail)) * 12_000 * np.exp(-tail / 500)
        self.made = 0  # chunks handed to the publisher
        self.streams = streams
        self.report: Report | None = None
        self._stop = threading.Event()
        self._publisher = Publisher(
            lambda: open_bus(settings.bus),
            topic=settings.topics.chunks,
            topic_settings=topic_settings(settings.topics)[settings.topics.chunks],
            spool_seconds=spool_seconds,
            last_retry_seconds=2.0,
        )
        self._thread = threading.Thread(target=self._run, name="load")

    def pcm(self, stream: int, seq: int) -> npt.NDArray[np.int16]:
        """``(15360,)``: the audio of chunk ``seq``."""
        rng = np.random.default_rng([self._seed, stream, seq])
        pcm = self._noise[int(rng.integers(_NOISES))] * rng.uniform(0.8, 1.2)
        if seq > 0 and (seq + stream) % SHOT_EVERY_CHUNKS == 0:
            at = int(rng.integers(0, CHUNK_SAMPLES - len(self._shot)))
            pcm[at : at + len(self._shot)] += self._shot * rng.uniform(0.6, 1.4)
        return np.clip(pcm, -32768, 32767).astype(np.int16)

    def start(self) -> Load:
        self._thread.start()
        return self

    def finish(self, deadline_seconds: float = 120.0) -> Report:
        """Stop making chunks; send what is spooled."""
        self._stop.set()
        self._thread.join()
        self.report = self._publisher.close(deadline_seconds)
        return self.report

    def wait(self) -> None:
        """Until all ``chunks`` are made."""
        self._thread.join()

    def _run(self) -> None:
        opened = [self._publisher.stream(f"sensor-{i:02}") for i in range(self.streams)]
        began, seq = time.monotonic(), 0
        junk = _Junk(self._settings)
        while not self._stop.is_set() and (self._chunks is None or self.made < self._chunks):
            for i, stream in enumerate(opened):
                at_ns = START_NS + round(seq * CHUNK_SECONDS * 1e9)
                stream.write(Block(self.pcm(i, seq), at_ns, starts_session=False))
                self.made += 1
                if self._junk_every and self.made % self._junk_every == 0:
                    junk.send(self.made)
                self._stop.wait(max(0.0, began + self.made / self._rate - time.monotonic()))
            seq += 1
        junk.close()


class _Junk:
    """Records that are no chunks; left out while the bus is away, so that they never wait."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._producer: Producer | None = None
        self._bus: Bus | None = None

    def send(self, number: int) -> None:
        try:
            if self._bus is None:
                self._bus = open_bus(self._settings.bus)
                self._producer = self._bus.producer()
            assert self._producer is not None
            self._producer.send(self._settings.topics.chunks, b"sensor-00", b"junk %d" % number)
        except BusError:
            self.close()

    def close(self) -> None:
        if self._bus is not None:
            with contextlib.suppress(BusError):
                self._bus.close()
        self._bus = self._producer = None


class Detector:
    """A detector as a process of its own. ``member``: its static name in the group."""

    def __init__(self, trial: Trial, *, member: str | None = None, **environ: str) -> None:
        self._trial = trial
        self.port = free_port()
        self.log_file = trial.folder / "detector.log"
        extra = {"DETECTOR__CONSOLE__PORT": str(self.port), "PYTHONPATH": str(REPOSITORY)}
        if member is not None and trial.settings.bus.kind == "kafka":
            extra["DETECTOR__BUS__KAFKA__GROUP_INSTANCE_ID"] = member
        self.spawned_seconds = time.monotonic()
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.crest_daemon", "run"],
                env={**os.environ, **trial.environ, **extra, **environ},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=REPOSITORY,
            )

    def metrics(self) -> dict[str, float]:
        """By name with labels; empty while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as reply:
                text = reply.read().decode()
        except OSError:
            return {}
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    def metric(self, name: str) -> float:
        return self.metrics().get(name, 0.0)

    @property
    def analysed(self) -> float:
        return self.metric("gunfire_chunks_analysed_total")

    @property
    def commits(self) -> float:
        return self.metric('gunfire_commits_total{outcome="stored"}')

    def works(self) -> bool:
        """It has analysed something new and committed it."""
        assert self.process.poll() is None, f"the detector ended; see {self.log_file}"
        metrics = self.metrics()
        stored = metrics.get('gunfire_commits_total{outcome="stored"}', 0.0)
        return stored > 0 and metrics.get("gunfire_chunks_analysed_total", 0.0) > 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL


@dataclass(frozen=True, slots=True)
class Balance:
    """The account of one trial. ``problems`` is empty where it balances.

    ``doubled``: alert events published again with equal id and content. ``skipped``: chunks the overload rule left out.
    """

    produced: int
    analysed: int
    rejected: int
    skipped: int
    alerts: int
    lost: int
    doubled: int
    problems: tuple[str, ...]


class Trial:
    """Topics and a group of its own on a bus, the load on them, and the detectors.

    Args:
        environ: the bus, as environment of the detector.
    """

    def __init__(self, folder: Path, environ: Mapping[str, str], *, delivery: str = "at_least_once") -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        name = f"f{uuid.uuid4().hex[:8]}"
        self.environ = {
            **_ENVIRON,
            **environ,
            "DETECTOR__DAEMON__DELIVERY": delivery,
            "DETECTOR__DAEMON__GROUP": name,
            "DETECTOR__TOPICS__CHUNKS": f"{name}.chunks",
            "DETECTOR__TOPICS__ALERTS": f"{name}.alerts",
            "DETECTOR__TOPICS__DEADLETTER": f"{name}.deadletter",
        }
        self.settings = load_settings(None, self.environ)
        self.delivery = delivery
        self._detectors: list[Detector] = []
        self._loads: list[Load] = []

    def create_topics(self) -> None:
        with self.bus() as bus:
            bus.create_topics(topic_settings(self.settings.topics))

    @contextlib.contextmanager
    def bus(self) -> Iterator[Bus]:
        bus = open_bus(self.settings.bus)
        try:
            yield bus
        finally:
            bus.close()

    def load(self, **options: object) -> Load:
        load = Load(self.settings, **options)  # type: ignore[arg-type]
        self._loads.append(load)
        return load.start()

    def detector(self, *, member: str | None = None, **environ: str) -> Detector:
        detector = Detector(self, member=member, **environ)
        self._detectors.append(detector)
        return detector

    def stop_detectors(self) -> None:
        """In order, as an operator would; AssertionError where one does not end well."""
        for detector in self._detectors:
            if detector.process.poll() is None:
                code = detector.stop()
                assert code == 0, f"a detector ended with exit code {code}; see {detector.log_file}"

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *exc: object) -> None:
        for load in self._loads:
            if load.report is None:
                load.finish(0.1)
        for detector in self._detectors:
            if detector.process.poll() is None:
                detector.kill()

    def behind(self) -> int:
        """Records of the chunk topic that the group has not committed."""
        with self.bus() as bus:
            consumer = bus.consumer(
                [self.settings.topics.chunks], self.settings.daemon.group
            )  # never polled: no member
            left = 0
            for number in range(bus.partitions(self.settings.topics.chunks) or 0):
                partition = TopicPartition(self.settings.topics.chunks, number)
                committed = consumer.committed(partition)
                left += consumer.end_offset(partition) - (0 if committed is None else committed.offset)
            return left

    def drain(self, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        """Wait until everything is read and committed; AssertionError when it gets no further for so long."""
        left: int | None = None
        while left != 0:
            before = left

            def moved(before: int | None = before) -> bool:
                nonlocal left
                with contextlib.suppress(BusUnavailable):
                    left = self.behind()
                return left is not None and (left == 0 or before is None or left < before)

            until(moved, f"all of {self.settings.topics.chunks} committed; {left} are not", deadline_seconds, 0.5)

    def records(self, topic: str) -> list[Record]:
        """All that a subscriber can read now, in order in each partition."""
        with self.bus() as bus:
            consumer = bus.consumer([topic], None)
            ends = {p: consumer.end_offset(p) for p in consumer.assignment()}
            found: list[Record] = []
            deadline = time.monotonic() + DEADLINE_SECONDS
            while any(consumer.position(p) < end for p, end in ends.items()):
                polled = consumer.poll(0.2, 2000)
                found += polled
                if not polled and all(_marker_only(consumer.position(p), end) for p, end in ends.items()):
                    break
                assert time.monotonic() < deadline, f"{topic} could not be read to its end"
            return found

    def balance(self, report: Report | None = None) -> Balance:
        """Compare what was published with what one unbroken pipeline makes of the same log."""
        chunk_records = self.records(self.settings.topics.chunks)
        by_partition: dict[TopicPartition, list[Record]] = {}
        for record in chunk_records:
            by_partition.setdefault(record.topic_partition, []).append(record)
        expected: Counter[str] = Counter()
        told: dict[str, alerts.Alert] = {}
        rejected: set[tuple[int, int]] = set()
        analysed = duplicates = 0
        for records in by_partition.values():
            found, bad, pipeline = _reference(records)
            rejected |= bad
            analysed += pipeline.account.analysed
            duplicates += pipeline.account.duplicates
            for one in found:
                expected[one.event_id] += 1
                told[one.event_id] = one
        problems: list[str] = []
        published = [
            _timeless(alerts.decode(r.key, r.value, r.headers)) for r in self.records(self.settings.topics.alerts)
        ]
        counts = Counter(a.event_id for a in published)
        lost = sorted(expected.keys() - counts.keys())
        foreign = sorted(counts.keys() - expected.keys())
        doubled = sum(counts.values()) - len(counts)
        differing = sorted({a.event_id for a in published if a.event_id in told and a != told[a.event_id]})
        if lost:
            problems.append(f"{len(lost)} alert events lost, {_some(lost)}")
        if foreign:
            problems.append(f"{len(foreign)} alert events that should not be, {_some(foreign)}")
        if differing:
            problems.append(f"{len(differing)} alert events with other content, {_some(differing)}")
        if doubled and self.delivery == "exactly_once":
            problems.append(f"{doubled} alert events published twice under exactly_once")
        letters = Counter(
            (int(dict(r.headers)["deadletter_partition"]), int(dict(r.headers)["deadletter_offset"]))
            for r in self.records(self.settings.topics.deadletter)
        )
        if letters.keys() != rejected:
            problems.append(
                f"{len(rejected - letters.keys())} dead letters lost, "
                f"{len(letters.keys() - rejected)} that should not be"
            )
        if self.delivery == "exactly_once" and sum(letters.values()) > len(letters):
            problems.append(f"{sum(letters.values()) - len(letters)} dead letters twice under exactly_once")
        behind = self.behind()
        if behind:
            problems.append(f"{behind} records not committed")
        if analysed + duplicates + len(rejected) != len(chunk_records):
            problems.append(f"{analysed} + {duplicates} + {len(rejected)} are not the {len(chunk_records)} records")
        if report is not None:
            problems += _missing(chunk_records, report)
        if not expected:
            problems.append("the load had no alert: nothing was tried")
        return Balance(
            produced=len(chunk_records),
            analysed=analysed,
            rejected=len(rejected),
            skipped=0,
            alerts=len(expected),
            lost=len(lost),
            doubled=doubled,
            problems=tuple(problems),
        )


def _marker_only(position: int, end: int) -> bool:
    """What is left before ``end`` are the marks of transactions, which no reader is given."""
    return position >= end - 1


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")


def _timeless(alert: alerts.Alert) -> alerts.Alert:
    return dataclasses.replace(alert, latency_seconds=None)


def _reference(records: Sequence[Record]) -> tuple[list[alerts.Alert], set[tuple[int, int]], Pipeline]:
    """Alerts, (partition, offset) of what is no chunk, and the pipeline's own counts, over one partition's log."""
    pipeline = Pipeline(CrestScorer(), labels=LABELS, model=IDENTITY, window_examples=10, decision=DECISION)
    found: list[alerts.Alert] = []
    bad: set[tuple[int, int]] = set()
    for record in records:
        try:
            chunk = decode(record.key, record.value, record.headers)
            pipeline.submit(Arrival(chunk, record.topic_partition, record.offset))
        except ChunkError:
            bad.add((record.partition, record.offset))
        found += [_through_wire(e.alert) for e in pipeline.run()]
    return found, bad, pipeline


def _through_wire(alert: alerts.Alert) -> alerts.Alert:
    return _timeless(alerts.decode(*alerts.encode(alert)))


def _missing(records: Sequence[Record], report: Report) -> list[str]:
    """What the publisher's report says against what the topic holds."""
    seqs: dict[tuple[str, str], set[int]] = {}
    for record in records:
        with contextlib.suppress(ChunkError):
            chunk = decode(record.key, record.value, record.headers)
            seqs.setdefault((chunk.stream_id, chunk.session), set()).add(chunk.seq)
    dropped = {(d.stream_id, d.session, seq) for d in report.ranges for seq in range(d.first_seq, d.last_seq + 1)}
    holes = {
        (stream, session, seq)
        for (stream, session), found in seqs.items()
        for seq in set(range(max(found) + 1)) - found
    }
    problems = []
    stored = {(stream, session, seq) for (stream, session), found in seqs.items() for seq in found}
    if stored & dropped:
        problems.append(f"{len(stored & dropped)} chunks were reported as dropped and are in the topic")
    if holes - dropped:
        problems.append(f"{len(holes - dropped)} chunks are missing in the topic and were not reported")
    if sum(map(len, seqs.values())) != report.chunks_published:
        problems.append(
            f"{sum(map(len, seqs.values()))} chunks are in the topic, {report.chunks_published} were reported"
        )
    return problems
