"""What the embedded bus promises beyond the contract: many processes, kill -9, retention, damaged and full files."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detector.bus.base import Commit, TopicPartition, TopicSettings
from detector.bus.embedded import EmbeddedBus, partition_of
from detector.bus.membership import balance
from detector.bus.sqlite_file import BusFile
from detector.errors import BusDamaged, BusError, BusUnavailable

ONE = {"t": TopicSettings(partitions=1)}
PARTITION = TopicPartition("t", 0)
CHUNK = bytes(30_720)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bus.sqlite3"


@pytest.fixture
def bus(path: Path) -> Iterator[EmbeddedBus]:
    bus = EmbeddedBus(path)
    bus.create_topics(ONE)
    yield bus
    bus.close()


def send(bus: EmbeddedBus, count: int, value: bytes = b"x", **more: object) -> None:
    producer = bus.producer()
    for _ in range(count):
        producer.send("t", None, value, **more)  # type: ignore[arg-type]
    producer.flush()
    producer.close()


# --- records


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(
        st.tuples(
            st.none() | st.binary(max_size=40),
            st.binary(max_size=200) | st.just(bytes(range(256)) * 200),
            st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), st.binary(max_size=30))),
        ),
        max_size=12,
    )
)
def test_any_bytes_come_back_as_sent(
    bus: EmbeddedBus, records: list[tuple[bytes | None, bytes, list[tuple[str, bytes]]]]
) -> None:
    reader, producer = bus.consumer(["t"], None, start="latest"), bus.producer()
    for key, value, headers in records:
        producer.send("t", key, value, tuple(headers))
    producer.flush()
    got = reader.poll(1.0) if records else []
    assert [(r.key, r.value, r.headers) for r in got] == [(k, v, tuple(h)) for k, v, h in records]
    producer.close()
    reader.close()


def test_keys_keep_their_partition_across_versions() -> None:
    assert [partition_of(b"sensor-%d" % n, 8) for n in range(8)] == [3, 1, 5, 0, 5, 0, 6, 1]


def test_a_topics_own_limit_is_kept(bus: EmbeddedBus) -> None:
    bus.create_topics({"small": TopicSettings(partitions=1, max_message_bytes=10)})
    with pytest.raises(BusError, match="takes 10"):
        bus.producer().send("small", None, bytes(11))


def test_a_waiting_poll_wakes_within_its_interval_without_busy_waiting(bus: EmbeddedBus) -> None:
    consumer, producer = bus.consumer(["t"], None), bus.producer()
    delays = []
    for _ in range(20):
        producer.send("t", None, b"x", timestamp_ms=time.time_ns() // 1_000_000)
        (record,) = consumer.poll(5.0)
        delays.append(time.time() - record.timestamp_ms / 1000)
    assert sorted(delays)[10] < 0.1
    used = time.process_time()
    consumer.poll(0.5)
    assert time.process_time() - used < 0.25


WRITE = """
import sys
from detector.bus.embedded import EmbeddedBus
bus = EmbeddedBus(sys.argv[1])
producer = bus.producer()
for n in range(int(sys.argv[3])):
    producer.send("t", None, b"%s %d" % (sys.argv[2].encode(), n), partition=0)
    if n % 7 == 0:
        producer.flush()
bus.close()
"""


def test_a_reader_beside_several_writing_processes_skips_nothing(bus: EmbeddedBus, path: Path) -> None:
    consumer = bus.consumer(["t"], "g")
    writers = [subprocess.Popen([sys.executable, "-c", WRITE, str(path), name, "300"]) for name in ("a", "b", "c")]
    offsets: list[int] = []
    values: list[bytes] = []
    deadline = time.monotonic() + 30
    while len(offsets) < 900 and time.monotonic() < deadline:
        for record in consumer.poll(0.1, max_records=20):
            offsets.append(record.offset)
            values.append(record.value)
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert offsets == list(range(900))
    for name in (b"a", b"b", b"c"):
        assert [int(v.split()[1]) for v in values if v.startswith(name)] == list(range(300))


# --- kill -9

SEND_AND_TELL = """
import sys
from detector.bus.embedded import EmbeddedBus
bus = EmbeddedBus(sys.argv[1])
producer = bus.producer()
n = 0
while True:
    for _ in range(20):
        producer.send("t", None, b"%d" % n + bytes(30720))
        n += 1
    producer.flush()
    print(n, flush=True)
