"""The wire form of alerts: deterministic, read back exactly, described by its schema; nothing else is taken for one."""

from __future__ import annotations

import json
from dataclasses import fields as fields_of
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import detector
from detector import alert as alerts
from detector import chunk as chunks
from detector.alert import Alert, AudioRange, ModelIdentity
from detector.bus.base import Headers
from detector.chunk import CHUNK_SAMPLES, Chunk, Location
from detector.decision import Decision, DecisionSettings, ScoredExample
from detector.errors import AlertError, ChunkError
from detector.onset import Onset

SCHEMAS = Path(detector.__file__).parent / "schemas"
LABELS = ("Gunshot, gunfire", "Machine gun", "Fireworks", "Thunder")
SETTINGS = DecisionSettings(0.5, 0.3, family=(0, 1), look_alikes=(2, 3), hold_seconds=1.0)
MODEL = ModelIdentity("compact-gunfire", "1.0.0", "ab" * 32)
STARTED_NS = 1_539_093_787_123_456_789
Validator = jsonschema.Draft202012Validator


def _life(
    *,
    stream: str = "roof-é/7",
    session: str = "s-1",
    scores: tuple[tuple[float, ...], ...] = ((0.9, 0.2, 0.1, 0.1), (0.6, 0.1, 0.1, 0.1)),
    model: ModelIdentity = MODEL,
    onset_offset: int = 5_000,
    started_ns: int = STARTED_NS,
    drift_ns: int = 0,
    **context: Any,
) -> list[Alert]:
    """All events of a run that fires from its second example on, then is quiet."""
    decision, made = Decision(SETTINGS), []

    class Clock:
        def at_ns(self, sample: int) -> int:
            k = max(0, sample) // CHUNK_SAMPLES
            return started_ns + k * (960_000_000 + drift_ns) + (sample - k * CHUNK_SAMPLES) * 62_500

    for k, row in enumerate(((0.0,) * 4, *scores, *((0.0,) * 4,) * 4)):
        start = k * CHUNK_SAMPLES - 240
        onset = Onset(max(0, start + onset_offset), -12.5, 20.1, True)
        for transition in decision.step(ScoredExample(start, start + 15_600, row), lambda onset=onset: [onset]):
            made.append(
                alerts.build(
                    transition,
                    stream=stream,
                    session=session,
                    labels=LABELS,
                    settings=SETTINGS,
                    clock=Clock(),
                    model=model,
                    **context,
                )
            )
    return made


def _validator() -> jsonschema.Draft202012Validator:
    return Validator(json.loads((SCHEMAS / "alert.schema.json").read_text()))


probability = st.floats(0, 1)
names = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=60)
tokens = st.from_regex(r"[A-Za-z0-9._:\-]{1,128}", fullmatch=True)
metres = st.floats(-1e6, 1e6)
contexts = st.fixed_dictionaries(
    {
        "stream": names,
        "session": tokens,
        "scores": st.lists(st.tuples(*[probability] * 4), max_size=12).map(tuple),
        "onset_offset": st.integers(-8_000, 15_000),
        "started_ns": st.integers(0, 2**62),
        "audio": st.none()
        | st.builds(AudioRange, names, st.integers(0, 99), st.integers(0, 2**53), st.integers(0, 2**53)),
        "latency_seconds": st.none() | st.floats(-10, 1e6),
        "location": st.none()
        | st.builds(Location.wgs84, st.floats(-90, 90), st.floats(-180, 180), metres)
        | st.builds(Location, st.from_regex(r"site[A-Za-z0-9._:\-]{0,30}", fullmatch=True), metres, metres, metres),
        "clock_error_seconds": st.none() | st.floats(0, 1e6),
        "evidence": st.lists(names, max_size=3),
        "canary": st.none() | tokens,
    }
)


@settings(max_examples=150, deadline=None)
@given(context=contexts)
def test_every_alert_made_is_valid_and_is_read_back_exactly(context: dict[str, Any]) -> None:
    validator = _validator()
    for alert in _life(**context):
        key, value, headers = alerts.encode(alert)
        assert (again := alerts.decode(key, value, headers)) == alert
        assert alerts.encode(again) == (key, value, headers)
        validator.validate(json.loads(value))


def test_an_alert_tells_the_time_of_the_capture_clock() -> None:
    opened, *_, closed = _life()
    sample = CHUNK_SAMPLES - 240 + 5_000
    assert opened.onset_sample == sample
    assert opened.onset_at_ns == STARTED_NS + sample * 62_500
    assert opened.onset_at == "2018-10-09T14:03:08.380956789Z"
    assert closed.ended_at_ns == STARTED_NS + 3 * 960_000_000
    assert (closed.alert_id, closed.onset_at_ns) == (opened.alert_id, opened.onset_at_ns)


