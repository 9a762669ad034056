"""A train directory of the YouTube-8M starter code -> our classifier with its weights, and the optimiser's state.

The starter code writes ``model_flags.json`` (which model, which features) and V2 checkpoints. Sizes are not in the
flags; they follow from the variables' shapes. What can't follow from them (DBoF's pooling, activation and sampling) has
the starter code's default unless given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from detector.checkpoint import check_tensors, read_all_variables
from detector.classifiers import Classifier, assign, build_classifier, shapes
from detector.errors import ModelError

FLAGS_NAME = "model_flags.json"
KIND_BY_MODEL = {
    "LogisticModel": "logistic",
    "MoeModel": "moe",
    "FrameLevelLogisticModel": "frame_logistic",
    "DbofModel": "dbof",
    "LstmModel": "lstm",
}
"""The starter code's ``--model`` -> our classifier kind."""

Shapes = Mapping[str, tuple[int, ...]]

_MAX_FLAGS_BYTES = 1 << 20
_CELL = "tower/rnn/multi_rnn_cell/cell_{}/basic_lstm_cell/"
_EXPORTED = ("inference_model.index", "inference_model/inference_model.index")


@dataclass(frozen=True, slots=True, eq=False)
class StarterModel:
    """What a train directory holds.

    Attributes:
        kind, params: as a package's manifest names them.
        feature_names, feature_sizes: columns of the input, in their order.
        frame_features: whether it was trained on frames, not on one vector a clip.
        label_loss: the starter code's class name.
        global_step: steps trained; 0 where the checkpoint doesn't say.
        checkpoint: prefix of the files read.
        optimiser: the other variables by the starter code's names (Adam slots, powers, global_step).
    """

    classifier: Classifier
    kind: str
    params: dict[str, Any]
    feature_names: tuple[str, ...]
    feature_sizes: tuple[int, ...]
    frame_features: bool
    label_loss: str
    global_step: int
    checkpoint: Path
    optimiser: dict[str, npt.NDArray[np.generic]]


def is_starter_folder(folder: Path) -> bool:
    """Whether ``folder`` looks like the starter code's: its flags file is there."""
    return (folder / FLAGS_NAME).is_file()


