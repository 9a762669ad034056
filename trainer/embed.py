"""Recordings -> embeddings in AudioSet's published TFRecord form, resumable at any moment.

Threads read, resample and frame; one network embeds what they deliver. Each finished recording is kept in a journal
(SQLite) beside the output, so that a run that was killed goes on where it was and later runs embed only what is new or
changed. The TFRecord files are written from the journal at the end, in the order of the plan: whatever happened in
between, the bytes are those of one undisturbed run. A clip never shares a batch with another for the same reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import itertools
import json
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from detector.audio import AudioReader, FloatArray, ReferenceResampler, float_to_int16, open_audio, to_mono
from detector.chunk import RATE_HZ
from detector.embedders.params import EMBEDDING_SIZE, EXAMPLE_HOP_SAMPLES, EXAMPLE_SAMPLES
from detector.errors import AudioError, ConfigError, DataError, GunfireError, ModelError
from trainer.recordings import Recording
from trainer.records import RecordWriter, encode_clip

if TYPE_CHECKING:
    from detector.embedders.postprocess import Pca
    from detector.model import Model

logger = logging.getLogger(__name__)

VGGISH = "vggish"
EXAMPLE_SECONDS = EXAMPLE_SAMPLES / RATE_HZ
"""The shortest clip that can be embedded."""

_READ_SECONDS = 30.0  # resampled at once: each call of the resampler costs as much as half a second of sound
_BEYOND_SAMPLES = RATE_HZ // 10  # a stretch may end this much after its recording: lists give rounded times
_QUEUED_CLIPS_A_WORKER = 4
_JOURNAL_VERSION = 1
_TFRECORD = ".tfrecord"

UInt8Array = npt.NDArray[np.uint8]


class ClipNetwork(Protocol):
    """Clips -> quantised embeddings, in two steps so that the first can run beside the network.

    Attributes:
        identity: hash of everything that decides on the result.
    """

    identity: str

    def prepare(self, x: FloatArray) -> npt.NDArray[Any]:
        """``(n,)`` samples in [-1, 1] at 16 kHz, n >= 15,600 -> what the network takes; in any thread."""

    def embed(self, prepared: npt.NDArray[Any]) -> UInt8Array:
        """-> ``(E, 128)`` uint8."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Something wanted that could not be embedded. ``where``: list and line that asked for it, if any."""

    path: str
    error: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.error}" if self.where else self.error


