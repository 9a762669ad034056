"""The Kafka bus, on kafka-python 3.x: for more than one machine.

Each producer and consumer is a client of its own. Which settings matter, and why they are not the library's defaults:
positions are committed by nobody but the caller; readers see committed transactions only; the producer is idempotent
and keeps a record until the brokers have it (no delivery timeout: the buffer's bound is the limit); batches are as
large as a default broker takes, since the library's 16 KiB hold no chunk; topics are never created by accident.
"""

from __future__ import annotations

import itertools
import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import kafka
import tenacity
from kafka import errors
from kafka.admin import MemberToRemove
from kafka.consumer.subscription_state import AsyncConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor

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
from detector.bus.kafka_security import METADATA_AGE_SECONDS, closing_on_failure, connection, denied, why_not_connected
from detector.bus.kafka_topics import TopicFacts, change_topic, facts_of
from detector.errors import BusDamaged, BusError, BusUnavailable, CommitDelayed, CommitFenced, ConfigError

if TYPE_CHECKING:
    from detector.config import KafkaSettings

MAX_VALUE_BYTES = 8 * 1024 * 1024

_BUFFER_BYTES = 32 * 1024 * 1024
_BUFFER_WAIT_SECONDS = 1.0
_METADATA_WAIT_SECONDS = 2.0  # how long ``send`` waits to learn a topic's partitions
_CLOSE_SECONDS = 5.0
_CALLBACK_LOOK_SECONDS = 0.002
_HEARTBEAT_MS = 500  # also how soon a member learns of a rebalance
_REBALANCE_SECONDS, _REBALANCE_LOOK_SECONDS = 0.3, 0.05  # how long, and how often, a commit waits for a rebalance
_NEVER_MS = 2**31 - 1
_TRANSACTION_SECONDS = 10.0  # of a member that died: so long readers wait for its half transaction, at the most
_RECORD_OVERHEAD_BYTES = 64
_TOPIC_EXISTS = errors.TopicAlreadyExistsError.errno

_FENCED = (
    errors.CommitFailedError,
    errors.FencedInstanceIdError,
    errors.IllegalGenerationError,
    errors.InvalidProducerEpochError,
    errors.ProducerFencedError,
    errors.UnknownMemberIdError,
)
_DAMAGED = (errors.CorruptRecordError, errors.UnsupportedCodecError)
_CODEC_PACKAGES = {"lz4": "lz4", "zstd": "zstandard", "snappy": "python-snappy"}

_logger = logging.getLogger(__name__)

Callback = Callable[[Consumer, frozenset[TopicPartition]], None]


def _translated(error: BaseException, doing: str, needs: str = "") -> BusError | ConfigError:
    """The same in this project's words; the library's texts hold addresses, no secrets. ``needs``: see ``denied``."""
    if isinstance(error, (BusError, ConfigError)):
        return error
    name = type(error).__name__
    detail = f"{name}: {error}" if str(error) else name
    if isinstance(error, _FENCED):
        return CommitFenced(
            f"While {doing}: another member or producer has taken over ({detail}); nothing took effect."
        )
    refusal = denied(error, doing, needs)
    if refusal is not None:
        return refusal
    if isinstance(error, errors.UnsupportedCodecError):
        missing = next((codec for codec in _CODEC_PACKAGES if f" {codec} " in str(error)), None)
        if missing is not None:
            return _codec_missing(f"While {doing}: the records are compressed with {missing}", missing)
    if isinstance(error, _DAMAGED):
        return BusDamaged(f"While {doing}: what Kafka sent can't be read ({detail}). Check the brokers' disks.")
    if isinstance(error, errors.MessageSizeTooLargeError):
        return BusError(f"While {doing}: a record is larger than the broker takes ({detail}). Raise max.message.bytes.")
    if isinstance(error, errors.InvalidConfigurationError):
        return BusError(
            f"While {doing}: the brokers refuse a setting of the topic ({detail}). Kafka before 3.6 does not know "
            "message.timestamp.after.max.ms: there make the topics with Kafka's own kafka-topics.sh."
        )
    if isinstance(error, errors.RebalanceInProgressError):
        return CommitDelayed(f"While {doing}: the group is sharing out its partitions anew ({name}); poll, then again.")
    if isinstance(error, errors.InvalidTimestampError):
        return BusError(
            f"While {doing}: the brokers refuse the record's time ({detail}). Check this machine's clock: a topic "
            "takes records only so far ahead of the brokers' clocks as its message.timestamp.after.max.ms says."
        )
    return BusUnavailable(
        f"While {doing}, Kafka did not do its part ({detail}). Check that the brokers of "
        "bus.kafka.bootstrap_servers run and can be reached; trying again may help."
    )


