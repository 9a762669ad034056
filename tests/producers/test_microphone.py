"""A microphone, faked where PortAudio begins: overflow, vanishing and coming back, none there at all."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from detector.errors import SourceError
from producers.microphone import Device, Level, MicrophoneSource, choose_device, list_devices
from producers.source import Block

CONTINUE, OVERFLOW = 0, 2


class FakePort:
    """One PortAudio with one stereo device; ``plays`` feeds each opened stream from a thread."""

    def __init__(self, plays: list[Callable[[FakeStream], None]], mono: bool) -> None:
        self.plays = plays
        self.mono = mono
        self.terminated = False

    def get_default_input_device_info(self) -> dict[str, Any]:
        return {"index": 1}

    def get_device_count(self) -> int:
        return 2 if self.plays else 0

    def get_device_info_by_index(self, index: int) -> dict[str, Any]:
        return {"name": ("Speaker", "USB mic")[index], "maxInputChannels": 2 * index, "defaultSampleRate": 16_000.0}

    def open(self, **how: Any) -> FakeStream:
        if how["channels"] == 1 and not self.mono:
            raise OSError(-9998, "Invalid number of channels")
        return FakeStream(self.plays.pop(0), how)

    def terminate(self) -> None:
        self.terminated = True


class FakeStream:
    def __init__(self, play: Callable[[FakeStream], None], how: dict[str, Any]) -> None:
        self.how = how
        self.active = True
        threading.Thread(target=play, args=(self,), daemon=True).start()

    def put(self, value: int, count: int = 640, status: int = 0) -> None:
        data = np.full((count, self.how["channels"]), value, "<i2")
        assert self.how["stream_callback"](data.tobytes(), count, {}, status) == (None, CONTINUE)

    def is_active(self) -> bool:
        return self.active

    def get_input_latency(self) -> float:
        return 0.01

    def close(self) -> None:
        self.active = False


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[FakePort]]:
    def install(*plays: Callable[[FakeStream], None], mono: bool = True) -> list[FakePort]:
        ports: list[FakePort] = []
        left = list(plays)

        def start() -> FakePort:
            ports.append(FakePort(left, mono))
            return ports[-1]

        module = SimpleNamespace(PyAudio=start, paInt16=8, paContinue=CONTINUE, paInputOverflow=OVERFLOW)
        monkeypatch.setitem(sys.modules, "pyaudio", module)  # type: ignore[arg-type]
        return ports

    return install


def listen(source: MicrophoneSource, until: Callable[[list[Block]], bool]) -> list[Block]:
    stop = threading.Event()
    heard: list[Block] = []
    for block in source.blocks(stop):
        heard.append(block)
        if until(heard):
            stop.set()
    return heard


def test_what_the_device_gives_comes_through_exactly(fake: Any) -> None:
    ports = fake(lambda s: [s.put(k) for k in range(1, 6)])
    levels: list[Level] = []
    heard = listen(MicrophoneSource(on_level=levels.append), lambda h: len(h) == 5)
    assert [int(b.pcm[0]) for b in heard] == [1, 2, 3, 4, 5]
    assert [b.starts_session for b in heard] == [True, False, False, False, False]
    assert levels[0].peak_dbfs == pytest.approx(20 * np.log10(1 / 32768), abs=0.1)
    assert all(port.terminated for port in ports)


def test_a_device_without_mono_is_opened_with_its_channels_and_mixed(fake: Any) -> None:
    fake(lambda s: s.put(7), mono=False)
    assert listen(MicrophoneSource("usb"), lambda h: True)[0].pcm.tolist() == [7] * 640


def test_an_overflow_is_counted_and_starts_a_session(fake: Any) -> None:
    def play(stream: FakeStream) -> None:
        stream.put(1)
        stream.put(2, status=OVERFLOW)
        stream.put(3)

    fake(play)
    source = MicrophoneSource()
    heard = listen(source, lambda h: len(h) == 3)
    assert [b.starts_session for b in heard] == [True, True, False]
    assert source.overflows == 1


def test_a_device_that_vanishes_is_waited_for_and_comes_back_as_a_session(fake: Any) -> None:
    def vanish(stream: FakeStream) -> None:
        stream.put(1)
        stream.active = False

    ports = fake(vanish, lambda s: s.put(2))
    heard = listen(MicrophoneSource("USB mic", first_retry_seconds=0.001), lambda h: len(h) == 2)
    assert [(int(b.pcm[0]), b.starts_session) for b in heard] == [(1, True), (2, True)]
    assert len(ports) == 2


def test_a_device_that_falls_silent_is_opened_anew(fake: Any) -> None:
    fake(lambda s: s.put(1), lambda s: s.put(2))
    source = MicrophoneSource(silent_seconds=0.2, first_retry_seconds=0.001)
    assert len(listen(source, lambda h: len(h) == 2)) == 2


def test_no_microphone_is_a_clear_error(fake: Any) -> None:
    fake()
    with pytest.raises(SourceError, match="no microphone"):
        list_devices()
    with pytest.raises(SourceError, match="no microphone"):
        listen(MicrophoneSource(), lambda h: True)


def test_without_pyaudio_the_message_names_package_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyaudio", None)
    with pytest.raises(SourceError, match=r"pip install 'gunfire-detector\[microphone\]'"):
        list_devices()


def test_the_real_portaudio_lists_devices_or_says_that_there_are_none() -> None:
    pytest.importorskip("pyaudio")
    try:
        devices = list_devices()
    except SourceError as e:
        assert "no microphone" in str(e)  # noqa: PT017 - either outcome is right, by the machine
    else:
        assert all(d.channels > 0 and d.rate_hz > 0 for d in devices)


def test_a_device_is_chosen_by_number_name_or_default() -> None:
    devices = [
        Device(0, "Built-in", 1, 44_100, False),
        Device(3, "USB mic A", 1, 48_000, True),
        Device(4, "USB mic B", 2, 48_000, False),
    ]
    assert choose_device(devices, None).index == 3
    assert choose_device(devices, "4").index == 4
    assert choose_device(devices, "built").index == 0
    assert choose_device(devices, "USB mic A").index == 3
    with pytest.raises(SourceError, match=r"Several microphones match 'usb'\. There are 3: USB mic A, 4: USB mic B"):
        choose_device(devices, "usb")
    with pytest.raises(SourceError, match="No microphone matches '9'"):
        choose_device(devices, "9")
