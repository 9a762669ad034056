"""What was trained -> a model package with its operating point and its curve. Last stage of the recipe."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detector.embedders.compact import CompactNetwork
from detector.model import FalseAlertsSection, Model, save_package
from trainer.compact.evaluation import (
    Report,
    Scored,
    ambient_threshold,
    clip_threshold,
    report,
)
from trainer.compact.pools import FAMILY, LABELS, LOOK_ALIKES, Clip
from trainer.compact.training import HEAD, WINDOW_EXAMPLES, Trained

MODEL_NAME = "compact-gunfire"
_SOURCES = {
    "shotspotter": "ShotSpotter live-fire test, Pittsburgh 2018: FP1 to FP4 (CC BY 4.0)",
    "sesa": "Sound Events for Surveillance Applications, Zenodo 3519845: split train (CC BY 4.0)",
    "ffsl": "Free Firearm Sound Library (CC0)",
    "katsis": "Katsis et al., gunshots and backgrounds in Belize forest: split train (CC BY 4.0)",
    "kabealo": "Kabealo et al., pistol shots close to the microphone (CC BY 4.0)",
    "esc10": "ESC-10 and ESC-50 clips under CC0 or CC BY: split train",
    "esc50": "ESC-10 and ESC-50 clips under CC0 or CC BY: split train",
    "uiowa": "University of Iowa booth recordings (MIT)",
    "ambient": "ambient loops: split train (CC0, public domain, CC BY, Pixabay)",
}
_ALWAYS = (
    "sounds synthesised by trainer/compact/synthesis.py",
    "opinions of YAMNet (Google, Apache 2.0) and CED-tiny (Apache 2.0) on these as soft targets",
)
_AMBIENT_MARGIN = 0.5  # in logits: what the default threshold keeps above the loudest ambient score
_TREATED_FALSE_ALARMS = 0.02  # the share of negative dev clips that may reach it after a change of recorder


def data_names(clips: Iterable[Clip]) -> list[str]:
    """What was learnt from, for the manifest: the sources of the pool's clips, unknown ones by their folder's name."""
    sources = {clip.path.split("/")[0] for clip in clips}
    described = dict.fromkeys(text for source, text in _SOURCES.items() if source in sources)
    return [*described, *sorted(sources - _SOURCES.keys()), *_ALWAYS]


def choose_thresholds(scored: Sequence[Scored], treated: Sequence[Sequence[Scored]] = ()) -> tuple[float, float]:
    """(open, close): no more than 1 % of negative clips, and nothing in continuous ambient audio with a margin.

    Nor more than 2 % of the clips, nor anything in ambient audio, as another recorder would have kept them or with
    edges of silence and gain in them (``treated``, one list for each). Open is the strictest of these conditions; an
    open alert stays open down to half its odds.
    """
    ambient = _shifted(ambient_threshold(scored), _AMBIENT_MARGIN)
    otherwise = [max(clip_threshold(each, _TREATED_FALSE_ALARMS), ambient_threshold(each)) for each in treated]
    opened = min(0.9999, math.ceil(max(clip_threshold(scored), ambient, *otherwise) * 1e4) / 1e4)
    return opened, round(_shifted(opened, -math.log(2.0)), 4)


def _shifted(probability: float, logits: float) -> float:
    p = min(max(probability, 1e-7), 1 - 1e-7)
    return 1.0 / (1.0 + (1.0 - p) / p * math.exp(-logits))


def operating_curve(scored: Sequence[Scored], points: int = 15) -> list[dict[str, float]]:
    """Thresholds from loose to strict: recall over all positive dev recordings, false alarms in an hour of ambient.

    The false alarms are the upper end of the 95 % interval: minutes of audio without one are no proof of a quiet day.
    Where recordings share a score there are fewer points: each threshold comes once.
    """
    peaks = np.sort([s.peak for s in scored if not s.recording.positive])[::-1]
    shares = np.geomspace(0.1, 1.0 / len(peaks), points)
    found = (min(1.0, max(0.0, float(peaks[min(len(peaks) - 1, int(share * len(peaks)))]))) for share in shares)
    curve = []
    for rounded, threshold in {round(threshold, 6): threshold for threshold in found}.items():
        at = report(scored, threshold)
        recall = float(np.mean([s.peak > threshold for s in scored if s.recording.positive]))
        per_hour = at.alerts_per_hour()[2]
        curve.append(
            {
                "threshold": rounded,
                "recall": round(recall, 4),
                "false_alarms_per_hour": round(per_hour, 3),
            }
        )
    return curve


def export(
    trained: Trained,
    folder: Path,
    *,
    name: str = MODEL_NAME,
    version: str,
    command: str,
    date: str,
    data: Sequence[str],
    thresholds: tuple[float, float] = (0.5, 0.3),
    curve: Sequence[Mapping[str, float]] = (),
    false_alerts: Sequence[FalseAlertsSection] = (),
) -> Model:
    """Fold, write and self-test the package. Raises ModelError where the trained weights don't fit the network."""
    network = CompactNetwork(folded=False)
    network.load(trained.embedder)
    draft: dict[str, Any] = {
        "name": name,
        "version": version,
        "description": "Small convolutional network with an LSTM head; its score means gunfire in the newest example.",
        "license": "Apache-2.0",
        "labels": list(LABELS),
        "family": list(FAMILY),
        "look_alikes": list(LOOK_ALIKES),
        "embedder": {"kind": "compact"},
        "classifier": {"kind": "lstm", "params": dataclasses.asdict(HEAD)},
        "window": {"examples": WINDOW_EXAMPLES, "hop_seconds": 0.96},
        "decision": {"open_threshold": thresholds[0], "close_threshold": thresholds[1]},
        "operating_curve": list(curve),
        "false_alerts": [section.model_dump() for section in false_alerts],
        "training": {"command": command, "data": list(data), "date": date},
    }
    head = {name: np.ascontiguousarray(value) for name, value in trained.head.items()}
    return save_package(folder, draft, classifier_weights=head, embedder_weights=network.folded().weights())


def report_as_json(results: Mapping[str, Report]) -> str:
    """Reports by name, rounded, for people and programs."""
    content = {}
    for name, found in results.items():
        estimate, low, high = found.alerts_per_hour()
        content[name] = {
            **dataclasses.asdict(found),
            "ambient_alerts_per_hour": {"estimate": estimate, "low_95": low, "high_95": high},
        }
    return json.dumps(_rounded(content), indent=1)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
