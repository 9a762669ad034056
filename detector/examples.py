"""Chunks of one stream -> examples.

One example needs 15,600 samples, one chunk has 15,360: an example is the 240 samples before a chunk and the chunk.
The first chunk of a session is preceded by zeros, so the examples are those of the reference on 240 zeros + the whole
recording, bit for bit. With ``hop_seconds`` 0.48 a second example lies across the seam of each two chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detector.chunk import CHUNK_SAMPLES, Pcm
from detector.embedders.params import CARRY_SAMPLES, EXAMPLE_SAMPLES
from detector.errors import ConfigError
from detector.onset import LOOKBACK_SAMPLES


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """15,600 samples of one stream.

    Attributes:
        start_sample: index in the session of the first sample; -240 for the first example.
        pcm: ``(15600,) int16``.
        context: ``(LOOKBACK_SAMPLES + 15600,) int16``: the same samples with what came before them (zeros before the
            session's first sample).
    """

    start_sample: int
    pcm: Pcm
    context: Pcm

    @property
    def end_sample(self) -> int:
        """Index of the first sample after the example."""
        return self.start_sample + EXAMPLE_SAMPLES


def hop_samples_of(hop_seconds: float) -> int:
    """0.96 -> 15360, 0.48 -> 7680. Raises ConfigError for anything else."""
    hops = {0.96: CHUNK_SAMPLES, 0.48: CHUNK_SAMPLES // 2}
    if hop_seconds not in hops:
        raise ConfigError(f"hop_seconds is {hop_seconds}; allowed are 0.96 (one example a chunk) and 0.48 (two).")
    return hops[hop_seconds]


class ExampleAssembler:
    """The carry-over of one contiguous run of chunks. Memory: under 100 kB."""

    def __init__(self, hop_samples: int = CHUNK_SAMPLES) -> None:
        self._hop_samples = hop_samples
        # before the newest example's start there must be room for its look-back and for the example one hop earlier
        self._tail_samples = CARRY_SAMPLES + LOOKBACK_SAMPLES + (CHUNK_SAMPLES - hop_samples)
        self._tail: Pcm = np.zeros(self._tail_samples, np.int16)
        self._fresh = True

    def reset(self) -> None:
        """Forget: the next chunk begins a new run, preceded by zeros."""
        self._tail = np.zeros(self._tail_samples, np.int16)
        self._fresh = True

    def push(self, pcm: Pcm, first_sample: int) -> list[Example]:
        """Add the run's next chunk, ``(15360,) int16``, and return the examples that it completes, oldest first."""
        run = np.concatenate([self._tail, pcm])
        run.flags.writeable = False
        run_start = first_sample - self._tail_samples
        newest = first_sample - CARRY_SAMPLES
        starts = range(newest - (CHUNK_SAMPLES - self._hop_samples), newest + 1, self._hop_samples)
        if self._fresh:
            starts = starts[-1:]  # one hop earlier there is nothing but zeros
        self._fresh = False
        self._tail = run[-self._tail_samples :].copy()  # a view would keep the whole run alive
        examples = []
        for start in starts:
            at = start - run_start
            examples.append(
                Example(start, run[at : at + EXAMPLE_SAMPLES], run[at - LOOKBACK_SAMPLES : at + EXAMPLE_SAMPLES])
            )
        return examples
