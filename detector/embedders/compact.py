"""The small network: ``(B, 96, 64)`` log-mel examples -> ``(B, 128)`` embeddings, about 58 MFLOP an example.

Second stage of the embedder where VGGish is too heavy. A residual convolutional network:
a 5x5 stem and seven 3x3 layers.
The same module trains and serves: while training every convolution is followed by batch normalisation;
``folded()`` merges that into kernel and bias, and the folded network is what a model package holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from detector.embedders.params import EMBEDDING_SIZE, EXAMPLE_FRAMES, FRONT_END, MEL_BANDS
from detector.errors import ModelError

FINE_OFFSET = 0.001
"""Under the logarithm of what the network sees: ten times less than the front end's, so quiet sound counts."""
# Fine log-mel values of real rooms and streets lie between ln 0.001 (silence) and about 4.
_LOG_MEL_CENTRE = -2.5
_LOG_MEL_SCALE = 2.5
_NORM_EPSILON = 1e-3
_NORM_MOMENTUM = 0.98


@dataclass(frozen=True, slots=True)
class ConvolutionShape:
    """One convolution, SAME padding; ``residual`` adds its input to its output before the ReLU (same shape needed)."""

    name: str
    kernel: int
    stride: int
    channels_in: int
    channels_out: int
    residual: bool = False


# Level and band limit show in the first input channel; the second, each band less its own mean over time, shows
# only change.
CONVOLUTIONS = (
    ConvolutionShape("stem", 5, 2, 2, 16),
    ConvolutionShape("conv1", 3, 2, 16, 40),
    ConvolutionShape("conv1_residual", 3, 1, 40, 40, residual=True),
    ConvolutionShape("conv2", 3, 2, 40, 80),
    ConvolutionShape("conv2_residual", 3, 1, 80, 80, residual=True),
    ConvolutionShape("conv3", 3, 2, 80, 144),
    ConvolutionShape("conv3_residual", 3, 1, 144, 144, residual=True),
    ConvolutionShape("conv3_residual2", 3, 1, 144, 144, residual=True),
)
_TOTAL_STRIDE = math.prod(c.stride for c in CONVOLUTIONS)
_POOLED_BANDS = MEL_BANDS // _TOTAL_STRIDE
POOLED_SIZE = 2 * _POOLED_BANDS * CONVOLUTIONS[-1].channels_out

assert EXAMPLE_FRAMES % _TOTAL_STRIDE == 0
assert MEL_BANDS % _TOTAL_STRIDE == 0


