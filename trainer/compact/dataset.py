"""Scenes -> shards of log-mel examples, targets and the teacher's opinion on disk. Fourth stage of the recipe.

A shard is a pure function of (seed, shard number), so that a run that was stopped goes on where it was, and any number
of processes makes the same data.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from detector.audio import int16_to_float
from detector.embedders.log_mel import log_mel_examples
from detector.embedders.params import EXAMPLE_FRAMES, EXAMPLE_HOP_SAMPLES, EXAMPLE_SAMPLES, MEL_BANDS
from detector.errors import ConfigError
from trainer.compact.pools import LABELS, Pool, load_pool
from trainer.compact.scenes import SCENE_EXAMPLES, compose, is_as_recorded

SHARD_SCENES = 250
TEACHER_CLASSES = 527
_TEACHER_SAMPLES = 16_000  # CED takes at least one second


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Scenes in memory, S of them.

    Attributes:
        log_mel: ``(S, 10, 96, 64)`` float16.
        targets, weights: ``(S, 10, labels)`` float32.
        as_recorded: ``(S,)`` bool: one recording, not a mixture.
        teacher: ``(S, 10, 527)`` float16 probabilities, or None where no teacher was asked.
    """

    log_mel: npt.NDArray[np.float16]
    targets: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]
    as_recorded: npt.NDArray[np.bool_]
    teacher: npt.NDArray[np.float16] | None

    def __len__(self) -> int:
        return len(self.log_mel)


@dataclass(frozen=True, slots=True)
class DataPlan:
    """What to make: ``scenes`` of ``seed`` from the pool in ``pool_folder``; ``teacher`` is CED's file, or None."""

    pool_folder: Path
    folder: Path
    scenes: int
    seed: int
    teacher: Path | None = None
    codecs: bool = True

    @property
    def shards(self) -> int:
        return -(-self.scenes // SHARD_SCENES)

    def shard_path(self, shard: int) -> Path:
        return self.folder / f"seed{self.seed}_{shard:05d}.npz"


def make_shards(plan: DataPlan, processes: int) -> Iterator[int]:
    """Make what is missing; yields the number of shards finished so far, those found included."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    missing = [shard for shard in range(plan.shards) if not plan.shard_path(shard).is_file()]
    done = plan.shards - len(missing)
    yield done
    if not missing:
        return
    if processes <= 1:
        for shard in missing:
            make_shard(plan, shard)
            done += 1
            yield done
        return
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # each process is one thread; read when a child imports NumPy
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as workers:
        for future in as_completed([workers.submit(make_shard, plan, shard) for shard in missing]):
            future.result()
            done += 1
            yield done


def make_shard(plan: DataPlan, shard: int) -> None:
    """Compose, record, transform and ask the teacher; one file, complete or absent."""
    pool = _pool(plan.pool_folder)
    first = shard * SHARD_SCENES
    count = min(SHARD_SCENES, plan.scenes - first)
    log_mel = np.empty((count, SCENE_EXAMPLES, EXAMPLE_FRAMES, MEL_BANDS), np.float16)
    targets = np.empty((count, SCENE_EXAMPLES, len(LABELS)), np.float32)
    weights = np.empty_like(targets)
    teacher = np.empty((count, SCENE_EXAMPLES, TEACHER_CLASSES), np.float16) if plan.teacher else None
    for i in range(count):
        scene = compose(pool, plan.seed, first + i, codecs=plan.codecs)
        log_mel[i] = log_mel_examples(int16_to_float(scene.pcm))
        targets[i], weights[i] = scene.targets, scene.weights
        if teacher is not None and plan.teacher is not None:
            teacher[i] = ask_teacher(plan.teacher, scene.pcm)
    arrays: dict[str, Any] = {
        "log_mel": log_mel,
        "targets": targets.astype(np.uint8),
        "weights": weights.astype(np.float16),
    }
    if teacher is not None:
        arrays["teacher"] = teacher
    partial = plan.shard_path(shard).with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(plan.shard_path(shard))


def load_data(plan: DataPlan) -> TrainingData:
    """All shards of a plan. Raises ConfigError where one is missing."""
    paths = [plan.shard_path(shard) for shard in range(plan.shards)]
    if absent := [path for path in paths if not path.is_file()]:
        raise ConfigError(
            f"{len(absent)} of {len(paths)} shards are missing ({absent[0]}, ...): run `trainer compact synthesise`."
        )
    parts: dict[str, list[npt.NDArray[Any]]] = {}
    for path in paths:
        with np.load(path, allow_pickle=False) as stored:
            for name in stored.files:
                parts.setdefault(name, []).append(stored[name])
    whole = {name: np.concatenate(pieces) for name, pieces in parts.items()}
    return TrainingData(
        whole["log_mel"],
        whole["targets"].astype(np.float32),
        whole["weights"].astype(np.float32),
        np.array([is_as_recorded(plan.seed, i) for i in range(plan.scenes)]),
        whole.get("teacher"),
    )


def ask_teacher(teacher: Path, pcm: npt.NDArray[np.int16]) -> npt.NDArray[np.float32]:
    """CED's 527 probabilities for each example of a stretch of PCM, which begins with the first one's look-back."""
    examples = np.lib.stride_tricks.sliding_window_view(pcm, EXAMPLE_SAMPLES)[::EXAMPLE_HOP_SAMPLES]
    waveform = np.zeros((len(examples), _TEACHER_SAMPLES), np.float32)
    waveform[:, :EXAMPLE_SAMPLES] = examples / np.float32(32768)
    return np.asarray(_teacher(teacher).run(None, {"waveform": waveform})[0], np.float32)


def teacher_labels(data_dir: Path) -> list[str]:
    """AudioSet display names in the order of CED's outputs."""
    with (data_dir / "audioset" / "class_labels_indices.csv").open(newline="", encoding="utf-8") as file:
        return [row["display_name"] for row in csv.DictReader(file)]


@lru_cache(maxsize=1)
def _pool(folder: Path) -> Pool:
    return load_pool(folder)


@lru_cache(maxsize=1)
def _teacher(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            "The teacher needs onnxruntime: install the extra `peers`, or go without a teacher."
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options)
