"""TFRecord files of embeddings -> clips in memory -> batches; and back to files. First stage of training.

A clip is a ``SequenceExample`` (frame-level: quantised embeddings about a second apart) or an ``Example``
(video-level: one float32 mean). AudioSet's keys (``video_id``, ``audio_embedding``) and YouTube-8M's (``id``,
``audio``, ``mean_audio``) are both read. All files are parsed once into packed arrays; batches are then taken from
these, so that every epoch after the first read costs next to nothing. What exceeds ``memory_limit_bytes`` goes to an
unnamed file that is mapped into memory: same arrays, same batches, bounded memory.

Source of semantics: google/youtube-8m, ``readers.py``; of the framing and its checksums: TensorFlow,
``tsl/lib/io/record_reader.cc``; of the wire form: protobuf's encoding guide, ``tensorflow/core/example/*.proto``.
"""

from __future__ import annotations

import glob
import hashlib
import io
import logging
import math
import os
import re
import struct
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from detector.embedders.params import EMBEDDING_SIZE
from detector.embedders.postprocess import dequantise
from detector.errors import ConfigError, DataError

if TYPE_CHECKING:
    import tensorflow as tf

    from trainer.labels import LabelSet

logger = logging.getLogger(__name__)

ID_KEYS = ("video_id", "id")
FRAME_KEYS = ("audio_embedding", "audio")
VIDEO_KEYS = ("mean_audio_embedding", "mean_audio")
MAX_FRAMES = 300
MAX_FEATURES = 8
DEFAULT_MEMORY_LIMIT_BYTES = 1 << 30

_LOGGED_DAMAGES = 10
_PART_ID = re.compile(r"(.+)_(\d{1,15})(?:#\d+)?", re.DOTALL)  # of the ids that ``trainer embed`` gives
_CLIPS_PER_PART = 4096
_PART_BYTES = 32 << 20
_FILES_A_GROUP = 16
_READ_AHEAD_GROUPS = 4
_READ_WHOLE_BYTES = 1 << 20
_SCAN_BYTES = 1 << 20
_MASK_DELTA = 0xA282EAD8

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Level = Literal["frame", "video"]


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """Which features make up a frame, side by side.

    Attributes:
        names: 1 to 8 keys, or none: AudioSet's or YouTube-8M's audio key, whichever a record holds.
        sizes: values of each feature, in the order of ``names``.
        level: ``frame``: uint8 frames of a ``SequenceExample``; ``video``: float32 vectors of an ``Example``.
        max_frames: frames beyond are cut off.
    """

    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (EMBEDDING_SIZE,)
    level: Level = "frame"
    max_frames: int = MAX_FRAMES

    def __post_init__(self) -> None:
        if len(self.names) > MAX_FEATURES:
            raise ConfigError(f"{len(self.names)} feature names are given; at most {MAX_FEATURES} can be read.")
        if len(self.sizes) != max(len(self.names), 1):
            raise ConfigError(
                f"Feature names {', '.join(self.names) or '(automatic)'} need as many sizes; given: {list(self.sizes)}."
            )
        if len(set(self.names)) != len(self.names):
            raise ConfigError(f"Feature names {', '.join(self.names)} hold one twice.")
        if min(self.sizes) < 1 or self.max_frames < 1:
            raise ConfigError(f"Feature sizes {list(self.sizes)} and max_frames {self.max_frames} must be 1 or more.")

    @property
    def size(self) -> int:
        """Values a frame, all features together."""
        return sum(self.sizes)


@dataclass(frozen=True, slots=True)
class Damage:
    """A record, or the rest of a file, that can't be read."""

    path: Path
    offset_bytes: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}, byte {self.offset_bytes}: {self.reason}"


@dataclass(frozen=True, slots=True)
class ReadReport:
    """What reading found: how many files and good records, and every damage."""

    files: int
    records: int
    damages: tuple[Damage, ...]

    def __str__(self) -> str:
        text = f"{self.records} clips from {self.files} files"
        if self.damages:
            text += f"; {len(self.damages)} damaged records skipped, the first: {self.damages[0]}"
        return text


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some clips, side by side.

    Attributes:
        video_ids: ``B`` of them.
        features: ``(B, T, D)`` uint8, 0 beyond ``num_frames``; video-level ``(B, D)`` float32.
        num_frames: ``(B,)`` int32; video-level all 1.
        labels: ``(B, V)`` bool.
    """

    video_ids: tuple[str, ...]
    features: UInt8Array | Float32Array
    num_frames: npt.NDArray[np.int32]
    labels: npt.NDArray[np.bool_]

    @property
    def values(self) -> Float32Array:
        """``(B, T, D)`` float32 as the starter code's reader gives it; video-level ``(B, D)`` as it is."""
        if self.features.dtype == np.uint8:
            return video_matrix(self.features.astype(np.uint8, copy=False), self.num_frames)
        return self.features.astype(np.float32, copy=False)


