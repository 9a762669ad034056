"""Examples -> embedder with heads for single examples -> LSTM head over windows. Fifth stage of the recipe.

The embedder learns first, on shuffled examples, to say what is in each (and what the teacher thinks of it); then, with
the embedder as it will be served, the LSTM learns to say it from the example and what came before. Both depend on
data and seed alone, up to the rounding of parallel sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from detector.classifiers import assign
from detector.classifiers.lstm import LstmConfig, LstmModel
from detector.embedders.compact import CompactNetwork
from detector.embedders.log_mel import log_mel as in_graph_log_mel
from detector.embedders.params import EMBEDDING_SIZE, FRONT_END, MEL_BANDS
from detector.errors import ModelError
from trainer.compact.dataset import TEACHER_CLASSES, TrainingData
from trainer.compact.pools import FAMILY, LABELS
from trainer.compact.scenes import SCENE_EXAMPLES

WINDOW_EXAMPLES = 10
HEAD = LstmConfig(classes=len(LABELS), input_size=EMBEDDING_SIZE, cells=64, layers=1, final="moe", mixtures=2)
_EMBEDDING_LENGTH = 12.0  # logits of single-example heads come from unit vectors, as the LSTM will see them
_FAMILY_COLUMNS = [LABELS.index(label) for label in FAMILY]
_OFFSET = FRONT_END.log_offset

Float32Array = npt.NDArray[np.float32]
Progress = Callable[[int, int, str], None]
"""(steps done, steps in all, what to say)."""


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How to train. Defaults are those of the shipped model."""

    epochs: float = 6.0
    batch_examples: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    teacher_weight: float = 0.02
    look_alike_weight: float = 0.3
    hard_negative_weight: float = 4.0
    head_epochs: float = 6.0
    head_passes: int = 2
    head_learning_rate: float = 2e-3
    head_as_recorded_share: float = 0.7
    seed: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What training made: weights by name."""

    embedder: dict[str, Float32Array]
    example_head: dict[str, Float32Array]
    head: dict[str, Float32Array]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        parts = {"embedder": self.embedder, "example_head": self.example_head, "head": self.head}
        named: dict[str, Any] = {f"{part}:{name}": v for part, values in parts.items() for name, v in values.items()}
        with partial.open("wb") as file:
            np.savez(file, **named)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Trained:
        """Raises ModelError where nothing was trained yet."""
        if not path.is_file():
            raise ModelError(f"{path} is missing: run `trainer compact train` first.")
        parts: dict[str, dict[str, Float32Array]] = {"embedder": {}, "example_head": {}, "head": {}}
        with np.load(path, allow_pickle=False) as stored:
            for key in stored.files:
                part, name = key.split(":", 1)
                parts[part][name] = stored[key]
        return cls(**parts)


def blended(runs: Sequence[Trained]) -> Trained:
    """The mean of embedders that share their beginning, with the heads of the first run.

    Weights on one path of training average to a network that generalises better than each (Wortsman et al., "Model
    soups", 2022). Raises ModelError where they are of different networks.
    """
    first = runs[0]
    for other in runs[1:]:
        if {n: v.shape for n, v in other.embedder.items()} != {n: v.shape for n, v in first.embedder.items()}:
            raise ModelError("These runs trained different networks; only runs of one network can be blended.")
    mean = {
        name: np.asarray(np.mean([run.embedder[name] for run in runs], axis=0), np.float32) for name in first.embedder
    }
    return Trained(mean, first.example_head, first.head)


class ExampleHead(tf.Module):
    """``(B, 128)`` embeddings -> logits ``(B, labels + 527)``: our labels, then the teacher's."""

    def __init__(self, seed: int) -> None:
        super().__init__(name="example_head")
        size = (EMBEDDING_SIZE, len(LABELS) + TEACHER_CLASSES)
        initial = np.random.default_rng(seed).standard_normal(size) / math.sqrt(EMBEDDING_SIZE)
        self.weights = tf.Variable(initial.astype(np.float32), name="weights")
        self.bias = tf.Variable(tf.fill([size[1]], -3.0), name="bias")

    def __call__(self, embeddings: tf.Tensor) -> tf.Tensor:
        unit = tf.math.l2_normalize(embeddings, axis=-1, epsilon=1e-12)
        return tf.matmul(_EMBEDDING_LENGTH * unit, self.weights) + self.bias


# --- the embedder ---------------------------------------------------------------------------------------------------


def train_embedder(
    data: TrainingData,
    settings: TrainingSettings,
    progress: Progress,
    *,
    start: Trained | None = None,
    max_steps: int | None = None,
) -> tuple[CompactNetwork, ExampleHead, list[float]]:
    """Train on shuffled examples; returns network (training form), its head and the loss of each step.

    Args:
        start: weights to go on from instead of random ones.
        max_steps: end early (tests).
    """
    network, head = CompactNetwork(folded=False, seed=settings.seed), ExampleHead(settings.seed)
    if start is not None:
        network.load(start.embedder)
        head.weights.assign(start.example_head["weights"])
        head.bias.assign(start.example_head["bias"])
    examples = len(data) * SCENE_EXAMPLES
    steps = max(1, int(settings.epochs * examples / settings.batch_examples))
    steps = steps if max_steps is None else min(steps, max_steps)
    optimizer = _optimizer(settings.learning_rate, settings.weight_decay, steps)
    variables = [*network.trainable_variables, *head.trainable_variables]
    optimizer.build(variables)
    random = tf.random.Generator.from_seed(settings.seed)

    @tf.function(reduce_retracing=True, autograph=False)  # type: ignore[untyped-decorator]
    def step(x: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor, teacher: tf.Tensor) -> tf.Tensor:
        x, targets, weights = augment(random, tf.cast(x, tf.float32), targets, weights)
        with tf.GradientTape() as tape:
            logits = head(network(x, training=True))
            loss = example_loss(logits, targets, weights, tf.cast(teacher, tf.float32), settings)
        gradients, _ = tf.clip_by_global_norm(tape.gradient(loss, variables), 5.0)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return loss

    log_mel = data.log_mel.reshape(examples, *data.log_mel.shape[2:])
    targets, weights = (a.reshape(examples, len(LABELS)) for a in (data.targets, data.weights))
    teacher = None if data.teacher is None else data.teacher.reshape(examples, TEACHER_CLASSES)
    nobody = np.full((settings.batch_examples, TEACHER_CLASSES), np.nan, np.float16)
    rng = np.random.default_rng(settings.seed)
    order = np.zeros(0, np.int64)
    losses: list[float] = []
    for i in range(steps):
        if len(order) < settings.batch_examples:
            order = np.concatenate([order, rng.permutation(examples)])
        # Sorted within the batch: reading memory in order is quicker, and the order in a batch means nothing.
        chosen, order = np.sort(order[: settings.batch_examples]), order[settings.batch_examples :]
        asked = nobody[: len(chosen)] if teacher is None else teacher[chosen]
        loss = step(log_mel[chosen], targets[chosen], weights[chosen], asked)
        losses.append(float(loss))
        if i % 20 == 19 or i == steps - 1:
            progress(i + 1, steps, f"loss {np.mean(losses[-100:]):.4f}")
    optimizer.finalize_variable_values(variables)
    return network, head, losses


def example_loss(
    logits: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor, teacher: tf.Tensor, settings: TrainingSettings
) -> tf.Tensor:
    """Cross entropy of labels (the family counts most) and of the teacher's probabilities (NaN: not asked)."""
    per_label = tf.constant(
        [1.0 if i in _FAMILY_COLUMNS else settings.look_alike_weight for i in range(len(LABELS))], tf.float32
    )
    ours = logits[:, : len(LABELS)]
    entropy = tf.nn.sigmoid_cross_entropy_with_logits(labels=targets, logits=ours)
    entropy *= hardness(tf.sigmoid(ours), targets, settings.hard_negative_weight)
    loss = tf.reduce_mean(tf.reduce_sum(entropy * weights * per_label, axis=1))
    asked = tf.math.is_finite(teacher)
    wanted = tf.where(asked, teacher, tf.zeros_like(teacher))
    opinion = tf.nn.sigmoid_cross_entropy_with_logits(labels=wanted, logits=logits[:, len(LABELS) :])
    opinion = tf.where(asked, opinion, tf.zeros_like(opinion))
    return loss + settings.teacher_weight * tf.reduce_mean(tf.reduce_sum(opinion, axis=1))


def hardness(probabilities: tf.Tensor, targets: tf.Tensor, weight: float) -> tf.Tensor:
    """1, and up to ``1 + weight`` for what is wrongly believed: one false alarm in a thousand examples is too many."""
    return 1.0 + weight * (1.0 - targets) * tf.stop_gradient(probabilities) ** 2


def augment(
    random: tf.random.Generator, x: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """New loudness, band limit and a second background for log-mel ``(B, 96, 64)``, each (nearly) exact in this domain.

    Gain scales the magnitude under the logarithm; a band limit empties the bands above; two sounds add in power. What
    is mixed in never holds a shot, and labels that it may bring along are left out.
    """
    batch = tf.shape(x)[0]
    magnitude = tf.maximum(tf.exp(x) - _OFFSET, 0.0)
    partner = tf.roll(tf.range(batch), random.uniform([], 1, tf.maximum(batch, 2), tf.int32), 0)
    harmless = tf.reduce_all(
        tf.gather(tf.gather((targets == 0) & (weights > 0.99), _FAMILY_COLUMNS, axis=1), partner), axis=1
    )
    mixed = harmless & (random.uniform([batch]) < 0.3)
    level = tf.pow(10.0, random.uniform([batch], -40.0, -3.0) / 20.0)
    level *= _rms(magnitude) / (tf.gather(_rms(magnitude), partner) + 1e-6)
    level = tf.where(mixed, level, tf.zeros_like(level))
    second = tf.gather(magnitude, partner) * level[:, None, None]
    magnitude = tf.sqrt(magnitude**2 + second**2)
    others = tf.gather(targets, partner) > 0
    weights = tf.where(mixed[:, None] & others & (targets == 0), tf.zeros_like(weights), weights)
    gain = tf.pow(10.0, random.normal([batch], 0.0, 4.0) / 20.0)
    magnitude *= gain[:, None, None]
    limited = random.uniform([batch]) < 0.15
    cutoff = tf.where(limited, random.uniform([batch], 40.0, float(MEL_BANDS)), float(MEL_BANDS))
    bands = tf.range(MEL_BANDS, dtype=tf.float32)
    magnitude = tf.where(bands[None, None, :] < cutoff[:, None, None], magnitude, tf.zeros_like(magnitude))
    return tf.math.log(magnitude + _OFFSET), targets, weights


def _rms(magnitude: tf.Tensor) -> tf.Tensor:
    return tf.sqrt(tf.reduce_mean(magnitude**2, axis=[1, 2]))


# --- the LSTM head --------------------------------------------------------------------------------------------------


def train_head(
    data: TrainingData, network: CompactNetwork, settings: TrainingSettings, progress: Progress
) -> tuple[LstmModel, list[float]]:
    """Train the LSTM on embeddings of the served network: every position of every scene with what came before it."""
    served = network.folded()
    random = tf.random.Generator.from_seed(settings.seed + 1)

    @tf.function(reduce_retracing=True, autograph=False)  # type: ignore[untyped-decorator]
    def embed(x: tf.Tensor, altered: tf.Tensor) -> tf.Tensor:
        x = tf.cast(x, tf.float32)
        x = tf.where(altered, scene_augment(random, x), x)
        shape = tf.shape(x)
        flat = tf.reshape(x, (-1, x.shape[2], x.shape[3]))
        return tf.reshape(served(flat), (shape[0], SCENE_EXAMPLES, EMBEDDING_SIZE))

    embeddings = []
    for p in range(settings.head_passes):
        for i in range(0, len(data), 26):
            embeddings.append(embed(data.log_mel[i : i + 26], tf.constant(p > 0)).numpy())
        progress(p + 1, settings.head_passes, "embeddings")
    windows_from = np.concatenate(embeddings)  # (passes * S, 10, 128)
    weights = np.concatenate([data.weights] * settings.head_passes)
    targets = np.concatenate([data.targets] * settings.head_passes)
    model = LstmModel(HEAD, seed=settings.seed)
    batch_scenes = max(1, settings.batch_examples // SCENE_EXAMPLES * 2)
    steps = max(1, int(settings.head_epochs * len(windows_from) / batch_scenes))
    optimizer = _optimizer(settings.head_learning_rate, settings.weight_decay, steps)
    optimizer.build(model.trainable_variables)

    @tf.function(reduce_retracing=True, autograph=False)  # type: ignore[untyped-decorator]
    def step(scenes: tf.Tensor, wanted: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
        count = tf.shape(scenes)[0]
        windows = tf.repeat(scenes, SCENE_EXAMPLES, axis=0)  # (B * 10, 10, 128)
        frames = tf.tile(tf.range(1, SCENE_EXAMPLES + 1), [count])
        with tf.GradientTape() as tape:
            probabilities = model(windows, frames)
            loss = head_loss(
                probabilities,
                tf.reshape(wanted, (-1, len(LABELS))),
                tf.reshape(weight, (-1, len(LABELS))),
                settings,
            )
        gradients, _ = tf.clip_by_global_norm(tape.gradient(loss, model.trainable_variables), 1.0)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    rng = np.random.default_rng(settings.seed + 1)
    # Mixtures teach the embedder; thresholds must fit sound as recorders store it.
    recorded = np.tile(data.as_recorded, settings.head_passes)
    share = settings.head_as_recorded_share if 0 < recorded.mean() < 1 else float(recorded.mean())
    chance = np.where(recorded, share / max(1, recorded.sum()), (1 - share) / max(1, (~recorded).sum()))
    losses: list[float] = []
    for i in range(steps):
        chosen = rng.choice(len(windows_from), batch_scenes, p=chance)
        losses.append(float(step(windows_from[chosen], targets[chosen], weights[chosen])))
        if i % 20 == 19 or i == steps - 1:
            progress(i + 1, steps, f"loss {np.mean(losses[-100:]):.4f}")
    optimizer.finalize_variable_values(model.trainable_variables)
    return model, losses


def scene_augment(random: tf.random.Generator, x: tf.Tensor) -> tf.Tensor:
    """``(S, 10, 96, 64)``: one loudness and one band limit for each whole scene."""
    count = tf.shape(x)[0]
    magnitude = tf.maximum(tf.exp(x) - _OFFSET, 0.0)
    gain = tf.pow(10.0, random.normal([count], 0.0, 4.0) / 20.0)
    limited = random.uniform([count]) < 0.25
    cutoff = tf.where(limited, random.uniform([count], 36.0, float(MEL_BANDS)), float(MEL_BANDS))
    bands = tf.range(MEL_BANDS, dtype=tf.float32)
    magnitude = tf.where(bands < cutoff[:, None, None, None], magnitude * gain[:, None, None, None], 0.0)
    return tf.math.log(magnitude + _OFFSET)


def head_loss(
    probabilities: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor, settings: TrainingSettings
) -> tf.Tensor:
    """Cross entropy of probabilities; 1e-6 keeps the logarithm finite."""
    per_label = tf.constant(
        [1.0 if i in _FAMILY_COLUMNS else settings.look_alike_weight for i in range(len(LABELS))], tf.float32
    )
    p = tf.clip_by_value(probabilities, 1e-6, 1.0 - 1e-6)
    entropy = -(targets * tf.math.log(p) + (1.0 - targets) * tf.math.log(1.0 - p))
    entropy *= hardness(p, targets, settings.hard_negative_weight)
    return tf.reduce_mean(tf.reduce_sum(entropy * weights * per_label, axis=1))


def _optimizer(learning_rate: float, weight_decay: float, steps: int) -> Any:
    """AdamW, warmed up, cosine down to 1 %, and the moving average of the weights at the end."""
    warm = max(1, min(300, steps // 10))
    schedule = tf.keras.optimizers.schedules.CosineDecay(
        learning_rate * 0.05, max(1, steps - warm), alpha=0.2, warmup_target=learning_rate, warmup_steps=warm
    )
    return tf.keras.optimizers.AdamW(
        schedule, weight_decay=weight_decay, use_ema=True, ema_momentum=0.998, ema_overwrite_frequency=None
    )


# --- as a scorer ----------------------------------------------------------------------------------------------------


class TrainedScorer:
    """A network and its head while they are not yet a package: what ``evaluation.Scorer`` asks for.

    Without an LSTM the example head's opinion on the newest example stands in.
    """

    labels = LABELS
    window_examples = WINDOW_EXAMPLES

    def __init__(self, network: CompactNetwork, example_head: ExampleHead, lstm: LstmModel | None = None) -> None:
        served = network.folded()
        self._embed = tf.function(
            lambda pcm: served(in_graph_log_mel(pcm)),
            input_signature=[tf.TensorSpec([None, 15_600], tf.int16)],
            autograph=False,
        )
        if lstm is not None:
            self._classify = tf.function(lambda windows, frames: lstm(windows, frames), reduce_retracing=True)
        else:
            self._classify = lambda windows, frames: tf.sigmoid(
                example_head(tf.gather_nd(windows, tf.stack([tf.range(len(frames)), frames - 1], axis=1)))
            )[:, : len(LABELS)]

    def embed(self, pcm: npt.NDArray[np.int16]) -> Float32Array:
        return np.concatenate([self._embed(pcm[i : i + 64]).numpy() for i in range(0, len(pcm), 64)])

    def classify(self, windows: Float32Array, num_frames: npt.NDArray[np.int32]) -> Float32Array:
        return np.asarray(self._classify(tf.constant(windows), tf.constant(num_frames)).numpy(), np.float32)


def scorer_of(trained: Trained) -> TrainedScorer:
    """Ready to score; the LSTM head where it is trained already. Raises ModelError for weights of another network."""
    network, example_head = CompactNetwork(folded=False), ExampleHead(0)
    network.load(trained.embedder)
    example_head.weights.assign(trained.example_head["weights"])
    example_head.bias.assign(trained.example_head["bias"])
    if not trained.head:
        return TrainedScorer(network, example_head)
    lstm = LstmModel(HEAD)
    assign(lstm, trained.head)
    return TrainedScorer(network, example_head, lstm)
