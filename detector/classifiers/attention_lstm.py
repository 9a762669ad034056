"""Dense layers, an LSTM over their outputs, and attention over the steps of both: more than the last state is used.

Not one of the YouTube-8M models: made for small sets such as AudioSet's balanced one, where those learn by heart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from detector.classifiers.base import PoolingClassifier
from detector.classifiers.features import without_padding
from detector.classifiers.final import FINALS, build_final
from detector.classifiers.initial import glorot_uniform
from detector.classifiers.logistic import Logistic
from detector.classifiers.lstm import lstm_layer
from detector.classifiers.params import check_choice, check_shares, check_sizes
from detector.classifiers.products import product

_EPSILON = 1e-3  # of layer normalisation
_RARE = math.log(0.01)  # first bias of a logistic end: most classes are absent from most clips


@dataclass(frozen=True, slots=True)
class AttentionLstmConfig:
    """Shape of an AttentionLstmModel.

    Attributes:
        dense: width of each dense layer.
        dense_layers: how many come before the LSTM.
        input_dropout, dropout, pooled_dropout: shares of values that training hides: of the input; of what each dense
            layer and the LSTM give; of what the final classifier sees.
    """

    classes: int = 527
    input_size: int = 128
    dense: int = 512
    dense_layers: int = 2
    cells: int = 256
    input_dropout: float = 0.1
    dropout: float = 0.4
    pooled_dropout: float = 0.3
    final: str = "logistic"
    mixtures: int = 2

    def __post_init__(self) -> None:
        check_sizes(self, ("classes", "input_size", "dense", "dense_layers", "cells", "mixtures"), "Attention-LSTM")
        check_shares(self, ("input_dropout", "dropout", "pooled_dropout"), "Attention-LSTM")
        check_choice(self, "final", FINALS, "Attention-LSTM")


class AttentionLstmModel(PoolingClassifier):
    """``(B, T, D)`` float32 dequantised features and ``(B,)`` int32 valid rows -> ``(B, V)`` float32 probabilities.

    Each row passes dense layers (layer normalisation, ReLU); an LSTM runs over the last one's outputs. Dense outputs
    and LSTM outputs side by side, ``dense + cells`` values a step, are averaged over the steps with weights of their
    own for every value: a softmax over the steps of a linear function of all values. Rows from ``num_frames`` on have
    no effect; with ``num_frames`` 0 what is pooled is 0.

    Source: attention over steps for every value: Kong et al. 2019, "Weakly labelled AudioSet tagging with attention
    neural networks" (feature-level attention); the LSTM: ``detector.classifiers.lstm``.
    """

    uniforms_per_clip = 0
    video_level = False

    def __init__(self, config: AttentionLstmConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.input_size = config.input_size
        random = np.random.default_rng(seed)
        self._dense: list[_Dense] = []
        size = config.input_size
        for i in range(config.dense_layers):
            self._dense.append(_Dense(size, config.dense, random, scope=f"tower/dense_{i}"))
            size = config.dense
        kernel = glorot_uniform((size + config.cells, 4 * config.cells), random)
        self._kernel = tf.Variable(kernel, name="tower/lstm/kernel")
        self._bias = tf.Variable(np.zeros(4 * config.cells, np.float32), name="tower/lstm/bias")
        size += config.cells
        self._attention = tf.Variable(glorot_uniform((size, size), random), name="tower/attention/weights")
        self.final = build_final(config.final, size, config.classes, config.mixtures, random)
        if isinstance(self.final, Logistic):
            self.final.biases.assign(np.full(config.classes, _RARE, np.float32))

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
        """``(B, dense + cells)``: the input of the final classifier.

        Args:
            training: with it and ``seed``, dropout.
        """
        config = self.config
        dropout = _Dropout(seed if training else None)
        mixed_precision = mixed_precision and training
        steps, batch = x.shape[1] or tf.shape(x)[1], tf.shape(x)[0]
        h = tf.transpose(without_padding(x, num_frames), (1, 0, 2))
        h = tf.reshape(h, (-1, config.input_size))  # (T * B, D)
        h = dropout(h, config.input_dropout)
        for layer in self._dense:
            h = dropout(tf.nn.relu(layer(h, mixed_precision)), config.dropout)
        states = lstm_layer(
            tf.reshape(h, (steps, batch, config.dense)),
            self._kernel,
            self._bias,
            training=training,
            mixed_precision=mixed_precision,
        )
        states = dropout(tf.reshape(states, (-1, config.cells)), config.dropout)
        h = tf.concat([h, states], axis=1)  # (T * B, dense + cells)
        logits = product(h, self._attention, mixed_precision=mixed_precision)
        valid = tf.transpose(tf.sequence_mask(num_frames, steps))[:, :, None]  # (T, B, 1)
        weights = _softmax_of_valid(tf.reshape(logits, (steps, batch, h.shape[1])), valid)
        pooled = tf.reduce_sum(weights * tf.reshape(h, (steps, batch, h.shape[1])), axis=0)
        return dropout(pooled, config.pooled_dropout)

    def pooling_variables(self) -> dict[str, tf.Variable]:
        """Name -> variable, of all but ``final``."""
        named: dict[str, tf.Variable] = {}
        for layer in self._dense:
            named |= layer.named_variables()
        return named | {
            "tower/lstm/kernel": self._kernel,
            "tower/lstm/bias": self._bias,
            "tower/attention/weights": self._attention,
        }


class _Dense(tf.Module):
    """``(N, D)`` -> ``(N, width)``: a linear layer whose rows are normalised to mean 0 and variance 1, then scaled."""

    def __init__(self, size: int, width: int, random: np.random.Generator, *, scope: str) -> None:
        super().__init__()
        self._scope = scope
        self.weights = tf.Variable(glorot_uniform((size, width), random), name=f"{scope}/weights")
        self.gains = tf.Variable(np.ones(width, np.float32), name=f"{scope}/gains")
        self.biases = tf.Variable(np.zeros(width, np.float32), name=f"{scope}/biases")

    def __call__(self, x: tf.Tensor, mixed_precision: bool) -> tf.Tensor:
        y = product(x, self.weights, mixed_precision=mixed_precision)
        y -= tf.reduce_mean(y, axis=1, keepdims=True)
        scale = tf.math.rsqrt(tf.reduce_mean(tf.square(y), axis=1, keepdims=True) + _EPSILON)
        return y * scale * self.gains + self.biases

    def named_variables(self) -> dict[str, tf.Variable]:
        """Name -> variable."""
        return {
            f"{self._scope}/weights": self.weights,
            f"{self._scope}/gains": self.gains,
            f"{self._scope}/biases": self.biases,
        }


class _Dropout:
    """Hides values by chance and scales up the rest; the same seed hides the same ones, call by call."""

    def __init__(self, seed: tf.Tensor | None) -> None:
        self._seed = seed
        self._calls = 0

    def __call__(self, x: tf.Tensor, share: float) -> tf.Tensor:
        """``share`` is taken in steps of 1/256: one random byte a value, a quarter of what whole numbers cost."""
        levels = min(round(share * 256), 255)  # 256 would hide everything
        if self._seed is None or levels == 0:
            return x
        self._calls += 1
        seed = self._seed + tf.constant([self._calls << 40, 0], tf.int64)
        count = tf.size(x)
        words = tf.random.stateless_uniform(((count + 3) // 4,), seed, minval=None, maxval=None, dtype=tf.uint32)
        chances = tf.reshape(tf.reshape(tf.bitcast(words, tf.uint8), (-1,))[:count], tf.shape(x))
        return tf.where(chances >= tf.constant(levels, tf.uint8), x * (256.0 / (256 - levels)), tf.zeros_like(x))


def _softmax_of_valid(logits: tf.Tensor, valid: tf.Tensor) -> tf.Tensor:
    """``(T, B, C)`` -> weights that sum to 1 over the valid steps; all 0 where none is valid."""
    most = tf.reduce_max(tf.where(valid, logits, logits.dtype.min), axis=0)
    powers = tf.where(valid, tf.exp(tf.where(valid, logits - most, 0.0)), 0.0)
    return tf.math.divide_no_nan(powers, tf.reduce_sum(powers, axis=0))
