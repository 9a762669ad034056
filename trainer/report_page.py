"""An evaluation as one self-contained page: no other file, no address is loaded, light and dark, made to be printed."""

from __future__ import annotations

import math
import re
from typing import Any

import jinja2

from trainer.evaluate import ClassFigures, Evaluation, HardClip, unscored_clips
from trainer.report import NO_CLIP, model_text, number, percent, threshold_text
from trainer.report_plots import plots

_YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")
_TEMPLATE = "report.html"
_LOSSES = {"CrossEntropyLoss": "cross entropy", "HingeLoss": "hinge", "SoftmaxLoss": "softmax"}


def as_html(evaluation: Evaluation) -> str:
    """The whole page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("trainer", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, percent=percent, threshold=threshold_text)
    e, g = evaluation, evaluation.gunfire
    return environment.get_template(_TEMPLATE).render(
        e=e,
        g=g,
        t=e.trained,
        summary=model_text(e),
        figures=_figures(e),
        plots=plots(e),
        rows=[_row(figures, e) for figures in sorted(e.per_class, key=_by_ap)],
        family_rows=[_row(g.family, e), *(_row(figures, e) for figures in g.members)],
        false_positives=[_clip(clip) for clip in g.highest_without_gunfire],
        missed=[_clip(clip) for clip in g.lowest_with_gunfire],
        confused=g.confused[:12],
        notes=_notes(e),
    )


def _figures(e: Evaluation) -> list[dict[str, str]]:
    """Headline figures: value, name, and what it means."""
    g = e.gunfire
    low, high = g.ap_interval
    at = next(p for p in g.points if p.max_false_positive_rate == 0.01)
    k = e.top_k
    return [
        {
            "value": number(g.family.ap),
            "name": "gunfire family AP",
            "note": "" if math.isnan(low) else f"95 %: {number(low)} to {number(high)}",
        },
        {"value": percent(at.recall), "name": "gunfire heard", "note": "at 1 % false positives"},
        {"value": number(e.map), "name": "mAP", "note": f"mean of {len(e.per_class) - len(e.absent)} classes"},
        {"value": number(e.auc), "name": "AUC", "note": f"mean; d′ {number(e.d_prime, 2)}"},
        {"value": number(e.epoch.hit_at_one), "name": "Hit@1", "note": "best class is a label"},
        {"value": number(e.epoch.perr), "name": "PERR", "note": "precision at equal recall"},
        {"value": number(e.epoch.gap), "name": "GAP", "note": f"global AP of {k} a clip"},
        {"value": number(e.epoch.loss, 2), "name": "loss", "note": _LOSSES[e.label_loss]},
    ]


def _notes(e: Evaluation) -> list[str]:
    notes = []
    damages = e.clips.report.damages
    if damages:
        notes.append(f"{len(damages)} damaged records are left out, the first: {damages[0]}.")
    if e.unscored:
        notes.append(unscored_clips(e))
    if e.absent:
        names = ", ".join(label.name for label in e.absent[:12])
        more = f" and {len(e.absent) - 12} more" if len(e.absent) > 12 else ""
        notes.append(f"{len(e.absent)} classes occur in no clip and are in no mean: {names}{more}.")
    if not e.gunfire.family.positives:
        notes.append("No clip is labelled with gunfire: nothing can be said of it here.")
    return notes


def _by_ap(figures: ClassFigures) -> tuple[bool, float, int]:
    return math.isnan(figures.ap), 0.0 if math.isnan(figures.ap) else -figures.ap, figures.label.index


def _row(figures: ClassFigures, e: Evaluation) -> dict[str, Any]:
    index = figures.label.index
    in_family = index < 0 or index in e.classes.family
    return {
        "label": figures.label,
        "group": "gunfire" if in_family else "look-alike" if index in e.classes.look_alikes else "",
        "positives": figures.positives,
        "values": [("ap", figures.ap, 3), ("auc", figures.auc, 3), ("dprime", figures.d_prime, 2)],
        "share": 0.0 if math.isnan(figures.ap) else figures.ap,
        "reason": "" if figures.positives else NO_CLIP,
    }


def _clip(clip: HardClip) -> dict[str, Any]:
    known = not math.isnan(clip.start_seconds)
    linked = known and _YOUTUBE_ID.fullmatch(clip.video_id)
    return {
        "clip": clip,
        "url": f"https://youtu.be/{clip.video_id}?t={int(clip.start_seconds)}" if linked else "",
        "time": f"{_clock(clip.start_seconds)} to {_clock(clip.end_seconds)}" if known else "",
    }


def _clock(seconds: float) -> str:
    if math.isnan(seconds):
        return "?"
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
