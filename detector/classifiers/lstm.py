"""YouTube-8M ``LstmModel``: stacked LSTMs over a window of embeddings, their last state to a MoE or logistic layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import tensorflow as tf

from detector.classifiers.initial import glorot_uniform
from detector.classifiers.logistic import Logistic
from detector.classifiers.moe import Moe
from detector.errors import ModelError

_FINAL = ("moe", "logistic")
_MAX_SIZE = 65_536


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
        for name in ("classes", "input_size", "cells", "layers", "mixtures"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= _MAX_SIZE:
                raise ModelError(f"LSTM parameter {name} is {value!r}; a whole number from 1 to {_MAX_SIZE} is needed.")
        if self.final not in _FINAL:
            raise ModelError(f"LSTM parameter final is {self.final!r}; allowed: {', '.join(_FINAL)}.")

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> LstmConfig:
        """From a manifest's ``params``; ModelError for an unknown name or a value that can't be."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(params) - set(known))
        if unknown:
            raise ModelError(f"LSTM parameters {unknown} are unknown; allowed: {', '.join(known)}.")
        return cls(**params)


class LstmModel(tf.Module):
    """``(B, T, D)`` float32 dequantised features and ``(B,)`` int32 valid rows -> ``(B, V)`` float32 probabilities.

    Rows are scaled to unit length first, as the starter code's graph does for every model. Rows from ``num_frames`` on
    have no effect; with ``num_frames`` 0 the state is 0. Source: google/youtube-8m, ``frame_level_models.py`` on
    ``BasicLSTMCell`` (gates in the order i, j, f, o; 1 is added to the forget gate).
    """

    def __init__(self, config: LstmConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        random = np.random.default_rng(seed)
        self._layers: list[tuple[tf.Variable, tf.Variable]] = []
        for i in range(config.layers):
            rows = (config.input_size if i == 0 else config.cells) + config.cells
            scope = f"tower/rnn/multi_rnn_cell/cell_{i}/basic_lstm_cell"
            kernel = tf.Variable(glorot_uniform((rows, 4 * config.cells), random), name=f"{scope}/kernel")
            bias = tf.Variable(np.zeros(4 * config.cells, np.float32), name=f"{scope}/bias")
            self._layers.append((kernel, bias))
        self.final: Moe | Logistic = (
            Moe(config.cells, config.classes, config.mixtures, random=random)
            if config.final == "moe"
            else Logistic(config.cells, config.classes, random=random)
        )

    def __call__(self, x: tf.Tensor, num_frames: tf.Tensor) -> tf.Tensor:
        return self.final(self.pooled(x, num_frames))

    def pooled(self, x: tf.Tensor, num_frames: tf.Tensor) -> tf.Tensor:
        """``(B, cells)``: the last layer's state after row ``num_frames - 1``, the input of the final classifier."""
        valid = tf.sequence_mask(num_frames, tf.shape(x)[1])[:, :, None]  # (B, T, 1)
        x = tf.math.l2_normalize(tf.where(valid, x, tf.zeros_like(x)), axis=2, epsilon=1e-12)
        h = tf.transpose(x, (1, 0, 2))  # (T, B, D)
        for kernel, bias in self._layers:
            h = _lstm_layer(h, kernel, bias)
        last = tf.maximum(num_frames - 1, 0)
        state = tf.gather_nd(h, tf.stack([last, tf.range(tf.shape(h)[1])], axis=1))  # (B, cells)
        return state * tf.cast(num_frames > 0, tf.float32)[:, None]

    def named_variables(self) -> dict[str, tf.Variable]:
        """Original name -> variable."""
        named: dict[str, tf.Variable] = {}
        for i, (kernel, bias) in enumerate(self._layers):
            scope = f"tower/rnn/multi_rnn_cell/cell_{i}/basic_lstm_cell"
            named[f"{scope}/kernel"], named[f"{scope}/bias"] = kernel, bias
        return named | self.final.named_variables()

    def regularisation_loss(self, l2: float = 1e-8) -> tf.Tensor:
        """The starter code's penalty: ``l2 / 2 * sum(W ** 2)`` over the final classifier's weights."""
        return l2 * tf.add_n([tf.nn.l2_loss(w) for w in self.final.regularised_variables()])


def _lstm_layer(x: tf.Tensor, kernel: tf.Variable, bias: tf.Variable) -> tf.Tensor:
    """``(T, B, D)`` -> ``(T, B, cells)``: every step's output, from a zero state, in one fused operation.

    Causal, so a shorter sequence's result is among the steps: no masking of the state is needed.
    """
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
