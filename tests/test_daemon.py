"""The loop between two topics, on a real embedded bus."""

import dataclasses
import json
import urllib.error
import urllib.request

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from detector import alert as alerts
from detector.bus.base import TopicPartition
from detector.bus.embedded import EmbeddedBus
from detector.chunk import CHUNK_SAMPLES, encode
from detector.config import load_settings
from detector.console.server import ConsoleServer
from detector.daemon import MAX_METADATA_BYTES, Position, Session, topic_settings
from detector.errors import BusUnavailable, ConfigError
from detector.metrics import Metrics
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


def test_alerts_of_another_model_are_not_gone_on_with(bus):
    shot = 5 * CHUNK_SAMPLES + 4321
    stream = chunks_of("a", audio(np.random.default_rng(1), 12, [shot]))
    publish(bus, [stream[:6]])
    first, _ = session_of(bus)
    run_dry(first)
    first.close()
    publish(bus, [stream[6:]])
    decision = dataclasses.replace(DECISION, open_threshold=0.7)
    second, _ = session_of(bus, {"decision": decision})
    run_dry(second)
    second.close()
    assert [a.state for a in alerts_of(bus)] == ["opened"]


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
