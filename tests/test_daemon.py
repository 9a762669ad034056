"""The loop between two topics, on a real embedded bus."""

import dataclasses
import json
import re
import sqlite3
import urllib.error
import urllib.request
from collections import Counter
from contextlib import closing, suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from detector import abandoned, daemon
from detector import alert as alerts
from detector.bus.base import Record, TopicPartition
from detector.bus.embedded import EmbeddedBus
from detector.bus.sqlite_file import OFFSET_BITS
from detector.chunk import CHUNK_SAMPLES, encode
from detector.config import load_settings
from detector.console.server import ConsoleServer
from detector.daemon import MAX_METADATA_BYTES, Backoff, Position, Session
from detector.deadletters import CUT_FROM_BYTES, headers_of, letter_of
from detector.errors import BusUnavailable, ChunkError, CommitDelayed, CommitFenced, ConfigError
from detector.metrics import Metrics
from detector.topics import topic_settings
from tests.test_pipeline import DECISION, START_NS, audio, chunks_of, feed, log_of, make_pipeline

ENVIRON = {
    "DETECTOR__TOPICS__PARTITIONS": "3",
    "DETECTOR__TOPICS__CHUNKS_RETENTION_SECONDS": "1e9",
    "DETECTOR__BATCH__MAX_WAIT_SECONDS": "0",
    "DETECTOR__DAEMON__POLL_MAX_RECORDS": "9",
    "DETECTOR__DAEMON__STREAM_IDLE_SECONDS": "86400",
    "DETECTOR__DAEMON__COMMIT_INTERVAL_SECONDS": "0.01",
}


@pytest.fixture
def bus(tmp_path):
    bus = EmbeddedBus(tmp_path / "bus.sqlite3", session_timeout_seconds=2)
    bus.create_topics(topic_settings(settings_of().topics))
    yield bus
    bus.close()


def settings_of(**more):
    return load_settings(None, {**ENVIRON, **more})


def session_of(bus, pipeline_options=None, **more):
    metrics = Metrics(CollectorRegistry())
    # a wall clock that stands where the recordings lie, since a rebuild looks back from there
    wall = START_NS / 1e9 + 60
    pipeline = make_pipeline(**(pipeline_options or {}))
    return Session(bus, settings_of(**more), pipeline, metrics, publish_clock=lambda: wall), metrics


def publish(bus, streams):
    producer = bus.producer()
    log = [c for arrival in [log_of(*streams)] for c in arrival]
    for arrival in log:
        end_ms = (arrival.chunk.captured_at_ns + 960_000_000) // 1_000_000
        producer.send("audio.chunks", *encode(arrival.chunk), timestamp_ms=end_ms)
    producer.flush()
    producer.close()


def published(bus, topic="gunfire.alerts"):
    consumer = bus.consumer([topic], None)
    records = []
    while more := consumer.poll(0.05):
        records += more
    consumer.close()
    return records


def alerts_of(bus):
    return [alerts.decode(r.key, r.value, r.headers) for r in published(bus)]


def run_dry(session):
    while session.step():
        pass
    session.commit()


def some_streams(count=4, chunks=25, seed=1):
    rng = np.random.default_rng(seed)
    return [
        chunks_of(f"s{i}", audio(rng, chunks, rng.integers(0, (chunks - 1) * CHUNK_SAMPLES, 3))) for i in range(count)
    ]


def identities(found):
    return sorted((a.alert_id, a.revision, a.state, a.peak_score) for a in found)


def expected_of(streams):
    return identities(e.alert for s in streams for e in feed(make_pipeline(), log_of(s), 1))


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(f"gunfire_{name}", labels) or 0.0


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_every_alert_is_published_and_every_chunk_accounted_for(bus, delivery):
    streams = some_streams()
    publish(bus, streams)
    session, metrics = session_of(bus, DETECTOR__DAEMON__DELIVERY=delivery)
    run_dry(session)
    session.close()
    assert identities(alerts_of(bus)) == expected_of(streams)
    assert value(metrics, "records_received_total") == value(metrics, "chunks_analysed_total") == 100
    assert value(metrics, "examples_in_progress") == 0


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
@pytest.mark.parametrize("steps_between", [1, 2, 5])
def test_a_detector_that_dies_again_and_again_loses_no_alert(bus, delivery, steps_between):
    streams = some_streams(seed=2)
    publish(bus, streams)
    for _ in range(60):
        session, _ = session_of(bus, DETECTOR__DAEMON__DELIVERY=delivery)
        ended = False
        for _ in range(steps_between + 3):  # silent reading of the rebuild takes steps too
            ended = not session.step() or ended
        session.close()  # without a commit: what was done since the last one is as if it had died
        if ended:
            break
    session, _ = session_of(bus, DETECTOR__DAEMON__DELIVERY=delivery)
    run_dry(session)
    session.close()
    found, expected = identities(alerts_of(bus)), expected_of(streams)
    assert sorted(set(found)) == expected
    if delivery == "exactly_once":
        assert found == expected


