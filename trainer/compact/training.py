"""Examples -> embedder with heads for single examples -> LSTM head over windows. Fifth stage of the recipe.

The embedder begins at random. It learns at once what is in each example and what two teachers think of it; half of each
batch is altered in loudness, colour, band and background and learns the labels alone. What it wrongly believed is
looked up on the way and shown more often from then on. It then goes on at half the rate, with more alterations, and the
mean of both ends is kept. Or it goes on from a package's embedder, twice with other draws, beside machines too, and a
mean of what it was and what it became is kept. The LSTM learns to be as sure as belief is, from the example and what
came before. All depends on data and seed alone, up to the rounding of parallel sums, and of bfloat16 where that is
quicker.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from detector.classifiers import assign
from detector.classifiers.lstm import LstmConfig, LstmModel
from detector.embedders.compact import FINE_OFFSET, POOLED_SIZE, CompactNetwork
from detector.embedders.log_mel import log_mel as in_graph_log_mel
from detector.embedders.params import EMBEDDING_SIZE, EXAMPLE_FRAMES, MEL_BANDS
from detector.errors import ModelError
from trainer.compact.dataset import (
    SLOWLY_TAUGHT,
    SLOWLY_TAUGHT_EVERY,
    TAUGHT_POSITIONS,
    TrainingData,
    load_arrays,
    save_arrays,
)
from trainer.compact.pools import FAMILY, LABELS, LOOK_ALIKES
from trainer.compact.scenes import POSITIONS
from trainer.compact.teachers import (
    CED_CLASSES,
    CED_GUNFIRE,
    CED_OTHER,
    YAMNET_CLASSES,
    YAMNET_EMBEDDING,
    YAMNET_GUNFIRE,
    YAMNET_MECHANICAL,
    YAMNET_OTHER,
)

WINDOW_EXAMPLES = 10
HEAD = LstmConfig(classes=len(LABELS), input_size=EMBEDDING_SIZE, cells=112, layers=1, final="moe", mixtures=2)
_EMBEDDING_LENGTH = 12.0  # logits of single-example heads come from unit vectors, as the LSTM will see them
_FAMILY_COLUMNS = [LABELS.index(label) for label in FAMILY]
_LOOK_ALIKE_COLUMNS = [LABELS.index(label) for label in LOOK_ALIKES]
_YAMNET_COLUMNS = [len(LABELS) + c for c in YAMNET_GUNFIRE]
_MECHANICAL_COLUMNS = [len(LABELS) + c for c in YAMNET_MECHANICAL]
_OTHER_COLUMNS = [len(LABELS) + c for c in YAMNET_OTHER]
_CED_COLUMNS = [len(LABELS) + YAMNET_CLASSES + c for c in CED_GUNFIRE]
_CED_OTHER_COLUMNS = [len(LABELS) + YAMNET_CLASSES + c for c in CED_OTHER]
_SURELY_NOT = -6.0
_PERHAPS = -3.0
"""A teacher's gunfire logit from which on an example counts among those that it might take for gunfire."""
_CHECKPOINT_STEPS = 500
_MADE_BY = "trainer compact train"
_ASKED_AT_ONCE = 500
_STATISTICS_OF = 1_200
_SENSOR_BANDS = (56.0, 60.0)  # about 5.5 to 6.3 kHz

Float32Array = npt.NDArray[np.float32]
Progress = Callable[[int, int, str], None]
"""(steps done, steps in all, what to say)."""


