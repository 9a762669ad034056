"""Examples -> embedder with heads for single examples -> LSTM head over windows. Fifth stage of the recipe.

The embedder begins as its teacher's first layers. What lies above them learns first, on their stored output, to say
what is in each example and what the teacher thinks of it; then all layers together, and the two are blended. The LSTM
learns to say it from the example and what came before. All depends on data and seed alone, up to the rounding of
parallel sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from detector.classifiers import assign
from detector.classifiers.lstm import LstmConfig, LstmModel
from detector.embedders.compact import FINE_OFFSET, FLAT_SIZE, CompactNetwork
from detector.embedders.log_mel import log_mel as in_graph_log_mel
from detector.embedders.params import EMBEDDING_SIZE, MEL_BANDS
from detector.errors import ModelError
from trainer.compact.dataset import TrainingData
from trainer.compact.pools import FAMILY, LABELS, LOOK_ALIKES
from trainer.compact.scenes import SCENE_EXAMPLES
from trainer.compact.teacher import TEACHER_CLASSES, TEACHER_EMBEDDING, TEACHER_GUNFIRE

WINDOW_EXAMPLES = 10
HEAD = LstmConfig(classes=len(LABELS), input_size=EMBEDDING_SIZE, cells=64, layers=1, final="moe", mixtures=2)
_EMBEDDING_LENGTH = 12.0  # logits of single-example heads come from unit vectors, as the LSTM will see them
_FAMILY_COLUMNS = [LABELS.index(label) for label in FAMILY]
_LOOK_ALIKE_COLUMNS = [LABELS.index(label) for label in LOOK_ALIKES]
_SURELY_NOT = -6.0
_CHECKPOINT_STEPS = 200

Float32Array = npt.NDArray[np.float32]
Progress = Callable[[int, int, str], None]
"""(steps done, steps in all, what to say)."""


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How to train. Defaults are those of the shipped model."""

    top_epochs: float = 4.0
    whole_steps: int = 600
    batch_examples: int = 128
    learning_rate: float = 2e-3
    whole_learning_rate: float = 3e-4
    whole_share: float = 0.6
    weight_decay: float = 1e-4
    dropout: float = 0.2
    teacher_weight: float = 0.02
    teacher_gunfire_weight: float = 0.02
    teacher_embedding_weight: float = 0.1
    look_alike_weight: float = 0.3
    hard_negative_weight: float = 4.0
    head_epochs: float = 6.0
    head_learning_rate: float = 2e-3
    head_as_recorded_share: float = 0.7
    head_belief_share: float = 0.8
    head_imagined_share: float = 0.5
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


def blended(first: Trained, other: Trained, share: float) -> Trained:
    """``1 - share`` of the first's embedder and example head and ``share`` of the other's; the first's LSTM.

    Weights on one path of training average to a network that generalises better than each (Wortsman et al., "Model
    soups", 2022). Raises ModelError where they are of different networks.
    """
    if {n: v.shape for n, v in other.embedder.items()} != {n: v.shape for n, v in first.embedder.items()}:
        raise ModelError("These runs trained different networks; only runs of one network can be blended.")

    def mean(a: dict[str, Float32Array], b: dict[str, Float32Array]) -> dict[str, Float32Array]:
        return {name: np.asarray((1.0 - share) * a[name] + share * b[name], np.float32) for name in a}

    return Trained(mean(first.embedder, other.embedder), mean(first.example_head, other.example_head), first.head)