def test_a_detector_that_is_late_rebuilds_as_much_as_one_that_is_not(bus, monkeypatch):
    """Its restart must not take the state's audio for too old because it is old by the clock."""
    shots = np.arange(3 * CHUNK_SAMPLES, 190 * CHUNK_SAMPLES, 5 * CHUNK_SAMPLES + 333)
    streams = [chunks_of(f"s{i}", audio(np.random.default_rng(i), 200, shots)) for i in range(2)]
    publish(bus, streams)
    for _ in range(100):
        session, metrics = session_of(bus)
        monkeypatch.setattr(session, "_wall", lambda: START_NS / 1e9 + 200)  # the first audio is 200 s old
        while session.step() and value(metrics, "records_received_total") < 30:
            pass
        session.commit()
        session.close()
        if not value(metrics, "records_received_total"):
            break
    assert identities(alerts_of(bus)) == expected_of(streams)


def test_what_is_no_chunk_goes_to_the_dead_letters_and_stops_nothing(bus):
    streams = some_streams(2, seed=3)
    key, good, headers = encode(streams[0][0])
    producer = bus.producer()
    bad = {
        "bad_size": (key, good[:-2], headers),
        "bad_version": (key, good, (("v", b"9"), *headers[1:])),
        "missing_header": (key, good, headers[1:]),
        "missing_key": (None, good, headers),
        "bad_stream_id": (b"\xff", good, headers),
        "bad_rate": (key, good, tuple((n, b"8000" if n == "rate" else v) for n, v in headers)),
    }
    for record in bad.values():
        producer.send("audio.chunks", *record, partition=1, timestamp_ms=streams[0][0].captured_at_ns // 1_000_000)
    producer.flush()
    publish(bus, streams)
    session, metrics = session_of(bus)
    run_dry(session)
    session.close()
    letters = published(bus, "audio.deadletter")
    told = {dict(r.headers)["deadletter_reason"].decode(): r for r in letters}
    assert set(told) == set(bad)
    for reason, record in told.items():
        fields = dict(record.headers)
        assert (record.key, record.value) == bad[reason][:2]
        assert fields["deadletter_topic"] == b"audio.chunks"
        assert fields["deadletter_partition"] == b"1"
        assert fields["deadletter_offset"].isdigit()
        assert value(metrics, "chunks_rejected_total", reason=reason) == 1
    assert identities(alerts_of(bus)) == expected_of(streams)
    again, metrics = session_of(bus)
    run_dry(again)
    again.close()
    assert len(published(bus, "audio.deadletter")) == len(bad)


def test_what_is_too_large_for_the_dead_letters_is_cut_and_stops_nothing(tmp_path):
    bus = EmbeddedBus(tmp_path / "bus.sqlite3", session_timeout_seconds=2)
    made = topic_settings(settings_of().topics)
    made["audio.deadletter"] = dataclasses.replace(made["audio.deadletter"], max_message_bytes=4_000)
    bus.create_topics(made)
    streams = some_streams(1, seed=5)
    producer = bus.producer()
    producer.send("audio.chunks", b"junk", b"junk" * 2_000, (("of", b"theirs"),))
    producer.send("audio.chunks", b"j" * 5_000, b"", (("of", b"x" * 5_000),))
    producer.send("audio.chunks", b"junk", b"junk")
    producer.close()
    publish(bus, streams)
    session, _ = session_of(bus)
    run_dry(session)
    session.close()
    assert identities(alerts_of(bus)) == expected_of(streams)
    letters = {int(dict(r.headers).get(CUT_FROM_BYTES, b"-1")): r for r in published(bus, "audio.deadletter")}
    assert letters.keys() == {8_000, 0, -1}
    assert letters[8_000].value == (b"junk" * 2_000)[: len(letters[8_000].value)]
    assert 3_000 < len(letters[8_000].value) < 4_000
    assert dict(letters[8_000].headers)["of"] == b"theirs"
    assert letters[0].key == b"j" * 1_024
    assert "of" not in dict(letters[0].headers)
    bus.close()


@given(
    st.none() | st.binary(max_size=3_000),
    st.binary(max_size=3_000),
    st.binary(max_size=3_000),
    st.integers(2_000, 9_000),
)
def test_a_dead_letter_never_outgrows_its_topic(key, value, header, limit_bytes):
    record = Record("audio.chunks", 0, 1, key, value, (("of", header),), 0)
    letter = letter_of(record, ChunkError("bad_size", "m" * 900), 1, limit_bytes)
    size_bytes = len(letter[0] or b"") + len(letter[1]) + sum(len(n) + len(v) for n, v in letter[2])
    assert size_bytes <= limit_bytes
    whole = letter == (key, value, headers_of(record, ChunkError("bad_size", "m" * 900), 1))
    assert whole == (CUT_FROM_BYTES not in dict(letter[2]))


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_a_log_that_lost_its_end_is_told_and_what_comes_next_is_heard(bus, caplog, delivery):
    shots = [3 * CHUNK_SAMPLES + 4321, 9 * CHUNK_SAMPLES + 4321]
    stream = chunks_of("a", audio(np.random.default_rng(1), 12, shots))
    publish(bus, [stream[:4]])
    first, _ = session_of(bus, DETECTOR__DAEMON__DELIVERY=delivery)
    run_dry(first)
    first.close()
    assert [a.state for a in alerts_of(bus)] == ["opened"]
    consumer = bus.consumer(["audio.chunks"], "gunfire-detector")
    while not consumer.assignment():
        consumer.poll(0.05)
    (partition,) = [p for p in consumer.assignment() if consumer.committed(p)]
    known = consumer.committed(partition)
    consumer.commit({partition: dataclasses.replace(known, offset=known.offset + 100)})
    consumer.close()
    second, metrics = session_of(bus, DETECTOR__DAEMON__DELIVERY=delivery)
    run_dry(second)
    publish(bus, [stream[6:]])
    run_dry(second)
    second.close()
    assert value(metrics, "records_received_total") == value(metrics, "chunks_analysed_total") == 6
    assert value(metrics, "records_cut_total", partition=str(partition.partition)) == 100
    assert len([r for r in caplog.records if "the log ends at 4 and was read up to 104" in r.getMessage()]) == 1
    told = [(a.state, a.close_reason) for a in alerts_of(bus)]
    assert told[:3] == [("opened", None), ("closed", "gap"), ("opened", None)]
    caplog.clear()
    third, metrics = session_of(bus, DETECTOR__DAEMON__DELIVERY=delivery)
    run_dry(third)
    third.close()
    assert not [r for r in caplog.records if "the log ends" in r.getMessage()]


def test_what_retention_dropped_unheard_is_counted_and_told_once(bus, caplog):
    streams = some_streams(1, chunks=20, seed=5)
    publish(bus, [streams[0][:10]])
    first, _ = session_of(bus)
    run_dry(first)
    first.close()
    publish(bus, [streams[0][10:]])
    with closing(sqlite3.connect(bus._path)) as db, db:  # retention, 15 records of the stream's partition
        (log_id,) = db.execute("SELECT log_id FROM logs WHERE next_offset=20").fetchone()
        db.execute("DELETE FROM records WHERE id < ?", ((log_id << OFFSET_BITS) + 15,))
        db.execute("UPDATE logs SET oldest_offset=15 WHERE log_id=?", (log_id,))
    totals = []
    for _ in range(2):
        session, metrics = session_of(bus)
        run_dry(session)
        session.close()
        totals += [sum(s.value for m in metrics.lost_records.collect() for s in m.samples if s.name.endswith("_total"))]
        totals += [value(metrics, "records_received_total")]
    assert totals == [5, 5, 0, 0]
    assert len([r for r in caplog.records if "records 10 to 14 (5) before they were read" in r.getMessage()]) == 1


def test_partitions_move_between_detectors_without_a_loss(bus):
    streams = some_streams(6, seed=4)
    publish(bus, [s[:12] for s in streams])
    first, _ = session_of(bus, DETECTOR__DAEMON__DELIVERY="at_least_once")
    run_dry(first)
    second, _ = session_of(bus)
    while not second._consumer.assignment():
        first.step()
        second.step()
    publish(bus, [s[12:] for s in streams])
    idle = 0
    while idle < 4:
        idle = 0 if first.step() + second.step() else idle + 1
    assert first._consumer.assignment()
    first.close()
    second.commit()
    second.close()
    found = identities(alerts_of(bus))
    assert sorted(set(found)) == expected_of(streams)


def test_a_record_of_a_partition_taken_away_is_left_to_its_new_owner(bus):
    publish(bus, some_streams(1))
    session, metrics = session_of(bus)
    gathered = []
    while not gathered:
        gathered = session._poll(0.2, 9)
    session._poll = lambda timeout, count: gathered
    session._consumer.assignment = lambda: frozenset()
    session.step()
    assert value(metrics, "records_received_total") == 0
    session.close()


keys = st.binary(min_size=6, max_size=6)
samples = st.integers(0, 2**39).map(lambda k: k * 7_680 - 240)


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.dictionaries(keys, samples, max_size=200), st.booleans())
def test_a_position_survives_its_text(read_from, at_ms, since, feed_rest):
    position = Position(read_from, at_ms, "0123456789abcdef", since, feed_rest)
    assert Position.from_text(position.to_text()) == position