@contextmanager
def _kafka_errors(doing: str, needs: str = "") -> Iterator[None]:
    try:
        yield
    except (errors.KafkaError, ssl.SSLError) as error:
        raise _translated(error, doing, needs) from error


@contextmanager
def _connecting(doing: str, connection: Mapping[str, Any], needs: str = "") -> Iterator[None]:
    """As ``_kafka_errors``; a connection that failed is looked into, since the library does not say why."""
    try:
        with closing_on_failure():
            yield
    except (errors.KafkaTimeoutError, errors.KafkaConnectionError, ssl.SSLError) as error:
        reason = why_not_connected(connection)
        if reason is None:
            raise _translated(error, doing, needs) from error
        raise BusUnavailable(f"While {doing}: {reason}") from error
    except errors.KafkaError as error:
        raise _translated(error, doing, needs) from error


def _codec_missing(what: str, codec: str) -> ConfigError:
    return ConfigError(
        f"{what}, which needs a library that is not installed: pip install {_CODEC_PACKAGES[codec]} (the extra "
        "`compression` brings all of them)."
    )


def _transactional_needs(transactional_id: str | None) -> str:
    return "" if transactional_id is None else f"WRITE and DESCRIBE on transactional id {transactional_id}"


def _headers(pairs: Iterable[tuple[str, bytes | None]]) -> Headers:
    return tuple([(name, value or b"") for name, value in pairs])  # a list first: this runs for each chunk


def _theirs(partition: TopicPartition) -> Any:
    return kafka.TopicPartition(partition.topic, partition.partition)


def _ours(partition: Any) -> TopicPartition:
    return TopicPartition(partition.topic, partition.partition)


def _offsets(commits: Mapping[TopicPartition, Commit]) -> dict[Any, Any]:
    return {_theirs(p): kafka.OffsetAndMetadata(c.offset, c.metadata, -1) for p, c in commits.items()}


class KafkaBus:
    """A Kafka cluster. Connects when first needed, so that making it never fails for a broker that is away.

    Args:
        settings: section ``bus.kafka`` of the configuration.

    Raises:
        ConfigError: certificates or keys can't be used.
    """

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._connection = connection(settings)
        self._admin_client: Any = None
        self._closed = False
        self._children: list[KafkaProducer | KafkaConsumer] = []

    def _admin(self) -> Any:
        self._check_open()
        if self._admin_client is None:
            with _connecting("connecting", self._connection):
                self._admin_client = kafka.KafkaAdminClient(**self._connection)
        return self._admin_client

    def _check_open(self) -> None:
        if self._closed:
            raise BusError("This Kafka bus is closed.")

    def create_topics(self, topics: Mapping[str, TopicSettings]) -> None:
        check_topics(topics)
        missing = {name: settings for name, settings in topics.items() if self.partitions(name) is None}
        if not missing:
            return
        wanted = {}
        for name, settings in missing.items():
            configs = {}
            if settings.retention_seconds is not None:
                configs["retention.ms"] = str(int(settings.retention_seconds * 1000))
            if settings.retention_bytes is not None:
                configs["retention.bytes"] = str(settings.retention_bytes)
            if settings.max_message_bytes is not None:
                configs["max.message.bytes"] = str(settings.max_message_bytes)
            configs |= dict(settings.configs)
            wanted[name] = {
                "num_partitions": settings.partitions,
                "replication_factor": settings.replication_factor,
                "configs": configs,
            }
        with _kafka_errors(f"creating topics {', '.join(wanted)}", f"CREATE on topic {', '.join(wanted)}"):
            answer = self._admin().create_topics(wanted, raise_errors=False)
            for topic in answer["topics"]:
                if topic["error_code"] not in (0, _TOPIC_EXISTS):
                    error = errors.for_code(topic["error_code"])(topic.get("error_message") or "")
                    raise _translated(error, f"creating topic {topic['name']}", f"CREATE on topic {topic['name']}")
            self._admin().wait_for_topics(list(wanted))

    def partitions(self, topic: str) -> int | None:
        needs = f"DESCRIBE on topic {topic}"
        with _kafka_errors(f"asking for topic {topic}", needs):
            (answer,) = self._admin().describe_topics([topic])
        if answer["error_code"] == errors.UnknownTopicOrPartitionError.errno:
            return None
        if answer["error_code"]:
            error = errors.for_code(answer["error_code"])()
            raise _translated(error, f"asking for topic {topic}", needs)
        return len(answer["partitions"])

    def max_message_bytes(self, topic: str) -> int | None:
        facts = self.topic_facts([topic])[topic]
        if facts is None or facts.configs is None or "max.message.bytes" not in facts.configs:
            return None  # it does not exist, or this user may not look
        return min(int(facts.configs["max.message.bytes"]), MAX_VALUE_BYTES)

    def topic_facts(self, topics: Sequence[str]) -> dict[str, TopicFacts | None]:
        """What the brokers say of topics, by name; None for one that does not exist."""
        needs = f"DESCRIBE and DESCRIBE_CONFIGS on topic {', '.join(topics)}"
        with _kafka_errors(f"asking for topics {', '.join(topics)}", needs):
            return facts_of(self._admin(), topics)

    def change_topic(self, topic: str, partitions: int | None, configs: Mapping[str, str]) -> None:
        """Change a topic's settings (Kafka's names), and raise its number of partitions where one is given."""
        with _kafka_errors(f"changing topic {topic}", f"ALTER and ALTER_CONFIGS on topic {topic}"):
            change_topic(self._admin(), topic, partitions, configs)

    def producer(self, *, transactional_id: str | None = None) -> Producer:
        self._check_open()
        producer = KafkaProducer(self._settings, self._connection, transactional_id)
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
        instance = member_id if member_id is not None else self._settings.group_instance_id
        consumer = KafkaConsumer(
            self._settings,
            self._connection,
            topics,
            group,
            start=start,
            member_id=instance,
            on_assigned=on_assigned,
            on_revoked=on_revoked,
        )
        self._adopt(consumer)
        return consumer

    def _adopt(self, child: KafkaProducer | KafkaConsumer) -> None:
        self._children = [*(c for c in self._children if not c.is_closed), child]

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
            if self._admin_client is not None:
                self._admin_client.close()


