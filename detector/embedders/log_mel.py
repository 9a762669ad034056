"""Waveform -> log-mel examples, twice: the float64 reference in NumPy and the float32 one on the device that serves.

First stage of the embedder. The reference decides what is right (1e-9 of AudioSet's own code); ``log_mel`` follows it
to 1e-3 and is what every model sees in production, so models are trained on it as well.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from detector.embedders.params import FRONT_END, FrontEndParams
from detector.errors import AudioError

if TYPE_CHECKING:
    import tensorflow as tf

FloatArray = npt.NDArray[np.float64]


# --- the reference, float64 ---------------------------------------------------------------------------------------


def log_mel_frames(x: npt.NDArray[np.floating], params: FrontEndParams = FRONT_END) -> FloatArray:
    """``(n,)`` samples in [-1, 1] at 16 kHz -> ``(F, 64)`` float64, ``F = 1 + floor((n - 400) / 160)``.

    Raises AudioError where the original raises: below 240 samples, where the formula for F turns negative. From 240 to
    399 samples F is 0.
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 1:
        raise AudioError(f"The front end takes one channel, shape (n,), not {x.shape}; make it mono first.")
    frames_count = 1 + (len(x) - params.window_samples) // params.hop_samples
    if frames_count < 0:
        raise AudioError(
            f"{len(x)} samples are too short for the front end, which needs at least "
            f"{params.window_samples - params.hop_samples} (and {params.example_samples} for one example)."
        )
    if frames_count == 0:
        return np.zeros((0, params.mel_bands))
    hann, mel = _tables(params)
    frames = np.lib.stride_tricks.sliding_window_view(x, params.window_samples)[:: params.hop_samples]  # (F, 400)
    magnitude = np.abs(np.fft.rfft(frames * hann, params.fft_samples))  # (F, 257)
    return np.asarray(np.log(magnitude @ mel + params.log_offset), np.float64)  # (F, 64)


def log_mel_examples(x: npt.NDArray[np.floating], params: FrontEndParams = FRONT_END) -> FloatArray:
    """``(n,)`` samples in [-1, 1] at 16 kHz -> ``(E, 96, 64)`` float64: complete, non-overlapping examples only.

    ``E = floor((n - 240) / 15360)``; AudioError below 240 samples (see ``log_mel_frames``).
    """
    frames = log_mel_frames(x, params)
    count = max(0, 1 + (len(frames) - params.example_frames) // params.example_hop_frames)
    examples = np.empty((count, params.example_frames, params.mel_bands))
    for j in range(count):
        start = j * params.example_hop_frames
        examples[j] = frames[start : start + params.example_frames]
    return examples


@lru_cache(maxsize=4)
def _tables(params: FrontEndParams) -> tuple[FloatArray, FloatArray]:
    hann, mel = params.hann(), params.mel_matrix()
    hann.flags.writeable = mel.flags.writeable = False
    return hann, mel


# --- in the graph, float32 ----------------------------------------------------------------------------------------


def log_mel(pcm: tf.Tensor) -> tf.Tensor:
    """``(B, 15600)`` int16 at 16 kHz -> ``(B, 96, 64)`` float32, on the device; within 1e-3 of the reference.

    Only the 235 bins that the mel bands use are computed, as a matrix product. A frame is taken about its centre:
    there its even part gives the real and its odd part the imaginary half of the spectrum (a shift changes the phase,
    not the magnitude), which halves the work. The window and 1/32768 are folded into the matrices.
    """
    import tensorflow as tf

    cosine, sine, mel = _dft_tables()
    bins = cosine.shape[1]
    x = tf.cast(pcm, tf.float32)  # (B, 15600)
    right = _half_frames(x, 200)  # (B, 96, 200): x[160 k + 200 + m]
    left = tf.reverse(_half_frames(tf.reverse(x, [1]), 199), [1])  # (B, 96, 200): x[160 k + 200 - m]
    real = tf.matmul(tf.reshape(right + left, (-1, 200)), cosine)  # (96 B, 235)
    imaginary = tf.matmul(tf.reshape(right - left, (-1, 200)), sine)  # (96 B, 235)
    magnitude = tf.sqrt(real * real + imaginary * imaginary)
    bands = tf.math.log(tf.matmul(tf.reshape(magnitude, (-1, bins)), mel) + np.float32(FRONT_END.log_offset))
    return tf.reshape(bands, (-1, FRONT_END.example_frames, FRONT_END.mel_bands))


def _half_frames(x: tf.Tensor, start: int) -> tf.Tensor:
    """``(B, 96, 200)``: 200 samples from each of ``start + 160 k``, by reshaping alone (200 = 160 + 40)."""
    import tensorflow as tf

    frames, hop = FRONT_END.example_frames, FRONT_END.hop_samples
    first = tf.reshape(x[:, start : start + frames * hop], (-1, frames, hop))
    tail = x[:, start + hop :]
    tail = tf.pad(tail, [[0, 0], [0, frames * hop - tail.shape[1]]])
    return tf.concat([first, tf.reshape(tail, (-1, frames, hop))[:, :, :40]], axis=2)


@lru_cache(maxsize=1)
def _dft_tables() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """``(200, 235)`` cosine and sine matrices with window and scale inside, ``(235, 64)`` mel matrix.

    Row 0 of the cosine is halved: there left and right half-frame are the same sample. The sample at -200 is missing
    because the periodic Hann window is 0 there.
    """
    hann, mel = _tables(FRONT_END)
    used = np.flatnonzero(mel.any(axis=1))
    bins = np.arange(used[0], used[-1] + 1)
    half = FRONT_END.window_samples // 2
    angle = 2.0 * np.pi / FRONT_END.fft_samples * np.outer(np.arange(half), bins)
    weight = hann[half:, None] / 32768.0
    cosine, sine = np.cos(angle) * weight, np.sin(angle) * weight
    cosine[0] *= 0.5
    return cosine.astype(np.float32), sine.astype(np.float32), mel[bins].astype(np.float32)