def test_a_position_never_outgrows_what_a_commit_may_hold():
    text = Position(2**50, 2**41, "f" * 16, {i.to_bytes(6, "big"): 7_440 for i in range(1000)}).to_text()
    assert len(text.encode()) <= MAX_METADATA_BYTES
    kept = Position.from_text(text)
    assert 250 < len(kept.since) < 1000
    assert kept.feed_rest


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "{}", '{"v":3}', '{"v":2,"from":1}', "[]",
        '{"v":2,"from":1,"at_ms":2,"served":"","since":"AA==","feed_rest":false}',
    ],
)  # fmt: skip
def test_a_foreign_position_is_not_taken_for_ours(text):
    assert Position.from_text(text) is None


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_alerts_of_another_model_are_closed_once_and_not_gone_on_with(bus, delivery):
    shot = 5 * CHUNK_SAMPLES + 4321
    stream = chunks_of("a", audio(np.random.default_rng(1), 12, [shot]))
    publish(bus, [stream[:6]])
    first, _ = session_of(bus, DETECTOR__DAEMON__DELIVERY=delivery)
    run_dry(first)
    first.close()
    publish(bus, [stream[6:]])
    for _ in range(3):
        later, _ = session_of(
            bus, {"decision": dataclasses.replace(DECISION, open_threshold=0.7)}, DETECTOR__DAEMON__DELIVERY=delivery
        )
        run_dry(later)
        later.close()
    opened, closed = alerts_of(bus)
    assert (opened.state, closed.state, closed.close_reason) == ("opened", "closed", "model_changed")
    assert (closed.alert_id, closed.revision) == (opened.alert_id, opened.revision + 1)
    assert closed.ended_sample == opened.decided_sample
    assert closed.ended_at_ns - opened.onset_at_ns == (closed.ended_sample - opened.onset_sample) * 62_500
    assert closed.threshold == opened.threshold
    headers = [dict(r.headers)["ce_served"] for r in published(bus)]
    assert headers[0] == headers[1]


