"""The loop: clips -> batches -> steps; evaluation, best weights, checkpoints, log. Taken up again where it was stopped.

A step depends on weights, seed and step count alone, and all three are in the checkpoint, so that a run that was killed
at any moment ends as one that never was: the same weights and the same ``log.csv``, to the last bit. (With the same
number of replicas and threads; on a GPU with ``deterministic`` operations.)
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from detector.classifiers import Classifier, assign, build_classifier, shapes
from detector.errors import ConfigError, TrainingError
from trainer.augment import Augmentation, Augmented
from trainer.losses import loss_named
from trainer.metrics import Curve, EvaluationMetrics, family_labels, family_scores, per_class
from trainer.recipes import BestBy, Recipe
from trainer.records import Batch, ClipSet, video_matrix_in_graph
from trainer.run import Best, Checkpoint, Run
from trainer.summaries import CsvLog, Events
from trainer.train_step import StepResult, StepSettings, TrainStep

logger = logging.getLogger(__name__)

METRICS = ("loss", "hit_at_one", "perr", "gap", "map", "map_top_k", "mean_auc", "d_prime", "gunfire_family_ap")
COLUMNS = (
    "step",
    "epoch",
    "learning_rate",
    "train_loss",
    "regularisation",
    *(f"evaluation_{name}" for name in METRICS),
)
EVALUATION_CLIPS = 512
"""Clips of one evaluation batch."""

_NAMED_CLIPS = 5
_TAGS = {
    "learning_rate": "train/learning_rate",
    "train_loss": "train/loss",
    "regularisation": "train/regularisation",
}

Weights = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands, for people.

    Attributes:
        step, total_steps: taken, and in all.
        epoch: passes over the clips, with the part of the present one.
        epochs: in all.
        loss: mean since the last report.
        examples_per_second: reading, mixing and steps together, evaluation left out; of all workers.
        remaining_seconds: at this pace, evaluations left out.
        best: best evaluation so far.
    """

    step: int
    total_steps: int
    epoch: float
    epochs: float
    loss: float
    examples_per_second: float
    remaining_seconds: float
    best: Best | None


class Listener(Protocol):
    """What is told while a run trains."""

    def progress(self, progress: Progress) -> None:
        """After the steps of one log row."""

    def evaluated(self, step: int, metrics: dict[str, float], is_best: bool) -> None:
        """After each evaluation."""

    def saved(self, step: int) -> None:
        """After each checkpoint."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: steps taken.
        reason: ``done``, ``patience`` (no better evaluation for long enough) or ``stopped`` (asked to; goes on later).
        best: None where nothing was evaluated.
    """

    step: int
    reason: str
    best: Best | None


def step_settings(recipe: Recipe, total_steps: int, seed: int) -> StepSettings:
    """Of a recipe; ConfigError where its numbers don't fit together."""
    return StepSettings(
        batch_size=recipe.batch_size,
        base_learning_rate=recipe.base_learning_rate,
        learning_rate_decay=recipe.learning_rate_decay,
        learning_rate_decay_examples=recipe.learning_rate_decay_examples,
        clip_gradient_norm=recipe.clip_gradient_norm,
        regularization_penalty=recipe.regularization_penalty,
        l2_penalty=recipe.l2_penalty,
        mixed_precision=recipe.mixed_precision,
        seed=seed,
        learning_rate_schedule=recipe.learning_rate_schedule,
        warm_up_steps=recipe.warm_up_steps,
        total_steps=total_steps,
        final_learning_rate_share=recipe.final_learning_rate_share,
        clip_gradients=recipe.clip_gradients,
        weight_decay=recipe.weight_decay,
        average_decay=recipe.average_decay,
    )


def steps_an_epoch(clips: int, recipe: Recipe) -> int:
    """The last batch of an epoch may be smaller."""
    return math.ceil(clips / recipe.batch_size)


def steps_in_all(clips: int, recipe: Recipe) -> int:
    """By ``num_epochs`` and ``max_steps``, whichever ends first."""
    limits = [] if recipe.max_steps is None else [recipe.max_steps]
    if recipe.num_epochs is not None:
        limits.append(max(1, math.ceil(recipe.num_epochs * steps_an_epoch(clips, recipe))))
    return min(limits)


