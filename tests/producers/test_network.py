"""An address: real HTTP on the loopback that serves sound, dies and comes back; no secret in any message."""

from __future__ import annotations

import io
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile

from detector.errors import ConfigError, SourceError
from producers.network import NetworkSource, name_urls, public_url
from producers.source import Block


def sound(seconds: float, kind: str = "WAV", rate_hz: int = 16_000, level: int = 1000) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.full(int(seconds * rate_hz), level, np.int16), rate_hz, format=kind)
    return out.getvalue()


class Radio:
    """Serves ``bodies`` one request after another, then status 503 for what comes after; port kept over restarts."""

    def __init__(self, *bodies: bytes, port: int = 0, hang: bool = False) -> None:
        left = list(bodies)
        self.requests = 0
        self.released = threading.Event()
        radio = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                radio.requests += 1
                if not left:
                    self.send_error(503)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "audio/wav")
                self.end_headers()
                self.wfile.write(left.pop(0))
                self.wfile.flush()
                if hang:
                    radio.released.wait(20)

            def log_message(self, *args: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


@pytest.fixture
def radios() -> Iterator[Callable[..., Radio]]:
    running: list[Radio] = []

    def start(*bodies: bytes, **how: object) -> Radio:
        running.append(Radio(*bodies, **how))  # type: ignore[arg-type]
        return running[-1]

    yield start
    for radio in running:
        radio.stop()


def listen(source: NetworkSource, until: Callable[[list[Block]], bool], seconds: float = 15.0) -> list[Block]:
    stop = threading.Event()
    timer = threading.Timer(seconds, stop.set)
    timer.start()
    heard: list[Block] = []
    try:
        for block in source.blocks(stop):
            heard.append(block)
            if until(heard):
                stop.set()
    finally:
        timer.cancel()
    return heard


def samples(blocks: list[Block]) -> int:
    return sum(len(b.pcm) for b in blocks)


@pytest.mark.parametrize(
    ("kind", "rate_hz"), [("WAV", 16_000), ("WAV", 44_100), ("MP3", 48_000), ("OGG", 44_100), ("FLAC", 8000)]
)
def test_a_stream_of_any_format_is_heard(radios: Callable[..., Radio], kind: str, rate_hz: int) -> None:
    radio = radios(sound(2.0, kind, rate_hz))
    heard = listen(NetworkSource(f"http://127.0.0.1:{radio.port}/live", retries=0), lambda h: False)
    assert abs(samples(heard) - 32_000) < 3000
    assert [b.starts_session for b in heard] == [True] + [False] * (len(heard) - 1)


def test_wav_at_16_khz_comes_through_exactly(radios: Callable[..., Radio]) -> None:
    radio = radios(sound(1.0, level=1234))
    heard = listen(NetworkSource(f"http://127.0.0.1:{radio.port}/", retries=0), lambda h: False)
    assert np.concatenate([b.pcm for b in heard]).tolist() == [1234] * 16_000


def test_a_server_that_dies_and_comes_back_continues_as_a_new_session(radios: Callable[..., Radio]) -> None:
    first = radios(sound(1.0, level=1))
    address = f"http://127.0.0.1:{first.port}/"
    restarted = threading.Event()

    def until(heard: list[Block]) -> bool:
        if samples(heard) >= 16_000 and not restarted.is_set():
            restarted.set()
            first.stop()
            radios(sound(1.0, level=2), port=first.port)
        return samples(heard) >= 32_000

    heard = listen(NetworkSource(address, first_retry_seconds=0.02), until)
    joined = np.concatenate([b.pcm for b in heard])
    assert joined.tolist() == [1] * 16_000 + [2] * 16_000
    starts = [int(b.pcm[0]) for b in heard if b.starts_session]
    assert starts == [1, 2]


def test_a_connection_that_falls_silent_is_given_up_after_the_timeout(radios: Callable[..., Radio]) -> None:
    body = bytearray(sound(1.0, level=5))
    body[40:44] = b"\xff\xff\xff\xff"  # a stream without end
    radio = radios(bytes(body), bytes(body), hang=True)
    source = NetworkSource(f"http://127.0.0.1:{radio.port}/", timeout_seconds=0.5, first_retry_seconds=0.01)
    heard = listen(source, lambda h: sum(b.starts_session for b in h) == 2)
    assert sum(b.starts_session for b in heard) == 2
    assert radio.requests >= 2


def test_nobody_there_is_an_error_after_the_retries_and_names_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        source = NetworkSource(
            f"http://someone:s3cret@127.0.0.1:{port}/live?token=s3cret", retries=2, first_retry_seconds=0.01
        )
        with pytest.raises(
            SourceError, match=rf"http://127\.0\.0\.1:{port}/live\?\.\.\.: can't be opened: Connection"
        ) as caught:
            listen(source, lambda h: True)
    assert "s3cret" not in caplog.text + str(caught.value)
    assert "someone" not in caplog.text + str(caught.value)


@pytest.mark.parametrize("body", [b"", b"<html>no sound</html>" * 100, sound(0.5)[:30]])
def test_what_is_no_sound_is_an_error(radios: Callable[..., Radio], body: bytes) -> None:
    radio = radios(body)
    with pytest.raises(SourceError, match=r"127\.0\.0\.1"):
        listen(NetworkSource(f"http://127.0.0.1:{radio.port}/", retries=0), lambda h: True)


def test_the_command_writes_no_secret_to_its_output(tmp_path: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "producers", "url", "rtsp://someone:s3cret@127.0.0.1:9/x?k=s3cret", "--retries", "1",
         "--timeout", "2", "--bus-path", f"{tmp_path}/bus.sqlite3"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "rtsp://127.0.0.1:9/x?..." in done.stderr
    assert "s3cret" not in done.stdout + done.stderr
    assert "someone" not in done.stdout + done.stderr


def test_public_addresses_hold_neither_user_nor_query() -> None:
    assert public_url("rtsp://u:p@cam.example.org:554/a/b?t=1#f") == "rtsp://cam.example.org:554/a/b?..."
    assert public_url("http://[::1]:80/x") == "http://[::1]:80/x"
    assert "p" not in public_url("http://u:p@[bad/x").replace("(an address that is none)", "")


def test_streams_are_named_by_host() -> None:
    assert name_urls(["http://a/x", "rtsp://b/y"]) == ["a", "b"]
    assert name_urls(["http://a/x", "http://a/y"]) == ["a-0", "a-1"]
    assert name_urls(["http://u:p@a/x"], "cam-{host}") == ["cam-a"]
    for wrong in ("nothing", "", "http://"):
        with pytest.raises(ConfigError, match="is no address"):
            name_urls([wrong])
    with pytest.raises(ConfigError, match="same id"):
        name_urls(["http://a/x", "http://b/y"], "one")
