"""What published networks think of an example: YAMNet and CED-tiny, whose opinions the student learns beside labels.

YAMNet (Google, Apache 2.0; tensorflow/models, research/audioset/yamnet) is asked in float32, in batches; CED-tiny
(mispeech/ced-tiny, Apache 2.0) as published. Neither's weights become part of the student.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from detector.embedders.compact import finer
from detector.embedders.log_mel import log_mel
from detector.embedders.params import EXAMPLE_FRAMES, EXAMPLE_SAMPLES, MEL_BANDS
from detector.errors import ConfigError
from trainer.peers import CedPeer

YAMNET_CLASSES = 521
YAMNET_EMBEDDING = 1024
CED_CLASSES = 527
YAMNET_GUNFIRE = (421, 422, 423, 424)
CED_GUNFIRE = (427, 428, 429, 430)
"""Gunshot, gunfire; Machine gun; Fusillade; Artillery fire."""
YAMNET_MECHANICAL = (
    *(48, 56, 57, 58),  # Walk, footsteps; Hands; Finger snapping; Clapping
    *(293, 333),  # Crackle; Helicopter
    *range(337, 348),  # Engine ... Accelerating, revving, vroom
    *range(348, 382),  # Door ... Writing
    *range(398, 420),  # Mechanisms ... Drill
    *range(431, 438),  # Wood ... Shatter
    *(454, 455, 459, 460),  # Thump, thud; Thunk; Basketball bounce; Bang
    *(464, 472, 474, 478, 480, 483, 484, 485),  # Breaking, Crushing, Tearing, Clang, Creak, Clatter, Sizzle, Clicking
)
"""Engines, doors, tools, blows: what is taken for a shot and has no recordings enough to be learnt from here."""
_NOTHING_AGAINST = (
    *range(420, 431),  # Explosion ... Boom
    494,  # Silence
    *range(500, 505),  # Inside, small room ... Outside, rural or natural
)
YAMNET_OTHER = tuple(sorted({*range(YAMNET_CLASSES)} - {*YAMNET_MECHANICAL, *_NOTHING_AGAINST}))
"""All other classes but explosions, places and silence."""
CED_OTHER = tuple(sorted({*range(CED_CLASSES)} - {0, 137, *range(426, 437), 500, 504, *range(506, 511)}))
"""All but speech, music, explosions, silence, sound effects and places."""

_LAYERS = 27
_STRIDE_2 = (1, 4, 8, 12, 24)
_FIRST_TENSOR, _TENSORS_A_LAYER, _FULLY_CONNECTED = 33, 3, (116, 117)
_BATCH = 100

Float16Array = npt.NDArray[np.float16]
Float32Array = npt.NDArray[np.float32]


class Teachers:
    """Both of them.

    Args:
        data_dir: with ``yamnet/yamnet.tflite``, ``ced/ced_tiny.onnx`` and CED's class list. Raises ConfigError where a
            file is absent, is another network, or the extra ``peers`` is not installed.
    """

    def __init__(self, data_dir: Path) -> None:
        self._layers, (weights, biases) = _read(data_dir / "yamnet" / "yamnet.tflite")
        self._last = (tf.constant(weights), tf.constant(biases))
        self._ced = CedPeer(data_dir / "ced" / "ced_tiny.onnx", data_dir / "audioset" / "class_labels_indices.csv")
        self._log_mel = tf.function(
            lambda pcm: tf.cast(finer(log_mel(pcm)), tf.float16),
            input_signature=[tf.TensorSpec([None, EXAMPLE_SAMPLES], tf.int16)],
            autograph=False,
        )
        self._opinion = tf.function(
            self._ask,
            input_signature=[tf.TensorSpec([None, EXAMPLE_FRAMES, MEL_BANDS], tf.float16)],
            autograph=False,
        )

    def log_mel(self, pcm: npt.NDArray[np.int16]) -> Float16Array:
        """``(n, 15600)`` int16 -> ``(n, 96, 64)`` float16, fine log-mel: what student and YAMNet see."""
        return np.concatenate([self._log_mel(pcm[i : i + _BATCH]).numpy() for i in range(0, len(pcm), _BATCH)])

    def yamnet(self, fine_log_mel: Float16Array) -> tuple[Float16Array, Float16Array]:
        """``(n, 96, 64)`` -> logits ``(n, 521)`` and embeddings ``(n, 1024)``, float16."""
        parts = [self._opinion(fine_log_mel[i : i + _BATCH]) for i in range(0, len(fine_log_mel), _BATCH)]
        return (
            np.concatenate([logits.numpy() for logits, _ in parts]),
            np.concatenate([embeddings.numpy() for _, embeddings in parts]),
        )

    def ced(self, pcm: npt.NDArray[np.int16]) -> Float16Array:
        """``(n, 15600)`` int16 -> probabilities ``(n, 527)`` float16."""
        scaled = (pcm[i : i + 32] / np.float32(32768) for i in range(0, len(pcm), 32))
        return np.concatenate([self._ced.scores(waveforms).astype(np.float16) for waveforms in scaled])

    def _ask(self, fine_log_mel: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        x = tf.cast(fine_log_mel, tf.float32)[..., None]
        for number, (kernel, bias) in enumerate(self._layers, start=1):
            stride = 2 if number in _STRIDE_2 else 1
            convolve = tf.nn.depthwise_conv2d if number % 2 == 0 else tf.nn.conv2d
            x = tf.nn.relu6(tf.nn.bias_add(convolve(x, kernel, [1, stride, stride, 1], "SAME"), bias))
        embedding = tf.reduce_mean(x, [1, 2])
        logits = tf.matmul(embedding, self._last[0]) + self._last[1]
        return tf.cast(logits, tf.float16), tf.cast(embedding, tf.float16)


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
    weights, biases = (_dequantised(interpreter, details[index]) for index in _FULLY_CONNECTED)
    if layers[0][0].shape != (3, 3, 1, 32) or weights.shape != (YAMNET_CLASSES, YAMNET_EMBEDDING):
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
