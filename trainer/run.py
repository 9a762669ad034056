"""A training run's folder: what it was told, everything to go on, the best weights. Servable at any time.

    run.json            RunConfig: recipe, model, features, labels, data, seed, command
    checkpoints/        step-000001000.safetensors: weights, optimiser, averages; progress in its header
    best.safetensors    weights to serve, by the classifier's names; its header holds what best.json says
    best.json           step and metrics of the best evaluation
    log.csv, events/    for people (``trainer.summaries``)

Each file is there whole or not at all: written beside its place, flushed to the disk, then put there.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from detector.checkpoint import check_tensors
from detector.classifiers import Classifier, assign, build_classifier, shapes
from detector.errors import ConfigError, DataError, ModelError
from trainer.labels import Label, LabelSet
from trainer.recipes import Recipe
from trainer.records import FeatureSpec, Level

logger = logging.getLogger(__name__)

RUN_NAME = "run.json"
BEST_NAME = "best.safetensors"
BEST_METRICS_NAME = "best.json"
CHECKPOINTS_NAME = "checkpoints"
LOG_NAME = "log.csv"
EVENTS_NAME = "events"
AVERAGE_SUFFIX = "/ExponentialMovingAverage"
"""Of the name under which a checkpoint holds a weight's moving average."""

_PROGRESS_KEY = "progress"
_CHECKPOINT = re.compile(r"step-(\d{9})\.safetensors")
_MAX_RUN_BYTES = 8 << 20
# What may change from one start to the next without making another run of it.
_FREE = frozenset(
    {
        "patience",
        "keep_checkpoints",
        "checkpoint_every_steps",
        "checkpoint_every_seconds",
        "num_epochs",
        "max_steps",
    }
)
_LENGTH = frozenset({"num_epochs", "max_steps"})
_SINCE = frozenset({"general", "label_quality_fingerprint"})
_ABSENT = object()
_MAX_SHOWN = 80  # characters of a list that a message shows whole

Which = Literal["best", "latest"]
Tensors = dict[str, npt.NDArray[Any]]


class ClassName(BaseModel):
    """A class: its MID (empty where it has none) and name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mid: str = ""
    name: str


class DataSource(BaseModel):
    """Clips trained or evaluated on.

    Attributes:
        pattern: as it was given.
        files, clips: how many.
        fingerprint: of the clips read: ids, frame counts and labels, in their order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str
    files: int
    clips: int
    fingerprint: str


class RunConfig(BaseModel):
    """What a run was told.

    Attributes:
        kind, params: as a package's manifest names them, ``input_size`` and ``classes`` included.
        feature_names: none: AudioSet's or YouTube-8M's audio key.
        level: ``frame`` or ``video``.
        labels: V classes in order.
        family, look_alikes: class indices; empty where the classes hold none.
        label_quality_fingerprint: of the table that the recipe's ``label_quality`` names; empty without one.
        general: of the family, the class that all its others are kinds of; None where none is known to be.
        evaluation: None where nothing is evaluated on.
        evaluation_fraction: share of the training clips kept for evaluation; 0 = none.
        started_from: what gave the first weights; empty = random ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    recipe: Recipe
    kind: str
    params: dict[str, Any]
    feature_names: tuple[str, ...] = ()
    feature_sizes: tuple[int, ...]
    level: Level = "frame"
    max_frames: int = Field(ge=1)
    labels: tuple[ClassName, ...] = Field(min_length=1)
    family: tuple[int, ...] = ()
    look_alikes: tuple[int, ...] = ()
    general: int | None = None
    label_quality_fingerprint: str = ""
    training: DataSource
    evaluation: DataSource | None = None
    evaluation_fraction: float = 0.0
    seed: int = 0
    started_from: str = ""
    command: str = ""

    @property
    def feature_spec(self) -> FeatureSpec:
        return FeatureSpec(self.feature_names, self.feature_sizes, self.level, self.max_frames)

    @property
    def label_set(self) -> LabelSet:
        labels = [Label(i, each.mid, each.name) for i, each in enumerate(self.labels)]
        return LabelSet(labels, f"the classes in {RUN_NAME}")

    def differences(self, other: RunConfig) -> list[str]:
        """What of ``other`` would make another run, in words; empty where training may go on with ``other``."""
        stairs = self.recipe.learning_rate_schedule == other.recipe.learning_rate_schedule == "stairs"
        free = _FREE if stairs else _FREE - _LENGTH
        if not (self.recipe.imply_family or other.recipe.imply_family):
            free |= {"general"}
        free |= _SINCE - self.model_fields_set  # written by a version that knew no such thing
        mine, theirs = self._compared(), other._compared()
        return _differences("", mine, theirs, free)

    def _compared(self) -> dict[str, Any]:
        values = self.model_dump(mode="json")
        recipe = values.pop("recipe")
        values = {key: value for key, value in values.items() if key not in ("command", "started_from")}
        for source in ("training", "evaluation"):
            # the same clips may lie elsewhere today
            values[source] = None if values[source] is None else values[source]["fingerprint"]
        return {**recipe, **values}


def _differences(name: str, old: Any, new: Any, free: Set[str] = frozenset()) -> list[str]:
    """In words, as deep down as they can be named."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [key for key in {**old, **new} if key not in free]:
            found += _differences(f"{name}.{key}" if name else key, old.get(key, _ABSENT), new.get(key, _ABSENT))
        return found
    if old == new:
        return []
    if isinstance(old, list) and isinstance(new, list) and max(len(_text(old)), len(_text(new))) > _MAX_SHOWN:
        if len(old) != len(new):
            return [f"{name} has {len(new)} entries, it had {len(old)}"]
        return [each for i in range(len(old)) for each in _differences(f"{name}[{i}]", old[i], new[i])]
    return [f"{name} is {_text(new)}, it was {_text(old)}"]


