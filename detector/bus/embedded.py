"""The embedded bus: one SQLite file in WAL mode that many processes of one machine share. No server, no set-up.

What it promises: a record that ``flush`` or ``commit`` has acknowledged survives a ``kill -9`` of any process. A crash
of the operating system or a power cut may lose the last moments (never damage the file), unless ``durable`` is set:
then each commit waits for the disk. Offsets are given inside the write transaction and have no gaps, so a reader never
passes over a record that is committed later. Not for network file systems, and not for more than one machine.
"""

from __future__ import annotations

import hashlib
import logging
import random
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from detector.bus.base import (
    Commit,
    Consumer,
    Headers,
    Jump,
    Producer,
    Record,
    TopicPartition,
    TopicSettings,
    check_commits,
    check_start,
    check_topics,
)
from detector.bus.membership import Membership, rebalance_all
from detector.bus.sqlite_file import OFFSET_BITS, BusFile
from detector.errors import BusDamaged, BusError, BusUnavailable, CommitFenced

if TYPE_CHECKING:
    import sqlite3

MAX_VALUE_BYTES = 8 * 1024 * 1024

_LINGER_SECONDS = 0.005
_BATCH_BYTES = 2 * 1024 * 1024  # a transaction of a non-transactional producer; keeps the file free for others
_BUFFER_BYTES = 32 * 1024 * 1024
_BUFFER_WAIT_SECONDS = 1.0
_POLL_BYTES = 64 * 1024 * 1024
_CLOSE_SECONDS = 5.0
_RECORD_OVERHEAD_BYTES = 64
_SWEEP_SECONDS = 0.25
_SWEEP_BYTES = 4 * 1024 * 1024
_SWEEP_RECORDS = 256
_RETRY_SECONDS = 0.2
_RECORD_BYTES_SQL = f"(coalesce(length(key), 0) + length(headers) + length(value) + {_RECORD_OVERHEAD_BYTES})"

_logger = logging.getLogger(__name__)

Callback = Callable[[Consumer, frozenset[TopicPartition]], None]


