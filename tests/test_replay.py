"""An alert once more, from the log: the same to the last digit, or what differs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
import uuid
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from detector import alert as alerts
from detector.__main__ import main
from detector.audio import float_to_int16
from detector.bus import open_bus
from detector.bus.base import TopicSettings
from detector.chunk import CHUNK_SAMPLES, Chunk, encode
from detector.cli import time_ns
from detector.commands_replay import bar, report, served_with, states_of
from detector.config import BusSettings, EmbeddedBusSettings, KafkaSettings, load_settings
from detector.daemon import Session, topic_settings
from detector.decision import Decision, DecisionSettings, ScoredExample
from detector.errors import GunfireError
from detector.metrics import Metrics
from detector.onset import Onset
from detector.pipeline import Pipeline
from detector.replay import (
    Outcome,
    Served,
    quiet_samples_to_forget,
    read_published,
    replay_alert,
    replay_time,
    write_wav,
)
from tests.bus.conftest import kafka_address  # noqa: F401 - a fixture
from tests.scorers import CrestScorer
from tests.sounds import noise_with_shots
from tests.test_pipeline import CHUNK_NS, DECISION, START_NS, audio, chunks_of, make_pipeline


class Place:
    """A bus with topics of a test's own, and what a detector made of them."""

    def __init__(self, bus_settings: BusSettings, **more: str) -> None:
        name = uuid.uuid4().hex[:8]
        environ = {
            "DETECTOR__TOPICS__CHUNKS": f"chunks-{name}",
            "DETECTOR__TOPICS__ALERTS": f"alerts-{name}",
            "DETECTOR__TOPICS__DEADLETTER": f"dead-{name}",
            "DETECTOR__TOPICS__PARTITIONS": "2",
            "DETECTOR__TOPICS__CHUNKS_RETENTION_SECONDS": "1e9",
            "DETECTOR__DAEMON__GROUP": f"group-{name}",
            "DETECTOR__DAEMON__POLL_MAX_RECORDS": "37",
            "DETECTOR__DAEMON__STREAM_IDLE_SECONDS": "86400",
            "DETECTOR__BATCH__MAX_WAIT_SECONDS": "0",
            **more,
        }
        self.environ = environ
        self.sent = self.taken = 0
        self.settings = load_settings(None, environ).model_copy(update={"bus": bus_settings})
        self.topics = self.settings.topics
        self.bus = open_bus(bus_settings)
        self.bus.create_topics(topic_settings(self.topics))

    def send(self, *streams: list[Chunk]) -> None:
        producer = self.bus.producer()
        for chunk in (c for group in itertools.zip_longest(*streams) for c in group if c is not None):
            producer.send(self.topics.chunks, *encode(chunk), partition=0)
            self.sent += 1
        producer.flush()
        producer.close()

    def serve(self, pipeline: Pipeline | None = None) -> Session:
        """Let a detector take all that was sent."""
        metrics = Metrics(CollectorRegistry())
        session = Session(self.bus, self.settings, pipeline or make_pipeline(), metrics)
        deadline = time.monotonic() + 60
        while self.taken + metrics.records_in._value.get() < self.sent:
            session.step()
            assert time.monotonic() < deadline
        self.taken = self.sent
        session.commit()
        return session

    def published(self) -> list[alerts.Alert]:
        return [p.alert for p in read_published(self.bus, self.topics.alerts, lambda alert: True)]

    def ids(self) -> list[str]:
        return list(dict.fromkeys(a.alert_id for a in self.published()))

    def replay(self, alert: str, served: Served, back_seconds: float = 600.0) -> Outcome:
        return replay_alert(
            self.bus,
            alerts_topic=self.topics.alerts,
            chunks_topic=self.topics.chunks,
            alert=alert,
            served=served,
            back_seconds=back_seconds,
        )

    def replay_time(self, stream: str, first: float, last: float, served: Served) -> Outcome:
        """From chunk ``first`` to chunk ``last`` of the recording."""
        return replay_time(
            self.bus,
            alerts_topic=self.topics.alerts,
            chunks_topic=self.topics.chunks,
            stream=stream,
            from_ns=START_NS + int(first * CHUNK_NS),
            to_ns=START_NS + int(last * CHUNK_NS),
            served=served,
            back_seconds=600,
        )