"""


def test_kill_9_loses_nothing_acknowledged_and_leaves_a_usable_bus(bus: EmbeddedBus, path: Path) -> None:
    for kill_after in (1, 4, 9):
        first = bus.consumer(["t"], None).end_offset(PARTITION)
        process = subprocess.Popen([sys.executable, "-c", SEND_AND_TELL, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        acknowledged = 0
        with process.stdout:
            for line in process.stdout:
                acknowledged = int(line)
                if acknowledged >= 20 * kill_after:
                    os.kill(process.pid, signal.SIGKILL)
                    break
            acknowledged = max([acknowledged, *(int(rest) for rest in process.stdout if rest.endswith("\n"))])
        process.wait()
        fresh = EmbeddedBus(path)
        reader = fresh.consumer(["t"], None)
        reader.seek(PARTITION, first)
        numbers: list[int] = []
        while records := reader.poll(0.05):
            numbers += [int(record.value.rstrip(b"\0")) for record in records]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) >= acknowledged
        fresh.close()
    send(bus, 1)


COMMIT_AND_TELL = """
import sys
from detector.bus.base import Commit, TopicPartition
from detector.bus.embedded import EmbeddedBus
bus = EmbeddedBus(sys.argv[1], session_timeout_seconds=0.2)
consumer = bus.consumer(["t"], "g")
producer = bus.producer(transactional_id="d")
while True:
    for record in consumer.poll(1.0, max_records=3):
        producer.send("out", None, record.value)
        producer.commit(consumer, {record.topic_partition: Commit(record.offset + 1)})
        print("done", flush=True)
