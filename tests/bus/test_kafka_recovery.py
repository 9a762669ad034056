"""What the Kafka bus does where its library gives up: records refused, transactions of unknown outcome."""

import threading
import time

import kafka
import pytest
from kafka import errors
from kafka.future import Future
from prometheus_client import CollectorRegistry

from detector.bus.base import Commit, TopicPartition, TopicSettings
from detector.config import load_settings
from detector.daemon import Session
from detector.deadletters import CUT_FROM_BYTES
from detector.errors import BusError, BusUnavailable, CommitDelayed, CommitFenced
from detector.metrics import Metrics
from detector.topics import topic_settings
from tests.bus.contract import DEADLINE_SECONDS, fill, read, settle, until, values_of
from tests.test_pipeline import make_pipeline

pytestmark = [pytest.mark.kafka, pytest.mark.parametrize("bus_settings", ["kafka"], indirect=True)]


@pytest.mark.parametrize("error", [errors.OutOfOrderSequenceNumberError, errors.InvalidProducerEpochError])
def test_records_that_the_library_dropped_are_sent_again_in_order(bus, name, monkeypatch, error):
    bus.create_topics({name: TopicSettings(partitions=1)})
    producer = bus.producer()
    producer.send(name, b"k", b"0")
    producer.flush()
    monkeypatch.setattr(producer._client, "send", lambda *record: Future().failure(error()))
    for n in (1, 2):
        producer.send(name, b"k", b"%d" % n)
    producer.send(name, b"k", b"3")  # the client is known to be broken by now: a new one sends all
    producer.flush()
    assert values_of(read(bus.consumer([name], None), 4)) == [b"0", b"1", b"2", b"3"]
    assert producer._pending_bytes == 0


def test_a_flush_does_not_say_stored_where_the_library_dropped_a_record(bus, name, monkeypatch):
    bus.create_topics({name: TopicSettings(partitions=1)})
    producer = bus.producer()
    late = Future()
    monkeypatch.setattr(producer._client, "send", lambda *record: late)
    producer.send(name, b"k", b"x")
    monkeypatch.setattr(producer._client, "flush", lambda seconds: late.failure(errors.UnknownProducerIdError()))
    with pytest.raises(BusUnavailable):
        producer.flush()
    producer.flush()
    assert values_of(read(bus.consumer([name], None), 1)) == [b"x"]


def positioned(bus, name):
    bus.create_topics({name: TopicSettings(partitions=1), f"{name}.out": TopicSettings(partitions=1)})
    consumer = bus.consumer([name], name)
    settle([consumer], 1)
    return consumer, bus.producer(transactional_id=name)


def test_a_commit_whose_answer_was_lost_is_found_to_have_taken_effect(bus, name, monkeypatch):
    consumer, producer = positioned(bus, name)
    transact = producer._transact

    def answer_lost(*arguments):
        transact(*arguments)
        raise errors.KafkaTimeoutError("no answer")

    monkeypatch.setattr(producer, "_transact", answer_lost)
    producer.send(f"{name}.out", None, b"once")
    producer.commit(consumer, {TopicPartition(name, 0): Commit(0, "done")})
    monkeypatch.undo()
    producer.send(f"{name}.out", None, b"next")
    producer.commit(consumer, {TopicPartition(name, 0): Commit(0, "next")})
    assert values_of(read(bus.consumer([f"{name}.out"], None), 2)) == [b"once", b"next"]


def test_a_commit_that_broke_off_leaves_nothing_and_can_be_tried_again(bus, name, monkeypatch):
    consumer, producer = positioned(bus, name)

    def breaks_off(consumer, commits):
        producer._client.begin_transaction()
        for record in producer._waiting:
            producer._client.send(*record)
        producer._client.flush()
        raise errors.KafkaTimeoutError("no answer")

    monkeypatch.setattr(producer, "_transact", breaks_off)
    producer.send(f"{name}.out", None, b"once")
    with pytest.raises(BusUnavailable):
        producer.commit(consumer, {TopicPartition(name, 0): Commit(0, "done")})
    monkeypatch.undo()
    assert consumer.committed(TopicPartition(name, 0)) is None
    producer.commit(consumer, {TopicPartition(name, 0): Commit(0, "done")})
    assert values_of(read(bus.consumer([f"{name}.out"], None), 1)) == [b"once"]
    assert consumer.committed(TopicPartition(name, 0)) == Commit(0, "done")