def video_matrix(features: UInt8Array, num_frames: npt.NDArray[np.int32]) -> Float32Array:
    """``(B, T, D)`` uint8 -> ``(B, T, D)`` float32: dequantised, exactly 0 from row ``num_frames`` on."""
    longest = int(num_frames.max(initial=0))
    values = np.zeros(features.shape, np.float32)
    filled = values[:, :longest]
    filled[...] = dequantise(np.arange(256, dtype=np.uint8))[features[:, :longest]]
    beyond = np.arange(filled.shape[1]) >= num_frames[:, None]
    if beyond.any():
        filled[beyond] = 0.0
    return values


def video_matrix_in_graph(features: tf.Tensor, num_frames: tf.Tensor) -> tf.Tensor:
    """``video_matrix`` on the device, so that a quarter of the bytes have to go there."""
    import tensorflow as tf

    values = tf.gather(tf.constant(dequantise(np.arange(256, dtype=np.uint8))), tf.cast(features, tf.int32))
    valid = tf.sequence_mask(num_frames, tf.shape(features)[1])[:, :, None]
    return tf.where(valid, values, tf.zeros_like(values))


class ClipSet:
    """Clips packed into a few arrays; every batch is a gather from them.

    ``features`` is ``(rows, D)``, all clips' frames one after the other (uint8), or one row a clip (float32).
    """

    def __init__(
        self,
        *,
        video_ids: bytes,
        id_offsets: Indices,
        features: UInt8Array | Float32Array,
        frame_offsets: Indices,
        labels: npt.NDArray[np.int32],
        label_offsets: Indices,
        times_seconds: Float32Array,
        classes: int,
        spec: FeatureSpec,
        report: ReadReport,
    ) -> None:
        self._video_ids = video_ids
        self._id_offsets = id_offsets
        self.features = features
        self.frame_offsets = frame_offsets
        self._labels = labels
        self._label_offsets = label_offsets
        self.times_seconds = times_seconds
        self.classes = classes
        self.spec = spec
        self.report = report
        self.num_frames = np.diff(frame_offsets).astype(np.int32)

    def __len__(self) -> int:
        return len(self.num_frames)

    @property
    def longest_frames(self) -> int:
        """Frames of the longest clip (after the cut at ``max_frames``), at least 1."""
        return max(int(self.num_frames.max(initial=1)), 1)

    def video_id(self, clip: int) -> str:
        """Bytes that are no UTF-8 come as backslash escapes."""
        return self._video_ids[self._id_offsets[clip] : self._id_offsets[clip + 1]].decode("utf-8", "backslashreplace")

    def recording_id(self, clip: int) -> str:
        """The id without what tells the parts of one recording apart: their start in milliseconds (``rec_30000``)."""
        video_id = self.video_id(clip)
        part = _PART_ID.fullmatch(video_id)
        start = 1000.0 * float(self.times_seconds[clip, 0])
        if part is not None and math.isclose(int(part[2]), start, rel_tol=2e-7, abs_tol=1.0):
            return part[1]
        return video_id

    def labels_of(self, clip: int) -> npt.NDArray[np.int32]:
        """Label indices as recorded: their order and repetitions are kept."""
        return self._labels[self._label_offsets[clip] : self._label_offsets[clip + 1]]

    def frames_of(self, clip: int) -> UInt8Array | Float32Array:
        """``(num_frames, D)`` uint8, or ``(1, D)`` float32."""
        return self.features[self.frame_offsets[clip] : self.frame_offsets[clip + 1]]

    def label_matrix(self, clips: Indices | None = None) -> npt.NDArray[np.bool_]:
        """``(clips, V)`` bool, of all clips or of those given."""
        clips = np.arange(len(self)) if clips is None else np.asarray(clips, np.int64)
        matrix = np.zeros((len(clips), self.classes), np.bool_)
        starts = self._label_offsets[clips]
        counts = self._label_offsets[clips + 1] - starts
        rows = np.repeat(np.arange(len(clips)), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        matrix[rows, self._labels[np.repeat(starts, counts) + within]] = True
        return matrix

    @property
    def fingerprint(self) -> str:
        """Of ids, lengths, labels and features in their order: tells whether two sets hold the same clips."""
        digest = hashlib.sha256(self._video_ids)
        for part in (self._id_offsets, self.num_frames, self._labels, self._label_offsets):
            digest.update(np.ascontiguousarray(part).tobytes())
        digest.update(np.ascontiguousarray(self.features).data)  # as it lies, since it may be larger than the memory
        return digest.hexdigest()[:32]

    def subset(self, clips: Indices) -> ClipSet:
        """These clips alone, in this order, as a set of their own."""

        def ranges(offsets: Indices) -> tuple[Indices, Indices]:
            counts = offsets[clips + 1] - offsets[clips]
            ends = _offsets([counts])
            return np.arange(ends[-1]) + np.repeat(offsets[clips] - ends[:-1], counts), ends

        (id_bytes, id_offsets), (rows, frame_offsets), (labels, label_offsets) = (
            ranges(offsets) for offsets in (self._id_offsets, self.frame_offsets, self._label_offsets)
        )
        return ClipSet(
            video_ids=np.frombuffer(self._video_ids, np.uint8)[id_bytes].tobytes(),
            id_offsets=id_offsets,
            features=self.features[rows],
            frame_offsets=frame_offsets,
            labels=self._labels[labels],
            label_offsets=label_offsets,
            times_seconds=self.times_seconds[clips],
            classes=self.classes,
            spec=self.spec,
            report=self.report,
        )

    def label_counts(self) -> Indices:
        """``(V,)``: clips that carry each class; 0 is a class that never occurs."""
        clips = np.repeat(np.arange(len(self)), np.diff(self._label_offsets))
        pairs = np.unique(clips * self.classes + self._labels)
        return np.bincount(pairs % self.classes, minlength=self.classes).astype(np.int64)

    def gather(self, clips: npt.ArrayLike, frames: int | None = None) -> Batch:
        """The clips of these indices, padded or cut to ``frames`` rows (None: those of the set's longest clip)."""
        chosen = np.asarray(clips, np.int64)
        ids = tuple(self.video_id(clip) for clip in chosen.tolist())
        labels = self.label_matrix(chosen)
        starts, counts = self.frame_offsets[chosen], self.num_frames[chosen]
        if self.spec.level == "video":
            return Batch(ids, self.features[starts], np.ones(len(chosen), np.int32), labels)
        rows = self.longest_frames if frames is None else frames
        counts = np.minimum(counts, rows)
        longest = int(counts.max(initial=0))
        within = np.arange(longest)
        beyond = within >= counts[:, None]
        taken = self.features[np.where(beyond, 0, starts[:, None] + within)] if longest else self.features[:0]
        padded = np.zeros((len(chosen), rows, self.spec.size), np.uint8)
        padded[:, :longest] = taken.reshape(len(chosen), longest, self.spec.size)
        padded[:, :longest][beyond] = 0
        return Batch(ids, padded, counts, labels)

    def order(self, seed: int | None, epoch: int = 0) -> Indices:
        """All indices: as read, or shuffled by nothing but seed and epoch, so that a resumed run sees the same."""
        if seed is None:
            return np.arange(len(self))
        return np.random.default_rng((seed, epoch)).permutation(len(self)).astype(np.int64)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        epoch: int = 0,
        skip: int = 0,
        drop_remainder: bool = False,
        frames: int | None = None,
    ) -> Iterator[Batch]:
        """One epoch. ``skip`` leaves out its first batches at no cost (resuming); ``frames`` as in ``gather``."""
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; 1 or more is needed.")
        order = self.order(seed, epoch)
        end = len(order) - len(order) % batch_size if drop_remainder else len(order)
        for start in range(skip * batch_size, end, batch_size):
            yield self.gather(order[start : min(start + batch_size, end)], frames)


