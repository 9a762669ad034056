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
    dry = np.zeros(SHOT_SAMPLES)
    blast = muzzle_blast(150.0, 0.002, lead_samples=0)[:SHOT_SAMPLES]
    dry[: len(blast)] = blast
    response = rng.normal(0, 0.02, SHOT_SAMPLES) * np.exp(-np.arange(SHOT_SAMPLES) / (0.12 * RATE_HZ))
    response[0] = 1.0
    response[[1_300, 2_900]] += (0.4, -0.3)
    low_pass = signal.butter(1, 2_500, fs=RATE_HZ, output="sos")
    wet = signal.sosfilt(low_pass, np.convolve(dry, response)[:SHOT_SAMPLES])
    return np.asarray(0.7 * wet / np.abs(wet).max())


def reverberant_shot(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """One whose street rings nearly as loud as the blast: what the built-in model is surest of; as above."""
    dry = np.zeros(SHOT_SAMPLES)
    blast = muzzle_blast(150.0, 0.0005, lead_samples=0)[:SHOT_SAMPLES]
    dry[: len(blast)] = blast
    response = rng.normal(0, 0.15, SHOT_SAMPLES) * np.exp(-np.arange(SHOT_SAMPLES) / (0.3 * RATE_HZ))
    response[0] = 1.0
    response[[1_300, 2_900]] += (0.4, -0.3)
    wet = np.convolve(dry, response)[:SHOT_SAMPLES]
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
