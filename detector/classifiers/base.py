"""What the classifiers share: they pool a clip into one row and leave the rest to a final classifier."""

from __future__ import annotations

from typing import Protocol

import tensorflow as tf


class FinalClassifier(Protocol):
    """The layer that ends a model: ``(B, P)`` float32 -> ``(B, V)`` float32 probabilities."""

    def __call__(self, pooled: tf.Tensor) -> tf.Tensor: ...

    def named_variables(self) -> dict[str, tf.Variable]:
        """Original name -> variable."""

    def regularised_variables(self) -> list[tf.Variable]:
        """What the starter code's L2 penalty covers."""


class PoolingClassifier(tf.Module):
    """Base of every kind. A kind sets ``final``, defines ``pooled`` and names what it holds besides ``final``.

    Attributes:
        input_size: D, values a row.
        final: what turns pooled rows into probabilities.
    """

    input_size: int
    final: FinalClassifier

    def __call__(self, x: tf.Tensor, num_frames: tf.Tensor) -> tf.Tensor:
        return self.final(self.pooled(x, num_frames))

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
        """``(B, P)``: the input of ``final``; arguments as in ``detector.classifiers.Classifier.pooled``."""
        raise NotImplementedError

    def pooling_variables(self) -> dict[str, tf.Variable]:
        """Original name -> variable, of all but ``final``, in the order the starter code makes them."""
        return {}

    def named_variables(self) -> dict[str, tf.Variable]:
        """Original name -> variable, moving statistics included."""
        return self.pooling_variables() | self.final.named_variables()

    def regularised_variables(self) -> list[tf.Variable]:
        """What the starter code's L2 penalty covers: the final classifier's weights only."""
        return self.final.regularised_variables()