def test_alerts_closed_already_are_not_closed_again_by_another_model(bus):
    stream = chunks_of("a", audio(np.random.default_rng(1), 12, [5 * CHUNK_SAMPLES + 4321]))
    publish(bus, [stream])
    first, _ = session_of(bus)
    run_dry(first)
    first.close()
    second, _ = session_of(bus, {"decision": dataclasses.replace(DECISION, open_threshold=0.7)})
    run_dry(second)
    second.close()
    assert [a.state for a in alerts_of(bus)] == ["opened", "closed"]


OVERLOADED = {"DETECTOR__DAEMON__MAX_LAG_SECONDS": "10", "DETECTOR__DAEMON__OVERLOAD": "skip_to_latest"}


def late_session(bus, monkeypatch, **settings):
    """One that has read 9 records of 200 and then looks at its lag."""
    session, metrics = session_of(bus, **settings)
    while not session.step():
        pass
    session._last_gauges = -1e9
    monkeypatch.setattr(session, "_wall", lambda: START_NS / 1e9 + 3600)
    return session, metrics


def test_what_another_model_left_open_in_many_partitions_is_looked_up_once(bus, monkeypatch):
    shot = 5 * CHUNK_SAMPLES + 4321
    streams = [chunks_of(f"s{i}", audio(np.random.default_rng(i), 12, [shot])) for i in range(6)]
    publish(bus, [s[:6] for s in streams])
    first, _ = session_of(bus)
    run_dry(first)
    first.close()
    publish(bus, [s[6:] for s in streams])
    looks = []
    find_open = abandoned.find_open
    monkeypatch.setattr(abandoned, "find_open", lambda *args: looks.append(args) or find_open(*args))
    second, _ = session_of(bus, {"decision": dataclasses.replace(DECISION, open_threshold=0.7)})
    run_dry(second)
    second.close()
    told = alerts_of(bus)
    opened = {a.alert_id: a.audio.partition for a in told if a.state == "opened"}
    assert len(opened) == 6
    assert len(set(opened.values())) > 1
    assert [a.close_reason for a in told if a.state == "closed"] == ["model_changed"] * 6
    assert len(looks) == 1


def told_by_stream(caplog):
    """Chunks of each stream that the log says were left out."""
    told = Counter()
    for record in caplog.records:
        for stream, count in re.findall(r"(\S+) (\d+) chunks \(", record.getMessage()):
            told[stream] += int(count)
    return told


def left_out_of(bus, caplog):
    """Chunks of each stream in the stretches that the log says were left out; what is told twice counts as often."""
    records = {(r.partition, r.offset): r for r in published(bus, "audio.chunks")}
    found = Counter()
    for first, last, partition in re.findall(
        r"Lost coverage, records (\d+) to (\d+) of audio.chunks\[(\d)\]", caplog.text
    ):
        for offset in range(int(first), int(last) + 1):
            record = records[int(partition), offset]
            found[record.key.decode()] += record.value != b"junk"
    return found


def failing(*_):
    raise BusUnavailable("away")


def delayed(*_):
    raise CommitDelayed("the group shares out anew")


def step_late(session):
    """A step that looks at the lag."""
    session._last_gauges = -1e9
    return session.step()


ACCOUNT = ("records_received_total", "records_skipped_total", "chunks_analysed_total", "chunks_duplicate_total",
           "chunks_skipped_total", "records_skipped_unread_total", "chunks_missing_total")  # fmt: skip


def account_of(*all_metrics):
    """The sum over processes of what each told last; it must balance."""
    sums = {name.removesuffix("_total"): sum(value(m, name) for m in all_metrics) for name in ACCOUNT}
    sums["chunks_rejected"] = sum(
        sample.value
        for m in all_metrics
        for family in m.rejected.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    )
    assert sums["records_received"] == sums["chunks_analysed"] + sums["chunks_duplicate"] + sums["chunks_rejected"], (
        sums
    )
    assert sums["records_skipped"] == sums["chunks_skipped"] + sums["records_skipped_unread"], sums
    return sums


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_overload_leaves_out_what_waits_and_says_of_which_stream_how_much(bus, monkeypatch, caplog, delivery):
    streams = some_streams(2, chunks=60, seed=6)
    publish(bus, [s[:50] for s in streams])
    session, metrics = late_session(bus, monkeypatch, **OVERLOADED, DETECTOR__DAEMON__DELIVERY=delivery)
    while step_late(session):
        pass
    session.commit()
    account = account_of(metrics)
    skipped = account["records_skipped"]
    assert skipped > 50
    assert account["records_received"] + skipped == 100
    assert session._pipeline.open_alert_count == 0
    monkeypatch.setattr(session, "_wall", lambda: START_NS / 1e9 + 60)
    publish(bus, [s[50:] for s in streams])
    run_dry(session)
    session.close()
    account = account_of(metrics)
    assert account["records_received"] + skipped == 120
    assert account["chunks_skipped"] == skipped == told_by_stream(caplog).total()
    assert account["chunks_missing"] == 0
    assert value(metrics, "stream_resets_total", reason="overload") >= 1


