"""What to embed: recordings by name, by folder, or from a list with labels and times. First stage of ``trainer embed``.

A list is a CSV: ``path,labels[,start,end]``, with or without that header line; with it the columns may stand in any
order, ``label``, ``start_seconds`` and ``end_seconds`` are understood too, and other columns are left alone. Paths are
relative to the list's folder. Lines that begin with # are comments.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from detector.errors import ConfigError, DataError
from detector.scan import find_recordings
from trainer.labels import LabelSet, Ontology

_COLUMNS = ("path", "labels", "start", "end")
_SECOND_NAMES = {"label": "labels", "start_seconds": "start", "end_seconds": "end"}


@dataclass(frozen=True, slots=True)
class Stretch:
    """Part of a recording that is wanted.

    Attributes:
        start_seconds: from the recording's first sample.
        end_seconds: then the stretch is one clip; None: it goes on to the recording's end and is cut into clips.
        labels: class indices of every clip of it, ascending.
        where: list and line that ask for it, for messages; empty for recordings given by name.
    """

    start_seconds: float = 0.0
    end_seconds: float | None = None
    labels: tuple[int, ...] = ()
    where: str = ""


@dataclass(frozen=True, slots=True)
class Recording:
    """A file and what is wanted of it.

    Attributes:
        path: absolute.
        clip_seconds: length of the clips that a stretch without an end is cut into; None: it is one clip.
        pad_short: silence is appended to a stretch shorter than one example.
    """

    path: Path
    stretches: tuple[Stretch, ...]
    clip_seconds: float | None
    pad_short: bool = False


def gather(
    paths: Sequence[Path],
    *,
    clip_seconds: float | None,
    whole: Sequence[Path] = (),
    pad_short: bool = False,
    path_labels: tuple[int, ...] = (),
    labels: LabelSet | None = None,
    ontology: Ontology | None = None,
) -> tuple[Recording, ...]:
    """All recordings, each file once: those of lists first, then those given by name, in their order.

    Args:
        paths: audio files; folders, meaning every audio file below; lists (``*.csv``).
        clip_seconds: length of clips; None: whole recordings.
        whole: further recordings, each taken whole.
        pad_short: append silence to what is shorter than one example.
        path_labels: class indices of what is not from a list.
        labels, ontology: what the labels column is resolved with; without ``labels`` it may hold indices only.

    A recording given by name and in a list counts as the list says. Raises ConfigError where nothing is named or a
    folder holds nothing; DataError with the line for a list that can't be used.
    """
    wanted: dict[Path, list[Stretch]] = {}
    lengths: dict[Path, float | None] = {}
    lists = [path for path in paths if path.suffix.lower() == ".csv"]
    for path in lists:
        for recording, stretch in read_list(path, labels, ontology):
            stretches = wanted.setdefault(recording, [])
            _check_not_twice(recording, stretches, stretch)
            stretches.append(stretch)
            lengths[recording] = clip_seconds
    by_name = [(path, clip_seconds) for path in paths if path not in lists] + [(path, None) for path in whole]
    for path, seconds in by_name:
        found = find_recordings([path])
        if not found:
            raise ConfigError(f"Folder {path} holds no audio file. Name another, or the files themselves.")
        for recording in map(_absolute, found):
            if recording not in wanted:
                wanted[recording], lengths[recording] = [Stretch(labels=path_labels)], seconds
    if not wanted:
        raise ConfigError("Nothing to embed: name recordings, folders of them, or a CSV list of path,labels.")
    return tuple(Recording(path, tuple(stretches), lengths[path], pad_short) for path, stretches in wanted.items())


def read_list(
    path: Path, labels: LabelSet | None = None, ontology: Ontology | None = None
) -> Iterator[tuple[Path, Stretch]]:
    """Each line's recording (absolute) and stretch; DataError with the line for what can't be used."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"The list {path} can't be read: {error.strerror or error}.") from error
    rows = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
    columns: Mapping[str, int] | None = None
    lines = 0
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise DataError(f"{path}, line {rows.line_num}: {error}.") from None
        if row is None:
            break
        if not any(cell.strip() for cell in row) or row[0].startswith("#"):
            continue
        where = f"{path}, line {rows.line_num}"
        if columns is None:
            columns = _header(row, where)
            if columns is not None:
                continue
            columns = {name: i for i, name in enumerate(_COLUMNS)}
        lines += 1
        yield _line(row, columns, path.parent, where, labels, ontology)
    if not lines:
        raise DataError(f"The list {path} names no recording; lines path,labels[,start,end] are expected.")


def indices_of(text: str, labels: LabelSet | None, ontology: Ontology | None = None) -> tuple[int, ...]:
    """Class indices of a labels column: what ``LabelSet.resolve`` takes, or without a list of classes indices alone.

    Empty text is no label. Raises DataError for an unknown class.
    """
    if not text.strip():
        return ()
    if labels is not None:
        return labels.resolve(text, ontology)
    parts = text.replace(",", " ").split()
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise DataError(f"Labels {text!r} are no class indices; for names give the list of classes (--labels).")
    return tuple(sorted({int(part) for part in parts}))


def _header(row: Sequence[str], where: str) -> Mapping[str, int] | None:
    """Column of each name, or None where this is no header."""
    names = [_SECOND_NAMES.get(cell.strip().lower(), cell.strip().lower()) for cell in row]
    if "path" not in names:
        return None
    columns = {name: names.index(name) for name in _COLUMNS if name in names}
    twice = [name for name in columns if names.count(name) > 1]
    if twice:
        raise DataError(f"{where}: the header names {', '.join(twice)} twice.")
    return columns


def _line(
    row: Sequence[str],
    columns: Mapping[str, int],
    folder: Path,
    where: str,
    labels: LabelSet | None,
    ontology: Ontology | None,
) -> tuple[Path, Stretch]:
    if len(row) <= columns["path"] or not row[columns["path"]].strip():
        raise DataError(f"{where}: there is no path; path,labels[,start,end] is expected, found {row}.")

    def cell(name: str) -> str:
        return row[columns[name]].strip() if name in columns and columns[name] < len(row) else ""

    try:
        indices = indices_of(cell("labels"), labels, ontology)
        start = _seconds(cell("start"), "start") or 0.0
        end = _seconds(cell("end"), "end")
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if end is not None and not start < end:
        raise DataError(f"{where}: a stretch from {start:g} to {end:g} seconds has no length.")
    return _absolute(folder / cell("path")), Stretch(start, end, indices, where)


def _seconds(text: str, name: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0.0):
        raise DataError(f"{name} {text!r} is no number of seconds from 0 on.")
    return value


def _check_not_twice(recording: Path, before: Sequence[Stretch], new: Stretch) -> None:
    for old in before:
        if (old.start_seconds, old.end_seconds) == (new.start_seconds, new.end_seconds):
            raise DataError(
                f"{new.where}: the same stretch of {recording} is in {old.where} already. Put all its labels in one "
                'line, in quotes: "427, 428".'
            )


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100  # not resolved: links keep their names
