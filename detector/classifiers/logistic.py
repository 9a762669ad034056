"""YouTube-8M ``LogisticModel``: one linear layer and a sigmoid, on one vector a clip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from detector.classifiers.base import PoolingClassifier
from detector.classifiers.features import clip_features
from detector.classifiers.initial import glorot_uniform
from detector.classifiers.params import check_sizes


class Logistic(tf.Module):
    """``(B, D)`` float32 -> ``(B, V)`` float32 probabilities: ``sigmoid(x W + b)``.

    Source: google/youtube-8m, ``video_level_models.py``.
    """

    def __init__(
        self, input_size: int, classes: int, *, random: np.random.Generator, scope: str = "tower/fully_connected"
    ) -> None:
        super().__init__()
        self._scope = scope
        self.weights = tf.Variable(glorot_uniform((input_size, classes), random), name=f"{scope}/weights")
        self.biases = tf.Variable(np.zeros(classes, np.float32), name=f"{scope}/biases")

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        return tf.sigmoid(tf.matmul(x, self.weights) + self.biases)

    def named_variables(self) -> dict[str, tf.Variable]:
        """Original name -> variable."""
        return {f"{self._scope}/weights": self.weights, f"{self._scope}/biases": self.biases}

    def regularised_variables(self) -> list[tf.Variable]:
        """What the starter code's L2 penalty covers: weights, never biases."""
        return [self.weights]


@dataclass(frozen=True, slots=True)
class LogisticConfig:
    """Shape of a LogisticModel. Defaults are AudioSet's."""

    classes: int = 527
    input_size: int = 128

    def __post_init__(self) -> None:
        check_sizes(self, ("classes", "input_size"), "Logistic")


class LogisticModel(PoolingClassifier):
    """``(B, D)`` features of clips, or ``(B, T, D)`` windows taken as their mean -> ``(B, V)`` float32 probabilities.

    Features are scaled to unit length first. Source: google/youtube-8m, ``video_level_models.py``.
    """

    uniforms_per_clip = 0
    video_level = True

    def __init__(self, config: LogisticConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.input_size = config.input_size
        self.final = Logistic(config.input_size, config.classes, random=np.random.default_rng(seed))

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
        """``(B, D)``: the input of the linear layer."""
        return clip_features(x, num_frames)
