"""A chunk survives its wire form, and nothing that is no chunk passes for one."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.bus.base import Headers
from detector.chunk import (
    CHUNK_SAMPLES,
    MAX_CAPTURED_AT_NS,
    MAX_SEQ,
    MAX_VALUE_BYTES,
    Chunk,
    ChunkHead,
    Location,
    decode,
    decode_head,
    encode,
)
from detector.errors import ChunkError

ENCODINGS = ("pcm_s16le", "flac")

finite = st.floats(allow_nan=False, allow_infinity=False)
tokens = st.from_regex(r"[A-Za-z0-9._:\-]{1,128}", fullmatch=True)
stream_ids = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=60).filter(
    lambda s: len(s.encode()) <= 255
)
locations = st.one_of(
    st.builds(Location.wgs84, st.floats(-90, 90), st.floats(-180, 180), finite),
    st.builds(
        Location,
        st.from_regex(r"[A-Za-z0-9._:\-]{1,64}", fullmatch=True).filter(lambda f: f != "wgs84"),
        finite,
        finite,
        finite,
    ),
)


@st.composite
def pcms(draw: st.DrawFn) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    high = draw(st.sampled_from([0, 1, 100, 32767]))
    return rng.integers(-high - (high == 32767), high + 1, CHUNK_SAMPLES).astype(np.int16)


@st.composite
def chunks(draw: st.DrawFn) -> Chunk:
    return Chunk(
        stream_id=draw(stream_ids),
        session=draw(tokens),
        seq=draw(st.integers(0, MAX_SEQ)),
        captured_at_ns=draw(st.integers(0, MAX_CAPTURED_AT_NS)),
        pcm=draw(pcms()),
        location=draw(st.none() | locations),
        clock_error_seconds=draw(st.none() | st.floats(0, 1e6)),
        canary=draw(st.none() | tokens),
    )


def fields(chunk: Chunk) -> dict[str, Any]:
    return {name: getattr(chunk, name) for name in Chunk.__slots__ if name != "pcm"}


def a_chunk(**changes: Any) -> Chunk:
    values: dict[str, Any] = {
        "stream_id": "roof-1",
        "session": "s1",
        "seq": 7,
        "captured_at_ns": 1_700_000_000_000_000_000,
        "pcm": np.arange(CHUNK_SAMPLES, dtype=np.int16),
    }
    return Chunk(**{**values, **changes})


@pytest.mark.parametrize("encoding", ENCODINGS)
@settings(deadline=None, max_examples=60)
@given(chunk=chunks())
def test_every_chunk_survives_the_round_trip(encoding: Any, chunk: Chunk) -> None:
    key, value, headers = encode(chunk, encoding)
    back = decode(key, value, headers)
    assert fields(back) == fields(chunk)
    assert np.array_equal(back.pcm, chunk.pcm)
    assert encode(back, encoding) == (key, value, headers)
    assert not back.pcm.flags.writeable
    assert len(value) <= MAX_VALUE_BYTES


def test_the_pcm_form_is_the_samples_little_endian_and_the_headers_are_text() -> None:
    key, value, headers = encode(a_chunk())
    assert key == b"roof-1"
    assert value[:6] == b"\x00\x00\x01\x00\x02\x00"
    assert len(value) == 30_720
    assert dict(headers) == {
        "v": b"1",
        "enc": b"pcm_s16le",
        "rate": b"16000",
        "session": b"s1",
        "seq": b"7",
        "captured_at": b"1700000000000000000",
    }


def test_loud_noise_as_flac_stays_under_the_limit() -> None:
    pcm = np.random.default_rng(0).choice(np.array([-32768, 32767], np.int16), CHUNK_SAMPLES)
    key, value, headers = encode(a_chunk(pcm=pcm), "flac")
    assert len(value) <= MAX_VALUE_BYTES
    assert np.array_equal(decode(key, value, headers).pcm, pcm)


def test_headers_not_known_are_let_pass() -> None:
    key, value, headers = encode(a_chunk())
    assert decode(key, value, (*headers, ("later", b"\xff"), ("later", b"2"))).seq == 7


def decoded(key: bytes | None, value: bytes, headers: Headers) -> Chunk | str:
    """The chunk, or the reason why it is none; any other exception is the test's failure."""
    try:
        return decode(key, value, headers)
    except ChunkError as e:
        return e.reason


