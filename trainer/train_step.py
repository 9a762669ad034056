"""One training step, as the YouTube-8M starter code's graph takes it: loss, gradients, clipping, Adam, decayed rate.

All of it runs in one traced function. Its whole state has names (``state``, ``restore``), so that training can go on
from any step as if it had never stopped, or from a checkpoint of the starter code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from detector.checkpoint import check_tensors
from detector.classifiers import Classifier, regularisation_loss
from detector.errors import ConfigError, ModelError
from trainer.losses import cross_entropy
from trainer.records import video_matrix_in_graph

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # defaults of TF1's AdamOptimizer


@dataclass(frozen=True, slots=True)
class StepSettings:
    """How a step changes the weights. Names and defaults are the starter code's flags.

    Attributes:
        batch_size: clips a step, of all replicas together; the rate decays by it.
        clip_gradient_norm: each variable's gradient is scaled down to this norm; 0 = never.
        mixed_precision: large matrix products in bfloat16; weights, sums and Adam stay float32.
        seed: of all that is random in a step (rows that DBoF samples, dropout), together with the step count.
    """

    batch_size: int = 1024
    base_learning_rate: float = 0.01
    learning_rate_decay: float = 0.95
    learning_rate_decay_examples: float = 4_000_000
    clip_gradient_norm: float = 1.0
    regularization_penalty: float = 1.0
    l2_penalty: float = 1e-8
    mixed_precision: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("batch_size", "base_learning_rate", "learning_rate_decay", "learning_rate_decay_examples")
        for name in (*positive, "clip_gradient_norm", "regularization_penalty", "l2_penalty"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (name in positive and value == 0):
                least = "above 0" if name in positive else "0 or more"
                raise ConfigError(f"{name} is {value!r}; a number {least} is needed.")

    def learning_rate(self, step: int) -> float:
        """Of step ``step`` (from 0): ``base * decay ** floor(step * batch_size / decay_examples)``."""
        decays = math.floor(step * self.batch_size / self.learning_rate_decay_examples)
        return float(self.base_learning_rate * self.learning_rate_decay**decays)


class StepResult(NamedTuple):
    """What a step was like before it changed the weights; tensors.

    Attributes:
        loss: scalar float32, label loss.
        regularisation: scalar float32, without ``regularization_penalty``.
        learning_rate: scalar float32.
        predictions: ``(B, V)`` float32.
        applied: scalar bool; False where loss or gradients were NaN or infinite: then weights, slots and step count
            stay as they were.
    """

    loss: tf.Tensor
    regularisation: tf.Tensor
    learning_rate: tf.Tensor
    predictions: tf.Tensor
    applied: tf.Tensor


class TrainStep:
    """Trains ``classifier`` in place, a batch a call.

    Args:
        loss: of ``(B, V)`` predictions and ``(B, V)`` float32 labels, scalar float32 (``trainer.losses``); called with
            a third argument where the step is given weights.

    Source: google/youtube-8m, ``train.py`` (``build_graph``) and ``utils.py`` (``clip_gradient_norms``).
    """

    def __init__(
        self, classifier: Classifier, settings: StepSettings, loss: Callable[..., tf.Tensor] = cross_entropy
    ) -> None:
        self.classifier = classifier
        self.settings = settings
        self._loss = loss
        named = classifier.named_variables()
        self._trainable = {name: variable for name, variable in named.items() if variable.trainable}
        self._slots: dict[str, tuple[tf.Variable, tf.Variable]] = {
            name: tuple(
                tf.Variable(tf.zeros_like(variable), trainable=False, name=f"{name}/{slot}")
                for slot in ("Adam", "Adam_1")
            )
            for name, variable in self._trainable.items()
        }
        self._beta1_power = tf.Variable(np.float32(_BETA1), trainable=False, name="beta1_power")
        self._beta2_power = tf.Variable(np.float32(_BETA2), trainable=False, name="beta2_power")
        self._global_step = tf.Variable(0, dtype=tf.int64, trainable=False, name="global_step")
        # Many small element-wise operations on (B, V): compiled into one they take a quarter of the time. Not before
        # batch normalisation: some of its true gradients are 0, where Adam makes steps out of the compiler's rounding.
        self._end: Callable[..., tuple[tf.Tensor, tf.Tensor]] = self._final_and_loss
        if len(self._trainable) == len(named):
            self._end = tf.function(self._final_and_loss, autograph=False, jit_compile=True)
        self._traced = tf.function(self._step, autograph=False, reduce_retracing=True)

    @property
    def global_step(self) -> int:
        """Steps taken."""
        return int(self._global_step.numpy())

    def __call__(
        self,
        x: Any,
        labels: Any,
        num_frames: Any,
        *,
        weights: Any = None,
        uniforms: Any = None,
    ) -> StepResult:
        """One step.

        Args:
            x: ``(B, T, D)`` float32, or uint8 to be dequantised; for video-level models ``(B, D)`` float32 too.
            labels: ``(B, V)`` bool, or float32 in [0, 1].
            num_frames: ``(B,)`` valid rows of each clip.
            weights: what the loss takes as its third argument, such as ``(B, V)`` label weights.
            uniforms: ``(B, classifier.uniforms_per_clip)`` float32 in [0, 1); None = drawn from seed and step count.
        """
        result: StepResult = self._traced(
            tf.convert_to_tensor(x),
            tf.convert_to_tensor(labels),
            tf.convert_to_tensor(num_frames),
            None if weights is None else tf.convert_to_tensor(weights, tf.float32),
            None if uniforms is None else tf.convert_to_tensor(uniforms, tf.float32),
        )
        return result

    def _step(
        self,
        x: tf.Tensor,
        labels: tf.Tensor,
        num_frames: tf.Tensor,
        weights: tf.Tensor | None,
        uniforms: tf.Tensor | None,
    ) -> StepResult:
        num_frames = tf.cast(num_frames, tf.int32)
        labels = tf.cast(labels, tf.float32)
        if x.dtype == tf.uint8:
            x = video_matrix_in_graph(x, num_frames)
        seed = tf.stack([tf.constant(self.settings.seed, tf.int64), self._global_step])
        columns = self.classifier.uniforms_per_clip
        if uniforms is None and columns:
            uniforms = tf.random.stateless_uniform((tf.shape(x)[0], columns), seed)
        variables = list(self._trainable.values())
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            pooled = self.classifier.pooled(
                x,
                num_frames,
                training=True,
                mixed_precision=self.settings.mixed_precision,
                uniforms=uniforms,
                seed=seed,
            )
            predictions, loss = self._end(pooled, labels, weights)
            regularisation = regularisation_loss(self.classifier, self.settings.l2_penalty)
            total = loss + self.settings.regularization_penalty * regularisation
        gradients = [tf.convert_to_tensor(g) for g in tape.gradient(total, variables, unconnected_gradients="zero")]
        norms = [tf.sqrt(tf.reduce_sum(tf.square(g))) for g in gradients]
        rate = self._learning_rate()
        applied = tf.reduce_all(tf.math.is_finite(tf.stack([total, *norms])))
        tf.cond(applied, lambda: self._apply(gradients, norms, rate), lambda: tf.constant(False))
        return StepResult(loss, regularisation, rate, predictions, applied)

    def _final_and_loss(
        self, pooled: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor | None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        predictions = self.classifier.final(pooled)
        given = (predictions, labels) if weights is None else (predictions, labels, weights)
        return predictions, self._loss(*given)

    def _apply(self, gradients: list[tf.Tensor], norms: list[tf.Tensor], rate: tf.Tensor) -> tf.Tensor:
        """TF1's Adam, its epsilon outside the corrected root, on gradients clipped one by one."""
        limit = self.settings.clip_gradient_norm
        updates = []
        for (name, variable), gradient, norm in zip(self._trainable.items(), gradients, norms, strict=True):
            m, v = self._slots[name]
            clipped = gradient * (limit / tf.maximum(norm, limit)) if limit > 0 else gradient
            update = tf.raw_ops.ResourceApplyAdam(
                var=variable.handle,
                m=m.handle,
                v=v.handle,
                beta1_power=self._beta1_power,
                beta2_power=self._beta2_power,
                lr=rate,
                beta1=_BETA1,
                beta2=_BETA2,
                epsilon=_EPSILON,
                grad=clipped,
            )
            updates.append(update)
        with tf.control_dependencies([update for update in updates if update is not None]):
            self._beta1_power.assign(self._beta1_power * _BETA1)
            self._beta2_power.assign(self._beta2_power * _BETA2)
            self._global_step.assign_add(1)
        return tf.constant(True)

    def _learning_rate(self) -> tf.Tensor:
        s = self.settings
        examples = tf.cast(self._global_step * s.batch_size, tf.float64)
        decays = tf.floor(examples / s.learning_rate_decay_examples)
        return tf.cast(
            s.base_learning_rate * tf.pow(tf.constant(s.learning_rate_decay, tf.float64), decays), tf.float32
        )

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything that the next step depends on, by the starter code's names: weights, Adam's slots, step count."""
        return {name: variable.numpy() for name, variable in self._all_variables().items()}

    def restore(self, state: Mapping[str, npt.NDArray[Any]], source: str = "training state given") -> None:
        """Take up ``state`` where it was left; ModelError where names, shapes or values don't fit."""
        variables = self._all_variables()
        expected = {name: tuple(variable.shape) for name, variable in variables.items()}
        floats = {name: np.asarray(value) for name, value in state.items() if name != "global_step"}
        needed = {name: shape for name, shape in expected.items() if name != "global_step"}
        check_tensors(floats, needed, source, allow_extra=True)
        step = np.asarray(state.get("global_step", -1))
        if step.shape != () or step.dtype.kind not in "iu" or int(step) < 0:
            raise ModelError(f"The {source} has no usable global_step, found {step!r}; a whole number is needed.")
        for name in needed:
            variables[name].assign(floats[name])
        self._global_step.assign(int(step))

    def _all_variables(self) -> dict[str, tf.Variable]:
        named = self.classifier.named_variables()
        for name, (m, v) in self._slots.items():
            named[f"{name}/Adam"], named[f"{name}/Adam_1"] = m, v
        return named | {
            "beta1_power": self._beta1_power,
            "beta2_power": self._beta2_power,
            "global_step": self._global_step,
        }
