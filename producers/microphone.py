"""A microphone through PortAudio (PyAudio): levels, overflows counted, and back again after it was unplugged."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from detector.audio import FloatArray, int16_to_float, to_mono
from detector.errors import AudioError, SourceError
from producers.source import Block, LiveConverter, WallClock, connect

_log = logging.getLogger(__name__)
BUFFER_SECONDS = 0.04
QUEUED_BUFFERS = 500  # 20 s: sound that has come in and is not taken yet
SILENT_SECONDS = 3.0  # without a buffer for so long the device is gone


@dataclass(frozen=True, slots=True)
class Device:
    """An input of this machine."""

    index: int
    name: str
    channels: int
    rate_hz: int
    is_default: bool


@dataclass(frozen=True, slots=True)
class Level:
    """What the meter shows: the last buffer's peak and RMS, and how often samples were lost so far."""

    peak_dbfs: float
    rms_dbfs: float
    overflows: int


def _pyaudio() -> ModuleType:
    try:
        import pyaudio
    except ImportError:
        raise SourceError(
            "PyAudio is not installed: pip install 'gunfire-detector[microphone]' "
            "(it builds against PortAudio; Debian: apt install portaudio19-dev)."
        ) from None
    return pyaudio  # type: ignore[no-any-return, unused-ignore]


def _start(pyaudio: ModuleType) -> Any:
    """Start PortAudio without the pages that ALSA and JACK write to standard error about what is not there."""
    with _native_stderr_silenced():
        return pyaudio.PyAudio()


@contextlib.contextmanager
def _native_stderr_silenced() -> Iterator[None]:
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def list_devices() -> list[Device]:
    """All inputs. Raises SourceError without PyAudio, and where there is no input."""
    port = _start(_pyaudio())
    try:
        devices = _devices(port)
    finally:
        port.terminate()
    if not devices:
        raise SourceError("This machine has no microphone that PortAudio can see; plug one in, or check its driver.")
    return devices


def _devices(port: Any) -> list[Device]:
    try:
        default = int(port.get_default_input_device_info()["index"])
    except OSError:
        default = -1
    found = []
    for index in range(port.get_device_count()):
        info = port.get_device_info_by_index(index)
        channels = int(info["maxInputChannels"])
        if channels > 0:
            name = str(info["name"])
            found.append(Device(index, name, channels, round(float(info["defaultSampleRate"])), index == default))
    return found


def choose_device(devices: list[Device], wanted: str | None) -> Device:
    """Pick by number, else by name or a part of it that only one has; None: the default. Raises SourceError."""
    if not devices:
        raise SourceError("This machine has no microphone that PortAudio can see; plug one in, or check its driver.")
    if wanted is None:
        return next((d for d in devices if d.is_default), devices[0])
    if wanted.isdecimal():
        matches = [d for d in devices if d.index == int(wanted)]
    else:
        matches = [d for d in devices if d.name == wanted] or [
            d for d in devices if wanted.casefold() in d.name.casefold()
        ]
    if len(matches) == 1:
        return matches[0]
    what = "Several microphones match" if matches else "No microphone matches"
    there = ", ".join(f"{d.index}: {d.name}" for d in (matches or devices))
    raise SourceError(f"{what} {wanted!r}. There are {there}.")


