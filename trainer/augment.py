"""What a recipe does to batches before the step sees them: which clips are drawn, mixed, thinned, and what counts how.

All that is random here follows from the seed and the epoch or step, never from what was drawn before, so that a run
taken up again at any step sees what it would have seen.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from detector.errors import ConfigError, DataError
from trainer.labels import LabelSet
from trainer.recipes import Recipe
from trainer.records import Batch, ClipSet, Float32Array, Indices, UInt8Array

AUDIOSET_QUALITY = "audioset"
"""Value of ``label_quality`` that means the estimates that come with the project."""

_SHIPPED_QUALITY = Path(__file__).parent / "data" / "audioset_label_quality.csv"
_QUALITY_HEADER = ["class", "quality"]
_MIN_QUALITY = 0.01  # of a published 0, so that a class keeps some weight whatever the power
_OF_STEP, _OF_EPOCH = 1, 2  # keep the two apart; not 0, which a seed sequence ignores at its end


class Augmented(NamedTuple):
    """What the step is given.

    Attributes:
        features: as in ``Batch``, or ``(B, T, D)`` float32 where clips were mixed.
        num_frames: ``(B,)`` int32.
        labels: ``(B, V)`` bool, or float32 in [0, 1].
        weights: what the loss takes as its third argument; None = everything counts the same.
    """

    features: UInt8Array | Float32Array
    num_frames: npt.NDArray[np.int32]
    labels: npt.NDArray[np.bool_] | Float32Array
    weights: Float32Array | None


class Augmentation:
    """The data side of a recipe, for one set of clips."""

    def __init__(
        self,
        recipe: Recipe,
        clips: ClipSet,
        labels: LabelSet,
        family: Sequence[int],
        look_alikes: Sequence[int],
        seed: int,
        general: int | None = None,
    ) -> None:
        """Args:
            family, look_alikes: class indices, for what the recipe says of them.
            seed: with epoch and step, all that chance depends on.
            general: the class that all others of the family are kinds of (``trainer.labels.general_class``); None where
                there is none: then no label implies another.

        Raises ConfigError where the recipe asks for what these clips or classes don't have, DataError for a table of
        label qualities that can't be read.
        """
        hard = recipe.hard_negative_weight != 1 or recipe.hard_negative_sampling != 1
        if hard and not (family and look_alikes):
            raise ConfigError(
                "Hard negatives need a family and look-alikes among the classes: give --family and --look-alikes, or "
                "the classes' names with --labels."
            )
        if recipe.frame_dropout and clips.spec.level == "video":
            raise ConfigError("frame_dropout needs frame-level features; these clips have one vector each.")
        self._recipe = recipe
        self._clips = clips
        self._family = list(family)
        self._look_alikes = list(look_alikes)
        self._general = general
        self._seed = seed
        self._class_weights = self._weights_of_classes()
        self._positive_weights = self._weights_of_positives(labels)
        self._shares = self._shares_of_clips()

    def order(self, epoch: int) -> Indices:
        """Clip indices of one epoch, always ``len(clips)`` of them.

        Where clips are drawn unevenly, each comes as often as its share says, rounded up or down by chance.
        """
        if self._shares is None:
            return self._clips.order(self._seed, epoch)
        random = np.random.default_rng((self._seed, epoch, _OF_EPOCH))
        count = len(self._clips)
        marks = (random.random() + np.arange(count)) / count
        drawn = np.minimum(np.searchsorted(np.cumsum(self._shares), marks, side="right"), count - 1)
        return np.asarray(random.permutation(drawn), np.int64)

    def __call__(self, batch: Batch, step: int) -> Augmented:
        """The batch of step ``step``."""
        recipe = self._recipe
        random = np.random.default_rng((self._seed, step, _OF_STEP))
        features, num_frames = batch.features, batch.num_frames
        truth = self._with_family(batch.labels)
        labels: npt.NDArray[np.bool_] | Float32Array = truth
        weights = self._weights_of_hard_negatives(truth)
        if recipe.frame_dropout:
            features, num_frames = thinned(features, num_frames, recipe.frame_dropout, random)
        if recipe.mixup_alpha and recipe.mixup_share:
            values = Batch(batch.video_ids, features, num_frames, batch.labels).values
            partners, shares = _pairs(len(values), recipe.mixup_alpha, recipe.mixup_share, random)
            features, labels = _mixed(values, partners, shares), _mixed(truth, partners, shares)
            num_frames = np.where(shares < 1, np.maximum(num_frames, num_frames[partners]), num_frames)
            weights = None if weights is None else _mixed(weights, partners, shares)
        if self._positive_weights is not None:
            weights = _product(weights, 1 - labels.astype(np.float32) * (1 - self._positive_weights))
        if self._class_weights is not None:
            weights = _product(weights, self._class_weights)
        if recipe.label_smoothing:
            amount = np.float32(recipe.label_smoothing)
            labels = labels.astype(np.float32) * (1 - amount) + amount / 2
        return Augmented(features, num_frames, labels, weights)

    def _weights_of_classes(self) -> Float32Array | None:
        """``(V,)`` of mean 1 over the classes that occur; the others 1."""
        power = self._recipe.class_weight_power
        if not power:
            return None
        counts = self._clips.label_counts().astype(np.float64)
        weights = np.ones(len(counts))
        occurs = counts > 0
        weights[occurs] = counts[occurs] ** -power
        weights[occurs] /= weights[occurs].mean() if occurs.any() else 1.0
        return weights.astype(np.float32)

    def _weights_of_positives(self, labels: LabelSet) -> Float32Array | None:
        """``(V,)`` quality to the power."""
        recipe = self._recipe
        if recipe.label_quality is None or not recipe.label_quality_power:
            return None
        shipped = recipe.label_quality == AUDIOSET_QUALITY
        qualities = read_qualities(_SHIPPED_QUALITY if shipped else Path(recipe.label_quality), labels, partly=shipped)
        return np.asarray(qualities**recipe.label_quality_power, np.float32)

    def _shares_of_clips(self) -> npt.NDArray[np.float64] | None:
        """``(clips,)`` that sum to 1; None where all are the same."""
        recipe = self._recipe
        if not recipe.balanced_sampling_power and recipe.hard_negative_sampling == 1:
            return None
        matrix = self._clips.label_matrix()
        shares = np.ones(len(matrix))
        if recipe.balanced_sampling_power:
            counts = np.maximum(self._clips.label_counts(), 1).astype(np.float64)
            rarest = np.where(matrix, counts, np.inf).min(axis=1, initial=np.inf)
            shares = np.minimum(rarest, counts.max()) ** -recipe.balanced_sampling_power
        if recipe.hard_negative_sampling != 1:
            shares = shares * np.where(self._are_hard(matrix), recipe.hard_negative_sampling, 1.0)
        if not shares.sum() > 0:
            raise ConfigError("hard_negative_sampling 0 leaves no clip to train on.")
        return np.asarray(shares / shares.sum())

    def _are_hard(self, labels: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """``(B,)``: clips with a look-alike and nothing of the family."""
        return np.asarray(labels[:, self._look_alikes].any(axis=1) & ~labels[:, self._family].any(axis=1))

    def _with_family(self, labels: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        if not self._recipe.imply_family or self._general is None:
            return labels
        implied: npt.NDArray[np.bool_] = labels.copy()
        implied[:, self._general] = labels[:, self._family].any(axis=1)
        return implied

    def _weights_of_hard_negatives(self, labels: npt.NDArray[np.bool_]) -> Float32Array | None:
        factor = self._recipe.hard_negative_weight
        if factor == 1:
            return None
        weights = np.ones(labels.shape, np.float32)
        weights[np.flatnonzero(self._are_hard(labels))[:, None], self._family] = factor
        return weights


def _product(weights: Float32Array | None, factors: npt.NDArray[np.floating]) -> Float32Array:
    return np.asarray(factors if weights is None else weights * factors, np.float32)


def thinned(
    features: UInt8Array | Float32Array,
    num_frames: npt.NDArray[np.int32],
    share: float,
    random: np.random.Generator,
) -> tuple[UInt8Array | Float32Array, npt.NDArray[np.int32]]:
    """Rows of ``(B, T, D)`` taken out by chance, the rest moved up, so that clips get shorter but never empty.

    Returns features of the same shape, 0 beyond the new ``num_frames``.
    """
    count, rows = features.shape[:2]
    valid = np.arange(rows) < num_frames[:, None]
    chances = random.random((count, rows))
    kept = valid & (chances >= share)
    nothing = np.flatnonzero(~kept.any(axis=1) & (num_frames > 0))
    kept[nothing, np.where(valid, chances, -1.0).argmax(axis=1)[nothing]] = True
    first = np.argsort(~kept, axis=1, kind="stable")
    moved: UInt8Array | Float32Array = features[np.arange(count)[:, None], first]
    left = kept.sum(axis=1).astype(np.int32)
    moved[np.arange(rows) >= left[:, None]] = 0
    return moved, left


def _pairs(count: int, alpha: float, share: float, random: np.random.Generator) -> tuple[Indices, Float32Array]:
    """A partner for every clip, and how much of the clip itself stays: 0.5 to 1, 1 for clips left as they are."""
    partners = random.permutation(count)
    kept = random.beta(alpha, alpha, count)
    kept = np.maximum(kept, 1.0 - kept)
    kept[random.random(count) >= share] = 1.0
    return partners, kept.astype(np.float32)


def _mixed(values: npt.NDArray[np.generic], partners: Indices, shares: Float32Array) -> Float32Array:
    shares = shares.reshape(-1, *(1,) * (values.ndim - 1))
    floats = values.astype(np.float32, copy=False)
    return np.asarray(floats * shares + floats[partners] * (1 - shares), np.float32)


def read_qualities(path: Path, labels: LabelSet, *, partly: bool = False) -> Float32Array:
    """``(V,)`` from a CSV ``class,quality``: classes by index, MID or name; what share of the labels is right.

    Classes without a line have quality 1; a quality of 0 counts as 0.01. ``partly`` passes over classes that
    ``labels`` doesn't hold; otherwise, as for anything else that doesn't fit, DataError names the line.
    """
    qualities = np.ones(len(labels), np.float32)
    try:
        rows = csv.reader(path.read_text("utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Table of label qualities {path} can't be read: {error}.") from error
    if next(rows, None) != _QUALITY_HEADER:
        raise DataError(f"{path} does not begin with the line {','.join(_QUALITY_HEADER)}.")
    seen: set[int] = set()
    for row in rows:
        where = f"{path}, line {rows.line_num}"
        if not row:
            continue
        try:
            name, quality = row[0], float(row[1])
        except (IndexError, ValueError):
            raise DataError(f"{where}: a class and a number are expected, found {row}.") from None
        if len(row) != 2 or not math.isfinite(quality) or not 0 <= quality <= 1:
            raise DataError(f"{where}: a quality from 0 to 1 is expected, found {','.join(row[1:])}.")
        label = labels.find(name)
        if label is None and partly:
            continue
        index = labels.index(name)
        if index in seen:
            raise DataError(f"{where}: {name!r} has a quality already.")
        seen.add(index)
        qualities[index] = max(quality, _MIN_QUALITY)
    return qualities