class ExampleHead(tf.Module):
    """``(B, 128)`` embeddings -> ``(B, labels + 521 + 1024)``: our logits, the teacher's, its embedding (scaled)."""

    def __init__(self, seed: int) -> None:
        super().__init__(name="example_head")
        size = (EMBEDDING_SIZE, len(LABELS) + TEACHER_CLASSES + TEACHER_EMBEDDING)
        initial = np.random.default_rng(seed).standard_normal(size) / (math.sqrt(EMBEDDING_SIZE) * 4.0)
        self.weights = tf.Variable(initial.astype(np.float32), name="weights")
        first = np.concatenate(
            [np.full(len(LABELS), -3.0), np.full(TEACHER_CLASSES, -6.0), np.zeros(TEACHER_EMBEDDING)]
        )
        self.bias = tf.Variable(first.astype(np.float32), name="bias")

    def __call__(self, embeddings: tf.Tensor) -> tf.Tensor:
        unit = tf.math.l2_normalize(embeddings, axis=-1, epsilon=1e-12)
        return tf.matmul(_EMBEDDING_LENGTH * unit, self.weights) + self.bias


# --- the embedder ---------------------------------------------------------------------------------------------------


def begin(trunk: Mapping[str, Float32Array], seed: int) -> Trained:
    """A network whose trunk is the teacher's and whose top and head are random."""
    network, head = CompactNetwork(seed=seed), ExampleHead(seed)
    return Trained({**network.weights(), **trunk}, _head_weights(head), {})


def train_top(
    data: TrainingData, start: Trained, settings: TrainingSettings, progress: Progress, checkpoint: Path | None = None
) -> tuple[Trained, list[float]]:
    """Train what lies above the trunk on the trunk's stored output; returns new weights and the loss of each step.

    ``checkpoint`` (.npz) is written every 200 steps and taken up again where it is found.
    """
    network, head = _loaded(start)
    variables = [*network.top_variables(), head.weights, head.bias]
    steps = max(1, int(settings.top_epochs * len(data) * SCENE_EXAMPLES / settings.batch_examples))
    loss_of = _example_loss(data, settings)
    random = tf.random.Generator.from_seed(settings.seed)

    def loss(batch: Sequence[tf.Tensor]) -> tf.Tensor:
        features = tf.cast(batch[0], tf.float32)
        kept = tf.cast(random.uniform([tf.shape(features)[0], FLAT_SIZE]) >= settings.dropout, tf.float32)
        outputs = head(network.top(features, kept / (1.0 - settings.dropout)))
        return loss_of(outputs, *batch[1:], tf.ones([tf.shape(features)[0]]))

    arrays = (data.features, data.targets, data.weights, data.teacher_logits, data.teacher_embedding)
    losses = _fit(loss, arrays, variables, random, steps, settings.learning_rate, settings, progress, checkpoint)
    return Trained(network.weights(), _head_weights(head), {}), losses


def train_whole(
    data: TrainingData, start: Trained, settings: TrainingSettings, progress: Progress, checkpoint: Path | None = None
) -> tuple[Trained, list[float]]:
    """Train every layer together, gently, on log-mel; half of each batch is altered, and learns our labels alone."""
    network, head = _loaded(start)
    variables = [*network.trainable_variables, head.weights, head.bias]
    loss_of = _example_loss(data, settings)
    random = tf.random.Generator.from_seed(settings.seed + 1)

    def loss(batch: Sequence[tf.Tensor]) -> tf.Tensor:
        x, targets, weights = tf.cast(batch[0], tf.float32), batch[1], batch[2]
        altered = random.uniform([tf.shape(x)[0]]) < 0.5
        other_x, other_weights = augment(random, x, targets, weights)
        x = tf.where(altered[:, None, None], other_x, x)
        weights = tf.where(altered[:, None], other_weights, weights)
        kept = tf.cast(random.uniform([tf.shape(x)[0], FLAT_SIZE]) >= settings.dropout, tf.float32)
        outputs = head(network.top(network.trunk(x), kept / (1.0 - settings.dropout)))
        return loss_of(outputs, targets, weights, *batch[3:], tf.cast(~altered, tf.float32))

    arrays = (data.log_mel, data.targets, data.weights, data.teacher_logits, data.teacher_embedding)
    rate = settings.whole_learning_rate
    losses = _fit(loss, arrays, variables, random, settings.whole_steps, rate, settings, progress, checkpoint)
    return Trained(network.weights(), _head_weights(head), {}), losses


