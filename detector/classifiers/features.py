"""What the starter code's graph does to features before any model sees them, and the mean that stands for a window."""

from __future__ import annotations

import tensorflow as tf

_EPSILON = 1e-12  # of google/youtube-8m's ``tf.nn.l2_normalize``


def unit_rows(x: tf.Tensor) -> tf.Tensor:
    """``(..., D)`` float32 -> each row scaled to length 1; rows of zeros stay zeros."""
    return tf.math.l2_normalize(x, axis=-1, epsilon=_EPSILON)


def without_padding(x: tf.Tensor, num_frames: tf.Tensor) -> tf.Tensor:
    """``(B, T, D)`` with zeros in every row from ``num_frames`` (B,) on, whatever (NaN even) stood there."""
    valid = tf.sequence_mask(num_frames, tf.shape(x)[1])[:, :, None]  # (B, T, 1)
    return tf.where(valid, x, tf.zeros_like(x))


def clip_features(x: tf.Tensor, num_frames: tf.Tensor) -> tf.Tensor:
    """One vector a clip, ``(B, D)`` of unit length, as the video-level models take it.

    ``x`` of shape ``(B, D)`` holds such vectors already (``mean_audio`` of video-level records). Of ``(B, T, D)`` the
    mean of the valid rows is taken, which is how those records were made; without valid rows it is zeros.
    """
    if len(x.shape) == 3:
        x = tf.reduce_sum(without_padding(x, num_frames), axis=1)  # of the mean's direction, and its length goes
    return unit_rows(x)
