"""Predictions against a segment list: what of its labels was found, and where the two disagree most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.labels import Label, LabelSet
from trainer.segments import Segment

WORST = 20
_NAMED_IDS = 10


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of a class, or of a family (its ``label`` has index -1).

    Attributes:
        labelled: clips that the segments label with it.
        found: of those, clips whose predictions hold it.
        first: clips whose first prediction it is.
        first_right: of those, clips labelled with it.
    """

    label: Label
    labelled: int
    found: int
    first: int
    first_right: int

    @property
    def recall(self) -> float | None:
        """Share found among the predictions of a clip; None where nothing is labelled."""
        return self.found / self.labelled if self.labelled else None

    @property
    def agreement_at_one(self) -> float | None:
        """Share of first predictions that are labels; None where it is never first."""
        return self.first_right / self.first if self.first else None


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A clip on which segments and predictions disagree about the family.

    Attributes:
        score: the family's highest confidence; 0 where no prediction names it.
        labels: the segments'.
        predicted: the first predictions with their confidences.
    """

    video_id: str
    start_seconds: float
    end_seconds: float
    score: float
    labels: tuple[str, ...]
    predicted: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class SegmentCheck:
    """What the comparison showed.

    Attributes:
        compared: clips on both sides.
        top_k: most predictions that a clip has.
        family: of the family as a whole.
        per_class: classes that segments or first predictions name, in order.
        hit_at_one: share of clips whose first prediction is a label.
        lowest_with_gunfire: gunfire by the segments, lowest family score first.
        highest_without_gunfire: the others whose predictions name the family, highest score first.
        only_predicted, only_listed: ids on one side alone, in the order of the files.
    """

    compared: int
    top_k: int
    family: Agreement
    per_class: tuple[Agreement, ...]
    hit_at_one: float
    lowest_with_gunfire: tuple[Disagreement, ...]
    highest_without_gunfire: tuple[Disagreement, ...]
    only_predicted: tuple[str, ...]
    only_listed: tuple[str, ...]


def check_segments(
    predictions: Mapping[str, Mapping[int, float]],
    segments: Sequence[Segment],
    labels: LabelSet,
    family: Sequence[int],
    *,
    worst: int = WORST,
) -> SegmentCheck:
    """Compare by id; segments of one id count as one clip with all their labels.

    Args:
        predictions: id -> class index -> confidence, best first (``read_predictions``).
        worst: disagreements of each kind to keep.

    Raises ValueError where no id is on both sides.
    """
    listed: dict[str, list[Segment]] = {}
    for segment in segments:
        listed.setdefault(segment.video_id, []).append(segment)
    both = [video for video in predictions if video in listed]
    if not both:
        raise ValueError("no id is in predictions and segments")
    truths = {video: {label for segment in listed[video] for label in segment.labels} for video in both}
    firsts = {video: next(iter(predictions[video]), -1) for video in both}
    members = set(family)

    def disagreement(video: str) -> Disagreement:
        spans = listed[video]
        pairs = list(predictions[video].items())[:3]
        return Disagreement(
            video,
            min(segment.start_seconds for segment in spans),
            max(segment.end_seconds for segment in spans),
            family_score(video),
            tuple(labels[i].name for i in sorted(truths[video])),
            tuple((labels[i].name, score) for i, score in pairs),
        )

    def family_score(video: str) -> float:
        return max((score for i, score in predictions[video].items() if i in members), default=0.0)

    gunfire = [video for video in both if truths[video] & members]
    other = [video for video in both if not truths[video] & members]
    lowest = sorted(gunfire, key=lambda v: (family_score(v), -max(predictions[v].values(), default=0.0), v))
    highest = sorted((v for v in other if family_score(v) > 0), key=lambda v: (-family_score(v), v))
    in_family = Agreement(
        Label(-1, "", "family"),
        len(gunfire),
        sum(bool(members & predictions[video].keys()) for video in gunfire),
        sum(firsts[video] in members for video in both),
        sum(firsts[video] in members for video in gunfire),
    )
    return SegmentCheck(
        compared=len(both),
        top_k=max(len(predictions[video]) for video in both),
        family=in_family,
        per_class=tuple(_agreements(labels, both, truths, firsts, predictions)),
        hit_at_one=sum(firsts[video] in truths[video] for video in both) / len(both),
        lowest_with_gunfire=tuple(disagreement(video) for video in lowest[:worst]),
        highest_without_gunfire=tuple(disagreement(video) for video in highest[:worst]),
        only_predicted=tuple(video for video in predictions if video not in listed),
        only_listed=tuple(video for video in listed if video not in predictions),
    )


def _agreements(
    labels: LabelSet,
    both: Sequence[str],
    truths: Mapping[str, set[int]],
    firsts: Mapping[str, int],
    predictions: Mapping[str, Mapping[int, float]],
) -> Iterator[Agreement]:
    counts = {label.index: [0, 0, 0, 0] for label in labels}
    for video in both:
        for index in truths[video]:
            counts[index][0] += 1
            counts[index][1] += index in predictions[video]
        first = firsts[video]
        if first >= 0:
            counts[first][2] += 1
            counts[first][3] += first in truths[video]
    for index, (labelled, found, first, right) in counts.items():
        if labelled or first:
            yield Agreement(labels[index], labelled, found, first, right)


def as_dict(check: SegmentCheck) -> dict[str, Any]:
    """For JSON."""
    return {
        "compared": check.compared,
        "top_k": check.top_k,
        "hit_at_one": check.hit_at_one,
        "family": _agreement(check.family),
        "per_class": [_agreement(each) for each in check.per_class],
        "lowest_with_gunfire": [_disagreement(each) for each in check.lowest_with_gunfire],
        "highest_without_gunfire": [_disagreement(each) for each in check.highest_without_gunfire],
        "only_predicted": {"count": len(check.only_predicted), "ids": list(check.only_predicted[:_NAMED_IDS])},
        "only_listed": {"count": len(check.only_listed), "ids": list(check.only_listed[:_NAMED_IDS])},
    }


def _agreement(each: Agreement) -> dict[str, Any]:
    place = {} if each.label.index < 0 else {"mid": each.label.mid or None, "index": each.label.index}
    return {
        "name": each.label.name,
        **place,
        "labelled": each.labelled,
        "found": each.found,
        "recall": each.recall,
        "first": each.first,
        "first_right": each.first_right,
        "agreement_at_one": each.agreement_at_one,
    }


def _disagreement(each: Disagreement) -> dict[str, Any]:
    return {
        "video_id": each.video_id,
        "start_seconds": each.start_seconds,
        "end_seconds": each.end_seconds,
        "family_score": each.score,
        "labels": list(each.labels),
        "predicted": [{"name": name, "confidence": score} for name, score in each.predicted],
    }


def one_sided(ids: Sequence[str], where: str) -> str:
    """A sentence on the ids of one side alone; empty where there are none."""
    if not ids:
        return ""
    named = ", ".join(ids[:3])
    return f"{len(ids)} ids are in the {where} only: {named}{', ...' if len(ids) > 3 else ''}."
