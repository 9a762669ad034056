"""What training makes small: the starter code's three losses over ``(B, V)`` predictions, in the graph, differentiable.

Source: google/youtube-8m, ``losses.py``. Labels may be bool, or float32 in [0, 1] (smoothed, mixed up).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import tensorflow as tf

from detector.errors import ConfigError

EPSILON = 1e-5
_MIN_ROW_SUM = 1e-7

Loss: TypeAlias = Callable[..., tf.Tensor]
"""Predictions, labels and, where terms have them, weights -> scalar."""


def cross_entropy(
    predictions: tf.Tensor, labels: tf.Tensor, label_weights: tf.Tensor | None = None, *, epsilon: float = EPSILON
) -> tf.Tensor:
    """Mean over rows of the sum over classes of ``-[y ln(p + epsilon) + (1 - y) ln(1 - p + epsilon)]``.

    Args:
        predictions: ``(B, V)`` float32 probabilities.
        labels: ``(B, V)``.
        label_weights: factors of every term: ``(B, V)``, or ``(V,)`` for classes, or ``(B, 1)`` for rows.
        epsilon: keeps the logarithm finite.

    Returns:
        Scalar float32. ``(1 + epsilon) - p`` is computed in this order, as TensorFlow's graph optimiser makes it of
        the original: in float32 the order matters where p is 1.
    """
    wanted = tf.cast(labels, tf.float32)
    terms = -(wanted * tf.math.log(predictions + epsilon) + (1.0 - wanted) * tf.math.log((1.0 + epsilon) - predictions))
    if label_weights is not None:
        terms *= tf.cast(label_weights, tf.float32)
    return tf.reduce_mean(tf.reduce_sum(terms, axis=1))


def hinge(
    predictions: tf.Tensor, labels: tf.Tensor, label_weights: tf.Tensor | None = None, *, margin: float = 1.0
) -> tf.Tensor:
    """Mean over rows of the sum over classes of ``max(0, margin - (2 y - 1) p)``; shapes as in ``cross_entropy``."""
    sign = 2.0 * tf.cast(labels, tf.float32) - 1.0
    terms = tf.maximum(0.0, margin - sign * predictions)
    if label_weights is not None:
        terms *= tf.cast(label_weights, tf.float32)
    return tf.reduce_mean(tf.reduce_sum(terms, axis=1))


def softmax(predictions: tf.Tensor, labels: tf.Tensor, label_weights: tf.Tensor | None = None) -> tf.Tensor:
    """Mean over rows of ``-sum(y / max(sum(y), 1e-7) * ln softmax(p))``; shapes as in ``cross_entropy``.

    Weights leave the labels' shares as they are.
    """
    wanted = tf.cast(labels, tf.float32)
    terms = wanted / tf.maximum(tf.reduce_sum(wanted, axis=1, keepdims=True), _MIN_ROW_SUM)
    if label_weights is not None:
        terms *= tf.cast(label_weights, tf.float32)
    return tf.reduce_mean(-tf.reduce_sum(terms * tf.nn.log_softmax(predictions), axis=1))


_LOSSES: dict[str, Loss] = {"CrossEntropyLoss": cross_entropy, "HingeLoss": hinge, "SoftmaxLoss": softmax}
LOSS_NAMES = tuple(_LOSSES)


def loss_named(name: str) -> Loss:
    """By the name that the starter code's flag ``--label_loss`` takes; ConfigError for another."""
    if name not in _LOSSES:
        raise ConfigError(f"Loss {name!r} is unknown; there are {', '.join(LOSS_NAMES)}.")
    return _LOSSES[name]
