"""What was refused, why, and its way back: once, whoever asks how often."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from detector.__main__ import main
from detector.bus import open_bus
from detector.bus.base import Bus, Record, TopicPartition
from detector.bus.log_reader import LogReader
from detector.chunk import CHUNK_SAMPLES, Chunk, encode
from detector.commands_deadletters import hexdump
from detector.config import BusSettings, EmbeddedBusSettings, KafkaSettings, Settings, load_settings
from detector.daemon import Session
from detector.deadletters import ATTEMPTS, CUT_FROM_BYTES, DeadLetter, headers_of, parse, put_back, read_letters
from detector.errors import BusError, ChunkError, CommitFenced
from detector.metrics import Metrics
from detector.topics import topic_settings
from tests.bus.conftest import kafka_address  # noqa: F401 - a fixture
from tests.test_pipeline import START_NS, audio, chunks_of, make_pipeline

NOW_NS = START_NS + 3_600 * 10**9


class Place:
    """Topics of a test's own, on a bus of either kind."""

    def __init__(self, bus_settings: BusSettings) -> None:
        name = uuid.uuid4().hex[:8]
        environ = {
            "DETECTOR__TOPICS__CHUNKS": f"chunks-{name}",
            "DETECTOR__TOPICS__ALERTS": f"alerts-{name}",
            "DETECTOR__TOPICS__DEADLETTER": f"dead-{name}",
            "DETECTOR__TOPICS__PARTITIONS": "3",
            "DETECTOR__TOPICS__CHUNKS_RETENTION_SECONDS": "1e9",
            "DETECTOR__DAEMON__GROUP": f"group-{name}",
            "DETECTOR__DAEMON__STREAM_IDLE_SECONDS": "86400",
            "DETECTOR__BATCH__MAX_WAIT_SECONDS": "0",
        }
        self.settings: Settings = load_settings(None, environ).model_copy(update={"bus": bus_settings})
        self.dead, self.chunks = self.settings.topics.deadletter, self.settings.topics.chunks
        self.bus: Bus = open_bus(bus_settings)
        self.bus.create_topics(topic_settings(self.settings.topics))

    def send(self, *records: tuple) -> None:
        producer = self.bus.producer()
        for record in records:
            producer.send(self.chunks, *record, partition=1)
        producer.flush()
        producer.close()

    def serve(self, count: int, **options: object) -> dict[str, float]:
        """Let a detector take ``count`` records more; its counters by name."""
        metrics = Metrics(CollectorRegistry())
        session = Session(self.bus, self.settings, make_pipeline(**options), metrics)
        step_until(session, metrics, count)
        session.commit()
        session.close()
        return {s.name: s.value for family in metrics.registry.collect() for s in family.samples if not s.labels}

    def letters(self) -> list[DeadLetter]:
        with LogReader(self.bus, self.dead) as reader:
            return read_letters(reader)

    def records(self, topic: str) -> list[Record]:
        with LogReader(self.bus, topic) as reader:
            return list(reader.read(reader.bounds()))

    def put_back(self, **options: object) -> tuple[int, int]:
        options = {"wanted": lambda letter: True, **options}
        outcome = put_back(self.bus, self.dead, owner="x", now_ns=lambda: NOW_NS, **options)  # type: ignore[arg-type]
        return len(outcome.done), len(outcome.before)


def step_until(session: Session, metrics: Metrics, count: int) -> None:
    """Let the detector take ``count`` records in all; what is read again to rebuild state does not count."""
    received = metrics.records_in._value
    deadline = time.monotonic() + 60
    while received.get() < count:
        session.step()
        assert time.monotonic() < deadline
    assert received.get() == count
    session.commit()


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "embedded":
        settings = BusSettings(kind="embedded", embedded=EmbeddedBusSettings(path=tmp_path / "bus.sqlite3"))
    else:
        address = request.getfixturevalue("kafka_address")
        settings = BusSettings(kind="kafka", kafka=KafkaSettings(bootstrap_servers=(address,)))
    found = Place(settings)
    yield found
    found.bus.close()


def wire(stream: str = "a", seq: int = 0, session: str = "s1") -> tuple:
    return encode(Chunk(stream, session, seq, START_NS + seq * 960_000_000, np.zeros(CHUNK_SAMPLES, np.int16)))