def served_by(**options: Any) -> Served:
    return served_with(lambda observer: make_pipeline(observer=observer, **options), idle_seconds=300)


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[Place]:
    place = Place(BusSettings(kind="embedded", embedded=EmbeddedBusSettings(path=tmp_path / "bus.sqlite3")))
    yield place
    place.bus.close()


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    if request.param == "embedded":
        yield request.getfixturevalue("embedded")
        return
    address = request.getfixturevalue("kafka_address")
    found = Place(BusSettings(kind="kafka", kafka=KafkaSettings(bootstrap_servers=(address,))))
    yield found
    found.bus.close()


def kinds(outcome: Outcome) -> set[str]:
    return {d.kind for d in outcome.differences}


def text(outcome: Outcome) -> str:
    return "\n".join(d.text for d in outcome.differences)


def one_shot(stream: str = "a", chunks: int = 40, at: int = 20, seed: int = 1) -> list[Chunk]:
    return chunks_of(stream, audio(np.random.default_rng(seed), chunks, [at * CHUNK_SAMPLES + 4321]))


def busy(count: int, chunks: int, seed: int) -> list[list[Chunk]]:
    """Streams with shots close to one another; the last one fires for longer than an alert may last."""
    rng = np.random.default_rng(seed)
    shots = [np.sort(rng.integers(0, (chunks - 2) * CHUNK_SAMPLES, chunks // 8)) for _ in range(count - 1)]
    shots.append(np.arange(12 * CHUNK_SAMPLES, (chunks - 4) * CHUNK_SAMPLES, 7_000))
    return [chunks_of(f"s{i}", audio(rng, chunks, s)) for i, s in enumerate(shots)]


@pytest.mark.parametrize(
    "options", [{"hold_seconds": 0.0}, {"hop_seconds": 0.48}, {"cooldown_seconds": 4.0}, {"min_support": 2}]
)
def test_each_alert_is_reproduced_whatever_came_before_it(embedded, options):
    hop = {"hop_seconds": options["hop_seconds"]} if "hop_seconds" in options else {}
    more = {k: v for k, v in options.items() if k != "hop_seconds"}
    if "min_support" in more:
        more["support_window_examples"] = 3
    decision = dataclasses.replace(DECISION, **more)
    embedded.send(*busy(3, 90, seed=3))
    embedded.serve(make_pipeline(decision=decision, **hop)).close()
    served = served_by(decision=decision, **hop)
    ids = embedded.ids()
    assert len(ids) >= 5
    read = []
    for alert in ids:
        outcome = embedded.replay(alert, served)
        assert outcome.reproduced, text(outcome)
        assert outcome.same == [alert]
        assert [alerts.event_id for alerts in outcome.replayed] == [alerts.event_id for alerts in outcome.published]
        assert outcome.history is not None
        assert outcome.history.exact
        read.append(outcome.history.chunks)
    assert min(read) < max(read) <= 90


def test_on_either_bus_an_alert_comes_out_to_the_last_digit(place):
    place.send(one_shot(), one_shot("b", seed=2))
    place.serve().close()
    a, b = place.ids()
    outcome = place.replay(a.upper()[:13], served_by())
    assert outcome.reproduced, text(outcome)
    assert [x.state for x in outcome.replayed] == ["opened", "closed"]
    assert [(x.alert_id, x.peak_score, x.audio) for x in outcome.replayed] == [
        (x.alert_id, x.peak_score, x.audio) for x in outcome.published
    ]
    assert place.replay(f"{b}.1", served_by()).reproduced
    whole = place.replay_time("a", 0, 40, served_by())
    assert whole.reproduced, text(whole)
    assert whole.same == [a]
    assert len(whole.timeline) == len(whole.audio) == 40


def test_a_restart_in_the_middle_of_an_alert_does_not_show(embedded):
    stream = one_shot()
    embedded.send(stream[:21])
    embedded.serve().close()
    embedded.send(stream[21:])
    embedded.serve().close()
    (alert,) = embedded.ids()
    assert embedded.replay(alert, served_by()).reproduced


def test_another_model_is_named_with_the_package_that_is_needed(embedded):
    embedded.send(one_shot())
    embedded.serve().close()
    (alert,) = embedded.ids()
    other = dataclasses.replace(
        served_by(),
        model_name="newer",
        model_sha256="d" * 64,
        package_of=lambda sha256: "crest-1" if sha256 == "c" * 64 else None,
    )
    outcome = embedded.replay(alert, other)
    assert not outcome.reproduced
    assert "model" in kinds(outcome)
    assert "c" * 64 in text(outcome)
    assert "--model crest-1" in text(outcome)
    assert "get that package" in text(embedded.replay(alert, dataclasses.replace(other, package_of=lambda _: None)))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"open_threshold": 0.7, "close_threshold": 0.5}, "thresholds 0.6/0.4, now 0.7/0.5"),
        ({"look_alikes": ()}, "look_alikes Fireworks; now none"),
        ({"hold_seconds": 4.0}, "hold_seconds"),
        ({"family": (0,), "look_alikes": (1, 2)}, "family Gunshot, gunfire, Machine gun; now Gunshot, gunfire"),
    ],
)
def test_other_settings_are_named(embedded, changed, expected):
    embedded.send(one_shot())
    embedded.serve().close()
    (alert,) = embedded.ids()
    outcome = embedded.replay(alert, served_by(decision=dataclasses.replace(DECISION, **changed)))
    assert "settings" in kinds(outcome)
    assert expected in text(outcome)