def partition_of(key: bytes, partitions: int) -> int:
    """Where records of ``key`` go: the same in every process and version."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % partitions


def _pack_headers(headers: Headers) -> bytes:
    """Count, then all lengths (name, value, name, value...), then all bytes; little-endian uint32."""
    if not headers:
        return b""
    parts: list[bytes] = []
    for name, value in headers:
        parts += (name.encode(), value)
    return struct.pack(f"<{len(parts) + 1}I", len(parts), *map(len, parts)) + b"".join(parts)


def _unpack_headers(packed: bytes) -> Headers:
    if not packed:
        return ()
    (count,) = struct.unpack_from("<I", packed)
    at = 4 + 4 * count
    parts = []
    for length in struct.unpack_from(f"<{count}I", packed, 4):
        parts.append(packed[at : at + length])
        at += length
    if at != len(packed) or count % 2:
        raise ValueError("lengths do not add up")
    return tuple((parts[i].decode(), parts[i + 1]) for i in range(0, count, 2))


class _Log(NamedTuple):
    """One partition of a topic as it is stored."""

    topic: str
    partition: int
    log_id: int

    @property
    def base(self) -> int:
        return self.log_id << OFFSET_BITS

    @property
    def end(self) -> int:
        return (self.log_id + 1) << OFFSET_BITS


class _Topic(NamedTuple):
    log_ids: tuple[int, ...]
    max_message_bytes: int


class _Outgoing(NamedTuple):
    log_id: int
    timestamp_ms: int
    key: bytes | None
    headers: bytes
    value: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.key or b"") + len(self.headers) + len(self.value) + _RECORD_OVERHEAD_BYTES


def _find_topic(file: BusFile, topic: str) -> _Topic | None:
    rows = file.rows(
        "SELECT log_id, max_message_bytes FROM logs JOIN topics USING(topic_id) WHERE name=? ORDER BY partition",
        (topic,),
    )
    if not rows:
        return None
    limit = MAX_VALUE_BYTES if rows[0][1] is None else min(rows[0][1], MAX_VALUE_BYTES)
    return _Topic(tuple(row[0] for row in rows), limit)


class EmbeddedBus:
    """A bus in one file. Each producer and consumer has a connection of its own.

    Args:
        path: the file; it and its folder are created where missing.
        retention_seconds: age at which records are dropped, for topics without an age of their own; None: never.
        retention_bytes: what all records together may take; beyond it the fullest partition gives its oldest. None: no
            limit. The file itself grows a little larger and does not shrink.
        session_timeout_seconds: a group member that has not polled for so long is dead, its partitions go to others.
        poll_interval_seconds: how often a waiting ``poll`` looks; the latency it adds.
        busy_timeout_seconds: how long to wait while another process writes.
        durable: wait for the disk at each commit.

    Raises:
        BusUnavailable: the file can't be opened, created or locked.
        BusDamaged: it is no bus file, or a broken one.

    Retention is the producers' work, a little with each write; a topic's ``retention_bytes`` counts per partition.
    Dropped records' offsets are never given again.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        retention_seconds: float | None = None,
        retention_bytes: int | None = None,
        session_timeout_seconds: float = 10.0,
        poll_interval_seconds: float = 0.01,
        busy_timeout_seconds: float = 5.0,
        durable: bool = False,
    ) -> None:
        self._path = Path(path).absolute()
        self._retention_seconds = retention_seconds
        self._retention_bytes = retention_bytes
        self._session_timeout_seconds = session_timeout_seconds
        self._poll_interval_seconds = poll_interval_seconds
        self._busy_timeout_seconds = busy_timeout_seconds
        self._durable = durable
        self._closed = False
        self._children: list[EmbeddedProducer | EmbeddedConsumer] = []
        self._file = self._open()

    def _open(self) -> BusFile:
        return BusFile(self._path, busy_timeout_seconds=self._busy_timeout_seconds, durable=self._durable)

    def _adopt(self, child: EmbeddedProducer | EmbeddedConsumer) -> None:
        self._children = [*(c for c in self._children if not c.is_closed), child]

    def _check_open(self) -> None:
        if self._closed:
            raise BusError(f"The bus {self._path} is closed.")

    def create_topics(self, topics: Mapping[str, TopicSettings]) -> None:
        self._check_open()
        check_topics(topics)
        with self._file.transaction() as db:
            for name, settings in topics.items():
                inserted = db.execute(
                    "INSERT OR IGNORE INTO topics"
                    "(name, partitions, retention_seconds, retention_bytes, max_message_bytes) VALUES(?,?,?,?,?)",
                    (
                        name,
                        settings.partitions,
                        settings.retention_seconds,
                        settings.retention_bytes,
                        settings.max_message_bytes,
                    ),
                )
                if inserted.rowcount:
                    db.executemany(
                        "INSERT INTO logs(topic_id, partition) VALUES(?,?)",
                        [(inserted.lastrowid, partition) for partition in range(settings.partitions)],
                    )
            rebalance_all(db)

    def partitions(self, topic: str) -> int | None:
        self._check_open()
        self._file.check_still_there()
        found = _find_topic(self._file, topic)
        return None if found is None else len(found.log_ids)

    def max_message_bytes(self, topic: str) -> int | None:
        self._check_open()
        found = _find_topic(self._file, topic)
        return None if found is None else found.max_message_bytes

    def producer(self, *, transactional_id: str | None = None) -> Producer:
        self._check_open()
        file = self._open()
        retention = _Retention(self._retention_seconds, self._retention_bytes)
        try:
            producer = EmbeddedProducer(file, retention, transactional_id)
        except BaseException:
            file.close()
            raise
        self._adopt(producer)
        return producer

    def consumer(
        self,
        topics: Sequence[str],
        group: str | None,
        *,
        start: str = "earliest",
        member_id: str | None = None,
        on_assigned: Callback | None = None,
        on_revoked: Callback | None = None,
    ) -> Consumer:
        self._check_open()
        check_start(start)
        file = self._open()
        membership = None
        if group is not None:
            membership = Membership(file, group, topics, member_id, self._session_timeout_seconds)
        try:
            consumer = EmbeddedConsumer(
                file, topics, membership, start, self._poll_interval_seconds, on_assigned, on_revoked
            )
        except BaseException:
            file.close()
            raise
        self._adopt(consumer)
        return consumer

    def close(self) -> None:
        """Close it with every producer and consumer it made."""
        if self._closed:
            return
        self._closed = True
        try:
            for child in self._children:
                child.close()
        finally:
            self._children.clear()
            self._file.close()


