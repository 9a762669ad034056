"""What a source of sound is: an iterator of blocks, mono int16 at 16 kHz, each with the time at which it was captured.

First station of the walk: source -> chunk -> bus. Sources know no bus and no chunks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import tenacity

from detector.audio import FloatArray, Int16Array, LiveResampler, float_to_int16
from detector.chunk import RATE_HZ
from detector.errors import SourceError

WallClock = Callable[[], int]  # Unix nanoseconds
NS = 1_000_000_000
T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A piece of a stream, of any length.

    Attributes:
        pcm: ``(n,) int16`` mono at 16 kHz.
        captured_at_ns: capture time of the first sample, Unix nanoseconds.
        starts_session: nothing is known of the sound right before (first block, reconnected, samples were lost).
    """

    pcm: Int16Array
    captured_at_ns: int
    starts_session: bool = False


class Source(Protocol):
    """A microphone, an address, a pipe."""

    @property
    def name(self) -> str:
        """What messages call it; without credentials."""
        ...

    def blocks(self, stop: threading.Event) -> Iterator[Block]:
        """Yield what is heard until the sound ends or ``stop`` is set.

        A source that can come back (device, address) reconnects by itself. Raises SourceError where that is hopeless.
        """
        ...

    def close(self) -> None:
        """Release the device or connection. May be called twice, and from another thread."""
        ...


def samples_to_ns(samples: int) -> int:
    """Duration of so many 16 kHz samples in nanoseconds, exact."""
    return samples * NS // RATE_HZ


class CaptureClock:
    """Capture times of a live source, from the times at which its blocks arrive.

    A block arrives when its last sample has been captured, or later. So the earliest arrivals are the most exact ones:
    an arrival before its computed time moves the anchor back at once, a later one pulls it forward by at most 200 ppm,
    more than any sound card's crystal is off. Times are thus never in the future, and follow the card. An arrival more
    than a second late means that sound was lost, or that the system's clock was set: ``stamp`` then says that a session
    starts.
    """

    LOST_NS = NS
    DRIFT = 200e-6

    def __init__(self, rate_hz: int = RATE_HZ, now_ns: WallClock = time.time_ns) -> None:
        self._rate_hz = rate_hz
        self._now_ns = now_ns
        self._anchor_ns: int | None = None
        self._samples = 0

    def reset(self) -> None:
        """Forget the anchor: the next block starts a session."""
        self._anchor_ns = None
        self._samples = 0

    def stamp(self, block_samples: int, latency_seconds: float = 0.0) -> tuple[int, bool]:
        """Return ``(captured_at_ns, starts_session)`` of a block that has just arrived."""
        length_ns = block_samples * NS // self._rate_hz
        arrived_ns = self._now_ns() - int(latency_seconds * NS)
        starts = self._anchor_ns is None
        if self._anchor_ns is None:
            self._anchor_ns, self._samples = arrived_ns - length_ns, 0
        late_ns = arrived_ns - (self._anchor_ns + (self._samples + block_samples) * NS // self._rate_hz)
        if late_ns > self.LOST_NS:
            self._anchor_ns, self._samples, starts = arrived_ns - length_ns, 0, True
        elif late_ns < 0:
            self._anchor_ns += late_ns
        else:
            self._anchor_ns += min(late_ns, int(length_ns * self.DRIFT))
        captured_at_ns = self._anchor_ns + self._samples * NS // self._rate_hz
        self._samples += block_samples
        return max(0, captured_at_ns), starts


class LiveConverter:
    """Live sound at any rate -> blocks at 16 kHz with their capture times."""

    def __init__(self, rate_hz: int, now_ns: WallClock = time.time_ns) -> None:
        """Raises AudioError for a rate that is not read."""
        self._rate_hz = rate_hz
        self._clock = CaptureClock(rate_hz, now_ns)
        self._resampler = LiveResampler(rate_hz)
        self._taken = 0  # samples of the session, at the source's rate
        self._given = 0  # at 16 kHz
        self._at_ns = 0

    def interrupt(self) -> list[Block]:
        """Samples were lost: hand out what is held; the next block starts a session."""
        rest = self._blocks(self._resampler.finish(), self._at_ns, False)
        self._clock.reset()
        self._resampler = LiveResampler(self._rate_hz)
        self._taken = self._given = 0
        return rest

    def convert(self, x: FloatArray, latency_seconds: float = 0.0) -> list[Block]:
        """Take ``(n,)`` mono samples in [-1, 1] that have just arrived."""
        at_ns, starts = self._clock.stamp(len(x), latency_seconds)
        blocks: list[Block] = []
        if starts and self._taken:
            # The clock has found a gap by itself. It is anchored already, only the filter starts afresh.
            blocks = self._blocks(self._resampler.finish(), self._at_ns, False)
            self._resampler = LiveResampler(self._rate_hz)
            self._taken = self._given = 0
        # When the resampler's first output sample was captured, by the clock's newest knowledge.
        self._at_ns = at_ns - self._taken * NS // self._rate_hz
        self._taken += len(x)
        return blocks + self._blocks(self._resampler.process(x), self._at_ns, self._given == 0)

    def _blocks(self, y: FloatArray, began_ns: int, starts: bool) -> list[Block]:
        if not len(y):
            return []
        block = Block(float_to_int16(y), max(0, began_ns + samples_to_ns(self._given)), starts)
        self._given += len(y)
        return [block]


def connect(
    attempt: Callable[[], T],
    stop: threading.Event,
    name: str,
    *,
    retries: int | None,
    first_retry_seconds: float = 0.5,
    last_retry_seconds: float = 30.0,
) -> T | None:
    """Call ``attempt`` until it raises no SourceError, waiting longer and longer between, with jitter.

    Returns None once ``stop`` is set. Raises the last SourceError after ``retries`` further attempts (None: never).
    """

    def say(state: tenacity.RetryCallState) -> None:
        if state.attempt_number in (1, 10, 100) and state.outcome is not None:
            _log.warning("%s Trying again.", state.outcome.exception())

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(SourceError),
        wait=tenacity.wait_random_exponential(multiplier=first_retry_seconds, max=last_retry_seconds),
        stop=tenacity.stop_any(
            tenacity.stop_when_event_set(stop),
            tenacity.stop_never if retries is None else tenacity.stop_after_attempt(retries + 1),
        ),
        sleep=tenacity.sleep_using_event(stop),
        before_sleep=say,
        reraise=True,
    )
    try:
        return retrying(attempt)
    except SourceError:
        if stop.is_set():
            return None
        raise