def some_mess(bus, count, chunks, twice=True):
    """Publish streams with gaps, junk between them, and chunks that come twice. Return how many of which."""
    streams = some_streams(count, chunks=chunks, seed=8)
    sent = Counter()
    producer = bus.producer()
    for arrival in log_of(*streams):
        chunk = arrival.chunk
        if chunk.seq % 13 == 5:  # never came
            continue
        for _ in range(2 if twice and chunk.seq % 7 == 3 else 1):
            producer.send("audio.chunks", *encode(chunk), timestamp_ms=chunk.captured_at_ns // 1_000_000)
            sent["records"] += 1
        if chunk.seq % 5 == 0:
            producer.send("audio.chunks", chunk.stream_id.encode(), b"junk", timestamp_ms=START_NS // 1_000_000)
            sent["records"] += 1
            sent["junk"] += 1
        sent["chunks"] += 1
    producer.close()
    return sent


@pytest.mark.parametrize(("delivery", "tell_seconds"), [("at_least_once", 0.0), ("exactly_once", 1e9)])
def test_the_account_balances_to_the_record_however_often_an_overloaded_detector_dies(
    bus, monkeypatch, caplog, delivery, tell_seconds
):
    """Also where it never lives to hear a stream again after leaving it out, and never heard it before."""
    monkeypatch.setattr(daemon, "_TELL_SECONDS", tell_seconds)
    sent = some_mess(bus, count=5, chunks=40, twice=False)
    options = {**OVERLOADED, "DETECTOR__DAEMON__DELIVERY": delivery}
    everyone = []
    for life in range(20):
        session, metrics = late_session(bus, monkeypatch, **options)
        everyone.append(metrics)
        for _ in range(2 + life % 4):
            step_late(session)
        if life % 2:  # it dies before its last commit, having told what it leaves out
            monkeypatch.setattr(session._producer, "commit", failing)
            with suppress(BusUnavailable):
                step_late(session)
                session.finish()
        session.close()
    session, metrics = late_session(bus, monkeypatch, **options)
    run_dry(session)
    session.finish()
    session.close()
    account = account_of(*everyone, metrics)
    assert account["records_received"] + account["records_skipped"] == sent["records"]
    assert account["chunks_rejected"] == sent["junk"]
    assert account["chunks_analysed"] + account["chunks_skipped"] == sent["chunks"]
    assert account["chunks_skipped"] >= 10
    assert told_by_stream(caplog) == left_out_of(bus, caplog)
    assert sum(value(m, "records_uncommitted_total") for m in everyone) > 0
    assert len(published(bus, "audio.deadletter")) >= sent["junk"]
    if delivery == "exactly_once":
        assert len(published(bus, "audio.deadletter")) == sent["junk"]


def test_closings_committed_meanwhile_do_not_pass_over_what_is_left_out_and_not_told(bus, monkeypatch):
    """A stream is lost while others are left out; then the detector dies before it told of those."""
    monkeypatch.setattr(daemon, "_TELL_SECONDS", 1e9)
    late = chunks_of("late", audio(np.random.default_rng(2), 50))
    publish(bus, [late[:1]])
    (busy,) = {r.partition for r in published(bus, "audio.chunks")}
    producer = bus.producer()
    for chunk in chunks_of("quiet", audio(np.random.default_rng(1), 4, [3 * CHUNK_SAMPLES + 4321])):
        producer.send("audio.chunks", *encode(chunk), partition=(busy + 1) % 3)
    producer.close()
    options = {**OVERLOADED, "DETECTOR__DAEMON__STREAM_IDLE_SECONDS": "300"}
    session, metrics = session_of(bus, {"idle_seconds": 300.0}, **options)
    run_dry(session)
    publish(bus, [late[1:]])
    while not session.step():
        pass
    monkeypatch.setattr(session, "_wall", lambda: START_NS / 1e9 + 3600)
    step_late(session)
    step_late(session)
    session._pipeline._streams["quiet"].newest = dataclasses.replace(
        session._pipeline._streams["quiet"].newest, seen_seconds=-1e9
    )
    session._last_sweep = -1e9
    step_late(session)
    assert "stream_lost" in {a.close_reason for a in alerts_of(bus)}
    assert session._left_out
    session.close()
    again, more = session_of(bus)
    run_dry(again)
    again.close()
    account = account_of(metrics, more)
    assert account["records_received"] + account["records_skipped"] == 54


def test_what_a_detector_gets_back_uncommitted_counts_once(bus, monkeypatch):
    publish(bus, some_streams(3, chunks=20, seed=6))
    session, metrics = session_of(bus)
    store = session._producer.commit
    monkeypatch.setattr(session._producer, "commit", delayed)
    while not session._consumer.assignment() or session.step():
        session._consumer.assignment() or session.step()
    partitions = session._consumer.assignment()
    session._revoked(session._consumer, partitions)
    monkeypatch.setattr(session._producer, "commit", store)
    session._assigned(session._consumer, partitions)
    for partition in partitions:
        session._consumer.seek(partition, 0)
    run_dry(session)
    session.close()
    assert account_of(metrics)["records_received"] == 60
    assert value(metrics, "records_uncommitted_total") == 60


def test_what_is_missing_and_what_comes_twice_is_told_in_a_stretch_that_is_left_out_too(bus, monkeypatch):
    stream = chunks_of("a", audio(np.random.default_rng(1), 60, []))
    del stream[40:43]
    publish(bus, [[*stream[:50], *stream[44:46], *stream[50:]]])
    session, metrics = late_session(bus, monkeypatch, **OVERLOADED)
    while step_late(session):
        pass
    session.finish()
    session.close()
    account = account_of(metrics)
    assert account["chunks_missing"] == 3
    assert account["chunks_duplicate"] == 2
    assert account["chunks_analysed"] + account["chunks_skipped"] == 57


def test_a_commit_that_is_delayed_tells_and_counts_what_was_left_out_once(bus, monkeypatch, caplog):
    monkeypatch.setattr(daemon, "_TELL_SECONDS", 0.0)
    publish(bus, some_streams(2, chunks=60, seed=6))
    session, metrics = late_session(bus, monkeypatch, **OVERLOADED)
    store, failures = session._producer.commit, iter([True, True, False] * 100)

    def commit(*commits):
        if next(failures):
            raise CommitDelayed("the group shares out anew")
        store(*commits)

    monkeypatch.setattr(session._producer, "commit", commit)
    while step_late(session):
        pass
    session.finish()
    session.close()
    account = account_of(metrics)
    assert account["records_received"] + account["records_skipped"] == 120
    assert told_by_stream(caplog).total() == account["chunks_skipped"] > 50


def test_where_even_looking_at_what_is_left_out_takes_too_long_the_rest_is_passed_over(bus, monkeypatch, caplog):
    streams = some_streams(2, chunks=210, seed=6)
    publish(bus, [s[:200] for s in streams])
    session, metrics = late_session(bus, monkeypatch, **OVERLOADED)
    clock = iter(range(0, 10**6, 2))
    monkeypatch.setattr(session, "_monotonic", lambda: next(clock) * 0.25)  # each look at the clock takes a while
    while step_late(session):
        pass
    session.commit()
    monkeypatch.setattr(session, "_wall", lambda: START_NS / 1e9 + 60)
    publish(bus, [s[200:] for s in streams])
    run_dry(session)
    session.finish()
    session.close()
    account = account_of(metrics)
    assert account["records_received"] + account["records_skipped"] == 420
    assert account["records_skipped_unread"] > 100
    assert account["chunks_skipped"] == told_by_stream(caplog).total() > 0
    assert account["chunks_missing"] == 0  # nobody knows what was in there
    unread = [int(n) for n in re.findall(r"\((\d+)\) are left out unread", caplog.text)]
    assert sum(unread) == account["records_skipped_unread"]


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_what_a_failing_bus_makes_a_detector_read_again_counts_once(bus, monkeypatch, delivery):
    sent = some_mess(bus, count=4, chunks=25)
    options = {"DETECTOR__DAEMON__DELIVERY": delivery}
    everyone = []
    for life in range(12):
        session, metrics = session_of(bus, **options)
        everyone.append(metrics)
        store, lives = session._producer.commit, iter(range(1 + life % 3))

        def commit(*commits, store=store, lives=lives):
            if next(lives, None) is None:
                failing()
            store(*commits)

        monkeypatch.setattr(session._producer, "commit", commit)
        with suppress(BusUnavailable):
            run_dry(session)
        session.close()
    session, metrics = session_of(bus, **options)
    run_dry(session)
    session.close()
    account = account_of(*everyone, metrics)
    assert account["records_received"] == sent["records"]
    assert account["chunks_rejected"] == sent["junk"]
    assert account["chunks_analysed"] == sent["chunks"]
    assert sum(value(m, "deadletters_published_total") for m in (*everyone, metrics)) == sent["junk"]
    assert all(value(m, "records_uncommitted_total") > 0 for m in everyone[:5])
    assert sum(value(m, "records_reread_total") for m in everyone) > 0


def test_a_partition_that_moves_while_it_is_left_out_is_accounted_for_once(bus, monkeypatch, caplog):
    publish(bus, some_streams(6, chunks=60, seed=4))
    first, first_metrics = late_session(bus, monkeypatch, **OVERLOADED)
    step_late(first)
    second, second_metrics = session_of(bus, **OVERLOADED)
    while not second._consumer.assignment():
        step_late(first)
        second.step()
    monkeypatch.setattr(second, "_wall", lambda: START_NS / 1e9 + 3600)
    idle = 0
    while idle < 4:
        idle = 0 if step_late(first) + step_late(second) else idle + 1
    for session in (first, second):
        session.finish()
        session.close()
    account = account_of(first_metrics, second_metrics)
    assert account["records_received"] + account["records_skipped"] == 360
    assert told_by_stream(caplog).total() == account["chunks_skipped"] > 100


def test_an_alert_that_is_open_when_audio_is_left_out_is_closed_for_overload(bus, monkeypatch):
    fire = np.arange(2 * CHUNK_SAMPLES, 58 * CHUNK_SAMPLES, 9000)
    publish(bus, [chunks_of("a", audio(np.random.default_rng(1), 60, fire))])
    session, _ = late_session(bus, monkeypatch, **OVERLOADED)
    run_dry(session)
    session.finish()
    session.close()
    assert [a.close_reason for a in alerts_of(bus) if a.state == "closed"] == ["overload"]
    again, metrics = session_of(bus)
    run_dry(again)
    again.close()
    assert value(metrics, "records_received_total") == 0  # what was left out stays so


def test_overload_that_may_not_skip_warns_and_hears_everything(bus, monkeypatch, caplog):
    streams = some_streams(2, chunks=50, seed=6)
    publish(bus, streams)
    session, metrics = late_session(bus, monkeypatch, DETECTOR__DAEMON__MAX_LAG_SECONDS="10")
    while session.step():
        session._last_gauges = -1e9
    session.commit()
    session.close()
    assert identities(alerts_of(bus)) == expected_of(streams)
    assert value(metrics, "records_skipped_total") == 0
    assert len([r for r in caplog.records if "Overloaded" in r.getMessage()]) == 1


def test_a_producer_whose_clock_is_wrong_does_not_make_its_neighbours_late(bus, monkeypatch):
    publish(bus, some_streams(2, chunks=3))
    session, metrics = session_of(bus, **OVERLOADED, DETECTOR__DAEMON__POLL_MAX_RECORDS="5")
    while not session.step():
        pass
    session._last_gauges = -1e9
    monkeypatch.setattr(session, "_wall", lambda: START_NS / 1e9 + 86_400)
    run_dry(session)
    session.close()
    assert value(metrics, "records_skipped_total") == 0


def test_a_flood_of_junk_is_counted_whole_and_told_in_few_lines(bus, caplog):
    producer = bus.producer()
    for _ in range(300):
        producer.send("audio.chunks", b"junk", b"junk", partition=0)
    producer.close()
    session, metrics = session_of(bus)
    run_dry(session)
    now = session._monotonic() + 11
    session._rejections._clock = lambda: now
    fill = bus.producer()
    fill.send("audio.chunks", b"junk", b"junk", partition=0)
    fill.close()
    run_dry(session)
    session.close()
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Rejected")]
    assert len(told) == 2
    assert "(299 more of this kind before it.)" in told[1]
    assert value(metrics, "chunks_rejected_total", reason="missing_header") == 301
    assert len(published(bus, "audio.deadletter")) == 301


def test_sessions_that_fail_come_back_later_and_later_until_one_holds(monkeypatch):
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    backoff = Backoff()
    assert [backoff.seconds(1.0) for _ in range(7)] == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0]
    assert [backoff.seconds(60.0), backoff.seconds(1.0)] == [0.5, 1.0]


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_outputs_of_partitions_that_were_lost_are_left_to_their_new_owner(bus, monkeypatch, delivery):
    streams = some_streams(4, seed=7)
    publish(bus, streams)
    session, _ = session_of(bus, DETECTOR__DAEMON__DELIVERY=delivery, DETECTOR__DAEMON__COMMIT_INTERVAL_SECONDS="30")
    monkeypatch.setattr(session, "commit", lambda: None)
    while not session._unsaid:
        session.step()
    monkeypatch.undo()

    def lost(consumer, commits):
        raise CommitFenced("lost")

    monkeypatch.setattr(session._producer, "commit", lost)
    mine = session._consumer.assignment()
    if delivery == "exactly_once":  # what waits to be sent can't be told from what is lost: the session ends
        with pytest.raises(CommitFenced):
            session._revoked(session._consumer, mine)
    else:
        session._revoked(session._consumer, mine)
    monkeypatch.undo()
    session.close()
    second, _ = session_of(bus, DETECTOR__DAEMON__DELIVERY=delivery)
    run_dry(second)
    second.close()
    found = identities(alerts_of(bus))
    assert sorted(set(found)) == expected_of(streams)
    if delivery == "exactly_once":
        assert found == expected_of(streams)


def test_two_detectors_of_one_host_name_and_process_id_do_not_fence_each_other(bus, monkeypatch):
    asked = []
    producer_of = bus.producer
    monkeypatch.setattr(
        bus, "producer", lambda *, transactional_id=None: asked.append(transactional_id) or producer_of()
    )
    for member in (None, None, "m", "m"):
        settings = settings_of(DETECTOR__DAEMON__DELIVERY="exactly_once")
        Session(bus, settings, make_pipeline(), Metrics(CollectorRegistry()), member=member).close()
    assert len({*asked}) == 3
    assert asked[2] == asked[3] == "gunfire-detector.m"
    assert all(name.startswith("gunfire-detector.") for name in asked)


def test_a_lost_streams_alert_is_closed_once_however_often_the_detector_restarts(bus):
    publish(bus, [chunks_of("a", audio(np.random.default_rng(1), 6, [5 * CHUNK_SAMPLES + 4321]))])
    for _ in range(3):
        session, _ = session_of(bus, {"idle_seconds": 0.0}, DETECTOR__DAEMON__DELIVERY="exactly_once")
        run_dry(session)
        session._last_sweep = -1e9
        run_dry(session)
        session.close()
    assert [(a.state, a.close_reason) for a in alerts_of(bus)] == [("opened", None), ("closed", "stream_lost")]


def test_records_gathered_before_a_partition_came_back_are_read_again_instead(bus):
    streams = [chunks_of("a", audio(np.random.default_rng(1), 12, [5 * CHUNK_SAMPLES + 4321]))]
    publish(bus, streams)
    session, _ = session_of(bus, DETECTOR__DAEMON__POLL_MAX_RECORDS="500")
    gathered = []
    while not gathered:
        gathered = session._poll(0.2, 4)
    consumer, mine = session._consumer, session._consumer.assignment()
    session._revoked(consumer, mine)  # taken away and given back between two polls
    session._assigned(consumer, mine)
    for partition in mine:
        consumer.seek(partition, 0)
    poll, session._poll = session._poll, lambda timeout, count: gathered
    session.step()
    session._poll = poll
    run_dry(session)
    session.close()
    assert identities(alerts_of(bus)) == expected_of(streams)


def test_a_flood_of_large_junk_does_not_outgrow_a_transaction(bus):
    streams = some_streams(1, seed=5)
    producer = bus.producer()
    for _ in range(10):
        producer.send("audio.chunks", b"junk", bytes(7 << 20))
        producer.flush()
    producer.close()
    publish(bus, streams)
    exactly_once = {"DETECTOR__DAEMON__DELIVERY": "exactly_once", "DETECTOR__DAEMON__POLL_MAX_RECORDS": "500"}
    session, _ = session_of(bus, **exactly_once)
    run_dry(session)
    session.close()
    assert len(published(bus, "audio.deadletter")) == 10
    assert identities(alerts_of(bus)) == expected_of(streams)


def test_a_failing_commit_is_counted_and_ends_the_session(bus, monkeypatch):
    publish(bus, some_streams(1))
    session, metrics = session_of(bus)

    def away(consumer, commits):
        raise BusUnavailable("gone")

    monkeypatch.setattr(session._producer, "commit", away)
    with pytest.raises(BusUnavailable):
        run_dry(session)
    assert value(metrics, "commits_total", outcome="failed") == 1
    session.close()


def test_a_commit_that_a_rebalance_delays_ends_no_session_and_doubles_nothing(bus, monkeypatch):
    streams = some_streams(2, chunks=10, seed=5)
    publish(bus, streams)
    session, metrics = session_of(bus, DETECTOR__DAEMON__DELIVERY="at_least_once")
    commit, delays = session._consumer.commit, iter(range(3))

    def delayed(commits):
        if next(delays, None) is not None:
            raise CommitDelayed("sharing out")
        commit(commits)

    monkeypatch.setattr(session._consumer, "commit", delayed)
    while session.step():
        pass
    session.finish()
    session.close()
    assert value(metrics, "commits_total", outcome="delayed") == 3
    again, metrics = session_of(bus)
    run_dry(again)
    again.close()
    assert value(metrics, "records_received_total") == 0
    assert identities(alerts_of(bus)) == expected_of(streams)


@pytest.fixture
def console():
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    state = {"ok": True}
    server = ConsoleServer("127.0.0.1", 0, registry, live=lambda: {"ok": True}, ready=lambda: dict(state))
    yield f"http://127.0.0.1:{server.address[1]}", metrics, state
    server.close()


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as e:
        with e:
            return e.code, e.read().decode()


def test_the_console_tells_metrics_liveness_and_readiness(console):
    url, metrics, state = console
    metrics.rejected.labels("bad_size").inc(3)
    assert 'gunfire_chunks_rejected_total{reason="bad_size"} 3.0' in get(url + "/metrics")[1]
    assert get(url + "/livez")[0] == 200
    assert get(url + "/readyz")[0] == 200
    state.update(ok=False, missing=["model"])
    code, body = get(url + "/readyz")
    assert (code, json.loads(body)) == (503, {"ok": False, "missing": ["model"]})
    assert get(url + "/secret")[0] == 404


def test_a_port_that_is_taken_is_named(console):
    port = int(console[0].rpartition(":")[2])
    with pytest.raises(ConfigError, match=rf"console\.port.*:{port}"):
        ConsoleServer("127.0.0.1", port, CollectorRegistry(), live=dict, ready=dict)


def test_partitions_are_named_tuples_so_that_logs_can_name_them():
    assert "%s[%d]" % TopicPartition("audio.chunks", 3) == "audio.chunks[3]"  # noqa: UP031
