"""Chunk: 0.96 s of one stream's audio, and its wire form, version 1.

Written by ``producers``, read by ``daemon``. Record key: stream id (UTF-8). Value: little-endian int16 mono PCM at
16 kHz, 15,360 samples (``enc`` = ``pcm_s16le``, 30,720 bytes), or the same as FLAC (``enc`` = ``flac``).
Headers, all UTF-8 text: ``v enc rate session seq captured_at`` and optionally ``location clock_error_seconds canary``.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from detector.bus.base import Headers
from detector.errors import ChunkError

WIRE_VERSION = 1
RATE_HZ = 16_000
CHUNK_SAMPLES = 15_360
CHUNK_SECONDS = CHUNK_SAMPLES / RATE_HZ
CHUNK_BYTES = CHUNK_SAMPLES * 2
MAX_STREAM_ID_BYTES = 255
MAX_SEQ = 2**53 // CHUNK_SAMPLES - 2  # every sample index is exact even in JSON readers that know only doubles
MAX_VALUE_BYTES = 2 * CHUNK_BYTES  # a FLAC chunk is never larger than this
_NS = 1_000_000_000
MAX_CAPTURED_AT_NS = 2**63 - 1 - 86_400 * _NS  # the times of an alert that goes on from here fit as well
_TOKEN = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,19}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_FRAME = re.compile(r"[A-Za-z0-9._:\-]{1,64}")

Encoding = Literal["pcm_s16le", "flac"]
Pcm = npt.NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class Location:
    """Where the sensor is: WGS 84 (``frame`` = ``wgs84``: latitude and longitude in degrees, altitude in metres),
    or x, y, z in metres in a local frame named by ``frame``."""

    frame: str
    a: float
    b: float
    c: float

    @staticmethod
    def wgs84(latitude: float, longitude: float, altitude_metres: float = 0.0) -> Location:
        return Location("wgs84", latitude, longitude, altitude_metres)

    def __post_init__(self) -> None:
        if not _FRAME.fullmatch(self.frame):
            raise ChunkError("bad_location", f"Location frame {self.frame!r} is not 1-64 of A-Z a-z 0-9 . _ : -")
        if not all(math.isfinite(v) for v in (self.a, self.b, self.c)):
            raise ChunkError("bad_location", f"Location {self.to_text()} has a value that is not finite.")
        if self.frame == "wgs84" and not (abs(self.a) <= 90 and abs(self.b) <= 180):
            raise ChunkError(
                "bad_location", f"Location {self.to_text()}: latitude is within ±90 and longitude within ±180 degrees."
            )

    def to_text(self) -> str:
        """``lat,lon,alt`` (WGS 84) or ``<frame>:x,y,z``; floats in shortest exact form."""
        prefix = "" if self.frame == "wgs84" else f"{self.frame}:"
        return f"{prefix}{self.a!r},{self.b!r},{self.c!r}"

    @staticmethod
    def from_text(text: str) -> Location:
        if len(text) > 200:
            raise ChunkError(
                "bad_location", f"Location {text[:80]!r}... has {len(text)} characters; at most 200 are read."
            )
        frame, _, rest = text.rpartition(":")
        values = rest.split(",")
        if len(values) not in (2, 3):
            raise ChunkError("bad_location", f"Location {text[:80]!r} has not the form LAT,LON[,ALT] or FRAME:X,Y[,Z].")
        try:
            a, b, c = (float(v) for v in (*values, "0")[:3])
        except ValueError:
            raise ChunkError("bad_location", f"Location {text[:80]!r} holds something that is no number.") from None
        return Location(frame or "wgs84", a, b, c)


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """0.96 s of one stream.

    Attributes:
        stream_id: which sensor; 1 to 255 bytes of UTF-8, no control characters.
        session: one id a producer start; 1 to 128 of ``A-Z a-z 0-9 . _ : -``.
        seq: number of the chunk in its session, from 0.
        captured_at_ns: capture time of the first sample, Unix nanoseconds.
        pcm: ``(15360,) int16``, mono, 16 kHz. Not writeable.
        canary: id of a test sound mixed in on purpose; alerts from it are marked.
    """

    stream_id: str
    session: str
    seq: int
    captured_at_ns: int
    pcm: Pcm
    location: Location | None = None
    clock_error_seconds: float | None = None
    canary: str | None = None

    def __post_init__(self) -> None:
        _check_stream_id(self.stream_id)
        if not _TOKEN.fullmatch(self.session):
            raise ChunkError("bad_session", f"Session {self.session!r} is not 1-128 of A-Z a-z 0-9 . _ : -")
        if not 0 <= self.seq <= MAX_SEQ:
            raise ChunkError("bad_seq", f"Sequence number {self.seq} is not within 0 to {MAX_SEQ}.")
        if not 0 <= self.captured_at_ns <= MAX_CAPTURED_AT_NS:
            raise ChunkError(
                "bad_captured_at", f"Capture time {self.captured_at_ns} is not within 0 to {MAX_CAPTURED_AT_NS} ns."
            )
        if self.pcm.dtype != np.int16 or self.pcm.shape != (CHUNK_SAMPLES,):
            raise ChunkError(
                "bad_size", f"PCM is {self.pcm.dtype}{list(self.pcm.shape)}; a chunk is int16 [{CHUNK_SAMPLES}]."
            )
        if self.clock_error_seconds is not None and not (
            math.isfinite(self.clock_error_seconds) and self.clock_error_seconds >= 0
        ):
            raise ChunkError(
                "bad_clock_error", f"Clock error {self.clock_error_seconds} s is not a finite number >= 0."
            )
        if self.canary is not None and not _TOKEN.fullmatch(self.canary):
            raise ChunkError("bad_canary", f"Canary {self.canary!r} is not 1-128 of A-Z a-z 0-9 . _ : -")
        if self.pcm.flags.writeable:
            frozen = self.pcm.view()
            frozen.flags.writeable = False
            object.__setattr__(self, "pcm", frozen)

    @property
    def first_sample(self) -> int:
        """Index in its session of the chunk's first sample."""
        return self.seq * CHUNK_SAMPLES

    @property
    def capture_end_ns(self) -> int:
        return self.captured_at_ns + CHUNK_SAMPLES * _NS // RATE_HZ


