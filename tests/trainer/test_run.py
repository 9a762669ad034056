"""A run's folder: whole files or none, servable at any time, and the same run or another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detector.classifiers import build_classifier, weights
from detector.errors import ConfigError, DataError, ModelError
from trainer.recipes import RECOMMENDED, REFERENCE, Recipe, recipe_named
from trainer.run import AVERAGE_SUFFIX, Best, Checkpoint, ClassName, DataSource, Run, RunConfig, write_whole

PARAMS = {"input_size": 4, "classes": 3}


def config(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "recipe": REFERENCE,
        "kind": "frame_logistic",
        "params": PARAMS,
        "feature_sizes": (4,),
        "max_frames": 10,
        "labels": tuple(ClassName(name=name) for name in ("a", "b", "c")),
        "training": DataSource(pattern="x/*.tfrecord", files=1, clips=5, fingerprint="f"),
    }
    return RunConfig(**{**values, **changes})


def tensors(seed: int) -> dict[str, np.ndarray]:
    return weights(build_classifier("frame_logistic", PARAMS, seed=seed))


def checkpoint(step: int, seed: int = 0) -> Checkpoint:
    return Checkpoint(step, {**tensors(seed), "global_step": np.int64(step)}, {"best": None, "sums": [0.1, 1 / 3, 2]})


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", config(family=(1,), seed=7))
    run.save_checkpoint(checkpoint(12))
    again = Run.open(tmp_path / "run")
    assert again.config == run.config
    assert again.config.label_set.names == ("a", "b", "c")
    assert again.config.feature_spec.size == 4
    found = again.load_checkpoint()
    assert found is not None
    assert found.step == 12
    assert found.progress == {"best": None, "sums": [0.1, 1 / 3, 2]}
    assert found.tensors["global_step"].shape == ()
    assert all(np.array_equal(found.tensors[name], value) for name, value in checkpoint(12).tensors.items())


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run = Run.create(tmp_path, config())
    for step in (5, 20, 100, 3000):
        run.save_checkpoint(checkpoint(step))
    assert [step for step, _ in run.checkpoint_paths()] == [100, 3000]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, caplog: Any) -> None:
    run = Run.create(tmp_path, config())
    run.save_checkpoint(checkpoint(1))
    newest = run.save_checkpoint(checkpoint(2))
    newest.write_bytes(newest.read_bytes()[:-7])
    found = run.load_checkpoint()
    assert found is not None
    assert found.step == 1
    assert "step-000000002" in caplog.text
    for _, path in run.checkpoint_paths():
        path.write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"No checkpoint in .* can be read"):
        run.load_checkpoint()


def test_what_is_served_is_the_best_else_the_latest_else_a_clear_refusal(tmp_path: Path) -> None:
    run = Run.create(tmp_path, config())
    with pytest.raises(ModelError, match="holds no weights yet"):
        run.classifier()
    run.save_checkpoint(checkpoint(3, seed=3))
    served, step = run.weights("best")
    assert step == 3
    assert all(np.array_equal(served[name], value) for name, value in tensors(3).items())
    run.save_best(tensors(2), Best(step=2, metric="map", metrics={"map": 0.5, "gap": None}))
    assert run.weights("best")[1] == 2
    assert run.weights("latest")[1] == 3
    assert all(np.array_equal(value, tensors(2)[name]) for name, value in weights(run.classifier()).items())
    assert run.best() == Best(step=2, metric="map", metrics={"map": 0.5, "gap": None})
    assert json.loads((tmp_path / "best.json").read_text())["metrics"] == {"map": 0.5, "gap": None}


def test_averages_are_served_before_weights(tmp_path: Path) -> None:
    run = Run.create(tmp_path, config())
    averages = {name + AVERAGE_SUFFIX: value for name, value in tensors(9).items()}
    run.save_checkpoint(Checkpoint(1, {**tensors(1), **averages}, {}))
    assert all(np.array_equal(value, tensors(9)[name]) for name, value in run.weights("latest")[0].items())


def test_another_run_is_told_from_the_same_one() -> None:
    one = config()
    longer = REFERENCE.with_changes({"num_epochs": 99, "patience": 3})
    moved = DataSource(pattern="elsewhere", files=2, clips=5, fingerprint="f")
    assert one.differences(config(recipe=longer, training=moved, command="x")) == []
    faster = REFERENCE.with_changes({"base_learning_rate": 0.5})
    assert one.differences(config(recipe=faster)) == ["base_learning_rate is 0.5, it was 0.01"]
    other = DataSource(pattern="x", files=1, clips=5, fingerprint="g")
    assert one.differences(config(training=other)) == ['training is "g", it was "f"']
    cosine = REFERENCE.with_changes({"learning_rate_schedule": "cosine"})
    assert config(recipe=cosine).differences(config(recipe=cosine.with_changes({"num_epochs": 99}))) == [
        "num_epochs is 99.0, it was 5.0"
    ]
    assert config(recipe=cosine).differences(one) == ['learning_rate_schedule is "stairs", it was "cosine"']
    assert one.differences(config(recipe=cosine)) == ['learning_rate_schedule is "cosine", it was "stairs"']


def test_a_difference_is_named_however_long_what_it_stands_in() -> None:
    names = [f"a rather long name {i}" for i in range(9)]
    long: dict[str, Any] = {
        "labels": tuple(ClassName(name=name) for name in names),
        "params": {**PARAMS, "cells": 8, "x" * 80: 1},
    }
    other = {**long, "params": {**long["params"], "cells": 9, "layers": 1}}
    assert config(**long).differences(config(**other)) == [
        "params.cells is 9, it was 8",
        "params.layers is 1, it was left out",
    ]
    names[7] = "Rifle"
    renamed = config(**{**long, "labels": tuple(ClassName(name=name) for name in names)})
    assert config(**long).differences(renamed) == ['labels[7].name is "Rifle", it was "a rather long name 7"']
    fewer = config(**{**long, "labels": long["labels"][:5]})
    assert config(**long).differences(fewer) == ["labels has 5 entries, it had 9"]


def test_what_an_older_version_did_not_write_is_no_difference(tmp_path: Path) -> None:
    implying = REFERENCE.with_changes({"imply_family": True})
    run = Run.create(tmp_path, config(recipe=implying, general=1, label_quality_fingerprint="q"))
    assert run.config.differences(config(recipe=implying, general=0, label_quality_fingerprint="q")) == [
        "general is 0, it was 1"
    ]
    written = json.loads((tmp_path / "run.json").read_text())
    del written["general"], written["label_quality_fingerprint"]
    (tmp_path / "run.json").write_text(json.dumps(written))
    assert Run.open(tmp_path).config.differences(run.config) == []


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no run\.json"):
        Run.open(tmp_path)
    (tmp_path / "run.json").write_text('{"version": 2}')
    with pytest.raises(ModelError, match="damaged or of another version"):
        Run.open(tmp_path)


def test_a_disk_that_refuses_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"before")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.run.os.fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        write_whole(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_clearing_a_run_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    run = Run.create(tmp_path, config())
    run.save_checkpoint(checkpoint(1))
    run.save_best(tensors(0), Best(step=1))
    (tmp_path / "notes.txt").write_text("mine")
    run.clear()
    assert run.checkpoint_paths() == []
    assert run.best() is None
    assert (tmp_path / "notes.txt").read_text() == "mine"


# --- recipes ---


def test_recipes_by_name() -> None:
    assert recipe_named("reference") is REFERENCE
    assert recipe_named("recommended") is RECOMMENDED
    with pytest.raises(ConfigError, match="there are reference, recommended"):
        recipe_named("best")


def test_reference_is_the_starter_codes() -> None:
    assert REFERENCE.batch_size == 1024
    assert REFERENCE.base_learning_rate == 0.01
    assert (REFERENCE.learning_rate_decay, REFERENCE.learning_rate_decay_examples) == (0.95, 4_000_000)
    assert (REFERENCE.num_epochs, REFERENCE.max_steps, REFERENCE.clip_gradient_norm) == (5, None, 1.0)


def test_values_as_texts_and_another_kind_drops_params() -> None:
    recipe = Recipe(kind="lstm", params={"cells": 8})
    assert recipe.with_texts({"params.layers": "1", "optimizer": "AdamW"}).params == {"cells": 8, "layers": 1}
    assert recipe.with_changes({"kind": "moe", "params": {"mixtures": 4}}).params == {"mixtures": 4}
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"base_learnin_rate": "1"}, "did you mean base_learning_rate"),
        ({"batch_size": "0"}, "batch_size 0: .*greater than or equal to 1"),
        ({"batch_size": "many"}, "batch_size 'many'"),
        ({"base_learning_rate": "NaN"}, "base_learning_rate nan"),
        ({"params": "3"}, "params 3: names and values are needed"),
        ({"params": "3", "params.cells": "3"}, "params 3: names and values are needed"),
        ({"num_epochs": "null"}, "training would never end"),
        ({"weight_decay": "0.1", "optimizer": "Adam"}, "needs optimizer AdamW"),
    ],
)
def test_recipes_that_can_not_be(texts: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        REFERENCE.with_texts(texts)
