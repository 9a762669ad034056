"""A trained model on labelled clips -> how good it is: the starter code's metrics, and those gunfire is judged by.

Two things go by the name of mean average precision: ``map`` ranks all clips for each class, which is what AudioSet's
figures mean; ``map_top_k`` is the starter code's, which sees only each clip's ``top_k`` classes. See
``trainer.metrics``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from detector.errors import ConfigError, DataError
from trainer.classes import Classes
from trainer.labels import Label
from trainer.losses import loss_named
from trainer.metrics import (
    TOP_K,
    Calibration,
    Curve,
    EpochMetrics,
    EvaluationMetrics,
    auc_between,
    calibration,
    d_prime,
)
from trainer.predict import predictions
from trainer.records import ClipSet
from trainer.trained import Trained

FALSE_POSITIVE_RATES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)
DEFAULT_BATCH_CLIPS = 1024
HARDEST_CLIPS = 25
_CONFUSED_AT = 0.01
_RESAMPLES = 200
_MEMORY_LIMIT_BYTES = 1 << 30
_NAMED_CLIPS = 5

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]


# --- what is reported ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """Of one class over all clips. NaN where no clip carries it (AUC, d-prime: or every clip does)."""

    label: Label
    positives: int
    ap: float
    auc: float
    d_prime: float


@dataclass(frozen=True, slots=True)
class Point:
    """A threshold on the family score.

    Attributes:
        rule: what chose it, for people.
        max_false_positive_rate: what it promises; NaN where another rule chose it.
        threshold: infinite where no score keeps the promise.
        recall: share of gunfire clips at or above it; NaN without such clips.
        false_positive_rate: share of the other clips at or above it.
        precision: share of gunfire among the clips at or above it; NaN where there are none.
    """

    rule: str
    max_false_positive_rate: float
    threshold: float
    recall: float
    false_positive_rate: float
    precision: float


@dataclass(frozen=True, slots=True)
class LookAlike:
    """Clips of a class that is taken for gunfire, those with gunfire left out.

    Attributes:
        clips: how many.
        auc: chance that a gunfire clip's family score is above one of theirs; NaN without either.
        above: share of them at or above each point's threshold; NaN without clips.
    """

    label: Label
    clips: int
    auc: float
    above: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Confused:
    """A class among the false positives at one threshold: how many of its clips (without gunfire) are at or above."""

    label: Label
    above: int
    clips: int


@dataclass(frozen=True, slots=True)
class HardClip:
    """A clip that the model gets wrong.

    Attributes:
        start_seconds, end_seconds: in its source; NaN where the record doesn't say.
        score: of the family.
        labels: names it carries.
        heard: the model's three best classes with their scores.
    """

    video_id: str
    start_seconds: float
    end_seconds: float
    score: float
    labels: tuple[str, ...]
    heard: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, eq=False)
class GunfireReport:
    """How well gunfire is told from everything else, by the highest score of the family's classes.

    Attributes:
        family: figures of the whole; its ``label`` is named "family".
        ap_interval: 95 % interval of the family's AP over resampled clips.
        members, look_alikes: each class.
        points: thresholds, and what they give.
        confused: classes among the false positives at 1 % of them, most frequent first.
        calibration: None where a score is no probability.
        highest_without_gunfire, lowest_with_gunfire: hardest first, at whatever threshold.
        curve: of the family score.
        scores, positive, look_alike: ``(N,)`` family score; gunfire by label; a look-alike without gunfire.
    """

    family: ClassFigures
    ap_interval: tuple[float, float]
    members: tuple[ClassFigures, ...]
    look_alikes: tuple[LookAlike, ...]
    points: tuple[Point, ...]
    confused: tuple[Confused, ...]
    calibration: Calibration | None
    highest_without_gunfire: tuple[HardClip, ...]
    lowest_with_gunfire: tuple[HardClip, ...]
    curve: Curve
    scores: Float32Array
    positive: BoolArray
    look_alike: BoolArray


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """All that ``trainer evaluate`` reports.

    Attributes:
        trained, classes, clips, pattern: what was evaluated, on what.
        label_loss, top_k: how ``epoch`` was measured.
        epoch: the starter code's metrics.
        per_class: every class, in order.
        map, auc: means over the classes that occur; NaN where none does.
        d_prime: of the mean AUC.
        gunfire: the report on the family.
        unscored: indices of clips for which the model gives no number; left out of everything.
    """

    trained: Trained
    classes: Classes
    clips: ClipSet
    pattern: str
    label_loss: str
    top_k: int
    epoch: EpochMetrics
    per_class: tuple[ClassFigures, ...]
    map: float
    auc: float
    d_prime: float
    gunfire: GunfireReport
    unscored: tuple[int, ...]

    @property
    def absent(self) -> tuple[Label, ...]:
        """Classes that no clip carries: they have no average precision and no share in the means."""
        return tuple(figures.label for figures in self.per_class if not figures.positives)


# --- measuring ----------------------------------------------------------------------------------------------------


def evaluate(
    trained: Trained,
    clips: ClipSet,
    classes: Classes,
    *,
    pattern: str = "",
    label_loss: str | None = None,
    top_k: int = TOP_K,
    batch_clips: int = DEFAULT_BATCH_CLIPS,
    on_clips: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score every clip, then measure.

    Args:
        label_loss: the starter code's name of a loss; None = what the model was trained with.
        top_k: classes of a clip that Hit@1, GAP and ``map_top_k`` see.
        on_clips: told how many clips are scored.

    Raises ConfigError for values that can't be, and where clips don't fit the model; DataError where the model gives
    a number for no clip.
    """
    if top_k < 1:
        raise ConfigError(f"top_k is {top_k}; 1 or more is needed.")
    loss_name = trained.label_loss if label_loss is None else label_loss
    scored = _score(trained, clips, loss_name, top_k, batch_clips, on_clips)
    positives_of = _positives_by_class(clips, scored.kept, trained.classes)
    per_class = tuple(
        _figures(label, scored.scores[label.index], positives_of(label.index)) for label in classes.labels
    )
    occurring = [figures for figures in per_class if figures.positives]
    measured = [figures.auc for figures in occurring if not np.isnan(figures.auc)]
    auc = float(np.mean(measured)) if measured else float("nan")
    return Evaluation(
        trained=trained,
        classes=classes,
        clips=clips,
        pattern=pattern,
        label_loss=loss_name,
        top_k=top_k,
        epoch=scored.epoch,
        per_class=per_class,
        map=float(np.mean([figures.ap for figures in occurring])) if occurring else float("nan"),
        auc=auc,
        d_prime=d_prime(auc),
        gunfire=_gunfire(trained, clips, classes, scored, per_class, positives_of),
        unscored=scored.unscored,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Scored:
    """``scores`` ``(V, N)`` of the clips ``kept``, so that a class's scores lie side by side."""

    scores: Float32Array
    kept: Indices
    unscored: tuple[int, ...]
    epoch: EpochMetrics


def _score(
    trained: Trained,
    clips: ClipSet,
    loss_name: str,
    top_k: int,
    batch_clips: int,
    on_clips: Callable[[int], None] | None,
) -> _Scored:
    loss = loss_named(loss_name)
    metrics = EvaluationMetrics(trained.classes, top_k)
    scores = _matrix(trained.classes, len(clips))
    kept: list[Indices] = []
    done = filled = 0
    for ids, batch in predictions(trained.classifier, clips, batch_clips=batch_clips):
        chosen = np.arange(done, done + len(ids))
        finite = np.isfinite(batch).all(axis=1)
        chosen, batch = chosen[finite], batch[finite]
        if len(chosen):
            labels = clips.label_matrix(chosen)
            metrics.add(batch, labels, float(loss(batch, labels)))
            scores[:, filled : filled + len(chosen)] = batch.T
            kept.append(chosen)
            filled += len(chosen)
        done += len(ids)
        if on_clips is not None:
            on_clips(done)
    if not filled:
        raise DataError(
            f"Model {trained.name} gives no number for any of {len(clips)} clips; the first is {clips.video_id(0)} "
            f"with {clips.num_frames[0]} frames. Its weights or these features are damaged."
        )
    all_kept = np.concatenate(kept)
    left_out = np.setdiff1d(np.arange(len(clips)), all_kept)
    return _Scored(scores[:, :filled], all_kept, tuple(left_out.tolist()), metrics.value())


def _matrix(classes: int, clips: int) -> Float32Array:
    """``(V, N)`` float32: in memory, or beyond a gigabyte in an unnamed file."""
    if classes * clips * 4 <= _MEMORY_LIMIT_BYTES:
        return np.empty((classes, clips), np.float32)
    try:
        with tempfile.TemporaryFile() as file:
            return np.memmap(file, np.float32, "w+", shape=(classes, clips))
    except OSError as error:
        raise DataError(
            f"{classes * clips * 4 / 1e9:.1f} GB for the scores of {clips} clips can't be had in "
            f"{tempfile.gettempdir()}: {error.strerror or error}. Set TMPDIR to a larger disk, or evaluate fewer clips."
        ) from error


def _positives_by_class(clips: ClipSet, kept: Indices, classes: int) -> Callable[[int], BoolArray]:
    """Class -> ``(N,)`` bool of the clips kept, made when asked for."""
    rows, columns = [], []
    for start in range(0, len(kept), 65_536):
        row, column = np.nonzero(clips.label_matrix(kept[start : start + 65_536]))
        rows.append(row + start)
        columns.append(column)
    row, column = np.concatenate(rows), np.concatenate(columns)
    order = np.argsort(column, kind="stable")
    row, bounds = row[order], np.searchsorted(column[order], np.arange(classes + 1))

    def positives(index: int) -> BoolArray:
        marked = np.zeros(len(kept), np.bool_)
        marked[row[bounds[index] : bounds[index + 1]]] = True
        return marked

    return positives


def _figures(label: Label, scores: Float32Array, positive: BoolArray) -> ClassFigures:
    curve = Curve.of(scores, positive)
    return ClassFigures(label, curve.positives, curve.average_precision, curve.auc, d_prime(curve.auc))


def _gunfire(
    trained: Trained,
    clips: ClipSet,
    classes: Classes,
    scored: _Scored,
    per_class: Sequence[ClassFigures],
    positives_of: Callable[[int], BoolArray],
) -> GunfireReport:
    scores = np.asarray(scored.scores[list(classes.family)].max(axis=0))
    positive = np.any([positives_of(i) for i in classes.family], axis=0)
    curve = Curve.of(scores, positive)
    points = tuple(_points(curve, trained))
    look_alikes = []
    alike = np.zeros(len(scores), np.bool_)
    for index in classes.look_alikes:
        theirs = positives_of(index) & ~positive
        alike |= theirs
        above = tuple(float((scores[theirs] >= p.threshold).mean()) if theirs.any() else float("nan") for p in points)
        auc = auc_between(scores[positive], scores[theirs])
        look_alikes.append(LookAlike(classes.labels[index], int(theirs.sum()), auc, above))
    probabilities = bool(scores.min() >= 0.0 and scores.max() <= 1.0)
    hardest = np.argsort(-scores, kind="stable")
    name = Label(-1, "", "family")
    return GunfireReport(
        family=ClassFigures(name, curve.positives, curve.average_precision, curve.auc, d_prime(curve.auc)),
        ap_interval=_ap_interval(scores, positive),
        members=tuple(per_class[i] for i in classes.family),
        look_alikes=tuple(look_alikes),
        points=points,
        confused=tuple(_confused(classes, scores, positive, positives_of, curve)),
        calibration=calibration(scores, positive) if probabilities else None,
        highest_without_gunfire=tuple(
            _hard(clips, classes, scored, scores, hardest[~positive[hardest]][:HARDEST_CLIPS])
        ),
        lowest_with_gunfire=tuple(
            _hard(clips, classes, scored, scores, hardest[positive[hardest]][::-1][:HARDEST_CLIPS])
        ),
        curve=curve,
        scores=scores,
        positive=positive,
        look_alike=alike,
    )


def _points(curve: Curve, trained: Trained) -> Iterator[Point]:
    for rate in FALSE_POSITIVE_RATES:
        at = curve.at_false_positive_rate(rate)
        rule = f"{100 * rate:g} % false positives"
        yield Point(rule, rate, at.threshold, at.recall, at.false_positive_rate, _precision(curve, at.threshold))
    if trained.manifest is not None:
        threshold = trained.manifest.decision.open_threshold
        recall, false_positive_rate = curve.at_threshold(threshold)
        precision = _precision(curve, threshold)
        yield Point(
            "package's open threshold", float("nan"), threshold, float(recall), float(false_positive_rate), precision
        )


def _precision(curve: Curve, threshold: float) -> float:
    above = curve.thresholds >= threshold
    return float(curve.precision[above][-1]) if above.any() else float("nan")


def _confused(
    classes: Classes,
    scores: Float32Array,
    positive: BoolArray,
    positives_of: Callable[[int], BoolArray],
    curve: Curve,
) -> Iterator[Confused]:
    above = (scores >= curve.at_false_positive_rate(_CONFUSED_AT).threshold) & ~positive
    found = []
    for label in classes.labels:
        if label.index in classes.family:
            continue
        theirs = positives_of(label.index) & ~positive
        count = int((theirs & above).sum())
        if count:
            found.append(Confused(label, count, int(theirs.sum())))
    yield from sorted(found, key=lambda each: (-each.above, each.clips, each.label.index))


def _hard(
    clips: ClipSet, classes: Classes, scored: _Scored, family_scores: Float32Array, places: Indices
) -> Iterator[HardClip]:
    for place in places.tolist():
        clip = int(scored.kept[place])
        start, end = clips.times_seconds[clip].tolist()
        every = scored.scores[:, place]
        best = np.argsort(-every, kind="stable")[:3].tolist()
        yield HardClip(
            video_id=clips.video_id(clip),
            start_seconds=start,
            end_seconds=end,
            score=float(family_scores[place]),
            labels=tuple(classes.labels[i].name for i in dict.fromkeys(clips.labels_of(clip).tolist())),
            heard=tuple((classes.labels[i].name, float(every[i])) for i in best),
        )


def _ap_interval(scores: Float32Array, positive: BoolArray) -> tuple[float, float]:
    """95 % of the APs over clips drawn again, each as often as a Poisson number of mean 1 says; NaN without positives.

    The resampling is the same every time.
    """
    if not positive.any():
        return float("nan"), float("nan")
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], positive[order]
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    random = np.random.default_rng(0)
    found = []
    for _ in range(_RESAMPLES):
        weights = random.poisson(1.0, len(ranked))
        above, heard = np.cumsum(weights)[ends], np.cumsum(weights * hits)[ends]
        if heard[-1]:
            precision = heard / np.maximum(above, 1)
            found.append(float((precision * np.diff(heard, prepend=0)).sum() / heard[-1]))
    low, high = np.percentile(found, [2.5, 97.5]).tolist() if found else (float("nan"), float("nan"))
    return low, high


