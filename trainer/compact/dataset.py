"""Scenes -> shards of PCM with targets on disk -> what the teachers make of them. Fourth stage.

A shard is a pure function of (mixture, seed, number), so that a run that was stopped goes on where it was, and any
number of processes makes the same data. Beside each shard lies a second file with log-mel and the teachers' opinions:
a function of the first.
"""

from __future__ import annotations

import multiprocessing
import os
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from detector.embedders.params import EXAMPLE_FRAMES, EXAMPLE_SAMPLES, MEL_BANDS
from detector.errors import ConfigError, DataError
from trainer.compact.pools import LABELS, Pool, load_pool
from trainer.compact.scenes import (
    POSITION_HOP_SAMPLES,
    POSITIONS,
    POSITIONS_A_HOP,
    SCENE_EXAMPLES,
    SCENE_SAMPLES,
    compose,
    is_as_recorded,
)
from trainer.run import put_in_place

if TYPE_CHECKING:
    from trainer.compact.teachers import Teachers

SHARD_SCENES = 250
SCENE_FRAMES = SCENE_EXAMPLES * EXAMPLE_FRAMES
POSITION_FRAMES = EXAMPLE_FRAMES // POSITIONS_A_HOP
EXAMPLE_POSITIONS = range(0, POSITIONS, POSITIONS_A_HOP)
"""Of the examples that follow one another in a stream, as the LSTM sees them."""
TAUGHT_POSITIONS = range(0, POSITIONS, 4)
"""Where the quick teacher is asked, every 0.48 s; the slow one at every fourth of these."""
SLOWLY_TAUGHT_EVERY = 4
SLOWLY_TAUGHT = len(TAUGHT_POSITIONS[::SLOWLY_TAUGHT_EVERY])

_MADE_BY, _TAUGHT_BY = "trainer compact synthesise", "trainer compact teach"

assert POSITION_FRAMES * POSITIONS_A_HOP * SCENE_EXAMPLES == SCENE_FRAMES

