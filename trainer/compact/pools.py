"""Recordings of split ``train`` -> one array of 16 kHz int16 and a table of clips. Second stage of the recipe.

Nothing of split ``dev`` and nothing whose licence is not among those that allow it ever gets in. A clip is a shot
recording with onsets, an event that might be taken for a shot, or a background.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import signal

from detector.audio import float_to_int16
from detector.chunk import RATE_HZ
from detector.errors import AudioError, ConfigError
from trainer.run import put_in_place, write_whole

LABELS = (
    "Gunshot, gunfire",
    "Machine gun",
    "Explosion",
    "Fireworks",
    "Firecracker",
    "Thunder",
    "Door",
    "Knock",
    "Glass",
    "Clapping",
    "Generic impact sounds",
    "Speech",
    "Environmental noise",
)
LICENCES = ("CC0", "public domain", "CC BY", "MIT", "Pixabay Content License")
"""What may be learnt from, with or without a version; no other, so neither NC, ND nor SA, nor what is not stated."""
_LICENCE = re.compile(rf"({'|'.join(LICENCES)})( \d\.\d)?")
FAMILY = ("Gunshot, gunfire", "Machine gun")
LOOK_ALIKES = LABELS[2:11]

_EVENT_LABELS = {
    "explosion": "Explosion",
    "fireworks": "Fireworks",
    "thunderstorm": "Thunder",
    "door_knock": "Knock",
    "door_wood_creaks": "Door",
    "glass_breaking": "Glass",
    "glass": "Glass",
    "clapping": "Clapping",
    "laughing": "Speech",
}
_IMPACTS = frozenset(
    (
        *("can_opening", "mouse_click", "footsteps", "hammer", "stapler", "coin", "dishes", "nails", "stones_dropping"),
        *("chopping", "ratchet", "typing", "velcro", "keyboard_typing", "gun_handling", "clock_tick", "crackling"),
        *("booth_branchtrimmer", "booth_scissors", "booth_shovel", "booth_compressedairspray", "booth_zipper"),
        *("booth_spraycanshake", "booth_bitechewapple"),
    )
)
_VOICES = frozenset(
    (
        *("dog_bark", "person_sneeze", "coughing", "rooster", "baby_cry", "crow", "cow", "cat", "sheep", "hen"),
        *("car_horn", "siren"),
    )
)


@dataclass(frozen=True, slots=True)
class Clip:
    """One recording in the pool.

    Attributes:
        kind: ``shot``, ``event``, ``background`` or ``live`` (a live-fire file, whole).
        label: index into LABELS, or -1 for something audible that has no label of its own.
        start, length: samples within the pool.
        onsets: of shots, samples from the clip's start.
        complete: every shot in the clip has an onset listed, so what is left is no shot.
        weak: onset found in distant, noisy sound; less sure.
    """

    path: str
    kind: str
    label: int
    start: int
    length: int
    onsets: tuple[int, ...] = ()
    complete: bool = True
    weak: bool = False


@dataclass(frozen=True, slots=True)
class Pool:
    """All training audio: ``pcm`` int16 (memory-mapped) and its clips."""

    pcm: npt.NDArray[np.int16]
    clips: tuple[Clip, ...]

    def of_kind(self, kind: str) -> list[Clip]:
        return [clip for clip in self.clips if clip.kind == kind]

    def samples(self, clip: Clip) -> npt.NDArray[np.float32]:
        """The clip in [-1, 1]."""
        return np.asarray(self.pcm[clip.start : clip.start + clip.length] / np.float32(32768), np.float32)


@dataclass(frozen=True, slots=True)
class IndexRow:
    """A row of ``audio/index.csv``."""

    path: str
    label: str
    split: str
    licence: str
    group: str

    @property
    def source(self) -> str:
        return self.path.split("/")[0]

    @property
    def trainable(self) -> bool:
        """Of split ``train``, and each of the licences (parted by " / ") among LICENCES."""
        return self.split == "train" and all(_LICENCE.fullmatch(one.strip()) for one in self.licence.split("/"))


def read_index(audio_dir: Path) -> list[IndexRow]:
    """Every row of ``index.csv``. Raises ConfigError where it is absent or lacks a column."""
    columns = ("path", "label", "split", "licence", "group")
    return [IndexRow(*values) for _, values in _table(audio_dir / "index.csv", columns)]


def onsets_file(audio_dir: Path) -> Path:
    """The table of tagged live-fire shots."""
    return audio_dir / "shotspotter" / "onsets.csv"


def read_onsets(audio_dir: Path) -> dict[str, tuple[list[float], int]]:
    """Live-fire file -> (onset seconds in order, rounds fired in that test). Raises ConfigError where absent or bad."""
    path = onsets_file(audio_dir)
    onsets: dict[str, tuple[list[float], int]] = {}
    for line, (file, rounds, seconds) in _table(path, ("file", "num_rounds", "onset_seconds")):
        try:
            count, onset = int(rounds), float(seconds)
        except ValueError:
            count, onset = 0, math.nan
        if not (math.isfinite(onset) and onset >= 0):
            raise ConfigError(
                f"{path}, line {line}: num_rounds {rounds!r} and onset_seconds {seconds!r} must be a whole number and "
                "seconds from the file's start."
            )
        onsets.setdefault(file, ([], count))[0].append(onset)
    return {file: (sorted(times), count) for file, (times, count) in onsets.items()}


def _table(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """(line, values of ``columns``) of each row. Raises ConfigError that names the file, and the column or line."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if missing := [column for column in columns if column not in (reader.fieldnames or ())]:
                raise ConfigError(f"{path} has no column {', '.join(missing)}; it needs {', '.join(columns)}.")
            for row in reader:
                values = [row[column] for column in columns]
                if None in values:
                    raise ConfigError(f"{path}, line {reader.line_num}: the row has fewer cells than the header.")
                yield reader.line_num, values
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: set DATA_DIR to the data folder (see its README).") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} can't be read as CSV in UTF-8: {error}.") from error


