"""Batch normalisation of rows, as ``slim.batch_norm(center=True, scale=True)`` with its defaults does it."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

_EPSILON = 1e-3
_DECAY = 0.999


class BatchNorm(tf.Module):
    """``(N, C)`` float32 -> ``(N, C)``: by the batch's own statistics while training, by moving ones otherwise.

    Source: TF-Slim ``batch_norm``; like it, it normalises by the population variance (1/N) and keeps the sample
    variance (1/(N-1)).
    """

    def __init__(self, channels: int, *, scope: str) -> None:
        super().__init__()
        self._scope = scope
        zeros, ones = np.zeros(channels, np.float32), np.ones(channels, np.float32)
        self.beta = tf.Variable(zeros, name=f"{scope}/beta")
        self.gamma = tf.Variable(ones, name=f"{scope}/gamma")
        self.moving_mean, self.moving_variance = (
            tf.Variable(
                initial,
                trainable=False,
                name=f"{scope}/{name}",
                # Under tf.distribute each replica keeps its own; what is read is their mean.
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.MEAN,
            )
            for name, initial in (("moving_mean", zeros), ("moving_variance", ones))
        )

    def __call__(self, x: tf.Tensor, *, training: bool) -> tf.Tensor:
        if not training:
            gain = self.gamma * tf.math.rsqrt(self.moving_variance + _EPSILON)
            return (x - self.moving_mean) * gain + self.beta
        y, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            x[:, None, None, :], self.gamma, self.beta, epsilon=_EPSILON, is_training=True
        )
        self.moving_mean.assign_sub((self.moving_mean - mean) * (1.0 - _DECAY))
        self.moving_variance.assign_sub((self.moving_variance - variance) * (1.0 - _DECAY))
        return y[:, 0, 0, :]

    def named_variables(self) -> dict[str, tf.Variable]:
        """Original name -> variable."""
        return {
            f"{self._scope}/beta": self.beta,
            f"{self._scope}/gamma": self.gamma,
            f"{self._scope}/moving_mean": self.moving_mean,
            f"{self._scope}/moving_variance": self.moving_variance,
        }