class Trainer:
    """One run on one set of clips.

    Args:
        run: its folder; what its checkpoints hold is taken up.
        training, evaluation: clips; without the latter nothing is evaluated, and the latest weights are the best.
        strategy: of several replicas, or None; made before anything else of TensorFlow.
        chief: whether this process writes (one of several workers does).
        start: first weights of a new run; None = random ones by the seed.
        listener: told how it goes.
        stop: asked after every step; True ends training with a checkpoint.
        resume: take up the newest checkpoint.
        events: write TensorBoard's files.
    """

    def __init__(
        self,
        run: Run,
        training: ClipSet,
        evaluation: ClipSet | None,
        *,
        listener: Listener,
        stop: Callable[[], bool],
        strategy: tf.distribute.Strategy | None = None,
        workers: int = 1,
        chief: bool = True,
        start: Weights | None = None,
        resume: bool = True,
        events: bool = True,
    ) -> None:
        config = run.config
        self._run, self._clips, self._evaluation = run, training, evaluation
        self._recipe, self._listener, self._stop = config.recipe, listener, stop
        self._strategy, self._workers, self._chief = strategy, workers, chief
        self._epoch_steps = steps_an_epoch(len(training), self._recipe)
        self._total = steps_in_all(len(training), self._recipe)
        self._augmentation = Augmentation(
            self._recipe, training, config.label_set, config.family, config.look_alikes, config.seed, config.general
        )
        settings = step_settings(self._recipe, self._total, config.seed)
        with _scope(strategy):
            classifier = build_classifier(config.kind, config.params, seed=config.seed)
            if start is not None:
                assign(classifier, start, "weights to start from")
            self._step = TrainStep(classifier, settings, loss_named(self._recipe.label_loss), strategy)
        self._evaluator = None
        if evaluation is not None and chief:
            served = build_classifier(config.kind, config.params)
            self._evaluator = Evaluator(served, evaluation, self._recipe.label_loss, config.family)
        self._best_by = self._metric_to_choose_by()
        self._best: Best | None = None
        self._without_better = 0
        self._evaluated_at = -1
        self._sums = np.zeros(3)  # loss, regularisation, steps since the last row
        self._kept_order: tuple[int, npt.NDArray[np.int64]] | None = None
        self._poll = tf.function(self._ask_everyone, autograph=False)
        if resume:
            self._resume()
        if workers > 1:
            self._check_same_step()
        self._saved_at = self._step.global_step if run.checkpoint_paths() else -1
        self._saved_when = time.monotonic()
        self._log: CsvLog | None = None
        self._events: Events | None = None
        if chief:
            self._log = CsvLog(run.log_path, COLUMNS, self._step.global_step)
            if events:
                self._events = Events(run.events_folder, self._step.global_step)

    @property
    def step(self) -> int:
        """Steps taken."""
        return self._step.global_step

    @property
    def total_steps(self) -> int:
        return self._total

    def train(self) -> Outcome:
        """To the end, or until stopped.

        Raises:
            TrainingError: loss or gradients are no numbers, memory runs out, or a worker went away; the newest
                checkpoint is from before.
            DataError: the disk refuses a checkpoint; the older ones are there.
        """
        try:
            if self._saved_at < 0:
                self._save()  # whatever happens, there is something to serve
            reason = self._train()
        except tf.errors.ResourceExhaustedError as error:
            raise TrainingError(
                f"Step {self.step + 1} needs more memory than there is. Give a smaller --batch-size; the "
                "checkpoint is as it was."
            ) from error
        except tf.errors.OpError as error:
            if self._workers == 1:
                raise
            raise TrainingError(
                f"The workers lost each other: {str(error).splitlines()[0]} Start the same command on all of them "
                "again; they go on from the newest checkpoint."
            ) from error
        finally:
            for each in (self._log, self._events):
                if each is not None:
                    each.close()
        return Outcome(self.step, reason, self._best)

    def _train(self) -> str:
        pace = _Pace(self.step)
        if self._is_out_of_patience():
            return "patience"
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            upcoming = pool.submit(self._batch, self.step) if self.step < self._total else None
            step = self.step
            while step < self._total:
                assert upcoming is not None
                batch, augmented = upcoming.result()
                upcoming = pool.submit(self._batch, step + 1) if step + 1 < self._total else None
                result = self._take(step, batch, augmented)
                step += 1
                pace.add(len(batch.video_ids))
                self._sums += (float(result.loss), float(result.regularisation), 1.0)
                if step % self._recipe.log_every_steps == 0 or step == self._total:
                    self._report(step, float(result.learning_rate), pace)
                if self._evaluation is not None and self._is_evaluation_due(step):
                    with pace.paused():
                        self._evaluate(step)
                out_of_patience = self._agreed(self._is_out_of_patience(), step)
                stopped = self._agreed(self._stop(), step)
                if out_of_patience or stopped or self._is_checkpoint_due(step):
                    with pace.paused():
                        self._save()
                if out_of_patience:
                    return "patience"
                if stopped and step < self._total:
                    return "stopped"
        return "done"

    # --- batches and steps ---

    def _batch(self, step: int) -> tuple[Batch, Augmented]:
        epoch, place = divmod(step, self._epoch_steps)
        size = self._recipe.batch_size
        batch = self._clips.gather(self._order(epoch)[place * size : (place + 1) * size])
        return batch, self._augmentation(batch, step)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        kept = self._kept_order
        if kept is None or kept[0] != epoch:
            self._kept_order = kept = epoch, self._augmentation.order(epoch)
        return kept[1]

    def _take(self, step: int, batch: Batch, augmented: Augmented) -> StepResult:
        result = self._step(augmented.features, augmented.labels, augmented.num_frames, weights=augmented.weights)
        if bool(result.applied):
            return result
        found = np.asarray(result.predictions)
        broken = np.flatnonzero(~np.isfinite(found).all(axis=1)).tolist() if len(found) == len(batch.video_ids) else []
        named = [batch.video_ids[i] for i in (broken or range(len(batch.video_ids)))[:_NAMED_CLIPS]]
        epoch, place = divmod(step, self._epoch_steps)
        newest = self._run.checkpoint_paths()
        loss, regularisation = float(result.loss), float(result.regularisation)
        if not math.isfinite(loss):
            what = f"the loss is {loss:g}"
        elif not math.isfinite(regularisation):
            what = f"the regularisation loss is {regularisation:g}"
        else:
            what = f"the loss is {loss:g}, but a gradient is no number"
        raise TrainingError(
            f"Step {step + 1} (epoch {epoch + 1}, batch {place + 1}): {what}; the step was not taken. "
            f"{f'Predictions are no numbers for {len(broken)} clips' if broken else 'Clips of the batch'}: "
            f"{', '.join(named)}{', ...' if len(broken or batch.video_ids) > _NAMED_CLIPS else ''}. The checkpoint of "
            f"step {newest[-1][0] if newest else 0} is as it was. Try a lower --base-learning-rate, a smaller "
            "--clip-gradient-norm or no mixed precision, in a new folder; with --start-from this one it begins with "
            "its best weights. Or look at these clips."
        )

    # --- telling ---

    def _report(self, step: int, rate: float, pace: _Pace) -> None:
        loss, regularisation = (self._sums[:2] / self._sums[2]).tolist()
        self._sums[:] = 0
        values = {
            "epoch": step / self._epoch_steps,
            "learning_rate": rate,
            "train_loss": loss,
            "regularisation": regularisation,
        }
        speed = pace.examples_per_second()
        if self._log is not None:
            self._log.write(step, values)
        if self._events is not None:
            tagged = {tag: values[key] for key, tag in _TAGS.items()}
            self._events.scalars(step, {**tagged, "train/examples_per_second": speed})
        self._listener.progress(
            Progress(
                step=step,
                total_steps=self._total,
                epoch=step / self._epoch_steps,
                epochs=self._total / self._epoch_steps,
                loss=loss,
                examples_per_second=speed,
                remaining_seconds=pace.seconds_for(self._total - step),
                best=self._best,
            )
        )

    def _is_evaluation_due(self, step: int) -> bool:
        recipe = self._recipe
        if step == self._total:
            return True
        if recipe.evaluate_every_steps is not None:
            return step % recipe.evaluate_every_steps == 0
        if recipe.evaluate_every_epochs is None:
            return False
        every = recipe.evaluate_every_epochs * self._epoch_steps
        return math.floor(step / every) > math.floor((step - 1) / every)

    def _evaluate(self, step: int) -> None:
        weights = self._step.served_weights()  # every worker: some variables are read together
        self._evaluated_at = step
        if self._evaluator is None:
            return
        evaluation = self._evaluator(weights)
        metrics = evaluation.metrics
        value = metrics[self._best_by]
        better = not np.isnan(value) and (self._best is None or self._is_better(value))
        self._without_better = 0 if better else self._without_better + 1
        if better:
            kept = {key: None if np.isnan(each) else each for key, each in metrics.items()}
            self._best = Best(step=step, metric=self._best_by, metrics=kept)
            self._run.save_best(weights, self._best)
        if self._log is not None:
            told = {f"evaluation_{key}": metrics[key] for key in METRICS}
            self._log.write(step, {"epoch": step / self._epoch_steps, **told})
        if self._events is not None:
            self._events.scalars(step, {f"evaluation/{key}": metrics[key] for key in METRICS})
            for index, curve in evaluation.curves.items():
                name = "gunfire family" if index < 0 else self._run.config.labels[index].name
                self._events.precision_recall(step, f"evaluation/{name}", curve)
        self._listener.evaluated(step, metrics, better)

    def _metric_to_choose_by(self) -> BestBy:
        """ConfigError where the recipe names one that this evaluation data can't tell."""
        family, asked = self._run.config.family, self._recipe.best_by
        told = bool(family) and self._evaluation is not None
        if told and self._evaluation is not None:
            told = bool(family_labels(self._evaluation.label_matrix(), family).any())
        if asked == "gunfire_family_ap" and self._evaluation is not None and not told:
            why = "no clip of the evaluation data carries gunfire" if family else "none of the classes is gunfire"
            raise ConfigError(f"gunfire_family_ap can't tell which weights are best: {why}. Give --best-by map.")
        return asked or ("gunfire_family_ap" if told else "map")

    def _is_better(self, value: float) -> bool:
        assert self._best is not None
        known = self._best.metrics.get(self._best_by)
        if known is None:
            return True
        return value < known if self._best_by == "loss" else value > known

    def _is_out_of_patience(self) -> bool:
        return self._recipe.patience is not None and self._without_better >= self._recipe.patience

    # --- stopping and going on ---

    def _agreed(self, wish: bool, step: int) -> bool:
        """Whether any worker wishes it; asked where all of them come by."""
        if self._workers == 1:
            return wish
        if step % self._recipe.log_every_steps and step != self._evaluated_at:
            return False
        return self._total_of_workers(float(wish)) > 0

    def _total_of_workers(self, value: float) -> float:
        assert self._strategy is not None
        replicas = self._strategy.num_replicas_in_sync // self._workers
        return float(self._poll(tf.constant(value / replicas, tf.float64)))

    def _ask_everyone(self, value: tf.Tensor) -> tf.Tensor:
        assert self._strategy is not None

        def asked() -> tf.Tensor:
            # identity: what is summed has to lie on the replica's own device
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(value))

        return self._strategy.experimental_local_results(self._strategy.run(asked))[0]

    def _check_same_step(self) -> None:
        total = self._total_of_workers(float(self.step))
        if total != self.step * self._workers:
            raise ConfigError(
                f"This worker stands at step {self.step}, the {self._workers} workers together at {total:g}: they "
                f"don't all see the same {self._run.checkpoints_folder}. Give them one shared --train-dir."
            )

    def _is_checkpoint_due(self, step: int) -> bool:
        if step == self._total or step == self._evaluated_at or step % self._recipe.checkpoint_every_steps == 0:
            return True
        late = time.monotonic() - self._saved_when > self._recipe.checkpoint_every_seconds
        return late and self._workers == 1  # clocks of several workers differ, and all must take part

    def _save(self) -> None:
        state = self._step.state()  # every worker: some variables are read together
        step = int(state["global_step"])
        self._saved_when = time.monotonic()
        if not self._chief or step == self._saved_at:
            return
        for each in (self._log, self._events):
            if each is not None:
                each.flush()
        progress: dict[str, Any] = {
            "best": None if self._best is None else self._best.model_dump(),
            "without_better": self._without_better,
            "evaluated_at": self._evaluated_at,
            "sums": self._sums.tolist(),
        }
        self._run.save_checkpoint(Checkpoint(step, state, progress))
        self._saved_at = step
        self._listener.saved(step)

    def _resume(self) -> None:
        checkpoint = self._run.load_checkpoint()
        if checkpoint is None:
            return
        self._step.restore(checkpoint.tensors, f"newest checkpoint of {self._run.folder}")
        progress = checkpoint.progress
        self._best = None if progress["best"] is None else Best.model_validate(progress["best"])
        self._without_better = int(progress["without_better"])
        self._evaluated_at = int(progress["evaluated_at"])
        self._sums = np.array(progress["sums"], np.float64)


