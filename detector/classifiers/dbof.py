"""YouTube-8M ``DbofModel``, a deep bag of frames: sampled rows to clusters, pooled, then two more layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from detector.classifiers.base import PoolingClassifier
from detector.classifiers.batch_norm import BatchNorm
from detector.classifiers.features import unit_rows
from detector.classifiers.final import FINALS, build_final
from detector.classifiers.initial import normal
from detector.classifiers.params import check_choice, check_flags, check_sizes
from detector.classifiers.products import product

_ACTIVATIONS: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "sigmoid": tf.sigmoid,
    "relu6": tf.nn.relu6,
    "relu": tf.nn.relu,
    "tanh": tf.tanh,
}
_POOLINGS = ("max", "average")
_HIDDEN_BIAS_DEVIATION = 0.01


@dataclass(frozen=True, slots=True)
class DbofConfig:
    """Shape of a DbofModel. Defaults are the starter code's flags on AudioSet's 128-value features.

    Attributes:
        iterations: rows sampled of each clip.
        random_frames: rows drawn one by one; False: ``iterations`` rows in sequence from a drawn start.
        activation: after clusters and after the hidden layer.
    """

    classes: int = 527
    input_size: int = 128
    clusters: int = 8192
    hidden: int = 1024
    iterations: int = 30
    batch_norm: bool = True
    random_frames: bool = True
    pooling: str = "max"
    activation: str = "sigmoid"
    final: str = "moe"
    mixtures: int = 2

    def __post_init__(self) -> None:
        check_sizes(self, ("classes", "input_size", "clusters", "hidden", "iterations", "mixtures"), "DBoF")
        check_flags(self, ("batch_norm", "random_frames"), "DBoF")
        check_choice(self, "pooling", _POOLINGS, "DBoF")
        check_choice(self, "activation", tuple(_ACTIVATIONS), "DBoF")
        check_choice(self, "final", FINALS, "DBoF")


class DbofModel(PoolingClassifier):
    """``(B, T, D)`` float32 dequantised features and ``(B,)`` valid rows -> ``(B, V)`` float32 probabilities.

    Which rows are sampled follows from ``uniforms`` in [0, 1): ``(B, iterations)`` for random frames, ``(B, 1)`` for a
    sequence. The original draws them anew in every run, even when it evaluates. Here they may be given; where they
    are not, as when the detector serves, they are spread evenly, ``(j + 0.5) / iterations`` (for a sequence: 0.5, the
    middle start), so that a window always scores the same. With ``iterations`` a multiple of ``num_frames`` every row
    then counts equally. Rows from ``num_frames`` on are never sampled; with ``num_frames`` 0 the first row is.

    Source: google/youtube-8m, ``frame_level_models.py`` and ``model_utils.py``.
    """

    video_level = False

    def __init__(self, config: DbofConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.input_size = config.input_size
        self._activation = _ACTIVATIONS[config.activation]
        random = np.random.default_rng(seed)
        size, clusters, hidden = config.input_size, config.clusters, config.hidden
        deviation = 1.0 / math.sqrt(size)
        self.cluster_weights = tf.Variable(normal((size, clusters), deviation, random), name="tower/cluster_weights")
        self.hidden1_weights = tf.Variable(
            normal((clusters, hidden), 1.0 / math.sqrt(clusters), random), name="tower/hidden1_weights"
        )
        self.input_bn: BatchNorm | None = None
        self._after_cluster: BatchNorm | tf.Variable
        self._after_hidden: BatchNorm | tf.Variable
        if config.batch_norm:
            self.input_bn = BatchNorm(size, scope="tower/input_bn")
            self._after_cluster = BatchNorm(clusters, scope="tower/cluster_bn")
            self._after_hidden = BatchNorm(hidden, scope="tower/hidden1_bn")
        else:
            self._after_cluster = tf.Variable(normal((clusters,), deviation, random), name="tower/cluster_biases")
            self._after_hidden = tf.Variable(
                normal((hidden,), _HIDDEN_BIAS_DEVIATION, random), name="tower/hidden1_biases"
            )
        self.final = build_final(config.final, hidden, config.classes, config.mixtures, random)

    @property
    def uniforms_per_clip(self) -> int:
        """Columns of ``uniforms``."""
        return self.config.iterations if self.config.random_frames else 1

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
        """``(B, hidden)``: the input of the final classifier. ``training`` also moves the moving statistics."""
        rows = self._sampled_rows(num_frames, uniforms)  # (B, iterations)
        frames = unit_rows(tf.gather(x, rows, batch_dims=1))
        y = tf.reshape(frames, (-1, self.config.input_size))  # (B * iterations, D)
        if self.input_bn is not None:
            y = self.input_bn(y, training=training)
        y = product(y, self.cluster_weights, mixed_precision=mixed_precision)
        y = self._activation(_normalised_or_biased(y, self._after_cluster, training))
        y = tf.reshape(y, (-1, self.config.iterations, self.config.clusters))
        y = tf.reduce_max(y, axis=1) if self.config.pooling == "max" else tf.reduce_mean(y, axis=1)  # (B, clusters)
        y = product(y, self.hidden1_weights, mixed_precision=mixed_precision)
        return self._activation(_normalised_or_biased(y, self._after_hidden, training))

    def _sampled_rows(self, num_frames: tf.Tensor, uniforms: tf.Tensor | None) -> tf.Tensor:
        """``(B, iterations)`` int32 rows below ``num_frames``."""
        columns = self.uniforms_per_clip
        if uniforms is None:
            spread = (np.arange(columns, dtype=np.float32) + np.float32(0.5)) / np.float32(columns)
            uniforms = tf.tile(spread[None], (tf.shape(num_frames)[0], 1))
        count = tf.cast(num_frames, tf.int32)[:, None]
        if self.config.random_frames:
            rows = tf.cast(uniforms * tf.cast(count, tf.float32), tf.int32)
        else:
            starts = tf.maximum(count - self.config.iterations, 0) + 1
            start = tf.cast(uniforms * tf.cast(starts, tf.float32), tf.int32)
            rows = start + tf.range(self.config.iterations)
        return tf.maximum(tf.minimum(rows, count - 1), 0)

    def pooling_variables(self) -> dict[str, tf.Variable]:
        """Clusters and hidden layer, moving statistics included."""
        named: dict[str, tf.Variable] = {} if self.input_bn is None else self.input_bn.named_variables()
        named["tower/cluster_weights"] = self.cluster_weights
        named |= _named(self._after_cluster, "tower/cluster_biases")
        named["tower/hidden1_weights"] = self.hidden1_weights
        return named | _named(self._after_hidden, "tower/hidden1_biases")


def _normalised_or_biased(y: tf.Tensor, after: BatchNorm | tf.Variable, training: bool) -> tf.Tensor:
    return after(y, training=training) if isinstance(after, BatchNorm) else y + after


def _named(after: BatchNorm | tf.Variable, bias_name: str) -> dict[str, tf.Variable]:
    return after.named_variables() if isinstance(after, BatchNorm) else {bias_name: after}
