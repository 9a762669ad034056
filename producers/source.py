"""What a source of sound is: an iterator of blocks, mono int16 at 16 kHz, each with the time at which it was captured.

First station of the walk: source -> chunk -> bus. Sources know no bus and no chunks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from detector.chunk import RATE_HZ

Int16Array = npt.NDArray[np.int16]
WallClock = Callable[[], int]  # Unix nanoseconds
NS = 1_000_000_000


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

    def __init__(self, now_ns: WallClock = time.time_ns) -> None:
        self._now_ns = now_ns
        self._anchor_ns: int | None = None
        self._samples = 0

    def reset(self) -> None:
        """Forget the anchor: the next block starts a session."""
        self._anchor_ns = None
        self._samples = 0

    def stamp(self, block_samples: int, latency_seconds: float = 0.0) -> tuple[int, bool]:
        """Return ``(captured_at_ns, starts_session)`` of a block that has just arrived."""
        length_ns = samples_to_ns(block_samples)
        arrived_ns = self._now_ns() - int(latency_seconds * NS)
        starts = self._anchor_ns is None
        if self._anchor_ns is None:
            self._anchor_ns, self._samples = arrived_ns - length_ns, 0
        late_ns = arrived_ns - (self._anchor_ns + samples_to_ns(self._samples + block_samples))
        if late_ns > self.LOST_NS:
            self._anchor_ns, self._samples, starts = arrived_ns - length_ns, 0, True
        elif late_ns < 0:
            self._anchor_ns += late_ns
        else:
            self._anchor_ns += min(late_ns, int(length_ns * self.DRIFT))
        captured_at_ns = self._anchor_ns + samples_to_ns(self._samples)
        self._samples += block_samples
        return max(0, captured_at_ns), starts