def bad(stream: str = "a", seq: int = 0) -> tuple:
    key, value, headers = wire(stream, seq)
    return key, value[:-2], headers


def test_a_refused_record_goes_back_once_and_says_how_often_it_was_tried(place):
    place.send(bad(), wire(seq=1))
    place.serve(2)
    (letter,) = place.letters()
    assert (letter.reason, letter.attempts, letter.put_back_at_ns) == ("bad_size", 1, None)
    assert (letter.source_topic, letter.source_partition, letter.source_offset) == (place.chunks, 1, 0)
    assert (letter.stream, letter.size_bytes, letter.headers) == ("a", 30_718, bad()[2])
    assert abs(letter.at_ns - place.records(place.dead)[0].timestamp_ms * 10**6) < 60 * 10**9

    assert place.put_back() == (1, 0)
    assert place.put_back() == (0, 1)
    assert place.letters() == [dataclasses.replace(letter, put_back_at_ns=NOW_NS)]
    returned = place.records(place.chunks)[-1]
    assert (returned.partition, returned.key, returned.value) == (1, *bad()[:2])
    assert returned.headers == (*bad()[2], (ATTEMPTS, b"1"))

    place.serve(1)
    again = [found for found in place.letters() if found.attempts == 2]
    assert len(again) == 1
    assert again[0].source_offset == returned.offset
    assert again[0].headers == bad()[2]
    assert place.put_back() == (1, 1)
    assert place.put_back(again=True) == (2, 0)
    assert [dict(r.headers)[ATTEMPTS] for r in place.records(place.chunks)[2:]] == [b"1", b"2", b"1", b"2"]


def test_what_was_refused_for_want_of_room_is_heard_when_it_comes_back(place):
    shot = chunks_of("late", audio(np.random.default_rng(1), 8, [4 * CHUNK_SAMPLES + 4321]))
    place.send(wire("early"), *map(encode, shot))
    metrics = Metrics(CollectorRegistry())
    session = Session(place.bus, place.settings, make_pipeline(max_streams=1), metrics)
    step_until(session, metrics, 9)
    assert {letter.reason for letter in place.letters()} == {"too_many_streams"}
    session._pipeline.end_stream("early")  # as it is forgotten after a while of silence
    assert place.put_back() == (8, 0)
    step_until(session, metrics, 17)
    session.close()
    assert metrics.chunks_out._value.get() == 9
    assert len(place.records(place.settings.topics.alerts)) == 2  # opened and closed


def test_two_letters_on_one_record_go_back_once(place):
    place.send(bad())
    place.serve(1)
    (told,) = place.records(place.dead)
    producer = place.bus.producer()
    producer.send(place.dead, told.key, told.value, told.headers)
    producer.flush()
    assert len(place.letters()) == 1
    assert place.put_back() == (1, 0)
    assert place.put_back() == (0, 1)


def test_a_record_goes_back_once_whichever_of_its_letters_is_asked_for(place):
    """By the name of the second letter, or by the time of it, the record is not put back a second time."""
    place.send(bad())
    place.serve(1)
    (told,) = place.records(place.dead)
    first = parse(told)
    later = tuple((n, b"%d" % (first.at_ns + 10**9) if n == "deadletter_at" else v) for n, v in told.headers)
    producer = place.bus.producer()
    producer.send(place.dead, told.key, told.value, later)
    producer.flush()
    producer.close()
    records = place.records(place.dead)
    second = parse(records[-1])
    assert first.name != second.name
    asked = [lambda letter, one=one: letter.name == one.name for one in (first, second)]
    assert [place.put_back(wanted=one) for one in asked] == [(1, 0), (0, 0)]
    assert place.put_back(wanted=lambda letter: letter.at_ns > first.at_ns) == (0, 0)
    assert place.put_back(wanted=lambda letter: letter.at_ns <= first.at_ns) == (0, 1)
    assert len(place.records(place.chunks)) == 2


