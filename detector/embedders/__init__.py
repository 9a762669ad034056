"""Waveform -> embedding: log-mel front end, network, postprocessor, and the door that composes them by kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from detector.errors import ModelError

if TYPE_CHECKING:
    import tensorflow as tf

    from detector.embedders.postprocess import Pca

KINDS = ("compact", "vggish")


def tensor_shapes(kind: str) -> Mapping[str, tuple[int, ...]]:
    """Name -> shape of every weight that the network of this kind needs."""
    if kind == "vggish":
        from detector.embedders.vggish import VGGISH_SHAPES

        return VGGISH_SHAPES
    if kind == "compact":
        from detector.embedders.compact import CompactNetwork

        return {name: value.shape for name, value in CompactNetwork(folded=True).weights().items()}
    raise ModelError(f"Embedder kind {kind!r} is unknown; this version knows: {', '.join(KINDS)}.")


def build_network(kind: str, tensors: Mapping[str, npt.NDArray[np.float32]]) -> tf.Module:
    """The network alone: ``(B, 96, 64)`` log-mel -> ``(B, 128)``, float32. ModelError where weights don't fit."""
    if kind == "vggish":
        from detector.embedders.vggish import Vggish

        return Vggish(tensors)
    if kind == "compact":
        from detector.embedders.compact import CompactNetwork

        network = CompactNetwork(folded=True)
        network.load(tensors)
        return network
    raise ModelError(f"Embedder kind {kind!r} is unknown; this version knows: {', '.join(KINDS)}.")


def build_embedder(kind: str, tensors: Mapping[str, npt.NDArray[np.float32]], *, pca: Pca | None = None) -> tf.Module:
    """The whole embedder: ``(B, 15600)`` int16 -> ``(B, 128)`` float32 as the classifier is to see it.

    Args:
        kind: ``compact`` or ``vggish``.
        tensors: the network's weights by name.
        pca: with it, embeddings pass PCA, quantisation and back (what a classifier of AudioSet's features needs);
            without, they are the network's raw output.
    """
    from detector.embedders.embedder import Embedder

    return Embedder(build_network(kind, tensors), pca)