def test_scores_of_another_build_are_told_with_how_much(embedded):
    class Shifted(CrestScorer):
        def classify(self, windows: Any, num_frames: Any) -> Any:
            return np.maximum(super().classify(windows, num_frames) - np.float32(3e-5), 0)

    embedded.send(one_shot())
    embedded.serve().close()
    (alert,) = embedded.ids()
    outcome = embedded.replay(alert, served_by(scorer=Shifted()))
    assert kinds(outcome) == {"scores"}
    assert "by 0.000030 at most" in text(outcome)
    assert "Another processor" in text(outcome)


def test_several_differences_are_all_told(embedded):
    embedded.send(one_shot())
    embedded.serve().close()
    (alert,) = embedded.ids()
    decision = dataclasses.replace(DECISION, open_threshold=0.7, close_threshold=0.5)
    served = dataclasses.replace(served_by(decision=decision), model_sha256="d" * 64)
    assert kinds(embedded.replay(alert, served)) >= {"model", "settings"}


@pytest.mark.parametrize(
    ("keep_from", "expected"),
    [
        (60, "All of the alert's audio"),
        (21, "offsets 19 to 20 are gone: 2 of the 4 records"),
        (16, "the log begins there"),
    ],
)
def test_what_retention_took_is_told(tmp_path, keep_from, expected):
    """The log is cut: what lies before ``keep_from`` is dropped as retention drops it."""
    place = Place(BusSettings(kind="embedded", embedded=EmbeddedBusSettings(path=tmp_path / "bus.sqlite3")))
    place.send(one_shot(chunks=70))
    place.serve().close()
    (alert,) = place.ids()
    with place.bus._file.transaction() as db:
        (log_id,) = db.execute(
            "SELECT log_id FROM logs JOIN topics USING(topic_id) WHERE name=? AND partition=0", (place.topics.chunks,)
        ).fetchone()
        db.execute("DELETE FROM records WHERE id >= ? AND id < ?", (log_id << 40, (log_id << 40) + keep_from))
        db.execute("UPDATE logs SET oldest_offset=? WHERE log_id=?", (keep_from, log_id))
    outcome = place.replay(alert, served_by())
    assert not outcome.reproduced
    assert "retention" in kinds(outcome)
    assert expected in text(outcome)
    place.bus.close()