def changed(headers: Headers, **changes: bytes | None) -> Headers:
    """Headers with some replaced (None: removed), or added."""
    merged = {**dict(headers), **changes}
    return tuple((name, value) for name, value in merged.items() if value is not None)


WRONG_HEADERS = [
    *((name, None, "missing_header") for name in ("v", "enc", "rate", "session", "seq", "captured_at")),
    *((name, b"\xff\xfe", "bad_header") for name in ("v", "enc", "rate", "session", "seq", "captured_at", "location",
                                                      "clock_error_seconds", "canary")),
    *(("v", v, "bad_version") for v in (b"", b"2", b"01", b"1.0", b" 1", b"x" * 1000)),
    *(("rate", v, "bad_rate") for v in (b"", b"8000", b"16000.0", b"16000 ", b"1", b"768000")),
    *(("enc", v, "bad_encoding") for v in (b"", b"mp3", b"PCM_S16LE", b"pcm_s16be")),
    *(("session", v, "bad_session") for v in (b"", b"a b", b"a\n", b"x" * 129, "é".encode(), b"a\x00")),
    *(("seq", v, "bad_seq") for v in (b"", b"-1", b"1.5", b"1e3", b"+1", b"01", b"\xd9\xa1", b"1_000", b"9" * 400,
                                      str(MAX_SEQ + 1).encode(), b"1\n")),
    *(("captured_at", v, "bad_captured_at") for v in (b"", b"-1", b"now", b"9223372036854775808", b"1.7e18", b"0x10")),
    *(("location", v, "bad_location") for v in (b"", b"1", b"1,2,3,4", b"a,b", b"91,0,0", b"0,181,0", b"nan,0,0",
                                                b"inf,0", b"roof top:1,2,3", b"1,2," + b"9" * 500, b"local:1e999,0,0")),
    *(("clock_error_seconds", v, "bad_clock_error") for v in (b"", b"-1", b"nan", b"inf", b"fast")),
    *(("canary", v, "bad_canary") for v in (b"", b"a b", b"x" * 129)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "reason"), WRONG_HEADERS)
def test_a_wrong_header_is_refused_with_its_reason(name: str, value: bytes | None, reason: str) -> None:
    key, pcm, headers = encode(a_chunk())
    with pytest.raises(ChunkError) as caught:
        decode(key, pcm, changed(headers, **{name: value}))
    assert caught.value.reason == reason
    assert len(str(caught.value)) < 400
    with pytest.raises(ChunkError, match=re.escape(str(caught.value))):
        decode_head(key, pcm, changed(headers, **{name: value}))


@pytest.mark.parametrize("name", ["v", "seq", "session", "location"])
def test_a_header_that_stands_twice_is_refused(name: str) -> None:
    key, value, headers = encode(a_chunk(location=Location.wgs84(1, 2)))
    with pytest.raises(ChunkError) as caught:
        decode(key, value, (*headers, (name, dict(headers)[name])))
    assert caught.value.reason == "duplicate_header"


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (None, "missing_key"),
        (b"", "missing_key"),
        (b"\xff\xfe", "bad_stream_id"),
        (b"a\nb", "bad_stream_id"),
        (b"a\x7f", "bad_stream_id"),
        ("a\x85b".encode(), "bad_stream_id"),
        (b"x" * 256, "bad_stream_id"),
    ],
)
def test_a_key_that_is_no_stream_id_is_refused(key: bytes | None, reason: str) -> None:
    _, value, headers = encode(a_chunk())
    with pytest.raises(ChunkError) as caught:
        decode(key, value, headers)
    assert caught.value.reason == reason


@given(size=st.integers(0, 70_000).filter(lambda n: n != 30_720))
def test_a_pcm_value_of_any_other_size_is_refused(size: int) -> None:
    key, _, headers = encode(a_chunk())
    with pytest.raises(ChunkError) as caught:
        decode(key, bytes(size), headers)
    assert caught.value.reason == "bad_size"
    with pytest.raises(ChunkError, match=re.escape(str(caught.value))):
        decode_head(key, bytes(size), headers)


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(chunk=chunks())
def test_the_head_says_which_chunk_it_is(chunk: Chunk, encoding: Any) -> None:
    expected = ChunkHead(chunk.stream_id, chunk.session, chunk.seq, chunk.captured_at_ns)
    assert decode_head(*encode(chunk, encoding)) == expected


