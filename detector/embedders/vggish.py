"""The VGGish network: ``(B, 96, 64)`` log-mel examples -> ``(B, 128)`` raw embeddings, 1.73 GFLOP an example.

Second stage of the embedder. Weights come from AudioSet's published checkpoint and keep its names.
Source: tensorflow/models, research/audioset/vggish/vggish_slim.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from detector.checkpoint import check_tensors
from detector.embedders.params import EMBEDDING_SIZE, EXAMPLE_FRAMES, MEL_BANDS

_BLOCKS = (
    ("conv1",),
    ("conv2",),
    ("conv3/conv3_1", "conv3/conv3_2"),
    ("conv4/conv4_1", "conv4/conv4_2"),
)  # 3x3 convolutions with ReLU; after each block a 2x2 maximum
_CHANNELS = (64, 128, 256, 512)
_HIDDEN = ("fc1/fc1_1", "fc1/fc1_2")
_HIDDEN_SIZE = 4096
_OUTPUT = "fc2"
_FLAT_SIZE = (EXAMPLE_FRAMES // 16) * (MEL_BANDS // 16) * _CHANNELS[-1]


def _layer_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    def add(layer: str, *size: int) -> None:
        shapes[f"vggish/{layer}/weights"], shapes[f"vggish/{layer}/biases"] = size, size[-1:]

    channels_in = 1
    for block, channels_out in zip(_BLOCKS, _CHANNELS, strict=True):
        for layer in block:
            add(layer, 3, 3, channels_in, channels_out)
            channels_in = channels_out
    size_in = _FLAT_SIZE
    for layer in _HIDDEN:
        add(layer, size_in, _HIDDEN_SIZE)
        size_in = _HIDDEN_SIZE
    add(_OUTPUT, size_in, EMBEDDING_SIZE)
    return shapes


VGGISH_SHAPES: Mapping[str, tuple[int, ...]] = _layer_shapes()
"""Original variable name -> shape, all 18, in the order of the layers."""


class Vggish(tf.Module):
    """``(B, 96, 64)`` float32 -> ``(B, 128)`` float32, before any postprocessing (fc2 is linear).

    Args:
        tensors: original name -> float32 value, as ``read_checkpoint(path, VGGISH_SHAPES)`` gives them.

    Raises ModelError where names, shapes or values are not VGGish's.
    """

    def __init__(self, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
        super().__init__(name="vggish")
        check_tensors(tensors, VGGISH_SHAPES, "weights given to VGGish")
        self._weights = [tf.Variable(tensors[name], trainable=False, name=name) for name in VGGISH_SHAPES]

    def __call__(self, log_mel: tf.Tensor) -> tf.Tensor:
        return self.activations(log_mel)["embedding"]

    def activations(self, log_mel: tf.Tensor) -> dict[str, tf.Tensor]:
        """Every layer's output by the original's operation names (``conv1/Relu``, ``pool1/MaxPool``, ...)."""
        outputs: dict[str, tf.Tensor] = {}
        weights = dict(zip(VGGISH_SHAPES, self._weights, strict=True))
        x = log_mel[..., None]  # (B, 96, 64, 1), H = time, W = mel bands
        for number, block in enumerate(_BLOCKS, start=1):
            for layer in block:
                x = tf.nn.conv2d(x, weights[f"vggish/{layer}/weights"], strides=1, padding="SAME")
                x = tf.nn.relu(tf.nn.bias_add(x, weights[f"vggish/{layer}/biases"]))
                outputs[f"{layer}/Relu"] = x
            x = tf.nn.max_pool2d(x, ksize=2, strides=2, padding="SAME")
            outputs[f"pool{number}/MaxPool"] = x
        x = tf.reshape(x, (-1, _FLAT_SIZE))  # (B, 12288) in (time, band, channel) order
        for layer in _HIDDEN:
            x = tf.nn.relu(_dense(x, weights, layer))
            outputs[f"{layer}/Relu"] = x
        outputs["embedding"] = _dense(x, weights, _OUTPUT)  # (B, 128)
        return outputs

    def weights(self) -> dict[str, npt.NDArray[np.float32]]:
        """Original name -> value."""
        return {name: variable.numpy() for name, variable in zip(VGGISH_SHAPES, self._weights, strict=True)}


def _dense(x: tf.Tensor, weights: Mapping[str, tf.Variable], layer: str) -> tf.Tensor:
    return tf.nn.bias_add(tf.matmul(x, weights[f"vggish/{layer}/weights"]), weights[f"vggish/{layer}/biases"])