# --- finding and reading ------------------------------------------------------------------------------------------


def find_files(pattern: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    """Files of one or more patterns, sorted; a text may hold several with commas between, a folder means its
    ``*.tfrecord``. DataError where a pattern matches nothing.
    """
    if isinstance(pattern, str) and not os.path.exists(pattern):  # noqa: PTH110 (many patterns are no path: too long)
        given: list[str | Path] = [part.strip() for part in pattern.split(",") if part.strip()]
    else:
        given = [pattern] if isinstance(pattern, str | Path) else list(pattern)
    if not given:
        raise DataError(f"The pattern {pattern!r} names no file. Give one such as 'folder/*.tfrecord'.")
    found: set[Path] = set()
    for part in given:
        path = Path(part)
        if path.is_dir():
            matches = sorted(path.glob("*.tfrecord"))
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(match) for match in glob.glob(str(part), recursive=True) if Path(match).is_file()]  # noqa: PTH207
        if not matches:
            raise DataError(f"The pattern {str(part)!r} matches no file{_what_is_there(path)}.")
        found.update(matches)
    return tuple(sorted(found))


def _what_is_there(path: Path) -> str:
    folder = path if path.is_dir() else next(p for p in path.parents if not glob.has_magic(str(p)))
    if not folder.is_dir():
        return f": there is no folder {folder}"
    names = sorted(entry.name for entry in folder.iterdir())
    return f": {folder} holds {', '.join(names[:3]) if names else 'nothing'}{', ...' if len(names) > 3 else ''}"


