"""Scenes -> shards of PCM with targets on disk -> what the teacher and the trunk make of them. Fourth stage.

A shard is a pure function of (seed, shard number), so that a run that was stopped goes on where it was, and any number
of processes makes the same data. Beside each shard lies a second file with log-mel, trunk features and the teacher's
opinion: a function of the first.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from detector.embedders.params import EXAMPLE_HOP_SAMPLES, EXAMPLE_SAMPLES
from detector.errors import ConfigError
from trainer.compact.pools import LABELS, Pool, load_pool
from trainer.compact.scenes import SCENE_EXAMPLES, SCENE_SAMPLES, compose, is_as_recorded

if TYPE_CHECKING:
    from trainer.compact.teacher import Teacher

SHARD_SCENES = 250
_FIELDS = ("log_mel", "features", "teacher_logits", "teacher_embedding")
_BATCH_EXAMPLES = 100


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Scenes in memory, S of them.

    Attributes:
        targets, weights: ``(S, 10, labels)`` float32.
        as_recorded: ``(S,)`` bool: one recording, not a mixture.
        log_mel: ``(S, 10, 96, 64)`` float16 over the network's fine offset.
        features: ``(S, 10, 6, 4, 512)`` float16, the untrained trunk's output.
        teacher_logits: ``(S, 10, 521)`` float16, YAMNet's.
        teacher_embedding: ``(S, 10, 1024)`` float16, YAMNet's.
    """

    targets: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float32]
    as_recorded: npt.NDArray[np.bool_]
    log_mel: npt.NDArray[np.float16]
    features: npt.NDArray[np.float16]
    teacher_logits: npt.NDArray[np.float16]
    teacher_embedding: npt.NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.log_mel)


@dataclass(frozen=True, slots=True)
class Shard:
    """Scenes ``first`` to ``first + count - 1`` of one mixture and seed, and where they are kept."""

    mixture: str
    seed: int
    first: int
    count: int
    path: Path

    @property
    def taught_path(self) -> Path:
        return self.path.with_suffix(".taught.npz")


@dataclass(frozen=True, slots=True)
class DataPlan:
    """What to make: ``scenes`` scenes of mixture "mixed" from ``seed`` and ``close_scenes`` of "close" from the next.

    ``pool_folder`` holds the recordings, ``teacher`` is YAMNet's TFLite file.
    """

    pool_folder: Path
    folder: Path
    scenes: int
    seed: int
    teacher: Path
    close_scenes: int = 0
    codecs: bool = True

    def shards(self) -> list[Shard]:
        """All of them, in the order in which they are read."""
        return [
            Shard(mixture, seed, first, min(SHARD_SCENES, scenes - first), self._path(mixture, seed, first))
            for mixture, seed, scenes in (
                ("mixed", self.seed, self.scenes),
                ("close", self.seed + 1, self.close_scenes),
            )
            for first in range(0, scenes, SHARD_SCENES)
        ]

    def _path(self, mixture: str, seed: int, first: int) -> Path:
        return self.folder / f"{mixture}{seed}_{first // SHARD_SCENES:05d}.npz"


def make_shards(plan: DataPlan, processes: int) -> Iterator[int]:
    """Make what is missing; yields the number of shards finished so far, those found included."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    shards = plan.shards()
    missing = [shard for shard in shards if not shard.path.is_file()]
    done = len(shards) - len(missing)
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


def make_shard(plan: DataPlan, shard: Shard) -> None:
    """Compose and record; one file, complete or absent."""
    pool = _pool(plan.pool_folder)
    pcm = np.empty((shard.count, SCENE_SAMPLES), np.int16)
    targets = np.empty((shard.count, SCENE_EXAMPLES, len(LABELS)), np.uint8)
    weights = np.empty(targets.shape, np.float16)
    for i in range(shard.count):
        scene = compose(pool, shard.seed, shard.first + i, mixture=shard.mixture, codecs=plan.codecs)
        pcm[i], targets[i], weights[i] = scene.pcm, scene.targets, scene.weights
    _save(shard.path, {"pcm": pcm, "targets": targets, "weights": weights})


def teach_shards(plan: DataPlan, teacher: Teacher) -> Iterator[int]:
    """Ask the teacher about every shard that it has not heard; yields the number done so far, those found included.

    Raises ConfigError where a shard is missing.
    """
    shards = plan.shards()
    missing = [shard for shard in shards if not shard.taught_path.is_file()]
    done = len(shards) - len(missing)
    yield done
    for shard in missing:
        with np.load(_present(shard.path), allow_pickle=False) as stored:
            examples = examples_of_scenes(stored["pcm"])
        parts = [teacher.opinion(examples[i : i + _BATCH_EXAMPLES]) for i in range(0, len(examples), _BATCH_EXAMPLES)]
        taught = {
            name: np.concatenate([part[k] for part in parts]).reshape(-1, SCENE_EXAMPLES, *parts[0][k].shape[1:])
            for k, name in enumerate(_FIELDS)
        }
        _save(shard.taught_path, taught)
        done += 1
        yield done


def examples_of_scenes(pcm: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
    """``(S, SCENE_SAMPLES)`` -> ``(S * 10, 15600)``."""
    windows = np.lib.stride_tricks.sliding_window_view(pcm, EXAMPLE_SAMPLES, axis=1)[:, ::EXAMPLE_HOP_SAMPLES]
    return np.ascontiguousarray(windows.reshape(-1, EXAMPLE_SAMPLES))


def load_data(plan: DataPlan) -> TrainingData:
    """All shards of a plan. Raises ConfigError where one is missing or was not shown to the teacher."""
    parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in ("targets", "weights", *_FIELDS)}
    shards = plan.shards()
    for shard in shards:
        for path in (shard.path, shard.taught_path):
            with np.load(_present(path), allow_pickle=False) as stored:
                for name in stored.files:
                    if name in parts:
                        parts[name].append(stored[name])
    whole = {name: np.concatenate(parts.pop(name)) for name in tuple(parts)}
    return TrainingData(
        targets=whole.pop("targets").astype(np.float32),
        weights=whole.pop("weights").astype(np.float32),
        as_recorded=np.array([is_as_recorded(s.seed, s.first + i, s.mixture) for s in shards for i in range(s.count)]),
        **whole,
    )


def _present(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"{path} is missing: run `trainer compact synthesise` and `trainer compact teach` first.")
    return path


def _save(path: Path, arrays: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(path)


@lru_cache(maxsize=1)
def _pool(folder: Path) -> Pool:
    return load_pool(folder)
