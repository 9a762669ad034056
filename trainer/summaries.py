"""What a run tells while it trains: ``log.csv`` for programs, event files for TensorBoard.

Both are taken up again after a stop: what was told after the checkpoint that training goes on from is dropped, so that
nothing is told twice. ``log.csv`` holds nothing that depends on the clock: a resumed run's is that of an unbroken one,
byte for byte.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import re
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from detector.errors import ConfigError, DataError
from trainer.metrics import Curve
from trainer.records import Damage, masked_crc, read_records
from trainer.run import put_in_place, write_whole

logger = logging.getLogger(__name__)

PR_THRESHOLDS = 201
_EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\.gunfire")
_FILE_VERSION = "brain.Event:2"


class CsvLog:
    """Rows of numbers under fixed columns; empty where a row doesn't have one. First column: ``step``."""

    def __init__(self, path: Path, columns: tuple[str, ...], step: int) -> None:
        """Goes on with the file's rows up to ``step``. DataError where the disk refuses."""
        assert columns[0] == "step"
        self._path = path
        self._columns = columns
        kept = [] if step == 0 else [row for row in self._rows() if int(row[0]) <= step]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([columns, *kept])
        write_whole(path, text.getvalue().encode())
        self._file = path.open("a", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")

    def _rows(self) -> Iterator[list[str]]:
        try:
            lines = self._path.read_text("utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return
        except OSError as error:
            raise DataError(f"{self._path} can't be read: {error.strerror or error}.") from error
        rows = csv.reader(lines)
        if tuple(next(rows, ())) != self._columns:
            return
        # the last line may have been cut off in its middle
        yield from (row for row in rows if len(row) == len(self._columns) and row[0].isdecimal())

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row; numbers with 9 digits, which tell every float32 apart."""
        row = {key: f"{value:.9g}" for key, value in values.items() if not np.isnan(value)}
        with _told(self._path):
            self._writer.writerow({"step": str(step), **row})

    def flush(self) -> None:
        """To the disk; DataError where it refuses."""
        with _told(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """What the disk won't take any more is lost; ``flush`` says so where it matters."""
        with suppress(OSError):
            self._file.close()


class Events:
    """TensorBoard's event file of a run.

    TensorBoard's own protocol buffers, framed as the TFRecords that they are.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """Goes on with the events up to ``step``: they are copied to a new file, the old ones are removed."""
        try:
            from tensorboard.compat.proto.event_pb2 import Event
        except ImportError:
            raise ConfigError(
                "TensorBoard is not installed. Install gunfire-detector[trainer], or go without: --tensorboard=false."
            ) from None

        self._event_type: Any = Event
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder} can't be made: {error.strerror or error}.") from error
        found = [(_EVENT_FILE.fullmatch(path.name), path) for path in folder.glob("*tfevents*")]
        old = sorted((int(match[1]), path) for match, path in found if match)
        number = max((number for number, _ in old), default=int(time.time())) + 1
        self._path = folder / f"events.out.tfevents.{number:010d}.gunfire"

        def write(partial: Path) -> None:
            with partial.open("wb") as file:
                file.write(_framed(Event(wall_time=time.time(), file_version=_FILE_VERSION).SerializeToString()))
                for _, path in old if step else []:
                    for record in _whole_records(path):
                        event = Event.FromString(record)
                        if event.HasField("summary") and event.step <= step:
                            file.write(_framed(record))

        put_in_place(self._path, write)
        for _, path in old:
            path.unlink(missing_ok=True)
        self._file: BinaryIO = self._path.open("ab")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point on each curve; those that are no number are left out."""
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        for tag, value in values.items():
            if np.isfinite(value):
                self._write(step, scalar_pb(tag, value).SerializeToString())

    def precision_recall(self, step: int, tag: str, curve: Curve) -> None:
        """A PR curve of a class; nothing where it has no positive."""
        from tensorboard.plugins.pr_curve.summary import raw_data_pb

        if curve.positives == 0:
            return
        thresholds = np.linspace(0.0, 1.0, PR_THRESHOLDS)
        last = np.searchsorted(-curve.thresholds, -thresholds, side="right") - 1  # of the scores >= each threshold

        def at(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            return np.where(last >= 0, counts[np.maximum(last, 0)], 0)

        hits, misses = at(curve.true_positives), at(curve.false_positives)
        summary = raw_data_pb(
            tag,
            true_positive_counts=hits,
            false_positive_counts=misses,
            true_negative_counts=curve.negatives - misses,
            false_negative_counts=curve.positives - hits,
            precision=hits / np.maximum(hits + misses, 1),
            recall=hits / curve.positives,
            num_thresholds=PR_THRESHOLDS,
        )
        self._write(step, summary.SerializeToString())

    def _write(self, step: int, summary: bytes) -> None:
        event = self._event_type(wall_time=time.time(), step=step)
        event.summary.ParseFromString(summary)
        with _told(self._path):
            self._file.write(_framed(event.SerializeToString()))

    def flush(self) -> None:
        """To the system; DataError where the disk refuses."""
        with _told(self._path):
            self._file.flush()

    def close(self) -> None:
        """As of ``CsvLog``."""
        with suppress(OSError):
            self._file.close()


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} can't be written: {error.strerror or error}. Make room, then start the same command again."
        ) from error


def _whole_records(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        for item in read_records(stream, path):
            if isinstance(item, Damage):  # the end, cut off by the kill
                return
            yield bytes(item[1])


def _framed(record: bytes) -> bytes:
    header = struct.pack("<Q", len(record))
    checks = struct.pack("<I", masked_crc(header)), struct.pack("<I", masked_crc(record))
    return header + checks[0] + record + checks[1]