def _loaded(start: Trained) -> tuple[CompactNetwork, ExampleHead]:
    network, head = CompactNetwork(), ExampleHead(0)
    network.load(start.embedder)
    head.weights.assign(start.example_head["weights"])
    head.bias.assign(start.example_head["bias"])
    return network, head


def _head_weights(head: ExampleHead) -> dict[str, Float32Array]:
    return {"weights": head.weights.numpy(), "bias": head.bias.numpy()}


def _example_loss(data: TrainingData, settings: TrainingSettings) -> Callable[..., tf.Tensor]:
    """Cross entropy of labels (the family counts most), and distance to the teacher where ``asked``."""
    spread = data.teacher_embedding[::7].astype(np.float32).std(axis=(0, 1)) + 0.05
    per_label = tf.constant(
        [1.0 if i in _FAMILY_COLUMNS else settings.look_alike_weight for i in range(len(LABELS))], tf.float32
    )

    def loss(
        outputs: tf.Tensor,
        targets: tf.Tensor,
        weights: tf.Tensor,
        logits: tf.Tensor,
        embedding: tf.Tensor,
        asked: tf.Tensor,
    ) -> tf.Tensor:
        ours, theirs, felt = tf.split(outputs, [len(LABELS), TEACHER_CLASSES, TEACHER_EMBEDDING], axis=1)
        logits, embedding = tf.cast(logits, tf.float32), tf.cast(embedding, tf.float32)
        entropy = tf.nn.sigmoid_cross_entropy_with_logits(labels=targets, logits=ours)
        entropy *= hardness(tf.sigmoid(ours), targets, settings.hard_negative_weight)
        total = tf.reduce_mean(tf.reduce_sum(entropy * weights * per_label, axis=1))
        opinion = tf.nn.sigmoid_cross_entropy_with_logits(labels=tf.sigmoid(logits), logits=theirs)
        total += settings.teacher_weight * tf.reduce_mean(asked * tf.reduce_sum(opinion, axis=1))
        # Probabilities near 0 say little: of gunfire the teacher's very logit is learnt, down to where it is sure.
        wanted = tf.maximum(tf.gather(logits, TEACHER_GUNFIRE, axis=1), _SURELY_NOT)
        found = tf.maximum(tf.gather(theirs, TEACHER_GUNFIRE, axis=1), _SURELY_NOT)
        far = tf.reduce_sum((found - wanted) ** 2 * (1.0 + tf.nn.relu(wanted + 2.0)), axis=1)
        total += settings.teacher_gunfire_weight * tf.reduce_mean(asked * far)
        apart = tf.reduce_mean(((felt - embedding) / spread) ** 2, axis=1)
        return total + settings.teacher_embedding_weight * tf.reduce_mean(asked * apart)

    return loss