class MicrophoneSource:
    """One input. The first opening must succeed; after that a device that vanishes is waited for.

    Lost samples (an overflow in the driver, or this process being too slow) are counted, and start a new session.

    Args:
        device: number or part of the name; None: the system's default.
        rate_hz: None: the device's own.
        on_level: called with each buffer's level.
    """

    def __init__(
        self,
        device: str | None = None,
        *,
        rate_hz: int | None = None,
        on_level: Callable[[Level], None] | None = None,
        silent_seconds: float = SILENT_SECONDS,
        first_retry_seconds: float = 0.5,
        now_ns: WallClock = time.time_ns,
    ) -> None:
        self._wanted = device
        self._rate_hz = rate_hz
        self._on_level = on_level
        self._silent_seconds = silent_seconds
        self._first_retry_seconds = first_retry_seconds
        self._now_ns = now_ns
        self.overflows = 0

    @property
    def name(self) -> str:
        return f"microphone {self._wanted or '(default)'}"

    def blocks(self, stop: threading.Event) -> Iterator[Block]:
        """Yield what is heard until ``stop``. Raises SourceError where the device can't be opened the first time."""
        retries: int | None = 0
        while not stop.is_set():
            opened = connect(
                self._open, stop, self.name, retries=retries, first_retry_seconds=self._first_retry_seconds
            )
            if opened is None:
                return
            retries = None
            with contextlib.closing(opened):
                yield from self._listen(opened, stop)

    def _open(self) -> _OpenDevice:
        # A new PortAudio each time: it lists the devices only when it starts.
        pyaudio = _pyaudio()
        port = _start(pyaudio)
        try:
            device = choose_device(_devices(port), self._wanted)
            return _OpenDevice(pyaudio, port, device, self._rate_hz or device.rate_hz)
        except BaseException:
            port.terminate()
            raise

    def _listen(self, opened: _OpenDevice, stop: threading.Event) -> Iterator[Block]:
        try:
            converter = LiveConverter(opened.rate_hz, self._now_ns)
        except AudioError as e:
            raise SourceError(f"{self.name}: {e}") from None
        silent_since = time.monotonic()
        while not stop.is_set():
            try:
                samples, lost = opened.buffers.get(timeout=0.1)
            except queue.Empty:
                if not opened.active or time.monotonic() - silent_since > self._silent_seconds:
                    yield from converter.interrupt()
                    _log.warning("%s (%s) has gone; waiting for it.", self.name, opened.device.name)
                    return
                continue
            silent_since = time.monotonic()
            if lost:
                self.overflows += 1
                _log.warning("%s: samples were lost (overflow %d); a new session starts.", self.name, self.overflows)
                yield from converter.interrupt()
            if self._on_level is not None:
                self._on_level(_level(samples, self.overflows))
            yield from converter.convert(samples, opened.latency_seconds)
        yield from converter.interrupt()

    def close(self) -> None:
        """Nothing is open outside ``blocks``."""


class _OpenDevice:
    """An open PortAudio stream; puts its buffers into a queue: ``((n,) float64 mono, samples were lost before)``."""

    def __init__(self, pyaudio: ModuleType, port: Any, device: Device, rate_hz: int) -> None:
        self.device = device
        self.rate_hz = rate_hz
        self.buffers: queue.Queue[tuple[FloatArray, bool]] = queue.Queue(QUEUED_BUFFERS)
        self._port = port
        self._pyaudio = pyaudio
        self._lost = False
        self._stream, self._channels = self._open_stream()
        self.latency_seconds = max(0.0, min(1.0, float(self._stream.get_input_latency())))

    def _open_stream(self) -> tuple[Any, int]:
        # Mono where the driver mixes; some give only what the hardware has.
        problem: Exception | None = None
        for channels in dict.fromkeys((1, self.device.channels)):
            self._channels = channels
            try:
                stream = self._port.open(
                    rate=self.rate_hz,
                    channels=channels,
                    format=self._pyaudio.paInt16,
                    input=True,
                    input_device_index=self.device.index,
                    frames_per_buffer=max(1, round(self.rate_hz * BUFFER_SECONDS)),
                    stream_callback=self._take,
                )
            except (OSError, ValueError) as e:
                problem = e
                continue
            return stream, channels
        raise SourceError(
            f"Microphone {self.device.index} ({self.device.name}) can't be opened at {self.rate_hz} Hz: {problem}. "
            "It may be in use; another --rate may help."
        )

    def _take(self, data: bytes | None, count: int, times: object, status: int) -> tuple[None, int]:
        """Called by PortAudio's thread; must not wait."""
        lost = self._lost or bool(status & self._pyaudio.paInputOverflow)
        samples = np.frombuffer(data or b"", "<i2").reshape(-1, self._channels)
        try:
            self.buffers.put_nowait((to_mono(int16_to_float(samples)), lost))
            self._lost = False
        except queue.Full:
            self._lost = True
        return None, int(self._pyaudio.paContinue)

    @property
    def active(self) -> bool:
        try:
            return bool(self._stream.is_active())
        except OSError:
            return False

    def close(self) -> None:
        for step in (self._stream.close, self._port.terminate):
            try:
                step()
            except OSError as e:
                _log.debug("While closing a microphone: %s", e)


def _level(x: FloatArray, overflows: int) -> Level:
    peak = float(np.max(np.abs(x), initial=0.0))
    rms = math.sqrt(float(np.mean(np.square(x)))) if len(x) else 0.0
    return Level(20 * math.log10(max(peak, 1e-5)), 20 * math.log10(max(rms, 1e-5)), overflows)
