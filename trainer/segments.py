"""Segment lists: which clips AudioSet labelled with what (``balanced_train_segments.csv`` and its like).

Lines ``YTID, start_seconds, end_seconds, "mid,mid,..."``; lines that begin with # are comments. Source:
research.google.com/audioset/download.html.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from detector.errors import DataError
from trainer.labels import LabelSet


@dataclass(frozen=True, slots=True)
class Segment:
    """A labelled stretch of a recording: ``labels`` are class indices, in the list's order."""

    video_id: str
    start_seconds: float
    end_seconds: float
    labels: tuple[int, ...]


def read_segments(path: Path, labels: LabelSet) -> tuple[Segment, ...]:
    """All segments of a list; its labels may be MIDs (as published), indices or names.

    Raises DataError with the line for a line of another form, times that are no times, or an unknown label.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read: {error}.") from error
    segments: list[Segment] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            segments.append(_segment(line, labels))
        except (ValueError, DataError) as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    if not segments:
        raise DataError(f"{path} holds no segment.")
    return tuple(segments)


def _segment(line: str, labels: LabelSet) -> Segment:
    row = next(csv.reader([line], skipinitialspace=True))
    if len(row) != 4:
        raise ValueError(f"an id, a start, an end and labels in quotes are expected, found {len(row)} fields.")
    try:
        start, end = float(row[1]), float(row[2])
    except ValueError:
        raise ValueError(f"start {row[1]!r} or end {row[2]!r} is no number of seconds.") from None
    if not (math.isfinite(start) and math.isfinite(end) and 0 <= start < end):
        raise ValueError(f"{start} to {end} seconds is no stretch of time.")
    found = tuple(labels.index(mid) for mid in row[3].split(",")) if "/" in row[3] else labels.resolve(row[3])
    return Segment(row[0], start, end, found)