class _Retention:
    """Drops old records, a bounded number at a time, inside a producer's write transactions."""

    def __init__(self, retention_seconds: float | None, retention_bytes: int | None) -> None:
        self._retention_seconds = retention_seconds
        self._retention_bytes = retention_bytes
        self._next_sweep_seconds = 0.0
        self._records_since = 0
        self._bytes_since = 0

    def apply(self, db: sqlite3.Connection, records: int, size_bytes: int) -> None:
        """Called with what the transaction has written; from time to time drops about twice as much."""
        self._records_since += records
        self._bytes_since += size_bytes
        now = time.monotonic()
        if now < self._next_sweep_seconds and self._bytes_since < _SWEEP_BYTES:
            return
        budget = max(_SWEEP_RECORDS, 2 * self._records_since)
        self._next_sweep_seconds = now + _SWEEP_SECONDS
        self._records_since = self._bytes_since = 0
        self._sweep(db, budget)

    def _sweep(self, db: sqlite3.Connection, budget: int) -> None:
        now_ms = time.time_ns() // 1_000_000
        sizes: dict[int, int] = {}
        for log_id, stored, seconds, size_limit in db.execute(
            "SELECT log_id, bytes, retention_seconds, retention_bytes FROM logs JOIN topics USING(topic_id) "
            "WHERE next_offset > oldest_offset"
        ).fetchall():
            seconds = self._retention_seconds if seconds is None else seconds
            sizes[log_id] = stored
            cutoff_ms = None if seconds is None else now_ms - int(seconds * 1000)
            over_bytes = 0 if size_limit is None else stored - size_limit
            if budget > 0 and (cutoff_ms is not None or over_bytes > 0):
                records, dropped_bytes = self._drop(db, log_id, budget, cutoff_ms, over_bytes)
                budget -= records
                sizes[log_id] -= dropped_bytes
        if self._retention_bytes is None:
            return
        over_bytes = sum(sizes.values()) - self._retention_bytes
        while over_bytes > 0 and budget > 0:
            fullest = max(sizes, key=sizes.__getitem__)
            records, dropped_bytes = self._drop(db, fullest, min(16, budget), None, over_bytes)
            if not records:
                break
            budget -= records
            over_bytes -= dropped_bytes
            sizes[fullest] -= dropped_bytes

    @staticmethod
    def _drop(
        db: sqlite3.Connection, log_id: int, limit: int, cutoff_ms: int | None, over_bytes: int
    ) -> tuple[int, int]:
        """Drop up to ``limit`` of the oldest while older than the cutoff or bytes are over; gives (records, bytes)."""
        base, end = log_id << OFFSET_BITS, (log_id + 1) << OFFSET_BITS
        records = dropped_bytes = 0
        last_id = -1
        cursor = db.execute(
            f"SELECT id, timestamp_ms, {_RECORD_BYTES_SQL} FROM records WHERE id >= ? AND id < ? ORDER BY id LIMIT ?",  # noqa: S608
            (base, end, limit),
        )
        for record_id, timestamp_ms, size_bytes in cursor:
            if not (dropped_bytes < over_bytes or (cutoff_ms is not None and timestamp_ms < cutoff_ms)):
                break
            records += 1
            dropped_bytes += size_bytes
            last_id = record_id
        cursor.close()
        if records:
            db.execute("DELETE FROM records WHERE id >= ? AND id <= ?", (base, last_id))
            db.execute(
                "UPDATE logs SET oldest_offset=?, bytes=bytes-? WHERE log_id=?",
                (last_id + 1 - base, dropped_bytes, log_id),
            )
        return records, dropped_bytes