"""


def test_kill_9_between_transactions_neither_loses_nor_doubles_an_output(path: Path) -> None:
    bus = EmbeddedBus(path, session_timeout_seconds=0.2)
    bus.create_topics({**ONE, "out": TopicSettings(partitions=1)})
    producer = bus.producer()
    for n in range(200):
        producer.send("t", None, b"%d" % n)
    producer.flush()
    watcher = bus.consumer(["out"], None)
    outputs: list[int] = []
    for lifetime in (5, 17, 40, 10_000):
        process = subprocess.Popen(
            [sys.executable, "-c", COMMIT_AND_TELL, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        with process.stdout:
            for _ in range(lifetime):
                process.stdout.readline()
                outputs += [int(record.value) for record in watcher.poll(0)]
                if len(outputs) >= 200:
                    break
            process.kill()
        process.wait()
    assert outputs == list(range(200))
    bus.close()


# --- groups


def test_balance_is_even_moves_little_and_serves_only_subscribers() -> None:
    partitions = dict.fromkeys(range(8), "a") | dict.fromkeys(range(8, 10), "b")
    members = {"m1": frozenset({"a", "b"}), "m2": frozenset({"a"}), "m3": frozenset({"a"})}
    first = balance(partitions, {"m1": members["m1"]}, {})
    assert set(first.values()) == {"m1"}
    second = balance(partitions, members, first)
    loads = [list(second.values()).count(m) for m in members]
    assert max(loads) - min(loads) <= 1
    assert second[8] == second[9] == "m1"
    assert balance(partitions, members, second) == second
    third = balance(partitions, {m: members[m] for m in ("m1", "m2")}, second)
    assert all(third[p] == m for p, m in second.items() if m != "m3")
    assert set(balance(partitions, {}, third).values()) == {None}


def test_a_member_that_slept_too_long_loses_its_partitions_and_joins_again(path: Path) -> None:
    bus = EmbeddedBus(path, session_timeout_seconds=0.2)
    bus.create_topics(ONE)
    lost: list[TopicPartition] = []
    sleeper = bus.consumer(["t"], "g", on_revoked=lambda _, partitions: lost.extend(partitions))
    sleeper.poll(0)
    assert sleeper.assignment() == {PARTITION}
    other = bus.consumer(["t"], "g")
    deadline = time.monotonic() + 10
    while not other.assignment():
        other.poll(0.02)
        assert time.monotonic() < deadline
    with pytest.raises(BusError, match="no longer belongs"):
        sleeper.commit({PARTITION: Commit(1)})
    sleeper.poll(0)
    assert lost == [PARTITION]
    assert sleeper.assignment() == frozenset()
    other.close()
    sleeper.poll(0.05)
    assert sleeper.assignment() == {PARTITION}
    bus.close()


# --- retention


def test_retention_by_size_of_a_partition(path: Path) -> None:
    bus = EmbeddedBus(path)
    bus.create_topics({"t": TopicSettings(partitions=1, retention_bytes=40 * len(CHUNK))})
    consumer = bus.consumer(["t"], "g")
    consumer.poll(0)
    send(bus, 1000, CHUNK)
    beginning, end = consumer.beginning_offset(PARTITION), consumer.end_offset(PARTITION)
    assert end == 1000
    assert 0 < end - beginning <= 250  # the limit, and what one sweep lets pass
    assert consumer.poll(1.0)[0].offset == beginning  # its position was dropped
    consumer.seek(PARTITION, 3)
    assert consumer.poll(1.0)[0].offset == beginning
    bus.close()


def test_retention_of_the_whole_bus_takes_from_the_fullest_and_the_file_stays_small(path: Path) -> None:
    bus = EmbeddedBus(path, retention_bytes=100 * len(CHUNK))
    bus.create_topics({**ONE, "alerts": TopicSettings(partitions=1)})
    producer = bus.producer()
    for _ in range(5):
        producer.send("alerts", None, b"alert")
    for _ in range(2000):
        producer.send("t", None, CHUNK)
    producer.flush()
    consumer = bus.consumer(["t", "alerts"], None)
    assert consumer.beginning_offset(TopicPartition("alerts", 0)) == 0
    assert consumer.end_offset(PARTITION) - consumer.beginning_offset(PARTITION) <= 350
    bus.close()
    assert path.stat().st_size < 500 * 32_768


def test_retention_by_age(path: Path) -> None:
    bus = EmbeddedBus(path, retention_seconds=60)
    bus.create_topics({**ONE, "kept": TopicSettings(partitions=1, retention_seconds=10_000)})
    old_ms = time.time_ns() // 1_000_000 - 120_000
    producer = bus.producer()
    for topic in ("t", "kept"):
        for _ in range(3):
            producer.send(topic, None, b"old", timestamp_ms=old_ms)
    producer.flush()
    deadline = time.monotonic() + 10
    consumer = bus.consumer(["t", "kept"], None)
    while consumer.beginning_offset(PARTITION) < 3:
        producer.send("kept", None, b"new")
        producer.flush()
        assert time.monotonic() < deadline
    assert consumer.beginning_offset(TopicPartition("kept", 0)) == 0
    send(bus, 1)
    assert consumer.end_offset(PARTITION) == 4
    bus.close()


# --- bad input


def test_folder_and_file_are_created(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "bus.sqlite3"
    EmbeddedBus(path).close()
    assert path.is_file()


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(BusUnavailable, match="is a folder"):
        EmbeddedBus(tmp_path)


def test_a_folder_that_cant_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BusUnavailable, match="can't be created"):
        EmbeddedBus(tmp_path / "file" / "bus.sqlite3")


def test_a_folder_that_cant_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    folder = Path("/proc") if os.geteuid() == 0 else tmp_path  # where even root may not write
    with pytest.raises(BusUnavailable, match="write permission"):
        EmbeddedBus(folder / "bus.sqlite3")


def test_a_file_of_something_else(path: Path) -> None:
    path.write_bytes(b"RIFF" + bytes(5000))
    with pytest.raises(BusDamaged, match=r"bus\.sqlite3 is damaged or no bus file"):
        EmbeddedBus(path)
    assert path.read_bytes().startswith(b"RIFF")


def test_an_sqlite_file_of_another_program(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE photos(id)")
    with pytest.raises(BusDamaged, match="another program"):
        EmbeddedBus(path)


def test_a_bus_file_of_another_version(bus: EmbeddedBus, path: Path) -> None:
    bus.close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(BusDamaged, match="layout version 99"):
        EmbeddedBus(path)


def test_a_damaged_file_is_named_with_a_remedy(bus: EmbeddedBus, path: Path) -> None:
    send(bus, 50, CHUNK)
    bus.close()
    content = bytearray(path.read_bytes())
    content[32_768:] = os.urandom(len(content) - 32_768)
    path.write_bytes(content)
    with pytest.raises(BusDamaged, match=r"bus\.sqlite3 is damaged.*move it"):
        read_all(path)


def read_all(path: Path) -> None:
    bus = EmbeddedBus(path)
    try:
        while bus.consumer(["t"], None).poll(0.0):
            pass
    finally:
        bus.close()


def test_a_locked_file_is_waited_for_then_named(bus: EmbeddedBus, path: Path) -> None:
    hasty = EmbeddedBus(path, busy_timeout_seconds=0.1)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        producer = hasty.producer()
        producer.send("t", None, b"kept")
        with pytest.raises(BusUnavailable, match=r"busy|stayed locked"):
            producer.flush(0.1)
        other.execute("ROLLBACK")
    producer.flush()
    assert [r.value for r in bus.consumer(["t"], None).poll(1.0)] == [b"kept"]
    hasty.close()


def test_a_removed_file_is_noticed(bus: EmbeddedBus, path: Path) -> None:
    producer = bus.producer()
    producer.send("t", None, b"x")
    producer.flush()
    path.unlink()
    producer.send("t", None, b"y")
    with pytest.raises(BusDamaged, match="removed or replaced"):
        producer.flush()
    with pytest.raises(BusDamaged):
        producer.close()
    assert not path.exists()


FILL_DISK = """
import os, resource, sys
from detector.bus.base import Commit, TopicPartition
from detector.bus.embedded import EmbeddedBus
from detector.errors import BusUnavailable
bus = EmbeddedBus(sys.argv[1])
consumer = bus.consumer(["t"], "g")
consumer.poll(0)
producer = bus.producer(transactional_id="d")
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
for n in range(200):
    producer.send("t", None, b"%d" % n + bytes(30720))
