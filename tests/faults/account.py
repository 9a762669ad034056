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
from detector.demo import free_port
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
    "DETECTOR__BATCH__HOP_SECONDS": "0.96",  # one example a chunk, as the account counts
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
        self.made_of: Counter[str] = Counter()  # by stream
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

    @staticmethod
    def stream_id(stream: int) -> str:
        return f"sensor-{stream:02}"

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
        opened = [self._publisher.stream(self.stream_id(i)) for i in range(self.streams)]
        began, seq = time.monotonic(), 0
        junk = _Junk(self._settings)
        while not self._stop.is_set() and (self._chunks is None or self.made < self._chunks):
            for i, stream in enumerate(opened):
                at_ns = START_NS + round(seq * CHUNK_SECONDS * 1e9)
                stream.write(Block(self.pcm(i, seq), at_ns, starts_session=False))
                self.made += 1
                self.made_of[self.stream_id(i)] += 1
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
        self.last_metrics: dict[str, float] = {}  # just before it was stopped in order
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

    ``doubled``: alert events published again with equal id and content; ``letters_doubled``: dead letters on a record
    that had one. ``skipped``: records the overload rule left out.
    """

    produced: int
    analysed: int
    rejected: int
    skipped: int
    alerts: int
    lost: int
    doubled: int
    letters_doubled: int
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
        # A client that lost its broker may store again what it had not heard of; any other never does.
        self.may_resend = False
        self.detectors: list[Detector] = []
        self.loads: list[Load] = []

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
        self.loads.append(load)
        return load.start()

    def detector(self, *, member: str | None = None, **environ: str) -> Detector:
        detector = Detector(self, member=member, **environ)
        self.detectors.append(detector)
        return detector

    def stop_detectors(self) -> None:
        """In order, as an operator would; AssertionError where one does not end well."""
        for detector in self.detectors:
            if detector.process.poll() is None:
                detector.last_metrics = detector.metrics()
                code = detector.stop()
                # one that only just starts has nothing to end, and no handler yet
                starting = code == -signal.SIGTERM and not detector.last_metrics
                assert code == 0 or starting, f"a detector ended with exit code {code}; see {detector.log_file}"

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *exc: object) -> None:
        for load in self.loads:
            if load.report is None:
                load.finish(0.1)
        for detector in self.detectors:
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

    def balance(self, load: Load | None = None) -> Balance:
        """Compare what was published with what one unbroken pipeline makes of the same log."""
        chunk_records = self.records(self.settings.topics.chunks)
        by_partition: dict[TopicPartition, list[Record]] = {}
        for record in chunk_records:
            by_partition.setdefault(record.topic_partition, []).append(record)
        reference = Reference()
        for records in by_partition.values():
            reference.read(records)
        problems = self.told_problems(reference) + self._counted_problems(reference, len(chunk_records))
        if load is not None:
            problems += missing(chunk_records, load)
        if not reference.events:
            problems.append("the load had no alert: nothing was tried")
        return self.balance_of(reference, produced=len(chunk_records), skipped=0, problems=problems)

    def balance_of(self, reference: Reference, *, produced: int, skipped: int, problems: Sequence[str]) -> Balance:
        counts = self._published()
        letters = self._letters()
        return Balance(
            produced=produced,
            analysed=reference.analysed,
            rejected=len(letters),
            skipped=skipped,
            alerts=len(reference.events),
            lost=len(reference.events.keys() - counts.keys()),
            doubled=sum(counts.values()) - len(counts),
            letters_doubled=sum(letters.values()) - len(letters),
            problems=tuple(problems),
        )

    def _published(self) -> Counter[str]:
        records = self.records(self.settings.topics.alerts)
        return Counter(alerts.decode(r.key, r.value, r.headers).event_id for r in records)

    def _letters(self) -> Counter[tuple[int, int]]:
        """How many dead letters there are on each record: (partition, offset)."""
        return Counter(_source(r) for r in self.records(self.settings.topics.deadletter))

    def told_problems(self, reference: Reference) -> list[str]:
        """What is wrong with the alerts and dead letters on the topics, where ``reference`` should have come of it."""
        problems: list[str] = []
        alert_records = self.records(self.settings.topics.alerts)
        letter_records = self.records(self.settings.topics.deadletter)
        published = [_timeless(alerts.decode(r.key, r.value, r.headers)) for r in alert_records]
        expected, counts = reference.events, Counter(a.event_id for a in published)
        if lost := sorted(expected.keys() - counts.keys()):
            problems.append(f"{len(lost)} alert events lost, {_some(lost)}")
        if foreign := sorted(counts.keys() - expected.keys()):
            problems.append(f"{len(foreign)} alert events that should not be, {_some(foreign)}")
        if differing := sorted({a.event_id for a in published if expected.get(a.event_id, a) != a}):
            problems.append(f"{len(differing)} alert events with other content, {_some(differing)}")
        letters = Counter(map(_source, letter_records))
        if letters.keys() != reference.rejected:
            problems.append(
                f"{len(reference.rejected - letters.keys())} dead letters lost, "
                f"{len(letters.keys() - reference.rejected)} that should not be"
            )
        for what, times in (("alert events", counts), ("dead letters", letters)):
            doubled = sum(times.values()) - len(times)
            if doubled and self.delivery == "exactly_once":
                problems.append(f"{doubled} {what} published twice under exactly_once")
        # What a dead detector's successor tells again bears another time. Equal to the microsecond: one told it twice.
        for what, records in (("alert events", alert_records), ("dead letters", letter_records)):
            same = len(records) - len({(r.key, r.value, r.headers) for r in records})
            if same and self.delivery == "at_least_once" and not self.may_resend:
                problems.append(f"{same} {what} published twice by the same detector")
            if 2 * same > len(records):
                problems.append(f"{same} of {len(records)} {what} are copies")
        behind = self.behind()
        if behind:
            problems.append(f"{behind} records not committed")
        return problems

    def _counted_problems(self, reference: Reference, produced: int) -> list[str]:
        """The detector's own counters against the log, where one detector heard all of it in one go."""
        if len(self.detectors) != 1 or self.may_resend or not self.detectors[0].last_metrics:
            return []
        counted = Counted.of(self.detectors[0].last_metrics)
        true = Counted(
            received=produced,
            analysed=reference.analysed,
            duplicates=reference.duplicates,
            rejected=len(reference.rejected),
        )
        return [] if counted == true else [f"the detector counted {counted}, the log says {true}"]


