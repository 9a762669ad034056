"""Capture times of live sound: never in the future, following the card, and no gap spliced over."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from detector.errors import SourceError
from producers.source import NS, CaptureClock, LiveConverter, connect

BLOCK = 640  # 40 ms of 16 kHz


class Now:
    def __init__(self) -> None:
        self.ns = 1_000 * NS

    def __call__(self) -> int:
        return self.ns


def test_jitter_of_arrival_does_not_move_the_capture_times() -> None:
    now, rng = Now(), np.random.default_rng(0)
    clock = CaptureClock(now_ns=now)
    true_ns = now.ns
    errors = []
    for k in range(2000):
        now.ns = true_ns + (k + 1) * 40_000_000 + int(rng.exponential(0.01) * NS)
        at_ns, starts = clock.stamp(BLOCK)
        assert starts == (k == 0)
        assert at_ns + 40_000_000 <= now.ns
        errors.append((at_ns - (true_ns + k * 40_000_000)) / NS)
    assert max(np.abs(errors[200:])) < 0.002


def test_the_clock_follows_a_card_that_runs_slow() -> None:
    now = Now()
    clock = CaptureClock(now_ns=now)
    for k in range(10_000):  # 100 ppm over 400 s: 40 ms
        now.ns = 1_000 * NS + int((k + 1) * 40_000_000 * (1 + 100e-6))
        at_ns, _ = clock.stamp(BLOCK)
    assert abs(now.ns - 40_000_000 - at_ns) < 1_000_000


def test_a_burst_from_a_server_is_placed_in_the_past_not_in_the_future() -> None:
    now = Now()
    clock = CaptureClock(now_ns=now)
    for _ in range(100):
        at_ns, _ = clock.stamp(BLOCK)
        assert at_ns + 40_000_000 <= now.ns


def test_a_long_silence_starts_a_session() -> None:
    now = Now()
    clock = CaptureClock(now_ns=now)
    clock.stamp(BLOCK)
    now.ns += 5 * NS
    assert clock.stamp(BLOCK) == (now.ns - 40_000_000, True)


@pytest.mark.parametrize("rate_hz", [16_000, 48_000, 44_100])
def test_converted_blocks_are_contiguous_in_time_and_lose_nothing(rate_hz: int) -> None:
    now = Now()
    converter = LiveConverter(rate_hz, now)
    began_ns, taken, blocks = now.ns, 0, []
    for n in (rate_hz // 25,) * 100:
        taken += n
        now.ns = began_ns + taken * NS // rate_hz
        blocks += converter.convert(np.sin(2 * np.pi * 440 * np.arange(taken - n, taken) / rate_hz) * 0.5)
    blocks += converter.interrupt()
    assert [b.starts_session for b in blocks] == [True] + [False] * (len(blocks) - 1)
    position = 0
    for block in blocks:
        assert abs(block.captured_at_ns - (began_ns + position * NS // 16_000)) < 1_000_000
        position += len(block.pcm)
    assert position == 64_000


def test_after_a_gap_the_next_block_starts_a_session_and_the_rest_before_it_is_handed_out() -> None:
    now = Now()
    converter = LiveConverter(48_000, now)
    first = converter.convert(np.full(4800, 0.25))
    now.ns += 10 * NS
    second = converter.convert(np.full(4800, -0.25))
    joined = [*first, *second]
    assert [b.starts_session for b in joined].count(True) == 2
    start = [b.starts_session for b in joined].index(True, 1)
    assert sum(len(b.pcm) for b in joined[:start]) == 1600
    assert all((b.pcm > 0).mean() > 0.9 for b in joined[:start])
    assert joined[start].captured_at_ns == now.ns - 100_000_000


def test_connect_tries_again_until_it_works_and_gives_up_when_told() -> None:
    tries = []

    def attempt() -> str:
        tries.append(1)
        if len(tries) < 4:
            raise SourceError("No.")
        return "open"

    stop = threading.Event()
    assert connect(attempt, stop, "x", retries=None, first_retry_seconds=0.001) == "open"
    tries.clear()
    with pytest.raises(SourceError, match="No"):
        connect(attempt, stop, "x", retries=2, first_retry_seconds=0.001)
    assert len(tries) == 3
    stop.set()
    tries.clear()
    assert connect(attempt, stop, "x", retries=None) is None