def test_the_end_is_told_by_the_clock_of_the_last_chunk_inside() -> None:
    closed = _life(drift_ns=700)[-1]
    assert closed.ended_at_ns == STARTED_NS + 2 * 960_000_700 + 960_000_000


def test_the_event_carries_the_cloudevents_attributes() -> None:
    _, _, headers = alerts.encode(_life()[0])
    text = {name: value.decode() for name, value in headers}
    assert text == {
        "content-type": "application/json",
        "ce_specversion": "1.0",
        "ce_id": f"{_life()[0].alert_id}.0",
        "ce_source": "/gunfire-detector/streams/roof-%C3%A9%2F7",
        "ce_type": "gunfire.alert.opened",
        "ce_time": "2018-10-09T14:03:08.380956789Z",
        "ce_subject": "roof-é/7",
        "ce_dataschema": "urn:gunfire-detector:schema:alert:1",
    }


def test_a_replay_gives_the_same_bytes_and_every_event_its_own_id() -> None:
    first, second = ([alerts.encode(a) for a in _life()] for _ in range(2))
    assert first == second
    ids = [dict(headers)["ce_id"] for _, _, headers in first]
    assert len(set(ids)) == len(ids) >= 3
    assert len({i.partition(b".")[0] for i in ids}) == 1


def test_the_id_depends_on_stream_session_onset_and_model_alone() -> None:
    base = _life()[0].alert_id
    assert base == "".join(_life(canary="c", scores=((0.7, 0.1, 0.4, 0.4),), latency_seconds=0.2)[0].alert_id)
    others = [
        _life(stream="x")[0],
        _life(session="s-2")[0],
        _life(onset_offset=5_001)[0],
        _life(model=replace(MODEL, sha256="cd" * 32))[0],
    ]
    assert len({base, *(a.alert_id for a in others)}) == 5
    assert alerts.alert_id_of("a", "bc", 1, "d") != alerts.alert_id_of("ab", "c", 1, "d")


def test_the_id_never_changes_between_releases() -> None:
    assert alerts.alert_id_of("roof-7", "s-1", 20_120, "ab" * 32) == "859800be-e235-862e-ae88-412f2c894ec7"


def test_scores_have_six_digits_and_the_label_is_the_best_of_the_family() -> None:
    (opened, *_) = _life(scores=((0.1234567, 0.87654321, 0.3333333, 0.0),))
    assert opened.label == "Machine gun"
    assert opened.scores == {"Gunshot, gunfire": 0.123457, "Machine gun": 0.876543}
    assert opened.look_alikes == {"Fireworks": 0.333333, "Thunder": 0.0}


def _record() -> tuple[bytes, dict[str, Any], Headers]:
    key, value, headers = alerts.encode(_life(location=Location.wgs84(40.4, -79.9), audio=AudioRange("t", 0, 1, 2))[-1])
    return key, json.loads(value), headers


@pytest.mark.parametrize("name", [field.name for field in fields_of(Alert)])
def test_a_missing_field_is_refused_by_schema_and_reader(name: str) -> None:
    key, fields, headers = _record()
    del fields[name]
    assert not _validator().is_valid(fields)
    with pytest.raises(AlertError, match=name):
        alerts.decode(key, json.dumps(fields).encode(), headers)


@pytest.mark.parametrize("inside", [None, "threshold", "model", "audio", "location", "onsets", "timeline"])
def test_an_unknown_field_is_refused_by_schema_and_reader(inside: str | None) -> None:
    key, fields, headers = _record()
    place = fields if inside is None else fields[inside]
    (place[0] if isinstance(place, list) else place)["surprise"] = 1
    assert not _validator().is_valid(fields)
    with pytest.raises(AlertError, match="surprise"):
        alerts.decode(key, json.dumps(fields).encode(), headers)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("v", 2), ("v", "1"), ("alert_id", "x"), ("revision", -1), ("revision", 1.5), ("state", "over"),
        ("close_reason", None), ("close_reason", "shutdown"), ("stream", ""), ("session", "a b"), ("score", 1.1),
        ("score", "0.5"), ("score", None), ("scores", {}), ("timeline", []), ("onsets", []), ("onset_sample", -1),
        ("onset_at", "yesterday"), ("ended_at", None), ("ended_sample", None), ("threshold", {"open": 0.5}),
        ("latency_seconds", "fast"), ("location", {"frame": "wgs84"}), ("evidence", [1]), ("canary", ""),
        ("revision", 0), ("onset_count", 0), ("support", 0),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_schema_and_reader(name: str, value: object) -> None:
    key, fields, headers = _record()
    fields[name] = value
    assert not _validator().is_valid(fields)
    with pytest.raises(AlertError):
        alerts.decode(key, json.dumps(fields).encode(), headers)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("onset_at_ns", 5, "onsets"),
        ("onset_at", "2018-10-09T14:03:08.380956780Z", "onsets"),
        ("ended_at_ns", 5, "is not the time"),
        ("session", "other", "Alert id"),
        ("label", "Thunder", "no entry in scores"),
    ],
)
def test_an_alert_that_contradicts_itself_is_refused(name: str, value: object, message: str) -> None:
    key, fields, headers = _record()
    fields[name] = value
    with pytest.raises(AlertError, match=message):
        alerts.decode(key, json.dumps(fields).encode(), headers)


