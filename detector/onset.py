"""When exactly the shots of a firing example began: PCM -> onsets.

Called by ``pipeline`` for examples that support an alert, with the PCM before them as background. An onset is a sudden
rise of the band-passed short-term energy over what was heard just before. The edge where digital silence ends or begins
and a step of the gain are no onsets. Deterministic float64 arithmetic, no state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from detector.audio import FloatArray, Int16Array
from detector.chunk import RATE_HZ

BLOCK_SAMPLES = 32  # 2 ms: the resolution of the search
MIN_SPACING_SAMPLES = 800  # 50 ms: closer onsets are one
MIN_RISE_DB = 9.0
MAX_ONSETS = 20  # in one call; more than a second of automatic fire has

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
        pcm: ``(n,) int16``, 16 kHz: a firing example with what came before it (half a second is enough).
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
    blocks = len(pcm) // BLOCK_SAMPLES
    if blocks < 8:
        return [(max(start, int(np.argmax(np.abs(pcm.astype(np.int32))))), 0.0, False)]
    used = pcm[len(pcm) - blocks * BLOCK_SAMPLES :]
    offset = len(pcm) - len(used)
    band = np.convolve(used.astype(np.float64), _kernel(), mode="same")
    energy = np.mean(np.square(band.reshape(blocks, BLOCK_SAMPLES)), axis=1) + 1.0  # (blocks,)
    rise = _rise_db(energy)
    first_block = max(0, -(-(start - offset) // BLOCK_SAMPLES))
    order = [int(k) for k in np.argsort(-rise, kind="stable") if k >= first_block]
    spacing = MIN_SPACING_SAMPLES // BLOCK_SAMPLES
    chosen: list[int] = []
    for k in order:
        if rise[k] < min_rise_db or len(chosen) == MAX_ONSETS:
            break
        if all(abs(k - c) >= spacing for c in chosen):
            chosen.append(k)
    if not chosen:
        k = order[0] if order else blocks - 1
        return [(min(max(start, offset + k * BLOCK_SAMPLES), len(pcm) - 1), float(max(rise[k], 0.0)), False)]
    return [(max(start, offset + k * BLOCK_SAMPLES), float(rise[k]), True) for k in sorted(chosen)]


def _rise_db(energy: FloatArray) -> FloatArray:
    """``(blocks,)``: level of the next 10 ms over the mean of the 100 ms before, in dB; 0 where nothing is before."""
    total = np.concatenate([[0.0], np.cumsum(energy)])
    k = np.arange(len(energy))
    ahead = np.minimum(k + 5, len(energy))
    behind = np.maximum(k - 50, 0)
    after = (total[ahead] - total[k]) / (ahead - k)
    before = (total[k] - total[behind]) / np.maximum(k - behind, 1)
    rise: FloatArray = np.where(k >= 10, 10.0 * np.log10(after / np.maximum(before, 1.0)), 0.0)
    return rise


def _kernel() -> npt.NDArray[np.float64]:
    """Hamming-windowed sinc band-pass, ``(65,)``, gain 1 in the band."""
    n = np.arange(_TAPS) - _TAPS // 2
    low, high = (2.0 * f / RATE_HZ for f in _BAND_HZ)
    kernel: npt.NDArray[np.float64] = (high * np.sinc(high * n) - low * np.sinc(low * n)) * np.hamming(_TAPS)
    return kernel


def _peak_dbfs(pcm: Int16Array) -> float:
    """Highest absolute sample in dB of full scale; -96.3 for silence."""
    peak = int(np.max(np.abs(pcm.astype(np.int32)))) if len(pcm) else 0
    return round(20.0 * math.log10(max(peak, 0.5) / 32768.0), 1)
