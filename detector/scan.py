"""Recordings offline: the daemon's own pipeline over files, many at a time, one row a file.

Each file is a stream; its chunks are those a producer would publish (the last one padded with zeros), so what a scan
hears is what the daemon would hear.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np

from detector.audio import Int16Array, open_audio, stream_16k
from detector.chunk import CHUNK_SAMPLES, RATE_HZ, Chunk
from detector.decision import ScoredExample
from detector.errors import AudioError
from detector.pipeline import Emitted, Pipeline
from detector.stream import Arrival

COLUMNS = ("path", "peak_score", "alerts", "onsets_seconds", "error")
# fmt: off
AUDIO_SUFFIXES = frozenset((
    ".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".aac", ".aif", ".aiff", ".aifc", ".au", ".snd",
    ".caf", ".w64", ".rf64", ".wma", ".amr", ".3gp", ".mp4", ".mkv", ".mka", ".webm", ".mov", ".avi",
))
# fmt: on
_PIECE_CHUNKS = 64  # of one file at a time: a long recording is never in memory whole
_SESSION = "scan"


@dataclass(slots=True)
class Row:
    """What was heard in one file.

    Attributes:
        peak_score: highest family score of its examples, rounded to 6 digits; None where nothing could be scored.
        alerts: how many alerts opened; None where the file could not be read at all.
        onsets_seconds: every shot of every alert, from the file's first sample.
        error: why the file could not be read, or not whole; empty where it could.
    """

    path: str
    peak_score: float | None = None
    alerts: int | None = 0
    onsets_seconds: list[float] = field(default_factory=list)
    error: str = ""


def find_recordings(paths: Sequence[Path]) -> list[Path]:
    """Files as they are; of folders, all audio files below them by suffix, sorted. What does not exist stays in."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES and p.is_file())
        else:
            found.append(path)
    return found


def scan(
    paths: Sequence[Path],
    make_pipeline: Callable[[Callable[[str, ScoredExample, float], None]], Pipeline],
    *,
    workers: int | None = None,
) -> Iterator[Row]:
    """Yield a row for each path, in their order.

    Args:
        make_pipeline: called once with the observer to build the pipeline with.
        workers: threads that read and resample; None: one a processor.
    """
    rows = {str(i): Row(str(path)) for i, path in enumerate(paths)}
    opened: Counter[str] = Counter()
    alert_onsets: dict[tuple[str, str], tuple[int, ...]] = {}

    def observe(stream_id: str, scored: ScoredExample, score: float) -> None:
        row = rows[stream_id]
        row.peak_score = max(round(score, 6), row.peak_score or 0.0)

    def hear(emitted: Iterable[Emitted]) -> None:
        for one in emitted:
            alert = one.alert
            opened[alert.stream] += alert.state == "opened"
            alert_onsets[alert.stream, alert.alert_id] = tuple(o.sample for o in alert.onsets)

    def finish(stream_id: str) -> Row:
        hear(pipeline.run())
        hear(pipeline.end_stream(stream_id))
        row = rows.pop(stream_id)
        row.alerts = opened.pop(stream_id, 0)
        for key in [key for key in alert_onsets if key[0] == stream_id]:
            row.onsets_seconds += [sample / RATE_HZ for sample in alert_onsets.pop(key)]
        row.onsets_seconds = sorted({round(s, 3) for s in row.onsets_seconds})
        return row

    pipeline = make_pipeline(observe)
    workers = workers or os.cpu_count() or 1
    ahead = max(2 * workers, 16)  # files being read at once; short files fill a batch only together
    with ThreadPoolExecutor(workers, thread_name_prefix="read") as pool:
        waiting = iter(enumerate(paths))
        reading: list[_Reading] = []
        done: dict[int, Row] = {}
        next_index = 0
        try:
            while True:
                for index, path in islice(waiting, ahead - len(reading)):
                    reading.append(_Reading(index, path, pool))
                if not reading:
                    break
                pieces = [(r, r.take()) for r in reading if r.is_ready or r is reading[0]]
                for _, piece in pieces:
                    for chunk in piece:
                        pipeline.submit(Arrival(chunk))
                hear(pipeline.run())
                for r, _ in pieces:
                    if r.ended:
                        row = finish(str(r.index))
                        row.error = r.error
                        if r.error and row.peak_score is None:
                            row.alerts = None
                        done[r.index] = row
                        reading.remove(r)
                while next_index in done:
                    yield done.pop(next_index)
                    next_index += 1
        finally:
            for r in reading:
                r.cancel()


class _Reading:
    """One file, read piece by piece in the pool, one piece ahead."""

    def __init__(self, index: int, path: Path, pool: ThreadPoolExecutor) -> None:
        self.index = index
        self.ended = False
        self.error = ""
        self._pool = pool
        self._notes: list[str] = []
        self._chunks = _chunks_of(path, str(index), self._notes)
        self._next: Future[list[Chunk]] = pool.submit(self._piece)

    @property
    def is_ready(self) -> bool:
        return self._next.done()

    def take(self) -> list[Chunk]:
        """The next piece; waits for it. Sets ``ended`` and ``error``."""
        try:
            piece = self._next.result()
        except AudioError as e:
            self.ended, self.error = True, str(e)
            return []
        if len(piece) < _PIECE_CHUNKS:
            self.ended, self.error = True, "; ".join(self._notes)
        else:
            self._next = self._pool.submit(self._piece)
        return piece

    def cancel(self) -> None:
        self._next.cancel()

    def _piece(self) -> list[Chunk]:
        return list(islice(self._chunks, _PIECE_CHUNKS))


def _chunks_of(path: Path, stream_id: str, notes: list[str]) -> Iterator[Chunk]:
    """``notes`` gets what was wrong with the file although it could be read, short of clipping."""
    held: Int16Array = np.zeros(0, np.int16)
    seq = 0

    def chunk(pcm: Int16Array) -> Chunk:
        captured_at_ns = seq * CHUNK_SAMPLES * 1_000_000_000 // RATE_HZ
        return Chunk(stream_id=stream_id, session=_SESSION, seq=seq, captured_at_ns=captured_at_ns, pcm=pcm)

    with open_audio(path) as reader, contextlib.closing(stream_16k(reader)) as blocks:
        for block in blocks:
            held = np.concatenate([held, block])
            while len(held) >= CHUNK_SAMPLES:
                yield chunk(held[:CHUNK_SAMPLES])
                seq += 1
                held = held[CHUNK_SAMPLES:]
        notes += [f"{path}: {note}" for note in reader.notes if "clipped" not in note]
    if len(held):
        yield chunk(np.pad(held, (0, CHUNK_SAMPLES - len(held))))


class CsvWriter:
    """Rows as CSV, written as they come."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._csv = csv.writer(out, lineterminator="\n")
        self._csv.writerow(COLUMNS)

    def write(self, row: Row) -> None:
        score = "" if row.peak_score is None else f"{row.peak_score:.6f}"
        onsets = " ".join(f"{s:.3f}" for s in row.onsets_seconds)
        self._csv.writerow([row.path, score, row.alerts, onsets, row.error])
        self._out.flush()

    def close(self) -> None:
        pass


class JsonWriter:
    """Rows as one JSON array, written as they come."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._first = True

    def write(self, row: Row) -> None:
        self._out.write("[\n" if self._first else ",\n")
        self._out.write("  " + json.dumps(asdict(row)))
        self._out.flush()
        self._first = False

    def close(self) -> None:
        self._out.write("[]\n" if self._first else "\n]\n")