def decode(path: Path, dtype: str) -> tuple[npt.NDArray[Any], int]:
    """``((n, channels), samples a second)`` of a file. Raises AudioError where it can't be read or holds no sample."""
    import soundfile

    try:
        x, rate_hz = soundfile.read(path, dtype=dtype, always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path} can't be read: {error}") from error
    if not len(x):
        raise AudioError(f"{path} holds no sample: take it out of index.csv.")
    return x, rate_hz


def read_audio(path: Path) -> npt.NDArray[np.int16]:
    """A file as 16 kHz mono int16 (polyphase resampling: quick, and good enough to train on).

    Raises AudioError as ``decode`` does.
    """
    x, rate_hz = decode(path, "float32")
    mono = x.mean(axis=1)
    if rate_hz != RATE_HZ:
        divisor = int(np.gcd(rate_hz, RATE_HZ))
        mono = signal.resample_poly(mono, RATE_HZ // divisor, rate_hz // divisor)
    return float_to_int16(mono)


def find_onsets(x: npt.NDArray[np.floating], *, rise_db: float, range_db: float, low_hz: float) -> list[int]:
    """Sudden rises of energy: samples where a 4 ms frame is ``rise_db`` above the 60 ms before it.

    Only frames within ``range_db`` of the loudest count. Sound that is loud from the first sample on has an onset at 0.
    """
    x = signal.sosfilt(signal.butter(2, low_hz, "highpass", fs=RATE_HZ, output="sos"), x)
    frame = RATE_HZ // 250
    power = np.mean(x[: len(x) // frame * frame].reshape(-1, frame) ** 2, axis=1) + 1e-10
    level = 10 * np.log10(power)
    onsets: list[int] = []
    for i in range(len(level)):
        if level[i] < level.max() - range_db:
            continue
        before = 10 * np.log10(np.mean(power[max(0, i - 15) : i])) if i else -100.0
        if level[i] - before >= rise_db and (not onsets or i * frame - onsets[-1] > 0.045 * RATE_HZ):
            onsets.append(i * frame)
    return onsets


def build_pool(audio_dir: Path, folder: Path, rows: Iterable[IndexRow] | None = None) -> Pool:
    """Read, resample and sort every trainable recording; writes ``pool.npy`` and then ``pool.json`` into ``folder``.

    Raises ConfigError where there is none, DataError where the disk refuses.
    """
    tagged = read_onsets(audio_dir)
    pieces: list[npt.NDArray[np.int16]] = []
    clips: list[Clip] = []
    start = 0
    for row in rows if rows is not None else read_index(audio_dir):
        if not row.trainable or (row.source == "shotspotter" and row.path not in tagged):
            continue
        pcm = read_audio(audio_dir / row.path)
        clip = _sort(row, pcm, start, tagged.get(row.path))
        if clip is None:
            continue
        clips.append(clip)
        if clip.kind == "live" and (quiet := _before_first_shot(clip, pcm)) is not None:
            clips.append(quiet)
        pieces.append(pcm)
        start += len(pcm)
    if not clips:
        raise ConfigError(
            f"{audio_dir / 'index.csv'} lists nothing to train on: that takes rows of split train whose licence is "
            f"{', '.join(LICENCES[:-1])} or {LICENCES[-1]}."
        )

    def write(partial: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.save(file, np.concatenate(pieces))

    put_in_place(folder / "pool.npy", write)
    write_whole(folder / "pool.json", json.dumps([asdict(clip) for clip in clips]).encode())
    return load_pool(folder)


def load_pool(folder: Path) -> Pool:
    """The pool that ``build_pool`` wrote. Raises ConfigError where there is none or it is damaged."""
    if not (folder / "pool.json").is_file():
        raise ConfigError(f"{folder} holds no pool: run `trainer compact prepare` first.")
    try:
        table = json.loads((folder / "pool.json").read_text(encoding="utf-8"))
        clips = tuple(Clip(**{**row, "onsets": tuple(row["onsets"])}) for row in table)
        return Pool(np.load(folder / "pool.npy", mmap_mode="r", allow_pickle=False), clips)
    except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"The pool in {folder} is damaged ({error}): delete the folder and run `trainer compact prepare`."
        ) from error


def _sort(row: IndexRow, pcm: npt.NDArray[np.int16], start: int, tags: tuple[list[float], int] | None) -> Clip | None:
    x = pcm.astype(np.float32) / 32768
    if tags is not None:
        onsets = tuple(round(t * RATE_HZ) for t in tags[0])
        return Clip(row.path, "live", 0, start, len(pcm), onsets, complete=len(onsets) >= tags[1])
    if row.label == "gunshot":
        weak = row.source == "katsis"
        found = find_onsets(
            x, rise_db=7.0 if weak else 9.0, range_db=8.0 if weak else 22.0, low_hz=250.0 if weak else 150.0
        )
        if weak:
            found = found[:1]
        if not found:
            return None
        return Clip(row.path, "shot", 0, start, len(pcm), tuple(found), complete=not weak, weak=weak)
    if row.label in _EVENT_LABELS:
        return Clip(row.path, "event", LABELS.index(_EVENT_LABELS[row.label]), start, len(pcm))
    if row.label in _IMPACTS:
        return Clip(row.path, "event", LABELS.index("Generic impact sounds"), start, len(pcm))
    if row.label in _VOICES or row.path.startswith("sesa/casual"):
        return Clip(row.path, "event", -1, start, len(pcm))
    return Clip(row.path, "background", LABELS.index("Environmental noise"), start, len(pcm))


def _before_first_shot(clip: Clip, pcm: npt.NDArray[np.int16]) -> Clip | None:
    """The sensor's street noise between the file's silent padding and its first tagged shot, if nothing sticks out."""
    heard = np.flatnonzero(pcm)
    if not len(heard):
        return None
    begin, end = int(heard[0]) + RATE_HZ // 20, min(clip.onsets) - RATE_HZ // 5
    if end - begin < RATE_HZ:
        return None
    frames = np.abs(pcm[begin:end].astype(np.float32))[: (end - begin) // 160 * 160].reshape(-1, 160).max(axis=1)
    if frames.max() > 5 * np.median(frames):
        return None
    label = LABELS.index("Environmental noise")
    return Clip(clip.path, "background", label, clip.start + begin, end - begin)
