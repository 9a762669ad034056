"""Dead letters: records of the chunk topic that could not be used, with why, and their way back.

The daemon writes them with ``headers_of``; ``detector deadletters`` reads them and puts them back. Nothing is ever
removed: a record put back leaves a mark on the dead-letter topic, stored in one transaction with the record itself, so
that it goes back once however often somebody asks, and whatever dies meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from detector.bus.base import Bus, Headers, Producer, Record, TopicPartition
from detector.bus.log_reader import LogReader
from detector.errors import BusError, ChunkError

log = logging.getLogger(__name__)

PREFIX = "deadletter_"  # of every header that is ours; the others are those of the record as it was sent
ATTEMPTS = "deadletter_attempts"
CUT_FROM_BYTES = "deadletter_cut_from_bytes"  # size of the refused record's value, where not all of it was kept
_MARK = "deadletter_put_back"
_MAX_MESSAGE_BYTES = 1_000
_MAX_KEY_BYTES = 1_024
_STORED_BYTES, _HEADER_BYTES = 256, 12  # what a bus adds to a record, and to each of its headers, at most
_MAX_ATTEMPTS = 10**9
_BATCH_RECORDS, _BATCH_BYTES = 200, 4 << 20  # of one transaction: far below what a bus takes


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that was refused.

    Attributes:
        partition, offset: where the letter lies on the dead-letter topic; ``name`` is the two of them.
        at_ns: when it was refused, Unix nanoseconds.
        reason: one word (docs/chunks.md lists them); ``message``: a sentence.
        source_topic, source_partition, source_offset: where the refused record lay.
        stream: its key as text, None where it had none.
        attempts: how often it has been refused by now, this time included.
        size_bytes: of the refused record's value.
        cut: only a part of the record was kept: it was larger than the dead-letter topic takes.
        headers: of the record as it was sent.
        put_back_at_ns: when it was last put back; None: never.
    """

    partition: int
    offset: int
    at_ns: int
    reason: str
    message: str
    source_topic: str
    source_partition: int
    source_offset: int
    stream: str | None
    attempts: int
    size_bytes: int
    headers: Headers
    cut: bool = False
    put_back_at_ns: int | None = None

    @property
    def name(self) -> str:
        """``<partition>:<offset>`` on the dead-letter topic."""
        return f"{self.partition}:{self.offset}"


def headers_of(record: Record, error: ChunkError, at_ns: int) -> Headers:
    """The headers a refused record gets on the dead-letter topic: its own, then why and where."""
    return (
        *_foreign(record.headers),
        ("deadletter_reason", error.reason.encode()),
        ("deadletter_message", str(error).encode("utf-8", "replace")[:_MAX_MESSAGE_BYTES]),
        ("deadletter_topic", record.topic.encode()),
        ("deadletter_partition", b"%d" % record.partition),
        ("deadletter_offset", b"%d" % record.offset),
        ("deadletter_at", b"%d" % at_ns),
        (ATTEMPTS, b"%d" % (_attempts(record.headers) + 1)),
    )


def letter_of(record: Record, error: ChunkError, at_ns: int, limit_bytes: int) -> tuple[bytes | None, bytes, Headers]:
    """Key, value and headers of a refused record's dead letter, ``limit_bytes`` with all that a bus adds.

    What does not fit is left out, the value's end first; ``CUT_FROM_BYTES`` then says how large the value was.
    Whoever wrote the record may have compressed it, so it can be larger than the topic it came through takes.
    """
    key, value, headers = record.key, record.value, headers_of(record, error, at_ns)
    own = (*(h for h in headers if h[0].startswith(PREFIX)), (CUT_FROM_BYTES, b"%d" % len(value)))
    left_bytes = limit_bytes - _STORED_BYTES - _size_bytes(own)
    if len(key or b"") + len(value) + _size_bytes(headers) - _size_bytes(own[:-1]) <= left_bytes:
        return key, value, headers
    if key is not None:
        key = key[:_MAX_KEY_BYTES]
        left_bytes -= len(key)
    foreign = _foreign(record.headers)
    if _size_bytes(foreign) > left_bytes:
        foreign = ()
    left_bytes -= _size_bytes(foreign)
    return key, value[: max(0, left_bytes)], (*foreign, *own)


