"""YouTube-8M ``LstmModel``: stacked LSTMs over a window of embeddings, their last state to a MoE or logistic layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from detector.classifiers.base import PoolingClassifier
from detector.classifiers.features import unit_rows, without_padding
from detector.classifiers.final import FINALS, build_final
from detector.classifiers.initial import glorot_uniform
from detector.classifiers.params import check_choice, check_sizes, config_from
from detector.classifiers.products import product

# Training unrolls short sequences of wide layers: large matrix products, which oneDNN does about twice as fast as the
# fused operation's own. Below this width the fused operation wins; above this length tracing would take too long.
_MIN_UNROLLED_CELLS = 64
_MAX_UNROLLED_ROWS = 64


@dataclass(frozen=True, slots=True)
class LstmConfig:
    """Shape of an LstmModel. Defaults are the starter code's flags on AudioSet's 128-value features."""

    classes: int = 527
    input_size: int = 128
    cells: int = 1024
    layers: int = 2
    final: str = "moe"
    mixtures: int = 2

    def __post_init__(self) -> None:
        check_sizes(self, ("classes", "input_size", "cells", "layers", "mixtures"), "LSTM")
        check_choice(self, "final", FINALS, "LSTM")

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> LstmConfig:
        """From a manifest's ``params``; ModelError for an unknown name or a value that can't be."""
        return config_from(cls, params, "LSTM")


class LstmModel(PoolingClassifier):
    """``(B, T, D)`` float32 dequantised features and ``(B,)`` int32 valid rows -> ``(B, V)`` float32 probabilities.

    Rows are scaled to unit length first, as the starter code's graph does for every model. Rows from ``num_frames`` on
    have no effect; with ``num_frames`` 0 the state is 0. Source: google/youtube-8m, ``frame_level_models.py`` on
    ``BasicLSTMCell`` (gates in the order i, j, f, o; 1 is added to the forget gate).
    """

    uniforms_per_clip = 0
    video_level = False

    def __init__(self, config: LstmConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.input_size = config.input_size
        random = np.random.default_rng(seed)
        self._layers: list[tuple[tf.Variable, tf.Variable]] = []
        for i in range(config.layers):
            rows = (config.input_size if i == 0 else config.cells) + config.cells
            scope = f"tower/rnn/multi_rnn_cell/cell_{i}/basic_lstm_cell"
            kernel = tf.Variable(glorot_uniform((rows, 4 * config.cells), random), name=f"{scope}/kernel")
            bias = tf.Variable(np.zeros(4 * config.cells, np.float32), name=f"{scope}/bias")
            self._layers.append((kernel, bias))
        self.final = build_final(config.final, config.cells, config.classes, config.mixtures, random)

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
        """``(B, cells)``: the last layer's state after row ``num_frames - 1``, the input of the final classifier.

        ``training`` only picks the faster way to the same values; ``mixed_precision`` counts only with it, for
        ``cells`` from 64 on and up to 64 rows.
        """
        h = self.states(without_padding(x, num_frames), training=training, mixed_precision=mixed_precision)
        last = tf.maximum(num_frames - 1, 0)
        state = tf.gather_nd(h, tf.stack([last, tf.range(tf.shape(h)[1])], axis=1))  # (B, cells)
        return state * tf.cast(num_frames > 0, tf.float32)[:, None]

    def states(self, x: tf.Tensor, *, training: bool = False, mixed_precision: bool = False) -> tf.Tensor:
        """``(B, T, D)`` -> ``(T, B, cells)``: the last layer's state after every row: of every window that begins here.

        Arguments as in ``pooled``.
        """
        h = tf.transpose(unit_rows(x), (1, 0, 2))  # (T, B, D)
        for kernel, bias in self._layers:
            h = lstm_layer(h, kernel, bias, training=training, mixed_precision=mixed_precision)
        return h

    def pooling_variables(self) -> dict[str, tf.Variable]:
        """Kernels and biases, layer by layer."""
        named: dict[str, tf.Variable] = {}
        for i, (kernel, bias) in enumerate(self._layers):
            scope = f"tower/rnn/multi_rnn_cell/cell_{i}/basic_lstm_cell"
            named[f"{scope}/kernel"], named[f"{scope}/bias"] = kernel, bias
        return named


def lstm_layer(
    x: tf.Tensor, kernel: tf.Variable, bias: tf.Variable, *, training: bool = False, mixed_precision: bool = False
) -> tf.Tensor:
    """``(T, B, D)`` -> ``(T, B, cells)``: every step's output, from a zero state, as ``BasicLSTMCell`` gives it.

    Causal, so a shorter sequence's result is among the steps: no masking of the state is needed. ``training`` only
    picks the faster way to the same values; ``mixed_precision`` counts only with it, where it unrolls.
    """
    steps, cells = x.shape[0], bias.shape[0] // 4
    if training and cells >= _MIN_UNROLLED_CELLS and steps is not None and 1 <= steps <= _MAX_UNROLLED_ROWS:
        return _unrolled_lstm_layer(x, kernel, bias, mixed_precision)
    return _fused_lstm_layer(x, kernel, bias)


def _fused_lstm_layer(x: tf.Tensor, kernel: tf.Variable, bias: tf.Variable) -> tf.Tensor:
    """In one operation."""
    cells = bias.shape[0] // 4
    zero_state = tf.zeros((tf.shape(x)[1], cells))
    unused = tf.zeros((cells,))  # peepholes
    return tf.raw_ops.BlockLSTM(
        seq_len_max=tf.cast(tf.shape(x)[0], tf.int64),
        x=x,
        cs_prev=zero_state,
        h_prev=zero_state,
        w=kernel,
        wci=unused,
        wcf=unused,
        wco=unused,
        b=bias,
        forget_bias=1.0,
        cell_clip=-1.0,
        use_peephole=False,
    ).h


def _unrolled_lstm_layer(x: tf.Tensor, kernel: tf.Variable, bias: tf.Variable, mixed_precision: bool) -> tf.Tensor:
    """As ``_fused_lstm_layer`` for a known T, with its gradient written out.

    Products with the input, and those that give the kernel's gradient, are taken over all steps at once; those with
    the zero state before the first step are left out.
    """
    steps, size, cells = x.shape[0], x.shape[2], bias.shape[0] // 4

    def by(a: tf.Tensor, b: tf.Tensor, **transposed: bool) -> tf.Tensor:
        return product(a, b, mixed_precision=mixed_precision, **transposed)

    def layer(x: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> Any:
        rows = tf.reshape(x, (-1, size))  # (T * B, D)
        of_input, of_state = kernel[:size], kernel[size:]
        z_all = tf.split(by(rows, of_input) + bias, steps)  # T of (B, 4 * cells)
        states: list[tf.Tensor] = []
        saved: list[tuple[tf.Tensor, ...]] = []
        c = tf.zeros((tf.shape(x)[1], cells))
        for t in range(steps):
            z = z_all[t] + by(states[-1], of_state) if t else z_all[t]
            i, j, f, o = tf.split(z, 4, axis=1)
            i, j, f, o = tf.sigmoid(i), tf.tanh(j), tf.sigmoid(f + 1.0), tf.sigmoid(o)
            before = c
            c = before * f + i * j
            squashed = tf.tanh(c)
            states.append(squashed * o)
            saved.append((i, j, f, o, before, squashed))

        def gradient(d_states: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            d_z_all: list[tf.Tensor] = []
            d_c = d_h = tf.zeros_like(c)
            for t in reversed(range(steps)):
                i, j, f, o, before, squashed = saved[t]
                d_h = d_h + d_states[t]
                d_c = d_c + d_h * o * (1.0 - squashed * squashed)
                d_z = tf.concat(
                    [
                        d_c * j * i * (1.0 - i),
                        d_c * i * (1.0 - j * j),
                        d_c * before * f * (1.0 - f),
                        d_h * squashed * o * (1.0 - o),
                    ],
                    axis=1,
                )
                d_z_all.insert(0, d_z)
                if t:
                    d_c, d_h = d_c * f, by(d_z, of_state, transpose_b=True)
            d_z = tf.concat(d_z_all, axis=0)  # (T * B, 4 * cells)
            d_x = tf.reshape(by(d_z, of_input, transpose_b=True), tf.shape(x))
            d_of_input = by(rows, d_z, transpose_a=True)
            d_of_state = (
                by(tf.concat(states[:-1], axis=0), tf.concat(d_z_all[1:], axis=0), transpose_a=True)
                if steps > 1
                else tf.zeros_like(of_state)
            )
            return d_x, tf.concat([d_of_input, d_of_state], axis=0), tf.reduce_sum(d_z, axis=0)

        return tf.stack(states), gradient

    return tf.custom_gradient(layer)(x, tf.convert_to_tensor(kernel), tf.convert_to_tensor(bias))