class _Convolution(tf.Module):
    """Convolution, then batch normalisation (training) or a bias (folded), then ReLU."""

    def __init__(self, shape: ConvolutionShape, *, folded: bool, seed: int) -> None:
        super().__init__(name=shape.name)
        self._shape = shape
        size = (shape.kernel, shape.kernel, shape.channels_in, shape.channels_out)
        deviation = math.sqrt(2.0 / math.prod(size[:3]))
        initial = np.random.default_rng(seed).standard_normal(size).astype(np.float32) * np.float32(deviation)
        self.kernel = tf.Variable(initial, name="kernel")
        ones, zeros = tf.ones([shape.channels_out]), tf.zeros([shape.channels_out])
        self.bias = tf.Variable(zeros, name="bias")
        self.scale: Any = None if folded else tf.Variable(ones, name="scale")
        self.moving_mean: Any = None if folded else tf.Variable(zeros, trainable=False, name="moving_mean")
        self.moving_variance: Any = None if folded else tf.Variable(ones, trainable=False, name="moving_variance")

    def __call__(self, x: tf.Tensor, training: bool) -> tf.Tensor:
        """Products are of ``x``'s type; sums and normalisation float32, and the output is again of ``x``'s type."""
        stride = self._shape.stride
        y = tf.nn.conv2d(x, tf.cast(self.kernel, x.dtype), strides=[1, stride, stride, 1], padding="SAME")
        y = tf.cast(y, tf.float32)
        if self.scale is None:
            y = tf.nn.bias_add(y, self.bias)
        elif training:
            y, mean, variance = tf.compat.v1.nn.fused_batch_norm(
                y, self.scale, self.bias, epsilon=_NORM_EPSILON, is_training=True
            )
            self.moving_mean.assign_sub((1.0 - _NORM_MOMENTUM) * (self.moving_mean - mean))
            self.moving_variance.assign_sub((1.0 - _NORM_MOMENTUM) * (self.moving_variance - variance))
        else:
            y, _, _ = tf.compat.v1.nn.fused_batch_norm(
                y,
                self.scale,
                self.bias,
                mean=self.moving_mean,
                variance=self.moving_variance,
                epsilon=_NORM_EPSILON,
                is_training=False,
            )
        y = tf.cast(y, x.dtype)
        return tf.nn.relu(y + x if self._shape.residual else y)

    def folded_weights(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Kernel and bias that give the same output without normalisation."""
        kernel, bias = self.kernel.numpy(), self.bias.numpy()
        if self.scale is None:
            return kernel, bias
        gain = self.scale.numpy() / np.sqrt(self.moving_variance.numpy() + _NORM_EPSILON)
        return kernel * gain, bias - self.moving_mean.numpy() * gain


class CompactNetwork(tf.Module):
    """``(B, 96, 64) float32`` log-mel -> ``(B, 128) float32`` embeddings.

    Args:
        folded: the form that serves (kernels and biases only); False gives the form that trains.
        seed: of the initial weights.
    """

    def __init__(self, *, folded: bool = True, seed: int = 0) -> None:
        super().__init__(name="compact")
        self._folded = folded
        self._convolutions = [_Convolution(shape, folded=folded, seed=seed + i) for i, shape in enumerate(CONVOLUTIONS)]
        deviation = math.sqrt(1.0 / POOLED_SIZE)
        initial = np.random.default_rng(seed + 100).standard_normal((POOLED_SIZE, EMBEDDING_SIZE)) * deviation
        self.dense_weights = tf.Variable(initial.astype(np.float32), name="embedding_weights")
        self.dense_bias = tf.Variable(tf.zeros([EMBEDDING_SIZE]), name="embedding_bias")

    def __call__(self, log_mel: tf.Tensor) -> tf.Tensor:
        """``(B, 96, 64) float32``, as the front end gives it -> ``(B, 128) float32``."""
        return self.embedding(self.pooled(finer(log_mel)))

    def pooled(self, fine_log_mel: tf.Tensor, *, training: bool = False, mixed_precision: bool = False) -> tf.Tensor:
        """``(B, 96, 64) float32`` over ``FINE_OFFSET`` -> ``(B, POOLED_SIZE) float32``: means and maxima over time.

        Args:
            training: use and update batch statistics.
            mixed_precision: products of the convolutions in bfloat16.
        """
        x = tf.cast(_channels(fine_log_mel), tf.bfloat16 if mixed_precision else tf.float32)
        for convolution in self._convolutions:
            x = convolution(x, training)
        x = tf.cast(x, tf.float32)
        pooled = tf.concat([tf.reduce_mean(x, axis=1), tf.reduce_max(x, axis=1)], axis=-1)  # (B, 4, 288)
        return tf.reshape(pooled, [-1, POOLED_SIZE])

    def embedding(self, pooled: tf.Tensor) -> tf.Tensor:
        """``(B, POOLED_SIZE) float32`` -> ``(B, 128) float32``."""
        return tf.nn.bias_add(tf.matmul(pooled, self.dense_weights), self.dense_bias)

    def weights(self) -> dict[str, npt.NDArray[np.float32]]:
        """Name -> value of every variable, in a fixed order: what a checkpoint or a package stores."""
        return {name: variable.numpy() for name, variable in self._named_variables()}

    def load(self, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Set every variable. Raises ModelError where names or shapes do not fit this form of the network."""
        variables = dict(self._named_variables())
        missing, unknown = sorted(set(variables) - set(tensors)), sorted(set(tensors) - set(variables))
        if missing or unknown:
            raise ModelError(
                f"These are no weights of the compact network: missing {missing or 'none'}, "
                f"unknown {unknown or 'none'}."
            )
        for name, variable in variables.items():
            if tuple(variable.shape) != tensors[name].shape:
                raise ModelError(
                    f"Weight {name} of the compact network must have shape {tuple(variable.shape)}, "
                    f"not {tensors[name].shape}."
                )
            variable.assign(tensors[name])

    def folded(self) -> CompactNetwork:
        """The network that serves: same outputs as this one with ``training=False`` to float32 rounding."""
        served = CompactNetwork(folded=True)
        tensors: dict[str, npt.NDArray[np.float32]] = {}
        for convolution, shape in zip(self._convolutions, CONVOLUTIONS, strict=True):
            tensors[f"{shape.name}/kernel"], tensors[f"{shape.name}/bias"] = convolution.folded_weights()
        tensors["embedding/weights"] = self.dense_weights.numpy()
        tensors["embedding/bias"] = self.dense_bias.numpy()
        served.load(tensors)
        return served

    def unfolded(self, fine_log_mel: tf.Tensor) -> CompactNetwork:
        """This folded network in the form that trains: same outputs with ``training=False`` to float32 rounding.

        Args:
            fine_log_mel: ``(B, 96, 64)``, a thousand examples or so: its batch statistics are theirs.
        """
        weights = self.weights()
        x = _channels(fine_log_mel)
        for shape in CONVOLUTIONS:
            kernel, bias = weights[f"{shape.name}/kernel"], weights[f"{shape.name}/bias"]
            y = tf.nn.conv2d(x, kernel, strides=[1, shape.stride, shape.stride, 1], padding="SAME")
            mean, variance = (value.numpy() for value in tf.nn.moments(y, [0, 1, 2]))
            weights[f"{shape.name}/moving_mean"], weights[f"{shape.name}/moving_variance"] = mean, variance
            weights[f"{shape.name}/scale"] = np.sqrt(variance + np.float32(_NORM_EPSILON))
            weights[f"{shape.name}/bias"] = bias + mean
            x = tf.nn.relu(y + bias + x if shape.residual else y + bias)
        trains = CompactNetwork(folded=False)
        trains.load(weights)
        return trains

    def _named_variables(self) -> Iterator[tuple[str, tf.Variable]]:
        for convolution, shape in zip(self._convolutions, CONVOLUTIONS, strict=True):
            yield f"{shape.name}/kernel", convolution.kernel
            yield f"{shape.name}/bias", convolution.bias
            if not self._folded:
                yield f"{shape.name}/scale", convolution.scale
                yield f"{shape.name}/moving_mean", convolution.moving_mean
                yield f"{shape.name}/moving_variance", convolution.moving_variance
        yield "embedding/weights", self.dense_weights
        yield "embedding/bias", self.dense_bias


def _channels(fine_log_mel: tf.Tensor) -> tf.Tensor:
    """``(B, 96, 64)`` -> ``(B, 96, 64, 2)``: see ``CONVOLUTIONS``."""
    x = (fine_log_mel - _LOG_MEL_CENTRE) / _LOG_MEL_SCALE
    return tf.stack([x, x - tf.reduce_mean(x, axis=1, keepdims=True)], axis=-1)


def finer(log_mel: tf.Tensor) -> tf.Tensor:
    """The front end's log-mel with ``FINE_OFFSET`` in place of its own offset, same shape."""
    return tf.math.log(tf.maximum(tf.exp(log_mel) - FRONT_END.log_offset, 0.0) + FINE_OFFSET)


def multiply_adds() -> int:
    """Multiplications (each with an addition) one example costs; twice this is its FLOP count."""
    frames, bands, total = EXAMPLE_FRAMES, MEL_BANDS, 0
    for shape in CONVOLUTIONS:
        frames, bands = frames // shape.stride, bands // shape.stride
        total += frames * bands * shape.kernel**2 * shape.channels_in * shape.channels_out
    return total + POOLED_SIZE * EMBEDDING_SIZE


def parameter_count() -> int:
    """Trained values of the folded network."""
    return sum(value.size for value in CompactNetwork(folded=True).weights().values())
