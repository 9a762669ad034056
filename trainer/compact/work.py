"""What a work folder was made with: kept in its ``run.json``, so that no step mixes two settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

from detector.errors import ConfigError, DataError
from trainer.compact.pools import read_index
from trainer.run import write_whole

RUN_NAME = "run.json"
TRAINING = ("--steps", "--from")
"""Options that decide nothing but training."""
SCENES = "scenes"
"""What ``check`` calls the version of the scenes among what is free."""
_SCENES_VERSION = 3
_TRAINING_VERSION = 3


@dataclass(frozen=True, slots=True)
class MadeWith:
    """The options that decide what lies in a work folder, and the recordings.

    Attributes:
        recordings: hash of the rows of ``index.csv`` that may be trained on; "" where there was no index.
        rounds: how often each mixture is made.
        begun: the package whose embedder training began with, and that embedder's hash; "" for random weights.
        inherited: what that package had learnt from.
        scenes_version, training_version: of the code that makes scenes from a seed, and weights from scenes.
    """

    seed: int
    scenes: int
    close_scenes: int
    steps: int
    recordings: str = ""
    rounds: int = 2
    begun: str = ""
    inherited: tuple[str, ...] = ()
    scenes_version: int = _SCENES_VERSION
    training_version: int = _TRAINING_VERSION

    @property
    def by_option(self) -> dict[str, int]:
        """As the command line spells them."""
        names = ("seed", "scenes", "close_scenes", "steps", "rounds")
        return {f"--{name.replace('_', '-')}": getattr(self, name) for name in names}

    @property
    def command(self) -> str:
        options = " ".join(f"{name} {value}" for name, value in self.by_option.items())
        if not self.begun:
            return f"trainer compact {options} all"
        return f"trainer compact {options} train --from {self.begun.split()[0]} (there {self.begun.partition(' ')[2]})"


def recordings_hash(audio_dir: Path) -> str:
    """Of what may be trained on; "" where there is no index. Raises ConfigError for a bad one."""
    if not (audio_dir / "index.csv").is_file():
        return ""
    rows = [astuple(row) for row in read_index(audio_dir) if row.trainable]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def made_with(work: Path) -> MadeWith | None:
    """What ``work`` was made with; None where it doesn't say. Raises ConfigError where its run.json is damaged."""
    path = work / RUN_NAME
    try:
        content = {"scenes_version": 1, "training_version": 1} | json.loads(path.read_text(encoding="utf-8"))
        made = MadeWith(**content | {"inherited": tuple(content.get("inherited", ()))})
        numbers = (*made.by_option.values(), made.scenes_version, made.training_version)
        if not all(type(value) is int for value in numbers):
            raise ValueError("an option is no whole number")
        if not all(isinstance(value, str) for value in (made.recordings, made.begun, *made.inherited)):
            raise ValueError("recordings, begun or inherited is no text")
        return made
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged or not of `trainer compact` ({error}): give another --work folder, or delete the file "
            "and give the options that the folder was made with."
        ) from error


def check(work: Path, wanted: MadeWith, free: Collection[str] = ()) -> MadeWith | None:
    """What ``work`` was made with. ConfigError that names each option that is another now, but those of ``free``."""
    kept = made_with(work)
    if kept is None:
        return None
    differences = [
        f"{name} is {value}, it was {kept.by_option[name]}"
        for name, value in wanted.by_option.items()
        if value != kept.by_option[name] and name not in free
    ]
    if wanted.begun != kept.begun and "--from" not in free:
        differences.append(
            f"--from is {wanted.begun or 'not given'}, it was {kept.begun or 'not given'} "
            "(`train --again` may change it; `all` trains without)"
        )
    if wanted.training_version != kept.training_version and "--from" not in free:
        differences.append("what was trained in it is of another version of this program (`train --again` trains anew)")
    if wanted.scenes_version != kept.scenes_version and SCENES not in free:
        differences.append("its scenes are those of another version of this program")
    if "" not in (kept.recordings, wanted.recordings) and kept.recordings != wanted.recordings:
        differences.append("index.csv lists other recordings to train on than it did")
    if differences:
        raise ConfigError(
            f"{work} was made with other settings: {'; '.join(differences)}. Give another --work folder, or the "
            f"settings that it has: {' '.join(f'{name} {value}' for name, value in kept.by_option.items())}."
        )
    return kept


def claim(work: Path, wanted: MadeWith, free: Collection[str] = (), *, keep_training: bool = False) -> None:
    """``check``, then note ``wanted``. Raises DataError where the disk refuses.

    With ``keep_training`` the steps, what was begun with and the training's version may differ and remain as they are.

    A folder without run.json takes on ``wanted``, also where something lies in it, as an earlier version wrote none;
    shards of other settings are then found where they are read.
    """
    kept = check(work, wanted, TRAINING if keep_training else free)
    if kept is not None and keep_training:
        wanted = replace(kept, recordings=wanted.recordings)  # all else was found to be alike
    wanted = replace(wanted, recordings=wanted.recordings or (kept.recordings if kept else ""))
    if wanted == kept:
        return
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{work} can't be made: {error.strerror or error}.") from error
    write_whole(work / RUN_NAME, json.dumps(asdict(wanted), indent=1).encode() + b"\n")
