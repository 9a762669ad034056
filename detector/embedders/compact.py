"""The small network: ``(B, 96, 64)`` log-mel examples -> ``(B, 128)`` embeddings, about 60 MFLOP an example.

Second stage of the embedder where VGGish is too heavy. Depthwise and pointwise convolutions, each with a bias and
ReLU6: a trunk of the shape of YAMNet's first thirteen layers, so that training can begin from those, and a top of its
own. The same module trains and serves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from detector.embedders.params import EMBEDDING_SIZE, EXAMPLE_FRAMES, FRONT_END, MEL_BANDS
from detector.errors import ModelError

FINE_OFFSET = 0.001
"""Under the logarithm of what the network sees: ten times less than the front end's, so quiet sound counts."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One convolution with SAME padding, a bias and ReLU6; ``depthwise`` filters every channel by itself."""

    name: str
    kernel: int
    stride: int
    channels_in: int
    channels_out: int
    depthwise: bool = False

    @property
    def weights_shape(self) -> tuple[int, int, int, int]:
        return (self.kernel, self.kernel, self.channels_in, 1 if self.depthwise else self.channels_out)


def _depthwise(name: str, channels: int, stride: int = 1) -> LayerShape:
    return LayerShape(name, 3, stride, channels, channels, depthwise=True)


def _pointwise(name: str, channels_in: int, channels_out: int) -> LayerShape:
    return LayerShape(name, 1, 1, channels_in, channels_out)


# Shapes of YAMNet's layers 1 to 13 (tensorflow/models, research/audioset/yamnet; Howard et al., "MobileNets", 2017).
TRUNK = (
    LayerShape("trunk1", 3, 2, 1, 32),
    _depthwise("trunk2", 32),
    _pointwise("trunk3", 32, 64),
    _depthwise("trunk4", 64, stride=2),
    _pointwise("trunk5", 64, 128),
    _depthwise("trunk6", 128),
    _pointwise("trunk7", 128, 128),
    _depthwise("trunk8", 128, stride=2),
    _pointwise("trunk9", 128, 256),
    _depthwise("trunk10", 256),
    _pointwise("trunk11", 256, 256),
    _depthwise("trunk12", 256, stride=2),
    _pointwise("trunk13", 256, 512),
)
TOP = (
    _depthwise("top1", 512, stride=2),
    _pointwise("top2", 512, 512),
    _depthwise("top3", 512),
    _pointwise("top4", 512, 320),
)
_TRUNK_STRIDE = math.prod(layer.stride for layer in TRUNK)
_TOTAL_STRIDE = _TRUNK_STRIDE * math.prod(layer.stride for layer in TOP)
TRUNK_SHAPE = (EXAMPLE_FRAMES // _TRUNK_STRIDE, MEL_BANDS // _TRUNK_STRIDE, TRUNK[-1].channels_out)
FLAT_SIZE = (EXAMPLE_FRAMES // _TOTAL_STRIDE) * (MEL_BANDS // _TOTAL_STRIDE) * TOP[-1].channels_out

assert EXAMPLE_FRAMES % _TOTAL_STRIDE == 0
assert MEL_BANDS % _TOTAL_STRIDE == 0


class _Layer(tf.Module):
    """Convolution, bias, ReLU6."""

    def __init__(self, shape: LayerShape, random: np.random.Generator) -> None:
        super().__init__(name=shape.name)
        self.shape = shape
        fan_in = shape.kernel**2 * (1 if shape.depthwise else shape.channels_in)
        initial = random.standard_normal(shape.weights_shape).astype(np.float32) * np.float32(math.sqrt(2.0 / fan_in))
        self.kernel = tf.Variable(initial, name="kernel")
        self.bias = tf.Variable(tf.zeros([shape.channels_out]), name="bias")

    def __call__(self, x: tf.Tensor) -> tf.Tensor:
        strides = [1, self.shape.stride, self.shape.stride, 1]
        convolve = tf.nn.depthwise_conv2d if self.shape.depthwise else tf.nn.conv2d
        return tf.nn.relu6(tf.nn.bias_add(convolve(x, self.kernel, strides, "SAME"), self.bias))


class CompactNetwork(tf.Module):
    """``(B, 96, 64) float32`` log-mel -> ``(B, 128) float32`` embeddings.

    Args:
        seed: of the initial weights.
    """

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__(name="compact")
        random = np.random.default_rng(seed)
        self._trunk = [_Layer(shape, random) for shape in TRUNK]
        self._top = [_Layer(shape, random) for shape in TOP]
        initial = random.standard_normal((FLAT_SIZE, EMBEDDING_SIZE)) * math.sqrt(1.0 / FLAT_SIZE)
        self.dense_weights = tf.Variable(initial.astype(np.float32), name="embedding_weights")
        self.dense_bias = tf.Variable(tf.zeros([EMBEDDING_SIZE]), name="embedding_bias")

    def __call__(self, log_mel: tf.Tensor) -> tf.Tensor:
        """``log_mel (B, 96, 64) float32``, as the front end gives it -> ``(B, 128) float32``."""
        return self.top(self.trunk(finer(log_mel)))

    def trunk(self, fine_log_mel: tf.Tensor) -> tf.Tensor:
        """``(B, 96, 64) float32`` over ``FINE_OFFSET`` -> ``(B, *TRUNK_SHAPE) float32``."""
        x = fine_log_mel[..., None]
        for layer in self._trunk:
            x = layer(x)
        return x

    def top(self, features: tf.Tensor, mask: tf.Tensor | None = None) -> tf.Tensor:
        """``(B, *TRUNK_SHAPE) float32`` -> ``(B, 128) float32``; ``mask (B, FLAT_SIZE)`` drops values in training."""
        for layer in self._top:
            features = layer(features)
        flat = tf.reshape(features, [-1, FLAT_SIZE])
        if mask is not None:
            flat *= mask
        return tf.nn.bias_add(tf.matmul(flat, self.dense_weights), self.dense_bias)

    def top_variables(self) -> list[tf.Variable]:
        """What training changes while the trunk stands still."""
        return [variable for name, variable in self._named_variables() if not name.startswith("trunk")]

    def weights(self) -> dict[str, npt.NDArray[np.float32]]:
        """Name -> value of every variable, in a fixed order: what a checkpoint or a package stores."""
        return {name: variable.numpy() for name, variable in self._named_variables()}

    def load(self, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Set every variable. Raises ModelError where names or shapes do not fit the network."""
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

    def _named_variables(self) -> Iterator[tuple[str, tf.Variable]]:
        for layer in (*self._trunk, *self._top):
            yield f"{layer.shape.name}/kernel", layer.kernel
            yield f"{layer.shape.name}/bias", layer.bias
        yield "embedding/weights", self.dense_weights
        yield "embedding/bias", self.dense_bias


def finer(log_mel: tf.Tensor) -> tf.Tensor:
    """The front end's log-mel with ``FINE_OFFSET`` in place of its own offset, same shape."""
    return tf.math.log(tf.maximum(tf.exp(log_mel) - FRONT_END.log_offset, 0.0) + FINE_OFFSET)


def multiply_adds() -> int:
    """Multiplications (each with an addition) one example costs; twice this is its FLOP count."""
    frames, bands, total = EXAMPLE_FRAMES, MEL_BANDS, 0
    for shape in (*TRUNK, *TOP):
        frames, bands = frames // shape.stride, bands // shape.stride
        total += frames * bands * math.prod(shape.weights_shape)
    return total + FLAT_SIZE * EMBEDDING_SIZE


def parameter_count() -> int:
    """Trained values of the network."""
    return sum(value.size for value in CompactNetwork().weights().values())
