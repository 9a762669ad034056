"""Raw PCM from a pipe: ``arecord ... | producers stdin``."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Iterator

import numpy as np

from detector.audio import MAX_CHANNELS, FloatArray, LiveResampler, check_rate, float_to_int16, to_mono
from detector.errors import AudioError, ConfigError, SourceError
from producers.source import Block, LiveConverter, WallClock, samples_to_ns

_log = logging.getLogger(__name__)
_DTYPES = {"u8": "u1", "s16le": "<i2", "s16be": ">i2", "s32le": "<i4", "f32le": "<f4", "f64le": "<f8"}
FORMATS = (*_DTYPES, "s24le")
_READ_BYTES = 1 << 16


class PipeSource:
    """Raw PCM from a file descriptor, channels interleaved.

    Args:
        live: capture times from the clock at which samples arrive; else counted from the start, for sound that comes
            faster than it was captured.

    Raises ConfigError for a rate, a number of channels or a format that is not read.
    """

    def __init__(
        self,
        descriptor: int,
        rate_hz: int,
        channels: int = 1,
        sample_format: str = "s16le",
        *,
        live: bool = True,
        now_ns: WallClock = time.time_ns,
    ) -> None:
        try:
            check_rate(rate_hz)
        except AudioError as e:
            raise ConfigError(f"stdin: {e}") from None
        if not 1 <= channels <= MAX_CHANNELS:
            raise ConfigError(f"stdin: {channels} channels are not within 1 to {MAX_CHANNELS}.")
        if sample_format not in FORMATS:
            raise ConfigError(f"stdin: format {sample_format!r} is not one of {', '.join(FORMATS)}.")
        self._descriptor = descriptor
        self._rate_hz = rate_hz
        self._channels = channels
        self._format = sample_format
        self._frame_bytes = channels * (3 if sample_format == "s24le" else np.dtype(_DTYPES[sample_format]).itemsize)
        self._live = live
        self._now_ns = now_ns
        self.replaced_samples = 0
        self.clipped_samples = 0

    @property
    def name(self) -> str:
        return "stdin"

    def blocks(self, stop: threading.Event) -> Iterator[Block]:
        """Yield until the pipe's end. Raises SourceError: it can't be read, held nothing, or ends within a sample."""
        held = b""
        heard = False
        convert = (
            _Counted(self._rate_hz, self._now_ns) if not self._live else LiveConverter(self._rate_hz, self._now_ns)
        )
        while not stop.is_set():
            try:
                if not select.select([self._descriptor], [], [], 0.1)[0]:
                    continue
                data = os.read(self._descriptor, _READ_BYTES)
            except OSError as e:
                raise SourceError(f"stdin can't be read: {e.strerror}.") from None
            if not data:
                break
            held += data
            whole = len(held) - len(held) % self._frame_bytes
            if whole:
                heard = True
                yield from convert.convert(self._samples(held[:whole]))
                held = held[whole:]
        yield from convert.interrupt()
        if self.replaced_samples or self.clipped_samples:
            _log.warning(
                "stdin: %d samples were no numbers and became 0, %d were beyond ±1 and clipped.",
                self.replaced_samples,
                self.clipped_samples,
            )
        if not stop.is_set():
            if held:
                raise SourceError(
                    f"stdin ends within a sample ({len(held)} of {self._frame_bytes} bytes): "
                    "are format and channels right?"
                )
            if not heard:
                raise SourceError("stdin held no sound (0 bytes).")

    def _samples(self, data: bytes) -> FloatArray:
        """Bytes -> ``(n,) float64`` mono in [-1, 1]."""
        if self._format == "s24le":
            parts = np.frombuffer(data, np.uint8).reshape(-1, 3)
            wide = np.zeros((len(parts), 4), np.uint8)
            wide[:, 1:] = parts
            x = wide.view("<i4")[:, 0] / 2.0**31
        else:
            raw = np.frombuffer(data, _DTYPES[self._format])
            if self._format == "u8":
                x = (raw.astype(np.float64) - 128.0) / 128.0
            elif self._format.startswith("s"):
                x = raw / 2.0 ** (8 * raw.itemsize - 1)
            else:
                x = self._sane(raw.astype(np.float64))
        return to_mono(x.reshape(-1, self._channels)) if self._channels > 1 else x

    def _sane(self, x: FloatArray) -> FloatArray:
        bad = ~np.isfinite(x)
        self.replaced_samples += int(bad.sum())
        x = np.where(bad, 0.0, x)
        self.clipped_samples += int(np.count_nonzero(np.abs(x) > 1.0))
        return np.clip(x, -1.0, 1.0)

    def close(self) -> None:
        """Standard input is the process's own."""


class _Counted:
    """Like LiveConverter, with times counted from the start."""

    def __init__(self, rate_hz: int, now_ns: WallClock) -> None:
        self._resampler = LiveResampler(rate_hz)
        self._began_ns = now_ns()
        self._given = 0

    def convert(self, x: FloatArray) -> list[Block]:
        return self._block(self._resampler.process(x))

    def interrupt(self) -> list[Block]:
        return self._block(self._resampler.finish())

    def _block(self, y: FloatArray) -> list[Block]:
        if not len(y):
            return []
        block = Block(float_to_int16(y), self._began_ns + samples_to_ns(self._given), self._given == 0)
        self._given += len(y)
        return [block]
