"""Raw PCM through a real pipe."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from detector.errors import ConfigError, SourceError
from producers.pipe import PipeSource
from producers.source import Block


def piped(data: bytes, *how: object, **more: object) -> tuple[list[Block], PipeSource]:
    read, write = os.pipe()

    def feed() -> None:
        rng = np.random.default_rng(0)
        start = 0
        while start < len(data):  # in pieces that cut samples apart
            start += os.write(write, data[start : start + int(rng.integers(1, 5000))])
        os.close(write)

    thread = threading.Thread(target=feed)
    thread.start()
    source = PipeSource(read, *how, **more)  # type: ignore[arg-type]
    blocks: list[Block] = []
    try:
        for block in source.blocks(threading.Event()):
            blocks.append(block)
    finally:
        thread.join(5)
        os.close(read)
    return blocks, source


VALUES = np.array([0, 1, -1, 12_345, -12_345, 32_767, -32_768] * 500, np.int16)


@pytest.mark.parametrize(
    ("sample_format", "data"),
    [
        ("s16le", VALUES.astype("<i2").tobytes()),
        ("s16be", VALUES.astype(">i2").tobytes()),
        ("s32le", (VALUES.astype("<i4") << 16).tobytes()),
        ("s24le", b"".join(b"\0" + v for v in (VALUES[i : i + 1].astype("<i2").tobytes() for i in range(len(VALUES))))),
        ("f32le", (VALUES / 32768).astype("<f4").tobytes()),
        ("f64le", (VALUES / 32768).astype("<f8").tobytes()),
    ],
)
def test_every_format_gives_the_same_samples(sample_format: str, data: bytes) -> None:
    blocks, _ = piped(data, 16_000, 1, sample_format)
    assert np.array_equal(np.concatenate([b.pcm for b in blocks]), VALUES)


def test_eight_bits_are_unsigned() -> None:
    blocks, _ = piped(bytes([0, 128, 255]), 16_000, 1, "u8")
    assert np.concatenate([b.pcm for b in blocks]).tolist() == [-32768, 0, 32512]


def test_channels_are_mixed_and_rates_resampled() -> None:
    stereo = np.stack([np.full(48_000, 1000), np.full(48_000, 3000)], axis=1).astype("<i2")
    blocks, _ = piped(stereo.tobytes(), 48_000, 2)
    joined = np.concatenate([b.pcm for b in blocks])
    assert len(joined) == 16_000
    assert abs(joined[1000:-1000].astype(int) - 2000).max() <= 1


def test_numbers_that_are_none_become_zero_and_are_counted() -> None:
    blocks, source = piped(np.array([0.5, np.nan, np.inf, -3.0], "<f4").tobytes(), 16_000, 1, "f32le")
    assert np.concatenate([b.pcm for b in blocks]).tolist() == [16384, 0, 0, -32768]
    assert (source.replaced_samples, source.clipped_samples) == (2, 1)


def test_sound_from_store_is_timed_by_position() -> None:
    blocks, _ = piped(bytes(2 * 64_000), 16_000, live=False, now_ns=lambda: 10**18)
    position = 0
    for block in blocks:
        assert block.captured_at_ns == 10**18 + position * 62_500
        position += len(block.pcm)
    assert position == 64_000


def test_a_pipe_that_ends_within_a_sample_or_at_once_is_an_error() -> None:
    with pytest.raises(SourceError, match="ends within a sample"):
        piped(b"123", 16_000)
    with pytest.raises(SourceError, match="held no sound"):
        piped(b"", 16_000)


def test_stop_ends_it_while_nothing_comes() -> None:
    read, write = os.pipe()
    stop = threading.Event()
    thread = threading.Thread(target=lambda: list(PipeSource(read, 16_000).blocks(stop)))
    thread.start()
    stop.set()
    thread.join(5)
    assert not thread.is_alive()
    os.close(read)
    os.close(write)


@pytest.mark.parametrize(
    ("rate", "channels", "kind", "words"),
    [
        (1, 1, "s16le", "1 Hz"),
        (768_000, 1, "s16le", "768000 Hz"),
        (16_000, 0, "s16le", "channels"),
        (16_000, 65, "s16le", "channels"),
        (16_000, 1, "mp3", "format"),
    ],
)
def test_what_can_not_be_sound_is_refused(rate: int, channels: int, kind: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        PipeSource(0, rate, channels, kind)