def load_starter_model(
    folder: Path, *, params: Mapping[str, Any] | None = None, checkpoint: Path | None = None
) -> StarterModel:
    """Read a train directory.

    Args:
        folder: holds ``model_flags.json`` and one or more checkpoints; or what ``--output_model_tgz`` unpacks to.
        params: those that shapes don't tell, where they differ from the starter code's defaults, for example
            ``{"activation": "relu6"}``.
        checkpoint: prefix of the one to read; None = the one that file ``checkpoint`` names, else that of most steps.

    Raises ModelError for a folder that is missing, foreign or damaged, and for params that contradict the weights.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder; give the starter code's train directory.")
    flags = _read_flags(folder / FLAGS_NAME)
    prefix = checkpoint if checkpoint is not None else _newest_checkpoint(folder)
    stored = read_all_variables(prefix)
    source = f"checkpoint {prefix}"
    kind = KIND_BY_MODEL[flags.model]
    found = params_from_shapes(kind, {name: value.shape for name, value in stored.items()}, source)
    given = dict(params or {})
    for name in sorted(set(given) & set(found)):
        if given[name] != found[name]:
            raise ModelError(f"Parameter {name} is given as {given[name]!r}; the {source} holds {found[name]!r}.")
    if sum(flags.feature_sizes) != found["input_size"]:
        raise ModelError(
            f"{folder / FLAGS_NAME} says feature_sizes {list(flags.feature_sizes)}; the {source} takes "
            f"{found['input_size']} values a row. Flags and checkpoint are of two models."
        )
    every = {**found, **given}
    classifier = build_classifier(kind, every)
    needed = shapes(classifier)
    check_tensors(stored, needed, source, allow_extra=True)
    assign(classifier, {name: np.asarray(stored[name], np.float32) for name in needed}, source)
    rest = {name: value for name, value in stored.items() if name not in needed}
    return StarterModel(
        classifier=classifier,
        kind=kind,
        params=every,
        feature_names=flags.feature_names,
        feature_sizes=flags.feature_sizes,
        frame_features=flags.frame_features,
        label_loss=flags.label_loss,
        global_step=int(rest.get("global_step", np.int64(0))),
        checkpoint=prefix,
        optimiser=rest,
    )


def params_from_shapes(kind: str, found: Shapes, source: str) -> dict[str, Any]:
    """Sizes of a classifier of this kind from its variables' shapes; other variables are left alone.

    Raises ModelError where they are those of another kind.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in found or len(found[name]) != rank or 0 in found[name]:
            what = f"has shape {tuple(found[name])}" if name in found else "is missing"
            near = ", ".join(sorted(found)[:3]) or "none"
            raise ModelError(f"The {source} holds no {kind} model: {name} {what}. Its variables begin with {near}.")
        return tuple(found[name])

    def final() -> dict[str, Any]:
        if "tower/fully_connected/weights" in found:
            return {"final": "logistic", "classes": shape("tower/fully_connected/weights", 2)[1]}
        gates, experts = shape("tower/gates/weights", 2)[1], shape("tower/experts/weights", 2)[1]
        classes = gates - experts
        if classes < 1 or experts % classes:
            raise ModelError(f"The {source} holds {gates} gates and {experts} experts, which fit no number of classes.")
        return {"final": "moe", "classes": classes, "mixtures": experts // classes}

    if kind in ("logistic", "frame_logistic"):
        size, classes = shape("tower/fully_connected/weights", 2)
        return {"input_size": size, "classes": classes}
    if kind == "moe":
        found_final = final()
        del found_final["final"]
        return {"input_size": shape("tower/gates/weights", 2)[0], **found_final}
    if kind == "lstm":
        cells = shape(_CELL.format(0) + "bias", 1)[0] // 4
        layers = 1
        while _CELL.format(layers) + "kernel" in found:
            layers += 1
        input_size = shape(_CELL.format(0) + "kernel", 2)[0] - cells
        return {"input_size": input_size, "cells": cells, "layers": layers, **final()}
    if kind == "dbof":
        input_size, clusters = shape("tower/cluster_weights", 2)
        return {
            "input_size": input_size,
            "clusters": clusters,
            "hidden": shape("tower/hidden1_weights", 2)[1],
            "batch_norm": "tower/cluster_bn/gamma" in found,
            **final(),
        }
    raise ModelError(f"Sizes of a classifier of kind {kind!r} can't be told from shapes.")


@dataclass(frozen=True, slots=True)
class _Flags:
    model: str
    feature_names: tuple[str, ...]
    feature_sizes: tuple[int, ...]
    frame_features: bool
    label_loss: str


def _read_flags(path: Path) -> _Flags:
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_MAX_FLAGS_BYTES))
    except FileNotFoundError:
        raise ModelError(
            f"{path} does not exist: {path.parent} is no train directory of the starter code, or its training never "
            "wrote the flags."
        ) from None
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ModelError(f"{path} is no JSON: {error}. Get the train directory again.") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no flags; a JSON object is expected.")
    model = content.get("model")
    if not isinstance(model, str) or model not in KIND_BY_MODEL:
        raise ModelError(f"{path} names model {model!r}; known are {', '.join(KIND_BY_MODEL)}.")
    names, sizes = (_listed(content, key, path) for key in ("feature_names", "feature_sizes"))
    try:
        numbers = tuple(int(size) for size in sizes)
    except ValueError:
        raise ModelError(f"{path} has feature_sizes {content['feature_sizes']!r}; whole numbers are needed.") from None
    if len(names) != len(numbers) or min(numbers) < 1:
        raise ModelError(f"{path} has feature_names {list(names)} with feature_sizes {list(sizes)}; they don't match.")
    frame_features = content.get("frame_features")
    if not isinstance(frame_features, bool):
        raise ModelError(f"{path} has frame_features {frame_features!r}; true or false is needed.")
    return _Flags(model, names, numbers, frame_features, str(content.get("label_loss", "CrossEntropyLoss")))


def _listed(content: Mapping[str, Any], key: str, path: Path) -> tuple[str, ...]:
    value = content.get(key)
    parts = tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else ()
    if not parts or "" in parts:
        raise ModelError(f"{path} has {key} {value!r}; text with commas between names is needed.")
    return parts


def _newest_checkpoint(folder: Path) -> Path:
    """Prefix. Paths in the file ``checkpoint`` are those of the machine that trained: only the name counts."""
    state = folder / "checkpoint"
    if state.is_file():
        text = state.read_text("utf-8", errors="replace")
        named = re.search(r'^model_checkpoint_path:\s*"([^"\n]+)"', text, re.MULTILINE)
        if named:
            prefix = folder / Path(named[1]).name
            if prefix.with_name(prefix.name + ".index").is_file():
                return prefix
    steps = {
        int(found[1]): path
        for path in folder.glob("*.index")
        if (found := re.fullmatch(r"model\.ckpt-(\d+)\.index", path.name))
    }
    if steps:
        return steps[max(steps)].with_suffix("")
    for name in _EXPORTED:
        if (folder / name).is_file():
            return (folder / name).with_suffix("")
    raise ModelError(f"{folder} holds no checkpoint: no model.ckpt-<step>.index, no inference_model.index.")