def unscored_clips(evaluation: Evaluation) -> str:
    """A sentence on the clips left out; empty where there are none."""
    count = len(evaluation.unscored)
    if not count:
        return ""
    named = ", ".join(
        f"{evaluation.clips.video_id(i)} ({evaluation.clips.num_frames[i]} frames)"
        for i in evaluation.unscored[:_NAMED_CLIPS]
    )
    return f"For {count} clips the model gives no number; they are left out: {named}{', ...' if count > 5 else ''}."


def by_clip_rows(evaluation: Evaluation) -> Iterator[list[Any]]:
    """A header, then a row for each clip: id, times, gunfire by label (0 or 1), look-alike likewise, family score,
    label names with ``;`` between.
    """
    yield ["video_id", "start_seconds", "end_seconds", "gunfire", "look_alike", "family_score", "labels"]
    gunfire, clips = evaluation.gunfire, evaluation.clips
    kept = np.setdiff1d(np.arange(len(clips)), np.asarray(evaluation.unscored, np.int64))
    for place, clip in enumerate(kept.tolist()):
        start, end = clips.times_seconds[clip].tolist()
        names = [evaluation.classes.labels[i].name for i in dict.fromkeys(clips.labels_of(clip).tolist())]
        yield [
            clips.video_id(clip),
            "" if np.isnan(start) else f"{start:g}",
            "" if np.isnan(end) else f"{end:g}",
            int(gunfire.positive[place]),
            int(gunfire.look_alike[place]),
            f"{gunfire.scores[place]:.6g}",
            "; ".join(names),
        ]