def test_a_stream_that_was_lost_ends_where_it_ended(embedded):
    embedded.send(one_shot(chunks=22))
    session = embedded.serve()
    session._publish(session._pipeline.end_stream("a"))
    session.commit()
    session.close()
    assert [a.close_reason for a in embedded.published()] == [None, "stream_lost"]
    (alert,) = embedded.ids()
    outcome = embedded.replay(alert, served_by())
    assert outcome.reproduced, text(outcome)
    assert embedded.replay_time("a", 0, 40, served_by()).reproduced


def test_a_pause_that_ended_the_run_unseen_is_found(embedded):
    """The detector forgot the stream, nothing was open: nothing published says so."""
    stream = one_shot(at=12)
    embedded.send(stream[:11])
    session = embedded.serve()
    session._pipeline.end_stream("a")
    producer = embedded.bus.producer()
    late_ms = 4_000_000_000_000
    for chunk in stream[11:]:
        producer.send(embedded.topics.chunks, *encode(chunk), partition=0, timestamp_ms=late_ms)
    producer.close()
    idle = 0
    while idle < 2:
        idle = 0 if session.step() else idle + 1
    session.commit()
    session.close()
    (alert,) = embedded.ids()
    outcome = embedded.replay(alert, served_by())
    assert outcome.reproduced, text(outcome)
    assert "taken to have ended at offset 10" in outcome.notes[0]


def test_missing_and_extra_alerts_are_told(embedded):
    embedded.send(one_shot(), one_shot("b", seed=2))
    embedded.serve().close()
    made_up = Place(embedded.settings.bus)
    made_up.send(chunks_of("b", audio(np.random.default_rng(9), 40, [9 * CHUNK_SAMPLES])))
    made_up.serve().close()
    (foreign,) = made_up.ids()
    producer = embedded.bus.producer()
    for event in made_up.published():
        producer.send(embedded.topics.alerts, *alerts.encode(event))
    producer.close()
    outcome = embedded.replay_time("b", 0, 40, served_by())
    assert outcome.missing == [foreign]
    assert len(outcome.same) == 1
    stricter = embedded.replay_time(
        "a", 0, 40, served_by(decision=dataclasses.replace(DECISION, open_threshold=0.99, close_threshold=0.9))
    )
    assert len(stricter.missing) == 1
    made_up.send(one_shot("c"))
    unheard = made_up.replay_time("c", 0, 40, served_by())
    assert len(unheard.extra) == 1
    assert kinds(unheard) == {"extra"}
    assert made_up.replay_time("c", 30, 40, served_by()).reproduced
    assert kinds(made_up.replay_time("nobody", 0, 40, served_by())) == {"retention"}
    made_up.bus.close()


def test_an_event_told_twice_counts_once_unless_it_says_something_else(embedded):
    embedded.send(one_shot())
    embedded.serve().close()
    opened = embedded.published()[0]
    producer = embedded.bus.producer()
    producer.send(embedded.topics.alerts, *alerts.encode(dataclasses.replace(opened, latency_seconds=9.0)))
    producer.flush()
    assert embedded.replay(opened.alert_id, served_by()).reproduced
    producer.send(embedded.topics.alerts, *alerts.encode(dataclasses.replace(opened, support=7)))
    producer.flush()
    assert kinds(embedded.replay(opened.alert_id, served_by())) == {"twice"}


def test_an_unknown_and_an_ambiguous_id_are_refused(embedded):
    embedded.send(one_shot())
    embedded.serve().close()
    with pytest.raises(GunfireError, match="has no alert whose id begins with 01234567"):
        embedded.replay("01234567", served_by())
    with pytest.raises(GunfireError, match="does not exist"):
        replay_alert(
            embedded.bus,
            alerts_topic="none",
            chunks_topic=embedded.topics.chunks,
            alert="01234567",
            served=served_by(),
            back_seconds=1,
        )


