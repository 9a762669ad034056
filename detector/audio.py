"""The only place for int16 <-> float, mono, resampling and reading files.

Whatever libsndfile or FFmpeg (PyAV) reads becomes mono 16 kHz. What a file holds decides how it is read, not its name:
libsndfile is asked first, FFmpeg second. Two ways lead to 16 kHz:

* files, whole (``clip_16k``) or block by block in bounded memory (``stream_16k``): the AudioSet reference, resampy
  ``kaiser_best``. Both give the same samples; block by block each piece keeps the context that the filter needs.
* live sources (``stream_16k`` with ``LiveResampler``): soxr, which is an order of magnitude cheaper.

What can be read of a truncated or damaged file is read, and ``AudioReader.notes`` says what was missing. NaN and
infinity in a file are an error; in a live source they become 0 and are counted. Floats beyond ±1 are clipped, counted.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import re
import stat
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from detector.chunk import RATE_HZ
from detector.errors import AudioError

if TYPE_CHECKING:
    import av.container
    import soundfile

MIN_RATE_HZ = 1_000
MAX_RATE_HZ = 384_000
MAX_CHANNELS = 64
_PIECE_SAMPLES = 2 * RATE_HZ
KAISER_BEST_ZEROS = 50  # half length of the reference filter, in samples of the lower rate

FloatArray = npt.NDArray[np.float64]
Int16Array = npt.NDArray[np.int16]

_log = logging.getLogger(__name__)


def int16_to_float(pcm: Int16Array) -> FloatArray:
    """``x / 32768`` in float64, as the reference does; exact."""
    return pcm / 32768.0


def float_to_int16(x: npt.NDArray[np.floating]) -> Int16Array:
    """Round ``32768 x`` to the nearest int16, clipping; the inverse of ``int16_to_float`` on its range."""
    return np.clip(np.rint(np.asarray(x, np.float64) * 32768.0), -32768, 32767).astype(np.int16)


def to_mono(x: FloatArray) -> FloatArray:
    """``(n,)`` or ``(n, channels)`` -> ``(n,)``: the mean over channels."""
    return x if x.ndim == 1 else np.mean(x, axis=1)


def resample_reference(x: FloatArray, rate_hz: int) -> FloatArray:
    """Resample a whole mono clip to 16 kHz the way the AudioSet code does (resampy ``kaiser_best``).

    Raises AudioError for a rate outside 1 to 384 kHz or a clip too short to give one sample.
    """
    check_rate(rate_hz)
    if rate_hz == RATE_HZ or len(x) == 0:
        return x
    if len(x) * RATE_HZ // rate_hz < 1:
        raise AudioError(f"{len(x)} samples at {rate_hz} Hz are less than one sample at {RATE_HZ} Hz.")
    import resampy

    return np.asarray(resampy.resample(x, rate_hz, RATE_HZ, filter="kaiser_best"), np.float64)


def check_rate(rate_hz: float, where: str = "") -> None:
    """Raise AudioError unless the rate is one that is read: 1 to 384 kHz. ``where`` starts the message."""
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise AudioError(f"{where}Sample rate {rate_hz} Hz is not within {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz.")


class Resampler(Protocol):
    """Mono audio at any rate -> 16 kHz, piece by piece, without seams."""

    def process(self, x: FloatArray) -> FloatArray:
        """Take the next ``(n,)`` samples, of any number; return what is ready, perhaps nothing."""
        ...

    def finish(self) -> FloatArray:
        """Return the rest after the last piece. The resampler is then spent."""
        ...


class ReferenceResampler:
    """Equal to ``resample_reference`` on the whole clip (up to float64 rounding), in bounded memory.

    Each piece is resampled with ``50 max(1, rate / 16 kHz)`` input samples of context on both sides, starting at a
    multiple of the period after which input and output samples coincide again; only samples with full context are
    handed out.
    """

    def __init__(self, rate_hz: int) -> None:
        check_rate(rate_hz)
        common = math.gcd(rate_hz, RATE_HZ)
        self._rate_hz = rate_hz
        self._period_in = rate_hz // common
        self._period_out = RATE_HZ // common
        self._context = math.ceil(KAISER_BEST_ZEROS * max(1.0, rate_hz / RATE_HZ)) + 2
        self._held = np.zeros(0, np.float64)
        self._held_periods = 0  # the first held sample is this many periods from the start
        self._emitted = 0

    def process(self, x: FloatArray) -> FloatArray:
        self._held = np.concatenate([self._held, x])
        ready = (self._end() - self._context) * RATE_HZ // self._rate_hz
        # resampy prepares its filter anew for each call, which costs as much as half a second of sound.
        return self._emit(ready if ready - self._emitted >= _PIECE_SAMPLES else 0)

    def finish(self) -> FloatArray:
        return self._emit(self._end() * RATE_HZ // self._rate_hz)

    def _end(self) -> int:
        return self._held_periods * self._period_in + len(self._held)

    def _emit(self, up_to: int) -> FloatArray:
        if up_to <= self._emitted:
            return np.zeros(0, np.float64)
        base = self._held_periods * self._period_out
        ready = resample_reference(self._held, self._rate_hz)[self._emitted - base : up_to - base]
        self._emitted = up_to
        keep_from = max(0, self._emitted * self._rate_hz // RATE_HZ - self._context) // self._period_in
        self._held = self._held[(keep_from - self._held_periods) * self._period_in :].copy()
        self._held_periods = keep_from
        return np.asarray(ready, np.float64)


class LiveResampler:
    """soxr's streaming resampler at high quality: cheap, seamless, a few milliseconds of delay."""

    def __init__(self, rate_hz: int) -> None:
        check_rate(rate_hz)
        if rate_hz == RATE_HZ:
            self._stream = None
            return
        import soxr

        self._stream = soxr.ResampleStream(rate_hz, RATE_HZ, 1, dtype="float64", quality="HQ")

    def process(self, x: FloatArray) -> FloatArray:
        return x if self._stream is None else np.asarray(self._stream.resample_chunk(x), np.float64)

    def finish(self) -> FloatArray:
        if self._stream is None:
            return np.zeros(0, np.float64)
        return np.asarray(self._stream.resample_chunk(np.zeros(0, np.float64), last=True), np.float64)