class EmbeddedProducer:
    """Writes records. Without a transactional id a thread of its own stores what was sent within 5 ms, in batches."""

    def __init__(self, file: BusFile, retention: _Retention, transactional_id: str | None) -> None:
        self._file = file
        self._retention = retention
        self._transactional_id = transactional_id
        self._topics: dict[str, _Topic] = {}
        self._next_partition: dict[str, int] = {}
        self._pending: deque[_Outgoing] = deque()
        self._pending_bytes = 0
        self._changed = threading.Condition()  # guards _pending, _pending_bytes, _error and _closed
        self._file_lock = threading.Lock()  # one connection, two threads; never taken while holding _changed
        self._error: BusError | None = None
        self._closed = False
        self._epoch = 0
        self._writer: threading.Thread | None = None
        if transactional_id is not None:
            with file.transaction() as db:
                db.execute(
                    "INSERT INTO transactional_ids VALUES(?, 1) ON CONFLICT(name) DO UPDATE SET epoch=epoch+1",
                    (transactional_id,),
                )
                (self._epoch,) = db.execute(
                    "SELECT epoch FROM transactional_ids WHERE name=?", (transactional_id,)
                ).fetchone()

    def send(
        self,
        topic: str,
        key: bytes | None,
        value: bytes,
        headers: Headers = (),
        *,
        partition: int | None = None,
        timestamp_ms: int | None = None,
    ) -> None:
        self._check_open()
        found = self._topic(topic)
        if len(value) > found.max_message_bytes:
            raise BusError(
                f"A record of {len(value)} bytes is too large for topic {topic}, which takes {found.max_message_bytes}."
            )
        record = _Outgoing(
            found.log_ids[self._choose(topic, len(found.log_ids), key, partition)],
            time.time_ns() // 1_000_000 if timestamp_ms is None else timestamp_ms,
            key,
            _pack_headers(headers),
            value,
        )
        with self._changed:
            if isinstance(self._error, BusDamaged):
                raise self._error
            if self._pending_bytes + record.size_bytes > _BUFFER_BYTES and self._pending:
                self._wait_for_room(record.size_bytes)
            self._pending.append(record)
            self._pending_bytes += record.size_bytes
            if self._transactional_id is None:
                if self._writer is None:
                    self._writer = threading.Thread(target=self._write_on, name="bus-writer", daemon=True)
                    self._writer.start()
                if len(self._pending) == 1 or self._pending_bytes >= _BATCH_BYTES:
                    self._changed.notify_all()

    def _wait_for_room(self, size_bytes: int) -> None:
        if self._transactional_id is not None:
            raise BusUnavailable(
                f"The transaction {self._transactional_id!r} on {self._file.path} has reached {_BUFFER_BYTES} bytes; "
                "commit more often. The record was not taken."
            )
        self._changed.wait_for(
            lambda: self._pending_bytes + size_bytes <= _BUFFER_BYTES or self._error is not None, _BUFFER_WAIT_SECONDS
        )
        if self._pending_bytes + size_bytes <= _BUFFER_BYTES:
            return
        cause = f" {self._error}" if self._error is not None else ""
        raise BusUnavailable(
            f"{_BUFFER_BYTES} bytes wait to be stored in {self._file.path}; the record was not taken.{cause}"
        ) from self._error

    def _topic(self, topic: str) -> _Topic:
        found = self._topics.get(topic)
        if found is None:
            with self._file_lock:
                found = _find_topic(self._file, topic)
            if found is None:
                raise BusUnavailable(f"Topic {topic} does not exist in {self._file.path}. Create it, then send again.")
            self._topics[topic] = found
        return found

    def _choose(self, topic: str, partitions: int, key: bytes | None, partition: int | None) -> int:
        if partition is not None:
            if not 0 <= partition < partitions:
                raise BusError(f"Topic {topic} has partitions 0 to {partitions - 1}, not {partition}.")
            return partition
        if key is not None:
            return partition_of(key, partitions)
        turn = self._next_partition.get(topic, random.randrange(partitions))
        self._next_partition[topic] = turn + 1
        return turn % partitions

    def _write_on(self) -> None:
        """The writer thread: stores what is pending, keeps what can't be stored and tries again."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closed)
                if self._closed:
                    return
                if self._pending_bytes < _BATCH_BYTES:
                    self._changed.wait_for(lambda: self._pending_bytes >= _BATCH_BYTES or self._closed, _LINGER_SECONDS)
            try:
                self._store_batch(None)
            except BusError as error:
                with self._changed:
                    if self._error is None or str(self._error) != str(error):
                        _logger.warning("Records wait to be stored: %s", error)
                    self._error = error
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._closed, random.uniform(0.5, 1.5) * _RETRY_SECONDS)

    def _store_batch(self, deadline_seconds: float | None) -> None:
        timeout = None if deadline_seconds is None else max(0.0, deadline_seconds - time.monotonic())
        if not self._file_lock.acquire(timeout=-1 if timeout is None else timeout):
            raise BusUnavailable(f"Bus file {self._file.path} is busy; what was sent is kept for the next flush.")
        try:
            with self._changed:
                batch: list[_Outgoing] = []
                size_bytes = 0
                for record in self._pending:
                    batch.append(record)
                    size_bytes += record.size_bytes
                    if size_bytes >= _BATCH_BYTES:
                        break
            if not batch:
                return
            with self._file.transaction(timeout) as db:
                self._append(db, batch, size_bytes)
            self._drop_pending(len(batch), size_bytes)
            self._file.limit_log()
        finally:
            self._file_lock.release()

    def _drop_pending(self, records: int, size_bytes: int) -> None:
        with self._changed:
            for _ in range(records):
                self._pending.popleft()
            self._pending_bytes -= size_bytes
            self._error = None
            self._changed.notify_all()

    def _append(self, db: sqlite3.Connection, batch: Iterable[_Outgoing], size_bytes: int) -> None:
        by_log: dict[int, list[_Outgoing]] = {}
        for record in batch:
            by_log.setdefault(record.log_id, []).append(record)
        for log_id, records in by_log.items():
            (offset,) = db.execute("SELECT next_offset FROM logs WHERE log_id=?", (log_id,)).fetchone()
            first_id = (log_id << OFFSET_BITS) + offset
            db.executemany(
                "INSERT INTO records VALUES(?,?,?,?,?)",
                ((first_id + n, r.timestamp_ms, r.key, r.headers, r.value) for n, r in enumerate(records)),
            )
            db.execute(
                "UPDATE logs SET next_offset=?, bytes=bytes+? WHERE log_id=?",
                (offset + len(records), sum(r.size_bytes for r in records), log_id),
            )
        self._retention.apply(db, sum(map(len, by_log.values())), size_bytes)

    def flush(self, timeout_seconds: float = 30.0) -> None:
        self._check_open()
        if self._transactional_id is not None:
            return  # what was sent waits in memory for the commit, which stores all of it at once
        with self._changed:
            to_store = len(self._pending)
        deadline = time.monotonic() + timeout_seconds
        while to_store > 0:
            with self._changed:
                before = len(self._pending)
            if not before:
                return
            self._store_batch(deadline)
            with self._changed:
                to_store -= before - len(self._pending)

    def commit(self, consumer: Consumer, commits: Mapping[TopicPartition, Commit]) -> None:
        self._check_open()
        if not isinstance(consumer, EmbeddedConsumer):
            raise TypeError("The consumer is one of another bus.")
        check_commits(commits)
        if self._transactional_id is None:
            self.flush()
            consumer.commit(commits)
            return
        with self._file_lock:
            with self._changed:
                records, size_bytes = len(self._pending), self._pending_bytes
            with self._file.transaction() as db:
                self._check_epoch(db)
                if records:
                    self._append(db, islice(self._pending, records), size_bytes)
                if commits:
                    consumer.store_positions(db, commits)
            self._drop_pending(records, size_bytes)
            self._file.limit_log()

    def _check_epoch(self, db: sqlite3.Connection) -> None:
        row = db.execute("SELECT epoch FROM transactional_ids WHERE name=?", (self._transactional_id,)).fetchone()
        if row is None or row[0] != self._epoch:
            raise CommitFenced(
                f"Another process produces as {self._transactional_id!r} now; nothing was committed. "
                "Stop one of them or give each its own transactional id."
            )

    def abort(self) -> None:
        if self._transactional_id is not None:
            with self._changed:
                self._pending.clear()
                self._pending_bytes = 0

    def close(self) -> None:
        if self._closed:
            return
        try:
            if self._transactional_id is None and self._pending:
                self.flush(_CLOSE_SECONDS)
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            if self._writer is not None:
                self._writer.join()
            self._file.close()

    @property
    def is_closed(self) -> bool:
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise BusError(f"This producer on {self._file.path} is closed.")


class EmbeddedConsumer:
    """Reads records; joins its group at the first ``poll``."""

    def __init__(
        self,
        file: BusFile,
        topics: Sequence[str],
        membership: Membership | None,
        start: str,
        poll_interval_seconds: float,
        on_assigned: Callback | None,
        on_revoked: Callback | None,
    ) -> None:
        self._file = file
        self._topics = tuple(dict.fromkeys(topics))
        self._membership = membership
        self._start = start
        self._poll_interval_seconds = poll_interval_seconds
        self._on_assigned = on_assigned
        self._on_revoked = on_revoked
        self._logs: dict[TopicPartition, _Log] = {}  # every partition ever looked up
        self._positions: dict[TopicPartition, int] = {}  # those assigned
        self._jumps: list[Jump] = []
        self._paused: set[TopicPartition] = set()
        self._announced: set[TopicPartition] = set()
        self._turn = 0
        self._seen_version: int | None = None
        self._closed = False
        if membership is None:
            self._assign_everything(start)

    def poll(self, timeout_seconds: float, max_records: int = 500) -> list[Record]:
        self._check_open()
        self._file.check_still_there()
        deadline = time.monotonic() + timeout_seconds
        while True:
            version = self._file.data_version()  # before reading: what is committed after it is seen as a change
            self._follow(version)
            records = self._fetch(max_records)
            if records:
                return records
            while self._file.data_version() == version:
                now = time.monotonic()
                if now >= deadline:
                    return []
                if self._membership is not None and now >= self._membership.next_heartbeat_seconds:
                    break
                time.sleep(min(self._poll_interval_seconds, deadline - now))
            if time.monotonic() >= deadline:
                return self._fetch(max_records)

    def _follow(self, version: int) -> None:
        """Keep the membership alive and the assignment up to date."""
        if self._membership is None:
            if version != self._seen_version:
                self._assign_everything("earliest")  # partitions new since the last look: read whole
                self._seen_version = version
            self._announce()
            return
        membership = self._membership
        if not membership.is_joined:
            membership.join()
        elif time.monotonic() >= membership.next_heartbeat_seconds:
            if not membership.heartbeat():
                self._was_removed(membership)
        elif version == self._seen_version:
            return
        while membership.has_news():
            is_member, keep, let_go, free = membership.shares()
            if not is_member:
                self._was_removed(membership)
                continue
            owned = self._partitions_of(keep | let_go)
            leaving = (self._positions.keys() - owned) | self._partitions_of(let_go)
            if leaving:
                self._revoke(leaving)
                if let_go:
                    membership.let_go(let_go)
            if free:
                self._take(membership.take(free))
        self._seen_version = version

    def _was_removed(self, membership: Membership) -> None:
        """The group gave this member up. Under a static name another consumer took, that is final."""
        fenced = membership.is_fenced()
        if self._positions:
            self._revoke(set(self._positions))
        if fenced:
            raise CommitFenced(
                f"Another process reads as member {membership.member_id!r} of group {membership.group!r} now. "
                "Stop one of them or give each its own name."
            )
        _logger.warning(
            "Member %s of group %s did not poll within the session timeout and lost its partitions; it joins again.",
            membership.member_id,
            membership.group,
        )
        membership.join()

    def _revoke(self, partitions: set[TopicPartition]) -> None:
        if self._on_revoked is not None:
            self._on_revoked(self, frozenset(partitions))
        for partition in partitions:
            self._positions.pop(partition, None)
            self._paused.discard(partition)

    def _take(self, log_ids: frozenset[int]) -> None:
        if not log_ids:
            return
        partitions = self._partitions_of(log_ids)
        for partition in partitions:
            self._positions[partition] = self._first_position(partition, self._start)
        if self._on_assigned is not None:
            self._on_assigned(self, frozenset(partitions))

    def _first_position(self, partition: TopicPartition, start: str) -> int:
        commit = self.committed(partition) if self._membership is not None else None
        oldest, end = self._bounds(partition)
        if commit is not None:
            within = min(max(commit.offset, oldest), end)
            if within != commit.offset:
                self._jumps.append(Jump(partition, commit.offset, within))
            return within
        return oldest if start == "earliest" else end

    def _assign_everything(self, start: str) -> None:
        for topic in self._topics:
            for partition in self._look_up(topic):
                if partition not in self._positions:
                    self._positions[partition] = self._first_position(partition, start)

    def _announce(self) -> None:
        fresh = frozenset(self._positions.keys() - self._announced)
        self._announced |= fresh
        if fresh and self._on_assigned is not None:
            self._on_assigned(self, fresh)

    def _look_up(self, topic: str) -> list[TopicPartition]:
        known = [partition for partition in self._logs if partition.topic == topic]
        if not known:
            found = _find_topic(self._file, topic)
            for number, log_id in enumerate(found.log_ids if found else ()):
                partition = TopicPartition(topic, number)
                self._logs[partition] = _Log(topic, number, log_id)
                known.append(partition)
        return known

    def _partitions_of(self, log_ids: frozenset[int]) -> set[TopicPartition]:
        for topic in self._topics:
            self._look_up(topic)
        return {partition for partition, log in self._logs.items() if log.log_id in log_ids}

    def _log(self, partition: TopicPartition) -> _Log:
        if partition not in self._logs:
            self._look_up(partition.topic)
        if partition not in self._logs:
            raise BusUnavailable(
                f"Bus file {self._file.path} has no partition {partition.partition} of {partition.topic}."
            )
        return self._logs[partition]

    def _bounds(self, partition: TopicPartition) -> tuple[int, int]:
        rows = self._file.rows(
            "SELECT oldest_offset, next_offset FROM logs WHERE log_id=?", (self._log(partition).log_id,)
        )
        return rows[0][0], rows[0][1]

    def _fetch(self, max_records: int) -> list[Record]:
        partitions = [partition for partition in self._positions if partition not in self._paused]
        records: list[Record] = []
        left_bytes = _POLL_BYTES

        def within_budget(row: tuple[object, ...]) -> bool:
            nonlocal left_bytes
            left_bytes -= len(row[4])  # type: ignore[arg-type]
            return left_bytes > 0

        self._turn += 1  # another partition is first each time, so that none starves
        for n in range(len(partitions)):
            if len(records) >= max_records or left_bytes <= 0:
                break
            partition = partitions[(self._turn + n) % len(partitions)]
            log = self._log(partition)
            rows = self._file.rows_within(
                "SELECT id, timestamp_ms, key, headers, value FROM records "
                "WHERE id >= ? AND id < ? ORDER BY id LIMIT ?",
                (log.base + self._positions[partition], log.end, max_records - len(records)),
                within_budget,
            )
            for record_id, timestamp_ms, key, headers, value in rows:
                offset = record_id - log.base
                try:
                    unpacked = _unpack_headers(headers)
                except (struct.error, ValueError, TypeError) as error:
                    raise BusDamaged(
                        f"Bus file {self._file.path} is damaged: the headers of {log.topic} [{log.partition}] offset "
                        f"{offset} can't be read. Move the file away and start again."
                    ) from error
                records.append(Record(log.topic, log.partition, offset, key, value, unpacked, timestamp_ms))
            if rows:
                first = rows[0][0] - log.base
                if first != self._positions[partition]:
                    self._jumps.append(Jump(partition, self._positions[partition], first))
                self._positions[partition] = rows[-1][0] - log.base + 1
        return records

    def assignment(self) -> frozenset[TopicPartition]:
        return frozenset(self._positions)

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self._check_assigned(partition)
        oldest, end = self._bounds(partition)
        self._positions[partition] = min(max(offset, oldest), end)

    def position(self, partition: TopicPartition) -> int:
        self._check_assigned(partition)
        return self._positions[partition]

    def jumps(self) -> list[Jump]:
        found, self._jumps = self._jumps, []
        return found

    def committed(self, partition: TopicPartition) -> Commit | None:
        self._check_open()
        if self._membership is None:
            return None
        rows = self._file.rows(
            "SELECT offset, metadata FROM positions JOIN groups USING(group_id) WHERE name=? AND log_id=?",
            (self._membership.group, self._log(partition).log_id),
        )
        return Commit(*rows[0]) if rows else None

    def commit(self, commits: Mapping[TopicPartition, Commit]) -> None:
        self._check_open()
        check_commits(commits)
        if not commits:
            return
        with self._file.transaction() as db:
            self.store_positions(db, commits)

    def store_positions(self, db: sqlite3.Connection, commits: Mapping[TopicPartition, Commit]) -> None:
        """Inside a transaction of the same bus file (a producer's); raises CommitFenced."""
        if self._membership is None:
            raise BusError("A consumer without a group has no positions to commit.")
        self._membership.store_positions(db, commits, {partition: self._log(partition).log_id for partition in commits})

    def beginning_offset(self, partition: TopicPartition) -> int:
        self._check_open()
        return self._bounds(partition)[0]

    def end_offset(self, partition: TopicPartition) -> int:
        self._check_open()
        return self._bounds(partition)[1]

    def end_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        self._check_open()
        return {partition: self._bounds(partition)[1] for partition in partitions}

    def offset_at(self, partition: TopicPartition, timestamp_ms: int) -> int | None:
        self._check_open()
        log = self._log(partition)
        rows = self._file.rows(
            "SELECT id FROM records WHERE id >= ? AND id < ? AND timestamp_ms >= ? ORDER BY id LIMIT 1",
            (log.base, log.end, timestamp_ms),
        )
        return rows[0][0] - log.base if rows else None

    def pause(self, partitions: Iterable[TopicPartition]) -> None:
        for partition in partitions:
            self._check_assigned(partition)
            self._paused.add(partition)

    def resume(self, partitions: Iterable[TopicPartition]) -> None:
        for partition in partitions:
            self._check_assigned(partition)
            self._paused.discard(partition)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            if self._membership is not None:
                self._membership.leave()
        except BusError as error:
            _logger.warning("Left the group without a word, others take over after the session timeout: %s", error)
        finally:
            self._file.close()

    def _check_assigned(self, partition: TopicPartition) -> None:
        self._check_open()
        if partition not in self._positions:
            raise BusError(f"Partition {partition.partition} of {partition.topic} is not assigned to this consumer.")

    @property
    def is_closed(self) -> bool:
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise BusError(f"This consumer on {self._file.path} is closed.")
