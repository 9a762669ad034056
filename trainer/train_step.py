"""One training step, as the YouTube-8M starter code's graph takes it: loss, gradients, clipping, Adam, decayed rate.

All of it runs in one traced function. Its whole state has names (``state``, ``restore``), so that training can go on
from any step as if it had never stopped, or from a checkpoint of the starter code. Beyond the starter code: decay of
the weights, a cosine rate with warm-up, a moving average of the weights, and several replicas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from detector.checkpoint import check_tensors
from detector.classifiers import Classifier, regularisation_loss
from detector.errors import ConfigError, ModelError
from trainer.losses import cross_entropy
from trainer.records import video_matrix_in_graph
from trainer.run import AVERAGE_SUFFIX

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # defaults of TF1's AdamOptimizer
_REPLICA_SEEDS = 1 << 40  # steps between the seeds of two replicas


@dataclass(frozen=True, slots=True)
class StepSettings:
    """How a step changes the weights. Names and defaults are the starter code's flags.

    Attributes:
        batch_size: clips a step, of all replicas together; the rate decays by it.
        learning_rate_schedule: ``stairs``: ``base * decay ** floor(step * batch_size / decay_examples)``; ``cosine``:
            from base at the end of the warm-up to ``final_learning_rate_share`` of it at ``total_steps``.
        warm_up_steps: the rate's rise in a straight line, before either.
        clip_gradient_norm: each variable's gradient is scaled down to this norm; 0 = never. With ``clip_gradients``
            ``together`` it is the norm of all gradients as one vector.
        weight_decay: matrices lose this times the rate of themselves every step (AdamW).
        average_decay: of the moving average of the weights, at step t at most ``(1 + t) / (10 + t)``; 0 = no average.
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
    learning_rate_schedule: Literal["stairs", "cosine"] = "stairs"
    warm_up_steps: int = 0
    total_steps: int = 0
    final_learning_rate_share: float = 0.0
    clip_gradients: Literal["each", "together"] = "each"
    weight_decay: float = 0.0
    average_decay: float = 0.0

    def __post_init__(self) -> None:
        positive = ("batch_size", "base_learning_rate", "learning_rate_decay", "learning_rate_decay_examples")
        others = ("warm_up_steps", "final_learning_rate_share", "weight_decay", "average_decay")
        for name in (*positive, "clip_gradient_norm", "regularization_penalty", "l2_penalty", *others):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (name in positive and value == 0):
                least = "above 0" if name in positive else "0 or more"
                raise ConfigError(f"{name} is {value!r}; a number {least} is needed.")
        if self.average_decay >= 1:
            raise ConfigError(f"average_decay is {self.average_decay!r}; a number below 1 is needed.")
        if self.learning_rate_schedule == "cosine" and self.total_steps <= self.warm_up_steps:
            raise ConfigError(
                f"The cosine schedule warms up for {self.warm_up_steps} steps of {self.total_steps} in all. Train "
                "longer (--num-epochs, --max-steps) or give fewer --warm-up-steps."
            )

    def learning_rate(self, step: int) -> float:
        """Of step ``step`` (from 0)."""
        rate = self.base_learning_rate
        if step < self.warm_up_steps:
            return float(rate * (step + 1) / self.warm_up_steps)
        if self.learning_rate_schedule == "cosine":
            done = min((step - self.warm_up_steps) / (self.total_steps - self.warm_up_steps), 1.0)
            share = self.final_learning_rate_share
            return float(rate * (share + (1.0 - share) * 0.5 * (1.0 + math.cos(math.pi * done))))
        decays = math.floor(step * self.batch_size / self.learning_rate_decay_examples)
        return float(rate * self.learning_rate_decay**decays)