def _scope(strategy: tf.distribute.Strategy | None) -> Any:
    return contextlib.nullcontext() if strategy is None else strategy.scope()


class _Pace:
    """Examples a second, time out left out. The first step, which is traced, counts for nothing."""

    def __init__(self, step: int) -> None:
        self._first = step
        self._examples = 0
        self._steps = -1
        self._began = time.monotonic()
        self._recent = (0, 0.0)

    def add(self, examples: int) -> None:
        self._steps += 1
        if self._steps == 0:
            self._began = time.monotonic()
        else:
            self._examples += examples

    def paused(self) -> _Pause:
        return _Pause(self)

    def shift(self, seconds: float) -> None:
        self._began += seconds

    def examples_per_second(self) -> float:
        """Since it was last asked, or since the beginning where no step was taken meanwhile."""
        seconds = time.monotonic() - self._began
        examples, before = self._examples - self._recent[0], seconds - self._recent[1]
        self._recent = (self._examples, seconds)
        return examples / before if before > 0 else 0.0

    def seconds_for(self, steps: int) -> float:
        """NaN before there is anything to go by."""
        taken = time.monotonic() - self._began
        return taken / self._steps * steps if self._steps > 0 else float("nan")


class _Pause:
    def __init__(self, pace: _Pace) -> None:
        self._pace = pace
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._pace.shift(time.monotonic() - self._began)


