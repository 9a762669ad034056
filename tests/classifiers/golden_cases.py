"""Golden cases of the YouTube-8M models, and a classifier of ours with a case's flags and weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from detector.classifiers import Classifier, assign, build_classifier
from detector.embedders.postprocess import dequantise
from trainer.starter_checkpoint import KIND_BY_MODEL, params_from_shapes

Case = dict[str, Any]


def cases(path: Path) -> Iterator[tuple[str, Case]]:
    """Every ``<case>/<key>`` of the archive; ``w`` holds the weights, ``config`` the flags."""
    found: dict[str, Case] = {}
    with np.load(path) as archive:
        for key in archive.files:
            name, _, rest = key.partition("/")
            case = found.setdefault(name, {"w": {}, "config": {}})
            if rest.startswith("w/"):
                case["w"][rest[2:]] = archive[key]
            else:
                case[rest] = json.loads(str(archive[key])) if rest == "config" else archive[key]
    assert found, f"{path} holds no case"
    yield from found.items()


def built(case: Case, kind: str | None = None) -> Classifier:
    """With the case's weights."""
    flags = case["config"]
    if kind is None:
        kind = KIND_BY_MODEL[flags["model"]]
    params = params_from_shapes(kind, {name: value.shape for name, value in case["w"].items()}, "golden case")
    for flag, name in (
        ("iterations", "iterations"),
        ("sample_random_frames", "random_frames"),
        ("dbof_pooling_method", "pooling"),
        ("dbof_activation", "activation"),
    ):
        if kind == "dbof" and flag in flags:
            params[name] = flags[flag]
    classifier = build_classifier(kind, params)
    assign(classifier, case["w"])
    return classifier


def features(case: Case) -> np.ndarray:
    """``(B, T, D)`` or ``(B, D)`` float32."""
    if "x_raw" in case:
        return case["x_raw"]
    x = dequantise(case["x_uint8"])
    x[np.arange(x.shape[1])[None, :] >= case["num_frames"][:, None]] = 0.0
    return x