class StepResult(NamedTuple):
    """What a step was like before it changed the weights; tensors.

    Attributes:
        loss: scalar float32, label loss; of all replicas' clips.
        regularisation: scalar float32, without ``regularization_penalty``.
        learning_rate: scalar float32.
        predictions: ``(B, V)`` float32; of this process' replicas.
        applied: scalar bool; False where loss or gradients were NaN or infinite: then weights, moving statistics, slots
            and step count stay as they were.
    """

    loss: tf.Tensor
    regularisation: tf.Tensor
    learning_rate: tf.Tensor
    predictions: tf.Tensor
    applied: tf.Tensor


class TrainStep:
    """Trains ``classifier`` in place, a batch a call.

    Args:
        loss: of ``(B, V)`` predictions and ``(B, V)`` float32 labels, scalar float32, a mean over rows
            (``trainer.losses``); called with a third argument where the step is given weights.
        strategy: replicas that share each batch; ``classifier`` was built in its scope, and so must the step be.
            Their gradients are summed before they are clipped, so that the result is that of one replica up to
            rounding. Batch normalisation sees each replica's rows alone; its moving statistics are the replicas' mean.

    Source: google/youtube-8m, ``train.py`` (``build_graph``) and ``utils.py`` (``clip_gradient_norms``).
    """

    def __init__(
        self,
        classifier: Classifier,
        settings: StepSettings,
        loss: Callable[..., tf.Tensor] = cross_entropy,
        strategy: tf.distribute.Strategy | None = None,
    ) -> None:
        self.classifier = classifier
        self.settings = settings
        self._loss = loss
        self._strategy = strategy
        self._replicas = 1 if strategy is None else int(strategy.num_replicas_in_sync)
        named = classifier.named_variables()
        self._trainable = {name: variable for name, variable in named.items() if variable.trainable}
        self._slots: dict[str, tuple[tf.Variable, tf.Variable]] = {
            name: tuple(
                tf.Variable(np.zeros(variable.shape, np.float32), trainable=False, name=f"{name}/{slot}")
                for slot in ("Adam", "Adam_1")
            )
            for name, variable in self._trainable.items()
        }
        self._averages: dict[str, tf.Variable] = {}
        if settings.average_decay > 0:
            for name, variable in self._trainable.items():
                self._averages[name] = tf.Variable(variable.numpy(), trainable=False, name=name + AVERAGE_SUFFIX)
        self._statistics = [variable for variable in named.values() if not variable.trainable]
        self._beta1_power = tf.Variable(np.float32(_BETA1), trainable=False, name="beta1_power")
        self._beta2_power = tf.Variable(np.float32(_BETA2), trainable=False, name="beta2_power")
        self._global_step = tf.Variable(0, dtype=tf.int64, trainable=False, name="global_step")
        # Many small element-wise operations on (B, V): compiled into one they take a quarter of the time. Not before
        # batch normalisation: some of its true gradients are 0, where Adam makes steps out of the compiler's rounding.
        self._end: Callable[..., tuple[tf.Tensor, tf.Tensor]] = self._final_and_loss
        if not self._statistics and self._replicas == 1:
            self._end = tf.function(self._final_and_loss, autograph=False, jit_compile=True)
        step = self._step if self._replicas == 1 else self._distributed_step
        # One trace for each shape of a batch, none for several: which one a step takes must not depend on those before.
        self._traced = tf.function(step, autograph=False)

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
            weights: what the loss takes as its third argument: ``(B, V)`` or ``(B, 1)`` of rows, ``(V,)`` of classes.
            uniforms: ``(B, classifier.uniforms_per_clip)`` float32 in [0, 1); None = drawn from seed and step count.
        """
        if self._replicas > 1:
            return self._call_distributed(x, labels, num_frames, weights, uniforms)
        result: StepResult = self._traced(
            tf.convert_to_tensor(x),
            tf.convert_to_tensor(labels),
            tf.convert_to_tensor(num_frames),
            None if weights is None else tf.convert_to_tensor(weights, tf.float32),
            None if uniforms is None else tf.convert_to_tensor(uniforms, tf.float32),
        )
        return result

    def _call_distributed(self, x: Any, labels: Any, num_frames: Any, weights: Any, uniforms: Any) -> StepResult:
        """Each replica gets its rows of the batch; one for whom none are left gets the first, counted 0 times."""
        strategy = self._strategy
        assert strategy is not None
        count = len(num_frames)
        bounds = [count * i // self._replicas for i in range(self._replicas + 1)]

        def part(values: Any, kind: Any = None, by_rows: bool = True) -> Any:
            def of_replica(context: Any) -> tf.Tensor:
                start, end = bounds[context.replica_id_in_sync_group :][:2]
                if not by_rows:
                    return tf.convert_to_tensor(values, kind)
                return tf.convert_to_tensor(values[start:end] if end > start else values[:1], kind)

            return strategy.experimental_distribute_values_from_function(of_replica)

        def place(context: Any) -> tf.Tensor:
            start, end = bounds[context.replica_id_in_sync_group :][:2]
            return tf.constant([start, end - start, count], tf.int32)

        result: StepResult = self._traced(
            part(x),
            part(labels),
            part(num_frames),
            None if weights is None else part(weights, tf.float32, by_rows=np.ndim(weights) == 2),
            None if uniforms is None else part(uniforms, tf.float32),
            strategy.experimental_distribute_values_from_function(place),
        )
        return result

    def _distributed_step(self, *given: Any) -> StepResult:
        assert self._strategy is not None
        local = self._strategy.experimental_local_results
        result = self._strategy.run(self._step, args=given)
        first = StepResult(*(local(value)[0] for value in result))  # the same on every replica, but predictions
        return first._replace(predictions=tf.concat(local(result.predictions), axis=0))

    def _step(
        self,
        x: tf.Tensor,
        labels: tf.Tensor,
        num_frames: tf.Tensor,
        weights: tf.Tensor | None,
        uniforms: tf.Tensor | None,
        place: tf.Tensor | None = None,
    ) -> StepResult:
        """``place``: of a replica: first row, rows that count, rows of the whole batch."""
        num_frames = tf.cast(num_frames, tf.int32)
        labels = tf.cast(labels, tf.float32)
        if x.dtype == tf.uint8:
            x = video_matrix_in_graph(x, num_frames)
        seed = tf.stack([tf.constant(self.settings.seed, tf.int64), self._global_step])
        columns = self.classifier.uniforms_per_clip
        if uniforms is None and columns:
            if place is None:
                uniforms = tf.random.stateless_uniform((tf.shape(x)[0], columns), seed)
            else:
                uniforms = tf.random.stateless_uniform((place[2], columns), seed)[place[0] :][: tf.shape(x)[0]]
        if place is not None:
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            seed += tf.cast(tf.stack([0, replica]), tf.int64) * _REPLICA_SEEDS
        statistics = [tf.identity(variable) for variable in self._statistics]
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
            penalty = self.settings.regularization_penalty * regularisation
            if place is None:
                total = loss + penalty
            else:
                loss *= tf.cast(place[1] / place[2], tf.float32)
                total = loss + penalty / self._replicas
        gradients = [tf.convert_to_tensor(g) for g in tape.gradient(total, variables, unconnected_gradients="zero")]
        if place is not None:
            everyone = tf.distribute.get_replica_context()
            *gradients, loss, total = everyone.all_reduce(tf.distribute.ReduceOp.SUM, [*gradients, loss, total])
        norms = [tf.sqrt(tf.reduce_sum(tf.square(g))) for g in gradients]
        rate = self._learning_rate()
        applied = tf.reduce_all(tf.math.is_finite(tf.stack([total, *norms])))
        tf.cond(applied, lambda: self._apply(gradients, norms, rate), lambda: self._put_back(statistics))
        return StepResult(loss, regularisation, rate, predictions, applied)

    def _final_and_loss(
        self, pooled: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor | None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        predictions = self.classifier.final(pooled)
        given = (predictions, labels) if weights is None else (predictions, labels, weights)
        return predictions, self._loss(*given)

    def _apply(self, gradients: list[tf.Tensor], norms: list[tf.Tensor], rate: tf.Tensor) -> tf.Tensor:
        """TF1's Adam, its epsilon outside the corrected root, on clipped gradients.

        Raw operations: under a strategy every replica changes its own copy, and all by the same.
        """
        settings = self.settings
        limit = settings.clip_gradient_norm
        if settings.clip_gradients == "together":
            norms = [tf.norm(tf.stack(norms))] * len(norms)
        updates = []
        for (name, variable), gradient, norm in zip(self._trainable.items(), gradients, norms, strict=True):
            m, v = self._slots[name]
            clipped = gradient * (limit / tf.maximum(norm, limit)) if limit > 0 else gradient
            decayed = []
            if settings.weight_decay > 0 and len(variable.shape) >= 2:
                lost = rate * settings.weight_decay * tf.convert_to_tensor(variable)
                decayed = [tf.raw_ops.AssignSubVariableOp(resource=variable.handle, value=lost)]
            with _after(decayed):
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
        with _after(updates):
            moved = [self._move_average(name, average) for name, average in self._averages.items()]
            for power, beta in ((self._beta1_power, _BETA1), (self._beta2_power, _BETA2)):
                tf.raw_ops.AssignVariableOp(resource=power.handle, value=tf.convert_to_tensor(power) * beta)
        with _after(moved):
            tf.raw_ops.AssignAddVariableOp(resource=self._global_step.handle, value=tf.constant(1, tf.int64))
        return tf.constant(True)

    def _move_average(self, name: str, average: tf.Variable) -> Any:
        step = tf.cast(self._global_step, tf.float32)
        decay = tf.minimum(self.settings.average_decay, (1.0 + step) / (10.0 + step))
        away = tf.convert_to_tensor(average) - tf.convert_to_tensor(self._trainable[name])
        return tf.raw_ops.AssignSubVariableOp(resource=average.handle, value=(1.0 - decay) * away)

    def _put_back(self, statistics: list[tf.Tensor]) -> tf.Tensor:
        for variable, before in zip(self._statistics, statistics, strict=True):
            tf.raw_ops.AssignVariableOp(resource=variable.handle, value=before)
        return tf.constant(False)

    def _learning_rate(self) -> tf.Tensor:
        s = self.settings
        step = tf.cast(self._global_step, tf.float64)
        if s.learning_rate_schedule == "cosine":
            done = tf.clip_by_value((step - s.warm_up_steps) / (s.total_steps - s.warm_up_steps), 0.0, 1.0)
            share = s.final_learning_rate_share
            rate = s.base_learning_rate * (share + (1.0 - share) * 0.5 * (1.0 + tf.cos(math.pi * done)))
        else:
            examples = tf.cast(self._global_step * s.batch_size, tf.float64)
            decays = tf.floor(examples / s.learning_rate_decay_examples)
            rate = s.base_learning_rate * tf.pow(tf.constant(s.learning_rate_decay, tf.float64), decays)
        if s.warm_up_steps:
            rising = s.base_learning_rate * (step + 1.0) / s.warm_up_steps
            rate = tf.where(step < s.warm_up_steps, rising, rate)
        return tf.cast(rate, tf.float32)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything that the next step depends on, by the starter code's names: weights, Adam's slots, averages, step
        count.
        """
        return {name: variable.numpy() for name, variable in self._all_variables().items()}

    def served_weights(self) -> dict[str, npt.NDArray[np.float32]]:
        """What to evaluate and serve, by the classifier's names: the averages where there are any."""
        named = self.classifier.named_variables()
        return {name: self._averages.get(name, variable).numpy() for name, variable in named.items()}

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
        for name, average in self._averages.items():
            named[name + AVERAGE_SUFFIX] = average
        return named | {
            "beta1_power": self._beta1_power,
            "beta2_power": self._beta2_power,
            "global_step": self._global_step,
        }


def _after(operations: list[Any]) -> Any:
    """Control dependencies on those that are in a graph; run at once they gave None."""
    return tf.control_dependencies([each for each in operations if each is not None])
