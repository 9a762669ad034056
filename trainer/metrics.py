"""How good predictions are: the starter code's metrics to the last bit, and those that a detector is judged by.

Everything is NumPy on ``(N, V)`` predictions and ``(N, V)`` bool labels, or on ``(N,)`` scores of one class. Two
families of average precision live here, and they are not the same number:

* the starter code's (``average_precision``, ``gap``, ``EvaluationMetrics``) ranks only each clip's ``top_k`` classes,
  and breaks ties by a shuffle with a fixed seed. Source: google/youtube-8m, ``eval_util.py``,
  ``average_precision_calculator.py``;
* ``per_class`` and ``Curve`` rank all clips and take tied scores as one step, so that no order matters; this is what
  AudioSet's mAP, AUC and d-prime mean. Source: Gemmeke et al., "Audio Set", ICASSP 2017; Fawcett, "An introduction to
  ROC analysis", 2006.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

FloatMatrix = npt.NDArray[np.floating]
FloatArray = npt.NDArray[np.floating]
BoolArray = npt.NDArray[np.bool_]
Float64Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

TOP_K = 20
CALIBRATION_BINS = 15
FALSE_POSITIVE_RATES = (0.0001, 0.001, 0.01, 0.05, 0.1)
_SHUFFLE_SEED = 0
_SQRT_2 = 2.0**0.5


def _checked(predictions: npt.ArrayLike, labels: npt.ArrayLike, ndim: int) -> tuple[FloatArray, BoolArray]:
    """Same shape, at least one, no NaN; labels as bool."""
    p = np.asarray(predictions)
    y = np.asarray(labels)
    if p.ndim != ndim or p.shape != y.shape:
        raise ValueError(f"predictions {p.shape} and labels {y.shape} must have one shape of {ndim} dimensions")
    if p.size == 0:
        raise ValueError("there is nothing to measure: predictions are empty")
    if p.dtype.kind != "f":
        p = p.astype(np.float64)
    if np.isnan(p).any():
        raise ValueError("predictions hold NaN")
    return p, y > 0


# --- the starter code's metrics -----------------------------------------------------------------------------------


def hit_at_one(predictions: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Share of ``(N, V)`` rows whose highest prediction is a label (the first of several equal ones)."""
    p, y = _checked(predictions, labels, 2)
    return float(y[np.arange(len(p)), p.argmax(1)].mean())