def test_a_commit_in_the_middle_of_a_rebalance_waits_for_its_end(bus, name, monkeypatch):
    consumer, _ = positioned(bus, name)
    commit, refused = consumer._client.commit, []

    def rebalancing(offsets):
        if len(refused) < 3:
            refused.append(offsets)
            raise errors.RebalanceInProgressError
        commit(offsets)

    monkeypatch.setattr(consumer._client, "commit", rebalancing)
    consumer.commit({TopicPartition(name, 0): Commit(0, "after")})
    assert consumer.committed(TopicPartition(name, 0)) == Commit(0, "after")
    monkeypatch.setattr(
        consumer._client, "commit", lambda offsets: (_ for _ in ()).throw(errors.RebalanceInProgressError)
    )
    with pytest.raises(CommitDelayed, match="sharing out"):
        consumer.commit({TopicPartition(name, 0): Commit(0, "never")})


def test_a_join_that_ends_between_two_short_polls_is_taken_up(bus, name):
    """The library forgets one that it began since the topics had changed, as they have at a group's first start."""
    bus.create_topics({name: TopicSettings(partitions=1)})
    consumer = bus.consumer([name], name)
    settle([consumer], 1)
    coordinator = consumer._client._coordinator

    def answered() -> bool:
        if coordinator._join_task is None:  # not begun, or of before
            coordinator._assignment_snapshot = {}
            consumer.poll(0)
        return coordinator._join_task is not None and coordinator._join_task.is_done

    until(answered, "the brokers' answer")
    with pytest.raises(CommitDelayed, match="sharing out"):
        consumer.commit({TopicPartition(name, 0): Commit(0, "too early")})
    consumer.poll(1.0)
    consumer.commit({TopicPartition(name, 0): Commit(0, "after")})
    assert consumer.committed(TopicPartition(name, 0)) == Commit(0, "after")


def wait_in_a_join(consumer) -> None:
    """Until it has a name and its join waits for the other members, which do not look."""
    coordinator = consumer._client._coordinator

    def waits() -> bool:
        consumer.poll(0.05)
        join = coordinator._join_task
        return coordinator._generation.has_member_id() and join is not None and not join.is_done

    until(waits, "a join that waits")


def test_a_member_that_closes_while_it_joins_waits_for_nobody(bus, bus_settings, name, monkeypatch):
    """The brokers answer its connection in turn, and the join only when the other member looks."""
    monkeypatch.setattr("detector.bus.kafka._CLOSE_SECONDS", DEADLINE_SECONDS)
    bus.create_topics({name: TopicSettings(partitions=1)})
    staying, leaving = bus.consumer([name], name), bus.consumer([name], name)
    settle([staying], 1)
    wait_in_a_join(leaving)
    started = time.monotonic()
    leaving.close()
    assert time.monotonic() - started < 0.5 * bus_settings.kafka.request_timeout_seconds  # when the library gives up


def test_a_member_that_closes_as_soon_as_it_has_a_name_is_gone(patient_bus_factory, name):
    """Brokers name a member first and keep a place for it: whoever joins next would wait for it."""
    bus = patient_bus_factory()
    bus.create_topics({name: TopicSettings(partitions=2)})
    staying, leaving = bus.consumer([name], name), bus.consumer([name], name)
    settle([staying], 2)
    until(lambda: leaving.poll(0) or leaving._client._coordinator._join_task is not None, "a join")
    leaving.close()
    settle([staying, bus.consumer([name], name)], 2)


def test_a_member_that_cant_say_that_it_leaves_says_who_waits(bus, name, monkeypatch, caplog):
    bus.create_topics({name: TopicSettings(partitions=1)})
    staying, leaving = bus.consumer([name], name), bus.consumer([name], name)
    settle([staying], 1)
    wait_in_a_join(leaving)

    class Refusing:
        def __init__(self, **_):
            pass

        def remove_group_members(self, group, members):
            assert group == name
            return dict.fromkeys(members, errors.GroupAuthorizationFailedError)

        def close(self):
            pass

    monkeypatch.setattr(kafka, "KafkaAdminClient", Refusing)
    leaving.close()
    (said,) = [record.getMessage() for record in caplog.records if record.name == "detector.bus.kafka"]
    assert said.startswith("Left the group without a word, others take over after the session timeout: ")
    assert f"READ on topic {name} and on group {name}" in said