def read_letters(reader: LogReader, wanted: Callable[[DeadLetter], bool] | None = None) -> list[DeadLetter]:
    """The letters on the topic that are ``wanted``, oldest first, one for each refused record.

    Of several letters on one record the first stands for all, whatever was wanted: so none goes back by each of its
    letters. What is no letter of ours is logged and left out.

    Raises:
        BusError: the bus failed.
    """
    found: dict[tuple[int, int], DeadLetter] = {}
    for record in reader.read(reader.bounds()):
        mark = _mark_of(record)
        if mark is not None:
            letter = found.get(mark[0])
            if letter is not None:
                found[mark[0]] = replace(letter, put_back_at_ns=mark[1])
            continue
        letter = parse(record)
        if letter is None:
            log.warning("%s[%d]@%d is no dead letter.", record.topic, record.partition, record.offset)
        else:
            found[record.partition, record.offset] = letter
    told: dict[tuple[object, ...], DeadLetter] = {}  # a detector that died may have told of one record twice
    for letter in sorted(found.values(), key=lambda letter: (letter.at_ns, letter.partition, letter.offset)):
        source = (letter.source_topic, letter.source_partition, letter.source_offset, letter.size_bytes, letter.headers)
        first = told.setdefault(source, letter)
        times_ns = [at_ns for at_ns in (first.put_back_at_ns, letter.put_back_at_ns) if at_ns is not None]
        told[source] = replace(first, put_back_at_ns=max(times_ns, default=None))
    return [letter for letter in told.values() if wanted is None or wanted(letter)]


def read_record(reader: LogReader, partition: int, offset: int) -> Record:
    """The record of one letter. Raises BusError where there is no such letter."""
    place = TopicPartition(reader.topic, partition)
    for record in reader.read({place: (offset, offset + 1)}) if place in reader.partitions else ():
        if record.offset == offset and _mark_of(record) is None:
            return record
    raise BusError(
        f"Topic {reader.topic} has no dead letter {partition}:{offset}; `detector deadletters` lists those there are."
    )