class AudioReader:
    """An opened sound: blocks of ``(n, channels) float64`` in [-1, 1]. Use as a context manager.

    Attributes:
        name: what messages call it (a path; an address without its password).
        rate_hz, channels: of the sound as it is stored.
        notes: what was wrong with it although it could be read; complete once ``blocks`` has ended.
        clipped_samples: floats beyond ±1 that were clipped. replaced_samples: NaN and infinities set to 0 (live only).
    """

    def __init__(self, name: str, rate_hz: int, channels: int, *, live: bool = False) -> None:
        self.name = name
        self.rate_hz = rate_hz
        self.channels = channels
        self.notes: list[str] = []
        self.clipped_samples = 0
        self.replaced_samples = 0
        self._live = live
        self._position = 0
        check_rate(rate_hz, f"{name}: ")
        if not 1 <= channels <= MAX_CHANNELS:
            raise AudioError(f"{name}: {channels} channels are not within 1 to {MAX_CHANNELS}.")

    def blocks(self, block_seconds: float = 0.96) -> Iterator[FloatArray]:
        """Yield the sound from here on. The decoder decides on the size of blocks; ``block_seconds`` is a wish.

        Raises AudioError where nothing at all can be decoded, and for a NaN or infinity in a file.
        """
        for raw in self._decoded(max(1, round(block_seconds * self.rate_hz))):
            if len(raw):
                yield self._checked(raw)
                self._position += len(raw)
        if self.clipped_samples and not self._live:
            self.notes.append(f"{self.clipped_samples} values beyond ±1 were clipped")
        if self._position == 0:
            detail = f" ({'; '.join(self.notes)})" if self.notes else ""
            raise AudioError(f"{self.name}: holds no audio{detail}.")

    def _decoded(self, block_samples: int) -> Iterator[FloatArray]:
        raise NotImplementedError

    def _checked(self, x: FloatArray) -> FloatArray:
        # One pass decides the usual case: a NaN or infinity shows in the extremes.
        low, high = float(x.min()), float(x.max())
        if low >= -1.0 and high <= 1.0:
            return x
        bad = ~np.isfinite(x)
        if bad.any():
            if not self._live:
                row, channel = (int(v) for v in np.argwhere(bad)[0])
                raise AudioError(
                    f"{self.name}: sample {self._position + row} of channel {channel} is {x[row, channel]}; "
                    "a file with values that are no numbers is not read."
                )
            self.replaced_samples += int(bad.sum())
            x = np.where(bad, 0.0, x)
        self.clipped_samples += int(np.count_nonzero(np.abs(x) > 1.0))
        return np.clip(x, -1.0, 1.0)

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> AudioReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _SndfileReader(AudioReader):
    """Through libsndfile."""

    _CUT = re.compile(r"(?im)^\s*(?:data|ssnd|data size)\s*:\s*(\d+) \(should be (\d+)\)")
    _STREAMED_BYTES = 0x7FFF_0000  # writers that can't seek back put a huge size into the header

    def __init__(self, name: str, file: soundfile.SoundFile, descriptor: int) -> None:
        super().__init__(name, int(file.samplerate), int(file.channels))
        self._file = file
        self._descriptor = os.dup(descriptor)

    def _decoded(self, block_samples: int) -> Iterator[FloatArray]:
        import soundfile

        said = self._CUT.search(self._file.extra_info)
        if said and int(said[2]) < int(said[1]) < self._STREAMED_BYTES:
            self.notes.append(f"truncated: {said[2]} of {said[1]} bytes of audio are there")
        read = 0
        while True:
            try:
                x = self._file.read(min(block_samples, 4096), dtype="float64", always_2d=True)
            except soundfile.SoundFileError:
                # libsndfile gives up on a cut FLAC at once; FFmpeg reads it up to the cut.
                for rest in self._rest_with_ffmpeg(read):
                    read += len(rest)
                    yield rest
                self.notes.append(f"truncated or damaged: {read} of {self._file.frames} samples could be read")
                return
            if not len(x):
                return
            read += len(x)
            yield x

    def _rest_with_ffmpeg(self, skip_samples: int) -> Iterator[FloatArray]:
        try:
            with _open_with_ffmpeg(self.name, self._descriptor, "damaged") as other:
                if (other.rate_hz, other.channels) != (self.rate_hz, self.channels):
                    return
                for x in other.blocks():
                    fresh = x[skip_samples:]
                    skip_samples -= len(x) - len(fresh)
                    if len(fresh):
                        yield fresh
        except AudioError as e:
            _log.debug("%s", e)

    def close(self) -> None:
        self._file.close()
        os.close(self._descriptor)


