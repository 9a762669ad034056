"""The only place for int16 <-> float, mono, resampling and reading files.

Two ways to 16 kHz: whole clips follow the AudioSet reference (``resample_reference``: resampy ``kaiser_best``),
live sources use a streaming resampler whose seams are inaudible.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from detector.chunk import RATE_HZ
from detector.errors import AudioError

MIN_RATE_HZ = 1_000
MAX_RATE_HZ = 384_000
MAX_CHANNELS = 64

FloatArray = npt.NDArray[np.float64]
Int16Array = npt.NDArray[np.int16]


def int16_to_float(pcm: Int16Array) -> FloatArray:
    """``x / 32768`` in float64, as the reference does; exact."""
    return pcm / 32768.0


def float_to_int16(x: npt.NDArray[np.floating]) -> Int16Array:
    """Round ``32768 x`` to the nearest int16, clipping; the inverse of ``int16_to_float`` on its range."""
    return np.clip(np.rint(np.asarray(x, np.float64) * 32768.0), -32768, 32767).astype(np.int16)


def to_mono(x: FloatArray) -> FloatArray:
    """``(n,)`` or ``(n, channels)`` -> ``(n,)``: the mean over channels."""
    return x if x.ndim == 1 else np.mean(x, axis=1)


def resample_reference(x: FloatArray, rate_hz: int) -> FloatArray:
    """Resample a whole mono clip to 16 kHz the way the AudioSet code does (resampy ``kaiser_best``).

    Raises AudioError for a rate outside 1 to 384 kHz or a clip too short to give one sample.
    """
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise AudioError(f"Sample rate {rate_hz} Hz is not within {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz.")
    if rate_hz == RATE_HZ or len(x) == 0:
        return x
    if len(x) * RATE_HZ // rate_hz < 1:
        raise AudioError(f"{len(x)} samples at {rate_hz} Hz are less than one sample at {RATE_HZ} Hz.")
    import resampy

    return np.asarray(resampy.resample(x, rate_hz, RATE_HZ, filter="kaiser_best"), np.float64)