def test_a_letter_of_which_a_part_was_kept_stays(place):
    error = ChunkError("too_large", "Why.")
    producer = place.bus.producer()
    for offset, extra in ((1, ((CUT_FROM_BYTES, b"9000000"),)), (2, ())):
        headers = headers_of(Record(place.chunks, 1, offset, b"a", b"x", (), 0), error, NOW_NS)
        producer.send(place.dead, b"a", b"x", (*headers, *extra))
    producer.flush()
    producer.close()
    cut, whole = place.letters()
    assert (cut.cut, cut.size_bytes, whole.cut, whole.size_bytes) == (True, 9_000_000, False, 1)
    named = run(place, "retry", "--letter", cut.name)
    assert named.exit_code == 1
    assert f"only a part of it was kept: {cut.name} (9000000 bytes)" in named.output
    assert place.records(place.chunks) == []
    rest = run(place, "retry", "--all")
    assert rest.exit_code == 0, rest.output
    assert "1 put back." in rest.output
    assert "1 can't go back" in rest.output
    assert [record.value for record in place.records(place.chunks)] == [b"x"]
    assert "9000000 (cut)" in run(place).output


def test_of_two_who_put_back_at_once_one_is_fenced_and_nothing_goes_back_twice(place):
    place.send(bad(), bad(seq=1))
    place.serve(2)
    inner: list[tuple[int, int]] = []

    def now_ns() -> int:
        if not inner:
            inner.append(place.put_back())
        return NOW_NS

    with pytest.raises(CommitFenced):
        put_back(place.bus, place.dead, lambda letter: True, owner="x", now_ns=now_ns)
    assert inner == [(2, 0)]
    assert place.put_back() == (0, 2)
    assert len(place.records(place.chunks)) == 4


def test_a_chunk_of_a_run_that_went_on_comes_back_as_a_duplicate(place):
    place.send(wire(seq=0), bad(seq=1), wire(seq=2))
    place.serve(3)
    with LogReader(place.bus, place.dead) as reader:
        (record,) = reader.read(reader.bounds())
    whole = (record.key, wire(seq=1)[1], wire(seq=1)[2])
    place.send(whole)
    assert place.serve(1)["gunfire_chunks_duplicate_total"] == 1


def test_a_source_that_is_gone_and_a_letter_that_is_not_there_are_named(place):
    producer = place.bus.producer()
    headers = headers_of(Record("gone", 0, 7, b"a", b"x", (), 0), ChunkError("bad_size", "Why."), NOW_NS)
    producer.send(place.dead, b"a", b"x", headers)
    producer.flush()
    with pytest.raises(BusError, match=r"Topic gone, where dead letters came from"):
        place.put_back()
    with pytest.raises(BusError, match="Topic none does not exist"):
        LogReader(place.bus, "none")


names = st.text(min_size=1, max_size=8)
fields = st.lists(st.tuples(names, st.binary(max_size=20)), max_size=4).map(tuple)


@given(fields, st.binary(max_size=4) | st.none(), st.integers(0, 2**40), st.text(max_size=2000), st.integers(0, 2**60))
def test_any_refused_record_can_be_read_again(headers, key, offset, message, at_ns):
    record = Record("audio.chunks", 3, offset, key, b"value", headers, 0)
    error = ChunkError("bad_header", message)
    written = headers_of(record, error, at_ns)
    letter = parse(Record("dead", 1, 5, key, b"value", written, 0))
    assert letter is not None
    assert letter.headers == tuple(h for h in headers if not h[0].startswith("deadletter_"))
    assert (letter.source_partition, letter.source_offset, letter.at_ns, letter.attempts) == (3, offset, at_ns, 1)
    back = Record("audio.chunks", 3, offset, key, b"value", (*letter.headers, (ATTEMPTS, b"1")), 0)
    second = parse(Record("dead", 1, 6, key, b"value", headers_of(back, error, at_ns), 0))
    assert second is not None
    assert second.attempts == 2
    assert second.headers == letter.headers


@given(st.binary(max_size=60))
def test_no_attempts_header_breaks_anything(value):
    record = Record("t", 0, 0, None, b"", ((ATTEMPTS, value),), 0)
    letter = parse(Record("dead", 0, 0, None, b"", headers_of(record, ChunkError("x", "y"), 0), 0))
    assert letter is not None
    assert 1 <= letter.attempts <= 10**9 + 1