class KafkaProducer:
    """Without a transactional id: records go out as they come. With one: they wait here until ``commit``, which sends
    them and the positions in one short transaction (a long open one would hold up every reader)."""

    def __init__(self, settings: KafkaSettings, connection: Mapping[str, Any], transactional_id: str | None) -> None:
        self._settings = settings
        self._transactional_id = transactional_id
        self._config = {
            **connection,
            "acks": "all",
            "enable_idempotence": True,
            "batch_size": settings.batch_size_bytes,
            "linger_ms": int(settings.linger_seconds * 1000),
            "compression_type": None if settings.compression == "none" else settings.compression,
            "max_request_size": 2 * MAX_VALUE_BYTES,  # of a whole request: several batches, or one largest record
            "delivery_timeout_ms": _NEVER_MS,
            "max_block_ms": int(_METADATA_WAIT_SECONDS * 1000),
            "allow_auto_create_topics": False,
        }
        self._pending_bytes = 0
        self._changed = threading.Condition()  # guards all down to _broken, shared with the library's thread
        self._unstored: dict[int, tuple[tuple[Any, ...], int]] = {}  # by number: record and its bytes, as sent
        self._refused: BusError | ConfigError | None = None
        self._broken: BusUnavailable | None = None  # why this client's records have to be sent by another one
        self._numbers = itertools.count()
        self._waiting: list[tuple[Any, ...]] = []  # a transaction's records
        self._closed = False
        self._client = self._connect()

    def _connect(self) -> Any:
        config = self._config
        if self._transactional_id is not None:
            config = {
                **config,
                "transactional_id": self._transactional_id,
                "transaction_timeout_ms": int(_TRANSACTION_SECONDS * 1000),
                # also of init_transactions, which hangs on to a coordinator that died
                "max_block_ms": int(min(self._settings.request_timeout_seconds, _TRANSACTION_SECONDS) * 1000),
            }
        with _connecting("connecting a producer", self._config, _transactional_needs(self._transactional_id)):
            try:
                client = kafka.KafkaProducer(**config)
            except RuntimeError as error:  # what the library raises for a codec that is not installed
                codec = self._settings.compression
                if codec not in _CODEC_PACKAGES:
                    raise
                raise _codec_missing(f"bus.kafka.compression is {codec}", codec) from error
            if self._transactional_id is not None:
                try:
                    client.init_transactions()
                except errors.KafkaError:
                    _end(client)
                    raise
        return client

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
        if len(value) > MAX_VALUE_BYTES:
            raise BusError(f"A record of {len(value)} bytes is too large for topic {topic}; {MAX_VALUE_BYTES} at most.")
        size_bytes = len(value) + len(key or b"") + sum(len(n) + len(v) for n, v in headers) + _RECORD_OVERHEAD_BYTES
        self._reserve(size_bytes)
        record = (topic, value, key, list(headers), partition, timestamp_ms)
        if self._transactional_id is not None:
            self._waiting.append(record)
            return
        try:
            self._hand_over(next(self._numbers), record, size_bytes)
        except BaseException:
            self._release(size_bytes)
            raise

    def _hand_over(self, number: int, record: tuple[Any, ...], size_bytes: int) -> None:
        if self._broken is not None:
            self._renew()
        topic = record[0]
        try:
            with _kafka_errors(f"sending to {topic}", f"WRITE on topic {topic}"):
                future = self._client.send(*record)
        except BusUnavailable as error:
            if not isinstance(error.__cause__, errors.KafkaTimeoutError):
                self._broken = error  # this client will never send again
            raise
        except (ValueError, TypeError) as error:
            raise BusError(f"The record for {topic} can't be sent: {error}") from error
        client = self._client
        with self._changed:
            self._unstored[number] = (record, size_bytes)
        future.add_callback(lambda _: self._stored(number))
        future.add_errback(lambda error: self._give_up(client, number, error))

    def _renew(self) -> None:
        """The client has failed for good or refused a record: send what is not stored, in order, by a new one.

        What the old client had sent and not heard of may be stored twice."""
        old, self._client = self._client, self._connect()
        _end(old)
        with self._changed:
            why, self._broken = self._broken, None
            unstored = list(self._unstored.items())
        try:
            for number, (record, size_bytes) in unstored:
                self._hand_over(number, record, size_bytes)
        except BusError:
            self._broken = self._broken or why
            raise

    def _reserve(self, size_bytes: int) -> None:
        with self._changed:
            full = self._pending_bytes > 0 and self._pending_bytes + size_bytes > _BUFFER_BYTES
            if full and self._transactional_id is None:
                full = not self._changed.wait_for(
                    lambda: self._pending_bytes + size_bytes <= _BUFFER_BYTES, _BUFFER_WAIT_SECONDS
                )
            if full:
                raise BusUnavailable(
                    f"{_BUFFER_BYTES} bytes wait for Kafka"
                    + (" in one transaction; commit more often" if self._transactional_id else "")
                    + "; the record was not taken."
                )
            self._pending_bytes += size_bytes

    def _release(self, size_bytes: int) -> None:
        with self._changed:
            self._pending_bytes -= size_bytes
            self._changed.notify_all()

    def _stored(self, number: int) -> None:
        with self._changed:
            _, size_bytes = self._unstored.pop(number, (None, 0))
            self._pending_bytes -= size_bytes
            self._changed.notify_all()

    def _give_up(self, client: Any, number: int, error: BaseException) -> None:
        """On the library's thread, which has dropped the record. Keep it, unless no client could ever send it."""
        with self._changed:
            if client is not self._client or number not in self._unstored:
                return
            topic = self._unstored[number][0][0]
            refusal = _translated(error, f"sending to {topic}", f"WRITE on topic {topic}")
            if isinstance(refusal, (BusUnavailable, CommitFenced)):  # fenced: only by a broker that forgot this client
                self._broken = self._broken or BusUnavailable(str(refusal))
                return
            if isinstance(error, errors.InvalidTimestampError):
                # The library ends its client for it: whatever else that had to send fails with the same error.
                if self._broken is not None:
                    return
                self._broken = BusUnavailable(str(refusal))
            self._refused = self._refused or refusal
        self._stored(number)

    def flush(self, timeout_seconds: float = 30.0) -> None:
        self._check_open()
        if self._transactional_id is not None:
            return
        if self._broken is not None:
            self._renew()
        try:
            self._client.flush(timeout_seconds)
        except errors.KafkaTimeoutError as error:
            raise BusUnavailable(
                f"Kafka has not taken all records within {timeout_seconds:g} s; they are kept. Check that the brokers "
                "of bus.kafka.bootstrap_servers run and can be reached."
            ) from error
        with self._changed:
            refused, self._refused = self._refused or self._broken, None
        if refused is not None:
            raise refused

    def commit(self, consumer: Consumer, commits: Mapping[TopicPartition, Commit]) -> None:
        self._check_open()
        if not isinstance(consumer, KafkaConsumer):
            raise TypeError("The consumer is one of another bus.")
        check_commits(commits)
        if self._transactional_id is None:
            self.flush()
            consumer.commit(commits)
            return
        if commits:
            consumer.check_owns(commits)
        if not commits and not self._waiting:
            return
        # No longer than the broker keeps it open. The library's transaction hangs on to a coordinator that died; the
        # new client that comes after the timeout asks for the present one.
        timeout = min(self._settings.request_timeout_seconds, _TRANSACTION_SECONDS)
        error = _bounded(lambda: self._transact(consumer, commits), timeout)
        if error is not None:
            self._recover(consumer, commits, error)
        self.abort()

    def _transact(self, consumer: KafkaConsumer, commits: Mapping[TopicPartition, Commit]) -> None:
        client = self._client
        client.begin_transaction()
        futures = [client.send(*record) for record in self._waiting]
        if commits:
            client.send_offsets_to_transaction(_offsets(commits), consumer.group_metadata())
        client.flush()
        for future in futures:
            if future.failed():
                raise future.exception
        client.commit_transaction()

    def _recover(self, consumer: KafkaConsumer, commits: Mapping[TopicPartition, Commit], error: BaseException) -> None:
        """After a failed transaction: find out whether it took effect after all; raise unless it did.

        A new producer epoch ends what was open: the broker completes a commit that had begun and aborts anything else.
        Positions and outputs took effect together, so the positions tell.
        """
        doing = f"committing transaction {self._transactional_id!r}"
        # A send after the fencing fails with an error that only carries it. Connecting anew would fence the newer one.
        error = next((cause for cause in error.args if isinstance(cause, _FENCED)), error)
        if isinstance(error, _FENCED):
            if not isinstance(error, (errors.ProducerFencedError, errors.InvalidProducerEpochError)):
                _bounded(self._client.abort_transaction, _CLOSE_SECONDS)
            raise _translated(error, doing) from error
        _end(self._client)
        self._client = self._connect()
        if commits and all(consumer.committed(p) == c for p, c in commits.items()):
            return
        raise _translated(error, doing) from error

    def abort(self) -> None:
        if self._transactional_id is not None:
            self._waiting.clear()
            with self._changed:
                self._pending_bytes = 0

    def close(self) -> None:
        if self._closed:
            return
        try:
            if self._transactional_id is None and self._pending_bytes:
                self.flush(_CLOSE_SECONDS)
        finally:
            self._closed = True
            _end(self._client)

    @property
    def is_closed(self) -> bool:
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise BusError("This Kafka producer is closed.")


