"""YAMNet as teacher: its weights out of the published TFLite file, and what it thinks of an example.

The student begins as its teacher's first thirteen layers and learns, along with its own labels, to say what the other
fourteen say, as Sanh et al. ("DistilBERT", 2019) did for text. YAMNet: Google, Apache 2.0.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from detector.embedders.compact import TRUNK, finer
from detector.embedders.log_mel import log_mel
from detector.embedders.params import EXAMPLE_SAMPLES
from detector.errors import ConfigError

TEACHER_CLASSES = 521
TEACHER_EMBEDDING = 1024
TEACHER_GUNFIRE = (421, 422, 423, 424)
"""Gunshot, gunfire; Machine gun; Fusillade; Artillery fire."""

_LAYERS = 27
_STRIDE_2 = (1, 4, 8, 12, 24)
_FIRST_TENSOR, _TENSORS_A_LAYER, _FULLY_CONNECTED = 33, 3, (116, 117)

Float32Array = npt.NDArray[np.float32]


class Teacher:
    """YAMNet in float32.

    Args:
        path: ``yamnet.tflite``, the published quantised network. Raises ConfigError where it is absent, is another
            network, or ``ai-edge-litert`` is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._layers, (weights, biases) = _read(path)
        self._last = (tf.constant(weights), tf.constant(biases))
        self._opinion = tf.function(
            self._ask, input_signature=[tf.TensorSpec([None, EXAMPLE_SAMPLES], tf.int16)], autograph=False
        )

    def trunk(self) -> dict[str, Float32Array]:
        """The first thirteen layers under the student's names."""
        named: dict[str, Float32Array] = {}
        for shape, (kernel, bias) in zip(TRUNK, self._layers, strict=False):
            named[f"{shape.name}/kernel"], named[f"{shape.name}/bias"] = kernel, bias
        return named

    def opinion(self, pcm: npt.NDArray[np.int16]) -> tuple[npt.NDArray[np.float16], ...]:
        """``(n, 15600)`` int16 -> float16 fine log-mel ``(n, 96, 64)``, trunk features ``(n, 6, 4, 512)``, logits
        ``(n, 521)`` and embedding ``(n, 1024)``."""
        return tuple(part.numpy() for part in self._opinion(pcm))

    def _ask(self, pcm: tf.Tensor) -> tuple[tf.Tensor, ...]:
        seen = finer(log_mel(pcm))
        features = self._through(seen[..., None], 1, len(TRUNK))
        embedding = tf.reduce_mean(self._through(features, len(TRUNK) + 1, _LAYERS), [1, 2])
        logits = tf.matmul(embedding, self._last[0]) + self._last[1]
        return tuple(tf.cast(part, tf.float16) for part in (seen, features, logits, embedding))

    def _through(self, x: tf.Tensor, first: int, last: int) -> tf.Tensor:
        for number in range(first, last + 1):
            kernel, bias = self._layers[number - 1]
            stride = 2 if number in _STRIDE_2 else 1
            convolve = tf.nn.depthwise_conv2d if number % 2 == 0 else tf.nn.conv2d
            x = tf.nn.relu6(tf.nn.bias_add(convolve(x, kernel, [1, stride, stride, 1], "SAME"), bias))
        return x


def _read(path: Path) -> tuple[list[tuple[Float32Array, Float32Array]], tuple[Float32Array, Float32Array]]:
    """Every layer's kernel, as TensorFlow wants it, and bias; then the last, fully connected one's."""
    try:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    except ImportError as error:
        raise ConfigError("The teacher needs ai-edge-litert: install the extra `peers`.") from error
    if not path.is_file():
        raise ConfigError(f"The teacher {path} is missing: set DATA_DIR to the data folder (see its README).")
    interpreter = Interpreter(str(path), experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES)
    interpreter.allocate_tensors()
    details = {detail["index"]: detail for detail in interpreter.get_tensor_details()}
    layers = []
    for number in range(1, _LAYERS + 1):
        index = _FIRST_TENSOR + _TENSORS_A_LAYER * (number - 1)
        kernel = _dequantised(interpreter, details[index])
        layers.append(
            (np.ascontiguousarray(kernel.transpose(1, 2, 3, 0)), _dequantised(interpreter, details[index + 1]))
        )
    fitting = [kernel.shape for kernel, _ in layers[: len(TRUNK)]] == [
        (*s.weights_shape[:2], s.channels_in, 1) if s.depthwise else s.weights_shape for s in TRUNK
    ]
    weights, biases = (_dequantised(interpreter, details[index]) for index in _FULLY_CONNECTED)
    if not fitting or weights.shape != (TEACHER_CLASSES, TEACHER_EMBEDDING):
        raise ConfigError(f"{path} is not the published quantised YAMNet.")
    return layers, (np.ascontiguousarray(weights.T), biases)


def _dequantised(interpreter: Any, detail: dict[str, Any]) -> Float32Array:
    quantisation = detail["quantization_parameters"]
    scales, zeros = quantisation["scales"], quantisation["zero_points"]
    values = interpreter.get_tensor(detail["index"])
    shape = [1] * values.ndim
    if len(scales) > 1:
        shape[quantisation["quantized_dimension"]] = -1
    return np.asarray((values - zeros.reshape(shape).astype(np.float64)) * scales.reshape(shape), np.float32)


def teacher_labels(data_dir: Path) -> list[str]:
    """AudioSet display names in the order of YAMNet's outputs."""
    with (data_dir / "yamnet" / "yamnet_class_map.csv").open(newline="", encoding="utf-8") as file:
        return [row["display_name"] for row in csv.DictReader(file)]
