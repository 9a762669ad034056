"""An alert once more: its audio read again from the log, through the same pipeline, held against what was published.

Scores depend on the window before an example, and decisions on what the stream's decision remembers. So the log is read
back from the alert to where its run began, or to a stretch so quiet that any decision forgets everything in it
(``quiet_samples_to_forget``): from there on a fresh pipeline stands where the detector's stood.
"""

from __future__ import annotations

import math
import wave
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from detector import alert as alert_wire
from detector.alert import Alert
from detector.bus.base import Bus, Record, TopicPartition
from detector.bus.log_reader import Bounds, LogReader
from detector.chunk import CHUNK_SAMPLES, CHUNK_SECONDS, RATE_HZ, Pcm, decode
from detector.decision import LOOKBACK_SAMPLES, OVERLAP_SAMPLES, SAME_ONSET_SAMPLES, DecisionSettings, ScoredExample
from detector.embedders.params import EXAMPLE_SAMPLES
from detector.errors import AlertError, ChunkError, GunfireError
from detector.pipeline import Emitted, Observer, Pipeline, Rebuild
from detector.stream import Arrival

MakePipeline = Callable[[Observer], Pipeline]
Kind = Literal["model", "settings", "retention", "scores", "content", "missing", "extra", "twice", "history"]

_BATCH_CHUNKS = 64
_BLOCK_RECORDS, _MOST_BLOCK_RECORDS = 512, 16_384
_EARLY_SECONDS = 60.0  # clocks of producers and brokers differ
_LATE_SECONDS = 3_600.0  # a producer's spool may bring a chunk this much later than it was captured
# Not of the audio, the model and the settings: they differ from one telling to the next.
_PER_TELLING = ("latency_seconds", "evidence")
_SCORES = ("score", "peak_score", "scores", "look_alikes", "timeline")
_EXTERNAL = ("stream_lost", "overload")  # the detector's clock and load close these, not the audio


@dataclass(frozen=True, slots=True)
class Published:
    """One event as it lies on the alert topic. ``served``: what decided it (``Pipeline.served``), where it says so."""

    alert: Alert
    served: str | None


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which replay and publication differ, or why they can't be held against each other."""

    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class Scored:
    """An example of the replay.

    Attributes:
        at_ns: capture time of its first sample, Unix nanoseconds.
        start_sample, end_sample: in its session; -240 for a session's first.
        score: of the family; ``scores`` are those of all labels.
    """

    session: str
    offset: int
    at_ns: int
    start_sample: int
    end_sample: int
    score: float
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class History:
    """How far back was read.

    Attributes:
        chunks: of the stream, before the first one asked for; ``first_offset``: the oldest chunk read.
        exact: whether the pipeline stands there as the detector's did; ``why`` says what makes it so, or what is
            missing.
    """

    chunks: int
    first_offset: int | None
    exact: bool
    why: str


@dataclass(slots=True)
class Outcome:
    """What a replay gave. ``reproduced`` is True where nothing differs.

    Attributes:
        published, replayed: the events held against each other, in order.
        same, missing, extra: alert ids; missing ones were published and don't come out, extra ones the other way round.
        timeline: the examples of what was asked for.
        audio: the chunks of what was asked for.
    """

    published: list[Alert] = field(default_factory=list)
    replayed: list[Alert] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    timeline: list[Scored] = field(default_factory=list)
    history: History | None = None
    audio: list[Arrival] = field(default_factory=list)

    @property
    def reproduced(self) -> bool:
        return not self.differences

    def differ(self, kind: Kind, text: str) -> None:
        self.differences.append(Difference(kind, text))


@dataclass(frozen=True, slots=True)
class Served:
    """The model and the settings a replay runs with.

    Attributes:
        make_pipeline: a new pipeline that tells the observer of each example.
        served: as ``Pipeline.served``.
        package_of: a model's hash -> the name of a shipped package with it; None: none has it.
        idle_seconds: silence after which the detector forgets a stream.
    """

    make_pipeline: MakePipeline
    served: str
    model_name: str
    model_sha256: str
    labels: tuple[str, ...]
    window_examples: int
    hop_samples: int
    decision: DecisionSettings
    idle_seconds: float
    package_of: Callable[[str], str | None] = lambda sha256: None