def read_clips(
    files: Iterable[Path],
    *,
    classes: int,
    spec: FeatureSpec | None = None,
    labels: LabelSet | None = None,
    stop_on_damage: bool = False,
    memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT_BYTES,
    spill_folder: Path | None = None,
    on_file: Callable[[int], None] | None = None,
) -> ClipSet:
    """Parse every record of these files.

    Args:
        files: read in this order; the next ones are fetched while one is parsed.
        classes: V; every label must be below.
        spec: which features; default AudioSet's.
        labels: names of the classes; needed where records carry MIDs or display names instead of indices.
        stop_on_damage: raise at the first damaged record instead of counting it and going on.
        memory_limit_bytes: features beyond this go to an unnamed file in ``spill_folder`` (default: the system's
            temporary folder).
        on_file: told how many files are done, after each.

    Raises:
        DataError: no readable record at all; a record that is whole but doesn't fit (feature missing, of another
            size, label out of range); disk full; with ``stop_on_damage``, any damage. Names file and byte.
    """
    spec = spec or FeatureSpec()
    parser = _Parser(spec, classes, labels)
    damages: list[Damage] = []
    done = 0
    with _Builder(spec, classes, memory_limit_bytes, spill_folder) as builder, closing(_read_ahead(files)) as opened:
        for path, stream in opened:
            for damage in _read_file(path, stream, parser, builder):
                if stop_on_damage:
                    raise DataError(f"{damage}. Repair or remove it, or let damaged records be skipped.")
                if len(damages) < _LOGGED_DAMAGES:
                    logger.warning("Skipped: %s", damage)
                damages.append(damage)
            done += 1
            if on_file is not None:
                on_file(done)
        if len(damages) > _LOGGED_DAMAGES:
            logger.warning("%d more damaged records were skipped.", len(damages) - _LOGGED_DAMAGES)
        if builder.clips == 0:
            first = f" The first of {len(damages)} damages: {damages[0]}." if damages else ""
            raise DataError(f"None of {done} files holds a readable record.{first}")
        return builder.finish(ReadReport(done, builder.clips, tuple(damages)))


def _read_file(path: Path, stream: BinaryIO | OSError, parser: _Parser, builder: _Builder) -> Iterator[Damage]:
    if isinstance(stream, OSError):
        yield Damage(path, 0, f"can't be read: {stream.strerror or stream}")
        return
    with stream:
        try:
            for item in read_records(stream, path):
                if isinstance(item, Damage):
                    yield item
                    continue
                offset, record = item
                try:
                    parsed = parser.parse(record)
                except (_Malformed, IndexError) as error:
                    yield Damage(path, offset, f"no valid message: {error}")
                except DataError as error:
                    raise DataError(f"{path}, byte {offset}: {error}") from None
                else:
                    builder.add(parsed)
        except OSError as error:
            yield Damage(path, 0, f"can't be read to its end: {error.strerror or error}")


def _read_ahead(files: Iterable[Path]) -> Generator[tuple[Path, BinaryIO | OSError]]:
    """Each file in order; small ones were read by other threads meanwhile, large ones are opened."""

    def fetch(paths: Sequence[Path]) -> list[tuple[Path, BinaryIO | OSError]]:
        return [(path, _opened(path)) for path in paths]

    # Whole groups: a file of AudioSet's takes less time to read than to hand over between threads.
    ordered = iter(files)
    groups = iter(lambda: tuple(islice(ordered, _FILES_A_GROUP)), ())
    waiting: deque[Future[list[tuple[Path, BinaryIO | OSError]]]] = deque()
    opened: list[tuple[Path, BinaryIO | OSError]] = []
    with ThreadPoolExecutor(_READ_AHEAD_GROUPS, thread_name_prefix="read-ahead") as pool:
        try:
            waiting.extend(pool.submit(fetch, group) for group in islice(groups, _READ_AHEAD_GROUPS))
            while waiting:
                opened = waiting.popleft().result()[::-1]
                waiting.extend(pool.submit(fetch, group) for group in islice(groups, 1))
                while opened:
                    yield opened.pop()
        finally:
            for _, stream in chain(opened, *(future.result() for future in waiting)):
                if not isinstance(stream, OSError):
                    stream.close()


def _opened(path: Path) -> BinaryIO | OSError:
    try:
        return io.BytesIO(path.read_bytes()) if path.stat().st_size <= _READ_WHOLE_BYTES else path.open("rb")
    except OSError as error:
        return error


def read_records(stream: BinaryIO, path: Path) -> Iterator[tuple[int, bytes] | Damage]:
    """Unframe a TFRecord file: ``(offset, record)``, or what is damaged.

    Behind a damaged record reading goes on; where even the length is damaged, at the next header whose checksum holds.
    """
    size = stream.seek(0, os.SEEK_END)
    offset = stream.seek(0)
    while offset < size:
        header = stream.read(12)
        if len(header) < 12:
            yield Damage(path, offset, f"cut off: {size - offset} bytes are left, a header has 12")
            return
        length, check = struct.unpack("<QI", header)
        if masked_crc(header[:8]) != check:
            following = _next_header(stream, offset + 1)
            where = f"reading goes on at byte {following}" if following is not None else "the rest is lost"
            hint = "; is this a TFRecord file?" if offset == 0 and following is None else ""
            yield Damage(path, offset, f"wrong checksum of a record's length, {where}{hint}")
            if following is None:
                return
            offset = stream.seek(following)
            continue
        if offset + 16 + length > size:
            yield Damage(path, offset, f"cut off: {size - offset} of {16 + length} bytes are there")
            return
        record = stream.read(length)
        (check,) = struct.unpack("<I", stream.read(4))
        if masked_crc(record) == check:
            yield offset, record
        else:
            yield Damage(path, offset, "wrong checksum of a record's data")
        offset += 16 + length


