"""A work folder's files that are cut short, or hold something else, are named with what to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from detector.errors import ConfigError, DataError, ModelError
from trainer.compact.dataset import DataPlan, Shard, load_data, make_shards, save_arrays, teach_shards
from trainer.compact.training import Trained, _keep, _restore


def _cut_short(path: Path, kept: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])


@pytest.fixture
def plan(tmp_path: Path) -> DataPlan:
    """Two shards and what teachers said, in shape alone."""
    made = DataPlan(tmp_path / "pool", tmp_path / "data", 251, 5)
    for shard in made.shards():
        values = np.zeros((shard.count, 1), np.uint8)
        save_arrays(shard.path, {"pcm": values, "targets": values, "weights": values})
        save_arrays(shard.taught_path, {"log_mel": values, "yamnet_logits": values, "yamnet_embeddings": values})
    return made


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_shard_cut_short_is_named(plan: DataPlan, taught: bool, kept: float) -> None:
    shard = plan.shards()[1]
    path, command = (shard.taught_path, "teach") if taught else (shard.path, "synthesise")
    _cut_short(path, kept)
    with pytest.raises(DataError, match=rf"{path.name} can't be read .*delete it and run `trainer compact {command}`"):
        load_data(plan)
    if not taught:
        shard.taught_path.unlink()
        with pytest.raises(DataError, match=path.name):
            list(teach_shards(plan, SimpleNamespace()))  # type: ignore[arg-type]


def test_a_shard_of_another_number_of_scenes_is_named(plan: DataPlan) -> None:
    with pytest.raises(ConfigError, match=r"mixed5_00001\.npz holds targets of shape \(1, 1\).* 5 scenes.*--work"):
        load_data(replace(plan, scenes=255))
    plan.shards()[1].taught_path.unlink()
    with pytest.raises(ConfigError, match=r"mixed5_00001\.npz holds pcm"):
        list(teach_shards(replace(plan, scenes=255), SimpleNamespace()))  # type: ignore[arg-type]


def test_progress_counts_scenes(plan: DataPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(plan: DataPlan, shard: Shard) -> None:
        shard.path.touch()

    monkeypatch.setattr("trainer.compact.dataset.make_shard", touch)
    assert len(plan) == 251
    assert list(make_shards(plan, processes=1)) == [251]
    for shard in plan.shards():
        shard.path.unlink()
    assert list(make_shards(plan, processes=1)) == [0, 250, 251]


def test_trained_weights_cut_short_are_named(tmp_path: Path) -> None:
    path = tmp_path / "work" / "first.npz"
    Trained({"k": np.zeros(9, np.float32)}, {}, {}).save(path)
    assert list(Trained.load(path).embedder) == ["k"]
    _cut_short(path)
    with pytest.raises(DataError, match=r"first\.npz can't be read .*`trainer compact train` again"):
        Trained.load(path)
    save_arrays(path, {"pcm": np.zeros(3)})
    with pytest.raises(ModelError, match=r"first\.npz holds 'pcm'"):
        Trained.load(path)


def test_a_checkpoint_cut_short_or_of_another_network_is_named(tmp_path: Path) -> None:
    path = tmp_path / "first.checkpoint.npz"
    state: list[Any] = [tf.Variable(np.ones(3, np.float32))]
    _keep(path, state, [0.5], np.zeros(0, np.int64))
    assert _restore(path, state)[0] == [0.5]
    for other in ([tf.Variable(np.ones(4, np.float32))], [*state, *state]):
        with pytest.raises(ModelError, match=r"first\.checkpoint\.npz is of another network"):
            _restore(path, other)
    _cut_short(path)
    with pytest.raises(DataError, match=r"first\.checkpoint\.npz can't be read .*delete it"):
        _restore(path, state)