Float16Array = npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True, eq=False)
class TrainingData:
    """Scenes in memory, S of them, cut into P = 73 examples of which T = 19 were shown to YAMNet and C = 5 to CED.

    Attributes:
        log_mel: ``(S, 960, 64)`` float16 over the network's fine offset: an example is any 96 rows.
        targets: ``(S, P, labels)`` uint8.
        weights: ``(S, P, labels)`` float16.
        as_recorded: ``(S,)`` bool: one recording, not a mixture.
        yamnet_logits: ``(S, T, 521)`` float16.
        yamnet_embeddings: ``(S, T, 1024)`` float16.
        ced_probabilities: ``(S, C, 527)`` float16.
    """

    log_mel: Float16Array
    targets: npt.NDArray[np.uint8]
    weights: Float16Array
    as_recorded: npt.NDArray[np.bool_]
    yamnet_logits: Float16Array
    yamnet_embeddings: Float16Array
    ced_probabilities: Float16Array

    def __len__(self) -> int:
        return len(self.log_mel)

    def examples(self, scenes: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> Float16Array:
        """``(n,)`` and ``(n,)`` -> ``(n, 96, 64)``."""
        rows = positions[:, None] * POSITION_FRAMES + np.arange(EXAMPLE_FRAMES)
        return np.asarray(self.log_mel[scenes[:, None], rows])


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
    """What to make: ``scenes`` scenes of ``mixture`` from ``seed`` and ``close_scenes`` of "close" from the next.

    ``pool_folder`` holds the recordings.
    """

    pool_folder: Path
    folder: Path
    scenes: int
    seed: int
    close_scenes: int = 0
    codecs: bool = True
    mixture: str = "mixed"

    def __len__(self) -> int:
        return self.scenes + self.close_scenes

    def shards(self) -> list[Shard]:
        """All of them, in the order in which they are read."""
        return [
            Shard(mixture, seed, first, min(SHARD_SCENES, scenes - first), self._path(mixture, seed, first))
            for mixture, seed, scenes in (
                (self.mixture, self.seed, self.scenes),
                ("close", self.seed + 1, self.close_scenes),
            )
            for first in range(0, scenes, SHARD_SCENES)
        ]

    def _path(self, mixture: str, seed: int, first: int) -> Path:
        return self.folder / f"{mixture}{seed}_{first // SHARD_SCENES:05d}.npz"


def make_shards(plan: DataPlan, processes: int) -> Iterator[int]:
    """Make what is missing; yields the number of scenes finished so far, those found included."""
    missing = [shard for shard in plan.shards() if not shard.path.is_file()]
    done = len(plan) - sum(shard.count for shard in missing)
    yield done
    if not missing:
        return
    if processes <= 1:
        for shard in missing:
            make_shard(plan, shard)
            done += shard.count
            yield done
        return
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # each process is one thread; read when a child imports NumPy
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as workers:
        counts = {workers.submit(make_shard, plan, shard): shard.count for shard in missing}
        for future in as_completed(counts):
            future.result()
            done += counts[future]
            yield done


def make_shard(plan: DataPlan, shard: Shard) -> None:
    """Compose and record; one file, complete or absent."""
    pool = _pool(plan.pool_folder)
    pcm = np.empty((shard.count, SCENE_SAMPLES), np.int16)
    targets = np.empty((shard.count, POSITIONS, len(LABELS)), np.uint8)
    weights = np.empty(targets.shape, np.float16)
    for i in range(shard.count):
        scene = compose(pool, shard.seed, shard.first + i, mixture=shard.mixture, codecs=plan.codecs)
        pcm[i], targets[i], weights[i] = scene.pcm, scene.targets, scene.weights
    save_arrays(shard.path, {"pcm": pcm, "targets": targets, "weights": weights})


def teach_shards(plan: DataPlan, teachers: Teachers) -> Iterator[int]:
    """Ask the teachers about every shard that they have not heard; yields the number of scenes done, those found
    included.

    Raises ConfigError where a shard is missing or holds another number of scenes, DataError where it can't be read.
    """
    missing = [shard for shard in plan.shards() if not shard.taught_path.is_file()]
    done = len(plan) - sum(shard.count for shard in missing)
    yield done
    for shard in missing:
        pcm = _scenes(shard, shard.path, _MADE_BY)["pcm"]
        scenes = len(pcm)
        log_mel = teachers.log_mel(_cut(pcm, EXAMPLE_POSITIONS)).reshape(scenes, SCENE_FRAMES, MEL_BANDS)
        rows = np.arange(EXAMPLE_FRAMES) + np.array(TAUGHT_POSITIONS)[:, None] * POSITION_FRAMES
        logits, embeddings = teachers.yamnet(log_mel[:, rows].reshape(-1, EXAMPLE_FRAMES, MEL_BANDS))
        ced = teachers.ced(_cut(pcm, TAUGHT_POSITIONS[::SLOWLY_TAUGHT_EVERY]))
        arrays = {
            "log_mel": log_mel,
            "yamnet_logits": logits,
            "yamnet_embeddings": embeddings,
            "ced_probabilities": ced,
        }
        shaped = {
            name: value if name == "log_mel" else value.reshape(scenes, -1, value.shape[-1])
            for name, value in arrays.items()
        }
        save_arrays(shard.taught_path, shaped)
        done += shard.count
        yield done


def _cut(pcm: npt.NDArray[np.int16], positions: range) -> npt.NDArray[np.int16]:
    """``(S, SCENE_SAMPLES)`` -> ``(S * positions, 15600)``."""
    windows = np.lib.stride_tricks.sliding_window_view(pcm, EXAMPLE_SAMPLES, axis=1)[:, ::POSITION_HOP_SAMPLES]
    return np.ascontiguousarray(windows[:, positions.start : positions.stop : positions.step]).reshape(
        -1, EXAMPLE_SAMPLES
    )


def load_data(*plans: DataPlan) -> TrainingData:
    """All shards of ``plans``.

    Raises ConfigError where one is missing, was not shown to the teachers or holds another number of scenes, and
    DataError where one can't be read.
    """
    parts: dict[str, list[npt.NDArray[Any]]] = {}
    shards = [shard for plan in plans for shard in plan.shards()]
    for shard in shards:
        for path, made_by in ((shard.path, _MADE_BY), (shard.taught_path, _TAUGHT_BY)):
            for name, value in _scenes(shard, path, made_by, leave_out="pcm").items():
                if name == "ced_probabilities" and value.shape[1] != SLOWLY_TAUGHT:
                    raise ConfigError(
                        f"{path} holds CED's opinion of {value.shape[1]} examples a scene, not {SLOWLY_TAUGHT}: "
                        f"another version made it. Delete {path.parent} and run `{_MADE_BY}` and `{_TAUGHT_BY}` again."
                    )
                parts.setdefault(name, []).append(value)
    as_recorded = np.array([is_as_recorded(s.seed, s.first + i, s.mixture) for s in shards for i in range(s.count)])
    return TrainingData(as_recorded=as_recorded, **{name: np.concatenate(parts.pop(name)) for name in tuple(parts)})


def present(path: Path) -> Path:
    """Raises ConfigError where this file of a shard is missing."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing: run `trainer compact synthesise` and `trainer compact teach` first.")
    return path


def _scenes(shard: Shard, path: Path, made_by: str, leave_out: str = "") -> dict[str, npt.NDArray[Any]]:
    """What one of the shard's files holds, its first axis the shard's scenes."""
    arrays = load_arrays(present(path), made_by, leave_out)
    for name, value in arrays.items():
        if value.shape[:1] != (shard.count,):
            raise ConfigError(
                f"{path} holds {name} of shape {value.shape}, but --scenes and --close-scenes ask for {shard.count} "
                f"scenes there: delete it and run `{made_by}` again, or give another --work folder."
            )
    return arrays


def load_arrays(path: Path, made_by: str, leave_out: str = "") -> dict[str, npt.NDArray[Any]]:
    """Every array of an .npz but ``leave_out``. DataError, which names the command ``made_by``, where it is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files if name != leave_out}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} can't be read ({error}): delete it and run `{made_by}` again.") from error


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """An .npz at ``path``, with its folder: all of it, or what was there before. DataError where the disk refuses."""

    def write(partial: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, **arrays)

    put_in_place(path, write)


@lru_cache(maxsize=1)
def _pool(folder: Path) -> Pool:
    return load_pool(folder)
