"""The service: poll -> pipeline -> publish -> commit, until told to stop.

A session is a producer and a consumer and the loop between them. Whatever goes wrong with the bus ends the session; the
next one starts from the committed offsets and rebuilds every stream's state from the log, so nothing is lost, and what
is published twice carries the same id. Offsets are committed only after the outputs are stored (``at_least_once``), or
together with them (``exactly_once``).
"""

from __future__ import annotations

import base64
import json
import logging
import random
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import tenacity
from prometheus_client import CollectorRegistry
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from detector import abandoned, deadletters
from detector import alert as alert_wire
from detector.abandoned import Left
from detector.alert import Alert
from detector.batcher import Batcher
from detector.bus import open_bus
from detector.bus.base import Bus, Commit, Consumer, Headers, Jump, Producer, Record, TopicPartition
from detector.chunk import CHUNK_SAMPLES, CHUNK_SECONDS, decode, decode_head
from detector.config import Settings
from detector.console.server import ConsoleServer
from detector.embedders.params import CARRY_SAMPLES
from detector.errors import AlertError, BusError, BusUnavailable, ChunkError, CommitDelayed, CommitFenced
from detector.metrics import Metrics
from detector.model import Model, load_model
from detector.operating_point import choose_threshold
from detector.pipeline import Account, Emitted, Pipeline, Rebuild, Taken, pipeline_for
from detector.stream import Arrival
from detector.topics import tell_findings, topic_settings

log = logging.getLogger(__name__)

MAX_METADATA_BYTES = 4_096
_POLL_SECONDS = 0.2
_GAUGE_SECONDS = 1.0
_IDLE_SWEEP_SECONDS, _BUSY_SWEEP_SECONDS = 1.0, 5.0
_LIVE_SECONDS = 30.0
_LATE_WARNING_SECONDS = 30.0
_FIRST_BACKOFF_SECONDS, _MOST_BACKOFF_SECONDS, _STEADY_SECONDS = 0.5, 15.0, 30.0
_REJECTION_SECONDS = 10.0
_FINISH_SECONDS, _DELAYED_SECONDS = 3.0, 30.0
_STREAMS_A_LINE = 20
# What is left out is looked at for whose it is, and told in pieces. Where it is foreseen after a while that this would
# take longer than may be, the rest is passed over unread: it is the present that matters.
_TELL_SECONDS, _FORESEE_SECONDS, _LOOK_SECONDS = 5.0, 5.0, 60.0
_FULL_BYTES = 4 << 20
_LETTER_BYTES = 1_000_000
_LETTER = "letter"
_METADATA_VERSION = 2
# Examples begin at multiples of half a chunk, less the carry-over: an index says as much as a sample, in less room.
_STEP_SAMPLES = CHUNK_SAMPLES // 2
_ENTRY_BYTES = 6 + 5
_MAX_ENTRIES = (MAX_METADATA_BYTES - 200) * 3 // 4 // _ENTRY_BYTES