@pytest.mark.parametrize("value", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b'{"v":NaN}', b"\x00" * 99])
def test_what_is_no_json_object_is_refused(value: bytes) -> None:
    key, _, headers = _record()
    with pytest.raises(AlertError):
        alerts.decode(key, value, headers)


def test_key_and_headers_must_belong_to_the_value() -> None:
    key, value, headers = alerts.encode(_life()[0])
    for wrong in (None, b"", b"other"):
        with pytest.raises(AlertError, match="record key"):
            alerts.decode(wrong, value, headers)
    for i, (name, _) in enumerate(headers):
        rest = headers[:i] + headers[i + 1 :]
        with pytest.raises(AlertError, match=name):
            alerts.decode(key, value, rest)
        with pytest.raises(AlertError, match=name):
            alerts.decode(key, value, (*rest, (name, b"wrong")))
        with pytest.raises(AlertError, match="no valid UTF-8"):
            alerts.decode(key, value, (*rest, (name, b"\xff")))
        with pytest.raises(AlertError, match="twice"):
            alerts.decode(key, value, (*headers, (name, b"x")))
    assert alerts.decode(key, value, (*headers, ("traceparent", b"\xff")))


def test_an_alert_the_schema_forbids_is_not_sent() -> None:
    for wrong in ({"score": float("nan")}, {"score": 2.0}, {"clock_error_seconds": -1.0}, {"evidence": ("",)}):
        with pytest.raises(AlertError, match="can't be sent"):
            alerts.encode(replace(_life()[0], **wrong))


def test_the_published_schema_is_the_codes_own() -> None:
    published = json.loads((SCHEMAS / "alert.schema.json").read_text())
    assert published == json.loads(json.dumps(alerts.json_schema())), (
        "regenerate with: python -c 'import json; from detector.alert import json_schema; "
        "print(json.dumps(json_schema(), indent=2, ensure_ascii=False))' > detector/schemas/alert.schema.json"
    )
    Validator.check_schema(published)


def _chunk(location: Location | None, clock_error_seconds: float | None, canary: str | None, seq: int) -> Chunk:
    return Chunk(
        "s", "run-1", seq, STARTED_NS, np.zeros(CHUNK_SAMPLES, np.int16), location, clock_error_seconds, canary
    )


def _chunk_validator() -> jsonschema.Draft202012Validator:
    schema = json.loads((SCHEMAS / "chunk.schema.json").read_text())
    Validator.check_schema(schema)
    return Validator(schema)


@settings(max_examples=60, deadline=None)
@given(
    location=contexts.map(lambda c: c["location"]),
    clock_error=st.none() | st.floats(0, 1e300),
    canary=st.none() | tokens,
    seq=st.integers(0, chunks.MAX_SEQ),
)
def test_every_chunk_made_has_headers_that_its_schema_allows(
    location: Location | None, clock_error: float | None, canary: str | None, seq: int
) -> None:
    _, _, headers = chunks.encode(_chunk(location, clock_error, canary, seq))
    _chunk_validator().validate({name: value.decode() for name, value in headers})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("v", "2"), ("enc", "mp3"), ("rate", "44100"), ("session", ""), ("session", "a b"), ("seq", "-1"),
        ("seq", "01"), ("seq", "1.0"), ("captured_at", "now"), ("captured_at", "-5"), ("location", "here"),
        ("location", "1"), ("location", "1,2,3,4"), ("location", "a b:1,2"), ("location", "1,nan"),
        ("clock_error_seconds", "-1"), ("clock_error_seconds", "nan"), ("clock_error_seconds", "inf"),
        ("canary", ""), ("canary", "x" * 129),
        *((name, None) for name in ("v", "enc", "rate", "session", "seq", "captured_at")),
    ],
)  # fmt: skip
def test_headers_that_the_chunk_schema_forbids_are_refused_by_the_reader(name: str, value: str | None) -> None:
    key, pcm, headers = chunks.encode(_chunk(None, None, None, 0))
    fields = {n: v.decode() for n, v in headers} | ({} if value is None else {name: value})
    if value is None:
        del fields[name]
    assert not _chunk_validator().is_valid(fields)
    with pytest.raises(ChunkError):
        chunks.decode(key, pcm, tuple((n, v.encode()) for n, v in fields.items()))