def quiet_samples_to_forget(decision: DecisionSettings) -> int:
    """How long nothing may reach the close threshold for a decision to remember nothing, whatever came before.

    At worst an alert waits for the end of a cooldown, is told then, held, and closed into a second cooldown; or support
    and onsets of the alert before are still to be forgotten.
    """
    samples = sum(
        math.ceil(seconds * RATE_HZ)
        for seconds in (decision.hold_seconds, decision.cooldown_seconds, decision.cooldown_seconds)
    )
    support = decision.support_window_examples * (EXAMPLE_SAMPLES - OVERLAP_SAMPLES)
    return samples + support + LOOKBACK_SAMPLES + SAME_ONSET_SAMPLES + 3 * EXAMPLE_SAMPLES


def read_published(bus: Bus, topic: str, wanted: Callable[[Alert], bool]) -> list[Published]:
    """The wanted events of the alert topic, in the order of their stream. What is no alert is passed over."""
    found = []
    with LogReader(bus, topic) as reader:
        for record in reader.read(reader.bounds()):
            try:
                alert = alert_wire.decode(record.key, record.value, record.headers)
            except AlertError:
                continue
            if wanted(alert):
                served = dict(record.headers).get(alert_wire.SERVED_HEADER)
                found.append(Published(alert, None if served is None else served.decode("ascii", "replace")))
    return found