def perr(predictions: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Precision at equal recall rate: mean over ``(N, V)`` rows of the share of labels among as many top predictions.

    Predictions of 0 or less count as none; so do rows without a label, as in the original.
    """
    p, y = _checked(predictions, labels, 2)
    counts = y.sum(1)
    precision = np.zeros(len(p))
    for count in np.unique(counts[counts > 0]).tolist():
        rows = np.flatnonzero(counts == count)
        top = np.argpartition(p[rows], -count, axis=1)[:, -count:]
        hits = np.take_along_axis(y[rows], top, 1) & (np.take_along_axis(p[rows], top, 1) > 0)
        precision[rows] = hits.sum(1) / count
    return float(precision.mean())


def gap(predictions: npt.ArrayLike, labels: npt.ArrayLike, top_k: int = TOP_K) -> float:
    """Global average precision: all rows' ``top_k`` predictions ranked together; recall counts every label."""
    p, y = _checked(predictions, labels, 2)
    return _gap([_top_predictions(p, y, top_k)], int(y.sum()))


def average_precision(
    predictions: npt.ArrayLike, actuals: npt.ArrayLike, n: int | None = None, total_positives: int | None = None
) -> float:
    """The starter code's ``ap_at_n``: mean precision at each positive among the ``n`` highest of ``(N,)`` scores.

    Args:
        predictions: ``(N,)`` scores.
        actuals: ``(N,)``; above 0 is positive.
        n: how far down to look; None: to the end.
        total_positives: what recall is of, where not all positives are among those given.

    Returns:
        0 where there are no positives. The divisor is at most ``n``, so that a perfect list gets 1.
    """
    p, y = _checked(predictions, actuals, 1)
    if n is not None and n <= 0:
        raise ValueError(f"n is {n}; 1 or more, or None, is needed")
    positives = int(y.sum()) if total_positives is None else int(total_positives)
    if positives == 0:
        return 0.0
    if n is not None:
        positives = min(positives, n)
    ranked = y[_descending(p)][:n]
    ranks = np.flatnonzero(ranked) + 1
    return float((np.arange(1, len(ranks) + 1) / ranks).sum() / positives)


def _descending(p: FloatArray) -> Indices:
    """Order of falling scores; ties as the original's shuffle leaves them."""
    order = np.argsort(-p, kind="stable")
    ranked = p[order]
    if (ranked[1:] != ranked[:-1]).all():
        return order
    shuffled = np.array(random.Random(_SHUFFLE_SEED).sample(range(len(p)), len(p)), np.int64)
    return np.asarray(shuffled[np.argsort(-p[shuffled], kind="stable")])


def _as_heap(p: FloatArray, y: BoolArray) -> tuple[FloatArray, BoolArray]:
    """In the order in which the original's heap keeps them: with ties, its shuffle begins there."""
    if len(np.unique(p)) == len(p):
        return p, y
    heap: list[tuple[float, bool]] = []
    for item in zip(p.tolist(), y.tolist(), strict=True):
        heapq.heappush(heap, item)
    scores, positives = zip(*heap, strict=True)
    return np.array(scores), np.array(positives)


class AveragePrecision:
    """``average_precision`` of scores that come piece by piece, of which only the ``top_n`` highest are kept."""

    def __init__(self, top_n: int | None = None) -> None:
        if top_n is not None and top_n <= 0:
            raise ValueError(f"top_n is {top_n}; 1 or more, or None, is needed")
        self._top_n = top_n
        self._heap: list[tuple[float, bool]] = []
        self._positives = 0

    def add(self, predictions: npt.ArrayLike, actuals: npt.ArrayLike, positives: int | None = None) -> None:
        """``(N,)`` each; ``positives``: how many there are where those given are not all."""
        p, y = _checked(predictions, actuals, 1)
        self._positives += int(y.sum()) if positives is None else positives
        for item in zip(p.tolist(), y.tolist(), strict=True):
            if self._top_n is None or len(self._heap) < self._top_n:
                heapq.heappush(self._heap, item)
            elif item[0] > self._heap[0][0]:
                heapq.heapreplace(self._heap, item)

    def value(self) -> float:
        """0 where nothing was added."""
        if not self._heap:
            return 0.0
        scores, actuals = zip(*self._heap, strict=True)
        return average_precision(np.array(scores), np.array(actuals), self._top_n, self._positives)


@dataclass(frozen=True, slots=True, eq=False)
class _Top:
    """The ``top_k`` predictions of some rows, in the order of the rows."""

    classes: Indices
    scores: FloatArray
    labels: BoolArray


def _top_predictions(p: FloatArray, y: BoolArray, top_k: int) -> _Top:
    if top_k <= 0:
        raise ValueError(f"top_k is {top_k}; 1 or more is needed")
    k = min(top_k, p.shape[1])
    top = np.argpartition(p, -k, axis=1)[:, -k:]
    return _Top(top.ravel(), np.take_along_axis(p, top, 1).ravel(), np.take_along_axis(y, top, 1).ravel())


def _gap(tops: Sequence[_Top], positives: int) -> float:
    by_class = [np.argsort(top.classes, kind="stable") for top in tops]  # the original's order, in which ties end
    scores = np.concatenate([top.scores[order] for top, order in zip(tops, by_class, strict=True)])
    labels = np.concatenate([top.labels[order] for top, order in zip(tops, by_class, strict=True)])
    return average_precision(*_as_heap(scores, labels), total_positives=positives)


@dataclass(frozen=True, slots=True)
class BatchMetrics:
    """Of one batch."""

    hit_at_one: float
    perr: float
    loss: float


@dataclass(frozen=True, slots=True)
class EpochMetrics:
    """Of everything added.

    Attributes:
        hit_at_one, perr, loss: means over clips of the batches' values.
        gap: over all clips.
        map: mean of ``aps``; 0 where no class has a positive.
        aps: average precision of each of ``classes``.
        classes: indices of the classes with at least one positive.
        examples: clips.
    """

    hit_at_one: float
    perr: float
    loss: float
    gap: float
    map: float
    aps: tuple[float, ...]
    classes: tuple[int, ...]
    examples: int


class EvaluationMetrics:
    """The starter code's metrics over batches. Keeps 9 bytes for each of a clip's ``top_k`` predictions."""

    def __init__(self, classes: int, top_k: int = TOP_K) -> None:
        if classes < 1 or top_k < 1:
            raise ValueError(f"classes {classes} and top_k {top_k} must be 1 or more")
        self._classes = classes
        self._top_k = top_k
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._sums = np.zeros(3)
        self._examples = 0
        self._positives = np.zeros(self._classes, np.int64)
        self._tops: list[_Top] = []

    def add(self, predictions: npt.ArrayLike, labels: npt.ArrayLike, loss: npt.ArrayLike) -> BatchMetrics:
        """``(B, V)`` predictions and labels, the batch's loss (or one for each clip); gives the batch's own values."""
        p, y = _checked(predictions, labels, 2)
        if p.shape[1] != self._classes:
            raise ValueError(f"predictions have {p.shape[1]} classes; {self._classes} were promised")
        batch = BatchMetrics(hit_at_one(p, y), perr(p, y), float(np.mean(np.asarray(loss, np.float64))))
        self._sums += np.array([batch.hit_at_one, batch.perr, batch.loss]) * len(p)
        self._examples += len(p)
        self._positives += y.sum(0)
        top = _top_predictions(p, y, self._top_k)
        kind = np.uint16 if self._classes <= 1 << 16 else np.int32
        self._tops.append(_Top(top.classes.astype(kind), top.scores, top.labels))
        return batch

    def value(self) -> EpochMetrics:
        """ValueError where nothing was added."""
        if self._examples == 0:
            raise ValueError("no examples were added")
        hits, precision, loss = (self._sums / self._examples).tolist()
        aps = self._average_precisions()
        classes = tuple(np.flatnonzero(self._positives).tolist())
        return EpochMetrics(
            hit_at_one=hits,
            perr=precision,
            loss=loss,
            gap=_gap(self._tops, int(self._positives.sum())),
            map=float(np.mean(aps)) if aps else 0.0,
            aps=aps,
            classes=classes,
            examples=self._examples,
        )

    def _average_precisions(self) -> tuple[float, ...]:
        classes = np.concatenate([top.classes for top in self._tops])
        scores = np.concatenate([top.scores for top in self._tops])
        labels = np.concatenate([top.labels for top in self._tops])
        order = np.argsort(classes, kind="stable")
        bounds = np.searchsorted(classes[order], np.arange(self._classes + 1))
        aps = []
        for each in np.flatnonzero(self._positives).tolist():
            mine = order[bounds[each] : bounds[each + 1]]
            if len(mine) == 0:
                aps.append(0.0)
                continue
            ranked = _as_heap(scores[mine], labels[mine])
            aps.append(average_precision(*ranked, total_positives=int(self._positives[each])))
        return tuple(aps)


# --- one class, all clips -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """What every threshold does to one class. Point i counts the scores >= ``thresholds[i]``.

    Attributes:
        thresholds: ``(n,)`` falling, each score once.
        true_positives: ``(n,)`` positives at or above.
        false_positives: ``(n,)`` negatives at or above.
        positives: in all.
        negatives: in all.
    """

    thresholds: Float64Array
    true_positives: Indices
    false_positives: Indices
    positives: int
    negatives: int

    @classmethod
    def of(cls, scores: npt.ArrayLike, positive: npt.ArrayLike) -> Curve:
        """``(N,)`` scores and ``(N,)`` bool."""
        p, y = _checked(scores, positive, 1)
        order = np.argsort(-p, kind="stable")
        thresholds, hits = p[order].astype(np.float64), np.cumsum(y[order], dtype=np.int64)
        last = np.flatnonzero(np.append(thresholds[1:] != thresholds[:-1], True))
        return cls(thresholds[last], hits[last], last + 1 - hits[last], int(hits[-1]), int(len(p) - hits[-1]))

    @property
    def recall(self) -> Float64Array:
        """``(n,)`` share of positives at or above each threshold; NaN without positives."""
        return _divided(self.true_positives, self.positives)

    @property
    def false_positive_rate(self) -> Float64Array:
        """``(n,)`` share of negatives at or above each threshold; NaN without negatives."""
        return _divided(self.false_positives, self.negatives)

    @property
    def precision(self) -> Float64Array:
        """``(n,)`` share of positives among what is at or above each threshold."""
        return np.asarray(self.true_positives / (self.true_positives + self.false_positives))

    @property
    def average_precision(self) -> float:
        """Sum over thresholds of precision times the step of recall; NaN without positives."""
        steps = np.diff(self.true_positives, prepend=0)
        return float((self.precision * steps).sum() / self.positives) if self.positives else float("nan")

    @property
    def auc(self) -> float:
        """Chance that a positive scores above a negative, ties half; NaN unless there are both."""
        if not self.positives or not self.negatives:
            return float("nan")
        hits = np.concatenate([[0], self.true_positives])
        steps = np.diff(self.false_positives, prepend=0)
        return float(((hits[1:] + hits[:-1]) * steps).sum() / (2.0 * self.positives * self.negatives))

    def at_threshold(self, threshold: float) -> tuple[float, float]:
        """Recall and false-positive rate of ``score >= threshold``."""
        at = int(np.searchsorted(-self.thresholds, -threshold, side="right")) - 1
        if at < 0:
            return _divided(np.zeros(1), self.positives)[0], _divided(np.zeros(1), self.negatives)[0]
        return float(self.recall[at]), float(self.false_positive_rate[at])

    def at_false_positive_rate(self, rate: float) -> OperatingPoint:
        """The most that can be heard with at most this share of negatives let through."""
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"false-positive rate {rate} is not between 0 and 1")
        allowed = np.flatnonzero(self.false_positives <= rate * self.negatives + 1e-9)
        if len(allowed) == 0:
            return OperatingPoint(rate, float("inf"), 0.0 if self.positives else float("nan"), 0.0)
        hits = self.true_positives[allowed]
        at = allowed[np.searchsorted(hits, hits[-1])]  # the first that hears as much: fewest false positives
        rates = self.false_positive_rate
        return OperatingPoint(rate, float(self.thresholds[at]), float(self.recall[at]), float(rates[at]))


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """What is heard at a threshold that keeps a promise about false positives.

    Attributes:
        max_false_positive_rate: the promise.
        threshold: on the score; infinite where every threshold breaks the promise.
        recall: share of positives heard.
        false_positive_rate: what is really let through.
    """

    max_false_positive_rate: float
    threshold: float
    recall: float
    false_positive_rate: float


def _divided(counts: npt.NDArray[np.generic], total: int) -> Float64Array:
    values = counts.astype(np.float64)
    return values / total if total else np.full_like(values, np.nan)


def recall_at_false_positive_rates(
    scores: npt.ArrayLike, positive: npt.ArrayLike, rates: Sequence[float] = FALSE_POSITIVE_RATES
) -> tuple[OperatingPoint, ...]:
    """``(N,)`` scores and ``(N,)`` bool -> one point for each rate."""
    curve = Curve.of(scores, positive)
    return tuple(curve.at_false_positive_rate(rate) for rate in rates)


def auc_between(higher: npt.ArrayLike, lower: npt.ArrayLike) -> float:
    """Chance that one of ``(n,)`` scores is above one of ``(m,)`` others, ties half: gunfire against a look-alike.

    NaN where either is empty.
    """
    above, below = np.asarray(higher), np.asarray(lower)
    if not len(above) or not len(below):
        return float("nan")
    return Curve.of(np.concatenate([above, below]), np.arange(len(above) + len(below)) < len(above)).auc


def d_prime(auc: float) -> float:
    """AUC as the distance of two unit normal distributions that would have it: ``sqrt(2) * inverse normal CDF``."""
    if np.isnan(auc):
        return float("nan")
    if not 0.0 < auc < 1.0:
        return float("inf") if auc >= 1.0 else float("-inf")
    return _SQRT_2 * NormalDist().inv_cdf(auc)


@dataclass(frozen=True, slots=True, eq=False)
class PerClass:
    """``(V,)`` each; NaN for a class without positives (AUC and d-prime: or without negatives).

    Attributes:
        average_precision: over all clips.
        auc: area under the ROC curve.
        d_prime: see the function.
        positives: clips that carry the class.
    """

    average_precision: Float64Array
    auc: Float64Array
    d_prime: Float64Array
    positives: Indices

    @property
    def mean_average_precision(self) -> float:
        """Over classes that occur; NaN if none does."""
        return _mean(self.average_precision)

    @property
    def mean_auc(self) -> float:
        """Over classes that occur, not everywhere."""
        return _mean(self.auc)

    @property
    def mean_d_prime(self) -> float:
        """Of the mean AUC: a mean of d-primes would be infinite with one perfect class."""
        return d_prime(self.mean_auc)


def _mean(values: Float64Array) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def per_class(predictions: npt.ArrayLike, labels: npt.ArrayLike) -> PerClass:
    """Average precision, AUC and d-prime of every class of ``(N, V)`` predictions; one sort a class."""
    p, y = _checked(predictions, labels, 2)
    columns, truths = np.ascontiguousarray(p.T), np.ascontiguousarray(y.T)
    curves = (Curve.of(scores, positive) for scores, positive in zip(columns, truths, strict=True))
    values = np.array([(curve.average_precision, curve.auc) for curve in curves]).reshape(-1, 2)
    aucs = values[:, 1]
    return PerClass(values[:, 0], aucs, np.array([d_prime(float(auc)) for auc in aucs]), y.sum(0).astype(np.int64))


def family_scores(predictions: FloatMatrix, members: Sequence[int]) -> FloatArray:
    """``(N, V)`` -> ``(N,)``: the highest score of the family's classes, as the detector decides by."""
    return np.asarray(np.asarray(predictions)[:, list(_members(members))].max(1))


def family_labels(labels: npt.ArrayLike, members: Sequence[int]) -> BoolArray:
    """``(N, V)`` -> ``(N,)``: any class of the family."""
    return np.asarray((np.asarray(labels)[:, list(_members(members))] > 0).any(1))


def _members(members: Sequence[int]) -> Sequence[int]:
    if not members:
        raise ValueError("the family has no member")
    return members


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Whether a score of 0.8 is right four times in five.

    Attributes:
        edges: ``(bins + 1,)`` from 0 to 1; a bin holds its upper edge, the first its lower too.
        counts: ``(bins,)`` scores in each.
        mean_scores: ``(bins,)``; NaN where a bin is empty.
        positive_rates: ``(bins,)`` share of positives; NaN where a bin is empty.
        expected_error: mean of ``|mean score - positive rate|`` over scores (ECE, Naeini et al. 2015).
        brier: mean squared difference of score and truth.
    """

    edges: Float64Array
    counts: Indices
    mean_scores: Float64Array
    positive_rates: Float64Array
    expected_error: float
    brier: float


def calibration(scores: npt.ArrayLike, positive: npt.ArrayLike, bins: int = CALIBRATION_BINS) -> Calibration:
    """``(N,)`` probabilities and ``(N,)`` bool; ValueError for scores outside [0, 1]."""
    p, y = _checked(scores, positive, 1)
    if bins < 1:
        raise ValueError(f"bins is {bins}; 1 or more is needed")
    if p.min() < 0 or p.max() > 1:
        raise ValueError(f"scores reach from {p.min()} to {p.max()}; probabilities are needed")
    p64 = p.astype(np.float64)
    edges = np.linspace(0.0, 1.0, bins + 1)
    place = np.clip(np.searchsorted(edges, p64, side="left") - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins).astype(np.int64)
    sums = np.bincount(place, p64, bins)
    hits = np.bincount(place, y.astype(np.float64), bins)
    filled = np.where(counts, counts, 1)
    empty = counts == 0
    return Calibration(
        edges,
        counts,
        np.where(empty, np.nan, sums / filled),
        np.where(empty, np.nan, hits / filled),
        float(np.abs(sums - hits).sum() / len(p64)),
        float(np.square(p64 - y).mean()),
    )
