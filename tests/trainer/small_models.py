"""Small trained models in every form, and clips of AudioSet's shape to judge them by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from detector.classifiers import build_classifier, weights
from trainer.labels import Label, LabelSet, gunfire_classes, look_alike_classes
from trainer.recipes import Recipe
from trainer.records import RecordWriter, encode_clip
from trainer.run import Best, ClassName, DataSource, Run, RunConfig
from trainer.starter_checkpoint import FLAGS_NAME, KIND_BY_MODEL

NAMES = ("Speech", "Gunshot, gunfire", "Machine gun", "Fireworks", "Thunder", "Dog", "Theremin")
"""No clip carries the last."""
LABELS = LabelSet([Label(i, f"/m/{i:03d}", name) for i, name in enumerate(NAMES)])
SMALL: dict[str, dict[str, Any]] = {
    "lstm": {"cells": 12, "layers": 1},
    "logistic": {},
    "moe": {"mixtures": 2},
    "frame_logistic": {},
    "dbof": {"clusters": 24, "hidden": 12, "iterations": 20},
    "attention_lstm": {"cells": 12, "dense": 16},
}


def params_of(kind: str, **more: Any) -> dict[str, Any]:
    return {**SMALL[kind], "classes": len(NAMES), "input_size": 128, **more}


def make_run(folder: Path, kind: str = "lstm", *, seed: int = 3, **params: Any) -> Run:
    """A run of ``trainer train`` with fresh weights."""
    every = params_of(kind, **params)
    config = RunConfig(
        recipe=Recipe(kind=kind),
        kind=kind,
        params=every,
        feature_sizes=(every["input_size"],),
        max_frames=300,
        labels=tuple(ClassName(mid=label.mid, name=label.name) for label in LABELS),
        family=gunfire_classes(LABELS),
        look_alikes=look_alike_classes(LABELS),
        training=DataSource(pattern="train/*.tfrecord", files=1, clips=9, fingerprint="f"),
        command="trainer train --seed 3",
    )
    run = Run.create(folder, config)
    run.save_best(weights(build_classifier(kind, every, seed=seed)), Best(step=11))
    return run


def make_starter_folder(folder: Path, model: str = "LstmModel", *, seed: int = 3, **params: Any) -> Path:
    """What the starter code's train.py leaves."""
    folder.mkdir(parents=True)
    kind = KIND_BY_MODEL[model]
    values = weights(build_classifier(kind, params_of(kind, **params), seed=seed))
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, value in values.items():
            tf.compat.v1.get_variable(name, initializer=value, use_resource=False)
        tf.compat.v1.get_variable("global_step", initializer=np.int64(7), use_resource=False)
        session.run(tf.compat.v1.global_variables_initializer())
        saver = tf.compat.v1.train.Saver(tf.compat.v1.global_variables())
        saver.save(session, str(folder / "model.ckpt"), global_step=7, write_meta_graph=False)
    flags = {
        "model": model,
        "feature_sizes": "128",
        "feature_names": "audio",
        "frame_features": kind not in ("logistic", "moe"),
        "label_loss": "CrossEntropyLoss",
    }
    (folder / FLAGS_NAME).write_text(json.dumps(flags))
    return folder


def write_records(path: Path, count: int = 60, *, seed: int = 0, size: int = 128, frames: int = 10) -> Path:
    """Clips with 0 to 2 labels of the first six, AudioSet's keys, times in most of them."""
    random = np.random.default_rng(seed)
    with RecordWriter(path) as writer:
        for i in range(count):
            labels = sorted(random.choice(6, size=int(random.integers(0, 3)), replace=False).tolist())
            values = random.integers(0, 256, (int(random.integers(1, frames + 1)), size), np.uint8)
            times = {} if i % 5 == 0 else {"start_seconds": 30.0, "end_seconds": 40.0}
            writer.write(encode_clip(f"aBcD_-{i:05d}", values, labels, **times))
    return path


def write_labels(path: Path) -> Path:
    """``class_labels_indices.csv`` of these classes."""
    rows = [f'{label.index},{label.mid},"{label.name}"' for label in LABELS]
    path.write_text("\n".join(["index,mid,display_name", *rows]) + "\n")
    return path


def write_ontology(path: Path) -> Path:
    """A tree above them: gunfire and look-alikes are explosions."""
    children = {"/m/boom": ["/m/001", "/m/003"], "/m/001": ["/m/002"]}
    nodes = [{"id": "/m/boom", "name": "Bangs", "child_ids": children["/m/boom"], "restrictions": ["abstract"]}]
    nodes += [
        {"id": label.mid, "name": label.name, "child_ids": children.get(label.mid, []), "restrictions": []}
        for label in LABELS
    ]
    path.write_text(json.dumps(nodes))
    return path