class AudioLog:
    """The chunk topic, read again for one stream."""

    def __init__(self, bus: Bus, topic: str) -> None:
        self._reader = LogReader(bus, topic)
        self.bounds = self._reader.bounds()

    def __enter__(self) -> AudioLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.consumer.close()

    def stretch(self, partition: TopicPartition, stream: str, first: int, end: int) -> list[Arrival]:
        """The stream's chunks from offset ``first`` up to, not including, ``end``. What is no chunk is left out."""
        return list(_arrivals(self._reader.read({partition: (first, end)}), stream))

    def before(self, partition: TopicPartition, stream: str, offset: int, count: int) -> tuple[list[Arrival], bool]:
        """At least ``count`` of the stream's chunks before ``offset``, and whether the log begins there."""
        oldest = self.bounds[partition][0]
        found: list[Arrival] = []
        block = _BLOCK_RECORDS
        while len(found) < count and offset > oldest:
            first = max(oldest, offset - block)
            found = self.stretch(partition, stream, first, offset) + found
            offset, block = first, min(2 * block, _MOST_BLOCK_RECORDS)
        return found, offset <= oldest

    def captured(self, stream: str, from_ns: int, to_ns: int) -> list[Arrival]:
        """The stream's chunks that hold something captured from ``from_ns`` to ``to_ns``, in the log's order."""
        consumer = self._reader.consumer
        likely, later = {}, {}
        for partition, (_, end) in self.bounds.items():
            first = consumer.offset_at(partition, max(0, int(from_ns // 1_000_000 - _EARLY_SECONDS * 1_000)))
            if first is None:
                continue
            beyond = consumer.offset_at(partition, int(to_ns // 1_000_000 + _LATE_SECONDS * 1_000))
            likely[partition] = (first, end if beyond is None else beyond)
            later[partition] = (end if beyond is None else beyond, end)

        def read(stretches: Bounds) -> list[Arrival]:
            return [
                arrival
                for arrival in _arrivals(self._reader.read(stretches), stream)
                if arrival.chunk.captured_at_ns < to_ns and arrival.chunk.capture_end_ns > from_ns
            ]

        return read(likely) or read(later)


def _arrivals(records: Iterable[Record], stream: str) -> Iterable[Arrival]:
    key = stream.encode()
    for record in records:
        if record.key != key:
            continue
        try:
            chunk = decode(record.key, record.value, record.headers)
        except ChunkError:
            continue  # the detector refused it as well
        yield Arrival(chunk, record.topic_partition, record.offset, record.timestamp_ms / 1000)


@dataclass(frozen=True, slots=True)
class _Run:
    events: list[Alert]
    examples: list[Scored]
    whole: bool


@dataclass(frozen=True, slots=True)
class _Interruption:
    """After the chunk at ``offset`` the detector ended the run for reasons that no audio tells."""

    offset: int
    reason: str


def _run(served: Served, arrivals: Sequence[Arrival], *, whole: bool, interruptions: Sequence[_Interruption]) -> _Run:
    """Feed a fresh pipeline. Unless ``whole``, decide only from where the windows no longer reach before the first."""
    observed: list[tuple[ScoredExample, float]] = []
    owners: deque[Arrival] = deque()
    events: list[Alert] = []
    pipeline = served.make_pipeline(lambda _, scored, score: observed.append((scored, score)))
    until = 0
    if not whole:
        fill = min(served.window_examples + 2, len(arrivals))
        last = arrivals[fill - 1]
        assert last.topic_partition is not None
        assert last.offset is not None
        until = last.offset + 1
        pipeline.rebuild(last.topic_partition, Rebuild(until, {}))
    ends = {i.offset: i for i in interruptions}

    def hear(emitted: Iterable[Emitted]) -> None:
        events.extend(one.alert for one in emitted)

    for n, arrival in enumerate(arrivals, 1):
        assert arrival.offset is not None
        assert arrival.topic_partition is not None
        before = pipeline.account.examples
        pipeline.submit(arrival)
        if arrival.offset >= until:
            owners.extend([arrival] * (pipeline.account.examples - before))
        end = ends.get(arrival.offset)
        if n % _BATCH_CHUNKS == 0 or n == len(arrivals) or end is not None:
            hear(pipeline.run())
        if end is not None and end.reason == "overload":
            hear(pipeline.skip(arrival.topic_partition))
        elif end is not None:
            hear(pipeline.end_stream(arrival.chunk.stream_id))
    examples = []
    for (scored, score), arrival in zip(observed, owners, strict=True):
        chunk = arrival.chunk
        at_ns = chunk.captured_at_ns + (scored.start_sample - chunk.first_sample) * 1_000_000_000 // RATE_HZ
        assert arrival.offset is not None
        examples.append(
            Scored(
                chunk.session,
                arrival.offset,
                at_ns,
                scored.start_sample,
                scored.end_sample,
                score,
                tuple(scored.scores),
            )
        )
    return _Run(events, examples, whole)


def _begin_of_run(arrivals: Sequence[Arrival], upto: int) -> int:
    """Index of the chunk with which the run began that goes on at index ``upto``; 0 where none is seen to begin."""
    begin, newest = 0, None
    for i, arrival in enumerate(arrivals[: upto + 1]):
        chunk = arrival.chunk
        if newest is not None:
            if chunk.session == newest.session and chunk.seq <= newest.seq:
                continue
            if chunk.session != newest.session or chunk.seq != newest.seq + 1:
                begin = i
        newest = chunk
    return begin


def _is_quiet_before(examples: Sequence[Scored], offset: int, decision: DecisionSettings) -> bool:
    """Whether some stretch before ``offset`` makes any decision forget."""
    needed = quiet_samples_to_forget(decision)
    first: int | None = None
    for example in examples:
        if example.offset >= offset:
            break
        if example.score >= decision.close_threshold:
            first = None
        elif first is None:
            first = example.start_sample
        if first is not None and example.end_sample - first >= needed:
            return True
    return False


def _replay(
    log: AudioLog,
    served: Served,
    body: Sequence[Arrival],
    interruptions: Sequence[_Interruption],
    back_seconds: float,
) -> tuple[_Run, History, list[Arrival]]:
    """Run ``body`` with as much of what came before it as makes it exact; at most ``back_seconds`` of it."""
    first = body[0]
    assert first.topic_partition is not None
    assert first.offset is not None
    most = max(0, math.ceil(back_seconds / CHUNK_SECONDS))
    quiet = math.ceil(quiet_samples_to_forget(served.decision) / CHUNK_SAMPLES)
    want = min(most, served.window_examples + 2 + quiet + 4)
    while True:
        before, log_begins = log.before(first.topic_partition, first.chunk.stream_id, first.offset, want)
        if len(before) > want:
            before, log_begins = before[len(before) - want :], False
        arrivals = [*before, *body]
        begin = _begin_of_run(arrivals, len(before))
        begins = begin > 0 or arrivals[0].chunk.seq == 0
        arrivals = arrivals[begin:]
        read = len(before) - begin
        # where too little is left of a run, there is nothing better than to begin with that
        whole = begins or read < served.window_examples + 2
        run = _run(served, arrivals, whole=whole, interruptions=interruptions)
        first_offset = arrivals[0].offset
        if begins:
            return run, History(read, first_offset, True, "the run begins there"), arrivals
        if not whole and _is_quiet_before(run.examples, first.offset, served.decision):
            why = "it was quiet for so long after it that every decision forgets"
            return run, History(read, first_offset, True, why), arrivals
        if log_begins:
            why = "the log begins there, in the middle of the run"
            return run, History(read, first_offset, False, why), arrivals
        if want >= most:
            why = f"no quiet stretch within {back_seconds:g} s before it; raise --back"
            return run, History(read, first_offset, False, why), arrivals
        want = min(most, 2 * want)


def replay_alert(
    bus: Bus, *, alerts_topic: str, chunks_topic: str, alert: str, served: Served, back_seconds: float
) -> Outcome:
    """Replay one alert.

    Args:
        alert: its id, the first 8 or more characters of it, or an event id (``<id>.<revision>``).

    Raises:
        GunfireError: there is no such alert, or several begin so.
        BusError: the bus failed.
    """
    wanted = alert.lower().partition(".")[0]
    published = read_published(bus, alerts_topic, lambda a: a.alert_id.startswith(wanted))
    ids = {p.alert.alert_id for p in published}
    if len(ids) != 1:
        what = "has no alert" if not ids else f"has {len(ids)} alerts"
        raise GunfireError(
            f"Topic {alerts_topic} {what} whose id begins with {wanted}. `detector watch --from-beginning --format "
            "json` shows all there are; older ones are dropped after topics.alerts_retention_seconds."
        )
    outcome = Outcome()
    events = _once_each(published, outcome)
    outcome.published = [p.alert for p in events]
    newest = outcome.published[-1]
    _hold_settings(events[-1], served, outcome)
    audio = [a.audio for a in outcome.published if a.audio is not None]
    if not audio:
        outcome.differ("content", "The alert names no audio on a bus; it was made offline.")
        return outcome
    place = TopicPartition(audio[0].topic, audio[0].partition)
    first, last = min(a.first_offset for a in audio), max(a.last_offset for a in audio)
    if place.topic != chunks_topic:
        outcome.notes.append(f"The audio lies on {place.topic}; topics.chunks is {chunks_topic}.")
    with AudioLog(bus, place.topic) as log:
        if place not in log.bounds:
            outcome.differ("retention", f"{place.topic} has no partition {place.partition} any more.")
            return outcome
        body = log.stretch(place, newest.stream, first, last + 1)
        whole_body = _check_retention(log, place, first, last, body, outcome)
        if not body:
            return outcome
        interruptions = [
            _Interruption(a.audio.last_offset, a.close_reason)
            for a in outcome.published
            if a.audio is not None and a.close_reason in _EXTERNAL and a.close_reason is not None
        ]
        expected = [a for a in outcome.published if a.close_reason != "model_changed"]
        if len(expected) < len(outcome.published):
            outcome.notes.append("Its closing says that the model or the settings changed then; no audio decides that.")
        run, history, arrivals = _replay(log, served, body, interruptions, back_seconds)
        for attempt in _pauses(arrivals, served.idle_seconds):
            if _events_of(run, newest, served) == [_comparable(a) for a in expected]:
                break
            other = _run(served, arrivals, whole=run.whole, interruptions=[attempt])
            if _events_of(other, newest, served) == [_comparable(a) for a in expected]:
                run = other
                outcome.notes.append(
                    f"It comes out if the stream is taken to have ended at offset {attempt.offset}: the records pause "
                    f"there for longer than daemon.stream_idle_seconds ({served.idle_seconds:g} s)."
                )
                break
    outcome.history = history
    outcome.audio = body
    outcome.timeline = [e for e in run.examples if e.offset >= first]
    same_model = newest.model.sha256 == served.model_sha256
    if same_model:
        outcome.replayed = [a for a in run.events if a.alert_id == newest.alert_id]
        _hold_events(expected, outcome.replayed, outcome)
        (outcome.same if outcome.reproduced else outcome.missing if not outcome.replayed else []).append(
            newest.alert_id
        )
    else:
        outcome.replayed = [a for a in run.events if _overlaps(a, newest)]
        seen = f"opens one of score {outcome.replayed[-1].peak_score:.6f}" if outcome.replayed else "opens none"
        outcome.differ("content", f"Model {served.model_name} {seen} there; {newest.peak_score:.6f} was published.")
    if not history.exact and not outcome.reproduced and whole_body:
        kind: Kind = "retention" if "log begins" in history.why else "history"
        outcome.differ(
            kind,
            f"{history.chunks} chunks ({history.chunks * CHUNK_SECONDS:.1f} s) before it could be used: {history.why}. "
            "Windows and decision may have stood otherwise in the detector.",
        )
    return outcome


def replay_time(
    bus: Bus,
    *,
    alerts_topic: str,
    chunks_topic: str,
    stream: str,
    from_ns: int,
    to_ns: int,
    served: Served,
    back_seconds: float,
) -> Outcome:
    """Replay what one stream heard, and hold the alerts with their first onset in that time against those published.

    Args:
        from_ns, to_ns: capture times, Unix nanoseconds; ``to_ns`` is excluded.

    Raises:
        BusError: the bus failed.
    """

    def within(alert: Alert) -> bool:
        return alert.stream == stream and from_ns <= alert.onset_at_ns < to_ns

    outcome = Outcome()
    published = read_published(bus, alerts_topic, lambda a: a.stream == stream)
    events = _once_each([p for p in published if within(p.alert)], outcome)
    outcome.published = [p.alert for p in events]
    if events:
        for event in {p.served: p for p in events}.values():
            _hold_settings(event, served, outcome)
    decision = served.decision
    tail_ns = int((decision.max_alert_seconds + decision.hold_seconds + decision.cooldown_seconds + 2) * 1e9)
    with AudioLog(bus, chunks_topic) as log:
        body = log.captured(stream, from_ns, to_ns + tail_ns)
        inside = [a for a in body if a.chunk.captured_at_ns < to_ns]
        counts = Counter(a.topic_partition for a in inside)
        if not inside:
            outcome.differ("retention", f"Topic {chunks_topic} holds nothing of stream {stream!r} captured then.")
            outcome.missing = sorted({a.alert_id for a in outcome.published})
            return outcome
        place = counts.most_common(1)[0][0]
        if len(counts) > 1:
            outcome.notes.append(f"The stream's chunks lie in {len(counts)} partitions; only {place} is replayed.")
        offsets = [a.offset for a in body if a.topic_partition == place and a.offset is not None]
        assert place is not None
        body = log.stretch(place, stream, min(offsets), max(offsets) + 1)  # also what has another time in between
        oldest_ns = inside[0].chunk.captured_at_ns
        if oldest_ns > from_ns + 2_000_000_000 and inside[0].chunk.seq > 0:
            outcome.notes.append(f"The first chunk there is was captured {(oldest_ns - from_ns) / 1e9:.1f} s later.")
        interruptions = [
            _Interruption(p.alert.audio.last_offset, p.alert.close_reason)
            for p in published
            if p.alert.audio is not None and p.alert.close_reason in _EXTERNAL and p.alert.close_reason is not None
        ]
        run, history, _ = _replay(log, served, body, interruptions, back_seconds)
    outcome.history = history
    outcome.audio = [a for a in inside if a.topic_partition == place]
    ends = outcome.audio[-1].offset or 0
    outcome.timeline = [e for e in run.examples if (outcome.audio[0].offset or 0) <= e.offset <= ends]
    outcome.replayed = [a for a in run.events if within(a)]
    _hold_alerts(outcome, served)
    if not history.exact and not outcome.reproduced:
        kind: Kind = "retention" if "log begins" in history.why else "history"
        outcome.differ(kind, f"{history.chunks} chunks before it could be used: {history.why}.")
    return outcome


def write_wav(path: Path, arrivals: Sequence[Arrival]) -> float:
    """Write the chunks as one WAV file, 16 kHz mono; a gap in a session becomes silence. Return its seconds.

    Raises:
        GunfireError: the file can't be written.
    """
    parts: list[Pcm] = []
    newest = None
    for arrival in arrivals:
        chunk = arrival.chunk
        if newest is not None and chunk.session == newest.session:
            if chunk.seq <= newest.seq:
                continue
            missing = min(chunk.seq - newest.seq - 1, 10_000)
            parts += [np.zeros(CHUNK_SAMPLES, np.int16)] * missing
        parts.append(chunk.pcm)
        newest = chunk
    pcm = np.concatenate(parts) if parts else np.zeros(0, np.int16)
    try:
        with path.open("wb") as out, wave.open(out) as wav:
            wav.setnchannels(1)
            wav.setsampwidth(2)
            wav.setframerate(RATE_HZ)
            wav.writeframes(pcm.astype("<i2").tobytes())
    except OSError as e:
        raise GunfireError(f"{path} can't be written: {e.strerror}.") from e
    return len(pcm) / RATE_HZ


def _comparable(alert: Alert) -> dict[str, Any]:
    fields = asdict(alert)
    for name in _PER_TELLING:
        del fields[name]
    return fields


def _events_of(run: _Run, published: Alert, served: Served) -> list[dict[str, Any]]:
    if published.model.sha256 != served.model_sha256:
        return []
    return [_comparable(a) for a in run.events if a.alert_id == published.alert_id]


def _pauses(arrivals: Sequence[Arrival], idle_seconds: float) -> list[_Interruption]:
    """Where the records pause for so long that a detector in step forgot the stream; the latest first."""
    found = [
        _Interruption(a.offset or 0, "stream_lost")
        for a, b in pairwise(arrivals)
        if b.seen_seconds - a.seen_seconds > idle_seconds
    ]
    return found[:-4:-1]


def _once_each(published: Sequence[Published], outcome: Outcome) -> list[Published]:
    """Events by alert and revision; a second telling must say the same."""
    events: dict[str, Published] = {}
    for p in published:
        known = events.setdefault(p.alert.event_id, p)
        if known is not p and _comparable(known.alert) != _comparable(p.alert):
            outcome.differ("twice", f"Event {p.alert.event_id} was published twice, and not the same.")
    return sorted(events.values(), key=lambda p: (p.alert.session, p.alert.onset_sample, p.alert.revision))


def _hold_settings(event: Published, served: Served, outcome: Outcome) -> None:
    """Say in what the model and the settings of the event differ from those at hand."""
    alert, decision = event.alert, served.decision
    if alert.model.sha256 != served.model_sha256:
        package = served.package_of(alert.model.sha256)
        remedy = (
            f"the shipped package has it: --model {package}" if package else "get that package and name it with --model"
        )
        outcome.differ(
            "model",
            f"Made by model {alert.model.name} {alert.model.version}, {alert.model.sha256}; at hand is "
            f"{served.model_name}, {served.model_sha256}: {remedy}.",
        )
    found = []
    threshold = alert_wire.Thresholds(round(decision.open_threshold, 6), round(decision.close_threshold, 6))
    if alert.threshold != threshold:
        found.append(
            f"thresholds {alert.threshold.open:g}/{alert.threshold.close:g}, now {threshold.open:g}/{threshold.close:g}"
        )
    for name, then, now in (
        ("family", set(alert.scores), {served.labels[i] for i in decision.family}),
        ("look_alikes", set(alert.look_alikes), {served.labels[i] for i in decision.look_alikes}),
    ):
        if then != now:
            found.append(f"{name} {', '.join(sorted(then)) or 'none'}; now {', '.join(sorted(now)) or 'none'}")
    steps = {b.start_sample - a.start_sample for a, b in zip(alert.timeline, alert.timeline[1:], strict=False)}
    if steps and min(steps) < served.hop_samples:
        found.append(f"hop_seconds {min(steps) / RATE_HZ:g}, now {served.hop_samples / RATE_HZ:g}")
    elif steps and served.hop_samples < CHUNK_SAMPLES and min(steps) >= CHUNK_SAMPLES:
        found.append(f"hop_seconds 0.96, now {served.hop_samples / RATE_HZ:g}")
    same_model = alert.model.sha256 == served.model_sha256
    if same_model and event.served is not None and event.served != served.served and not found:
        found.append(
            "something of decision.* or batch.hop_seconds that the alert does not name (min_support, "
            "support_window_examples, hold_seconds, cooldown_seconds, max_alert_seconds), or a detector with "
            "other rules for onsets"
        )
    if found:
        outcome.differ("settings", "Decided with other settings: " + "; ".join(found) + ".")


def _check_retention(
    log: AudioLog, place: TopicPartition, first: int, last: int, body: Sequence[Arrival], outcome: Outcome
) -> bool:
    """Whether all of the alert's own audio is still there; says what is gone."""
    oldest, end = log.bounds[place]
    if first >= oldest and last < end and body:
        return True
    where = f"{place.topic}[{place.partition}]"
    if last < oldest:
        outcome.differ(
            "retention",
            f"All of the alert's audio, {where} offsets {first} to {last}, is gone; the oldest record is {oldest}. "
            "topics.chunks_retention_seconds says how long audio is kept.",
        )
    elif first < oldest:
        gone, of = oldest - first, last - first + 1
        left = sum(1 for _ in body)
        outcome.differ(
            "retention",
            f"{where} offsets {first} to {oldest - 1} are gone: {gone} of the {of} records the alert spans, and all "
            f"that came before. {left} chunks of the stream ({left * CHUNK_SECONDS:.1f} s) are left.",
        )
    else:
        outcome.differ(
            "retention",
            f"{where} has no chunk of stream at offsets {first} to {last}; it holds {oldest} to {end - 1}. Was the "
            "topic made anew?",
        )
    return False


def _hold_events(published: Sequence[Alert], replayed: Sequence[Alert], outcome: Outcome) -> None:
    """Event by event: what was published against what comes out now."""
    by_revision = {a.revision: a for a in replayed}
    for alert in published:
        found = by_revision.pop(alert.revision, None)
        if found is None:
            outcome.differ("missing", f"Event {alert.event_id} ({alert.state}) does not come out.")
            continue
        _hold_fields(alert, found, outcome)
    for found in by_revision.values():
        outcome.differ("extra", f"Event {found.event_id} ({found.state}) comes out and was not published.")


def _hold_fields(published: Alert, replayed: Alert, outcome: Outcome) -> None:
    then, now = _comparable(published), _comparable(replayed)
    names = [name for name in then if then[name] != now[name]]
    scores = [name for name in names if name in _SCORES]
    if scores:
        differing, largest, other = 0, 0.0, False
        for name in scores:
            pairs = _pairs(then[name], now[name])
            other = other or pairs is None
            for a, b in pairs or ():
                differing += a != b
                largest = max(largest, abs(a - b))
        text = f"Event {published.event_id}: {differing} scores differ, by {largest:.6f} at most ({', '.join(scores)})"
        if other:
            text += "; not of the same examples or labels"
        elif largest <= 1e-4:
            text += ". Another processor, TensorFlow build or library does that"
        outcome.differ("scores", text + ".")
    rest = [f"{name} was {_short(then[name])}, now {_short(now[name])}" for name in names if name not in scores]
    if rest:
        outcome.differ("content", f"Event {published.event_id}: " + "; ".join(rest) + ".")


def _pairs(then: Any, now: Any) -> list[tuple[float, float]] | None:
    """The scores of a field side by side; None where they are not of the same things."""
    if isinstance(then, float | int):
        return [(then, now)]
    if isinstance(then, dict):
        return None if then.keys() != now.keys() else [(then[key], now[key]) for key in then]
    if [p["start_sample"] for p in then] != [p["start_sample"] for p in now]:
        return None
    return [(a["score"], b["score"]) for a, b in zip(then, now, strict=True)]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _hold_alerts(outcome: Outcome, served: Served) -> None:
    """Alert by alert, in a stretch of time."""
    then: dict[str, list[Alert]] = {}
    now: dict[str, list[Alert]] = {}
    for alerts, by_id in ((outcome.published, then), (outcome.replayed, now)):
        for alert in alerts:
            by_id.setdefault(alert.alert_id, []).append(alert)
    for alert_id, events in then.items():
        if events[0].model.sha256 != served.model_sha256:
            continue  # told already; its id can't come out
        expected = [a for a in events if a.close_reason != "model_changed"]
        if alert_id not in now:
            outcome.missing.append(alert_id)
            at = events[0].onset_at
            outcome.differ("missing", f"Alert {alert_id} (onset {at}, {events[-1].peak_score:.3f}) does not come out.")
            continue
        before = len(outcome.differences)
        known = [a for a in now[alert_id] if events[-1].state == "closed" or a.revision <= events[-1].revision]
        _hold_events(expected, known, outcome)
        if len(outcome.differences) == before:
            outcome.same.append(alert_id)
    other_models = [a for events in then.values() for a in events if a.model.sha256 != served.model_sha256]
    for alert_id, events in now.items():
        if alert_id in then:
            continue
        outcome.extra.append(alert_id)
        like = any(_overlaps(events[-1], other) for other in other_models)
        outcome.differ(
            "extra",
            f"Alert {alert_id} (onset {events[0].onset_at}, {events[-1].peak_score:.3f}) comes out and was not "
            + ("published by this model; the other model's lies in the same audio." if like else "published."),
        )


def _overlaps(a: Alert, b: Alert) -> bool:
    if a.audio is None or b.audio is None or (a.stream, a.session) != (b.stream, b.session):
        return False
    return a.audio.first_offset <= b.audio.last_offset and b.audio.first_offset <= a.audio.last_offset