@dataclass(slots=True)
class EmbedReport:
    """What a run did.

    Attributes:
        recordings: how many were asked for.
        done_before: of these, embedded by an earlier run and unchanged since.
        changed: embedded again because the file or what is wanted of it changed.
        clips, examples: in the output, of all runs.
        clip_seconds: audio in the output, of all runs.
        embedded_seconds: audio embedded by this run.
        wall_seconds: this run's time for that, from the first file to the last record.
        left_out_seconds: ends of cut recordings, shorter than one example.
        renamed: recordings whose file name another one has too -> the start of their ``video_id``.
        notes: recordings that could be read only in part, and why.
        outputs: files written.
    """

    recordings: int
    done_before: int = 0
    changed: int = 0
    clips: int = 0
    examples: int = 0
    clip_seconds: float = 0.0
    embedded_seconds: float = 0.0
    wall_seconds: float = 0.0
    left_out_seconds: float = 0.0
    renamed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    @property
    def realtime_factor(self) -> float | None:
        """Seconds of audio a second; None where nothing had to be embedded."""
        return self.embedded_seconds / self.wall_seconds if self.embedded_seconds and self.wall_seconds else None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: recordings done, their bytes, seconds of audio embedded."""

    recordings: int
    file_bytes: int
    audio_seconds: float


def embed_recordings(
    recordings: Sequence[Recording],
    network: ClipNetwork,
    output: Path,
    *,
    shards: int = 1,
    workers: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> EmbedReport:
    """Embed all recordings and write their TFRecord files.

    Args:
        recordings: as ``trainer.recordings.gather`` gives them; the output has their order.
        output: a file ``*.tfrecord``, or a folder for ``shards`` files ``embeddings-00000-of-00001.tfrecord``.
        shards: how many files; never more than there are clips.
        workers: threads that read; None: one a processor.
        on_progress: told after each recording.

    Nothing is written where not one clip could be embedded: see the report's failures.
    Raises ConfigError where ``output`` can't serve, DataError where disk or journal refuse.
    """
    journal_path = _journal_path(output, shards)
    started = time.monotonic()
    report = EmbedReport(len(recordings))
    with contextlib.closing(_Journal(journal_path)) as journal:
        _files(output, shards, journal)  # refuse now what could not be written at the end
        journal.begin(network.identity)
        results: dict[Path, _Result] = {}
        unread: dict[Path, str] = {}
        todo: list[Recording] = []
        done_bytes = 0
        for recording in recordings:
            known = journal.find(recording)
            if isinstance(known, _Result):
                results[recording.path] = known
                report.done_before += 1
                done_bytes += _state(recording.path)[0]
            else:
                todo.append(recording)
                report.changed += known == "changed"

        def told(count: int) -> None:
            if on_progress is not None:
                on_progress(Progress(count, done_bytes, report.embedded_seconds))

        told(report.done_before)
        with contextlib.closing(_embedded(todo, network, workers or os.cpu_count() or 1)) as embedded:
            for count, one in enumerate(embedded, report.done_before + 1):
                if one.error is not None:
                    unread[one.recording.path] = str(one.error)
                else:
                    journal.keep(one)
                    results[one.recording.path] = one.result
                    report.embedded_seconds += one.result.clip_seconds
                done_bytes += one.state[0]
                told(count)
        _account(recordings, results, unread, report)
        if report.clips:
            _assemble(recordings, results, journal, output, shards, report)
    report.wall_seconds = time.monotonic() - started
    return report


# --- networks -----------------------------------------------------------------------------------------------------


class VggishClips:
    """The way AudioSet's features were made: float64 front end, VGGish, PCA, uint8. A clip is one batch."""

    def __init__(self, tensors: Mapping[str, npt.NDArray[np.float32]], pca: Pca) -> None:
        from detector.embedders import build_network
        from detector.embedders.clip import ClipEmbedder

        self._embedder = ClipEmbedder(build_network("vggish", tensors), pca)
        digest = hashlib.sha256(b"vggish")
        for values in (*(tensors[name] for name in sorted(tensors)), pca.eigen_vectors, pca.means):
            digest.update(np.ascontiguousarray(values).data)
        self.identity = digest.hexdigest()

    def prepare(self, x: FloatArray) -> npt.NDArray[np.float32]:
        """``(n,)`` -> ``(E, 96, 64)`` log-mel examples."""
        from detector.embedders.log_mel import log_mel_examples

        return log_mel_examples(x).astype(np.float32)

    def embed(self, prepared: npt.NDArray[np.float32]) -> UInt8Array:
        """``(E, 96, 64)`` -> ``(E, 128)``."""
        quantised = self._embedder.embed_examples(prepared).quantised
        assert quantised is not None
        return quantised


class PackageClips:
    """A model package's own embedder exactly as the detector serves it: int16 in, its front end, network and PCA.

    Raises ModelError for a package whose embeddings are not quantised: the record form has bytes only.
    """

    def __init__(self, model: Model) -> None:
        section, name = model.manifest.postprocess, model.name
        if section.kind != "pca_quantise":
            raise ModelError(
                f"Model {name} makes embeddings that are not quantised (postprocess: {section.kind}). Records hold "
                "bytes, and so do the features classifiers are trained on: give --embedder vggish, or a package with "
                "pca_quantise."
            )
        self._model = model
        self.identity = f"package {model.sha256}"

    def prepare(self, x: FloatArray) -> npt.NDArray[np.int16]:
        """``(n,)`` -> ``(E, 15600)`` int16."""
        pcm = float_to_int16(x)
        windows = np.lib.stride_tricks.sliding_window_view(pcm, EXAMPLE_SAMPLES)[::EXAMPLE_HOP_SAMPLES]
        return np.ascontiguousarray(windows, np.int16)

    def embed(self, prepared: npt.NDArray[np.int16]) -> UInt8Array:
        """``(E, 15600)`` -> ``(E, 128)``: the bytes that stand for what the model's classifier sees."""
        from detector.embedders.postprocess import dequantise

        table = dequantise(np.arange(256, dtype=np.uint8))
        steps = (self._model.embed(prepared).astype(np.float64) - table[0]) / (float(table[1]) - float(table[0]))
        return np.asarray(np.rint(steps), np.uint8)