def sound(
    samples: int = CHUNK_SAMPLES, rate_hz: int = 16_000, channels: int = 1, kind: str = "FLAC", subtype: str = "PCM_16"
) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.zeros((samples, channels), np.int16), rate_hz, format=kind, subtype=subtype)
    return out.getvalue()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "bad_flac"),
        (b"fLaC", "bad_flac"),
        (bytes(30_720), "bad_flac"),
        (b"x" * (MAX_VALUE_BYTES + 1), "bad_size"),
        (sound(CHUNK_SAMPLES - 1), "bad_size"),
        (sound(CHUNK_SAMPLES + 1), "bad_size"),
        (sound(rate_hz=8000), "bad_flac"),
        (sound(channels=2), "bad_flac"),
        (sound(subtype="PCM_24"), "bad_flac"),
        (sound(kind="WAV"), "bad_flac"),
        (sound(kind="OGG", subtype="VORBIS"), "bad_flac"),
    ],
    ids=lambda v: v if isinstance(v, str) else f"{len(v)} bytes",
)
def test_a_flac_value_that_is_not_one_chunk_is_refused(value: bytes, reason: str) -> None:
    key, _, headers = encode(a_chunk(), "flac")
    with pytest.raises(ChunkError) as caught:
        decode(key, value, headers)
    assert caught.value.reason == reason


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_damaged_flac_value_is_refused_or_has_the_right_size(data: st.DataObject) -> None:
    rng = np.random.default_rng(1)
    key, value, headers = encode(a_chunk(pcm=rng.integers(-3000, 3000, CHUNK_SAMPLES).astype(np.int16)), "flac")
    damaged = bytearray(value[: data.draw(st.integers(0, len(value)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    outcome = decoded(key, bytes(damaged), headers)
    assert outcome in ("bad_flac", "bad_size") or (isinstance(outcome, Chunk) and outcome.pcm.shape == (CHUNK_SAMPLES,))


@settings(deadline=None)
@given(
    key=st.none() | st.binary(max_size=300),
    value=st.binary(max_size=100) | st.just(bytes(30_720)),
    headers=st.lists(
        st.tuples(
            st.sampled_from(["v", "enc", "rate", "session", "seq", "captured_at", "location", "canary", "x"]),
            st.binary(max_size=40) | st.sampled_from([b"1", b"16000", b"pcm_s16le", b"flac", b"0"]),
        ),
        max_size=10,
    ),
)
def test_whatever_comes_is_a_chunk_or_a_chunk_error(
    key: bytes | None, value: bytes, headers: list[tuple[str, bytes]]
) -> None:
    assert decoded(key, value, tuple(headers)) != ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stream_id": ""}, "bad_stream_id"),
        ({"stream_id": "\ud800"}, "bad_stream_id"),
        ({"session": ""}, "bad_session"),
        ({"seq": -1}, "bad_seq"),
        ({"seq": MAX_SEQ + 1}, "bad_seq"),
        ({"captured_at_ns": -1}, "bad_captured_at"),
        ({"captured_at_ns": 2**63}, "bad_captured_at"),
        ({"pcm": np.zeros(CHUNK_SAMPLES - 1, np.int16)}, "bad_size"),
        ({"pcm": np.zeros(CHUNK_SAMPLES, np.float32)}, "bad_size"),
        ({"pcm": np.zeros((CHUNK_SAMPLES, 1), np.int16)}, "bad_size"),
        ({"clock_error_seconds": float("nan")}, "bad_clock_error"),
        ({"clock_error_seconds": -0.1}, "bad_clock_error"),
        ({"canary": "a b"}, "bad_canary"),
    ],
)
def test_what_would_be_refused_can_not_be_made(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ChunkError) as caught:
        a_chunk(**changes)
    assert caught.value.reason == reason


def test_positions_and_times_follow_from_the_number_of_the_chunk() -> None:
    chunk = a_chunk(seq=3)
    assert chunk.first_sample == 46_080
    assert chunk.capture_end_ns - chunk.captured_at_ns == 960_000_000


@pytest.mark.parametrize("text", ["40.44,-79.95,230.5", "0,0", "lab:1,2,3", "lab:1,-2.5", "a:b:1,2,3"])
def test_a_location_reads_back_what_it_writes(text: str) -> None:
    place = Location.from_text(text)
    assert Location.from_text(place.to_text()) == place
