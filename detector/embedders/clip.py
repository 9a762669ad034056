"""A whole clip -> log-mel examples -> embeddings -> AudioSet's bytes, the reference way. Offline work, not serving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from detector.audio import clip_16k
from detector.embedders.log_mel import log_mel_examples
from detector.embedders.params import EMBEDDING_SIZE, EXAMPLE_FRAMES, MEL_BANDS
from detector.embedders.postprocess import Pca, quantise

_BATCH = 32


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedClip:
    """One row an example of 0.96 s.

    Attributes:
        log_mel: ``(E, 96, 64)`` float32.
        embeddings: ``(E, 128)`` float32, the network's raw output.
        quantised: ``(E, 128)`` uint8 as released by AudioSet; None without PCA parameters.
    """

    log_mel: npt.NDArray[np.float32]
    embeddings: npt.NDArray[np.float32]
    quantised: npt.NDArray[np.uint8] | None


class ClipEmbedder:
    """Embeds clips through one network; keeps one traced function for all lengths.

    Args:
        network: ``(B, 96, 64)`` float32 -> ``(B, 128)`` float32, from ``build_network``.
        pca: with it, clips are also quantised.
    """

    def __init__(self, network: tf.Module, pca: Pca | None = None) -> None:
        self._pca = pca
        spec = tf.TensorSpec([None, EXAMPLE_FRAMES, MEL_BANDS], tf.float32)
        self._network = tf.function(lambda x: network(x)).get_concrete_function(spec)

    def embed_file(self, path: Path) -> EmbeddedClip:
        """Any audio file, made mono and resampled as AudioSet does. AudioError where it can't be read."""
        return self.embed(clip_16k(path))

    def embed(self, x: npt.NDArray[np.floating]) -> EmbeddedClip:
        """``(n,)`` samples in [-1, 1] at 16 kHz. AudioError below 240 samples; below 15,600 there is no example."""
        return self.embed_examples(log_mel_examples(x).astype(np.float32))

    def embed_examples(self, examples: npt.NDArray[np.float32]) -> EmbeddedClip:
        """``(E, 96, 64)`` log-mel examples of one clip, which shares its batches with no other: its bits never vary."""
        parts = [self._network(tf.constant(part)).numpy() for part in _batches(examples)]
        embeddings = np.concatenate(parts) if parts else np.zeros((0, EMBEDDING_SIZE), np.float32)
        return EmbeddedClip(examples, embeddings, None if self._pca is None else quantise(embeddings, self._pca))


def _batches(examples: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
    return [examples[start : start + _BATCH] for start in range(0, len(examples), _BATCH)]