def test_a_hexdump_shows_offset_bytes_and_text():
    assert hexdump(b"RIFF\x00\xff" + bytes(12)).splitlines() == [
        "00000000  52 49 46 46 00 ff 00 00 00 00 00 00 00 00 00 00  |RIFF............|",
        "00000010  00 00                                            |..|",
    ]


# --- the command


def run(place: Place, *arguments: str) -> Result:
    topics = place.settings.topics
    environ = {
        "DETECTOR__TOPICS__CHUNKS": topics.chunks,
        "DETECTOR__TOPICS__DEADLETTER": topics.deadletter,
        "DETECTOR__DAEMON__GROUP": "x",
        "DETECTOR__BUS__KIND": place.settings.bus.kind,
        "DETECTOR__BUS__EMBEDDED__PATH": str(place.settings.bus.embedded.path),
        "DETECTOR__BUS__KAFKA__BOOTSTRAP_SERVERS": ",".join(place.settings.bus.kafka.bootstrap_servers),
    }
    return CliRunner().invoke(main, ["deadletters", *arguments], env=environ)


def test_the_command_lists_shows_filters_and_puts_back(place):
    key, value, headers = wire("b", 3)
    place.send(bad("a"), (key, value, headers[1:]))
    place.serve(2)
    listed = run(place)
    assert listed.exit_code == 0, listed.output
    assert "2 dead letters" in listed.output
    rows = [
        json.loads(line) for line in run(place, "--format", "json", "--reason", "missing_header").output.splitlines()
    ]
    (row,) = rows
    assert (row["stream"], row["attempts"], row["source_partition"], row["source_offset"]) == ("b", 1, 1, 1)
    assert row["headers"]["seq"] == "3"
    assert run(place, "--until", "2001-01-01").output.startswith("No dead letters")
    assert "2 dead letters" in run(place, "--since", "2001-01-01T00:00Z").output

    shown = run(place, "--show", row["letter"]).output
    assert "missing_header" in shown
    assert "00000000  00 00" in shown
    assert "30464 bytes more" in shown

    dry = run(place, "retry", "--all", "--dry-run").output
    assert "2 would go back." in dry
    one = run(place, "retry", "--letter", row["letter"])
    assert one.exit_code == 0, one.output
    assert f"{row['letter']} (missing_header, refused once) -> {place.chunks}[1]\n1 put back." in one.output
    rest = run(place, "retry", "--all").output
    assert "1 put back." in rest
    assert "1 had been put back before" in rest
    assert len(place.records(place.chunks)) == 4
    absent = run(place, "retry", "--letter", "2:99")
    assert absent.exit_code == 1
    assert "No such dead letter: 2:99" in absent.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["retry"], "Say which"),
        (["--show", "three"], "is not PARTITION:OFFSET"),
        (["--since", "yesterday"], "is no time"),
        (["--reason", "x", "retry", "--all"], "Write the options behind"),
    ],
)
def test_a_command_line_that_cant_be_meant_exits_with_2(arguments, text):
    result = CliRunner().invoke(main, ["deadletters", *arguments])
    assert result.exit_code == 2
    assert text in result.output


def test_a_missing_bus_file_is_named_and_not_made(tmp_path):
    for arguments in ([], ["retry", "--all"]):
        result = CliRunner().invoke(main, ["deadletters", *arguments, "--bus-path", str(tmp_path / "none.sqlite3")])
        assert result.exit_code == 1
        assert "There is no bus file" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_partition_that_went_is_no_obstacle(tmp_path):
    place = Place(BusSettings(kind="embedded", embedded=EmbeddedBusSettings(path=tmp_path / "bus.sqlite3")))
    producer = place.bus.producer()
    source = Record(place.chunks, 9, 4, b"a", b"x", (), 0)
    producer.send(place.dead, b"a", b"x", headers_of(source, ChunkError("bad_size", "Why."), NOW_NS))
    producer.flush()
    assert place.put_back() == (1, 0)
    (record,) = place.records(place.chunks)
    assert record.topic_partition in {TopicPartition(place.chunks, n) for n in range(3)}
    place.bus.close()
