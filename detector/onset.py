"""When exactly the shots of a firing example began: PCM -> onsets.

Called by ``pipeline`` for examples that support an alert, with the PCM before them as background. An onset is a sudden
rise of the band-passed short-term energy over what was heard just before. The edge where digital silence ends or begins
and a step of the gain are no onsets. Deterministic float64 arithmetic, no state.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from detector.audio import FloatArray, Int16Array
from detector.chunk import RATE_HZ

BLOCK_SAMPLES = 32  # 2 ms: the resolution of the search
MIN_SPACING_SAMPLES = 800  # 50 ms: closer onsets are one
MIN_RISE_DB = 9.0
MAX_ONSETS = 28  # in one call: 1.375 s of the closest
SEARCH_BACK_SAMPLES = 6_400  # 400 ms before a firing example the pipeline's search begins: an echo can fire it alone

# Another number whenever other onsets may be found: alerts of other rules are not gone on with.
ONSET_RULES = 2

ECHO_DROP_DB = 10.0  # what is so much weaker than something in the 0.6 s before is its echo
MIN_DECAY_DB = 4.0  # what falls less in the 0.4 s after is a step of the level, not an impulse
SILENCE_FALL_DB = 12.0  # what falls so much after digital silence is a shot, less is only the end of the padding
BURST_DROP_DB = 4.0  # the next shot of a burst is at most so much weaker than the one before

# All in blocks of 2 ms; tuned on FP1-FP4 of the ShotSpotter live-fire test, see tests/benchmarks/bench_onset.py.
_AFTER_BLOCKS = 5  # the level after an onset
_BEFORE_BLOCKS = 50  # the background before it
_MIN_BACKGROUND_BLOCKS = 10  # less background than this is none
_BURST_BEFORE_BLOCKS = 10  # background inside a burst, whose shots are 60 to 100 ms apart
_BURST_BLOCKS = 75  # longest pause between two shots of a burst
_SPACING_BLOCKS = MIN_SPACING_SAMPLES // BLOCK_SAMPLES
_ECHO_BLOCKS = 300
_DECAY_BLOCKS = 200
_MIN_DECAY_BLOCKS = 30
_FILTER_BLOCKS = 2  # half the filter's length, rounded up

LOOKBACK_SAMPLES = SEARCH_BACK_SAMPLES + _ECHO_BLOCKS * BLOCK_SAMPLES
"""What a search wants to see before a firing example: where it begins, and what may echo there."""

_BAND_HZ = (300.0, 3_400.0)
_TAPS = 65


@dataclass(frozen=True, slots=True)
class Onset:
    """Where one shot begins.

    Attributes:
        sample: index in the session.
        peak_dbfs: highest absolute sample within 20 ms after it, relative to full scale; None if not measured.
        rise_db: rise of the band-passed energy over the background.
        certain: False for the strongest rise of an example in which none stands out.
    """

    sample: int
    peak_dbfs: float | None
    rise_db: float
    certain: bool


def find_onsets(
    pcm: Int16Array,
    first_sample: int,
    *,
    search_from: int | None = None,
    min_rise_db: float = MIN_RISE_DB,
) -> list[Onset]:
    """Find the impulses in ``pcm``, oldest first; always at least one.

    Args:
        pcm: ``(n,) int16``, 16 kHz: a firing example with what came before it (0.6 s before ``search_from`` is enough).
        first_sample: index in the session of ``pcm[0]``; may be negative.
        search_from: index in the session of the first sample that may be an onset; what is before is background only.
            None: all of ``pcm``. Samples before the session (negative) are never an onset.
        min_rise_db: smallest rise over the background that is certain.

    Returns:
        Onsets at least MIN_SPACING_SAMPLES apart, all within ``pcm``.

    Raises:
        ValueError: ``pcm`` is empty or not one-dimensional int16, or nothing of it may be searched.
    """
    if pcm.ndim != 1 or pcm.dtype != np.int16 or len(pcm) == 0:
        raise ValueError(f"PCM is {pcm.dtype}{list(pcm.shape)}; expected int16 [n], n > 0.")
    start = max(0, -first_sample, (first_sample if search_from is None else search_from) - first_sample)
    if start >= len(pcm):
        raise ValueError(f"search_from {search_from} is after the end of the PCM, {first_sample + len(pcm)}.")
    candidates = _candidates(pcm, start, min_rise_db)
    return [
        Onset(first_sample + at, _peak_dbfs(pcm[at : at + 320]), round(rise, 1), certain)
        for at, rise, certain in candidates
    ]


def _candidates(pcm: Int16Array, start: int, min_rise_db: float) -> list[tuple[int, float, bool]]:
    """``(index in pcm, rise in dB, certain)`` of each onset at ``start`` or later, oldest first."""
    blocks = len(pcm) // BLOCK_SAMPLES
    if blocks <= _AFTER_BLOCKS:
        return [(max(start, int(np.argmax(np.abs(pcm.astype(np.int32))))), 0.0, False)]
    offset = len(pcm) - blocks * BLOCK_SAMPLES
    energy, heard = _band_energy(pcm[offset:])
    total = np.concatenate([[0.0], np.cumsum(energy)])
    count = np.concatenate([[0], np.cumsum(heard)])
    k = np.arange(blocks)
    ahead = np.minimum(k + _AFTER_BLOCKS, blocks)
    after = np.maximum(total[ahead] - total[k], 0.0) / np.maximum(count[ahead] - count[k], 1)  # (blocks,)

    def rise_over(before_blocks: int) -> FloatArray:
        behind = np.maximum(k - before_blocks, 0)
        heard_blocks = count[k] - count[behind]
        before = np.maximum(total[k] - total[behind], 0.0) / np.maximum(heard_blocks, 1)
        rise = 10.0 * np.log10((after + 1.0) / (before + 1.0))  # + 1: one bit of int16, so that silence has no rise
        return np.where(heard & (heard_blocks >= _MIN_BACKGROUND_BLOCKS), rise, 0.0)

    def impulse(i: int) -> bool:
        loudest_before = after[max(0, i - _ECHO_BLOCKS) : i + 1].max()
        return bool(loudest_before <= after[i] * 10 ** (ECHO_DROP_DB / 10)) and _decays(after, heard, i)

    first_block = max(0, (start - offset) // BLOCK_SAMPLES - 1)  # a rise can peak in the block before the onset
    rise = np.maximum(rise_over(_BEFORE_BLOCKS), _rise_from_silence(after, total, count, heard))
    chosen = [i for i in _apart(rise, min_rise_db) if i >= first_block and impulse(i)]
    if not chosen:
        first_block = min(first_block, blocks - 1)
        loudest = first_block + int(np.argmax(after[first_block:]))
        i = next((i for i in _apart(rise, 0.1) if i >= first_block and impulse(i)), loudest)
        return [(min(max(start, offset + i * BLOCK_SAMPLES), len(pcm) - 1), float(max(rise[i], 0.0)), False)]
    burst_rise = rise_over(_BURST_BEFORE_BLOCKS)
    for i in sorted(_apart(burst_rise, min_rise_db)):  # the next shots of a burst, one after the other
        before = max((c for c in chosen if c < i), default=None)
        if (
            i >= first_block
            and before is not None
            and i - before <= _BURST_BLOCKS
            and after[i] * 10 ** (BURST_DROP_DB / 10) >= after[before]
            and all(abs(i - c) >= _SPACING_BLOCKS for c in chosen)
            and impulse(i)
        ):
            chosen.append(i)
            rise[i] = burst_rise[i]
    return [(max(start, offset + i * BLOCK_SAMPLES), float(rise[i]), True) for i in sorted(chosen)[:MAX_ONSETS]]


def _rise_from_silence(
    after: FloatArray, total: FloatArray, count: npt.NDArray[np.int64], heard: npt.NDArray[np.bool_]
) -> FloatArray:
    """``(blocks,)``: for sound that sets in from digital silence, with no background to compare with: how far it falls
    again within 0.4 s, in dB. A shot does; recorded noise that begins or goes on after padding doesn't. 0 elsewhere."""
    blocks = len(after)
    fall_db = np.zeros(blocks)
    sets_in = np.flatnonzero(heard[1:] & ~heard[:-1]) + 1
    sets_in = sets_in[count[sets_in] - count[np.maximum(sets_in - _BEFORE_BLOCKS, 0)] < _MIN_BACKGROUND_BLOCKS]
    sets_in = sets_in[sets_in + _BEFORE_BLOCKS + _MIN_DECAY_BLOCKS <= blocks]  # later it is too early to say
    if len(sets_in) == 0:
        return fall_db
    loudest = np.max(np.lib.stride_tricks.sliding_window_view(after, _MIN_BACKGROUND_BLOCKS)[sets_in], axis=1)
    tail_from, tail_to = sets_in + _BEFORE_BLOCKS, np.minimum(sets_in + _DECAY_BLOCKS, blocks)
    tail = np.maximum(total[tail_to] - total[tail_from], 0.0) / (tail_to - tail_from)
    fall = 10.0 * np.log10((loudest + 1.0) / (tail + 1.0))
    fall_db[np.maximum(sets_in - _FILTER_BLOCKS, 0)] = np.where(fall >= SILENCE_FALL_DB, fall, 0.0)
    return fall_db