def test_the_clip_is_the_alerts_audio(embedded, tmp_path):
    stream = one_shot()
    embedded.send(stream)
    embedded.serve().close()
    (alert,) = embedded.ids()
    outcome = embedded.replay(alert, served_by())
    seconds = write_wav(tmp_path / "clip.wav", outcome.audio)
    with wave.open(str(tmp_path / "clip.wav")) as wav:
        assert (wav.getframerate(), wav.getnchannels(), wav.getsampwidth()) == (16_000, 1, 2)
        pcm = np.frombuffer(wav.readframes(wav.getnframes()), "<i2")
    first = outcome.audio[0].chunk.seq
    assert seconds == len(pcm) / 16_000
    np.testing.assert_array_equal(pcm, np.concatenate([c.pcm for c in stream[first : first + len(outcome.audio)]]))
    gap = [outcome.audio[0], dataclasses.replace(outcome.audio[0], chunk=stream[first + 2])]
    assert write_wav(tmp_path / "gap.wav", gap) == pytest.approx(3 * 0.96)
    with pytest.raises(GunfireError, match="can't be written"):
        write_wav(tmp_path / "none" / "clip.wav", outcome.audio)


# --- how far back


scores = st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.65, 0.9]), max_size=60)
decisions = st.builds(
    DecisionSettings,
    open_threshold=st.just(0.6),
    close_threshold=st.just(0.4),
    family=st.just((0,)),
    min_support=st.integers(1, 2),
    support_window_examples=st.integers(2, 4),
    hold_seconds=st.sampled_from([0.0, 1.0, 3.0]),
    cooldown_seconds=st.sampled_from([0.0, 2.0, 7.0]),
    max_alert_seconds=st.sampled_from([5.0, 30.0]),
)


@settings(max_examples=200, deadline=None)
@given(scores, decisions, st.sampled_from([CHUNK_SAMPLES, CHUNK_SAMPLES // 2]), st.integers(-8_000, 15_000))
def test_after_the_quiet_a_decision_remembers_nothing(before, decision, step, onset):
    machine = Decision(decision)
    start = -240

    def feed(score: float) -> None:
        nonlocal start
        found = [Onset(max(0, start + onset), peak_dbfs=-3.0, rise_db=20.0, certain=True)]
        machine.step(ScoredExample(start, start + 15_600, (score,)), lambda: found)
        start += step

    for score in before:
        feed(score)
    quiet_from = start
    while start - step + 15_600 - quiet_from < quiet_samples_to_forget(decision):
        feed(0.3)
    assert machine.quiescent


# --- the command


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("2018-10-09T14:03:07.123456789Z", 1_539_093_787_123_456_789),
        ("2018-10-09 16:03:07+02:00", 1_539_093_787_000_000_000),
        ("2018-10-09T14:03", 1_539_093_780_000_000_000),
        ("2018-10-09", 1_539_043_200_000_000_000),
        ("1539093787.25", 1_539_093_787_250_000_000),
        ("1539093787123", 1_539_093_787_123_000_000),
        ("1539093787123456789", 1_539_093_787_123_456_789),
    ],
)
def test_times_are_read_as_people_and_alerts_write_them(given, expected):
    assert time_ns(given) == expected


@pytest.mark.parametrize("given", ["", "now", "2018-13-01", "2018-10-09T25:00", "-5", "1e9"])
def test_what_is_no_time_is_refused(given):
    with pytest.raises(ValueError, match=r"."):
        time_ns(given)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--alert", "short"],
        ["--alert", "01234567", "--stream", "a"],
        ["--from", "1", "--to", "2"],
        ["--from", "2", "--to", "1", "--stream", "a"],
        ["--from", "yesterday", "--to", "1", "--stream", "a"],
    ],
)
def test_a_command_line_that_cant_be_meant_exits_with_2(arguments):
    assert CliRunner().invoke(main, ["replay", *arguments]).exit_code == 2


