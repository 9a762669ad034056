"""Alert: a decision that fired, and its wire form, version 1: JSON with CloudEvents 1.0 attributes as Kafka headers.

Made by ``pipeline`` from the transitions of ``decision``, read by subscribers. Record key: stream id (UTF-8). Value:
one JSON object as published in ``detector/schemas/alert.schema.json``. Everything in it but ``latency_seconds`` and
``evidence`` follows from the audio, the model and the settings, so a replay gives the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Annotated, Any, ClassVar, Literal, Protocol
from urllib.parse import quote

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema

from detector.bus.base import Headers
from detector.chunk import RATE_HZ, Location
from detector.decision import MAX_ONSETS, MAX_TIMELINE, CloseReason, DecisionSettings, State, Transition
from detector.errors import AlertError

WIRE_VERSION = 1
SCHEMA_ID = "urn:gunfire-detector:schema:alert:1"
EVENT_TYPE_PREFIX = "gunfire.alert."  # followed by the state
CONTENT_TYPE = "application/json"
SERVED_HEADER = "ce_served"  # which model and settings decided, as `Pipeline.served` says; not in the schema
SCORE_DIGITS = 6
_SAMPLE_NS = 1_000_000_000 // RATE_HZ  # 62,500, exact

_Score = Annotated[float, Field(ge=0, le=1, description="0 to 1, rounded to 6 digits")]
_Sample = Annotated[int, Field(ge=0, lt=2**63, description="sample index in the session, 16 kHz")]
_UnixNs = Annotated[int, Field(ge=0, lt=2**63, description="Unix nanoseconds (above 2^53: not exact as a double)")]
_Rfc3339 = Annotated[
    str,
    Field(pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\.\d{9}Z$", description="RFC 3339, UTC, nanoseconds"),
]
_Name = Annotated[str, Field(min_length=1, max_length=255)]
_Token = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:\-]{1,128}$")]


@dataclass(frozen=True, slots=True)
class AlertTimelinePoint:
    """Family score of the example that starts at ``start_sample`` (-240 for a session's first)."""

    start_sample: Annotated[int, Field(ge=-240, lt=2**63)]
    score: _Score


@dataclass(frozen=True, slots=True)
class AlertOnset:
    """One shot. ``peak_dbfs`` null: not measured. ``certain`` false: nothing stood out, this is the likeliest place."""

    sample: _Sample
    at: _Rfc3339
    at_ns: _UnixNs
    peak_dbfs: Annotated[float, Field(le=0)] | None
    rise_db: float
    certain: bool


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The family score that opens an alert, and the one that keeps it open."""

    open: _Score
    close: _Score


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """The model that scored. ``sha256``: of the model package, 64 lower-case hex digits."""

    name: _Name
    version: _Name
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, slots=True)
class AudioRange:
    """Where the audio of the alert lies on the bus; both offsets are included."""

    topic: _Name
    partition: Annotated[int, Field(ge=0)]
    first_offset: Annotated[int, Field(ge=0, lt=2**63)]
    last_offset: Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True, slots=True)
class GeographicPlace:
    """WGS 84."""

    frame: Literal["wgs84"]
    latitude_degrees: Annotated[float, Field(ge=-90, le=90)]
    longitude_degrees: Annotated[float, Field(ge=-180, le=180)]
    altitude_metres: float


@dataclass(frozen=True, slots=True)
class LocalPlace:
    """A local Cartesian frame with a name."""

    frame: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:\-]{1,64}$")]
    x_metres: float
    y_metres: float
    z_metres: float


@dataclass(frozen=True, slots=True)
class Alert:
    """One event of an alert's life; the fields are those of the JSON, in its order. docs/alerts.md explains each.

    Raises AlertError when made with values that contradict each other.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    v: Literal[1]
    alert_id: Annotated[str, Field(pattern="^[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$")]
    revision: Annotated[int, Field(ge=0, lt=2**31)]
    state: State
    close_reason: CloseReason | None
    stream: _Name
    session: _Token
    label: _Name
    score: _Score
    peak_score: _Score
    support: Annotated[int, Field(ge=1, description="examples without overlap that reached the open threshold")]
    scores: Annotated[dict[str, _Score], Field(min_length=1)]
    look_alikes: dict[str, _Score]
    timeline: Annotated[tuple[AlertTimelinePoint, ...], Field(min_length=1, max_length=MAX_TIMELINE)]
    onset_sample: _Sample
    onset_at: _Rfc3339
    onset_at_ns: _UnixNs
    onsets: Annotated[tuple[AlertOnset, ...], Field(min_length=1, max_length=MAX_ONSETS)]
    onset_count: Annotated[int, Field(ge=1)]
    decided_sample: _Sample
    ended_sample: _Sample | None
    ended_at: _Rfc3339 | None
    ended_at_ns: _UnixNs | None
    threshold: Thresholds
    model: ModelIdentity
    audio: AudioRange | None
    latency_seconds: Annotated[float, Field(description="end of capture to publication; null offline")] | None
    location: GeographicPlace | LocalPlace | None
    clock_error_seconds: Annotated[float, Field(ge=0)] | None
    evidence: tuple[Annotated[str, Field(min_length=1, max_length=2048)], ...]
    canary: _Token | None

    def __post_init__(self) -> None:
        closed = self.state == "closed"
        ended = (self.close_reason, self.ended_sample, self.ended_at, self.ended_at_ns)
        if any((value is not None) != closed for value in ended):
            raise AlertError(
                f"Alert {self.alert_id} is {self.state}, "
                f"yet close_reason, ended_sample, ended_at, ended_at_ns are {ended}."
            )
        if (self.revision == 0) != (self.state == "opened"):
            raise AlertError(f"Alert {self.alert_id} is {self.state} with revision {self.revision}; 0 is for opened.")
        first = self.onsets[0] if self.onsets else None
        if first is None or (first.sample, first.at, first.at_ns) != (
            self.onset_sample,
            self.onset_at,
            self.onset_at_ns,
        ):
            raise AlertError(f"Alert {self.alert_id}: onset_sample, onset_at, onset_at_ns are not those of onsets[0].")
        times = [(onset.at, onset.at_ns) for onset in self.onsets]
        if self.ended_at is not None and self.ended_at_ns is not None:
            times.append((self.ended_at, self.ended_at_ns))
        for text, at_ns in times:
            if text != rfc3339(at_ns):
                raise AlertError(f"Alert {self.alert_id}: {text} is not the time {at_ns} ns.")
        expected = alert_id_of(self.stream, self.session, self.onset_sample, self.model.sha256)
        if self.alert_id != expected:
            raise AlertError(
                f"Alert id {self.alert_id} is not the one of its stream, session, onset and model, {expected}."
            )
        if self.label not in self.scores:
            raise AlertError(f"Alert {self.alert_id}: label {self.label!r} has no entry in scores.")

    @property
    def event_id(self) -> str:
        """``<alert_id>.<revision>``: unique for each event, the same in a replay."""
        return f"{self.alert_id}.{self.revision}"


class SampleClock(Protocol):
    """Sample index of a session -> capture time."""

    def at_ns(self, sample: int) -> int:
        """Unix nanoseconds."""
        ...


def build(
    transition: Transition,
    *,
    stream: str,
    session: str,
    labels: Sequence[str],
    settings: DecisionSettings,
    clock: SampleClock,
    model: ModelIdentity,
    audio: AudioRange | None = None,
    latency_seconds: float | None = None,
    location: Location | None = None,
    clock_error_seconds: float | None = None,
    evidence: Sequence[str] = (),
    canary: str | None = None,
) -> Alert:
    """Make the alert that tells ``transition``.

    Args:
        labels: the model's label names, by index.
        clock: knows the chunks from the alert's first onset on.
        audio: None offline. latency_seconds: likewise.
    """
    onsets = tuple(
        AlertOnset(
            sample=onset.sample,
            at=rfc3339(at_ns := clock.at_ns(onset.sample)),
            at_ns=at_ns,
            peak_dbfs=onset.peak_dbfs,
            rise_db=onset.rise_db,
            certain=onset.certain,
        )
        for onset in transition.onsets
    )
    best = max(settings.family, key=lambda i: transition.peak_scores[i])
    ended_sample = transition.ended_sample
    ended_at_ns = None if ended_sample is None else clock.at_ns(ended_sample - 1) + _SAMPLE_NS
    return Alert(
        v=1,
        alert_id=alert_id_of(stream, session, transition.onset_sample, model.sha256),
        revision=transition.revision,
        state=transition.state,
        close_reason=transition.close_reason,
        stream=stream,
        session=session,
        label=labels[best],
        score=_rounded(transition.score),
        peak_score=_rounded(transition.peak_score),
        support=transition.support,
        scores={labels[i]: _rounded(transition.peak_scores[i]) for i in settings.family},
        look_alikes={labels[i]: _rounded(transition.peak_scores[i]) for i in settings.look_alikes},
        timeline=tuple(AlertTimelinePoint(p.start_sample, _rounded(p.score)) for p in transition.timeline),
        onset_sample=transition.onset_sample,
        onset_at=onsets[0].at,
        onset_at_ns=onsets[0].at_ns,
        onsets=onsets,
        onset_count=transition.onset_count,
        decided_sample=transition.at_sample,
        ended_sample=ended_sample,
        ended_at=None if ended_at_ns is None else rfc3339(ended_at_ns),
        ended_at_ns=ended_at_ns,
        threshold=Thresholds(_rounded(settings.open_threshold), _rounded(settings.close_threshold)),
        model=model,
        audio=audio,
        latency_seconds=None if latency_seconds is None else round(latency_seconds, 6),
        location=None if location is None else _place(location),
        clock_error_seconds=clock_error_seconds,
        evidence=tuple(evidence),
        canary=canary,
    )


def alert_id_of(stream: str, session: str, onset_sample: int, model_sha256: str) -> str:
    """Deterministic id, a UUID of version 8 (RFC 9562): the first 16 bytes of the SHA-256 of a JSON array."""
    identity = json.dumps(["gunfire-alert", stream, session, onset_sample, model_sha256], separators=(",", ":"))
    digest = bytearray(hashlib.sha256(identity.encode()).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x80
    digest[8] = digest[8] & 0x3F | 0x80
    return str(uuid.UUID(bytes=bytes(digest)))


def rfc3339(at_ns: int) -> str:
    """Unix nanoseconds -> ``2018-10-09T14:03:07.123456789Z``."""
    seconds, ns = divmod(at_ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%dT%H:%M:%S}.{ns:09d}Z"


def to_json(alert: Alert) -> str:
    """The alert as one line of JSON: fields in fixed order, shortest exact floats; the same alert, the same text."""
    return json.dumps(asdict(alert), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def encode(alert: Alert) -> tuple[bytes, bytes, Headers]:
    """Return ``(key, value, headers)``, ready to be sent: CloudEvents Kafka binding 1.0, binary content mode.

    Raises AlertError for an alert that the schema forbids: a defect of the caller, told before it is sent.
    """
    try:
        value = to_json(alert).encode()
        _adapter().validate_json(value)
    except (ValidationError, ValueError) as e:
        raise AlertError(
            f"Alert {alert.alert_id} of stream {alert.stream!r} can't be sent: {_first_error(e)}"
        ) from None
    headers = (
        ("content-type", CONTENT_TYPE.encode()),
        ("ce_specversion", b"1.0"),
        ("ce_id", alert.event_id.encode()),
        ("ce_source", _source_of(alert.stream).encode()),
        ("ce_type", (EVENT_TYPE_PREFIX + alert.state).encode()),
        ("ce_time", alert.onset_at.encode()),
        ("ce_subject", alert.stream.encode()),
        ("ce_dataschema", SCHEMA_ID.encode()),
    )
    return alert.stream.encode(), value, headers


def decode(key: bytes | None, value: bytes, headers: Headers) -> Alert:
    """Read a record of the alerts topic. Headers that are not ours are allowed (tracing adds some).

    Raises:
        AlertError: not an alert of version 1, or key, headers and value contradict each other.
    """
    fields: dict[str, str] = {}
    for name, raw in headers:
        if name != "content-type" and not name.startswith("ce_"):
            continue
        if name in fields:
            raise AlertError(f"Header {name!r} of the alert stands twice.")
        try:
            fields[name] = raw.decode()
        except (UnicodeDecodeError, AttributeError):
            raise AlertError(f"Header {name!r} of the alert is no valid UTF-8: {raw!r:.80}") from None
    alert = from_json(value)
    expected = {
        "content-type": CONTENT_TYPE,
        "ce_specversion": "1.0",
        "ce_id": alert.event_id,
        "ce_source": _source_of(alert.stream),
        "ce_type": EVENT_TYPE_PREFIX + alert.state,
        "ce_time": alert.onset_at,
        "ce_subject": alert.stream,
        "ce_dataschema": SCHEMA_ID,
    }
    for name, text in expected.items():
        found = fields.get(name)
        if name == "content-type" and found is not None:
            found = found.partition(";")[0].strip().lower()
        if found != text:
            raise AlertError(f"Header {name!r} of alert {alert.event_id} is {found!r:.200}; expected {text!r}.")
    if key != alert.stream.encode():
        raise AlertError(f"The record key {key!r:.80} is not the alert's stream id {alert.stream!r}.")
    return alert


def from_json(text: str | bytes) -> Alert:
    """Read an alert's JSON. Raises AlertError naming the first field that is wrong."""
    try:
        return _adapter().validate_json(text)
    except ValidationError as e:
        raise AlertError(f"The value is no alert of version {WIRE_VERSION}: {_first_error(e)}") from None


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) published as ``detector/schemas/alert.schema.json``."""
    schema = _adapter().json_schema(mode="validation")
    ended = ("close_reason", "ended_sample", "ended_at", "ended_at_ns")
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "$id": SCHEMA_ID,
        **schema,
        "title": "Gunfire alert, version 1",
        "description": "One event of an alert's life, as published on the topic gunfire.alerts.",
        "allOf": [
            {
                "if": {"properties": {"state": {"const": "closed"}}},
                "then": {"properties": {name: {"not": {"type": "null"}} for name in ended}},
                "else": {"properties": {name: {"type": "null"} for name in ended}},
            },
            {
                "if": {"properties": {"state": {"const": "opened"}}},
                "then": {"properties": {"revision": {"const": 0}}},
                "else": {"properties": {"revision": {"minimum": 1}}},
            },
        ],
    }


@functools.cache
def _adapter() -> TypeAdapter[Alert]:
    return TypeAdapter(Alert)


def _first_error(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the whole"
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{place}: {first['msg']}; found {first['input']!r:.80}{more}"


def _rounded(score: float) -> float:
    return round(float(score), SCORE_DIGITS)


def _source_of(stream: str) -> str:
    return "/gunfire-detector/streams/" + quote(stream, safe="")


def _place(location: Location) -> GeographicPlace | LocalPlace:
    if location.frame == "wgs84":
        return GeographicPlace("wgs84", float(location.a), float(location.b), float(location.c))
    return LocalPlace(location.frame, float(location.a), float(location.b), float(location.c))