def masked_crc(data: bytes) -> int:
    """CRC-32C, rotated and shifted as TFRecord stores it."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def _next_header(stream: BinaryIO, start: int) -> int | None:
    """Offset of the next 12 bytes from ``start`` on that are a length below 4 GiB and its checksum."""
    offset = stream.seek(start)
    block = b""
    while more := stream.read(_SCAN_BYTES):
        block += more
        at = block.find(b"\0\0\0\0", 4)  # the upper half of the length
        while 0 <= at <= len(block) - 8:
            header = block[at - 4 : at + 8]
            if masked_crc(header[:8]) == int.from_bytes(header[8:], "little"):
                return offset + at - 4
            at = block.find(b"\0\0\0\0", at + 1)
        done = max(len(block) - 11, 0)
        offset, block = offset + done, block[done:]
    return None


# --- the wire form ------------------------------------------------------------------------------------------------


class _Malformed(ValueError):
    """Bytes that are no message of the wire form."""


@dataclass(frozen=True, slots=True, eq=False)
class _Parsed:
    video_id: bytes
    labels: Sequence[int]
    start_seconds: float
    end_seconds: float
    features: list[npt.NDArray[Any]]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    byte = data[at]
    at += 1
    if byte < 0x80:
        return byte, at
    value, shift = byte & 0x7F, 7
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
        if shift > 63:
            raise _Malformed("a number is longer than ten bytes")


def _fields(data: bytes, at: int, end: int) -> list[tuple[int, int, int, int]]:
    """``(number, wire type, start, end)`` of every field of the message in ``data[at:end]``."""
    found = []
    while at < end:
        tag = data[at]
        if tag < 0x80:
            at += 1
        else:
            tag, at = _varint(data, at)
        wire = tag & 7
        start = at
        if wire == 2:
            length = data[at]  # one byte nearly always, and this loop is where reading spends its time
            if length < 0x80:
                start = at + 1
            else:
                length, start = _varint(data, at)
            at = start + length
        elif wire == 0:
            _, at = _varint(data, at)
        elif wire == 5:
            at += 4
        elif wire == 1:
            at += 8
        else:
            raise _Malformed(f"wire type {wire} is unknown")
        if at > end:
            raise _Malformed("a field reaches beyond its message")
        found.append((tag >> 3, wire, start, at))
    return found


def _map_entry(data: bytes, start: int, end: int) -> tuple[bytes, int, int]:
    """Key and span of the value of one entry of a map."""
    key, value_start, value_end = b"", end, end
    for number, wire, first, last in _fields(data, start, end):
        if wire != 2:
            raise _Malformed("a map entry holds no message")
        if number == 1:
            key = data[first:last]
        elif number == 2:
            value_start, value_end = first, last
    return key, value_start, value_end


def _feature(data: bytes, start: int, end: int) -> list[Any]:
    """Values of a ``Feature``: bytes, floats or whole numbers; empty where it holds none."""
    values: list[Any] = []
    for kind, kind_wire, first, last in _fields(data, start, end):
        if kind_wire != 2:
            raise _Malformed("a feature holds no list")
        values = []
        for number, wire, at, stop in _fields(data, first, last):
            if number != 1:
                continue
            if kind == 1 and wire == 2:
                values.append(data[at:stop])
            elif kind == 2 and wire in (2, 5):
                values.extend(np.frombuffer(_whole_floats(data[at:stop]), "<f4").tolist())
            elif kind == 3 and wire in (0, 2):
                while at < stop:
                    value, at = _varint(data, at)
                    values.append(value - (1 << 64) if value >> 63 else value)
            else:
                raise _Malformed(f"a feature list of kind {kind} holds wire type {wire}")
    return values


def _whole_floats(data: bytes) -> bytes:
    if len(data) % 4:
        raise _Malformed("a list of floats is no multiple of four bytes long")
    return data


class _Parser:
    """One record's bytes -> its values, checked against what is expected."""

    def __init__(self, spec: FeatureSpec, classes: int, labels: LabelSet | None) -> None:
        self._spec = spec
        self._classes = classes
        self._labels = labels
        self._names = tuple(name.encode() for name in spec.names)
        self._prefixes = tuple(np.frombuffer(_frame_prefix(size), np.uint8) for size in spec.sizes)

    def parse(self, data: bytes) -> _Parsed:
        """DataError where the record is whole but doesn't fit, _Malformed where it is no message at all."""
        context: dict[bytes, tuple[int, int]] = {}
        lists: dict[bytes, tuple[int, int]] = {}
        for number, wire, start, end in _fields(data, 0, len(data)):
            if number in (1, 2):
                if wire != 2:
                    raise _Malformed("it is neither a SequenceExample nor an Example")
                into = context if number == 1 else lists
                for entry, entry_wire, first, last in _fields(data, start, end):
                    if entry == 1 and entry_wire == 2:
                        key, value_start, value_end = _map_entry(data, first, last)
                        into[key] = value_start, value_end
        video_id = self._one(data, context, *(key.encode() for key in ID_KEYS))
        if not isinstance(video_id, bytes):
            raise DataError(f"The record has neither {' nor '.join(ID_KEYS)}; it holds {_keys(context, lists)}.")
        return _Parsed(
            video_id,
            self._label_indices(_feature(data, *context[b"labels"]) if b"labels" in context else []),
            self._time(self._one(data, context, b"start_time_seconds")),
            self._time(self._one(data, context, b"end_time_seconds")),
            self._frames(data, context, lists) if self._spec.level == "frame" else self._vectors(data, context, lists),
        )

    def _one(self, data: bytes, context: Mapping[bytes, tuple[int, int]], *keys: bytes) -> object:
        for key in keys:
            if key in context:
                values = _feature(data, *context[key])
                if values:
                    return values[0]
        return None

    def _time(self, value: object) -> float:
        return float(value) if isinstance(value, int | float) else float("nan")

    def _label_indices(self, values: list[Any]) -> list[int]:
        if values and isinstance(values[0], bytes):
            if self._labels is None:
                raise DataError(
                    f"The record's labels are names ({values[0].decode('utf-8', 'backslashreplace')}, ...); "
                    "give the list of classes (class_labels_indices.csv)."
                )
            values = [self._labels.index(value.decode("utf-8", "backslashreplace")) for value in values]
        for value in values:
            if not isinstance(value, int) or not 0 <= value < self._classes:
                raise DataError(f"Label {value} is out of range: there are {self._classes} classes, from 0 on.")
        return values

    def _choose(
        self, held: Mapping[bytes, object], defaults: Sequence[str], other: Mapping[bytes, object]
    ) -> tuple[bytes, ...]:
        names = self._names or tuple(key.encode() for key in defaults if key.encode() in held)[:1]
        missing = [name.decode() for name in names if name not in held] or (list(defaults) if not names else [])
        if missing:
            if self._spec.level == "frame":
                hint = "It has no frames: is it video-level?" if not held else "Name one of these."
            else:
                hint = "It has frames: is it frame-level?" if other else "Name one of these."
            raise DataError(
                f"The record lacks the {self._spec.level}-level feature {' or '.join(missing)}; it holds "
                f"{_keys(held, other)}. {hint}"
            )
        return names

    def _frames(
        self, data: bytes, context: Mapping[bytes, tuple[int, int]], lists: Mapping[bytes, tuple[int, int]]
    ) -> list[npt.NDArray[Any]]:
        features: list[npt.NDArray[Any]] = []
        for name, size, prefix in zip(
            self._choose(lists, FRAME_KEYS, context), self._spec.sizes, self._prefixes, strict=True
        ):
            start, end = lists[name]
            stride = len(prefix) + size
            if (end - start) % stride == 0:
                framed = np.frombuffer(data, np.uint8, end - start, start).reshape(-1, stride)
                if (framed[:, : len(prefix)] == prefix).all():
                    features.append(framed[: self._spec.max_frames, len(prefix) :])
                    continue
            features.append(self._frames_one_by_one(data, start, end, name, size))
        if len({len(feature) for feature in features}) > 1:
            counts = ", ".join(f"{n.decode()} {len(f)}" for n, f in zip(self._names, features, strict=True))
            raise DataError(f"The record's features have different numbers of frames: {counts}.")
        return features

    def _frames_one_by_one(self, data: bytes, start: int, end: int, name: bytes, size: int) -> UInt8Array:
        frames: list[bytes] = []
        for number, wire, first, last in _fields(data, start, end):
            if number != 1 or wire != 2:
                continue
            values = _feature(data, first, last)
            if len(values) != 1 or not isinstance(values[0], bytes):
                raise DataError(f"A frame of feature {name.decode()} is not one string of bytes.")
            if len(values[0]) != size:
                raise DataError(
                    f"Feature {name.decode()} has frames of {len(values[0])} bytes; {size} are expected. "
                    "Give its true size."
                )
            frames.append(values[0])
        return np.frombuffer(b"".join(frames[: self._spec.max_frames]), np.uint8).reshape(-1, size)

    def _vectors(
        self, data: bytes, context: Mapping[bytes, tuple[int, int]], lists: Mapping[bytes, tuple[int, int]]
    ) -> list[npt.NDArray[Any]]:
        features: list[npt.NDArray[Any]] = []
        for name, size in zip(self._choose(context, VIDEO_KEYS, lists), self._spec.sizes, strict=True):
            values = _feature(data, *context[name])
            if len(values) != size or not isinstance(values[0], float):
                raise DataError(
                    f"Feature {name.decode()} holds {len(values)} values; {size} floats are expected. "
                    "Give its true size."
                )
            features.append(np.array(values, np.float32)[None])
        return features