def _end(client: Any) -> None:
    """Close the library's producer now; by now it has nothing left to send, or has failed to."""
    if client._accumulator.has_incomplete:
        client._sender.force_close()  # else ``close`` gives up half-way on what can't be sent
    with suppress(errors.KafkaError):
        client.close(timeout=_CLOSE_SECONDS)


def _bounded(call: Callable[[], None], timeout_seconds: float) -> BaseException | None:
    """Run ``call`` on a thread; its error, or a timeout's. The library waits for transactions without a limit."""
    outcome: list[BaseException | None] = []

    def run() -> None:
        try:
            call()
            outcome.append(None)
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
            outcome.append(error)

    thread = threading.Thread(target=run, name="kafka-bounded", daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    return outcome[0] if outcome else errors.KafkaTimeoutError(f"no answer within {timeout_seconds:g} s")


class _EndedJoin:
    """The library's future of a join that has ended, such that the library waits for it instead of joining again."""

    is_done = False

    def __init__(self, ended: Any) -> None:
        self.add_callback, self.add_errback = ended.add_callback, ended.add_errback


class _Listener(AsyncConsumerRebalanceListener):
    """Runs the consumer's rebalance work on a thread of its own while ``poll`` waits: the library calls on its network
    thread, where a commit or a look-up would wait for itself."""

    def __init__(self, consumer: KafkaConsumer) -> None:
        self._consumer = consumer

    async def on_partitions_assigned(self, assigned: Iterable[Any]) -> None:
        partitions = frozenset(map(_ours, assigned))
        await self._run(lambda: self._consumer.take(partitions))

    async def on_partitions_revoked(self, revoked: Iterable[Any]) -> None:
        partitions = frozenset(map(_ours, revoked))
        await self._run(lambda: self._consumer.let_go(partitions))

    async def on_partitions_lost(self, lost: Iterable[Any]) -> None:
        partitions = frozenset(map(_ours, lost))
        await self._run(lambda: self._consumer.let_go(partitions, lost=True))

    async def _run(self, call: Callable[[], None]) -> None:
        def run() -> None:
            try:
                call()
            except BaseException as error:  # noqa: BLE001 - poll raises it
                self._consumer.callback_error = error

        thread = threading.Thread(target=run, name="kafka-rebalance", daemon=True)
        thread.start()
        while thread.is_alive():
            await self._consumer.pause_network(_CALLBACK_LOOK_SECONDS)


class KafkaConsumer:
    """A member of a group with cooperative rebalancing, or a reader of everything."""

    def __init__(
        self,
        settings: KafkaSettings,
        connection: Mapping[str, Any],
        topics: Sequence[str],
        group: str | None,
        *,
        start: str,
        member_id: str | None,
        on_assigned: Callback | None,
        on_revoked: Callback | None,
    ) -> None:
        self._topics = tuple(dict.fromkeys(topics))
        self._group = group
        self._connection = connection
        self._needs = f"READ on topic {', '.join(self._topics)}" + (f" and on group {group}" if group else "")
        self._start = start
        self._on_assigned = on_assigned
        self._on_revoked = on_revoked
        self._positions: dict[TopicPartition, int] = {}  # those assigned
        self._lost: frozenset[TopicPartition] = frozenset()
        self._member_id: str | None = None  # in the group, when partitions were last given
        self._jumps: list[Jump] = []
        self._paused: set[TopicPartition] = set()
        self._announced: set[TopicPartition] = set()
        self._next_look_seconds = 0.0
        self._closed = False
        self.callback_error: BaseException | None = None
        config = {
            **connection,
            "group_id": group,
            "enable_auto_commit": False,
            "isolation_level": "read_committed",
            "auto_offset_reset": "none",  # decided here: a position that was dropped goes on at the oldest
            "allow_auto_create_topics": False,
            "max_partition_fetch_bytes": settings.max_partition_fetch_bytes,
        }
        if group is not None:
            session_ms = int(settings.session_timeout_seconds * 1000)
            config |= {
                "group_instance_id": member_id,
                "session_timeout_ms": session_ms,
                "heartbeat_interval_ms": min(_HEARTBEAT_MS, session_ms // 3),
                "max_poll_interval_ms": int(settings.max_poll_interval_seconds * 1000),
                "partition_assignment_strategy": (CooperativeStickyAssignor,),
            }
        with _connecting("connecting a consumer", connection, self._needs):
            self._client = kafka.KafkaConsumer(**config)
            try:
                if group is None:
                    self._assign_everything(start)
                else:
                    for topic in self._topics:
                        self._client.partitions_for_topic(topic)  # else the first assignment is empty, a round lost
                    self._client.subscribe(list(self._topics), listener=_Listener(self))
            except BaseException:
                self._client.close(autocommit=False, timeout_ms=0)
                raise

    def pause_network(self, seconds: float) -> Any:
        """Awaitable on the library's loop; used by the listener alone."""
        return self._client._net.sleep(seconds)

    def poll(self, timeout_seconds: float, max_records: int = 500) -> list[Record]:
        self._check_open()
        deadline = time.monotonic() + timeout_seconds
        while True:
            if self._group is None:
                self._look_for_partitions()
            left_ms = max(0, int((deadline - time.monotonic()) * 1000))
            self._take_up_join()
            try:
                answer = self._client.poll(timeout_ms=left_ms, max_records=max_records)
            except errors.OffsetOutOfRangeError as error:
                self._go_on_within_bounds(error)
                continue
            except errors.KafkaError as error:
                self._raise_callback_error()
                raise _translated(error, "reading", self._needs) from error
            self._raise_callback_error()
            records = [self._record(record) for batch in answer.values() for record in batch]
            for partition, batch in answer.items():
                if batch:
                    self._positions[_ours(partition)] = batch[-1].offset + 1
            if records or time.monotonic() >= deadline:
                return records

    def _take_up_join(self) -> None:
        """Have the library go on with a join that ended between two polls, and tell it of a fence it passed over.

        It takes up only an answer that comes while it waits. One that came after it begins a join anew for, which has
        the leader's whole group share out again, for ever if its members seldom poll; or it forgets it, where it had
        joined since the topics changed. A static member's heartbeats that are fenced end without a word. Either way
        the member would stay without heartbeats and commits.
        """
        coordinator = self._client._coordinator
        if coordinator is None:
            return
        join = coordinator._join_task
        if coordinator.rejoining and join is not None and join.is_done:
            coordinator._join_task = _EndedJoin(join)
        if not coordinator._heartbeat_enabled and not coordinator.need_rejoin():
            coordinator.request_rejoin()

    @staticmethod
    def _record(record: Any) -> Record:
        return Record(
            record.topic,
            record.partition,
            record.offset,
            record.key,
            record.value or b"",
            _headers(record.headers),
            record.timestamp,
        )

    def _raise_callback_error(self) -> None:
        error, self.callback_error = self.callback_error, None
        if error is not None:
            raise error

    def _go_on_within_bounds(self, error: errors.OffsetOutOfRangeError) -> None:
        """Retention dropped the position, or a replica that knew it died: the oldest, or the end if it is past that."""
        partitions = [_ours(p) for p in error.args[0] if _ours(p) in self._positions]
        bounds = self._bounds(partitions)
        for partition in partitions:
            self._go_to(partition, self._positions[partition], bounds[partition])

    def _go_to(self, partition: TopicPartition, offset: int, bounds: tuple[int, int]) -> None:
        oldest, end = bounds
        within = min(max(offset, oldest), end)
        if within != offset:
            self._jumps.append(Jump(partition, offset, within))
        self._seek(partition, within)

    def _bounds(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, tuple[int, int]]:
        theirs = [_theirs(p) for p in partitions]
        if not theirs:
            return {}
        with _kafka_errors("asking for offsets", self._needs):
            oldest = self._client.beginning_offsets(theirs)
            ends = self._client.end_offsets(theirs)
        return {_ours(p): (oldest[p], ends[p]) for p in theirs}

    def _seek(self, partition: TopicPartition, offset: int) -> None:
        self._client.seek(_theirs(partition), offset)
        self._positions[partition] = offset

    def take(self, partitions: frozenset[TopicPartition]) -> None:
        """Called by the listener: set positions, then tell."""
        bounds = self._bounds(partitions)
        for partition in partitions:
            commit = self.committed(partition)
            oldest, end = bounds[partition]
            first = oldest if self._start == "earliest" else end
            self._go_to(partition, first if commit is None else commit.offset, bounds[partition])
        if partitions:
            member_id = self._client.group_metadata().member_id
            if self._member_id not in (None, member_id) and self._positions.keys() - partitions:
                # Given up and joined again, it kept what others may have had meanwhile, at positions that are old.
                raise CommitFenced(
                    f"Group {self._group!r} had given this member up. It begins anew, from what is committed."
                )
            self._member_id = member_id
        if partitions and self._on_assigned is not None:
            self._on_assigned(self, partitions)

    def let_go(self, partitions: frozenset[TopicPartition], lost: bool = False) -> None:
        """Called by the listener: tell, while the partitions can still be committed unless they are lost."""
        if self._closed or not partitions:
            return
        self._lost = partitions if lost else frozenset()
        try:
            if self._on_revoked is not None:
                self._on_revoked(self, partitions)
        finally:
            self._lost = frozenset()
            for partition in partitions:
                self._positions.pop(partition, None)
                self._paused.discard(partition)

    def _look_for_partitions(self) -> None:
        if time.monotonic() >= self._next_look_seconds:
            with _kafka_errors("looking for partitions", self._needs):
                self._assign_everything("earliest")
        fresh = frozenset(self._positions.keys() - self._announced)
        self._announced |= fresh
        if fresh and self._on_assigned is not None:
            self._on_assigned(self, fresh)

    def _assign_everything(self, start: str) -> None:
        self._next_look_seconds = time.monotonic() + METADATA_AGE_SECONDS
        wanted = {
            TopicPartition(topic, number)
            for topic in self._topics
            for number in self._client.partitions_for_topic(topic) or ()
        }
        fresh = wanted - self._positions.keys()
        if not fresh:
            return
        self._client.assign([_theirs(p) for p in self._positions.keys() | fresh])
        for partition, (oldest, end) in self._bounds(fresh).items():
            self._positions[partition] = oldest if start == "earliest" else end
        for partition, offset in self._positions.items():
            self._client.seek(_theirs(partition), offset)
        self._client.pause(*map(_theirs, self._paused))

    def assignment(self) -> frozenset[TopicPartition]:
        return frozenset(self._positions)

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self._check_assigned(partition)
        oldest, end = self._bounds([partition])[partition]
        self._seek(partition, min(max(offset, oldest), end))

    def position(self, partition: TopicPartition) -> int:
        self._check_assigned(partition)
        state = self._client._subscription.assignment.get(_theirs(partition))
        if state is None or state.position is None:
            return self._positions[partition]
        # The library's also passes what holds no records for us: marks and remains of transactions.
        return max(self._positions[partition], int(state.position.offset))

    def jumps(self) -> list[Jump]:
        found, self._jumps = self._jumps, []
        return found

    def committed(self, partition: TopicPartition) -> Commit | None:
        self._check_open()
        if self._group is None:
            return None
        with _kafka_errors(f"asking for the position of group {self._group!r}", self._needs):
            found = self._client.committed(_theirs(partition), metadata=True)
        return None if found is None or found.offset < 0 else Commit(found.offset, found.metadata or "")

    def commit(self, commits: Mapping[TopicPartition, Commit]) -> None:
        self._check_open()
        check_commits(commits)
        if not commits:
            return

        def attempt() -> None:
            self.check_owns(commits)
            self._client.commit(_offsets(commits))

        # While the group shares out anew a commit is refused for a moment, of those as well that keep what they have.
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(errors.RebalanceInProgressError),
            wait=tenacity.wait_fixed(_REBALANCE_LOOK_SECONDS),
            stop=tenacity.stop_after_delay(_REBALANCE_SECONDS),
            reraise=True,
        )
        with _kafka_errors(f"committing positions of group {self._group!r}", self._needs):
            retrying(attempt)

    def check_owns(self, commits: Mapping[TopicPartition, Commit]) -> None:
        """Raise CommitFenced for a partition that is not this member's: brokers check the group's generation alone."""
        if self._group is None:
            raise BusError("A consumer without a group has no positions to commit.")
        for partition in commits:
            if partition not in self._positions or partition in self._lost:
                raise CommitFenced(
                    f"Partition {partition.partition} of {partition.topic} no longer belongs to this member of group "
                    f"{self._group!r}; nothing was committed. Its new owner goes on from the last commit."
                )
        self.group_metadata()

    def group_metadata(self) -> Any:
        """What a producer needs to commit for this member, as it was when it was given its partitions.

        Raises CommitFenced once the group has given the member up. The library then forgets who it was, and to a commit
        in nobody's name brokers make no objection; or it joins again under another id and goes on, without a word, with
        partitions that were others' meanwhile.
        """
        metadata = self._client.group_metadata()
        if metadata.generation_id < 0 or metadata.member_id != self._member_id:
            raise CommitFenced(
                f"Group {self._group!r} has given this member up since it was given its partitions; nothing was "
                "committed. Their new owners go on from the last commit."
            )
        return metadata

    def beginning_offset(self, partition: TopicPartition) -> int:
        self._check_open()
        return self._bounds([partition])[partition][0]

    def end_offset(self, partition: TopicPartition) -> int:
        self._check_open()
        return self._bounds([partition])[partition][1]

    def end_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        self._check_open()
        theirs = [_theirs(p) for p in partitions]
        if not theirs:
            return {}
        with _kafka_errors("asking for offsets"):
            return {_ours(p): int(end) for p, end in self._client.end_offsets(theirs).items()}

    def offset_at(self, partition: TopicPartition, timestamp_ms: int) -> int | None:
        self._check_open()
        with _kafka_errors("asking for offsets by time", self._needs):
            found = self._client.offsets_for_times({_theirs(partition): max(0, timestamp_ms)})[_theirs(partition)]
        return None if found is None or found.offset < 0 else int(found.offset)

    def pause(self, partitions: Iterable[TopicPartition]) -> None:
        for partition in partitions:
            self._check_assigned(partition)
            self._client.pause(_theirs(partition))
            self._paused.add(partition)

    def resume(self, partitions: Iterable[TopicPartition]) -> None:
        for partition in partitions:
            self._check_assigned(partition)
            self._client.resume(_theirs(partition))
            self._paused.discard(partition)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        left = self._leave_unfinished_join()
        try:
            self._client.close(autocommit=False, timeout_ms=int(_CLOSE_SECONDS * 1000))
        except errors.KafkaError as error:
            left = left or error
        if left is not None:
            _logger.warning(
                "Left the group without a word, others take over after the session timeout: %s",
                _translated(left, "leaving", self._needs),
            )

    def _leave_unfinished_join(self) -> BaseException | None:
        """Leave a group that this member is still joining, over another connection; what went wrong, or None.

        A broker answers a connection in turn: behind a join that waits for the others, the word that this member
        leaves would wait too, longer than ``close`` does. And a member that was only named, whose place whoever joins
        next waits for, the library does not take out at all.
        """
        coordinator = self._client._coordinator
        if coordinator is None or coordinator.coordinator_unknown() or not coordinator.is_dynamic_member():
            return None  # a static member keeps its place until its session ends
        join = coordinator._join_task
        joining = join is not None and not join.is_done
        if coordinator.stable() and not joining:
            return None

        def leave() -> None:
            generation = coordinator._generation
            if joining and not generation.has_member_id():
                with suppress(errors.MemberIdRequiredError):  # the first answer, which comes at once, names the member
                    self._client._net.run(coordinator._manager.wait_for, join, _CLOSE_SECONDS / 2 * 1000)
                generation = coordinator._generation
            if not generation.has_member_id():
                return
            member = MemberToRemove(generation.member_id)
            settings = {**self._connection, "bootstrap_timeout_ms": int(_CLOSE_SECONDS * 1000)}
            with closing_on_failure():
                admin = kafka.KafkaAdminClient(**settings)
            try:
                answer = admin.remove_group_members(self._group, [member])
            finally:
                admin.close()
            for refused in answer.values():
                if refused not in (errors.NoError, errors.UnknownMemberIdError):
                    raise refused()

        error = _bounded(leave, _CLOSE_SECONDS)
        coordinator.reset_generation()  # else the library leaves once more
        return error

    @property
    def is_closed(self) -> bool:
        return self._closed

    def _check_assigned(self, partition: TopicPartition) -> None:
        self._check_open()
        if partition not in self._positions:
            raise BusError(f"Partition {partition.partition} of {partition.topic} is not assigned to this consumer.")

    def _check_open(self) -> None:
        if self._closed:
            raise BusError("This Kafka consumer is closed.")