def _apart(rise: FloatArray, min_rise_db: float) -> list[int]:
    """Blocks whose rise is enough, the highest first, each at least the spacing from the ones before."""
    enough = np.flatnonzero(rise >= min_rise_db)
    apart: list[int] = []
    for i in enough[np.argsort(-rise[enough], kind="stable")].tolist():
        if all(abs(i - c) >= _SPACING_BLOCKS for c in apart):
            apart.append(i)
    return apart


def _band_energy(pcm: Int16Array) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Mean square of the band-passed signal in each block, and which blocks are real sound: not digital silence (a
    constant value), nor so near to its edge that the filter answers to the edge. ``(blocks,)`` each; 0 where unreal."""
    blocks = len(pcm) // BLOCK_SAMPLES
    rows = pcm.reshape(blocks, BLOCK_SAMPLES)
    silent = np.ptp(rows, axis=1) == 0
    heard = ~np.convolve(silent, np.ones(2 * _FILTER_BLOCKS + 1), mode="same").astype(bool)[:blocks]
    band = np.convolve(pcm.astype(np.float64), _kernel(), mode="same")
    energy = np.mean(np.square(band).reshape(blocks, BLOCK_SAMPLES), axis=1)
    return np.where(heard, energy, 0.0), heard


def _decays(after: FloatArray, heard: npt.NDArray[np.bool_], block: int) -> bool:
    """Whether the level falls again after ``block``: an impulse does, a step of the gain doesn't."""
    later = slice(block + _AFTER_BLOCKS, block + _AFTER_BLOCKS + _DECAY_BLOCKS)
    tail = after[later][heard[later]]
    if len(tail) < _MIN_DECAY_BLOCKS:
        return True  # too near to the end to say
    return bool(np.partition(tail, len(tail) // 10)[len(tail) // 10] * 10 ** (MIN_DECAY_DB / 10) <= after[block])


@functools.cache
def _kernel() -> npt.NDArray[np.float64]:
    """Hamming-windowed sinc band-pass, ``(65,)``, gain 1 in the band."""
    n = np.arange(_TAPS) - _TAPS // 2
    low, high = (2.0 * f / RATE_HZ for f in _BAND_HZ)
    kernel: npt.NDArray[np.float64] = (high * np.sinc(high * n) - low * np.sinc(low * n)) * np.hamming(_TAPS)
    kernel.flags.writeable = False
    return kernel


def _peak_dbfs(pcm: Int16Array) -> float:
    """Highest absolute sample in dB of full scale; -96.3 for silence."""
    peak = int(np.max(np.abs(pcm.astype(np.int32)))) if len(pcm) else 0
    return round(20.0 * math.log10(max(peak, 0.5) / 32768.0), 1)
