"""What every bus promises. ``test_contract`` runs it on each; nothing here knows which one it is."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from detector.bus.base import Bus, Commit, Consumer, Jump, Record, TopicPartition, TopicSettings
from detector.config import BusSettings
from detector.errors import BusError, CommitFenced

DEADLINE_SECONDS = 60.0
Factory = Callable[[], Bus]
Drop = Callable[[str, int], None]

READ_UNTIL_KILLED = """
import pickle
import sys
from detector.bus import open_bus
bus = open_bus(pickle.loads(bytes.fromhex(sys.argv[1])))
consumer = bus.consumer([sys.argv[2]], sys.argv[2], member_id=sys.argv[3] or None)
told = False
while True:
    consumer.poll(0.1)
    if consumer.assignment() and not told:
        told = True
        print("assigned", len(consumer.assignment()), flush=True)
"""


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_SECONDS} s: {what}"


def read(consumer: Consumer, count: int) -> list[Record]:
    records: list[Record] = []
    until(lambda: records.extend(consumer.poll(0.2)) or len(records) >= count, f"{count} records")  # type: ignore[func-returns-value]
    assert len(records) == count
    return records


def read_nothing(consumer: Consumer) -> None:
    """What would come has come by the time a marker sent now would have; here: two empty looks."""
    assert consumer.poll(0.1) == []
    assert consumer.poll(0.3) == []


def settle(consumers: list[Consumer], partitions: int) -> None:
    """Poll all in turn until every partition has one reader and the shares are even."""

    def settled() -> bool:
        for consumer in consumers:
            consumer.poll(0.02)
        counts = [len(c.assignment()) for c in consumers]
        union: set[TopicPartition] = set().union(*(c.assignment() for c in consumers))
        return sum(counts) == len(union) == partitions and max(counts) - min(counts) <= 1

    until(settled, "an even assignment")


def fill(bus: Bus, topic: str, values: list[bytes], *, partition: int | None = None, key: bytes | None = None) -> None:
    producer = bus.producer()
    for value in values:
        producer.send(topic, key, value, partition=partition)
    producer.flush()
    producer.close()


def values_of(records: list[Record]) -> list[bytes]:
    return [record.value for record in records]


class BusContract:
    # --- records

    def test_records_of_a_key_stay_in_order_in_one_partition(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=4)})
        producer = bus.producer()
        for n in range(120):
            producer.send(name, b"key-%d" % (n % 6), b"%d" % n)
        producer.flush()
        records = read(bus.consumer([name], name), 120)
        for key in {record.key for record in records}:
            of_key = [record for record in records if record.key == key]
            assert len({record.partition for record in of_key}) == 1
            assert [int(record.value) for record in of_key] == sorted(int(record.value) for record in of_key)
            assert [record.offset for record in of_key] == sorted(record.offset for record in of_key)
        assert len({record.partition for record in records}) > 1

    def test_two_producers_send_a_key_to_the_same_partition(self, bus_factory: Factory, name: str) -> None:
        one, other = bus_factory(), bus_factory()
        one.create_topics({name: TopicSettings(partitions=16)})
        for bus in (one, other):
            fill(bus, name, [b"x"], key=b"sensor-7")
        assert len({record.partition for record in read(one.consumer([name], None), 2)}) == 1

    def test_key_value_headers_and_time_come_back_as_sent(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=1)})
        recently_ms = time.time_ns() // 1_000_000 - 5_000
        sent = [
            (None, b"", (), recently_ms),
            (b"", b"\x00\xff" * 15_360, (("v", b"1"), ("v", b""), ("größe", b"\x00\xff")), recently_ms + 1),
            ("straße".encode(), b"v", (("a", b"b"),), recently_ms + 2),
        ]
        producer = bus.producer()
        for key, value, headers, timestamp_ms in sent:
            producer.send(name, key, value, headers, timestamp_ms=timestamp_ms)
        producer.flush()
        records = read(bus.consumer([name], name), 3)
        assert [(r.key, r.value, r.headers, r.timestamp_ms) for r in records] == sent
        assert [(r.topic, r.partition, r.offset) for r in records] == [(name, 0, n) for n in range(3)]
        assert all(type(r.value) is bytes and type(r.key) in (bytes, type(None)) for r in records)

    def test_a_record_without_a_time_gets_the_time_of_sending(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=1)})
        before_ms = time.time_ns() // 1_000_000
        fill(bus, name, [b"x"])
        (record,) = read(bus.consumer([name], None), 1)
        assert before_ms <= record.timestamp_ms <= time.time_ns() // 1_000_000

    def test_an_explicit_partition_is_kept(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=3)})
        fill(bus, name, [b"x"] * 4, partition=2, key=b"k")
        assert {record.partition for record in read(bus.consumer([name], None), 4)} == {2}

    def test_a_record_is_readable_soon_without_flush(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=1)})
        consumer, producer = bus.consumer([name], None), bus.producer()
        producer.send(name, b"k", b"x")
        assert values_of(read(consumer, 1)) == [b"x"]

    def test_flush_returns_once_records_are_stored(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=1)})
        consumer, producer = bus.consumer([name], None), bus.producer()
        for n in range(50):
            producer.send(name, None, b"%d" % n)
        producer.flush()
        assert consumer.end_offset(TopicPartition(name, 0)) == 50

    def test_a_value_beyond_the_limit_is_refused_by_name(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=1)})
        producer = bus.producer()
        with pytest.raises(BusError, match=f"too large for topic {name}"):
            producer.send(name, None, bytes(9 * 1024 * 1024))
        producer.send(name, None, b"next")
        producer.flush()
        assert values_of(read(bus.consumer([name], None), 1)) == [b"next"]

    def test_the_size_a_topic_takes_is_known_and_taken(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=1, max_message_bytes=50_000)})
        limit_bytes = bus.max_message_bytes(name)
        assert limit_bytes == 50_000
        fill(bus, name, [os.urandom(limit_bytes - 256)])
        assert len(read(bus.consumer([name], None), 1)) == 1
        assert bus.max_message_bytes(f"{name}.none") is None

    def test_sending_to_an_unknown_topic_says_so(self, bus: Bus, name: str) -> None:
        with pytest.raises(BusError, match=name):
            bus.producer().send(name, None, b"x")

    def test_a_partition_that_is_not_there_is_refused(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=2)})
        with pytest.raises(BusError, match=name):
            bus.producer().send(name, None, b"x", partition=2)

    def test_poll_gives_at_most_max_records(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=2)})
        fill(bus, name, [b"x"] * 30)
        consumer = bus.consumer([name], None)
        sizes: list[int] = []
        until(lambda: sizes.append(len(consumer.poll(0.2, max_records=7))) or sum(sizes) == 30, "30 records")  # type: ignore[func-returns-value]
        assert max(sizes) <= 7

    # --- topics

    def test_creating_topics_twice_changes_nothing(self, bus: Bus, name: str) -> None:
        assert bus.partitions(name) is None
        bus.create_topics({name: TopicSettings(partitions=3)})
        fill(bus, name, [b"x"])
        bus.create_topics({name: TopicSettings(partitions=5), f"{name}.b": TopicSettings(partitions=1)})
        assert bus.partitions(name) == 3
        assert bus.partitions(f"{name}.b") == 1
        assert len(read(bus.consumer([name], None), 1)) == 1

    def test_a_bad_topic_name_is_refused(self, bus: Bus) -> None:
        with pytest.raises(BusError, match="Topic name"):
            bus.create_topics({"a b": TopicSettings()})

    def test_closing_twice_is_harmless_and_use_after_it_an_error(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=1)})
        producer, consumer = bus.producer(), bus.consumer([name], name)
        consumer.poll(0)
        for thing in (producer, consumer, bus):
            thing.close()
            thing.close()
        for use in (lambda: producer.send(name, None, b""), lambda: consumer.poll(0), lambda: bus.partitions(name)):
            with pytest.raises(BusError, match="closed"):
                use()

    def test_close_stores_what_was_sent(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=1)})
        producer = bus.producer()
        producer.send(name, None, b"x")
        producer.close()
        assert values_of(read(bus.consumer([name], None), 1)) == [b"x"]

    # --- positions

    def test_a_group_goes_on_at_its_commit_with_metadata(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=1)})
        partition = TopicPartition(name, 0)
        fill(bus, name, [b"%d" % n for n in range(10)])
        consumer = bus.consumer([name], name)
        read(consumer, 10)
        assert consumer.committed(partition) is None
        consumer.commit({partition: Commit(4, "state: ü")})
        assert consumer.committed(partition) == Commit(4, "state: ü")
        consumer.close()
        again = bus.consumer([name], name)
        assert values_of(read(again, 6)) == [b"%d" % n for n in range(4, 10)]
        assert again.position(partition) == 10

    def test_what_was_not_committed_is_read_again(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=1)})
        fill(bus, name, [b"a", b"b"])
        consumer = bus.consumer([name], name)
        read(consumer, 2)
        consumer.close()
        assert values_of(read(bus.consumer([name], name), 2)) == [b"a", b"b"]

    def test_metadata_beyond_the_limit_is_refused(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=1)})
        consumer = bus.consumer([name], name)
        settle([consumer], 1)
        consumer.commit({TopicPartition(name, 0): Commit(0, "x" * 4096)})
        with pytest.raises(BusError, match="4097 bytes"):
            consumer.commit({TopicPartition(name, 0): Commit(0, "x" * 4097)})

    def test_seek_position_and_ends(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=1)})
        partition = TopicPartition(name, 0)
        fill(bus, name, [b"%d" % n for n in range(8)])
        consumer = bus.consumer([name], name)
        read(consumer, 8)
        assert consumer.position(partition) == 8
        assert (consumer.beginning_offset(partition), consumer.end_offset(partition)) == (0, 8)
        assert consumer.end_offsets([partition]) == {partition: 8}
        consumer.seek(partition, 5)
        assert consumer.position(partition) == 5
        assert values_of(read(consumer, 3)) == [b"5", b"6", b"7"]
        consumer.seek(partition, 10_000)
        read_nothing(consumer)
        fill(bus, name, [b"8"])
        assert values_of(read(consumer, 1)) == [b"8"]

    def test_what_retention_dropped_unread_is_told_once(self, bus: Bus, name: str, drop_before: Drop) -> None:
        bus.create_topics({name: TopicSettings(partitions=1)})
        partition = TopicPartition(name, 0)
        fill(bus, name, [b"%d" % n for n in range(10)])
        first = bus.consumer([name], name)
        read(first, 10)
        first.commit({partition: Commit(2)})
        first.seek(partition, 3)
        drop_before(name, 5)
        assert values_of(read(first, 5)) == [b"%d" % n for n in range(5, 10)]
        assert first.jumps() == [Jump(partition, 3, 5)]
        assert first.jumps() == []
        first.close()
        drop_before(name, 8)
        second = bus.consumer([name], name)
        assert values_of(read(second, 2)) == [b"8", b"9"]
        assert second.jumps() == [Jump(partition, 2, 8)]

    def test_a_position_beyond_the_end_of_the_log_is_told_and_reading_goes_on_there(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=1)})
        partition = TopicPartition(name, 0)
        fill(bus, name, [b"x"] * 4)
        first = bus.consumer([name], name)
        read(first, 4)
        assert first.jumps() == []
        first.commit({partition: Commit(50)})
        first.close()
        second = bus.consumer([name], name)
        settle([second], 1)
        assert second.position(partition) == 4
        fill(bus, name, [b"next"])
        assert values_of(read(second, 1)) == [b"next"]
        assert second.jumps() == [Jump(partition, 50, 4)]

    def test_on_assigned_can_look_and_seek(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=2)})
        fill(bus, name, [b"%d" % n for n in range(6)], partition=0)
        seen: list[tuple[int, int, Commit | None]] = []

        def rewind(consumer: Consumer, partitions: frozenset[TopicPartition]) -> None:
            for partition in partitions:
                seen.append((partition.partition, consumer.end_offset(partition), consumer.committed(partition)))
                if partition.partition == 0:
                    assert consumer.position(partition) == 5
                    consumer.seek(partition, 3)

        first = bus.consumer([name], name)
        settle([first], 2)
        first.commit({TopicPartition(name, 0): Commit(5, "m")})
        first.close()
        assert values_of(read(bus.consumer([name], name, on_assigned=rewind), 3)) == [b"3", b"4", b"5"]
        assert sorted(seen, key=lambda entry: entry[0]) == [(0, 6, Commit(5, "m")), (1, 0, None)]

    def test_an_error_in_a_callback_reaches_the_caller_of_poll(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=1)})

        def fail(consumer: Consumer, partitions: frozenset[TopicPartition]) -> None:
            raise ZeroDivisionError("of the callback")

        consumer = bus.consumer([name], name, on_assigned=fail)

        def poll_on() -> None:
            until(lambda: bool(consumer.poll(0.2)), "the callback's error")

        with pytest.raises(ZeroDivisionError, match="of the callback"):
            poll_on()

    def test_offset_at_finds_the_first_record_at_or_after_a_time(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=1)})
        base_ms = time.time_ns() // 1_000_000 - 60_000
        producer = bus.producer()
        for n in range(5):
            producer.send(name, None, b"", timestamp_ms=base_ms + 100 * n)
            producer.flush()
        consumer, partition = bus.consumer([name], None), TopicPartition(name, 0)
        found = [consumer.offset_at(partition, base_ms + t) for t in (-50, 0, 1, 100, 399, 400, 401)]
        assert found == [0, 0, 1, 1, 4, 4, None]

    def test_a_paused_partition_waits_and_the_others_go_on(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=2)})
        consumer = bus.consumer([name], name)
        settle([consumer], 2)
        consumer.pause([TopicPartition(name, 0)])
        for partition in (0, 1):
            fill(bus, name, [b"%d" % partition], partition=partition)
        assert values_of(read(consumer, 1)) == [b"1"]
        read_nothing(consumer)
        consumer.resume([TopicPartition(name, 0)])
        assert values_of(read(consumer, 1)) == [b"0"]

    def test_start_latest_reads_what_comes_after_the_assignment(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=1)})
        fill(bus, name, [b"old"])
        grouped = bus.consumer([name], name, start="latest")
        settle([grouped], 1)
        alone = bus.consumer([name], None, start="latest")
        fill(bus, name, [b"new"])
        assert values_of(read(grouped, 1)) == [b"new"]
        assert values_of(read(alone, 1)) == [b"new"]

    def test_without_a_group_every_reader_reads_everything(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=3)})
        fill(bus, name, [b"%d" % n for n in range(9)])
        readers = [bus.consumer([name], None) for _ in range(2)]
        for reader in readers:
            assert sorted(values_of(read(reader, 9))) == [b"%d" % n for n in range(9)]
            assert len(reader.assignment()) == 3
            with pytest.raises(BusError, match="without a group"):
                reader.commit({TopicPartition(name, 0): Commit(1)})

    # --- groups

    def test_a_group_shares_the_partitions_and_reads_each_record_once(self, bus_factory: Factory, name: str) -> None:
        buses = [bus_factory() for _ in range(3)]
        buses[0].create_topics({name: TopicSettings(partitions=6)})
        consumers = [bus.consumer([name], name) for bus in buses]
        settle(consumers, 6)
        assert [len(c.assignment()) for c in consumers] == [2, 2, 2]
        fill(buses[0], name, [b"%d" % n for n in range(60)])
        got: list[bytes] = []
        until(
            lambda: [got.extend(values_of(c.poll(0.02))) for c in consumers] and len(got) >= 60,  # type: ignore[func-returns-value]
            "all records",
        )
        assert sorted(got, key=int) == [b"%d" % n for n in range(60)]

    def test_two_groups_read_independently(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=1)})
        fill(bus, name, [b"x"])
        for group in (f"{name}-a", f"{name}-b"):
            assert values_of(read(bus.consumer([name], group), 1)) == [b"x"]

    def test_a_member_that_leaves_hands_over_at_once(self, patient_bus_factory: Factory, name: str) -> None:
        one, other = patient_bus_factory(), patient_bus_factory()
        one.create_topics({name: TopicSettings(partitions=4)})
        leaving, staying = one.consumer([name], name), other.consumer([name], name)
        settle([leaving, staying], 4)
        leaving.close()
        settle([staying], 4)

    def test_a_member_that_leaves_while_it_joins_is_not_waited_for(
        self, patient_bus_factory: Factory, name: str
    ) -> None:
        one, other, another = patient_bus_factory(), patient_bus_factory(), patient_bus_factory()
        one.create_topics({name: TopicSettings(partitions=4)})
        staying = one.consumer([name], name)
        settle([staying], 4)
        leaving = other.consumer([name], name)
        leaving.poll(0.5)  # joins, and waits for the other member, which does not look
        leaving.close()
        coming = another.consumer([name], name)
        settle([staying, coming], 4)  # among three, one of them gone, each would have too little

    def test_revoked_partitions_can_be_committed_in_the_callback(self, bus_factory: Factory, name: str) -> None:
        one, other = bus_factory(), bus_factory()
        one.create_topics({name: TopicSettings(partitions=2)})
        revoked: list[TopicPartition] = []

        def commit(consumer: Consumer, partitions: frozenset[TopicPartition]) -> None:
            revoked.extend(partitions)
            producer.commit(consumer, {partition: Commit(7, "handed over") for partition in partitions})

        producer = one.producer()
        first = one.consumer([name], name, on_revoked=commit)
        settle([first], 2)
        fill(one, name, [b"x"] * 8, partition=0)
        fill(one, name, [b"x"] * 8, partition=1)
        second = other.consumer([name], name)
        settle([first, second], 2)
        (moved,) = revoked
        assert second.assignment() == {moved}
        assert second.committed(moved) == Commit(7, "handed over")
        assert first.committed(TopicPartition(name, 1 - moved.partition)) is None
        with pytest.raises(CommitFenced, match="no longer belongs"):
            first.commit({moved: Commit(8)})

    def test_a_killed_member_is_taken_over(self, bus: Bus, bus_settings: BusSettings, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=2)})
        victim = reading_process(bus_settings, name)
        try:
            survivor = bus.consumer([name], name)
            until(lambda: survivor.poll(0.05) == [] and len(survivor.assignment()) == 1, "a share of one")
            os.kill(victim.pid, signal.SIGKILL)
            victim.wait()
            settle([survivor], 2)
        finally:
            end(victim)

    def test_a_static_member_comes_back_to_its_partitions(self, bus_factory: Factory, name: str) -> None:
        bus = bus_factory()
        bus.create_topics({name: TopicSettings(partitions=2)})
        first = bus.consumer([name], name, member_id="one")
        settle([first], 2)
        successor = bus_factory().consumer([name], name, member_id="one")
        settle([successor], 2)
        with pytest.raises(CommitFenced):
            until(lambda: bool(first.poll(0.1)), "the fence")
        successor.commit({TopicPartition(name, 0): Commit(0, "mine")})

    def test_a_topic_created_later_is_found(self, bus: Bus, name: str) -> None:
        consumer = bus.consumer([name], name)
        assert consumer.poll(0.1) == []
        bus.create_topics({name: TopicSettings(partitions=2)})
        fill(bus, name, [b"x"])
        assert values_of(read(consumer, 1)) == [b"x"]

    # --- transactions

    def test_a_transaction_is_seen_whole_and_only_after_commit(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=2), f"{name}.out": TopicSettings(partitions=2)})
        fill(bus, name, [b"x"] * 3, partition=0)
        consumer, producer = bus.consumer([name], name), bus.producer(transactional_id=name)
        watcher = bus.consumer([f"{name}.out"], None)
        read(consumer, 3)
        for n in range(4):
            producer.send(f"{name}.out", None, b"%d" % n, partition=n % 2)
        producer.flush()
        read_nothing(watcher)
        producer.commit(consumer, {TopicPartition(name, 0): Commit(3, "three")})
        assert consumer.committed(TopicPartition(name, 0)) == Commit(3, "three")
        assert sorted(values_of(read(watcher, 4))) == [b"0", b"1", b"2", b"3"]

    def test_a_reader_of_transactions_gets_to_the_end(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=1)})
        consumer, producer = bus.consumer([name], None), bus.producer(transactional_id=name)
        partition = TopicPartition(name, 0)
        for value in (b"x", b"y"):
            producer.send(name, None, value)
            producer.commit(consumer, {})
        assert values_of(read(consumer, 2)) == [b"x", b"y"]
        until(lambda: not consumer.poll(0.05) and consumer.position(partition) == consumer.end_offset(partition), "end")
        consumer.seek(partition, 0)
        assert consumer.position(partition) == 0

    def test_an_aborted_transaction_leaves_nothing(self, bus: Bus, name: str) -> None:
        bus.create_topics({name: TopicSettings(partitions=1), f"{name}.out": TopicSettings(partitions=1)})
        consumer, producer = bus.consumer([name], name), bus.producer(transactional_id=name)
        settle([consumer], 1)
        producer.send(f"{name}.out", None, b"dropped")
        producer.abort()
        producer.send(f"{name}.out", None, b"kept")
        producer.commit(consumer, {TopicPartition(name, 0): Commit(0)})
        assert values_of(read(bus.consumer([f"{name}.out"], None), 1)) == [b"kept"]

    def test_a_stale_owners_transaction_is_fenced_with_its_outputs(self, bus_factory: Factory, name: str) -> None:
        one, other = bus_factory(), bus_factory()
        one.create_topics({name: TopicSettings(partitions=1), f"{name}.out": TopicSettings(partitions=1)})
        stale, partition = one.consumer([name], name, member_id="one"), TopicPartition(name, 0)
        settle([stale], 1)
        producer = one.producer(transactional_id=name)
        producer.send(f"{name}.out", None, b"stale")
        settle([other.consumer([name], name, member_id="one")], 1)
        with pytest.raises(CommitFenced):
            producer.commit(stale, {partition: Commit(1)})
        producer.abort()
        watcher = other.consumer([f"{name}.out"], None)
        fill(other, f"{name}.out", [b"marker"])
        assert values_of(read(watcher, 1)) == [b"marker"]

    def test_a_newer_producer_of_the_same_id_fences_the_older(self, bus_factory: Factory, name: str) -> None:
        one, other = bus_factory(), bus_factory()
        one.create_topics({name: TopicSettings(partitions=1), f"{name}.out": TopicSettings(partitions=1)})
        consumer, position = one.consumer([name], name), {TopicPartition(name, 0): Commit(0)}
        settle([consumer], 1)
        older = one.producer(transactional_id=name)
        older.send(f"{name}.out", None, b"older")
        newer = other.producer(transactional_id=name)
        with pytest.raises(CommitFenced):
            older.commit(consumer, position)
        newer.send(f"{name}.out", None, b"newer")
        newer.commit(consumer, position)
        assert values_of(read(other.consumer([f"{name}.out"], None), 1)) == [b"newer"]

    def test_a_plain_producers_commit_flushes_first(
        self, bus_factory: Factory, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At the moment the positions are stored, everybody can read what was sent before."""
        bus, other = bus_factory(), bus_factory()
        bus.create_topics({name: TopicSettings(partitions=1)})
        consumer, producer = bus.consumer([name], name), bus.producer()
        watcher, partition, order = other.consumer([name], None), TopicPartition(name, 0), []
        settle([consumer], 1)
        store, flush = type(consumer).commit, type(producer).flush

        def stored(self: Consumer, commits: dict[TopicPartition, Commit]) -> None:
            order.append(f"{watcher.end_offset(partition)} records to be read")
            store(self, commits)
            order.append("positions stored")

        def flushed(self: object, *args: float) -> None:
            flush(self, *args)  # type: ignore[arg-type]
            order.append("flushed")

        monkeypatch.setattr(type(consumer), "commit", stored)
        monkeypatch.setattr(type(producer), "flush", flushed)
        for _ in range(300):
            producer.send(name, None, os.urandom(1_000))
        producer.commit(consumer, {partition: Commit(0, "after")})
        assert order == ["flushed", "300 records to be read", "positions stored"]
        assert consumer.committed(partition) == Commit(0, "after")

    def test_a_plain_producers_commit_stores_no_position_where_an_output_was_refused(self, bus: Bus, name: str) -> None:
        out = f"{name}.out"
        bus.create_topics(
            {name: TopicSettings(partitions=1), out: TopicSettings(partitions=1, max_message_bytes=1_000)}
        )
        consumer, producer = bus.consumer([name], name), bus.producer()
        settle([consumer], 1)

        def tell() -> None:
            producer.send(out, None, os.urandom(5_000))
            producer.commit(consumer, {TopicPartition(name, 0): Commit(0)})

        with pytest.raises(BusError, match="large"):  # by `send` or by `commit`, as the bus can tell
            tell()
        assert consumer.committed(TopicPartition(name, 0)) is None


def reading_process(settings: BusSettings, topic: str, member_id: str = "") -> subprocess.Popen[str]:
    """A real process that reads ``topic`` in the group of the same name; returned once it has partitions."""
    process = subprocess.Popen(
        [sys.executable, "-c", READ_UNTIL_KILLED, pickle.dumps(settings).hex(), topic, member_id],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    if not process.stdout.readline().startswith("assigned"):
        end(process)
        pytest.fail("the reading process ended")
    return process


def end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