def _keys(*held: Mapping[bytes, object]) -> str:
    names = [key.decode("utf-8", "backslashreplace") for mapping in held for key in mapping]
    return ", ".join(sorted(names)) or "nothing"


# --- packing ------------------------------------------------------------------------------------------------------


class _Builder:
    """Parsed clips, one by one -> packed arrays; features beyond the limit go to an unnamed file."""

    def __init__(self, spec: FeatureSpec, classes: int, memory_limit_bytes: int, spill_folder: Path | None) -> None:
        self.clips = 0
        self._spec = spec
        self._classes = classes
        self._limit_bytes = memory_limit_bytes
        self._folder = spill_folder or Path(tempfile.gettempdir())
        self._dtype = np.dtype(np.uint8 if spec.level == "frame" else np.float32)
        self._pending: list[_Parsed] = []
        self._pending_bytes = 0
        self._rows = 0
        self._blocks: list[npt.NDArray[Any]] = []
        self._file: BinaryIO | None = None
        self._ids: list[bytes] = []
        self._id_bytes: list[npt.NDArray[np.int64]] = []
        self._frames: list[npt.NDArray[np.int64]] = []
        self._labels: list[npt.NDArray[np.int32]] = []
        self._label_counts: list[npt.NDArray[np.int64]] = []
        self._times: list[Float32Array] = []

    def __enter__(self) -> _Builder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, parsed: _Parsed) -> None:
        self.clips += 1
        self._pending.append(parsed)
        self._pending_bytes += sum(feature.nbytes for feature in parsed.features)
        if len(self._pending) >= _CLIPS_PER_PART or self._pending_bytes >= _PART_BYTES:
            self._pack()

    def _pack(self) -> None:
        clips = self._pending
        if not clips:
            return
        counts = [len(clip.features[0]) for clip in clips]
        block = np.empty((sum(counts), self._spec.size), self._dtype)
        column = 0
        for i, size in enumerate(self._spec.sizes):
            np.concatenate([clip.features[i] for clip in clips], out=block[:, column : column + size])
            column += size
        self._ids.append(b"".join(clip.video_id for clip in clips))
        self._id_bytes.append(np.array([len(clip.video_id) for clip in clips], np.int64))
        self._frames.append(np.array(counts, np.int64))
        self._labels.append(np.array([label for clip in clips for label in clip.labels], np.int32))
        self._label_counts.append(np.array([len(clip.labels) for clip in clips], np.int64))
        self._times.append(np.array([(clip.start_seconds, clip.end_seconds) for clip in clips], np.float32))
        self._pending, self._pending_bytes = [], 0
        self._store(block)

    def _store(self, block: npt.NDArray[Any]) -> None:
        self._rows += len(block)
        self._blocks.append(block)
        if self._file is None and self._rows * self._spec.size * self._dtype.itemsize <= self._limit_bytes:
            return
        try:
            if self._file is None:
                logger.info("Features exceed %d bytes; they go on in a file in %s.", self._limit_bytes, self._folder)
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  # closed in __exit__
            for kept in self._blocks:
                self._file.write(kept.data)
        except OSError as error:
            raise DataError(
                f"Features exceed the memory limit of {self._limit_bytes} bytes and can't be kept in {self._folder}: "
                f"{error.strerror or error}. Raise the limit, or name a folder with more space."
            ) from error
        self._blocks = []

    def _features(self) -> npt.NDArray[Any]:
        shape = (self._rows, self._spec.size)
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                raise DataError(f"The disk of {self._folder} is full: {error.strerror or error}.") from error
            return np.memmap(self._file, self._dtype, "r", shape=shape)
        features = np.empty(shape, self._dtype)
        at = 0
        for block in reversed(self._blocks):  # freed as they go, so that the peak is one copy
            at += len(block)
            features[self._rows - at : self._rows - at + len(block)] = block
            self._blocks.pop()
        return features

    def finish(self, report: ReadReport) -> ClipSet:
        self._pack()
        return ClipSet(
            video_ids=b"".join(self._ids),
            id_offsets=_offsets(self._id_bytes),
            features=self._features(),
            frame_offsets=_offsets(self._frames),
            labels=np.concatenate(self._labels),
            label_offsets=_offsets(self._label_counts),
            times_seconds=np.concatenate(self._times),
            classes=self._classes,
            spec=self._spec,
            report=report,
        )


