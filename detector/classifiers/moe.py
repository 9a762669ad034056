"""YouTube-8M ``MoeModel``: a mixture of logistic experts for each class, on one vector a clip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from detector.classifiers.base import PoolingClassifier
from detector.classifiers.features import clip_features
from detector.classifiers.initial import glorot_uniform
from detector.classifiers.params import check_sizes


class Moe(tf.Module):
    """``(B, D)`` float32 -> ``(B, V)`` float32 probabilities.

    Per class a softmax over ``mixtures + 1`` gates weighs ``mixtures`` logistic experts; the last gate belongs to a
    dummy expert that always says 0. Columns are class-major. Source: google/youtube-8m, ``video_level_models.py``.
    """

    def __init__(
        self, input_size: int, classes: int, mixtures: int, *, random: np.random.Generator, scope: str = "tower"
    ) -> None:
        super().__init__()
        self._scope, self._classes, self._mixtures = scope, classes, mixtures
        gates = glorot_uniform((input_size, classes * (mixtures + 1)), random)
        experts = glorot_uniform((input_size, classes * mixtures), random)
        self.gates_weights = tf.Variable(gates, name=f"{scope}/gates/weights")
        self.experts_weights = tf.Variable(experts, name=f"{scope}/experts/weights")
        self.experts_biases = tf.Variable(np.zeros(classes * mixtures, np.float32), name=f"{scope}/experts/biases")

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        gates = tf.reshape(tf.matmul(x, self.gates_weights), (-1, self._classes, self._mixtures + 1))
        experts = tf.matmul(x, self.experts_weights) + self.experts_biases
        experts = tf.reshape(tf.sigmoid(experts), (-1, self._classes, self._mixtures))
        return tf.reduce_sum(tf.nn.softmax(gates)[:, :, : self._mixtures] * experts, axis=2)  # (B, V)

    def named_variables(self) -> dict[str, tf.Variable]:
        """Original name -> variable."""
        return {
            f"{self._scope}/gates/weights": self.gates_weights,
            f"{self._scope}/experts/weights": self.experts_weights,
            f"{self._scope}/experts/biases": self.experts_biases,
        }

    def regularised_variables(self) -> list[tf.Variable]:
        """What the starter code's L2 penalty covers: weights, never biases."""
        return [self.gates_weights, self.experts_weights]


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Shape of a MoeModel. Defaults are the starter code's flags on AudioSet's features."""

    classes: int = 527
    input_size: int = 128
    mixtures: int = 2

    def __post_init__(self) -> None:
        check_sizes(self, ("classes", "input_size", "mixtures"), "MoE")


class MoeModel(PoolingClassifier):
    """``(B, D)`` features of clips, or ``(B, T, D)`` windows taken as their mean -> ``(B, V)`` float32 probabilities.

    Features are scaled to unit length first. Source: google/youtube-8m, ``video_level_models.py``.
    """

    uniforms_per_clip = 0
    video_level = True

    def __init__(self, config: MoeConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.input_size = config.input_size
        random = np.random.default_rng(seed)
        self.final = Moe(config.input_size, config.classes, config.mixtures, random=random)

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
        """``(B, D)``: the input of gates and experts."""
        return clip_features(x, num_frames)
