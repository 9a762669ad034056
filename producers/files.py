"""Recordings as streams: each file one stream, many at once, at the pace of life or as fast as the bus takes them.

One thread serves all files in the order in which their chunks are due, so that a thousand files cost a thousand open
files and no threads. A file that can't be read is reported, and the others go on.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from detector.audio import Int16Array, open_16k
from detector.chunk import CHUNK_SAMPLES, CHUNK_SECONDS, RATE_HZ, Location
from detector.errors import AudioError, ChunkError, ConfigError
from producers.publish import Publisher, StreamPublisher
from producers.source import Block, samples_to_ns

_log = logging.getLogger(__name__)

# What is looked for in folders; a file named on the command line is tried whatever its name.
# fmt: off
AUDIO_SUFFIXES = frozenset(
    (
        ".3gp", ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".alac", ".amr", ".ape", ".au", ".avi", ".caf",
        ".flac", ".gsm", ".m4a", ".m4b", ".mka", ".mkv", ".mov", ".mp2", ".mp3", ".mp4", ".mpc", ".mpeg",
        ".mpg", ".oga", ".ogg", ".opus", ".ra", ".rf64", ".snd", ".spx", ".tta", ".voc", ".w64", ".wav",
        ".wave", ".webm", ".wma", ".wv",
    )
)
# fmt: on
_PLACEHOLDERS = ("stem", "name", "parent", "path", "index")
FAST_OPEN_FILES = 64
_LATE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class FileStream:
    """A file and the id of the stream it becomes."""

    path: Path
    stream_id: str


@dataclass(frozen=True, slots=True)
class FilesPlayed:
    """How it went. ``failures``: message for each file that failed, by path."""

    files: int
    failures: dict[Path, str]


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Files as they stand, folders as the audio files below them, sorted. ConfigError: a folder without any."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES and p.is_file())
        if not inside:
            raise ConfigError(f"{path}: holds no audio files ({', '.join(sorted(AUDIO_SUFFIXES)[:6])}, ...).")
        found += inside
    return found


def name_streams(paths: Sequence[Path], pattern: str | None = None) -> list[FileStream]:
    """Give each file a stream id.

    ``pattern``: text with ``{stem} {name} {parent} {path} {index}``; None: the stem, or where stems are not unique
    parent/stem, or the path. Raises ConfigError for an unknown placeholder, or where two files would get the same id.
    """
    if pattern is not None:
        return _named(paths, pattern)
    for tried in ("{stem}", "{parent}/{stem}"):
        with contextlib.suppress(ConfigError):
            return _named(paths, tried)
    return _named(paths, "{path}")


def _named(paths: Sequence[Path], pattern: str) -> list[FileStream]:
    named: dict[str, Path] = {}
    for index, path in enumerate(paths):
        try:
            stream_id = pattern.format(
                stem=path.stem, name=path.name, parent=path.absolute().parent.name, path=path, index=index
            )
        except (KeyError, IndexError, ValueError, AttributeError):
            known = " ".join(f"{{{name}}}" for name in _PLACEHOLDERS)
            raise ConfigError(f"Stream id pattern {pattern!r} is not understood; there are {known}.") from None
        if stream_id in named:
            raise ConfigError(
                f"{named[stream_id]} and {path} both become stream {stream_id!r}; "
                "use --stream-id with {index}, {parent} or {path}."
            )
        named[stream_id] = path
    return [FileStream(path, stream_id) for stream_id, path in named.items()]


@dataclass(slots=True)
class _Playing:
    """A file that is being played. ``ahead``: its next block, read before it is due."""

    file: FileStream
    stream: StreamPublisher
    began_seconds: float
    start_ns: int
    close: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    blocks: Iterator[Int16Array] = field(default_factory=lambda: iter(()))
    ahead: Int16Array | None = None
    starts_session: bool = True
    position: int = 0  # samples played, over all rounds

    def open(self) -> None:
        """(Re)open the file. Raises AudioError."""
        self.close.close()
        self.blocks = _recut(self.close.enter_context(open_16k(self.file.path)))
        self.starts_session = True

    def read(self) -> bool:
        """Read the next block; False at the end. Raises AudioError."""
        self.ahead = next(self.blocks, None)
        return self.ahead is not None

    @property
    def due_seconds(self) -> float:
        """When the last sample of the block ahead has been "captured"."""
        return self.began_seconds + (self.position + (0 if self.ahead is None else len(self.ahead))) / RATE_HZ

    def write(self) -> None:
        if self.ahead is not None:
            self.stream.write(Block(self.ahead, self.start_ns + samples_to_ns(self.position), self.starts_session))
            self.starts_session = False
            self.position += len(self.ahead)
            self.ahead = None


def _recut(blocks: Iterator[Int16Array]) -> Iterator[Int16Array]:
    """Blocks of any size -> blocks of exactly one chunk, the last one shorter."""
    parts: list[Int16Array] = []
    held = 0
    failure: AudioError | None = None
    while True:
        try:
            block = next(blocks, None)
        except AudioError as e:  # what came before it counts
            failure, block = e, None
        if block is None:
            break
        taken = 0
        while taken < len(block):
            part = block[taken : taken + CHUNK_SAMPLES - held]
            parts.append(part)
            held += len(part)
            taken += len(part)
            if held == CHUNK_SAMPLES:
                yield np.concatenate(parts)
                parts, held = [], 0
    if held:
        yield np.concatenate(parts)
    if failure is not None:
        raise failure


class FilePlayer:
    """Plays files into a publisher.

    Args:
        realtime: a chunk is published when its last sample would have been captured; else at once.
        loop: each file starts again at its end, as a new session (its end and its beginning do not belong together).
        start_ns: capture time of each file's first sample, Unix nanoseconds; None: the time at which it starts to play.
            With ``realtime`` off capture times run ahead of the clock.
        spread: the files start spread over the length of a chunk, as sensors would; else all at once, in step.
        open_files: how many are open at once when not in real time.
    """

    def __init__(
        self,
        files: Sequence[FileStream],
        publisher: Publisher,
        *,
        realtime: bool,
        loop: bool = False,
        start_ns: int | None = None,
        spread: bool = False,
        location: Location | None = None,
        clock_error_seconds: float | None = None,
        canary: str | None = None,
        open_files: int = FAST_OPEN_FILES,
        wall_ns: Callable[[], int] = time.time_ns,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files = files
        self._publisher = publisher
        self._realtime = realtime
        self._loop = loop
        self._start_ns = start_ns
        self._spread = spread
        self._location = location
        self._clock_error_seconds = clock_error_seconds
        self._canary = canary
        self._open_files = len(files) if realtime or loop else open_files
        self._wall_ns = wall_ns
        self._monotonic = monotonic
        self._failures: dict[Path, str] = {}
        self._order = itertools.count()
        self._late = False

    def run(self, stop: threading.Event) -> FilesPlayed:
        """Play until all files have ended, ``stop`` is set, or the publisher fails."""
        waiting = iter(enumerate(self._files))
        playing: list[tuple[float, int, _Playing]] = []
        began_seconds, began_ns = self._monotonic(), self._wall_ns()
        try:
            while not stop.is_set() and not self._publisher.failed:
                while len(playing) < self._open_files and (entry := next(waiting, None)) is not None:
                    offset_seconds = CHUNK_SECONDS * entry[0] / len(self._files) if self._spread else 0.0
                    self._begin(entry[1], began_seconds + offset_seconds, began_ns + int(offset_seconds * 1e9), playing)
                    if stop.is_set():
                        break
                if not playing:
                    break
                due_seconds, _, file = playing[0]
                if self._realtime and not self._wait(due_seconds, stop):
                    break
                heapq.heappop(playing)
                file.write()
                self._go_on(file, playing)
        finally:
            for _, _, file in playing:
                file.stream.end_session()
                file.close.close()
        return FilesPlayed(len(self._files), dict(self._failures))

    def _wait(self, due_seconds: float, stop: threading.Event) -> bool:
        wait_seconds = due_seconds - self._monotonic()
        if wait_seconds > 0:
            return not stop.wait(wait_seconds)
        if wait_seconds < -_LATE_SECONDS and not self._late:
            self._late = True
            _log.warning("Playing %.1f s behind: this machine is too slow for so many files.", -wait_seconds)
        return not stop.is_set()

    def _begin(
        self, file: FileStream, began_seconds: float, began_ns: int, playing: list[tuple[float, int, _Playing]]
    ) -> None:
        try:
            stream = self._publisher.stream(
                file.stream_id,
                location=self._location,
                clock_error_seconds=self._clock_error_seconds,
                canary=self._canary,
                waits=not self._realtime,
            )
        except ChunkError as e:
            self._fail(file, f"{file.path}: {e}")
            return
        opened = _Playing(file, stream, began_seconds, began_ns if self._start_ns is None else self._start_ns)
        try:
            opened.open()
        except AudioError as e:
            self._fail(file, str(e))
            return
        self._go_on(opened, playing)

    def _go_on(self, file: _Playing, playing: list[tuple[float, int, _Playing]]) -> None:
        """Read on, and queue what is next; or end the file."""
        try:
            more = file.read()
            if not more and self._loop:
                file.stream.end_session()
                file.open()
                more = file.read()
        except AudioError as e:
            self._fail(file.file, str(e))
            more = False
        if more:
            due_seconds = file.due_seconds if self._realtime else 0.0
            heapq.heappush(playing, (due_seconds, next(self._order), file))
        else:
            file.stream.end_session()
            file.close.close()

    def _fail(self, file: FileStream, why: str) -> None:
        self._failures[file.path] = why
        _log.error("%s", why)