def open_network(
    embedder: str, *, checkpoint: Path | None = None, pca_params: Path | None = None, store: Path | None = None
) -> ClipNetwork:
    """A network by name.

    Args:
        embedder: ``vggish``; or a package with quantised embeddings (a shipped model's name, or a folder).
        checkpoint: VGGish's weights (TensorFlow checkpoint or safetensors) instead of the fetched ones.
        pca_params: ``vggish_pca_params.npz`` instead of the fetched one.
        store: folder of fetched weights; None: the usual one.

    Raises ModelError where weights are missing, damaged or others, ConfigError for options that don't go together.
    """
    from detector.model import load_model

    if embedder != VGGISH:
        if checkpoint is not None or pca_params is not None:
            raise ConfigError(f"--checkpoint and --pca-params are VGGish's; --embedder {embedder} brings its own.")
        return PackageClips(load_model(embedder, store=store))
    from detector.checkpoint import read_checkpoint, read_safetensors
    from detector.embedders.postprocess import read_pca
    from detector.embedders.vggish import VGGISH_SHAPES
    from detector.fetch import PCA_NAME, WEIGHTS_NAME
    from detector.store import default_store, locked_file

    store = store or default_store()
    weights = checkpoint or locked_file(store, WEIGHTS_NAME)[0]
    pca = read_pca(pca_params or locked_file(store, PCA_NAME)[0])
    read = read_safetensors if weights.suffix == ".safetensors" else read_checkpoint
    return VggishClips(read(weights, VGGISH_SHAPES), pca)


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Span:
    """A clip: of which stretch, and where it lies in the recording."""

    stretch: int
    start_seconds: float
    end_seconds: float