def _offsets(counts: list[npt.NDArray[np.int64]]) -> Indices:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(counts))])


# --- writing ------------------------------------------------------------------------------------------------------


def encode_clip(
    video_id: str,
    features: UInt8Array | Mapping[str, UInt8Array],
    labels: Sequence[int] | Sequence[str] = (),
    *,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    id_key: str = "video_id",
) -> bytes:
    """One clip as a ``SequenceExample``, byte for byte as AudioSet published them.

    The published records hold their four context keys in one of four rotations of one order; this is the commonest.

    Args:
        video_id: name of the clip.
        features: ``(n, D)`` uint8, or one such array for each of 1 to 8 keys, all with the same n. The key of a bare
            array goes with ``id_key``: ``audio_embedding`` or ``audio``.
        labels: class indices; or MIDs or display names (then a reader needs the list of classes).
        start_seconds, end_seconds: where in its source the clip lies; None leaves the key out.
        id_key: ``video_id`` (AudioSet) or ``id`` (YouTube-8M).
    """
    named = (
        features if isinstance(features, Mapping) else {dict(zip(ID_KEYS, FRAME_KEYS, strict=True))[id_key]: features}
    )
    if not 1 <= len(named) <= MAX_FEATURES or len({len(frames) for frames in named.values()}) != 1:
        raise ValueError(f"1 to {MAX_FEATURES} features with the same number of frames are needed")
    lists = b""
    for name, frames in named.items():
        if frames.dtype != np.uint8 or frames.ndim != 2:
            raise ValueError(f"{name} is {frames.dtype} {frames.shape}; uint8 (n, D) is needed")
        prefix = np.frombuffer(_frame_prefix(frames.shape[1]), np.uint8)
        framed = np.empty((len(frames), len(prefix) + frames.shape[1]), np.uint8)
        framed[:, : len(prefix)], framed[:, len(prefix) :] = prefix, frames
        lists += _message(1, _message(1, name.encode()) + _message(2, framed.tobytes()))
    context = [(id_key, _message(1, _message(1, video_id.encode())))]
    if start_seconds is not None:
        context.append(("start_time_seconds", _floats([start_seconds])))
    context.append(("labels", _label_list(labels)))
    if end_seconds is not None:
        context.append(("end_time_seconds", _floats([end_seconds])))
    return _message(1, b"".join(_entry(name, value) for name, value in context)) + _message(2, lists)


