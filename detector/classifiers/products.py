"""Matrix products in float32, or in bfloat16 while training in mixed precision."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def product(a: tf.Tensor, b: tf.Tensor, *, mixed_precision: bool = False, **transposed: Any) -> tf.Tensor:
    """``tf.matmul`` of float32 -> float32; ``mixed_precision``: factors and result rounded to bfloat16's 8 bits."""
    if not mixed_precision:
        return tf.matmul(a, b, **transposed)
    return tf.cast(tf.matmul(tf.cast(a, tf.bfloat16), tf.cast(b, tf.bfloat16), **transposed), tf.float32)
