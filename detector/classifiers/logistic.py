"""YouTube-8M ``LogisticModel``: one linear layer and a sigmoid, on one vector a clip."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from detector.classifiers.initial import glorot_uniform


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
