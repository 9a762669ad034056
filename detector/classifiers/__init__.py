"""Windows of embeddings -> class probabilities: the YouTube-8M models, and the door that builds one by its kind.

Last stage of the network. Variables carry the starter code's names, so its checkpoints load as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from detector.checkpoint import check_tensors
from detector.classifiers.params import config_from
from detector.errors import ModelError

if TYPE_CHECKING:
    import tensorflow as tf

KINDS = ("lstm", "attention_lstm", "logistic", "moe", "frame_logistic", "dbof")


class Classifier(Protocol):
    """What every classifier is to the pipeline and to the trainer."""

    input_size: int
    """D, values a row."""

    @property
    def video_level(self) -> bool:
        """Whether it sees one vector a clip: then ``(B, D)`` features are taken as they are."""

    @property
    def uniforms_per_clip(self) -> int:
        """Random numbers in [0, 1) that one clip takes while training; 0 where nothing is sampled."""

    def __call__(self, x: tf.Tensor, num_frames: tf.Tensor) -> tf.Tensor:
        """``(B, T, D)`` float32 raw features and ``(B,)`` int32 valid rows -> ``(B, V)`` float32 probabilities.

        Video-level kinds take ``(B, D)`` features of whole clips too. It is ``final(pooled(x, num_frames))``.
        """

    def pooled(
        self,
        x: tf.Tensor,
        num_frames: tf.Tensor,
        *,
        training: bool = False,
        mixed_precision: bool = False,
        uniforms: tf.Tensor | None = None,
        seed: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """What the final classifier sees of a clip, ``(B, P)`` float32.

        Args:
            training: normalise by the batch's own statistics and move the moving ones, where the model has any.
            mixed_precision: large matrix products in bfloat16.
            uniforms: ``(B, uniforms_per_clip)`` float32 in [0, 1) that say which rows to sample; None = fixed ones.
            seed: ``(2,)`` int64 that all other randomness of training (dropout) follows from; None = none is applied.
        """

    def final(self, pooled: tf.Tensor) -> tf.Tensor:
        """``(B, P)`` float32 -> ``(B, V)`` float32 probabilities."""

    def named_variables(self) -> dict[str, tf.Variable]:
        """Original name -> variable, in the order the starter code makes them."""

    def regularised_variables(self) -> list[tf.Variable]:
        """What the starter code's L2 penalty covers."""


def build_classifier(kind: str, params: Mapping[str, Any], *, seed: int = 0) -> Classifier:
    """A classifier with fresh weights; ModelError for an unknown kind or parameters that don't fit it."""
    if kind == "lstm":
        from detector.classifiers.lstm import LstmConfig, LstmModel

        return LstmModel(LstmConfig.from_params(params), seed=seed)
    if kind == "attention_lstm":
        from detector.classifiers.attention_lstm import AttentionLstmConfig, AttentionLstmModel

        return AttentionLstmModel(config_from(AttentionLstmConfig, params, "Attention-LSTM"), seed=seed)
    if kind == "logistic":
        from detector.classifiers.logistic import LogisticConfig, LogisticModel

        return LogisticModel(config_from(LogisticConfig, params, "Logistic"), seed=seed)
    if kind == "moe":
        from detector.classifiers.moe import MoeConfig, MoeModel

        return MoeModel(config_from(MoeConfig, params, "MoE"), seed=seed)
    if kind == "frame_logistic":
        from detector.classifiers.frame_logistic import FrameLogisticConfig, FrameLogisticModel

        return FrameLogisticModel(config_from(FrameLogisticConfig, params, "Frame-level logistic"), seed=seed)
    if kind == "dbof":
        from detector.classifiers.dbof import DbofConfig, DbofModel

        return DbofModel(config_from(DbofConfig, params, "DBoF"), seed=seed)
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


def regularisation_loss(classifier: Classifier, l2: float = 1e-8) -> tf.Tensor:
    """The starter code's penalty: ``l2 / 2 * sum(W ** 2)`` over ``regularised_variables``; scalar float32."""
    import tensorflow as tf

    return l2 * tf.add_n([tf.nn.l2_loss(variable) for variable in classifier.regularised_variables()])
