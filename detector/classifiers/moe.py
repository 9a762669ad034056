"""YouTube-8M ``MoeModel``: a mixture of logistic experts for each class, on one vector a clip."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from detector.classifiers.initial import glorot_uniform


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