def _text(value: Any) -> str:
    return "left out" if value is _ABSENT else json.dumps(value)


class Best(BaseModel):
    """The best evaluation.

    Attributes:
        step: steps taken when it was made.
        metric: by which it is the best; empty where nothing was evaluated.
        metrics: all of that evaluation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")

    step: int
    metric: str = ""
    metrics: dict[str, float | None] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """Everything that training goes on from.

    Attributes:
        step: steps taken.
        tensors: weights, slots, averages and counters, by their names.
        progress: what is no tensor: best so far, sums since the last log row.
    """

    step: int
    tensors: Tensors
    progress: dict[str, Any]


class Run:
    """One run's folder. ``Run.open`` for one that exists, ``Run.create`` for a new one."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder = folder
        self.config = config

    @classmethod
    def is_run(cls, folder: Path) -> bool:
        return (folder / RUN_NAME).is_file()

    @classmethod
    def open(cls, folder: Path) -> Run:
        """ModelError where ``folder`` holds no run or a damaged one."""
        path = folder / RUN_NAME
        try:
            with path.open("rb") as file:
                config = RunConfig.model_validate_json(file.read(_MAX_RUN_BYTES))
        except FileNotFoundError:
            raise ModelError(f"{folder} is no training run: it holds no {RUN_NAME}.") from None
        except OSError as error:
            raise ModelError(f"{path} can't be read: {error.strerror or error}.") from error
        except (ValidationError, ConfigError) as error:
            raise ModelError(f"{path} is damaged or of another version: {_first_fault(error)}.") from None
        return cls(folder, config)

    @classmethod
    def create(cls, folder: Path, config: RunConfig) -> Run:
        """Make the folder and its ``run.json``; DataError where the disk refuses."""
        run = cls(folder, config)
        try:
            run.checkpoints_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder} can't be made: {error.strerror or error}.") from error
        run.update(config)
        return run

    def update(self, config: RunConfig) -> None:
        """Put ``config`` in place of what ``run.json`` says."""
        write_whole(self.folder / RUN_NAME, config.model_dump_json(indent=1).encode() + b"\n")
        self.config = config

    @property
    def checkpoints_folder(self) -> Path:
        return self.folder / CHECKPOINTS_NAME

    @property
    def log_path(self) -> Path:
        return self.folder / LOG_NAME

    @property
    def events_folder(self) -> Path:
        return self.folder / EVENTS_NAME

    def clear(self) -> None:
        """Forget all that was trained; what the folder holds besides is left alone.

        Checkpoints go first, the oldest last: killed in the midst, it is a run that stands at an earlier step, or none.
        """
        doomed = [path for _, path in reversed(self.checkpoint_paths())]
        doomed += [self.folder / BEST_NAME, self.folder / BEST_METRICS_NAME, self.log_path]
        doomed += sorted(self.events_folder.glob("*tfevents*"))
        for path in doomed:
            path.unlink(missing_ok=True)

    # --- checkpoints ---

    def checkpoint_paths(self) -> list[tuple[int, Path]]:
        """(step, file), oldest first."""
        found = [(_CHECKPOINT.fullmatch(path.name), path) for path in self.checkpoints_folder.glob("step-*")]
        return sorted((int(match[1]), path) for match, path in found if match)

    def save_checkpoint(self, checkpoint: Checkpoint) -> Path:
        """Write it, then remove all but the newest ``keep_checkpoints``; DataError where the disk refuses: the older
        ones are then as they were.
        """
        path = self.checkpoints_folder / f"step-{checkpoint.step:09d}.safetensors"
        header = {_PROGRESS_KEY: json.dumps({"step": checkpoint.step, **checkpoint.progress}, sort_keys=True)}
        write_whole(path, _packed(checkpoint.tensors, header))
        for _, old in self.checkpoint_paths()[: -self.config.recipe.keep_checkpoints]:
            old.unlink(missing_ok=True)
        return path

    def load_checkpoint(self) -> Checkpoint | None:
        """The newest that can be read; None where there is none. ModelError where all are damaged."""
        damaged: list[str] = []
        for step, path in reversed(self.checkpoint_paths()):
            try:
                tensors, header = _unpacked(path)
                progress = json.loads(header[_PROGRESS_KEY])
            except (ModelError, KeyError, ValueError) as error:
                damaged.append(f"{path.name}: {error}")
                logger.warning("Checkpoint %s is left out: %s", path, error)
                continue
            return Checkpoint(step, tensors, {key: value for key, value in progress.items() if key != "step"})
        if damaged:
            raise ModelError(f"No checkpoint in {self.checkpoints_folder} can be read. {' '.join(damaged)}")
        return None

    # --- best ---

    def save_best(self, tensors: Mapping[str, npt.NDArray[np.float32]], best: Best) -> None:
        """``tensors``: weights to serve, by the classifier's names."""
        text = best.model_dump_json(indent=1)
        write_whole(self.folder / BEST_NAME, _packed(tensors, {_PROGRESS_KEY: text}))
        write_whole(self.folder / BEST_METRICS_NAME, text.encode() + b"\n")

    def best(self) -> Best | None:
        """Of the weights in ``best.safetensors``; None where nothing was evaluated yet."""
        path = self.folder / BEST_NAME
        if not path.is_file():
            return None
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                return Best.model_validate_json((file.metadata() or {}).get(_PROGRESS_KEY, ""))
        except (OSError, safetensors.SafetensorError, ValidationError) as error:
            raise ModelError(f"{path} is damaged: {_first_fault(error)}. Train on, or serve the latest.") from error

    # --- serving ---

    def weights(self, which: Which = "best") -> tuple[dict[str, npt.NDArray[np.float32]], int]:
        """Weights to serve by the classifier's names, and the steps they were trained.

        ``best`` is the latest where nothing was evaluated yet; with ``average_decay`` the latest are the averages.
        ModelError where nothing is there.
        """
        needed = shapes(build_classifier(self.config.kind, self.config.params))
        best = self.best() if which == "best" else None
        if best is not None:
            path = self.folder / BEST_NAME
            tensors, _ = _unpacked(path)
            check_tensors(tensors, needed, str(path))
            return tensors, best.step
        checkpoint = self.load_checkpoint()
        if checkpoint is None:
            raise ModelError(f"{self.folder} holds no weights yet: its training has not begun.")
        found = {name: checkpoint.tensors.get(name + AVERAGE_SUFFIX, checkpoint.tensors.get(name)) for name in needed}
        tensors = {name: value for name, value in found.items() if value is not None}
        check_tensors(tensors, needed, f"newest checkpoint of {self.folder}")
        return tensors, checkpoint.step

    def classifier(self, which: Which = "best") -> Classifier:
        """With the weights to serve (``weights``)."""
        tensors, _ = self.weights(which)
        classifier = build_classifier(self.config.kind, self.config.params)
        assign(classifier, tensors, str(self.folder))
        return classifier


def write_whole(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` so that after a crash there is either all of it or what was there before.

    DataError where the disk refuses.
    """

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    put_in_place(path, write)


def put_in_place(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file beside ``path``, then put it there. DataError where the disk refuses."""
    partial = path.with_name(path.name + ".part")
    try:
        write(partial)
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise DataError(
            f"{path} can't be written: {error.strerror or error}. What was there before is as it was; make room, then "
            "start the same command again."
        ) from error


def _packed(tensors: Mapping[str, npt.NDArray[Any]], header: Mapping[str, str]) -> bytes:
    ordered = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    packed: bytes = safetensors.numpy.save(ordered, dict(header))
    return packed


def _unpacked(path: Path) -> tuple[Tensors, dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror or error}.") from error
    except safetensors.SafetensorError as error:
        raise ModelError(f"{path} is no safetensors file or is damaged: {_first_fault(error)}.") from error


def _first_fault(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        fault = error.errors()[0]
        return f"{'.'.join(map(str, fault['loc'])) or 'content'}: {fault['msg']}"
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