def test_leaving_a_group_whose_brokers_are_gone_says_so_and_leaves_no_thread_behind(bus, name, monkeypatch, caplog):
    monkeypatch.setattr("detector.bus.kafka._CLOSE_SECONDS", 1.0)
    bus.create_topics({name: TopicSettings(partitions=1)})
    staying = bus.consumer([name], name)
    settle([staying], 1)
    before = threading.active_count()
    leaving = bus.consumer([name], name)
    wait_in_a_join(leaving)
    leaving._connection = {**leaving._connection, "bootstrap_servers": ["127.0.0.1:1"]}
    leaving.close()
    assert "Left the group without a word" in caplog.text
    until(lambda: threading.active_count() <= before, "the end of all threads")


def test_a_member_that_was_never_named_says_that_it_may_be_waited_for(bus, name, monkeypatch, caplog):
    monkeypatch.setattr("detector.bus.kafka._CLOSE_SECONDS", 1.0)
    bus.create_topics({name: TopicSettings(partitions=1)})
    consumer = bus.consumer([name], name)
    coordinator = consumer._client._coordinator
    until(lambda: consumer.poll(0) or not coordinator.coordinator_unknown(), "the coordinator")
    monkeypatch.setattr(coordinator, "_join_task", Future())
    monkeypatch.setattr(coordinator, "_generation", type(coordinator._generation).NO_GENERATION)
    consumer.close()
    assert "Left the group without a word" in caplog.text


def test_a_static_member_that_closes_while_it_joins_keeps_its_place_unasked(bus, name, monkeypatch, caplog):
    bus.create_topics({name: TopicSettings(partitions=1)})
    staying, leaving = bus.consumer([name], name), bus.consumer([name], name, member_id="one")
    settle([staying], 1)
    coordinator = leaving._client._coordinator
    until(lambda: leaving.poll(0.05) or coordinator._join_task is not None, "a join")
    monkeypatch.setattr(kafka, "KafkaAdminClient", None)
    leaving.close()
    assert "Left the group" not in caplog.text


def test_members_that_never_wait_in_a_poll_share_once_and_read_all(bus, name):
    """Every answer to a join comes between two polls. Begun anew each time, joins would go on for ever."""
    bus.create_topics({name: TopicSettings(partitions=6)})
    consumers = [bus.consumer([name], name) for _ in range(3)]
    fill(bus, name, [b"%d" % n for n in range(60)])
    records = []

    def all_read() -> bool:
        for consumer in consumers:
            records.extend(consumer.poll(0))
        return len(records) >= 60 and [len(c.assignment()) for c in consumers] == [2, 2, 2]

    until(all_read, "all records and an even assignment")
    assert max(c._client.group_metadata().generation_id for c in consumers) <= 8


def test_a_fence_that_only_a_heartbeat_met_is_told_by_poll(bus, name):
    bus.create_topics({name: TopicSettings(partitions=1)})
    first = bus.consumer([name], name, member_id="one")
    settle([first], 1)
    coordinator = first._client._coordinator
    successor = bus.consumer([name], name, member_id="one")
    settle([successor], 1)
    until(lambda: not coordinator._heartbeat_enabled, "the fenced heartbeat")
    with pytest.raises(CommitFenced):
        until(lambda: bool(first.poll(0.1)), "the fence")


@pytest.mark.parametrize(("member", "generation"), [("", -1), ("another", 7)])
def test_a_member_the_group_gave_up_commits_nothing_in_nobodys_name(bus, name, monkeypatch, member, generation):
    """Brokers take a transaction's positions without a member id unasked, and those of a new id as a new member's."""
    consumer, producer = positioned(bus, name)
    metadata = consumer._client.group_metadata()
    other = type(metadata)(name, generation, member, None)
    monkeypatch.setattr(consumer._client, "group_metadata", lambda: other)
    producer.send(f"{name}.out", None, b"zombie")
    with pytest.raises(CommitFenced, match="given this member up"):
        producer.commit(consumer, {TopicPartition(name, 0): Commit(0, "zombie")})
    with pytest.raises(CommitFenced, match="given this member up"):
        consumer.commit({TopicPartition(name, 0): Commit(0, "zombie")})
    assert consumer.committed(TopicPartition(name, 0)) is None