@dataclass(slots=True)
class _Result:
    """All clips of one recording. Their embeddings are in the journal, or on the way there."""

    spans: list[_Span] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)
    failures: list[tuple[int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out_seconds: float = 0.0

    @property
    def clip_seconds(self) -> float:
        return sum(span.end_seconds - span.start_seconds for span in self.spans)


@dataclass(slots=True)
class _Reading:
    """What reading one recording finds besides its clips; complete at its end."""

    failures: list[tuple[int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out_samples: int = 0


class _Tape:
    """The last part of a growing sound."""

    def __init__(self) -> None:
        self.end = 0  # samples from the recording's start
        self._start = 0
        self._blocks: list[FloatArray] = []

    def append(self, block: FloatArray) -> None:
        self._blocks.append(block)
        self.end += len(block)

    def take(self, start: int, end: int) -> FloatArray:
        """Samples ``start`` to ``end`` of the recording."""
        if len(self._blocks) > 1:
            self._blocks = [np.concatenate(self._blocks)]
        return self._blocks[0][start - self._start : end - self._start]

    def forget(self, before: int) -> None:
        """Samples before this one are not asked for any more."""
        while self._blocks and self._start + len(self._blocks[0]) <= before:
            self._start += len(self._blocks.pop(0))
        if self._blocks and before > self._start:
            self._blocks[0] = self._blocks[0][before - self._start :].copy()
            self._start = before


def _clips_of(recording: Recording, reading: _Reading) -> Iterator[tuple[_Span, FloatArray]]:
    """Every clip of a recording as ``(n,) float64`` at 16 kHz, by the end of it, in one pass and bounded memory.

    Raises AudioError where the file can't be read.
    """
    length = None if recording.clip_seconds is None else round(recording.clip_seconds * RATE_HZ)
    # (end, start, stretch, whether the stretch goes on after it); an end of infinity is the recording's own
    windows: list[tuple[float, int, int, bool]] = []
    found = [0] * len(recording.stretches)

    def want(stretch: int, start: int) -> None:
        end = recording.stretches[stretch].end_seconds
        if end is not None:
            heapq.heappush(windows, (round(end * RATE_HZ), start, stretch, False))
        else:
            heapq.heappush(windows, (float("inf") if length is None else start + length, start, stretch, True))

    def clip(stretch: int, start: int, end: int) -> tuple[_Span, FloatArray]:
        found[stretch] += 1
        x = tape.take(start, end)
        return _Span(stretch, start / RATE_HZ, end / RATE_HZ), np.pad(x, (0, max(EXAMPLE_SAMPLES - len(x), 0)))

    for i, stretch in enumerate(recording.stretches):
        want(i, round(stretch.start_seconds * RATE_HZ))
    tape = _Tape()
    shortest = 1 if recording.pad_short else EXAMPLE_SAMPLES
    with open_audio(recording.path) as reader, contextlib.closing(_blocks_16k(reader)) as blocks:
        for block in blocks:
            tape.append(block)
            while windows and windows[0][0] <= tape.end:
                end, start, i, goes_on = heapq.heappop(windows)
                if end - start >= shortest:
                    yield clip(i, start, int(end))
                else:
                    reading.failures.append((i, _too_short(recording.path, end - start)))
                if goes_on:
                    want(i, int(end))
            if not windows:
                break
            tape.forget(min(window[1] for window in windows))
        reading.notes += [f"{recording.path}: {note}" for note in reader.notes if "clipped" not in note]
    for end, start, i, goes_on in sorted(windows):
        there = tape.end - start
        if start >= tape.end and not (goes_on and found[i]):
            what = f"starts at {start / RATE_HZ:g} s"
        elif not goes_on and end > tape.end + _BEYOND_SAMPLES:
            what = f"ends at {end / RATE_HZ:g} s"
        elif there >= (EXAMPLE_SAMPLES if found[i] else shortest):
            yield clip(i, start, tape.end)
            continue
        elif found[i]:
            reading.left_out_samples += max(there, 0)
            continue
        else:
            reading.failures.append((i, _too_short(recording.path, there)))
            continue
        seconds = tape.end / RATE_HZ
        reading.failures.append((i, f"The stretch {what}, but {recording.path} has only {seconds:g} s."))


def _blocks_16k(reader: AudioReader) -> Generator[FloatArray, None, None]:
    """The whole sound, mono at 16 kHz, float64: ``detector.audio.clip_16k`` in bounded memory."""
    resampler = None if reader.rate_hz == RATE_HZ else ReferenceResampler(reader.rate_hz)
    waiting: list[FloatArray] = []
    wanted, held = round(_READ_SECONDS * reader.rate_hz), 0
    for block in reader.blocks(_READ_SECONDS):
        waiting.append(to_mono(block))
        held += len(block)
        if held >= wanted:
            x = np.concatenate(waiting)
            yield x if resampler is None else resampler.process(x)
            waiting, held = [], 0
    x = np.concatenate(waiting) if waiting else np.zeros(0)
    if resampler is None:
        yield x
        return
    yield resampler.process(x)
    yield resampler.finish()


def _too_short(path: Path, samples: float) -> str:
    return (
        f"{path}: {samples / RATE_HZ:.3f} s are shorter than one example ({EXAMPLE_SECONDS:g} s). Leave it out, or "
        "let silence be appended (--pad-short)."
    )


def _state(path: Path) -> tuple[int, int]:
    """``(size, mtime_ns)``: what tells that a file changed; zeros where it is not there."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


# --- readers beside one network -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Clip:
    recording: int
    span: _Span
    prepared: npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class _End:
    """A recording is read to its end, or ``error`` says why not."""

    recording: int
    state: tuple[int, int]
    reading: _Reading
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class _Embedded:
    """A recording that is done. ``state`` is the file's before it was read; ``error`` says why it can't be read."""

    recording: Recording
    state: tuple[int, int]
    result: _Result
    features: bytes
    error: AudioError | None


def _embedded(recordings: Sequence[Recording], network: ClipNetwork, workers: int) -> Generator[_Embedded, None, None]:
    """Every recording, in the order in which they get done."""
    delivered: queue.Queue[_Clip | _End] = queue.Queue(_QUEUED_CLIPS_A_WORKER * workers)
    stopping = threading.Event()

    def deliver(item: _Clip | _End) -> None:
        while not stopping.is_set():
            with contextlib.suppress(queue.Full):
                delivered.put(item, timeout=1.0)
                return
        raise _Stopped

    def read(index: int) -> None:
        recording, reading = recordings[index], _Reading()
        state = _state(recording.path)
        with contextlib.suppress(_Stopped):
            try:
                for span, x in _clips_of(recording, reading):
                    deliver(_Clip(index, span, network.prepare(x)))
            except (AudioError, _Stopped) as error:
                deliver(_End(index, state, reading, error))
            except BaseException as error:
                deliver(_End(index, state, reading, error))  # to be raised where it is seen
                raise
            else:
                deliver(_End(index, state, reading))

    begun: dict[int, tuple[_Result, list[UInt8Array]]] = {}
    with ThreadPoolExecutor(workers, thread_name_prefix="read") as pool:
        try:
            for index in range(len(recordings)):
                pool.submit(read, index)
            left = len(recordings)
            while left:
                item = delivered.get()
                result, features = begun.setdefault(item.recording, (_Result(), []))
                if isinstance(item, _Clip):
                    result.spans.append(item.span)
                    features.append(network.embed(item.prepared))
                    result.examples.append(len(features[-1]))
                    continue
                if item.error is not None and not isinstance(item.error, AudioError):
                    raise item.error
                result.failures, result.notes = item.reading.failures, item.reading.notes
                result.left_out_seconds = item.reading.left_out_samples / RATE_HZ
                data = b"".join(part.tobytes() for part in features)
                yield _Embedded(recordings[item.recording], item.state, result, data, item.error)
                del begun[item.recording]
                left -= 1
        finally:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)


class _Stopped(Exception):
    """Nobody takes results any more."""


# --- the journal --------------------------------------------------------------------------------------------------


class _Journal:
    """What is embedded already: a SQLite file beside the output. A killed process leaves it as of its last commit."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"Folder {path.parent} can't be made: {error.strerror or error}.") from error
        with self._errors():
            self._database = sqlite3.connect(path, timeout=1.0, isolation_level=None)
        try:
            with self._errors():
                self._prepare()
        except GunfireError:
            self._database.close()
            raise

    def _prepare(self) -> None:
        execute = self._database.execute
        execute("PRAGMA locking_mode=EXCLUSIVE")
        execute("PRAGMA journal_mode=WAL")
        execute("PRAGMA synchronous=NORMAL")
        execute("BEGIN EXCLUSIVE")
        (version,) = execute("PRAGMA user_version").fetchone()
        if version not in (0, _JOURNAL_VERSION):
            raise DataError(
                f"The journal {self._path} has version {version}; {_JOURNAL_VERSION} is expected. Remove it and run "
                "again; all recordings are then embedded anew."
            )
        execute("CREATE TABLE IF NOT EXISTS embedder (identity TEXT)")
        execute("CREATE TABLE IF NOT EXISTS outputs (name TEXT PRIMARY KEY)")
        execute(
            "CREATE TABLE IF NOT EXISTS recordings (path BLOB PRIMARY KEY, request TEXT, size_bytes INTEGER, "
            "mtime_ns INTEGER, result TEXT, features BLOB)"
        )
        execute(f"PRAGMA user_version={_JOURNAL_VERSION}")
        execute("COMMIT")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise ConfigError(f"Another run writes to the same output: {self._path} is in use.") from None
            raise DataError(f"The journal {self._path} can't be written: {error}.") from error
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"The journal {self._path} is damaged ({error}). Remove it and run again; all recordings are then "
                "embedded anew."
            ) from error

    def begin(self, identity: str) -> None:
        """Forget what another network embedded."""
        with self._errors():
            row = self._database.execute("SELECT identity FROM embedder").fetchone()
            if row == (identity,):
                return
            if row is not None:
                logger.warning("The embedder is another one than before: all recordings are embedded anew.")
            self._database.execute("BEGIN")
            self._database.execute("DELETE FROM recordings")
            self._database.execute("DELETE FROM embedder")
            self._database.execute("INSERT INTO embedder VALUES (?)", (identity,))
            self._database.execute("COMMIT")

    def find(self, recording: Recording) -> _Result | str:
        """Its clips; or ``new``, or ``changed`` where file or request are others than when it was embedded."""
        with self._errors():
            row = self._database.execute(
                "SELECT request, size_bytes, mtime_ns, result FROM recordings WHERE path = ?",
                (os.fsencode(recording.path),),
            ).fetchone()
        if row is None:
            return "new"
        request, size_bytes, mtime_ns, text = row
        if (size_bytes, mtime_ns) != _state(recording.path) or request != _request(recording):
            return "changed"
        content = json.loads(text)
        spans = [_Span(**span) for span in content.pop("spans")]
        failures = [(i, error) for i, error in content.pop("failures")]
        return _Result(spans=spans, failures=failures, **content)

    def keep(self, done: _Embedded) -> None:
        """From here on it is done, whatever happens to this process."""
        path, request, result = (
            os.fsencode(done.recording.path),
            _request(done.recording),
            json.dumps(asdict(done.result)),
        )
        with self._errors():
            self._database.execute(
                "INSERT OR REPLACE INTO recordings VALUES (?, ?, ?, ?, ?, ?)",
                (path, request, *done.state, result, done.features),
            )

    def features(self, path: Path) -> UInt8Array:
        """``(n, 128)``: all clips of a recording that is done, one after the other."""
        with self._errors():
            (data,) = self._database.execute(
                "SELECT features FROM recordings WHERE path = ?", (os.fsencode(path),)
            ).fetchone()
        return np.frombuffer(data, np.uint8).reshape(-1, EMBEDDING_SIZE)

    def outputs(self) -> set[str]:
        """Names of the TFRecord files that runs of this journal wrote or were about to."""
        with self._errors():
            return {name for (name,) in self._database.execute("SELECT name FROM outputs")}

    def set_outputs(self, names: Iterable[str]) -> None:
        with self._errors():
            self._database.execute("BEGIN")
            self._database.execute("DELETE FROM outputs")
            self._database.executemany("INSERT INTO outputs VALUES (?)", [(name,) for name in names])
            self._database.execute("COMMIT")

    def close(self) -> None:
        self._database.close()


def _request(recording: Recording) -> str:
    stretches = [(stretch.start_seconds, stretch.end_seconds) for stretch in recording.stretches]
    return json.dumps(
        {"clip_seconds": recording.clip_seconds, "pad_short": recording.pad_short, "stretches": stretches}
    )


def _is_file(output: Path) -> bool:
    return output.suffix == _TFRECORD and not output.is_dir()


def _journal_path(output: Path, shards: int) -> Path:
    if _is_file(output):
        if shards != 1:
            raise ConfigError(f"--shards {shards} needs a folder as output, and {output} is one file.")
        return output.with_name(output.name + ".journal")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"The output {output} is neither a folder nor named *{_TFRECORD}.")
    return output / "embed.journal"


# --- writing ------------------------------------------------------------------------------------------------------


def _account(
    recordings: Sequence[Recording], results: Mapping[Path, _Result], unread: Mapping[Path, str], report: EmbedReport
) -> None:
    """Add up what there is, in the order of the plan."""
    for recording in recordings:
        path = str(recording.path)
        if recording.path in unread:
            places = [stretch.where for stretch in recording.stretches]
            report.failures.append(Failure(path, unread[recording.path], places[0]))
            continue
        result = results[recording.path]
        report.failures += [Failure(path, error, recording.stretches[i].where) for i, error in result.failures]
        report.notes += result.notes
        report.left_out_seconds += result.left_out_seconds
        report.clip_seconds += result.clip_seconds
        report.clips += len(result.spans)
        report.examples += sum(result.examples)


def _files(output: Path, shards: int, journal: _Journal) -> tuple[Path, list[str]]:
    """Folder and names of what is written; ConfigError where one would replace a file that is not from here."""
    if _is_file(output):
        folder, files = output.parent, [output.name]
    else:
        folder, files = output, [f"embeddings-{i:05d}-of-{shards:05d}{_TFRECORD}" for i in range(shards)]
    foreign = [folder / name for name in files if (folder / name).exists() and name not in journal.outputs()]
    if foreign:
        raise ConfigError(
            f"{foreign[0]} exists, and it is not from a run with this journal. Name another output, or remove the file."
        )
    return folder, files


def _assemble(
    recordings: Sequence[Recording],
    results: Mapping[Path, _Result],
    journal: _Journal,
    output: Path,
    shards: int,
    report: EmbedReport,
) -> None:
    """Journal -> TFRecord files. What earlier runs wrote under other names goes away."""
    folder, files = _files(output, min(shards, report.clips), journal)
    before = journal.outputs()
    journal.set_outputs({*before, *files})
    records = _records(recordings, results, journal, report)
    edges = [report.clips * i // len(files) for i in range(len(files) + 1)]
    for name, start, end in zip(files, edges, edges[1:], strict=False):
        with RecordWriter(folder / name) as writer:
            for record in itertools.islice(records, end - start):
                writer.write(record)
    for name in before - set(files):
        (folder / name).unlink(missing_ok=True)
        (folder / f"{name}.partial").unlink(missing_ok=True)
    journal.set_outputs(files)
    report.outputs = [str(folder / name) for name in files]


def _records(
    recordings: Sequence[Recording], results: Mapping[Path, _Result], journal: _Journal, report: EmbedReport
) -> Iterator[bytes]:
    """Every clip, encoded, in the order of the plan. Fills in ``report.renamed``."""
    done = [recording for recording in recordings if recording.path in results]
    names = names_of([recording.path for recording in done])
    report.renamed = {str(path): name for path, name in names.items() if name != _text(path.stem)}
    used: set[str] = set()
    for recording in done:
        result = results[recording.path]
        rows = journal.features(recording.path)
        ends = list(itertools.accumulate(result.examples))
        several = len(result.spans) > 1 or len(recording.stretches) > 1
        order = sorted(range(len(ends)), key=lambda k: (result.spans[k].stretch, result.spans[k].start_seconds))
        for k in order:
            span = result.spans[k]
            base = names[recording.path] + (f"_{round(1000 * span.start_seconds)}" if several else "")
            video_id = base
            for number in itertools.count(2):
                if video_id not in used:
                    break
                video_id = f"{base}#{number}"
            used.add(video_id)
            yield encode_clip(
                video_id,
                rows[ends[k] - result.examples[k] : ends[k]],
                recording.stretches[span.stretch].labels,
                start_seconds=span.start_seconds,
                end_seconds=span.end_seconds,
            )


def names_of(paths: Sequence[Path]) -> dict[Path, str]:
    """Each file's name without its ending; where several share that, with ending or as many folders as tell them apart.

    Follows from the paths alone, whatever their order.
    """
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(path.stem, []).append(path)
    names: dict[Path, str] = {}
    for group in groups.values():
        for candidates in _ever_longer(group):
            if len(set(candidates)) == len(group):
                names |= zip(group, map(_text, candidates), strict=True)
                break
    return {path: names[path] for path in paths}


def _ever_longer(group: Sequence[Path]) -> Iterator[list[str]]:
    deepest = max(len(path.parts) for path in group)
    for folders in range(deepest):
        above = ["".join(f"{part}/" for part in path.parts[:-1][len(path.parts) - 1 - folders :]) for path in group]
        yield [above + path.stem for above, path in zip(above, group, strict=True)]
        yield [above + path.name for above, path in zip(above, group, strict=True)]


def _text(name: str) -> str:
    """A file's name as text; bytes that are no UTF-8 as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
