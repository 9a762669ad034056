"""An evaluation for programs (strict JSON) and for people (tables of text); ``trainer.report_page`` makes the page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import IO, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.evaluate import ClassFigures, Evaluation, HardClip, LookAlike, Point, unscored_clips
from trainer.labels import Label

_SIGNIFICANT_DIGITS = 9
_DAMAGES_NAMED = 10
_CLIPS_IN_TEXT = 8
_CLASSES_IN_TEXT = 8
_TEXT_COLUMNS = 100

NO_CLIP = "no clip is labelled with it"
ALL_CLIPS = "every clip is labelled with it"
PERFECT = "the ranking is perfect (AUC 1), or perfectly wrong (AUC 0)"


def as_dict(evaluation: Evaluation) -> dict[str, Any]:
    """Everything but the clips, with None where there is no number, and then a ``reason`` beside it."""
    e, g = evaluation, evaluation.gunfire
    content: dict[str, Any] = {
        "hit_at_one": e.epoch.hit_at_one,
        "perr": e.epoch.perr,
        "gap": e.epoch.gap,
        "map": e.map,
        "map_top_k": e.epoch.map,
        "top_k": e.top_k,
        "gunfire_family_ap": g.family.ap,
        "avg_loss": e.epoch.loss,
        "label_loss": e.label_loss,
        "auc": e.auc,
        "d_prime": e.d_prime,
        "classes": len(e.per_class),
        "classes_measured": len(e.per_class) - len(e.absent),
        "classes_without_clips": [_label(label) for label in e.absent],
        "per_class": [_class(figures) for figures in e.per_class],
        "gunfire": _gunfire(evaluation),
        "data": {
            "pattern": e.pattern,
            "files": e.clips.report.files,
            "clips": len(e.clips),
            "damaged": len(e.clips.report.damages),
            "damages": [str(damage) for damage in e.clips.report.damages[:_DAMAGES_NAMED]],
            "unscored": len(e.unscored),
            "unscored_clips": [e.clips.video_id(i) for i in e.unscored[:_DAMAGES_NAMED]],
        },
        "model": {
            "source": e.trained.name,
            "form": e.trained.form,
            "kind": e.trained.kind,
            "params": e.trained.params,
            "sha256": e.trained.sha256,
            "steps": e.trained.steps,
        },
    }
    if not g.family.positives:
        content["reason"] = "no clip is labelled with gunfire"
    cleaned: dict[str, Any] = _without_nan(content)
    return cleaned


def as_json(evaluation: Evaluation) -> str:
    """``as_dict`` as strict JSON (no NaN, no Infinity), with a newline at its end."""
    return json.dumps(as_dict(evaluation), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _gunfire(evaluation: Evaluation) -> dict[str, Any]:
    g = evaluation.gunfire
    positives, clips = g.curve.positives, len(g.scores)
    found: dict[str, Any] = {
        "family_ap": g.family.ap,
        "family_ap_95": list(g.ap_interval),
        "auc": g.family.auc,
        "d_prime": g.family.d_prime,
        "positives": positives,
        "negatives": clips - positives,
        "chance_ap": positives / clips,
        "family": [_class(figures) for figures in g.members],
        "recall_at_false_positive_rate": [_point(p) for p in g.points if not math.isnan(p.max_false_positive_rate)],
        "package_threshold": next((_point(p) for p in g.points if math.isnan(p.max_false_positive_rate)), None),
        "look_alikes": [_look_alike(alike, g.points) for alike in g.look_alikes],
        "false_positives_by_class": [
            {**_label(each.label), "above": each.above, "clips": each.clips} for each in g.confused
        ],
        "calibration": None,
        "highest_without_gunfire": [_hard(clip) for clip in g.highest_without_gunfire],
        "lowest_with_gunfire": [_hard(clip) for clip in g.lowest_with_gunfire],
    }
    if not positives or positives == clips:
        found["reason"] = "no clip is labelled with gunfire" if not positives else "every clip is labelled with gunfire"
    c = g.calibration
    if c is None:
        found["calibration_reason"] = "scores are no probabilities: some lie outside 0 to 1"
    else:
        found["calibration"] = {
            "expected_error": c.expected_error,
            "brier": c.brier,
            "bins": [
                {
                    "from": float(c.edges[i]),
                    "to": float(c.edges[i + 1]),
                    "clips": int(c.counts[i]),
                    "mean_score": float(c.mean_scores[i]),
                    "positive_rate": float(c.positive_rates[i]),
                }
                for i in range(len(c.counts))
            ],
        }
    return found


def _label(label: Label) -> dict[str, Any]:
    return {"name": label.name, "mid": label.mid or None, "index": label.index}


def _class(figures: ClassFigures) -> dict[str, Any]:
    content: dict[str, Any] = {
        **_label(figures.label),
        "positives": figures.positives,
        "ap": figures.ap,
        "auc": figures.auc,
        "d_prime": figures.d_prime,
    }
    if not figures.positives:
        content["reason"] = NO_CLIP
    elif math.isnan(figures.auc):
        content["reason"] = ALL_CLIPS
    elif math.isinf(figures.d_prime):
        content["reason"] = PERFECT
    return content


def _point(point: Point) -> dict[str, Any]:
    content: dict[str, Any] = {
        "max_false_positive_rate": point.max_false_positive_rate,
        "threshold": point.threshold,
        "recall": point.recall,
        "false_positive_rate": point.false_positive_rate,
        "precision": point.precision,
    }
    if math.isinf(point.threshold):
        content["reason"] = "the highest score is a false positive too many"
    return content


def _look_alike(alike: LookAlike, points: Sequence[Point]) -> dict[str, Any]:
    content: dict[str, Any] = {
        **_label(alike.label),
        "clips": alike.clips,
        "auc": alike.auc,
        "confusions": [
            {"rule": point.rule, "threshold": point.threshold, "above": share}
            for point, share in zip(points, alike.above, strict=True)
        ],
    }
    if math.isnan(alike.auc):
        content["reason"] = "no clip carries it without gunfire" if not alike.clips else "no clip carries gunfire"
    return content


def _hard(clip: HardClip) -> dict[str, Any]:
    return {
        "video_id": clip.video_id,
        "start_seconds": clip.start_seconds,
        "end_seconds": clip.end_seconds,
        "family_score": clip.score,
        "labels": list(clip.labels),
        "heard": [{"name": name, "score": score} for name, score in clip.heard],
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value


# --- text ---------------------------------------------------------------------------------------------------------


def number(value: float, digits: int = 3) -> str:
    """A figure for people; a dash where there is none."""
    if math.isnan(value):
        return "–"
    return ("∞" if value > 0 else "-∞") if math.isinf(value) else f"{value:.{digits}f}"


def percent(share: float, digits: int = 1) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.{digits}f} %"


def threshold_text(threshold: float) -> str:
    return "none" if math.isinf(threshold) else f"{threshold:.4g}"


def model_text(evaluation: Evaluation) -> str:
    """What was evaluated on what, in a line."""
    t, report = evaluation.trained, evaluation.clips.report
    steps = "" if t.steps is None else f", {t.steps} steps"
    damaged = f", {len(report.damages)} damaged records left out" if report.damages else ""
    return f"{t.name} ({t.kind}{steps}) on {len(evaluation.clips)} clips of {report.files} files{damaged}"


def print_text(evaluation: Evaluation, file: IO[str]) -> None:
    """Compact tables, for a terminal or a file."""
    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        console.width = _TEXT_COLUMNS
    e, g = evaluation, evaluation.gunfire
    console.print(Text(model_text(e), style="bold"))
    for note in (unscored_clips(e), _absent_text(e)):
        if note:
            console.print(Text(note))
    low, high = g.ap_interval
    table = Table("family AP", "mAP", "AUC", "d'", "Hit@1", "PERR", "GAP", f"mAP@{e.top_k}", "loss", box=SIMPLE_HEAD)
    figures = (e.map, e.auc, e.d_prime, e.epoch.hit_at_one, e.epoch.perr, e.epoch.gap, e.epoch.map, e.epoch.loss)
    table.add_row(f"{number(g.family.ap)} ({number(low)} to {number(high)})", *(number(value) for value in figures))
    console.print(table)
    console.print(_classes_table("Gunfire", [g.family, *g.members]))
    table = Table(
        "Threshold by", "score", "recall", "false positives", "precision", box=SIMPLE_HEAD, title_justify="left"
    )
    for p in g.points:
        rate = percent(p.false_positive_rate, 2)
        table.add_row(p.rule, threshold_text(p.threshold), percent(p.recall), rate, percent(p.precision))
    console.print(table)
    if g.look_alikes:
        shown = [i for i, p in enumerate(g.points) if p.max_false_positive_rate in (0.01, 0.05)]
        heads = [f"above {threshold_text(g.points[i].threshold)}" for i in shown]
        table = Table("Look-alike (without gunfire)", "clips", "AUC", *heads, box=SIMPLE_HEAD)
        for alike in g.look_alikes:
            shares = (percent(alike.above[i]) for i in shown)
            table.add_row(Text(alike.label.name), str(alike.clips), number(alike.auc), *shares)
        console.print(table)
    if g.confused:
        named = ", ".join(f"{each.label.name} {each.above}" for each in g.confused[:_CLASSES_IN_TEXT])
        console.print(Text(f"Classes among the false positives at 1 %: {named}."))
    if g.calibration is not None:
        c = g.calibration
        console.print(f"Calibration: expected error {number(c.expected_error, 4)}, Brier score {number(c.brier, 4)}.")
    for title, clips in (
        ("Highest-scored without gunfire", g.highest_without_gunfire),
        ("Lowest-scored gunfire", g.lowest_with_gunfire),
    ):
        if clips:
            console.print(_clips_table(title, clips[:_CLIPS_IN_TEXT]))
    ranked = sorted((f for f in e.per_class if f.positives), key=lambda f: -f.ap)
    if len(ranked) > 2 * _CLASSES_IN_TEXT:
        console.print(_classes_table("Best classes", ranked[:_CLASSES_IN_TEXT]))
        console.print(_classes_table("Worst classes", ranked[-_CLASSES_IN_TEXT:]))
    elif ranked:
        console.print(_classes_table("Classes", ranked))


def _absent_text(evaluation: Evaluation) -> str:
    absent = evaluation.absent
    if not absent:
        return ""
    named = ", ".join(label.name for label in absent[:_CLASSES_IN_TEXT])
    more = f" and {len(absent) - _CLASSES_IN_TEXT} more" if len(absent) > _CLASSES_IN_TEXT else ""
    return f"{len(absent)} classes occur in no clip and are in no mean: {named}{more}."


def _classes_table(title: str, rows: Sequence[ClassFigures]) -> Table:
    table = Table(title, "clips", "AP", "AUC", "d'", box=SIMPLE_HEAD)
    for f in rows:
        table.add_row(Text(f.label.name), str(f.positives), number(f.ap), number(f.auc), number(f.d_prime, 2))
    return table


def _clips_table(title: str, clips: Sequence[HardClip]) -> Table:
    table = Table(title, "from", "score", "labels", "heard", box=SIMPLE_HEAD)
    for clip in clips:
        start = "–" if math.isnan(clip.start_seconds) else f"{clip.start_seconds:g} s"
        heard = ", ".join(f"{name} {score:.2f}" for name, score in clip.heard[:2])
        table.add_row(
            Text(clip.video_id), start, f"{clip.score:.3g}", Text(", ".join(clip.labels) or "none"), Text(heard)
        )
    return table