try:
    producer.commit(consumer, {TopicPartition("t", 0): Commit(0, "kept")})
except BusUnavailable as error:
    print("refused:", error)
print("stored", consumer.end_offset(TopicPartition("t", 0)), consumer.committed(TopicPartition("t", 0)))
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
producer.commit(consumer, {TopicPartition("t", 0): Commit(0, "kept")})
print("stored", consumer.end_offset(TopicPartition("t", 0)), consumer.committed(TopicPartition("t", 0)).metadata)
bus.close()
"""


def test_a_full_disk_stores_nothing_by_halves_and_keeps_what_was_sent(bus: EmbeddedBus, path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", FILL_DISK, str(path)], capture_output=True, text=True, check=True)
    refused, before, after = result.stdout.splitlines()
    assert refused.startswith("refused: Bus file")
    assert "disk is full or failing" in refused
    assert (before, after) == ("stored 0 None", "stored 200 kept")


def test_a_full_buffer_refuses_instead_of_growing(bus: EmbeddedBus) -> None:
    producer = bus.producer(transactional_id="d")
    for _ in range(3):
        producer.send("t", None, bytes(8 * 1024 * 1024))
    producer.send("t", None, bytes(8 * 1024 * 1024 - 1000))
    with pytest.raises(BusUnavailable, match="not taken"):
        producer.send("t", None, bytes(1000))
    producer.abort()
    producer.send("t", None, b"x")


class _Interrupted:
    """A connection between whose first question and the next another process lays the file out."""

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        self._db, self._path, self._asked = db, path, 0
        self.in_transaction = False

    def execute(self, statement: str) -> sqlite3.Cursor:
        cursor = self._db.execute(statement)
        if statement.startswith(("PRAGMA", "SELECT")):
            self._asked += 1
            if self._asked == 1:
                EmbeddedBus(self._path).close()
        return cursor


def test_a_bus_file_that_is_just_being_laid_out_is_not_taken_for_another_programs(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        file = BusFile.__new__(BusFile)
        file.path, file._db = path, _Interrupted(db, path)  # type: ignore[assignment]
        assert file._check_is_ours_or_empty() is False
        assert file._check_is_ours_or_empty() is True
