"""What a bus is: bytes in, bytes out, ordered in each partition. Knows nothing of audio.

Both buses (``embedded``, ``kafka``) pass the same contract tests, ``tests/bus/contract.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from detector.errors import BusError

MAX_METADATA_BYTES = 4096  # Kafka's default offset.metadata.max.bytes
_TOPIC_NAME = re.compile(r"[A-Za-z0-9._-]{1,249}")

Headers = tuple[tuple[str, bytes], ...]


class TopicPartition(NamedTuple):
    topic: str
    partition: int


@dataclass(frozen=True, slots=True)
class Record:
    """One stored record. ``timestamp_ms`` is the Unix time at which it was produced."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes
    headers: Headers
    timestamp_ms: int

    @property
    def topic_partition(self) -> TopicPartition:
        return TopicPartition(self.topic, self.partition)


class Jump(NamedTuple):
    """Reading went on at ``to``, since ``position`` was not in the log any more.

    Forward: retention dropped the records between before they were read. Back: the log has lost its end, as after a
    power cut or where a copy that lagged took over.
    """

    partition: TopicPartition
    position: int
    to: int


@dataclass(frozen=True, slots=True)
class Commit:
    """A group's position: ``offset`` is the next record to read; ``metadata`` is kept with it (<= 4096 bytes)."""

    offset: int
    metadata: str = ""


@dataclass(frozen=True, slots=True)
class TopicSettings:
    """How a topic is created. ``None``: the bus's own default."""

    partitions: int = 8
    retention_seconds: float | None = None
    retention_bytes: int | None = None  # per partition
    replication_factor: int = 1
    max_message_bytes: int | None = None
    configs: tuple[tuple[str, str], ...] = ()  # more of Kafka's topic settings, by its names; no other bus has them


class Consumer(Protocol):
    """A member of a consumer group. Not thread-safe. Never commits by itself.

    After a partition is assigned, reading starts at the committed offset, or where nothing was committed yet
    at the beginning (``start="earliest"``) or end (``start="latest"``), unless ``on_assigned`` seeks elsewhere.
    Callbacks run while ``poll`` waits, on Kafka in another thread; ``close`` runs none. What ``on_revoked`` names can
    still be committed in it, unless the group had given the member up: then that raises CommitFenced.
    """

    def poll(self, timeout_seconds: float, max_records: int = 500) -> list[Record]:
        """Return up to ``max_records`` records, in offset order in each partition; empty after ``timeout_seconds``.

        Returns as soon as there is anything. Runs the rebalance callbacks and keeps the membership alive.
        Raises BusUnavailable or BusDamaged; CommitFenced when another process took this member's static name.
        """
        ...

    def assignment(self) -> frozenset[TopicPartition]: ...

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Read on from ``offset``; an offset already dropped by retention becomes the oldest one there is."""
        ...

    def position(self, partition: TopicPartition) -> int:
        """Offset of the next record ``poll`` will return."""
        ...

    def jumps(self) -> list[Jump]:
        """Where reading did not go on at its position, or at the committed one, since last asked; never by ``seek``."""
        ...

    def committed(self, partition: TopicPartition) -> Commit | None: ...

    def commit(self, commits: Mapping[TopicPartition, Commit]) -> None:
        """Store positions. All or nothing. Raises CommitFenced if a partition is no longer this member's;
        CommitDelayed while the group shares out anew: poll, then commit again."""
        ...

    def beginning_offset(self, partition: TopicPartition) -> int: ...

    def end_offset(self, partition: TopicPartition) -> int:
        """Offset the next produced record will get."""
        ...

    def end_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """``end_offset`` of each, with one question to the bus."""
        ...

    def offset_at(self, partition: TopicPartition, timestamp_ms: int) -> int | None:
        """First offset whose record was produced at or after ``timestamp_ms``; None if there is none."""
        ...

    def pause(self, partitions: Iterable[TopicPartition]) -> None: ...

    def resume(self, partitions: Iterable[TopicPartition]) -> None: ...

    def close(self) -> None:
        """Leave the group at once, so that others take over without waiting. Commits nothing.

        On Kafka a member with a static name keeps its partitions for the session timeout, to come back undisturbed.
        """
        ...


class Producer(Protocol):
    """Sends records. Not thread-safe.

    With a ``transactional_id`` whatever is sent becomes readable only with ``commit``, all of it or nothing.
    """

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
        """Hand over one record; records of one key go to one partition, in order. May buffer.

        Raises BusUnavailable when the buffer is full or the bus is away; the record was then not taken.
        """
        ...

    def flush(self, timeout_seconds: float = 30.0) -> None:
        """Return once all that was sent is stored (in a transaction nothing is until ``commit``).

        Raises BusUnavailable if that did not happen in time; unsent records are kept for the next flush.
        """
        ...

    def commit(self, consumer: Consumer, commits: Mapping[TopicPartition, Commit]) -> None:
        """Flush, then commit the consumer's positions; in one transaction where the producer is transactional.

        When it raises, nothing took effect and the records are kept: commit again, or ``abort``.
        Raises CommitFenced for a lost partition, or when a newer producer has the transactional id.
        """
        ...

    def abort(self) -> None:
        """Drop what was sent since the last commit (transactional producers; else a no-op)."""
        ...

    def close(self) -> None: ...


class Bus(Protocol):
    """A place that holds topics."""

    def create_topics(self, topics: Mapping[str, TopicSettings]) -> None:
        """Create the topics that do not exist; leave the others as they are."""
        ...

    def partitions(self, topic: str) -> int | None:
        """Number of partitions of the topic; None if it does not exist."""
        ...

    def max_message_bytes(self, topic: str) -> int | None:
        """How large a record of the topic may be, all told; None where that can't be known. Asks the bus."""
        ...

    def producer(self, *, transactional_id: str | None = None) -> Producer: ...

    def consumer(
        self,
        topics: Sequence[str],
        group: str | None,
        *,
        start: str = "earliest",
        member_id: str | None = None,
        on_assigned: Callable[[Consumer, frozenset[TopicPartition]], None] | None = None,
        on_revoked: Callable[[Consumer, frozenset[TopicPartition]], None] | None = None,
    ) -> Consumer:
        """Join ``group`` on ``topics``. ``group=None``: read every partition alone, no membership, no commits.

        Transactional records are seen only once committed. ``member_id`` is the static membership name.
        """
        ...

    def close(self) -> None: ...


def check_topics(topics: Mapping[str, TopicSettings]) -> None:
    """Raise BusError for a name or a partition count that no bus takes."""
    for name, settings in topics.items():
        if not _TOPIC_NAME.fullmatch(name) or name in (".", ".."):
            raise BusError(f"Topic name {name[:300]!r} is not 1-249 of A-Z a-z 0-9 . _ -")
        if settings.partitions < 1:
            raise BusError(f"Topic {name} can't have {settings.partitions} partitions; at least 1.")


def check_start(start: str) -> None:
    if start not in ("earliest", "latest"):
        raise BusError(f"Reading starts at 'earliest' or 'latest', not {start!r}.")


def check_commits(commits: Mapping[TopicPartition, Commit]) -> None:
    """Raise BusError for a position that no bus takes."""
    for partition, commit in commits.items():
        size_bytes = len(commit.metadata.encode())
        if size_bytes > MAX_METADATA_BYTES:
            raise BusError(
                f"The metadata of the commit to {partition.topic} [{partition.partition}] has {size_bytes} bytes, "
                f"{MAX_METADATA_BYTES} at most."
            )
        if commit.offset < 0:
            raise BusError(f"Offset {commit.offset} of {partition.topic} [{partition.partition}] is negative.")
