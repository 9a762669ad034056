"""A shot that any gunfire model hears, for tests and benchmarks of what is around the model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import signal

from detector.chunk import CHUNK_SAMPLES, RATE_HZ
from detector.synthesis import muzzle_blast

SHOT_SAMPLES = 12_000


def street_shot(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """A pistol at some 100 m in a street: blast, two echoes, a reverberant tail; ``(12000,)``, peak 0.7."""
    wet = _in_a_street(rng, blast_seconds=0.002, reverberation=0.02, decay_seconds=0.12)
    return _at_peak(signal.sosfilt(signal.butter(1, 2_500, fs=RATE_HZ, output="sos"), wet))


def reverberant_shot(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """One whose street rings nearly as loud as the blast: what the built-in model is surest of; as above."""
    return _at_peak(_in_a_street(rng, blast_seconds=0.0005, reverberation=0.15, decay_seconds=0.3))


def _in_a_street(
    rng: np.random.Generator, *, blast_seconds: float, reverberation: float, decay_seconds: float
) -> npt.NDArray[np.float64]:
    dry = np.zeros(SHOT_SAMPLES)
    blast = muzzle_blast(150.0, blast_seconds, lead_samples=0)[:SHOT_SAMPLES]
    dry[: len(blast)] = blast
    response = rng.normal(0, reverberation, SHOT_SAMPLES) * np.exp(-np.arange(SHOT_SAMPLES) / (decay_seconds * RATE_HZ))
    response[0] = 1.0
    response[[1_300, 2_900]] += (0.4, -0.3)
    return np.asarray(np.convolve(dry, response)[:SHOT_SAMPLES])


def _at_peak(wet: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(0.7 * wet / np.abs(wet).max())


Shot = Callable[[np.random.Generator], npt.NDArray[np.float64]]


def noise_with_shots(
    rng: np.random.Generator, chunks: int, at_samples: range, shot: Shot = street_shot
) -> npt.NDArray[np.float64]:
    """Faint noise, and a shot at each of the samples; ``(chunks * 15360,)`` within ±1."""
    x = rng.normal(0, 0.002, chunks * CHUNK_SAMPLES)
    for at in at_samples:
        x[at : at + SHOT_SAMPLES] += shot(rng)[: len(x) - at]
    return x