def _fit(
    loss: Callable[[Sequence[tf.Tensor]], tf.Tensor],
    arrays: Sequence[npt.NDArray[Any]],
    variables: Sequence[tf.Variable],
    random: tf.random.Generator,
    steps: int,
    learning_rate: float,
    settings: TrainingSettings,
    progress: Progress,
    checkpoint: Path | None,
) -> list[float]:
    """Shuffled examples, AdamW, mean of the weights on the way; step i depends on seed and i, so a run can be resumed.

    ``arrays`` are ``(S, 10, ...)``; variables end as their moving average.
    """
    flat = [array.reshape(-1, *array.shape[2:]) for array in arrays]
    count, batch = len(flat[0]), min(settings.batch_examples, len(flat[0]))
    optimizer = _optimizer(learning_rate, settings.weight_decay, steps)
    optimizer.build(variables)

    @tf.function(reduce_retracing=True, autograph=False)  # type: ignore[untyped-decorator]
    def step(*examples: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            value = loss(examples)
        gradients, _ = tf.clip_by_global_norm(tape.gradient(value, variables), 5.0)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return value

    state = [*variables, *optimizer.variables]
    losses = _restore(checkpoint, state) if checkpoint is not None else []
    a_pass = count // batch
    order = np.zeros(0, np.int64)
    for i in range(len(losses), steps):
        if i % a_pass == 0 or not len(order):
            order = np.random.default_rng([settings.seed, i // a_pass]).permutation(count)
        # Sorted within the batch: reading memory in order is quicker, and the order in a batch means nothing.
        chosen = np.sort(order[i % a_pass * batch : (i % a_pass + 1) * batch])
        random.reset_from_seed(settings.seed * 1_000_003 + i)
        losses.append(float(step(*(array[chosen] for array in flat))))
        if i % 20 == 19 or i == steps - 1:
            progress(i + 1, steps, f"loss {np.mean(losses[-100:]):.4f}")
        if checkpoint is not None and i % _CHECKPOINT_STEPS == _CHECKPOINT_STEPS - 1:
            _keep(checkpoint, state, losses)
    optimizer.finalize_variable_values(list(variables))
    return losses


def _keep(path: Path, state: Sequence[tf.Variable], losses: Sequence[float]) -> None:
    partial = path.with_suffix(".partial")
    named: dict[str, Any] = {f"{i:04d}": np.asarray(v) for i, v in enumerate(state)}
    with partial.open("wb") as file:
        np.savez(file, losses=np.asarray(losses), **named)
    partial.replace(path)


def _restore(path: Path, state: Sequence[tf.Variable]) -> list[float]:
    """The losses so far, the state set; nothing where there is no checkpoint."""
    if not path.is_file():
        return []
    with np.load(path, allow_pickle=False) as stored:
        for i, variable in enumerate(state):
            variable.assign(stored[f"{i:04d}"])
        return [float(value) for value in stored["losses"]]


def hardness(probabilities: tf.Tensor, targets: tf.Tensor, weight: float) -> tf.Tensor:
    """1, and up to ``1 + weight`` for what is wrongly believed: one false alarm in a thousand examples is too many."""
    return 1.0 + weight * (1.0 - targets) * tf.stop_gradient(probabilities) ** 2


def augment(
    random: tf.random.Generator, x: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """New loudness, band limit and a second background for log-mel ``(B, 96, 64)``, each (nearly) exact in this domain.

    Gain scales the magnitude under the logarithm; a band limit empties the bands above; two sounds add in power. What
    is mixed in never holds a shot, and labels that it may bring along are left out.
    """
    batch = tf.shape(x)[0]
    magnitude = tf.maximum(tf.exp(x) - FINE_OFFSET, 0.0)
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
    return tf.math.log(magnitude + FINE_OFFSET), weights


def _rms(magnitude: tf.Tensor) -> tf.Tensor:
    return tf.sqrt(tf.reduce_mean(magnitude**2, axis=[1, 2]))


# --- the LSTM head --------------------------------------------------------------------------------------------------


def belief(logits: tf.Tensor) -> tf.Tensor:
    """``(B, labels + 521 + ...)`` outputs of the example head -> ``(B,)``: one logit for gunfire from all of them.

    Our labels know distant shots, the teacher's classes close ones; what speaks for a look-alike speaks against. The
    shares were chosen on dev recordings.
    """
    own = tf.reduce_max(tf.gather(logits, _FAMILY_COLUMNS, axis=1), axis=1)
    theirs = tf.reduce_max(tf.gather(logits, [len(LABELS) + c for c in TEACHER_GUNFIRE], axis=1), axis=1)
    look_alike = tf.reduce_max(tf.gather(logits, _LOOK_ALIKE_COLUMNS, axis=1), axis=1)
    return own + 0.5 * tf.maximum(theirs, _SURELY_NOT) - 0.4 * tf.maximum(look_alike, -4.0)


def train_head(
    data: TrainingData, top: Trained, settings: TrainingSettings, progress: Progress
) -> tuple[LstmModel, list[float]]:
    """Train the LSTM on embeddings: every position of every scene with what came before it.

    ``top`` is what ``train_top`` gave: its trunk's output is stored. What ``train_whole`` and ``blended`` make of it
    lies close by, and served as well or better with this head as with one of its own.

    It learns labels, and as much what the example head believes: of close fire, which hardly any recording here
    holds, only the teacher knows, and a head that sees labels alone forgets it.
    """
    network, example_head = _loaded(top)
    random = tf.random.Generator.from_seed(settings.seed + 1)

    @tf.function(reduce_retracing=True, autograph=False)  # type: ignore[untyped-decorator]
    def embed(features: tf.Tensor) -> tf.Tensor:
        return network.top(tf.cast(features, tf.float32))

    flat = data.features.reshape(-1, *data.features.shape[2:])
    windows_from = np.concatenate([embed(flat[i : i + 200]).numpy() for i in range(0, len(flat), 200)])
    windows_from = windows_from.reshape(len(data), SCENE_EXAMPLES, EMBEDDING_SIZE)
    targets, weights = data.targets, data.weights
    model = LstmModel(HEAD, seed=settings.seed)
    batch_scenes = max(1, settings.batch_examples // SCENE_EXAMPLES * 2)
    steps = max(1, int(settings.head_epochs * len(windows_from) / batch_scenes))
    optimizer = _optimizer(settings.head_learning_rate, settings.weight_decay, steps)
    optimizer.build(model.trainable_variables)

    @tf.function(reduce_retracing=True, autograph=False)  # type: ignore[untyped-decorator]
    def step(scenes: tf.Tensor, wanted: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
        scenes, wanted, weight = with_belief(random, example_head, scenes, wanted, weight, settings)
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
    recorded = data.as_recorded
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


def with_belief(
    random: tf.random.Generator,
    example_head: ExampleHead,
    scenes: tf.Tensor,
    wanted: tf.Tensor,
    weight: tf.Tensor,
    settings: TrainingSettings,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """``(B, 10, 128)`` embeddings with their labels, ``(B, 10, labels)``, and what the example head believes of them.

    Half of the scenes become what no recording here sounds like, sums of two with random shares: there belief is all
    that can be learnt. Elsewhere it has its share beside the label.
    """
    count = tf.shape(scenes)[0]
    unit = tf.math.l2_normalize(scenes, axis=-1, epsilon=1e-12)
    share = random.uniform([count, SCENE_EXAMPLES, 1], 0.0, 1.25)
    imagined = random.uniform([count, 1, 1]) < settings.head_imagined_share
    unit = tf.where(imagined, share * unit + (1.0 - share) * tf.roll(unit, 1, 0), unit)
    logits = example_head(tf.reshape(unit, (-1, EMBEDDING_SIZE)))
    believed = tf.reshape(tf.sigmoid(belief(logits)), (count, SCENE_EXAMPLES, 1))
    column = tf.one_hot(_FAMILY_COLUMNS[0], len(LABELS))
    unsure = weight[..., _FAMILY_COLUMNS[0] :][..., :1] < 0.5
    soft = tf.where(imagined | unsure, 1.0, settings.head_belief_share)
    wanted = wanted * (1.0 - column) + column * ((1.0 - soft) * wanted + soft * believed)
    weight = tf.where(imagined, tf.ones_like(weight) * column, tf.maximum(weight, column * 0.5))
    return unit, wanted, weight


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
        self._embed = tf.function(
            lambda pcm: network(in_graph_log_mel(pcm)),
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
    network, example_head = CompactNetwork(), ExampleHead(0)
    network.load(trained.embedder)
    example_head.weights.assign(trained.example_head["weights"])
    example_head.bias.assign(trained.example_head["bias"])
    if not trained.head:
        return TrainedScorer(network, example_head)
    lstm = LstmModel(HEAD)
    assign(lstm, trained.head)
    return TrainedScorer(network, example_head, lstm)
