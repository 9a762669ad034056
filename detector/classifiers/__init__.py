"""Windows of embeddings -> class probabilities: the YouTube-8M models, and the door that builds one by its kind.

Last stage of the network. Variables carry the starter code's names, so its checkpoints load as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from detector.checkpoint import check_tensors
from detector.errors import ModelError

if TYPE_CHECKING:
    import tensorflow as tf

KINDS = ("lstm",)


class Classifier(Protocol):
    """What every frame-level classifier is to the pipeline and to the trainer."""

    def __call__(self, x: tf.Tensor, num_frames: tf.Tensor) -> tf.Tensor:
        """``(B, T, D)`` float32 raw features and ``(B,)`` int32 valid rows -> ``(B, V)`` float32 probabilities."""

    def named_variables(self) -> dict[str, tf.Variable]:
        """Original name -> variable, in the order the starter code makes them."""


def build_classifier(kind: str, params: Mapping[str, Any], *, seed: int = 0) -> Classifier:
    """A classifier with fresh weights; ModelError for an unknown kind or parameters that don't fit it."""
    if kind == "lstm":
        from detector.classifiers.lstm import LstmConfig, LstmModel

        return LstmModel(LstmConfig.from_params(params), seed=seed)
    raise ModelError(f"Classifier kind {kind!r} is unknown; this version knows: {', '.join(KINDS)}.")


def shapes(classifier: Classifier) -> dict[str, tuple[int, ...]]:
    """Original name -> shape of every variable."""
    return {name: tuple(variable.shape) for name, variable in classifier.named_variables().items()}


def assign(
    classifier: Classifier, tensors: Mapping[str, npt.NDArray[np.float32]], source: str = "weights given"
) -> None:
    """Set every variable; ModelError where a name, shape, type or value doesn't fit."""
    check_tensors(tensors, shapes(classifier), source)
    for name, variable in classifier.named_variables().items():
        variable.assign(tensors[name])


def weights(classifier: Classifier) -> dict[str, npt.NDArray[np.float32]]:
    """Original name -> value: what a package stores."""
    return {name: variable.numpy() for name, variable in classifier.named_variables().items()}