@dataclass(frozen=True, slots=True)
class ChunkHead:
    """Which chunk it is: a chunk without its audio. Attributes as in ``Chunk``."""

    stream_id: str
    session: str
    seq: int
    captured_at_ns: int


def _check_stream_id(stream_id: str) -> None:
    try:
        size = len(stream_id.encode())
    except UnicodeEncodeError:
        raise ChunkError("bad_stream_id", f"Stream id {stream_id!r} is no valid Unicode.") from None
    if not 1 <= size <= MAX_STREAM_ID_BYTES or _CONTROL.search(stream_id):
        raise ChunkError(
            "bad_stream_id",
            f"Stream id {stream_id[:80]!r} is not 1-{MAX_STREAM_ID_BYTES} bytes of UTF-8 without control characters.",
        )


def encode(chunk: Chunk, encoding: Encoding = "pcm_s16le") -> tuple[bytes, bytes, Headers]:
    """Return ``(key, value, headers)``, ready to be sent. FLAC needs ``soundfile``."""
    headers = [
        ("v", b"%d" % WIRE_VERSION),
        ("enc", encoding.encode()),
        ("rate", b"%d" % RATE_HZ),
        ("session", chunk.session.encode()),
        ("seq", b"%d" % chunk.seq),
        ("captured_at", b"%d" % chunk.captured_at_ns),
    ]
    if chunk.location is not None:
        headers.append(("location", chunk.location.to_text().encode()))
    if chunk.clock_error_seconds is not None:
        headers.append(("clock_error_seconds", repr(float(chunk.clock_error_seconds)).encode()))
    if chunk.canary is not None:
        headers.append(("canary", chunk.canary.encode()))
    pcm = chunk.pcm.astype("<i2", copy=False)
    value = pcm.tobytes() if encoding == "pcm_s16le" else _to_flac(pcm)
    return chunk.stream_id.encode(), value, tuple(headers)


def decode(key: bytes | None, value: bytes, headers: Headers) -> Chunk:
    """Read a record. Unknown headers are allowed, so that later versions can add some.

    Raises:
        ChunkError: with ``reason`` one of missing_key, bad_stream_id, missing_header, duplicate_header, bad_header,
            bad_version, bad_encoding, bad_rate, bad_session, bad_seq, bad_captured_at, bad_size, bad_flac,
            bad_location, bad_clock_error, bad_canary.
    """
    return _read(key, value, headers, _pcm)


def decode_head(key: bytes | None, value: bytes, headers: Headers) -> ChunkHead:
    """Read a record whose audio is left out.

    Raises:
        ChunkError: as ``decode``; only a FLAC value that can't be decoded goes unnoticed.
    """
    chunk = _read(key, value, headers, _unread_pcm)
    return ChunkHead(chunk.stream_id, chunk.session, chunk.seq, chunk.captured_at_ns)