def test_the_explanation_says_what_the_decision_did(embedded):
    decision = dataclasses.replace(DECISION, cooldown_seconds=3.0)
    embedded.send(one_shot())
    embedded.serve(make_pipeline(decision=decision)).close()
    (alert,) = embedded.ids()
    served = served_by(decision=decision)
    outcome = embedded.replay_time("a", 15, 30, served)
    words = states_of(outcome.timeline, outcome.replayed, served)
    told = [word for word in words if word]
    assert told[0] == "opened"
    assert "closed (quiet)" in told
    assert told[-1] == "cooldown"
    assert words[0] == words[-1] == ""
    found = json.loads(json.dumps(report(outcome, served)))
    assert found["reproduced"] is True
    assert found["same"] == [alert]
    assert found["timeline"][0]["scores"]["Fireworks"] == 0.25
    assert bar(0.5, 0.25) == "#####+####.........."
    assert bar(0.1, 0.5) == "##........|........."


def test_the_command_replays_a_real_models_alert(tmp_path, monkeypatch):
    """As an operator does it: the built-in model, the command line, the exit code."""
    from detector.model import load_model
    from detector.pipeline import pipeline_for

    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bus.sqlite3"
    environ = {"DETECTOR__DECISION__OPEN_THRESHOLD": "0.05", "DETECTOR__TOPICS__PARTITIONS": "1"}
    place = Place(BusSettings(kind="embedded", embedded=EmbeddedBusSettings(path=path)), **environ)
    pcm = float_to_int16(
        noise_with_shots(np.random.default_rng(1), 40, range(16 * CHUNK_SAMPLES, 34 * CHUNK_SAMPLES, 9 * CHUNK_SAMPLES))
    )
    place.send(chunks_of("roof", pcm), chunks_of("yard", pcm[::-1].copy()))
    place.serve(pipeline_for(load_model("compact-gunfire"), place.settings)).close()
    event = next(a for a in place.published() if a.stream == "roof" and a.state == "closed")
    place.bus.close()

    def command(*arguments: str, **more: str) -> Any:
        return CliRunner().invoke(
            main, ["replay", "--bus-path", str(path), *arguments], env={**place.environ, **more}, catch_exceptions=False
        )

    result = command("--alert", event.alert_id, "--explain", "--output", str(tmp_path / "clip.wav"))
    assert result.exit_code == 0, result.output
    assert "Reproduced: 1 alert" in result.output
    assert "opened" in result.output
    assert (tmp_path / "clip.wav").stat().st_size > 30_000
    changed = command("--alert", event.alert_id, DETECTOR__DECISION__OPEN_THRESHOLD="0.06")
    assert changed.exit_code == 1
    assert "Differs (settings): Decided with other settings: thresholds 0.05" in changed.output
    times = ("--from", "2023-11-14T22:13:20Z", "--to", str(START_NS + 40 * CHUNK_NS), "--stream", "roof")
    in_time = command(*times, "--format", "json")
    assert in_time.exit_code == 0, in_time.output
    found = json.loads(in_time.stdout)
    assert found["reproduced"] is True
    assert [e["timeline"] for e in found["replayed"]] == [e["timeline"] for e in found["published"]]
    assert command("--alert", event.alert_id, DETECTOR__DECISION__OPEN_THRESHOLD="7").exit_code == 78


def test_a_missing_bus_file_is_named_and_not_made(tmp_path):
    result = CliRunner().invoke(main, ["replay", "--alert", "01234567", "--bus-path", str(tmp_path / "none.sqlite3")])
    assert result.exit_code == 1
    assert "There is no bus file" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_gap_in_the_offsets_stops_no_reading(place):
    place.bus.create_topics({"other": TopicSettings(partitions=1)})
    stream = one_shot()
    producer = place.bus.producer(transactional_id=place.topics.chunks)
    consumer = place.bus.consumer(["other"], None)
    for chunk in stream:
        producer.send(place.topics.chunks, *encode(chunk), partition=1)
        place.sent += 1
        producer.commit(consumer, {})  # on Kafka each commit takes an offset of its own
    place.serve().close()
    (alert,) = place.ids()
    assert place.replay(alert, served_by()).reproduced