_AV_SCALE = {"s16": 2.0**15, "s32": 2.0**31, "s64": 2.0**63, "flt": 1.0, "dbl": 1.0}


class AvReader(AudioReader):
    """Through FFmpeg: takes over an opened ``av`` container and reads its first sound.

    Damaged packets are skipped and counted, as ``ffmpeg`` does. ``live``: a failing connection raises AudioError,
    rather than ending the sound with a note.
    """

    def __init__(self, name: str, container: av.container.InputContainer, *, live: bool = False) -> None:
        self._container = container
        self.skipped_packets = 0
        if not container.streams.audio:
            raise AudioError(f"{name}: holds no sound that can be decoded.")
        self._stream = container.streams.audio[0]
        self._frames = self._decode_frames(name, live)
        self._cut: str | None = None
        self._first = next(self._frames, None)
        if self._first is None:
            raise AudioError(f"{name}: holds no audio{f' ({self._cut})' if self._cut else ''}.")
        # Of the first frame, not of the container: some headers state half the rate (HE-AAC).
        super().__init__(name, int(self._first.sample_rate), len(self._first.layout.channels), live=live)

    def _decode_frames(self, name: str, live: bool) -> Iterator[Any]:
        import av.error

        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError as e:
                if live:
                    raise AudioError(f"{name}: {e.strerror}.") from None
                self._cut = f"truncated or damaged: {e.strerror}"
                return
            if packet is None:
                return
            try:
                yield from packet.decode()
            except av.error.EOFError:
                return
            except av.error.FFmpegError:
                self.skipped_packets += 1

    def _decoded(self, block_samples: int) -> Iterator[FloatArray]:
        pending: list[FloatArray] = []
        count = 0
        frame = self._first
        self._first = None
        while frame is not None:
            if (int(frame.sample_rate), len(frame.layout.channels)) != (self.rate_hz, self.channels):
                raise AudioError(
                    f"{self.name}: changes from {self.rate_hz} Hz and {self.channels} channels to "
                    f"{frame.sample_rate} Hz and {len(frame.layout.channels)} within the sound."
                )
            pending.append(_frame_samples(frame))
            count += len(pending[-1])
            # What is live goes on at once; a file is handed out in blocks.
            if self._live or count >= block_samples:
                yield np.concatenate(pending)
                pending, count = [], 0
            frame = next(self._frames, None)
        if pending:
            yield np.concatenate(pending)
        if self._cut:
            self.notes.append(self._cut)
        if self.skipped_packets:
            self.notes.append(f"damaged: {self.skipped_packets} packets could not be decoded")

    def close(self) -> None:
        self._container.close()