@dataclass(frozen=True, slots=True)
class Position:
    """What is kept beside a committed offset, so that state can be rebuilt exactly.

    Attributes:
        read_from: offset from which the log must be read again.
        at_ms: time of the newest record before the offset, Unix milliseconds; at most the time of the commit. How far
            back state is rebuilt counts from there: a detector that is late rebuilds as much as one that is not.
        served: what made the decisions (model and settings); another one can't go on with them.
        since, feed_rest: as in ``Rebuild``.
    """

    read_from: int
    at_ms: int
    served: str
    since: Mapping[bytes, int]
    feed_rest: bool = False

    def to_text(self) -> str:
        """At most MAX_METADATA_BYTES, some 290 streams. If there are more, those that fit, and ``feed_rest``."""
        entries = [
            key + ((sample + CARRY_SAMPLES) // _STEP_SAMPLES).to_bytes(5, "big") for key, sample in self.since.items()
        ]
        kept = entries[:_MAX_ENTRIES]
        return json.dumps(
            {
                "v": _METADATA_VERSION,
                "from": self.read_from,
                "at_ms": self.at_ms,
                "served": self.served,
                "since": base64.b64encode(b"".join(kept)).decode(),
                "feed_rest": self.feed_rest or len(kept) < len(entries),
            },
            separators=(",", ":"),
        )

    @staticmethod
    def from_text(text: str) -> Position | None:
        """None where the text is not ours."""
        try:
            fields = json.loads(text)
            if fields["v"] != _METADATA_VERSION:
                return None
            packed = base64.b64decode(fields["since"], validate=True)
            if len(packed) % _ENTRY_BYTES:
                return None
            entries = [packed[i : i + _ENTRY_BYTES] for i in range(0, len(packed), _ENTRY_BYTES)]
            since = {e[:6]: int.from_bytes(e[6:], "big") * _STEP_SAMPLES - CARRY_SAMPLES for e in entries}
            return Position(
                int(fields["from"]), int(fields["at_ms"]), str(fields["served"]), since, bool(fields["feed_rest"])
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


class Backoff:
    """How long to wait before the next session: longer after each failure, by chance so that many detectors don't come
    back at once, and short again once a session held for a while."""

    def __init__(self) -> None:
        self._failures = 0

    def seconds(self, lasted_seconds: float) -> float:
        """After a session that lasted so long."""
        if lasted_seconds >= _STEADY_SECONDS:
            self._failures = 0
        longest = min(_MOST_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2.0**self._failures)
        self._failures = min(self._failures + 1, 16)
        return random.uniform(0.2, 1.0) * longest


class RejectionLog:
    """One warning for each reason in 10 s; the next says how many were left out. A flood of junk floods no log."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._next: dict[str, float] = {}
        self._left_out: Counter[str] = Counter()

    def tell(self, record: Record, error: ChunkError) -> None:
        now = self._clock()
        if now < self._next.get(error.reason, now):
            self._left_out[error.reason] += 1
            return
        self._next[error.reason] = now + _REJECTION_SECONDS
        more = self._left_out.pop(error.reason, 0)
        log.warning(
            "Rejected %s[%d]@%d (%s): %s%s", record.topic, record.partition, record.offset, error.reason, error,
            f" ({more} more of this kind before it.)" if more else "",
        )  # fmt: skip


@dataclass(slots=True)
class _Tally:
    """What became of one partition's records, for the metrics: told once it is committed.

    ``records``: heard. ``lost``, ``cut``: by retention, and with the log's end.
    """

    records: int = 0
    analysed: int = 0
    duplicates: int = 0
    missing: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    skipped: int = 0
    unread: int = 0
    lost: int = 0
    cut: int = 0

    def add(self, other: _Tally) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True)
class _LeftOut:
    """A stretch of a partition that is being left out: read, so that it can be said whose it is, but not heard.

    Attributes:
        began: first offset left out, and when (by the loop's clock).
        told: first offset not told yet, and when that was last done.
        next: first offset not read yet.
        until: where it ends.
        tally, by_stream: of what is not told yet.
        is_due: it must be told with the next commit.
    """

    began: tuple[int, float]
    told: tuple[int, float]
    next: int
    until: int
    tally: _Tally = field(default_factory=_Tally)
    by_stream: Counter[str] = field(default_factory=Counter)
    is_due: bool = False


class Session:
    """One membership of the group: from joining to the first failure or the end. Not thread-safe.

    Args:
        member: this process's name, for its transactions: the same in all its sessions and in no other process.
            Default: one of its own.
        publish_clock: wall clock in seconds, for latency and for noticing idle streams; nothing else depends on it.
    """

    def __init__(
        self,
        bus: Bus,
        settings: Settings,
        pipeline: Pipeline,
        metrics: Metrics,
        *,
        member: str | None = None,
        publish_clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        daemon = settings.daemon
        self._bus = bus
        self._topics = settings.topics
        self._rebuild_max_ms = int(daemon.rebuild_max_seconds * 1000)
        self._commit_interval_seconds = daemon.commit_interval_seconds
        self._max_records = daemon.poll_max_records
        self._max_lag_seconds = daemon.max_lag_seconds
        self._skips = daemon.overload == "skip_to_latest"
        self._pipeline = pipeline
        self._metrics = metrics
        self._wall = publish_clock
        self._monotonic = monotonic
        self._batcher = Batcher(settings.batch.max_batch, settings.batch.max_wait_seconds, monotonic)
        self._told = Account()
        self._silent_until: dict[TopicPartition, int] = {}
        self._positions: dict[TopicPartition, int] = {}  # processed, not committed
        self._tallies: defaultdict[TopicPartition, _Tally] = defaultdict(_Tally)  # of the same records
        self._sent: Counter[str] = Counter()  # by an alert's state, and letters; not stored yet
        self._left_out: dict[TopicPartition, _LeftOut] = {}
        self._times_ms: dict[TopicPartition, int] = {}  # of the newest record processed
        self._assignments: Counter[TopicPartition] = Counter()  # how often each was taken away
        self._unsaid = self._unsaid_bytes = 0  # sent since the last commit
        self._oldest_ms: dict[TopicPartition, int] = {}  # of the records read last
        self._abandoned: dict[TopicPartition, Left] = {}
        self._open: dict[TopicPartition, list[tuple[Alert, Headers]]] = {}  # of those, once they were looked up
        self._rejections = RejectionLog(monotonic)
        self._last_commit = self._last_gauges = self._last_sweep = monotonic()
        self._next_late_warning = monotonic()
        self._exactly_once = daemon.delivery == "exactly_once"
        static = settings.bus.kafka.group_instance_id if settings.bus.kind == "kafka" else None
        # Under a static name a restarted detector ends at once what it left half done. Else by chance: two containers
        # may have the same host name and process id, and would fence each other for ever.
        transactional_id = f"{daemon.group}.{static or member or uuid.uuid4().hex}"
        self._producer: Producer = bus.producer(transactional_id=transactional_id if self._exactly_once else None)
        try:
            known_bytes = bus.max_message_bytes(self._topics.deadletter)
            # unknown: what the brokers take of a topic about which nothing was said, or less
            self._letter_bytes = known_bytes or min(self._topics.max_message_bytes, _LETTER_BYTES)
            self._consumer: Consumer = bus.consumer(
                [self._topics.chunks],
                daemon.group,
                start="earliest",
                member_id=static,
                on_assigned=self._assigned,
                on_revoked=self._revoked,
            )
        except BusError:
            self._producer.close()
            raise

    def step(self) -> int:
        """Gather a batch, run it, publish, commit when due. Return the number of records read."""
        gathered = self._batcher.gather(self._poll, _POLL_SECONDS, self._max_records)
        mine = self._consumer.assignment()
        for jump in self._consumer.jumps():
            if jump.partition in mine:
                self._note_jump(jump)
        if gathered:
            self._oldest_ms.clear()
        for assignment, record in gathered:
            partition = record.topic_partition
            # One taken away meanwhile is its new owner's, even if that is us again: it will be read again.
            if partition not in mine or assignment != self._assignments[partition]:
                continue
            self._take(record)
            if self._unsaid_bytes >= _FULL_BYTES:  # no transaction may outgrow what the bus takes
                self._publish(self._pipeline.run())
                self._commit_soon()
        self._publish(self._pipeline.run())
        self._close_abandoned()
        now = self._monotonic()
        self._end_left_out(now)
        if now - self._last_sweep >= (_IDLE_SWEEP_SECONDS if not gathered else _BUSY_SWEEP_SECONDS):
            self._last_sweep = now
            self._forget_idle()
        if self._unsaid or (self._positions and now - self._last_commit >= self._commit_interval_seconds):
            self._commit_soon()
        if now - self._last_gauges >= _GAUGE_SECONDS:
            self._last_gauges = now
            self._look_at_lag(now)
        self._observe()
        return len(gathered)

    def finish(self) -> None:
        """Commit for the last time; while the group shares out anew, once that is done. Raises BusError."""
        deadline = self._monotonic() + _FINISH_SECONDS
        for left in self._left_out.values():
            left.is_due = True
        while True:
            try:
                return self.commit()
            except CommitDelayed:
                if self._monotonic() > deadline:
                    raise
                self._consumer.poll(_POLL_SECONDS, 1)  # read again by whoever comes next

    def _commit_soon(self) -> None:
        """Commit; while the group shares out anew, with one of the next steps: that is done while polling."""
        try:
            self.commit()
        except CommitDelayed:
            if self._monotonic() - self._last_commit > _DELAYED_SECONDS:
                raise

    def commit(self) -> None:
        """Store what was sent and then, or with it, the offsets. Raises BusError; nothing was committed then."""
        for partition in [p for p, left in self._left_out.items() if left.is_due]:
            self._tell_left_out(partition)
        if not self._positions and not self._unsaid:
            return
        now_ms = int(self._wall() * 1000)
        commits = {
            tp: Commit(
                self._positions[tp],
                Position(
                    read_from, min(now_ms, self._times_ms.get(tp, now_ms)), self._pipeline.served, since
                ).to_text(),
            )
            for tp, (read_from, since) in self._pipeline.rebuild_plans(self._positions).items()
        }
        with self._metrics.stage.labels("commit").time():
            try:
                self._producer.commit(self._consumer, commits)
            except BusError as e:
                self._metrics.commits.labels("delayed" if isinstance(e, CommitDelayed) else "failed").inc()
                raise
        self._metrics.commits.labels("stored").inc()
        self._count_committed()
        self._positions.clear()
        self._unsaid = self._unsaid_bytes = 0
        self._last_commit = self._monotonic()

    def _count_committed(self) -> None:
        """Move the counters by what the commit just made took in."""
        m = self._metrics
        for partition in self._positions:
            tally = self._tallies.pop(partition, None)
            if tally is None:
                continue
            number = str(partition.partition)
            m.records_in.inc(tally.records)
            m.chunks_out.inc(tally.analysed)
            m.duplicates.inc(tally.duplicates)
            m.missing.inc(tally.missing)
            for reason, count in tally.rejected.items():
                m.rejected.labels(reason).inc(count)
            m.skipped_records.inc(tally.skipped + tally.unread)
            m.skipped.inc(tally.skipped)
            m.unread.inc(tally.unread)
            if tally.lost:
                m.lost_records.labels(number).inc(tally.lost)
            if tally.cut:
                m.cut_records.labels(number).inc(tally.cut)
        m.deadletters.inc(self._sent.pop(_LETTER, 0))
        for state, count in self._sent.items():
            m.alerts.labels(state).inc(count)
        self._sent.clear()

    def _drop_tally(self, partition: TopicPartition) -> None:
        """What was made of it was not committed: it will be read again."""
        tally = self._tallies.pop(partition, _Tally())
        left = self._left_out.pop(partition, None)
        if left is not None:
            tally.add(left.tally)
        self._metrics.uncommitted.inc(tally.records + tally.skipped)

    def close(self) -> None:
        """Leave the group. What was not committed will be read again by whoever comes next."""
        for partition in self._tallies.keys() | self._left_out.keys():
            self._drop_tally(partition)
        try:
            self._producer.abort()
        except BusError as e:
            log.debug("The transaction could not be aborted: %s", e)
        for end in (self._consumer.close, self._producer.close):
            try:
                end()
            except BusError as e:
                log.warning("Leaving the bus: %s", e)

    def _poll(self, timeout_seconds: float, max_records: int) -> list[tuple[int, Record]]:
        """Records, each with the assignment under which it was read."""
        return [(self._assignments[r.topic_partition], r) for r in self._consumer.poll(timeout_seconds, max_records)]

    def _note_jump(self, jump: Jump) -> None:
        """Tell and count what is not in the log any more; commit where reading goes on, so that it is told once."""
        partition, position, to = jump
        if partition in self._left_out:
            self._tell_left_out(partition)
        if to < position:
            self._left_out.pop(partition, None)
            self._tallies[partition].cut += position - to
            log.error(
                "%s[%d]: the log ends at %d and was read up to %d: its last records are gone from the brokers (a power "
                "cut, or a copy that lagged took over). What comes now is heard; streams begin anew there.",
                *partition, to, position,
            )  # fmt: skip
            if self._silent_until.pop(partition, to) > to:  # what comes there now was never heard
                self._pipeline.rebuild(partition, Rebuild(to, {}))
                self._silent_until[partition] = to
            self._positions[partition] = to
            return
        first = max(position, self._silent_until.get(partition, 0))  # what lies before was heard
        if to > first:
            self._tallies[partition].lost += to - first
            log.warning(
                "%s[%d]: retention dropped records %d to %d (%d) before they were read: lost coverage. Keep audio "
                "longer (topics.chunks_retention_seconds), or add detectors.",
                *partition, first, to - 1, to - first,
            )  # fmt: skip
            self._positions[partition] = max(to, self._positions.get(partition, 0))

    def _take(self, record: Record) -> None:
        partition = record.topic_partition
        self._times_ms[partition] = record.timestamp_ms
        if record.offset < self._silent_until.get(partition, 0):
            self._metrics.reread.inc()
            with suppress(ChunkError):  # it was told when it was first read
                self._submit(record)
            return
        self._oldest_ms[partition] = min(record.timestamp_ms, self._oldest_ms.get(partition, record.timestamp_ms))
        left = self._left_out.get(partition)
        if left is not None and record.offset < left.until:
            self._leave_out(record, left)
            return
        if left is not None:
            self._tell_left_out(partition)
            del self._left_out[partition]
        tally = self._tallies[partition]
        tally.records += 1
        self._positions[partition] = record.offset + 1
        try:
            taken = self._submit(record)
        except ChunkError as e:
            self._reject(record, e, tally)
            return
        tally.missing += taken.missing
        if taken.is_duplicate:
            tally.duplicates += 1
        else:
            tally.analysed += 1  # by the time of the commit it is

    def _submit(self, record: Record) -> Taken:
        with self._metrics.stage.labels("decode").time():
            chunk = decode(record.key, record.value, record.headers)
        return self._pipeline.submit(Arrival(chunk, record.topic_partition, record.offset, self._monotonic()))

    def _leave_out(self, record: Record, left: _LeftOut) -> None:
        """Count whose audio it is that nobody hears. What is no chunk, or came before, is treated as ever."""
        left.next = record.offset + 1
        try:
            head = decode_head(record.key, record.value, record.headers)
            taken = self._pipeline.leave_out(head, record.topic_partition, record.offset, self._monotonic())
        except ChunkError as e:
            left.tally.records += 1
            left.is_due = True  # the position is committed with the letter
            self._reject(record, e, left.tally)
            return
        left.tally.missing += taken.missing
        if taken.is_duplicate:
            left.tally.records += 1
            left.tally.duplicates += 1
        else:
            left.tally.skipped += 1
            left.by_stream[head.stream_id] += 1

    def _reject(self, record: Record, error: ChunkError, tally: _Tally) -> None:
        tally.rejected[error.reason] += 1
        self._rejections.tell(record, error)
        key, value, headers = deadletters.letter_of(record, error, int(self._wall() * 1e9), self._letter_bytes)
        self._producer.send(self._topics.deadletter, key, value, headers)
        self._sent[_LETTER] += 1
        self._unsaid += 1
        self._unsaid_bytes += len(value)

    def _publish(self, emitted: Sequence[Emitted]) -> None:
        if not emitted:
            return
        with self._metrics.stage.labels("publish").time():
            for one in emitted:
                latency_seconds = self._wall() - one.capture_end_ns / 1e9
                alert = replace(one.alert, latency_seconds=round(latency_seconds, 6))
                sent = self._send_alert(alert, ((alert_wire.SERVED_HEADER, self._pipeline.served.encode()),))
                if sent and alert.state == "opened":
                    self._metrics.latency.observe(max(0.0, latency_seconds))

    def _send_alert(self, alert: Alert, more_headers: Headers) -> bool:
        try:
            key, value, headers = alert_wire.encode(alert)
        except AlertError:  # a defect of ours; the other streams' alerts must not suffer from it
            log.exception("An alert could not be published")
            self._metrics.alerts.labels("failed").inc()
            return False
        self._producer.send(self._topics.alerts, key, value, (*headers, *more_headers))
        self._unsaid += 1
        self._unsaid_bytes += len(value)
        self._sent[alert.state] += 1
        log.info(
            "Alert %s of %s: %s, score %.3f, onset %s, %d shots", alert.state, alert.stream, alert.label,
            alert.peak_score, alert.onset_at, alert.onset_count,
        )  # fmt: skip
        return True

    def _forget_idle(self) -> None:
        """Close the alerts of streams that went silent, and see that the next commit knows of it."""
        if any(self._is_rebuilding(partition) for partition in self._consumer.assignment()):
            return  # its position can't be committed with the closings: they would be told again after a restart
        emitted = self._pipeline.forget_idle(self._monotonic())
        self._publish(emitted)
        if emitted:
            for partition in self._consumer.assignment():
                self._positions.setdefault(partition, self._settled(partition))

    def _settled(self, partition: TopicPartition) -> int:
        """Up to where all that was read is published and counted. Nothing waits for ``run``."""
        left = self._left_out.get(partition)
        return self._consumer.position(partition) if left is None else left.told[0]

    def _is_rebuilding(self, partition: TopicPartition) -> bool:
        return self._consumer.position(partition) < self._silent_until.get(partition, 0)

    def _close_abandoned(self) -> None:
        """Close what another model left open, with the first commit after the rebuild. Nothing waits for ``run``."""
        rebuilt = [p for p in self._abandoned if not self._is_rebuilding(p)]
        if rebuilt and (unknown := {p: left for p, left in self._abandoned.items() if p not in self._open}):
            self._open |= abandoned.find_open(self._bus, self._topics.alerts, unknown)
        for partition in rebuilt:
            left, found = self._abandoned.pop(partition), self._open.pop(partition)
            for alert, headers in found:
                self._send_alert(abandoned.closing(alert, left.reason), headers)
            if found:
                self._positions.setdefault(partition, self._settled(partition))

    def _look_at_lag(self, now: float) -> None:
        """Gauges, and what is to be done about being late. Nothing waits for ``run``."""
        m = self._metrics
        m.streams.set(self._pipeline.stream_count)
        m.open_alerts.set(self._pipeline.open_alert_count)
        late = {}
        for partition, end in self._consumer.end_offsets(self._consumer.assignment()).items():
            behind = max(0, end - self._consumer.position(partition))
            lag_seconds = self._lag_seconds(partition, behind)
            m.lag.labels(str(partition.partition)).set(behind)
            m.lag_seconds.labels(str(partition.partition)).set(lag_seconds)
            is_late = self._max_lag_seconds is not None and lag_seconds > self._max_lag_seconds
            if is_late and not self._is_rebuilding(partition):
                late[partition] = lag_seconds, end
        if late and self._skips:
            self._skip(late, now)
        elif late and now >= self._next_late_warning:
            self._next_late_warning = now + _LATE_WARNING_SECONDS
            log.warning(
                "Overloaded: %d partitions are late, the worst by %.0f s (daemon.max_lag_seconds is %g). Alerts come "
                "as much later. Add detectors, or set daemon.overload to skip_to_latest.",
                len(late), max(seconds for seconds, _ in late.values()), self._max_lag_seconds,
            )  # fmt: skip

    def _lag_seconds(self, partition: TopicPartition, behind: int) -> float:
        """How old the audio being read is: by how many chunks of each stream wait, and by the records' times. The
        lesser of both, as clocks may be wrong and junk is no audio."""
        oldest_ms = self._oldest_ms.get(partition)
        if not behind or oldest_ms is None:
            return 0.0
        by_count = behind * CHUNK_SECONDS / max(1, self._pipeline.stream_count_of(partition))
        return max(0.0, min(by_count, self._wall() - oldest_ms / 1000))

    def _skip(self, late: Mapping[TopicPartition, tuple[float, int]], now: float) -> None:
        """Leave out what waits of these partitions, up to the offset given at least."""
        for partition, (lag_seconds, end) in late.items():
            left = self._left_out.get(partition)
            if left is not None:
                left.until = end
                self._pass_over_if_slow(partition, left, now)
                continue
            first = self._consumer.position(partition)
            self._publish(self._pipeline.skip(partition))
            self._positions[partition] = first
            self._left_out[partition] = _LeftOut((first, now), (first, now), first, end)
            log.warning(
                "%s[%d]: %.0f s late, more than daemon.max_lag_seconds: what waits from record %d on is left out "
                "unheard.",
                *partition, lag_seconds, first,
            )  # fmt: skip
        self._commit_soon()

    def _pass_over_if_slow(self, partition: TopicPartition, left: _LeftOut, now: float) -> None:
        """Looking at each record would take too long: go to the end at once."""
        first, began = left.began
        spent_seconds, position = now - began, self._consumer.position(partition)
        a_second = (position - first) / max(spent_seconds, 1e-9)
        whole_seconds = spent_seconds + (left.until - position) / max(a_second, 1e-9)
        if spent_seconds < _FORESEE_SECONDS or whole_seconds <= _LOOK_SECONDS:
            return
        self._tell_left_out(partition)
        del self._left_out[partition]
        self._pipeline.pass_over(partition)
        self._consumer.seek(partition, left.until)
        self._positions[partition] = left.until
        self._tallies[partition].unread += left.until - position
        self._oldest_ms.pop(partition, None)
        log.warning(
            "%s[%d]: records %d to %d (%d) are left out unread: nobody knows of which streams. To look at all that "
            "waits would take %.0f s more.",
            *partition, position, left.until - 1, left.until - position, whole_seconds - spent_seconds,
        )  # fmt: skip

    def _end_left_out(self, now: float) -> None:
        """Hear again what lies behind a stretch that was left out; tell of one that goes on, from time to time."""
        for partition, left in list(self._left_out.items()):
            if self._consumer.position(partition) >= left.until:
                self._tell_left_out(partition)
                del self._left_out[partition]
            elif now - left.told[1] >= _TELL_SECONDS:
                left.is_due = True

    def _tell_left_out(self, partition: TopicPartition) -> None:
        """Say of which streams the records are that were left out since this was last done.

        Before they are committed: what was left out is said even where the detector dies meanwhile. Where it does, who
        comes next may say it again, of the same records.
        """
        left = self._left_out[partition]
        first, tally = left.told[0], left.tally
        left.told, left.is_due = (left.next, self._monotonic()), False
        if left.next == first:
            return
        self._positions[partition] = left.next
        self._tallies[partition].add(tally)
        if tally.skipped:
            log.warning(
                "%s[%d]: records %d to %d (%d) are left out unheard: lost coverage of %d streams, %.1f s.",
                *partition, first, left.next - 1, tally.skipped, len(left.by_stream), tally.skipped * CHUNK_SECONDS,
            )  # fmt: skip
        names = [f"{stream} {n} chunks ({n * CHUNK_SECONDS:.1f} s)" for stream, n in sorted(left.by_stream.items())]
        for start in range(0, len(names), _STREAMS_A_LINE):
            log.warning(
                "Lost coverage, records %d to %d of %s[%d]: %s.",
                first, left.next - 1, *partition, ", ".join(names[start : start + _STREAMS_A_LINE]),
            )  # fmt: skip
        left.tally = _Tally()
        left.by_stream.clear()

    def _assigned(self, consumer: Consumer, partitions: frozenset[TopicPartition]) -> None:
        for partition in sorted(partitions):
            committed = consumer.committed(partition)
            if committed is None:
                continue
            position = Position.from_text(committed.metadata)
            if position is None:
                log.warning(
                    "%s[%d]: the committed offset carries no position of ours; streams begin anew there.", *partition
                )
                continue
            left = frozenset(position.since) if not position.feed_rest else None
            left_ms = position.at_ms - self._rebuild_max_ms
            if committed.offset > consumer.end_offset(partition):  # told with the consumer's jump
                if left is None or left:
                    self._abandoned[partition] = Left(left_ms, left, "gap")
                continue
            oldest = consumer.offset_at(partition, left_ms)
            start = min(committed.offset, position.read_from if oldest is None else max(oldest, position.read_from))
            consumer.seek(partition, start)
            self._silent_until[partition] = committed.offset
            plan = Rebuild(committed.offset, position.since, position.feed_rest)
            if position.served != self._pipeline.served:
                log.warning(
                    "%s[%d]: model, decision settings or rules for onsets have changed since the last commit. Alerts "
                    "open then are closed (model_changed).",
                    *partition,
                )
                plan = Rebuild(committed.offset, {})
                if left is None or left:
                    self._abandoned[partition] = Left(left_ms, left)
            self._pipeline.rebuild(partition, plan)
            log.info("%s[%d]: rebuilding from %d, new from %d.", *partition, start, committed.offset)

    def _revoked(self, consumer: Consumer, partitions: frozenset[TopicPartition]) -> None:
        for partition in partitions & self._left_out.keys():
            self._left_out[partition].is_due = True
        try:
            self.commit()
        except (CommitFenced, CommitDelayed) as e:
            if self._exactly_once:  # what waits to be sent is theirs too: begin anew from what is committed
                raise
            log.info("Partitions were taken over before their last commit; the new owner reads on from there: %s", e)
        finally:
            for partition in partitions:
                self._drop_tally(partition)
                self._pipeline.drop_partition(partition)
                self._positions.pop(partition, None)
                self._times_ms.pop(partition, None)
                self._assignments[partition] += 1
                self._silent_until.pop(partition, None)
                self._abandoned.pop(partition, None)
                self._open.pop(partition, None)
                self._oldest_ms.pop(partition, None)

    def _observe(self) -> None:
        m, account, told = self._metrics, self._pipeline.account, self._told
        for counter, value, before in (
            (m.chunks_in, account.accepted, told.accepted),
            (m.rebuilt, account.rebuilt, told.rebuilt),
            (m.examples_in, account.examples, told.examples),
            (m.examples_out, account.scored, told.scored),
        ):
            counter.inc(max(0, value - before))
        for reason, count in account.resets.items():
            m.resets.labels(reason).inc(count - told.resets[reason])
        for size in account.batches:
            m.batch.observe(size)
        account.batches.clear()
        self._told = replace(account, batches=[], resets=account.resets.copy())
        m.in_progress.set(self._pipeline.examples_in_progress)


class Daemon:
    """Everything of ``detector run`` but the signals.

    ``run`` returns after ``stop`` was called. Ready means: bus open, topics there, model verified by hash and by its
    golden self-test, every batch size warmed up, group joined.
    """

    def __init__(self, settings: Settings, *, registry: CollectorRegistry | None = None) -> None:
        self._settings = settings
        self._topic_findings: frozenset[str] = frozenset()  # what is wrong with the topics, and was said
        self._registry = registry or CollectorRegistry()
        if registry is None:
            for collector in (ProcessCollector, PlatformCollector, GCCollector):
                collector(registry=self._registry)
        self.metrics = Metrics(self._registry)
        self._stop = threading.Event()
        self._member = uuid.uuid4().hex
        self._backoff = Backoff()
        self._missing = ["model", "bus", "group"]
        self._beat = time.monotonic()
        self._console: ConsoleServer | None = None

    @property
    def console_address(self) -> tuple[str, int] | None:
        return None if self._console is None else self._console.address

    def stop(self) -> None:
        """Finish what was begun, commit, leave the group. Safe in a signal handler and from any thread."""
        self._stop.set()

    def run(self) -> None:
        """Serve until ``stop``. Raises ConfigError, ModelError, BusDamaged; everything passing is waited out."""
        console = self._settings.console
        self._console = ConsoleServer(console.host, console.port, self._registry, live=self.live, ready=self.ready)
        log.info("Console on http://%s:%d", *self._console.address)
        try:
            model = self._load()
            while not self._stop.is_set():
                self._run_session(model)
        finally:
            self._set_missing("stopped")
            self._console.close()

    def live(self) -> dict[str, Any]:
        """The loop turned lately, or the daemon is still starting."""
        age = time.monotonic() - self._beat
        starting = "model" in self._missing
        return {"ok": starting or age < _LIVE_SECONDS, "loop_age_seconds": round(age, 3), "starting": starting}

    def ready(self) -> dict[str, Any]:
        return {"ok": not self._missing, "missing": list(self._missing)}

    def _set_missing(self, *missing: str) -> None:
        self._missing = list(missing)
        self.metrics.ready.set(not missing)

    def _load(self) -> Model:
        m = self._settings.model
        started = time.monotonic()
        name = m.name
        model = load_model(name, store=m.store, threads=m.threads)
        pipeline_for(model, self._settings)  # the configuration must fit the model before anything else starts
        model.self_test()
        model.warm_up(self._settings.batch.max_batch)
        self.metrics.model.info({"name": model.name, "version": model.version, "sha256": model.sha256})
        log.info("Model %s %s verified and warm in %.1f s.", model.name, model.version, time.monotonic() - started)
        log.info("%s", choose_threshold(model.manifest, self._settings.decision, self._settings.batch.hop_seconds))
        self._set_missing("bus", "group")
        self._beat = time.monotonic()
        return model

    def _run_session(self, model: Model) -> None:
        """From joining the group to the first failure, or the end."""
        opened = self._open(model)
        if opened is None:
            return
        bus, session = opened
        began, failed = time.monotonic(), False
        try:
            session.step()
            self._set_missing()
            log.info("Ready: %s bus, group %s.", self._settings.bus.kind, self._settings.daemon.group)
            while not self._stop.is_set():
                self._beat = time.monotonic()
                session.step()
            session.finish()
        except (BusUnavailable, CommitFenced) as e:
            self.metrics.bus_errors.labels(type(e).__name__).inc()
            if self._stop.is_set():
                log.warning("Stopped without the last commit; who comes next reads on from the one before: %s", e)
            else:
                log.warning("Starting again from the committed offsets, as the bus failed: %s", e)
            self._set_missing("bus", "group")
            failed = True
        finally:
            session.close()
            bus.close()
        if failed:
            self._stop.wait(self._backoff.seconds(time.monotonic() - began))

    def _open(self, model: Model) -> tuple[Bus, Session] | None:
        """Open the bus and join, trying again as long as it takes; None when stopped meanwhile."""
        settings = self._settings

        def attempt() -> tuple[Bus, Session]:
            self._beat = time.monotonic()
            bus = open_bus(settings.bus)
            try:
                bus.create_topics(topic_settings(settings.topics))
                self._topic_findings = tell_findings(bus, settings, self._topic_findings)
                pipeline = pipeline_for(model, settings, stage_timer=self._time_stage)
                return bus, Session(bus, settings, pipeline, self.metrics, member=self._member)
            except BusError:
                bus.close()
                raise

        def failed(state: tenacity.RetryCallState) -> None:
            self.metrics.bus_errors.labels("BusUnavailable").inc()
            assert state.outcome is not None
            log.warning("The bus can't be reached, trying again: %s", state.outcome.exception())

        try:
            return tenacity.Retrying(
                retry=tenacity.retry_if_exception_type(BusUnavailable),
                wait=tenacity.wait_random_exponential(multiplier=0.5, max=10),
                stop=tenacity.stop_when_event_set(self._stop),
                sleep=tenacity.sleep_using_event(self._stop),
                before_sleep=failed,
            )(attempt)
        except tenacity.RetryError:
            return None

    def _time_stage(self, stage: str) -> AbstractContextManager[object]:
        return self.metrics.stage.labels(stage).time()