@dataclass(frozen=True, slots=True)
class Counted:
    """A detector's counters."""

    received: int
    analysed: int
    duplicates: int
    rejected: int

    @staticmethod
    def of(metrics: Mapping[str, float]) -> Counted:
        return Counted(
            received=int(metrics["gunfire_records_received_total"]),
            analysed=int(metrics["gunfire_chunks_analysed_total"]),
            duplicates=int(metrics["gunfire_chunks_duplicate_total"]),
            rejected=int(sum(v for name, v in metrics.items() if name.startswith("gunfire_chunks_rejected_total{"))),
        )


def _marker_only(position: int, end: int) -> bool:
    """What is left before ``end`` are the marks of transactions, which no reader is given."""
    return position >= end - 1


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")


def _timeless(alert: alerts.Alert) -> alerts.Alert:
    return dataclasses.replace(alert, latency_seconds=None)


class Reference:
    """What one unbroken pipeline makes of logs.

    Attributes:
        events: alert events by id.
        rejected: (partition, offset) of what is no chunk.
    """

    def __init__(self) -> None:
        self.events: dict[str, alerts.Alert] = {}
        self.rejected: set[tuple[int, int]] = set()
        self.analysed = self.duplicates = 0

    def read(self, records: Sequence[Record | TopicPartition]) -> None:
        """One partition's log in order; a partition in place of a record: there the detector left some out."""
        pipeline = Pipeline(CrestScorer(), labels=LABELS, model=IDENTITY, window_examples=10, decision=DECISION)
        for record in records:
            if isinstance(record, TopicPartition):
                emitted = pipeline.skip(record)
            else:
                try:
                    chunk = decode(record.key, record.value, record.headers)
                    pipeline.submit(Arrival(chunk, record.topic_partition, record.offset))
                except ChunkError:
                    self.rejected.add((record.partition, record.offset))
                emitted = pipeline.run()
            self.events.update((e.alert.event_id, _through_wire(e.alert)) for e in emitted)
        self.analysed += pipeline.account.analysed
        self.duplicates += pipeline.account.duplicates


def _source(letter: Record) -> tuple[int, int]:
    fields = dict(letter.headers)
    return int(fields["deadletter_partition"]), int(fields["deadletter_offset"])


def _through_wire(alert: alerts.Alert) -> alerts.Alert:
    return _timeless(alerts.decode(*alerts.encode(alert)))


def chunks_by_stream(records: Sequence[Record]) -> Counter[str]:
    """How many of the records are chunks, by stream."""
    found: Counter[str] = Counter()
    for record in records:
        with contextlib.suppress(ChunkError):
            found[decode(record.key, record.value, record.headers).stream_id] += 1
    return found


def missing(records: Sequence[Record], load: Load) -> list[str]:
    """What was made and what the publisher reports, against what the topic holds."""
    report = load.report
    assert report is not None, "the load is not finished"
    seqs: dict[tuple[str, str], set[int]] = {}
    altered = 0
    numbers = {load.stream_id(i): i for i in range(load.streams)}
    for record in records:
        with contextlib.suppress(ChunkError):
            chunk = decode(record.key, record.value, record.headers)
            seqs.setdefault((chunk.stream_id, chunk.session), set()).add(chunk.seq)
            altered += not np.array_equal(chunk.pcm, load.pcm(numbers[chunk.stream_id], chunk.seq))
    stored = {(stream, session, seq) for (stream, session), found in seqs.items() for seq in found}
    dropped = {(d.stream_id, d.session, seq) for d in report.ranges for seq in range(d.first_seq, d.last_seq + 1)}
    told = Counter(stream for stream, _, _ in stored | dropped)
    silent = {stream: made - told[stream] for stream, made in load.made_of.items() if made != told[stream]}
    problems = []
    if stored & dropped:
        problems.append(f"{len(stored & dropped)} chunks were reported as dropped and are in the topic")
    if silent:
        problems.append(
            f"{sum(silent.values())} of {load.made} chunks are missing in the topic and were not reported, from "
            f"{_some(sorted(silent))}"
        )
    if altered:
        problems.append(f"{altered} chunks in the topic hold other audio than was made")
    if len(stored) != report.chunks_published:
        problems.append(f"{len(stored)} chunks are in the topic, {report.chunks_published} were reported")
    if report.chunks_published + report.chunks_dropped != load.made:
        problems.append(
            f"{report.chunks_published} chunks reported as published and {report.chunks_dropped} as dropped are not "
            f"the {load.made} that were made"
        )
    return problems