def test_a_member_that_joined_again_does_not_go_on_with_what_it_held_before(bus, name, monkeypatch):
    bus.create_topics({name: TopicSettings(partitions=2)})
    consumer = bus.consumer([name], name)
    settle([consumer], 2)
    metadata = consumer._client.group_metadata()
    monkeypatch.setattr(consumer._client, "group_metadata", lambda: metadata._replace(member_id="another"))
    with pytest.raises(CommitFenced, match="begins anew"):
        consumer.take(frozenset({TopicPartition(name, 1)}))
    consumer.take(frozenset({TopicPartition(name, 0), TopicPartition(name, 1)}))  # all of it given anew: nothing is old
    consumer.commit({})


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_a_record_that_was_small_only_while_compressed_stops_no_detector(bus, kafka_address, name, delivery):
    environ = {
        "DETECTOR__TOPICS__CHUNKS": name,
        "DETECTOR__TOPICS__ALERTS": f"{name}.alerts",
        "DETECTOR__TOPICS__DEADLETTER": f"{name}.dead",
        "DETECTOR__TOPICS__PARTITIONS": "1",
        "DETECTOR__DAEMON__GROUP": name,
        "DETECTOR__DAEMON__DELIVERY": delivery,
    }
    settings = load_settings(None, environ)
    bus.create_topics(topic_settings(settings.topics))
    foreign = kafka.KafkaProducer(bootstrap_servers=kafka_address, compression_type="gzip", max_request_size=32 << 20)
    sizes = 3 << 20, 12 << 20
    for size_bytes in sizes:
        foreign.send(name, key=b"sensor", value=bytes(size_bytes), headers=[("of", b"theirs")]).get(30)
    foreign.close()
    metrics = Metrics(CollectorRegistry())
    session = Session(bus, settings, make_pipeline(), metrics)
    until(lambda: session.step() >= 0 and metrics.commits.labels("stored")._value.get() > 0, "a commit")
    until(lambda: session.step() >= 0 and metrics.records_in._value.get() == 2, "both records")
    session.commit()
    session.close()
    letters = read(bus.consumer([settings.topics.deadletter], None), 2)
    for letter, size_bytes in zip(letters, sizes, strict=True):
        fields = dict(letter.headers)
        assert (letter.key, fields["of"], int(fields[CUT_FROM_BYTES])) == (b"sensor", b"theirs", size_bytes)
        assert 1_000_000 < len(letter.value) < size_bytes
    successor = bus.consumer([name], name)
    settle([successor], 1)
    assert successor.committed(TopicPartition(name, 0)).offset == 2


def test_a_time_that_brokers_refuse_names_the_clock_and_blocks_nothing(bus, name):
    limited = TopicSettings(partitions=1, configs=(("message.timestamp.after.max.ms", "3600000"),))
    bus.create_topics({name: limited, f"{name}.any": topic_settings(load_settings(None, {}).topics)["audio.chunks"]})
    producer = bus.producer()
    tomorrow_ms = (time.time_ns() // 1_000_000) + 86_400_000
    producer.send(name, b"k", b"ahead", timestamp_ms=tomorrow_ms)
    with pytest.raises(BusError, match="Check this machine's clock") as told:
        producer.flush()
    assert not isinstance(told.value, BusUnavailable)
    producer.send(name, b"k", b"next")
    producer.flush()
    assert values_of(read(bus.consumer([name], None), 1)) == [b"next"]
    producer.send(f"{name}.any", b"k", b"ahead", timestamp_ms=tomorrow_ms)  # topics as the detector makes them
    producer.flush()
    assert values_of(read(bus.consumer([f"{name}.any"], None), 1)) == [b"ahead"]


def test_what_is_used_of_the_librarys_inside_is_still_there(bus, name):
    """kafka-python does not promise these; a version without them must fail here, not in a night's outage."""
    bus.create_topics({name: TopicSettings(partitions=1)})
    consumer, producer = bus.consumer([name], name), bus.producer()
    used = {
        "KafkaConsumer._net.sleep": consumer._client._net.sleep,
        "KafkaProducer._sender.force_close": producer._client._sender.force_close,
    }
    assert all(map(callable, used.values()))
    assert hasattr(consumer._client._subscription, "assignment")
    coordinator = consumer._client._coordinator
    assert coordinator.rejoining in (True, False)
    assert callable(coordinator.need_rejoin)
    assert callable(coordinator.request_rejoin)
    assert (coordinator.stable(), coordinator.coordinator_unknown(), coordinator.is_dynamic_member()) == (
        False,
        True,
        True,
    )
    assert not coordinator._generation.has_member_id()
    assert callable(coordinator.reset_generation)
    assert callable(coordinator._manager.wait_for)
    assert callable(consumer._client._net.run)
    assert producer._client._accumulator.has_incomplete in (True, False), kafka.__version__