def _frame_samples(frame: Any) -> FloatArray:
    """An ``av.AudioFrame`` -> ``(n, channels) float64``. AudioError for samples that PyAV can't hand out."""
    try:
        x = frame.to_ndarray()
    except (KeyError, ValueError):
        raise AudioError(
            f"Samples of the form {frame.format.name} can't be read; convert the sound to 16-bit or 32-bit PCM."
        ) from None
    x = x.T if frame.format.is_planar else x.reshape(-1, len(frame.layout.channels))  # (n, channels)
    kind = frame.format.name.removesuffix("p")
    if kind == "u8":
        return np.asarray((x.astype(np.float64) - 128.0) / 128.0)
    return np.asarray(x / _AV_SCALE[kind], np.float64)


def open_audio(path: str | os.PathLike[str]) -> AudioReader:
    """Open a file of any format that libsndfile or FFmpeg reads.

    Raises AudioError naming the file where it does not exist, can't be opened, is no regular file, is empty, is in no
    known format, or has a rate outside 1 to 384 kHz or more than 64 channels.
    """
    import soundfile

    name = os.fspath(path)
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as e:
        raise AudioError(f"{name}: can't be opened: {getattr(e, 'strerror', None) or e}.") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise AudioError(f"{name}: is no regular file.")
        if status.st_size == 0:
            raise AudioError(f"{name}: is empty (0 bytes).")
        try:
            sound = _sequential_kind()(os.dup(descriptor), closefd=True)
        except (soundfile.SoundFileError, TypeError, ValueError) as e:
            return _open_with_ffmpeg(name, descriptor, _sndfile_words(e))
        try:
            return _SndfileReader(name, sound, descriptor)
        except AudioError:
            sound.close()
            raise
    finally:
        os.close(descriptor)


@functools.cache
def _sequential_kind() -> type[soundfile.SoundFile]:
    import soundfile

    class Sequential(soundfile.SoundFile):
        """A sound file that is only read on. Else soundfile seeks after each read, which breaks MP3 frames apart."""

        def seekable(self) -> bool:
            return False

    return Sequential