def parse(record: Record) -> DeadLetter | None:
    """Read a record of the dead-letter topic; None for what is no dead letter of ours."""
    fields = {name: value for name, value in record.headers if name.startswith(PREFIX)}
    try:
        return DeadLetter(
            partition=record.partition,
            offset=record.offset,
            at_ns=int(fields.get("deadletter_at", b"%d" % (record.timestamp_ms * 1_000_000))),
            reason=fields["deadletter_reason"].decode(),
            message=fields.get("deadletter_message", b"").decode("utf-8", "replace"),
            source_topic=fields["deadletter_topic"].decode(),
            source_partition=int(fields["deadletter_partition"]),
            source_offset=int(fields["deadletter_offset"]),
            stream=None if record.key is None else record.key.decode("utf-8", "replace"),
            attempts=max(1, _attempts(record.headers)),
            size_bytes=int(fields.get(CUT_FROM_BYTES, b"%d" % len(record.value))),
            headers=_foreign(record.headers),
            cut=CUT_FROM_BYTES in fields,
        )
    except (KeyError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class PutBack:
    """What ``put_back`` did: the letters that went back, those it left since they had gone back before, and those it
    left since their records were not kept whole."""

    done: tuple[DeadLetter, ...]
    before: tuple[DeadLetter, ...]
    cut: tuple[DeadLetter, ...]


def put_back(
    bus: Bus,
    topic: str,
    wanted: Callable[[DeadLetter], bool],
    *,
    owner: str,
    now_ns: Callable[[], int],
    again: bool = False,
    dry_run: bool = False,
) -> PutBack:
    """Send the wanted letters' records to where they came from, each with its attempts in a header, and mark them.

    A record goes to its old partition (by its key, should there be fewer partitions now), at the end of the log. Record
    and mark are one transaction. Two that do this at once do not double anything: the earlier one is fenced. A record
    of which only a part was kept stays where it is.

    Args:
        topic: the dead-letter topic.
        owner: names the transactions; the same for all who may put back letters of this topic.
        now_ns: Unix nanoseconds, for the marks.
        again: also what was put back before.
        dry_run: only say what would be done.

    Raises:
        CommitFenced: somebody else puts back letters at this moment; what was done until then is marked.
        BusError: the bus failed, or a source topic is gone.
    """
    producer = None if dry_run else bus.producer(transactional_id=f"{owner}.deadletters")  # first: it fences others
    try:
        with LogReader(bus, topic) as reader:
            letters = read_letters(reader, wanted)
            chosen = {
                (letter.partition, letter.offset): letter
                for letter in letters
                if not letter.cut and (again or letter.put_back_at_ns is None)
            }
            cut = tuple(letter for letter in letters if letter.cut)
            before = tuple(x for x in letters if not x.cut and (x.partition, x.offset) not in chosen)
            partitions = {name: bus.partitions(name) for name in {c.source_topic for c in chosen.values()}}
            if missing := sorted(name for name, count in partitions.items() if count is None):
                raise BusError(f"Topic {', '.join(missing)}, where dead letters came from, does not exist any more.")
            if producer is not None:
                for batch in _batches(reader, chosen):
                    for letter, record in batch:
                        _send(producer, topic, letter, record, partitions[letter.source_topic] or 0, now_ns())
                    producer.commit(reader.consumer, {})
            return PutBack(tuple(c for c in letters if (c.partition, c.offset) in chosen), before, cut)
    finally:
        if producer is not None:
            producer.close()


def _send(producer: Producer, topic: str, letter: DeadLetter, record: Record, partitions: int, now_ns: int) -> None:
    producer.send(
        letter.source_topic,
        record.key,
        record.value,
        (*letter.headers, (ATTEMPTS, b"%d" % letter.attempts)),
        partition=letter.source_partition if letter.source_partition < partitions else None,
    )
    # beside its letter, so that retention drops the letter first
    mark = ((_MARK, letter.name.encode()), ("deadletter_at", b"%d" % now_ns))
    producer.send(topic, record.key, b"", mark, partition=letter.partition)


def _batches(reader: LogReader, chosen: dict[tuple[int, int], DeadLetter]) -> Iterator[list[tuple[DeadLetter, Record]]]:
    """The chosen letters with their records, in the topic's order, so that each stream's stay in order."""
    stretches: dict[TopicPartition, tuple[int, int]] = {}
    for partition, offset in chosen:
        place = TopicPartition(reader.topic, partition)
        first, end = stretches.get(place, (offset, offset))
        stretches[place] = (min(first, offset), max(end, offset + 1))
    batch: list[tuple[DeadLetter, Record]] = []
    size_bytes = 0
    for record in reader.read(stretches):
        letter = chosen.get((record.partition, record.offset))
        if letter is None:
            continue
        batch.append((letter, record))
        size_bytes += len(record.value)
        if len(batch) >= _BATCH_RECORDS or size_bytes >= _BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch


def _foreign(headers: Headers) -> Headers:
    return tuple((name, value) for name, value in headers if not name.startswith(PREFIX))


def _size_bytes(headers: Headers) -> int:
    return sum(len(name.encode()) + len(value) + _HEADER_BYTES for name, value in headers)


def _attempts(headers: Headers) -> int:
    """How often the record was refused so far; 0 where nothing sensible is said of it."""
    text = next((value for name, value in headers if name == ATTEMPTS), b"")
    return min(int(text), _MAX_ATTEMPTS) if text.isdigit() and len(text) < 20 else 0


def _mark_of(record: Record) -> tuple[tuple[int, int], int] | None:
    """Which letter the record says was put back, and when (Unix nanoseconds); None where it is no mark."""
    fields = dict(record.headers)
    if _MARK not in fields:
        return None
    try:
        partition, _, offset = fields[_MARK].partition(b":")
        return (int(partition), int(offset)), int(fields.get("deadletter_at", b"0"))
    except ValueError:
        return None
