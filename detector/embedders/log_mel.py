"""Waveform -> log-mel examples, twice: the float64 reference in NumPy and the float32 one on the device that serves.

First stage of the embedder. The reference decides what is right (1e-9 of AudioSet's own code); ``log_mel`` follows it
to 1e-3 and is what every model sees in production, so models are trained on it as well.
"""

from __future__ import annotations

from collections.abc import Callable
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

_PART_EXAMPLES = 16  # what one core works through at a time; larger batches are cut into such parts


def log_mel(pcm: tf.Tensor) -> tf.Tensor:
    """``(B, 15600)`` int16 at 16 kHz -> ``(B, 96, 64)`` float32, on the device; within 1e-3 of the reference.

    On a processor it is compiled (XLA), once for each batch size: framing, window and magnitude fuse, which halves the
    time. Compiled code runs on one core, so larger batches go in parts, side by side. An example gets the same bits in
    every batch. Memory-bound throughout; measured by ``tests/benchmarks/bench_front_end.py``.
    """
    import tensorflow as tf

    compute = _compiled()
    batch = pcm.shape[0]
    if batch is None or batch <= _PART_EXAMPLES or batch % _PART_EXAMPLES:
        return compute(pcm)
    return tf.concat([compute(part) for part in tf.split(pcm, batch // _PART_EXAMPLES)], axis=0)


@lru_cache(maxsize=1)
def _compiled() -> Callable[[tf.Tensor], tf.Tensor]:
    """Compiled for processors; a GPU's own kernels (cuFFT) need no compiler on the machine."""
    import tensorflow as tf

    return tf.function(_log_mel, jit_compile=not tf.config.list_physical_devices("GPU"))  # type: ignore[no-any-return]


def _log_mel(pcm: tf.Tensor) -> tf.Tensor:
    import tensorflow as tf

    params, (hann, mel) = FRONT_END, _tables(FRONT_END)
    frames, hop, window, fft = params.example_frames, params.hop_samples, params.window_samples, params.fft_samples
    x = tf.pad(tf.cast(pcm, tf.float32), [[0, 0], [0, 3 * hop - window]])  # (B, 97 or 98 hops)
    # A frame is two hops and a half: three views of the samples, one hop apart, side by side.
    views = [tf.reshape(x[:, k * hop : (k + frames) * hop], (-1, frames, hop)) for k in range(3)]
    framed = tf.concat([*views[:2], views[2][:, :, : window - 2 * hop]], axis=2) * (hann / 32768.0).astype(
        np.float32
    )  # (B, 96, 400)
    used = np.flatnonzero(mel.any(axis=1))  # bins 5 to 239; the others weigh nothing in any band
    low, high = int(used[0]), int(used[-1]) + 1
    spectrum = tf.signal.rfft(framed, [fft])[:, :, low:high]  # (B, 96, 235)
    real, imaginary = tf.math.real(spectrum), tf.math.imag(spectrum)
    magnitude = tf.sqrt(real * real + imaginary * imaginary)
    bands = tf.matmul(tf.reshape(magnitude, (-1, high - low)), mel[low:high].astype(np.float32))  # (96 B, 64)
    return tf.reshape(tf.math.log(bands + np.float32(params.log_offset)), (-1, frames, params.mel_bands))
