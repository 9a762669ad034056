"""Two replicas, or two workers, train to what one would, up to rounding; only the chief writes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.made_clips import SIZE, write_clips, write_labels
from trainer.run import Run

_ROOT = Path(__file__).parents[2]


def options(folder: Path, train_dir: str) -> list[str]:
    return [
        *("train", "--train-dir", str(folder / train_dir), "--train-data", str(folder / "train.tfrecord")),
        *("--eval-data", str(folder / "eval.tfrecord"), "--labels", str(folder / "labels.csv")),
        *("--recipe=reference", "--model=DbofModel", "--dbof-add-batch-norm=false", "--dbof-cluster-size=12"),
        *("--dbof-hidden-size=8", "--iterations=4", f"--feature-sizes={SIZE}", "--batch-size=8", "--num-epochs=3"),
        *("--average-decay=0.9", "--label-smoothing=0.1", "--class-weighting=0.5", "--threads=1"),
        *("--base-learning-rate=0.001", "--set=log_every_steps=2", "--set=checkpoint_every_steps=5"),
    ]


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trainer", *arguments]
    every = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", **environment}
    return subprocess.Popen(command, cwd=_ROOT, env=every, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    try:
        outputs = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    return outputs


def ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    found = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return found


def assert_alike(one: Path, two: Path) -> None:
    a, b = Run.open(one).load_checkpoint(), Run.open(two).load_checkpoint()
    assert a is not None
    assert b is not None
    assert a.step == b.step == 15
    for name, value in a.tensors.items():
        np.testing.assert_allclose(b.tensors[name], value, rtol=1e-3, atol=2e-5, err_msg=name)
    first, second = (np.genfromtxt(path / "log.csv", delimiter=",", names=True)["train_loss"] for path in (one, two))
    np.testing.assert_allclose(second, first, rtol=1e-4)


@pytest.mark.timeout(300)
def test_replicas_and_workers_train_to_what_one_would(tmp_path: Path) -> None:
    write_clips(tmp_path / "train.tfrecord", 33)  # the last batch holds one clip: a replica gets none
    write_clips(tmp_path / "eval.tfrecord", 20, seed=1, prefix="e")
    write_labels(tmp_path / "labels.csv")
    addresses = [f"127.0.0.1:{port}" for port in ports(2)]
    workers = [
        start(
            options(tmp_path, "workers"),
            TF_CONFIG=json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}),
        )
        for index in range(2)
    ]
    outputs = finish(*workers)
    assert "done." in outputs[0]
    finish(start(options(tmp_path, "one")), start([*options(tmp_path, "replicas"), "--cpu-replicas=2"]))
    assert_alike(tmp_path / "one", tmp_path / "replicas")
    assert_alike(tmp_path / "one", tmp_path / "workers")
    assert sum(1 for _ in (tmp_path / "workers" / "events").iterdir()) == 1
