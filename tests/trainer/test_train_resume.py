"""A run that is killed at any moment ends as one that never was: the same weights, the same log, to the last bit."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.compat.proto.event_pb2 import Event

from tests.trainer.made_clips import SIZE, write_clips, write_labels
from trainer.run import Run
from trainer.summaries import _whole_records

_ROOT = Path(__file__).parents[2]


def child(kill_at: str, options: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.trainer.train_child", kill_at, "--", "train", *options]
    return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=150, check=False)


def events(folder: Path) -> list[tuple[int, str]]:
    (path,) = (folder / "events").glob("*tfevents*")
    found = (Event.FromString(record) for record in _whole_records(path))
    return [(event.step, value.tag) for event in found for value in event.summary.value]


@pytest.mark.timeout(300)
def test_killed_again_and_again_it_ends_as_if_it_never_was(tmp_path: Path) -> None:
    options = [
        f"--train-data={write_clips(tmp_path / 'train.tfrecord', 50)}",
        f"--eval-data={write_clips(tmp_path / 'eval.tfrecord', 30, seed=1, prefix='e')}",
        f"--labels={write_labels(tmp_path / 'labels.csv')}",
        *("--recipe=reference", "--model=DbofModel", f"--feature-sizes={SIZE}", "--batch-size=8", "--num-epochs=3"),
        *("--dbof-cluster-size=12", "--dbof-hidden-size=8", "--iterations=4", "--average-decay=0.9", "--mixup=0.4"),
        *("--checkpoint-every-steps=4", "--evaluate-every-steps=9", "--set=log_every_steps=3", "--quiet"),
    ]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    done = child("never", [*options, f"--train-dir={unbroken}"])
    assert done.returncode == 0, done.stderr
    for kill_at in ("step:6", "best:9", "checkpoint:16"):
        killed = child(kill_at, [*options, f"--train-dir={broken}"])
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert Run.open(broken).classifier() is not None  # servable at any time
    steps = [step for step, _ in Run.open(broken).checkpoint_paths()]
    assert max(steps) < 16
    assert (broken / "checkpoints" / "step-000000016.safetensors.part").is_file()
    done = child("never", [*options, f"--train-dir={broken}"])
    assert done.returncode == 0, done.stderr
    one, two = (Run.open(folder).load_checkpoint() for folder in (unbroken, broken))
    assert one is not None
    assert two is not None
    assert one.step == two.step == 21
    assert list(one.tensors) == list(two.tensors)
    assert all(np.array_equal(one.tensors[name], two.tensors[name]) for name in one.tensors)
    assert one.progress == two.progress
    for name in ("log.csv", "best.safetensors", "best.json"):
        assert (unbroken / name).read_bytes() == (broken / name).read_bytes(), name
    assert events(unbroken) == events(broken)
    assert not np.array_equal(
        Run.open(broken).weights("latest")[0]["tower/hidden1_weights"], one.tensors["tower/hidden1_weights"]
    )
