"""YouTube-8M ``FrameLevelLogisticModel``: a logistic layer on the average of a window's rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from detector.classifiers.base import PoolingClassifier
from detector.classifiers.features import unit_rows
from detector.classifiers.logistic import Logistic
from detector.classifiers.params import check_sizes


@dataclass(frozen=True, slots=True)
class FrameLogisticConfig:
    """Shape of a FrameLogisticModel. Defaults are AudioSet's."""

    classes: int = 527
    input_size: int = 128

    def __post_init__(self) -> None:
        check_sizes(self, ("classes", "input_size"), "Frame-level logistic")


class FrameLogisticModel(PoolingClassifier):
    """``(B, T, D)`` float32 dequantised features and ``(B,)`` valid rows -> ``(B, V)`` float32 probabilities.

    Rows are scaled to unit length, then all T of them are summed and divided by ``num_frames``: as in the original,
    rows from ``num_frames`` on count too, so they must be zeros, and ``num_frames`` 0 gives NaN.
    Source: google/youtube-8m, ``frame_level_models.py``.
    """

    uniforms_per_clip = 0
    video_level = False

    def __init__(self, config: FrameLogisticConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.input_size = config.input_size
        self.final = Logistic(config.input_size, config.classes, random=np.random.default_rng(seed))

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
        """``(B, D)``: the average that the logistic layer sees."""
        return tf.reduce_sum(unit_rows(x), axis=1) / tf.cast(num_frames, tf.float32)[:, None]