@dataclass(frozen=True, slots=True)
class Alterations:
    """How many of the altered examples get what.

    Attributes:
        mixed: a second background.
        echo: an echo; half as many a second one.
        limited: nothing above some band, ``sharp`` of them near 6 kHz, where the live-fire sensors end.
        floor: a recorder's noise over all bands.
        mined: are drawn from the wrongly believed negatives.
    """

    mixed: float = 0.4
    echo: float = 0.0
    limited: float = 0.15
    sharp: float = 0.0
    floor: float = 0.0
    mined: float = 0.0


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of the embedder's training.

    Attributes:
        number: each stage draws its own examples and alterations.
        steps: in all.
        mined_at: shares of ``steps`` after which wrongly believed negatives are looked up.
        mined_scenes: share of the scenes among which they are.
        alterations: of the altered half of each batch.
        quieter, narrower: how many of all are up to 26 dB quieter or 6 dB louder, or have nothing above 3.5 to 7 kHz,
            with the same opinions: close is close however it was recorded.
        steady: how many of all are heard beside a machine, with the same opinions: its hum says nothing about the rest.
    """

    number: int
    steps: int
    learning_rate: float
    mined_at: tuple[float, ...] = ()
    mined_scenes: float = 0.5
    alterations: Alterations = Alterations()
    quieter: float = 0.0
    narrower: float = 0.0
    steady: float = 0.0


_MORE = Alterations(0.5, echo=0.3, limited=0.3, sharp=0.5, floor=0.25, mined=0.1)
# The built-in models since 0.9.2 drew with 5, or with 5 and 6: another --seed than theirs gives other examples.
_ONWARD = Stage(5, 3_000, 5e-4, mined_at=(0.0,), alterations=_MORE, quieter=0.25, narrower=0.15, steady=0.3)
_ABREAST = replace(_ONWARD, number=6)
_SECOND = replace(_ONWARD, number=2, steps=2_000, learning_rate=1.5e-3, steady=0.0)


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How to train.

    Attributes:
        first: from random weights.
        second: from the end of that, with more alterations. The mean of the weights at both ends is the embedder.
        onward, abreast: in place of both, each from a package's embedder.
        onward_share: of the weights at the end of each of these (a half at most), in the mean with those they began
            with, which is the embedder.
        example_head_steps, example_head_learning_rate: for a head that is first learnt on the package's embeddings, as
            packages hold none.
        batch_examples: half as they are, with the teachers' opinions; half altered.
        perhaps_share, mined_share: of the unaltered ones, how many are drawn from those that YAMNet might take for
            gunfire, and from the negatives that were wrongly believed.
        mined_fraction: how many of all negatives these are.
    """

    first: Stage = Stage(1, 4_000, 3e-3, mined_at=(0.4, 0.7))
    second: Stage = _SECOND
    onward: Stage = _ONWARD
    abreast: Stage = _ABREAST
    onward_share: float = 0.35
    example_head_steps: int = 4_000
    batch_examples: int = 256
    weight_decay: float = 1e-3
    dropout: float = 0.2
    average_momentum: float = 0.999
    perhaps_share: float = 0.25
    mined_share: float = 0.2
    mined_fraction: float = 0.02
    example_head_learning_rate: float = 1e-2
    yamnet_weight: float = 0.03
    ced_weight: float = 0.05
    gunfire_weight: float = 0.03
    embedding_weight: float = 0.3
    look_alike_weight: float = 0.3
    hard_negative_weight: float = 4.0
    head_epochs: float = 40.0
    head_scenes: int = 64
    head_learning_rate: float = 2e-2
    head_as_recorded_share: float = 0.7
    head_belief_weight: float = 1.0
    head_imagined_share: float = 0.2
    seed: int = 1

    @property
    def stages(self) -> dict[str, Stage]:
        return {"first": self.first, "second": self.second, "onward": self.onward, "abreast": self.abreast}

    def with_steps(self, steps: int) -> TrainingSettings:
        """``steps`` in the first stage, all others in proportion."""

        def of(usual: int) -> int:
            return max(1, usual * steps // self.first.steps)

        stages: dict[str, Any] = {name: replace(stage, steps=of(stage.steps)) for name, stage in self.stages.items()}
        return replace(self, example_head_steps=of(self.example_head_steps), **stages)


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What training made: weights by name."""

    embedder: dict[str, Float32Array]
    example_head: dict[str, Float32Array]
    head: dict[str, Float32Array]

    def save(self, path: Path) -> None:
        parts = {"embedder": self.embedder, "example_head": self.example_head, "head": self.head}
        named: dict[str, Any] = {f"{part}:{name}": v for part, values in parts.items() for name, v in values.items()}
        save_arrays(path, named)

    @classmethod
    def mean(cls, several: Sequence[Trained], shares: Sequence[float] | None = None) -> Trained:
        """Of embedders and example heads that began alike, all alike or each with its share; no LSTM head."""

        def of(parts: Sequence[dict[str, Float32Array]]) -> dict[str, Float32Array]:
            values = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
            return {name: np.average(v, axis=0, weights=shares).astype(np.float32) for name, v in values.items()}

        return cls(of([one.embedder for one in several]), of([one.example_head for one in several]), {})

    @classmethod
    def load(cls, path: Path) -> Trained:
        """Raises ModelError where nothing was trained yet or the file is of something else, DataError where damaged."""
        if not path.is_file():
            raise ModelError(f"{path} is missing: run `trainer compact train` first.")
        parts: dict[str, dict[str, Float32Array]] = {"embedder": {}, "example_head": {}, "head": {}}
        for key, value in load_arrays(path, _MADE_BY).items():
            part, _, name = key.partition(":")
            if part not in parts:
                raise ModelError(f"{path} holds {key!r}, no weights: delete it and run `{_MADE_BY}` again.")
            parts[part][name] = value
        return cls(**parts)


class ExampleHead(tf.Module):
    """``(B, 128)`` embeddings -> ``(B, labels + 521 + 527)``: our logits, YAMNet's, CED's."""

    def __init__(self, seed: int) -> None:
        super().__init__(name="example_head")
        size = (EMBEDDING_SIZE, len(LABELS) + YAMNET_CLASSES + CED_CLASSES)
        initial = np.random.default_rng(seed).standard_normal(size) / (math.sqrt(EMBEDDING_SIZE) * 4.0)
        self.weights = tf.Variable(initial.astype(np.float32), name="weights")
        first = np.concatenate([np.full(len(LABELS), -3.0), np.full(YAMNET_CLASSES + CED_CLASSES, -6.0)])
        self.bias = tf.Variable(first.astype(np.float32), name="bias")

    def __call__(self, embeddings: tf.Tensor) -> tf.Tensor:
        unit = tf.math.l2_normalize(embeddings, axis=-1, epsilon=1e-12)
        return tf.matmul(_EMBEDDING_LENGTH * unit, self.weights) + self.bias


@lru_cache(maxsize=1)
def quick_in_bfloat16() -> bool:
    """Whether this machine trains a convolution quicker in bfloat16 than in float32: tried once, in under a second.

    Processors with instructions for it take a half to a third of the time; those without, eight times as long.
    """

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def gradients(x: tf.Tensor, kernel: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        y = tf.nn.conv2d(x, kernel, 1, "SAME")
        return tf.gradients(y, [x, kernel])  # type: ignore[no-any-return]

    def seconds(dtype: tf.DType) -> float:
        x, kernel = tf.ones([32, 12, 8, 80], dtype), tf.ones([3, 3, 80, 80], dtype)
        taken = []
        for _ in range(4):  # the first one compiles
            started = time.perf_counter()
            gradients(x, kernel)[1].numpy()
            taken.append(time.perf_counter() - started)
        return min(taken[1:])

    return seconds(tf.bfloat16) < seconds(tf.float32)


# --- the embedder ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Draws:
    """Which examples a step sees: a function of seed, stage, step and what was mined."""

    data: TrainingData
    settings: TrainingSettings
    stage: Stage
    perhaps: npt.NDArray[np.int64]
    mined: npt.NDArray[np.int64]

    @classmethod
    def of(cls, data: TrainingData, settings: TrainingSettings, stage: Stage) -> Draws:
        loudest = data.yamnet_logits[..., list(YAMNET_GUNFIRE)].max(axis=-1)
        return cls(data, settings, stage, np.flatnonzero(loudest.ravel() > _PERHAPS), np.zeros(0, np.int64))

    def batch(self, step: int) -> tuple[npt.NDArray[Any], ...]:
        """What ``step`` takes."""
        data, settings, altered_mined_share = self.data, self.settings, self.stage.alterations.mined
        rng = np.random.default_rng([settings.seed, self.stage.number, step])
        half = settings.batch_examples // 2
        taught = len(TAUGHT_POSITIONS)
        pools = [(self.perhaps, settings.perhaps_share), (self.mined, settings.mined_share)]
        picked = [rng.choice(pool, int(share * half)) for pool, share in pools if len(pool)]
        rest = half - sum(map(len, picked))
        drawn = rng.integers(0, len(data) * taught, rest)
        drawn[: rest // 2] -= (
            drawn[: rest // 2] % taught % SLOWLY_TAUGHT_EVERY
        )  # at least half of these were shown to CED
        # Sorted: reading memory in order is quicker, and the order in a batch means nothing.
        flat = np.sort(np.concatenate([*picked, drawn]))
        scenes, numbers = flat // taught, flat % taught
        others = rng.integers(0, len(data) * POSITIONS, settings.batch_examples - half)
        if altered_mined_share > 0 and len(self.mined):
            again = rng.choice(self.mined, int(altered_mined_share * len(others)))
            others[: len(again)] = again // taught * POSITIONS + again % taught * TAUGHT_POSITIONS.step
        others.sort()
        all_scenes = np.concatenate([scenes, others // POSITIONS])
        positions = np.concatenate([numbers * TAUGHT_POSITIONS.step, others % POSITIONS])
        slow = numbers % SLOWLY_TAUGHT_EVERY == 0
        return (
            data.examples(all_scenes, positions),
            data.targets[all_scenes, positions],
            data.weights[all_scenes, positions],
            data.yamnet_logits[scenes, numbers],
            data.yamnet_embeddings[scenes, numbers],
            data.ced_probabilities[scenes, numbers // SLOWLY_TAUGHT_EVERY],
            slow,
        )


def train_embedder(
    data: TrainingData,
    settings: TrainingSettings,
    stage: Stage,
    progress: Progress,
    checkpoint: Path | None = None,
    begun: Trained | None = None,
) -> tuple[Trained, list[float]]:
    """Train embedder and example head, from random weights or from those that were ``begun``.

    Returns the moving average of the weights and each step's loss. ``checkpoint`` (.npz) is written every 500 steps and
    at the end, and taken up again where it is found. Raises ModelError where what was begun is another network, or the
    checkpoint of another or a longer run; DataError where it is damaged.
    """
    if begun is None:
        network, head = CompactNetwork(folded=False, seed=settings.seed), ExampleHead(settings.seed)
    else:
        network, head = _trainable(begun)
    random = tf.random.Generator.from_seed(settings.seed)
    felt_map = tf.Variable(tf.zeros([POOLED_SIZE, YAMNET_EMBEDDING]), name="felt_map")
    centre, spread = _of_embeddings(data)
    variables = [*network.trainable_variables, *head.trainable_variables, felt_map]
    served = [*network.variables, *head.variables]
    average = [tf.Variable(variable, trainable=False) for variable in served]
    momentum = tf.Variable(0.0, trainable=False)
    optimizer = _optimizer(stage.learning_rate, settings.weight_decay, stage.steps)
    optimizer.build(variables)
    half, narrow = settings.batch_examples // 2, quick_in_bfloat16()

    @tf.function(reduce_retracing=True, autograph=False)  # type: ignore[untyped-decorator]
    def step(x: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor, *taught: tf.Tensor) -> tf.Tensor:
        x, targets, weights = (tf.cast(value, tf.float32) for value in (x, targets, weights))
        changed, lessened = augment(random, x[half:], targets[half:], weights[half:], stage.alterations)
        x, weights = tf.concat([x[:half], changed], 0), tf.concat([weights[:half], lessened], 0)
        if stage.steady > 0.0:
            x = beside_a_machine(random, x, stage.steady)
        if stage.quieter > 0.0 or stage.narrower > 0.0:
            x = recorded_otherwise(random, x, quieter=stage.quieter, narrower=stage.narrower)
        with tf.GradientTape() as tape:
            pooled = network.pooled(x, training=True, mixed_precision=narrow)
            kept = tf.cast(random.uniform(tf.shape(pooled)) >= settings.dropout, tf.float32)
            logits = head(network.embedding(pooled * kept / (1.0 - settings.dropout)))
            loss = label_loss(logits[:, : len(LABELS)], targets, weights, settings)
            loss += teacher_loss(logits[:half], taught[0], *taught[2:], settings=settings)
            felt = tf.matmul(pooled[:half], felt_map)
            apart = tf.reduce_mean(((felt - tf.cast(taught[1], tf.float32) + centre) / spread) ** 2)
            loss += settings.embedding_weight * apart
        gradients, _ = tf.clip_by_global_norm(tape.gradient(loss, variables), 5.0)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        for mean, variable in zip(average, served, strict=True):
            mean.assign_sub((1.0 - momentum) * (mean - variable))
        return loss

    draws = Draws.of(data, settings, stage)
    mining = {int(share * stage.steps) for share in stage.mined_at}
    state = [*served, felt_map, *average, *optimizer.variables]
    losses, draws.mined = _restore(checkpoint, state)
    if len(losses) > stage.steps:
        raise ModelError(f"{checkpoint} is of {len(losses)} steps, not of {stage.steps}: train --again.")
    for i in range(len(losses), stage.steps):
        if i in mining:
            draws.mined = wrongly_believed(data, network, head, settings, stage)
        momentum.assign(min(settings.average_momentum, (1.0 + i) / (20.0 + i)))
        random.reset_from_seed(settings.seed * 1_000_003 + stage.number * 500_009 + i)
        losses.append(float(step(*draws.batch(i))))
        if i % 20 == 19 or i == stage.steps - 1:
            progress(i + 1, stage.steps, f"loss {np.mean(losses[-100:]):.4f}")
        if checkpoint is not None and (i % _CHECKPOINT_STEPS == _CHECKPOINT_STEPS - 1 or i == stage.steps - 1):
            _keep(checkpoint, state, losses, draws.mined)
    for mean, variable in zip(average, served, strict=True):
        variable.assign(mean)
    return Trained(network.weights(), {"weights": head.weights.numpy(), "bias": head.bias.numpy()}, {}), losses


def begin_from(served: CompactNetwork, data: TrainingData, settings: TrainingSettings, progress: Progress) -> Trained:
    """A package's embedder in the form that trains, with an example head learnt on its embeddings of ``data``."""
    # Where both teachers were asked.
    scenes, places = (part.ravel() for part in np.indices((len(data), SLOWLY_TAUGHT)))
    numbers = places * SLOWLY_TAUGHT_EVERY
    positions = numbers * TAUGHT_POSITIONS.step
    embeddings = _embeddings(served, data, scenes, positions)
    head = ExampleHead(settings.seed)
    optimizer = _optimizer(settings.example_head_learning_rate, 0.0, settings.example_head_steps)
    variables = list(head.trainable_variables)
    optimizer.build(variables)

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def step(unit: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor, yamnet: tf.Tensor, ced: tf.Tensor) -> tf.Tensor:
        targets, weights = tf.cast(targets, tf.float32), tf.cast(weights, tf.float32)
        with tf.GradientTape() as tape:
            logits = head(unit)
            loss = label_loss(logits[:, : len(LABELS)], targets, weights, settings)
            loss += teacher_loss(logits, yamnet, ced, tf.ones([tf.shape(ced)[0]], tf.bool), settings=settings)
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    rng = np.random.default_rng(settings.seed)
    losses: list[float] = []
    for i in range(settings.example_head_steps):
        few = np.sort(rng.integers(0, len(embeddings), 2 * settings.batch_examples))
        said = (data.targets, data.weights)
        asked = data.yamnet_logits[scenes[few], numbers[few]], data.ced_probabilities[scenes[few], places[few]]
        losses.append(float(step(embeddings[few], *(each[scenes[few], positions[few]] for each in said), *asked)))
        if i % 20 == 19 or i == settings.example_head_steps - 1:
            progress(i + 1, settings.example_head_steps, f"loss {np.mean(losses[-100:]):.4f}")
    few = np.sort(rng.integers(0, len(data), _STATISTICS_OF))
    some = data.examples(few, rng.integers(0, POSITIONS, _STATISTICS_OF))
    network = served.unfolded(tf.cast(some, tf.float32))
    return Trained(network.weights(), {"weights": head.weights.numpy(), "bias": head.bias.numpy()}, {})


def _of_embeddings(data: TrainingData) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and spread of each value of YAMNet's embedding, of a tenth of them."""
    some = data.yamnet_embeddings.reshape(-1, YAMNET_EMBEDDING)[::10].astype(np.float32)
    return tf.constant(some.mean(axis=0)), tf.constant(some.std(axis=0) + np.float32(0.05))


def wrongly_believed(
    data: TrainingData, network: CompactNetwork, head: ExampleHead, settings: TrainingSettings, stage: Stage
) -> npt.NDArray[np.int64]:
    """Numbers (scene * 19 + place) of the surely negative unaltered examples with the highest gunfire logits."""
    narrow = quick_in_bfloat16()

    @tf.function(reduce_retracing=True, autograph=False)  # type: ignore[untyped-decorator]
    def gunfire(x: tf.Tensor) -> tf.Tensor:
        logits = head(network.embedding(network.pooled(tf.cast(x, tf.float32), mixed_precision=narrow)))
        return tf.reduce_max(tf.gather(logits, _FAMILY_COLUMNS, axis=1), axis=1)

    family = np.ix_(np.arange(len(data)), np.array(TAUGHT_POSITIONS), np.array(_FAMILY_COLUMNS))
    sure = ((data.targets[family] == 0) & (data.weights[family] > 0.99)).all(axis=-1)
    rng = np.random.default_rng([settings.seed, stage.number])
    passed_over = rng.permutation(len(data))[int(stage.mined_scenes * len(data)) :]
    sure[passed_over] = False
    negatives = np.flatnonzero(sure)
    if not len(negatives):
        return np.zeros(0, np.int64)
    scenes, numbers = negatives // len(TAUGHT_POSITIONS), negatives % len(TAUGHT_POSITIONS)
    logits = _asked(data, scenes, numbers * TAUGHT_POSITIONS.step, gunfire)
    count = max(1, int(settings.mined_fraction * len(negatives)))
    return np.sort(negatives[np.argsort(-logits, kind="stable")[:count]])


def _asked(
    data: TrainingData,
    scenes: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    ask: Callable[..., tf.Tensor],
    *also: npt.NDArray[Any],
    at_once: int = _ASKED_AT_ONCE,
) -> npt.NDArray[Any]:
    """``ask`` of the examples at ``positions (n,)`` of ``scenes (n,)``, some at a time -> its answers, joined.

    It gets what ``also`` holds of each example besides.
    """
    parts = [slice(first, first + at_once) for first in range(0, len(scenes), at_once)]
    asked = (ask(data.examples(scenes[part], positions[part]), *(each[part] for each in also)) for part in parts)
    return np.concatenate([answers.numpy() for answers in asked])


def _embeddings(
    served: CompactNetwork, data: TrainingData, scenes: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
) -> Float32Array:
    """``(n, 128)`` of the examples at ``positions (n,)`` of ``scenes (n,)``."""

    @tf.function(reduce_retracing=True, autograph=False)  # type: ignore[untyped-decorator]
    def embed(x: tf.Tensor) -> tf.Tensor:
        return served.embedding(served.pooled(tf.cast(x, tf.float32)))

    return _asked(data, scenes, positions, embed)


def label_loss(logits: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor, settings: TrainingSettings) -> tf.Tensor:
    """Cross entropy of ``(B, labels)``; the family counts most, wrong belief in it more."""
    entropy = tf.nn.sigmoid_cross_entropy_with_logits(labels=targets, logits=logits)
    entropy *= hardness(tf.sigmoid(logits), targets, settings.hard_negative_weight)
    return tf.reduce_mean(tf.reduce_sum(entropy * weights * _per_label(settings), axis=1))


def teacher_loss(
    logits: tf.Tensor, yamnet: tf.Tensor, ced: tf.Tensor, ced_asked: tf.Tensor, *, settings: TrainingSettings
) -> tf.Tensor:
    """Cross entropy of what the teachers say, and squared error of their gunfire logits.

    Probabilities near 0 say little: of gunfire the very logit is learnt, down to where a teacher is sure.

    Args:
        logits: ``(B, labels + 521 + 527)``.
        yamnet: ``(B, 521)`` logits.
        ced: ``(B, 527)`` probabilities; ``ced_asked (B,)`` bool says which count.
    """
    yamnet, asked = tf.cast(yamnet, tf.float32), tf.cast(ced_asked, tf.float32)
    ced = tf.clip_by_value(tf.cast(ced, tf.float32), 1e-4, 1.0 - 1e-4)
    ced_logits = tf.math.log(ced / (1.0 - ced))
    theirs = logits[:, len(LABELS) : len(LABELS) + YAMNET_CLASSES]
    others = logits[:, len(LABELS) + YAMNET_CLASSES :]
    said = tf.reduce_sum(tf.nn.sigmoid_cross_entropy_with_logits(labels=tf.sigmoid(yamnet), logits=theirs), axis=1)
    also = tf.reduce_sum(tf.nn.sigmoid_cross_entropy_with_logits(labels=ced, logits=others), axis=1)

    def apart(found: tf.Tensor, wanted: tf.Tensor) -> tf.Tensor:
        found, wanted = tf.maximum(found, _SURELY_NOT), tf.maximum(wanted, _SURELY_NOT)
        return tf.reduce_sum((found - wanted) ** 2 * (1.0 + tf.nn.relu(wanted + 2.0)), axis=1)

    far = apart(tf.gather(logits, _YAMNET_COLUMNS, axis=1), tf.gather(yamnet, YAMNET_GUNFIRE, axis=1))
    ced_far = apart(tf.gather(logits, _CED_COLUMNS, axis=1), tf.gather(ced_logits, CED_GUNFIRE, axis=1))
    slow = tf.reduce_sum(asked) + 1e-6
    return (
        settings.yamnet_weight * tf.reduce_mean(said)
        + settings.gunfire_weight * tf.reduce_mean(far)
        + settings.ced_weight * tf.reduce_sum(asked * also) / slow
        + settings.gunfire_weight * tf.reduce_sum(asked * ced_far) / slow
    )


def _per_label(settings: TrainingSettings) -> tf.Tensor:
    return tf.constant(
        [1.0 if i in _FAMILY_COLUMNS else settings.look_alike_weight for i in range(len(LABELS))], tf.float32
    )


def _keep(path: Path, state: Sequence[tf.Variable], losses: Sequence[float], mined: npt.NDArray[np.int64]) -> None:
    named: dict[str, Any] = {f"{i:04d}": np.asarray(v) for i, v in enumerate(state)}
    save_arrays(path, {"losses": np.asarray(losses), "mined": mined, **named})


def _restore(path: Path | None, state: Sequence[tf.Variable]) -> tuple[list[float], npt.NDArray[np.int64]]:
    """The losses so far and what was mined, the state set; nothing where there is no checkpoint."""
    if path is None or not path.is_file():
        return [], np.zeros(0, np.int64)
    stored = load_arrays(path, _MADE_BY)
    try:
        for i, variable in enumerate(state):
            variable.assign(stored[f"{i:04d}"])
        return [float(value) for value in stored["losses"]], stored["mined"]
    except (KeyError, ValueError) as error:
        raise ModelError(f"{path} is of another network ({error}): train --again.") from error


def hardness(probabilities: tf.Tensor, targets: tf.Tensor, weight: float) -> tf.Tensor:
    """1, and up to ``1 + weight`` for what is wrongly believed: one false alarm in a thousand examples is too many."""
    return 1.0 + weight * (1.0 - targets) * tf.stop_gradient(probabilities) ** 2


def augment(
    random: tf.random.Generator, x: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor, alterations: Alterations
) -> tuple[tf.Tensor, tf.Tensor]:
    """Other places and recorders for fine log-mel ``(B, 96, 64)``; returns it with the weights that are left.

    Each change is (nearly) exact in this domain: gain and colour scale the magnitude under the logarithm; a band limit
    empties the bands above; two sounds add in power. What is mixed in never holds a shot, and labels that it may bring
    along are left out.
    """
    batch = tf.shape(x)[0]
    magnitude = _magnitude(x)
    if alterations.echo > 0.0:
        magnitude = _with_echoes(random, magnitude, alterations.echo)
    partner = tf.roll(tf.range(batch), random.uniform([], 1, tf.maximum(batch, 2), tf.int32), 0)
    harmless = tf.reduce_all(
        tf.gather(tf.gather((targets == 0) & (weights > 0.99), _FAMILY_COLUMNS, axis=1), partner), axis=1
    )
    mixed = harmless & (random.uniform([batch]) < alterations.mixed)
    level = tf.pow(10.0, random.uniform([batch], -40.0, -3.0) / 20.0)
    level *= _rms(magnitude) / (tf.gather(_rms(magnitude), partner) + 1e-6)
    level = tf.where(mixed, level, tf.zeros_like(level))
    second = tf.gather(magnitude, partner) * level[:, None, None]
    magnitude = tf.sqrt(magnitude**2 + second**2)
    others = tf.gather(targets, partner) > 0
    weights = tf.where(mixed[:, None] & others & (targets == 0), tf.zeros_like(weights), weights)
    gain_db = random.normal([batch, 1], 0.0, 4.0) + _colour_db(random, batch)
    magnitude *= tf.pow(10.0, gain_db / 20.0)[:, None, :]
    limited = random.uniform([batch]) < alterations.limited
    cutoff = tf.where(limited, random.uniform([batch], 40.0, float(MEL_BANDS)), float(MEL_BANDS))
    if alterations.sharp > 0.0:
        sharp = limited & (random.uniform([batch]) < alterations.sharp)
        cutoff = tf.where(sharp, random.uniform([batch], *_SENSOR_BANDS), cutoff)
    magnitude = _up_to(cutoff, magnitude)
    if alterations.floor > 0.0:
        level_db = random.uniform([batch], -50.0, -15.0)
        here = random.uniform([batch]) < alterations.floor
        floor = tf.where(here, tf.pow(10.0, level_db / 20.0) * _rms(magnitude), tf.zeros_like(level_db))
        noise = -tf.math.log(random.uniform(tf.shape(magnitude), 1e-6, 1.0))  # power of noise in a band
        magnitude = tf.sqrt(magnitude**2 + (floor**2)[:, None, None] * noise)
    return _fine_log(magnitude), weights


def _with_echoes(random: tf.random.Generator, magnitude: tf.Tensor, share: float) -> tf.Tensor:
    """One or two facades in ``share`` of ``(B, 96, 64)`` magnitudes: 40 to 700 ms later, duller, 3 to 25 dB quieter."""
    batch = tf.shape(magnitude)[0]
    power = magnitude**2
    for number in range(2):
        later = random.uniform([batch], 4, 71, tf.int32)
        rows = tf.range(EXAMPLE_FRAMES)[None, :] - later[:, None]
        echo = tf.gather(power, tf.maximum(rows, 0), axis=1, batch_dims=1)
        echo = tf.where(rows[..., None] >= 0, echo, tf.zeros_like(echo))
        dull_db = random.uniform([batch, 1], 0.0, 15.0) * tf.linspace(0.0, 1.0, MEL_BANDS)[None, :]
        gain_db = -random.uniform([batch, 1], 3.0, 25.0) - dull_db
        here = random.uniform([batch]) < (share if number == 0 else share / 2)
        gain = tf.where(here[:, None], tf.pow(10.0, gain_db / 10.0), tf.zeros_like(gain_db))
        power += echo * gain[:, None, :]
    return tf.sqrt(power)


def recorded_otherwise(random: tf.random.Generator, x: tf.Tensor, *, quieter: float, narrower: float) -> tf.Tensor:
    """Fine log-mel ``(B, 96, 64)``: some up to 26 dB quieter or 6 dB louder, some with nothing above 3.5 to 7 kHz."""
    batch = tf.shape(x)[0]
    gain_db = tf.where(random.uniform([batch]) < quieter, random.uniform([batch], -26.0, 6.0), tf.zeros([batch]))
    cutoff = random.uniform([batch], 44.0, 62.0)
    cutoff = tf.where(random.uniform([batch]) < narrower, cutoff, float(MEL_BANDS) + tf.zeros([batch]))
    magnitude = _magnitude(x) * tf.pow(10.0, gain_db / 20.0)[:, None, None]
    return _fine_log(_up_to(cutoff, magnitude))


def beside_a_machine(random: tf.random.Generator, x: tf.Tensor, share: float) -> tf.Tensor:
    """``share`` of fine log-mel ``(B, F, 64)`` with steady noise: a fan's or an engine's, mostly deep, often with hums.

    It may be louder than all but the clearest sound, yet leaves that 10 dB or more in the band where it is clearest, in
    all but one in a hundred of the quietest; it passes the recorder, so bands that hold nothing stay empty.
    """
    batch = tf.shape(x)[0]
    magnitude = _magnitude(x)
    bands = tf.linspace(0.0, 1.0, MEL_BANDS)[None, :]
    noise_db = -bands * random.uniform([batch, 1], -6.0, 50.0) + _colour_db(random, batch)
    for _ in range(2):
        place = random.uniform([batch, 1], 0.0, 0.5)
        width = random.uniform([batch, 1], 0.01, 0.05)
        hum_db = tf.maximum(random.uniform([batch, 1], -20.0, 25.0), 0.0)
        noise_db += hum_db * tf.exp(-(((bands - place) / width) ** 2))
    loudest = tf.reduce_max(magnitude, axis=1)
    usual = tf.exp(tf.reduce_mean(x, axis=1))  # a geometric mean: a short sound counts little
    clear = tf.maximum(loudest - 2.0 * usual, 3.0 * usual)
    clear_db = 20.0 / math.log(10.0) * tf.math.log(clear)
    noise_db += tf.reduce_max(clear_db - noise_db, axis=1, keepdims=True) - random.uniform([batch, 1], 10.0, 35.0)
    # A mel band's magnitude is the mean over the more bins the higher it is; frames of 25 ms every 10 ms are alike.
    varies = 0.52 / tf.sqrt(1.0 + 7.0 * bands**2)
    drawn = random.normal([batch, tf.shape(x)[1] + 2, MEL_BANDS])
    alike = (drawn[:, :-2] + 2.0 * drawn[:, 1:-1] + drawn[:, 2:]) / math.sqrt(6.0)
    noise = tf.maximum(1.0 + varies[:, None, :] * alike, 0.1) * tf.pow(10.0, noise_db / 20.0)[:, None, :]
    here = (random.uniform([batch, 1, 1]) < share) & (loudest > FINE_OFFSET)[:, None, :]
    noise = tf.where(here, noise, tf.zeros_like(noise))
    return _fine_log(tf.sqrt(magnitude**2 + noise**2))


def _magnitude(x: tf.Tensor) -> tf.Tensor:
    """Of fine log-mel."""
    return tf.maximum(tf.exp(x) - FINE_OFFSET, 0.0)


def _fine_log(magnitude: tf.Tensor) -> tf.Tensor:
    """``_magnitude`` the other way round."""
    return tf.math.log(magnitude + FINE_OFFSET)


def _up_to(cutoff: tf.Tensor, magnitude: tf.Tensor) -> tf.Tensor:
    """``(B, 96, 64)`` without the bands from ``cutoff (B,)`` on."""
    bands = tf.range(MEL_BANDS, dtype=tf.float32)
    return tf.where(bands[None, None, :] < cutoff[:, None, None], magnitude, tf.zeros_like(magnitude))


def _colour_db(random: tf.random.Generator, batch: tf.Tensor) -> tf.Tensor:
    """``(B, 64)``: another microphone's response, smooth over the bands; half of the examples keep theirs."""
    knots = 5
    drawn = random.normal([batch, knots], 0.0, 3.0)
    drawn = tf.where(random.uniform([batch, 1]) < 0.5, drawn, tf.zeros_like(drawn))
    places = np.linspace(0, knots - 1, MEL_BANDS)
    spread = np.maximum(0.0, 1.0 - np.abs(places[None, :] - np.arange(knots)[:, None])).astype(np.float32)
    return tf.matmul(drawn, tf.constant(spread))


def _rms(magnitude: tf.Tensor) -> tf.Tensor:
    return tf.sqrt(tf.reduce_mean(magnitude**2, axis=[1, 2]))


# --- the LSTM head --------------------------------------------------------------------------------------------------


def belief(logits: tf.Tensor) -> tf.Tensor:
    """``(B, labels + 521 + 527)`` outputs of the example head -> ``(B,)``: one logit for gunfire from all of them.

    Our labels know distant shots, YAMNet's classes close ones: either is enough. YAMNet takes explosions for gunfire,
    our labels know them apart, so its word counts the less the less these speak for gunfire; and what speaks for any
    look-alike speaks against. So does what the teachers would call it otherwise: they were taught with far more doors,
    tools and engines than there are here. The numbers were chosen on dev recordings, in round figures on a plateau; the
    last brings thresholds into the middle of the scale.
    """
    own = tf.reduce_max(tf.gather(logits, _FAMILY_COLUMNS, axis=1), axis=1)
    yamnet = tf.reduce_max(tf.gather(logits, _YAMNET_COLUMNS, axis=1), axis=1)
    look_alike = tf.reduce_max(tf.gather(logits, _LOOK_ALIKE_COLUMNS, axis=1), axis=1)
    mechanical = tf.reduce_max(tf.gather(logits, _MECHANICAL_COLUMNS, axis=1), axis=1)
    other = tf.reduce_max(tf.gather(logits, _OTHER_COLUMNS, axis=1), axis=1)
    yamnet += 5.0 + 0.6 * tf.minimum(own + 1.0, 0.0)
    either = tf.reduce_logsumexp(tf.stack([own + 2.0, yamnet]), axis=0)
    ced_other = tf.reduce_max(tf.gather(logits, _CED_OTHER_COLUMNS, axis=1), axis=1)
    against = 0.75 * tf.maximum(look_alike, -5.0) + tf.maximum(mechanical, -5.0) + tf.maximum(other, -2.0)
    return either - against - 0.8 * tf.maximum(ced_other, -3.0) - 13.5


def belief_loss(found: tf.Tensor, believed: tf.Tensor) -> tf.Tensor:
    """Mean squared error of logits ``(B,)``, the more weight the surer belief is."""
    wanted = tf.clip_by_value(believed, -10.0, 8.0)
    return tf.reduce_mean((found - wanted) ** 2 * (1.0 + tf.nn.relu(wanted + 4.0)))


def train_head(
    data: TrainingData, trained: Trained, settings: TrainingSettings, progress: Progress, steady: float = 0.0
) -> tuple[LstmModel, list[float]]:
    """Train the LSTM on embeddings of the served network: every example of every scene with what came before it.

    It learns labels, and to be as sure of gunfire as ``belief`` is: of close fire, which hardly any recording here
    holds, only the teachers know, and a head that sees labels alone forgets it. ``steady`` of the scenes are beside a
    machine, as many as the embedder's examples were in the stages that made it.
    """
    network, example_head = _loaded(trained)
    random = tf.random.Generator.from_seed(settings.seed + 1)

    embeddings, hums = scene_embeddings(network, data, settings.seed, steady)
    model = LstmModel(HEAD, seed=settings.seed)
    steps = max(1, int(settings.head_epochs * len(data) / settings.head_scenes))
    # Down to little: where steps stay large, what the weights end as, and so the quietest thresholds, is chance.
    optimizer = _optimizer(settings.head_learning_rate, 1e-4, steps, at_end=0.02, average=True)
    optimizer.build(model.trainable_variables)

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def step(scenes: tf.Tensor, wanted: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
        wanted, weight = tf.cast(wanted, tf.float32), tf.cast(weight, tf.float32)
        scenes, weight = imagine(random, scenes, weight, settings.head_imagined_share)
        believed = belief(example_head(tf.reshape(scenes, (-1, EMBEDDING_SIZE))))
        with tf.GradientTape() as tape:
            # The LSTM is causal: one pass gives the state after every example.
            states = tf.transpose(model.states(scenes, training=True), (1, 0, 2))
            loss = head_loss(
                model.final(tf.reshape(states, (-1, HEAD.cells))),
                tf.reshape(wanted, (-1, len(LABELS))),
                tf.reshape(weight, (-1, len(LABELS))),
                believed,
                settings,
            )
        gradients, _ = tf.clip_by_global_norm(tape.gradient(loss, model.trainable_variables), 1.0)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    rng = np.random.default_rng(settings.seed + 1)
    # Mixtures teach the embedder; thresholds must fit single recordings.
    recorded = data.as_recorded
    share = settings.head_as_recorded_share if 0 < recorded.mean() < 1 else float(recorded.mean())
    chance = np.where(recorded, share / max(1, recorded.sum()), (1 - share) / max(1, (~recorded).sum()))
    losses: list[float] = []
    for i in range(steps):
        chosen = rng.choice(len(data), settings.head_scenes, p=chance)[:, None]
        numbers = np.arange(i % 2, len(TAUGHT_POSITIONS), 2)
        positions = numbers * TAUGHT_POSITIONS.step
        weights = np.where(hums[chosen][..., None], 0.0, data.weights[chosen, positions])
        losses.append(float(step(embeddings[chosen, numbers], data.targets[chosen, positions], weights)))
        if i % 20 == 19 or i == steps - 1:
            progress(i + 1, steps, f"loss {np.mean(losses[-100:]):.4f}")
    optimizer.finalize_variable_values(model.trainable_variables)
    return model, losses


def scene_embeddings(
    network: CompactNetwork, data: TrainingData, seed: int, steady: float
) -> tuple[Float32Array, npt.NDArray[np.bool_]]:
    """``(scenes, 19, 128)``, ``steady`` of the scenes beside a machine, and which: of these only belief can be learnt.

    Streams are heard twice: the examples of whole chunks, and those across their seams.
    """
    random = tf.random.Generator.from_seed(seed + 2)
    scenes, numbers = np.indices((len(data), len(TAUGHT_POSITIONS)))
    hums = np.random.default_rng(seed + 2).random(len(data)) < steady

    @tf.function(reduce_retracing=True, autograph=False)  # type: ignore[untyped-decorator]
    def embed(x: tf.Tensor, beside: tf.Tensor) -> tf.Tensor:
        x = tf.cast(x, tf.float32)
        if steady > 0.0:
            whole = tf.reshape(x, (-1, len(TAUGHT_POSITIONS) * EXAMPLE_FRAMES, MEL_BANDS))  # one machine a scene
            hummed = tf.reshape(beside_a_machine(random, whole, 1.0), (-1, EXAMPLE_FRAMES, MEL_BANDS))
            x = tf.where(beside[:, None, None], hummed, x)
        return network.embedding(network.pooled(x))

    found = _asked(
        data,
        scenes.ravel(),
        numbers.ravel() * TAUGHT_POSITIONS.step,
        embed,
        np.repeat(hums, len(TAUGHT_POSITIONS)),
        at_once=_ASKED_AT_ONCE // len(TAUGHT_POSITIONS) * len(TAUGHT_POSITIONS),
    )
    return found.reshape(*scenes.shape, EMBEDDING_SIZE), hums


def imagine(
    random: tf.random.Generator, scenes: tf.Tensor, weight: tf.Tensor, share: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """``(B, T, 128)`` embeddings -> unit vectors, and the weights of their labels, ``(B, T, labels)``.

    ``share`` of the scenes become what no recording here sounds like, sums of two: of these only belief can be learnt.
    """
    count = tf.shape(scenes)[0]
    unit = tf.math.l2_normalize(scenes, axis=-1, epsilon=1e-12)
    part = random.uniform([count, tf.shape(scenes)[1], 1], 0.0, 1.25)
    imagined = random.uniform([count, 1, 1]) < share
    unit = tf.where(imagined, part * unit + (1.0 - part) * tf.roll(unit, 1, 0), unit)
    return unit, tf.where(imagined, tf.zeros_like(weight), weight)


def head_loss(
    probabilities: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor, believed: tf.Tensor, settings: TrainingSettings
) -> tf.Tensor:
    """Squared error of the first family label's logit against ``believed (B,)``; cross entropy of all other labels.

    The family's other labels may at most be as sure as belief is, so that the family's score is belief.
    """
    p = tf.clip_by_value(probabilities, 1e-6, 1.0 - 1e-6)
    first, *rest = _FAMILY_COLUMNS
    in_family = tf.reduce_sum(tf.one_hot(rest, len(LABELS)), axis=0)
    targets = tf.where(in_family > 0, targets * tf.sigmoid(believed)[:, None], targets)
    entropy = -(targets * tf.math.log(p) + (1.0 - targets) * tf.math.log(1.0 - p))
    others = 1.0 - tf.one_hot(first, len(LABELS))
    labels = tf.reduce_sum(entropy * weights * others * _per_label(settings), axis=1)
    apart = belief_loss(tf.math.log(p[:, first] / (1.0 - p[:, first])), believed)
    return settings.head_belief_weight * apart + tf.reduce_mean(labels)


def _optimizer(
    learning_rate: float, weight_decay: float, steps: int, *, at_end: float = 0.2, average: bool = False
) -> Any:
    """AdamW, warmed up, cosine down to ``at_end`` of the rate; ``average``: the weights' moving average at the end."""
    warm = max(1, min(300, steps // 10))
    schedule = tf.keras.optimizers.schedules.CosineDecay(
        learning_rate * 0.05, max(1, steps - warm), alpha=at_end, warmup_target=learning_rate, warmup_steps=warm
    )
    return tf.keras.optimizers.AdamW(
        schedule, weight_decay=weight_decay, use_ema=average, ema_momentum=0.998, ema_overwrite_frequency=None
    )


def _trainable(trained: Trained) -> tuple[CompactNetwork, ExampleHead]:
    """Network and example head in the form that trains. Raises ModelError for weights of another network."""
    network, head = CompactNetwork(folded=False), ExampleHead(0)
    network.load(trained.embedder)
    if trained.example_head["weights"].shape != tuple(head.weights.shape):
        raise ModelError("What was trained is of another recipe: train --again, in another --work folder or this one.")
    head.weights.assign(trained.example_head["weights"])
    head.bias.assign(trained.example_head["bias"])
    return network, head


def _loaded(trained: Trained) -> tuple[CompactNetwork, ExampleHead]:
    """The served network and its example head. Raises ModelError for weights of another network."""
    network, head = _trainable(trained)
    return network.folded(), head


# --- as a scorer ----------------------------------------------------------------------------------------------------


class TrainedScorer:
    """A network and its head while they are not yet a package: what ``evaluation.Scorer`` asks for.

    Without an LSTM the example head's belief about the newest example stands in.
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
            return

        def believed(windows: tf.Tensor, frames: tf.Tensor) -> tf.Tensor:
            newest = tf.gather_nd(windows, tf.stack([tf.range(tf.shape(frames)[0]), frames - 1], axis=1))
            logits = example_head(newest)
            ours, sure = logits[:, : len(LABELS)], belief(logits)[:, None]
            first = tf.one_hot(_FAMILY_COLUMNS[0], len(LABELS), dtype=tf.bool, on_value=True, off_value=False)
            return tf.sigmoid(tf.where(first, sure, tf.minimum(ours, sure)))

        self._classify = tf.function(believed, reduce_retracing=True)

    def embed(self, pcm: npt.NDArray[np.int16]) -> Float32Array:
        return np.concatenate([self._embed(pcm[i : i + 64]).numpy() for i in range(0, len(pcm), 64)])

    def classify(self, windows: Float32Array, num_frames: npt.NDArray[np.int32]) -> Float32Array:
        return np.asarray(self._classify(tf.constant(windows), tf.constant(num_frames)).numpy(), np.float32)


def scorer_of(trained: Trained) -> TrainedScorer:
    """Ready to score; the LSTM head where it is trained already. Raises ModelError for weights of another network."""
    network, example_head = _loaded(trained)
    if not trained.head:
        return TrainedScorer(network, example_head)
    lstm = LstmModel(HEAD)
    assign(lstm, trained.head)
    return TrainedScorer(network, example_head, lstm)