# --- evaluation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """Of all clips: ``METRICS`` (NaN where there is nothing to tell), and curves of gunfire.

    Attributes:
        curves: by class index; -1 = the family.
    """

    metrics: dict[str, float]
    curves: dict[int, Curve]


class Evaluator:
    """Weights -> how good they are on one set of clips. Traced once."""

    def __init__(self, classifier: Classifier, clips: ClipSet, label_loss: str, family: tuple[int, ...]) -> None:
        self._classifier = classifier
        self._clips = clips
        self._loss = loss_named(label_loss)
        self._family = family
        self._labels = clips.label_matrix()
        self._call = tf.function(self._scores, autograph=False, reduce_retracing=True)

    def _scores(self, x: tf.Tensor, num_frames: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        if x.dtype == tf.uint8:
            x = video_matrix_in_graph(x, num_frames)
        predictions = self._classifier(x, num_frames)
        return predictions, self._loss(predictions, tf.cast(labels, tf.float32))

    def __call__(self, weights: Weights) -> Evaluation:
        """Of ``weights``, by the classifier's names."""
        assign(self._classifier, {name: weights[name] for name in shapes(self._classifier)}, "weights to evaluate")
        top = EvaluationMetrics(self._clips.classes)
        parts = []
        for batch in self._batches():
            scores, loss = self._call(batch.features, batch.num_frames, batch.labels)
            parts.append(scores.numpy())
            self._check(batch, parts[-1])
            top.add(parts[-1], batch.labels, float(loss))
        predictions = np.concatenate(parts)
        epoch, classes = top.value(), per_class(predictions, self._labels)
        curves: dict[int, Curve] = {}
        if self._family:
            members = list(self._family)
            curves[-1] = Curve.of(family_scores(predictions, members), family_labels(self._labels, members))
            curves |= {index: Curve.of(predictions[:, index], self._labels[:, index]) for index in members}
        metrics = {
            "loss": epoch.loss,
            "hit_at_one": epoch.hit_at_one,
            "perr": epoch.perr,
            "gap": epoch.gap,
            "map": classes.mean_average_precision,
            "map_top_k": epoch.map,
            "mean_auc": classes.mean_auc,
            "d_prime": classes.mean_d_prime,
            "gunfire_family_ap": curves[-1].average_precision if curves else float("nan"),
        }
        return Evaluation(metrics, curves)

    def _batches(self) -> Iterator[Batch]:
        return self._clips.batches(EVALUATION_CLIPS)

    @staticmethod
    def _check(batch: Batch, scores: npt.NDArray[np.float32]) -> None:
        broken = np.flatnonzero(~np.isfinite(scores).all(axis=1)).tolist()
        if broken:
            named = ", ".join(f"{batch.video_ids[i]} ({batch.num_frames[i]} frames)" for i in broken[:_NAMED_CLIPS])
            raise TrainingError(
                f"Evaluation: predictions are no numbers for {len(broken)} clips of a batch: {named}. A clip without "
                "frames has no prediction in some models; leave such clips out."
            )