def _sndfile_words(e: Exception) -> str:
    return str(getattr(e, "error_string", e)).strip(" .") or "unknown format"


def _open_with_ffmpeg(name: str, descriptor: int, libsndfile_says: str) -> AudioReader:
    try:
        import av
        import av.error
    except ImportError:
        raise AudioError(
            f"{name}: libsndfile can't read it ({libsndfile_says}), and FFmpeg is not there: pip install av."
        ) from None
    os.lseek(descriptor, 0, os.SEEK_SET)
    # An open file, not a name, and no protocols: a playlist among the files must not make FFmpeg fetch what it lists.
    file = os.fdopen(os.dup(descriptor), "rb")
    try:
        container = av.open(file, options={"protocol_whitelist": "none"})
    except (av.error.FFmpegError, ValueError) as e:
        file.close()
        words = getattr(e, "strerror", None) or str(e)
        raise AudioError(
            f"{name}: is no audio file that libsndfile ({libsndfile_says}) or FFmpeg ({words}) can read."
        ) from None
    try:
        return _FileAvReader(name, container, file)
    except AudioError:
        container.close()
        file.close()
        raise


class _FileAvReader(AvReader):
    def __init__(self, name: str, container: av.container.InputContainer, file: Any) -> None:
        self._opened = file
        super().__init__(name, container)

    def close(self) -> None:
        super().close()
        self._opened.close()


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """A finite sound as it is stored.

    Attributes:
        samples: ``(n, channels) float64`` in [-1, 1].
        notes: what was wrong with the file although it could be read (truncated, clipped, ...).
    """

    samples: FloatArray
    rate_hz: int
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate_hz


def read_clip(path: str | os.PathLike[str]) -> Clip:
    """Read a whole file, as stored. Raises AudioError (see ``open_audio`` and ``AudioReader.blocks``)."""
    with open_audio(path) as reader:
        samples = np.concatenate(list(reader.blocks()))
        _log_notes(reader)
        return Clip(samples, reader.rate_hz, tuple(reader.notes))


def clip_16k(path: str | os.PathLike[str]) -> FloatArray:
    """Read a whole file as ``(n,) float64`` mono at 16 kHz, the reference way. 16-bit mono at 16 kHz comes exactly.

    Raises AudioError as ``read_clip`` does, and where the clip is too short for one sample.
    """
    clip = read_clip(path)
    try:
        return resample_reference(to_mono(clip.samples), clip.rate_hz)
    except AudioError as e:
        raise AudioError(f"{Path(path)}: {e}") from None


def stream_16k(
    reader: AudioReader, resampler: Resampler | None = None, *, block_seconds: float = 0.96
) -> Generator[Int16Array, None, None]:
    """Yield a sound as blocks of ``(n,) int16`` mono at 16 kHz, in bounded memory, whatever its length.

    Without ``resampler`` the samples are those of ``float_to_int16(clip_16k(path))``. Sizes of blocks vary.
    Raises AudioError as ``AudioReader.blocks`` does.
    """
    chosen = ReferenceResampler(reader.rate_hz) if resampler is None else resampler
    for block in reader.blocks(block_seconds):
        ready = chosen.process(to_mono(block)) if reader.rate_hz != RATE_HZ else to_mono(block)
        if len(ready):
            yield float_to_int16(ready)
    if reader.rate_hz != RATE_HZ:
        rest = chosen.finish()
        if len(rest):
            yield float_to_int16(rest)
    _log_notes(reader)


def _log_notes(reader: AudioReader) -> None:
    for note in reader.notes:
        _log.warning("%s: %s.", reader.name, note)


@contextlib.contextmanager
def open_16k(path: str | os.PathLike[str]) -> Iterator[Iterator[Int16Array]]:
    """``open_audio`` and ``stream_16k`` in one: ``with open_16k(path) as blocks: ...``."""
    with open_audio(path) as reader, contextlib.closing(stream_16k(reader)) as blocks:
        yield blocks