def _read(key: bytes | None, value: bytes, headers: Headers, read_pcm: Callable[[str, bytes], Pcm]) -> Chunk:
    if not key:
        raise ChunkError("missing_key", "The record has no key; the key is the stream id.")
    try:
        stream_id = key.decode()
    except UnicodeDecodeError:
        raise ChunkError("bad_stream_id", f"The record key {key[:80]!r} is no valid UTF-8.") from None
    fields: dict[str, str] = {}
    for name, raw in headers:
        if name not in _KNOWN:
            continue
        if name in fields:
            raise ChunkError("duplicate_header", f"Header {name!r} stands twice.")
        try:
            fields[name] = raw.decode()
        except (UnicodeDecodeError, AttributeError):
            raise ChunkError("bad_header", f"Header {name!r} is no valid UTF-8: {raw!r:.80}") from None
    for name in ("v", "enc", "rate", "session", "seq", "captured_at"):
        if name not in fields:
            raise ChunkError("missing_header", f"Header {name!r} is missing.")
    if fields["v"] != str(WIRE_VERSION):
        raise ChunkError("bad_version", f"Wire version {fields['v'][:40]!r} is not known; this reads {WIRE_VERSION}.")
    if fields["rate"] != str(RATE_HZ):
        raise ChunkError("bad_rate", f"Rate {fields['rate'][:40]!r} is not {RATE_HZ} Hz; resample before publishing.")
    return Chunk(
        stream_id=stream_id,
        session=fields["session"],
        seq=_integer(fields["seq"], "bad_seq", "Sequence number"),
        captured_at_ns=_integer(fields["captured_at"], "bad_captured_at", "Capture time"),
        pcm=read_pcm(fields["enc"], value),
        location=Location.from_text(fields["location"]) if "location" in fields else None,
        clock_error_seconds=_clock_error(fields["clock_error_seconds"]) if "clock_error_seconds" in fields else None,
        canary=fields.get("canary"),
    )


_KNOWN = frozenset(("v", "enc", "rate", "session", "seq", "captured_at", "location", "clock_error_seconds", "canary"))


def _integer(text: str, reason: str, name: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ChunkError(reason, f"{name} {text[:40]!r} is no decimal integer.")
    return int(text)


def _clock_error(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ChunkError("bad_clock_error", f"Clock error {text[:40]!r} is no number of seconds.") from None


def _pcm(encoding: str, value: bytes) -> Pcm:
    _check_value(encoding, value)
    if encoding == "pcm_s16le":
        return np.frombuffer(value, dtype="<i2").astype(np.int16, copy=False)
    return _from_flac(value)


def _unread_pcm(encoding: str, value: bytes) -> Pcm:
    _check_value(encoding, value)
    return _silence()


@functools.cache
def _silence() -> Pcm:
    pcm = np.zeros(CHUNK_SAMPLES, np.int16)
    pcm.flags.writeable = False
    return pcm


def _check_value(encoding: str, value: bytes) -> None:
    if encoding == "pcm_s16le":
        if len(value) != CHUNK_BYTES:
            raise ChunkError("bad_size", f"The value has {len(value)} bytes; a PCM chunk has {CHUNK_BYTES}.")
    elif encoding == "flac":
        if len(value) > MAX_VALUE_BYTES:
            raise ChunkError("bad_size", f"The FLAC value has {len(value)} bytes; at most {MAX_VALUE_BYTES} are read.")
    else:
        raise ChunkError("bad_encoding", f"Encoding {encoding[:40]!r} is not known; this reads pcm_s16le and flac.")


def _to_flac(pcm: Pcm) -> bytes:
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, pcm, RATE_HZ, format="FLAC", subtype="PCM_16")
    return out.getvalue()


def _from_flac(value: bytes) -> Pcm:
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(value)) as flac:
            if (flac.format, flac.subtype) != ("FLAC", "PCM_16"):
                raise ChunkError("bad_flac", f"The value is {flac.format} {flac.subtype}, not FLAC with 16 bits.")
            if flac.channels != 1 or flac.samplerate != RATE_HZ:
                raise ChunkError(
                    "bad_flac",
                    f"The FLAC has {flac.channels} channels at {flac.samplerate} Hz; a chunk is mono 16 kHz.",
                )
            if flac.frames != CHUNK_SAMPLES:
                raise ChunkError("bad_size", f"The FLAC says {flac.frames} samples; a chunk has {CHUNK_SAMPLES}.")
            pcm: Pcm = flac.read(CHUNK_SAMPLES + 1, dtype="int16")
    except soundfile.SoundFileError as e:
        raise ChunkError("bad_flac", f"The value can't be decoded as FLAC: {e}") from None
    if len(pcm) != CHUNK_SAMPLES:
        raise ChunkError("bad_size", f"The FLAC holds {len(pcm)} samples; a chunk has {CHUNK_SAMPLES}.")
    return pcm
