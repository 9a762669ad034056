"""Front end, network and postprocessor as one graph: what runs on the device for each batch."""

from __future__ import annotations

import tensorflow as tf

from detector.embedders.log_mel import log_mel
from detector.embedders.postprocess import Pca, postprocess


class Embedder(tf.Module):
    """``(B, 15600)`` int16 -> ``(B, 128)`` float32; the PCM goes to the device as it is."""

    def __init__(self, network: tf.Module, pca: Pca | None) -> None:
        super().__init__(name="embedder")
        self.network = network
        self._pca = pca

    def __call__(self, pcm: tf.Tensor) -> tf.Tensor:
        raw = self.network(log_mel(pcm))
        return raw if self._pca is None else postprocess(raw, self._pca)