def encode_video(
    video_id: str,
    features: Float32Array | Mapping[str, Float32Array],
    labels: Sequence[int] | Sequence[str] = (),
    *,
    id_key: str = "id",
) -> bytes:
    """One clip as a video-level ``Example``: ``(D,)`` float32, or one for each key (a bare one is ``mean_audio`` with
    ``id``, ``mean_audio_embedding`` with ``video_id``); the rest as in ``encode_clip``.
    """
    named = (
        features if isinstance(features, Mapping) else {dict(zip(ID_KEYS, VIDEO_KEYS, strict=True))[id_key]: features}
    )
    entries = [_entry(id_key, _message(1, _message(1, video_id.encode()))), _entry("labels", _label_list(labels))]
    for name, values in named.items():
        if values.ndim != 1:
            raise ValueError(f"{name} has shape {values.shape}; (D,) is needed")
        entries.append(_entry(name, _floats(values.tolist())))
    return _message(1, b"".join(entries))


def _varint_bytes(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _message(number: int, content: bytes) -> bytes:
    return _varint_bytes(number << 3 | 2) + _varint_bytes(len(content)) + content


def _entry(name: str, feature: bytes) -> bytes:
    return _message(1, _message(1, name.encode()) + _message(2, feature))


def _floats(values: Sequence[float]) -> bytes:
    return _message(2, _message(1, struct.pack(f"<{len(values)}f", *values)))


def _label_list(labels: Sequence[int] | Sequence[str]) -> bytes:
    names = [label for label in labels if isinstance(label, str)]
    indices = [label for label in labels if not isinstance(label, str)]
    if names and indices:
        raise ValueError("labels are either all indices or all names")
    if names:
        return _message(1, b"".join(_message(1, name.encode()) for name in names))
    if any(index < 0 for index in indices):
        raise ValueError(f"label indices must not be negative: {indices}")
    packed = b"".join(_varint_bytes(int(index)) for index in indices)
    return _message(3, _message(1, packed) if packed else b"")


def _frame_prefix(size: int) -> bytes:
    """What stands before every frame of ``size`` bytes in a feature list."""
    return _message(1, _message(1, _message(1, bytes(size))))[: -size or None]


class RecordWriter:
    """A TFRecord file that is there whole or not at all: written beside ``path``, then put in its place.

    Raises DataError where the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._file: BinaryIO | None = None

    def __enter__(self) -> RecordWriter:
        try:
            self._file = self._partial.open("wb")
        except OSError as error:
            raise self._refused(error) from error
        return self

    def write(self, record: bytes) -> None:
        """Append one record, framed and with its checksums."""
        assert self._file is not None
        header = struct.pack("<Q", len(record))
        try:
            self._file.write(header + struct.pack("<I", masked_crc(header)) + record)
            self._file.write(struct.pack("<I", masked_crc(record)))
        except OSError as error:
            raise self._refused(error) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._file is not None
        try:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                self._partial.replace(self._path)
        except OSError as failure:
            raise self._refused(failure) from failure
        finally:
            with suppress(OSError):  # what its buffer still holds may not fit either
                self._file.close()
            self._partial.unlink(missing_ok=True)

    def _refused(self, error: OSError) -> DataError:
        return DataError(f"{self._path} can't be written: {error.strerror or error}.")
