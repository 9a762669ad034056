"""The commands as processes: real bus, real signals, real exit codes; TensorFlow is never imported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile

from detector.bus.embedded import EmbeddedBus
from detector.chunk import Chunk, decode

ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "producers", *arguments]


def run(*arguments: object, stdin: bytes = b"", cwd: Path = ROOT) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command(*map(str, arguments)),
        input=stdin, capture_output=True, timeout=60, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def chunks(bus_path: Path) -> list[Chunk]:
    bus = EmbeddedBus(bus_path)
    consumer = bus.consumer(["audio.chunks"], None)
    found = []
    while records := consumer.poll(0.05, 500):
        found += [decode(r.key, r.value, r.headers) for r in records]
    consumer.close()
    bus.close()
    return found


def wait_for(condition: object, deadline_seconds: float = 30.0) -> None:
    deadline = time.monotonic() + deadline_seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def write(path: Path, seconds: float, seed: int = 0) -> np.ndarray:
    pcm = np.random.default_rng(seed).integers(-9000, 9000, int(seconds * 16_000)).astype(np.int16)
    soundfile.write(path, pcm, 16_000)
    return pcm


def test_no_producer_ever_imports_tensorflow_or_the_trainer() -> None:
    modules = sorted(f"producers.{p.stem}" for p in (ROOT / "producers").glob("*.py") if p.stem != "__init__")
    code = (
        "import sys\n"
        "sys.modules['tensorflow'] = sys.modules['trainer'] = None\n"
        f"for name in {modules!r}: __import__(name)\n"
        "from producers.scene import random_scene, render_scene\n"
        "render_scene(random_scene(sensors=1, seconds=2))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr


def test_files_reach_the_bus_and_a_bad_one_ends_in_exit_code_1(tmp_path: Path) -> None:
    pcm = write(tmp_path / "good.wav", 2.5)
    (tmp_path / "bad.wav").write_bytes(b"RIFFnothing")
    done = run("file", tmp_path, "--fast", "--bus-path", tmp_path / "b.sqlite3", "--location", "40.4,-80,230",
               "--canary", "c1", "--start-time", "2026-05-01T12:00:00Z")  # fmt: skip
    assert done.returncode == 1
    assert b"1 of 2 files failed" in done.stderr
    assert b"bad.wav" in done.stderr
    assert b"2 streams, 3 chunks published, at most " in done.stderr
    assert b" 0 dropped" in done.stderr
    found = chunks(tmp_path / "b.sqlite3")
    assert np.array_equal(np.concatenate([c.pcm for c in found])[: len(pcm)], pcm)
    assert {(c.stream_id, c.canary) for c in found} == {("good", "c1")}
    assert found[0].captured_at_ns == 1_777_636_800_000_000_000
    assert run("file", tmp_path / "good.wav", "--fast", "--bus-path", tmp_path / "b.sqlite3").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_looping_player_cleanly_with_nothing_lost(tmp_path: Path, number: signal.Signals) -> None:
    write(tmp_path / "a.wav", 2.0)
    bus_path = tmp_path / "b.sqlite3"
    process = subprocess.Popen(
        command("file", str(tmp_path / "a.wav"), "--loop", "--realtime", "--bus-path", str(bus_path)),
        stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    try:
        wait_for(lambda: bus_path.exists() and len(chunks(bus_path)) >= 2)
        began = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=15)
    finally:
        process.kill()
        process.wait()
    assert time.monotonic() - began < 5
    assert process.returncode == 0, errors
    found = chunks(bus_path)
    assert f"1 streams, {len(found)} chunks published".encode() in errors
    assert b" 0 dropped" in errors
    assert [c.seq for c in found][:2] == [0, 1]


def test_a_scene_leaves_its_truth_beside(tmp_path: Path) -> None:
    truth = tmp_path / "truth.jsonl"
    done = run("scene", "--sensors", 2, "--seconds", 6, "--seed", 4, "--truth", truth, "--fast",
               "--bus-path", tmp_path / "b.sqlite3")  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in truth.read_text().splitlines()]
    found = chunks(tmp_path / "b.sqlite3")
    assert len(found) == 14
    assert {(c.stream_id, c.session) for c in found} == {
        (s["stream_id"], s["session"]) for s in next(line for line in lines if line["record"] == "event")["sensors"]
    }
    assert lines[-1] == {"record": "end", "seconds": 6.72, "events": len(lines) - 2}


def test_raw_pcm_from_standard_input_reaches_the_bus(tmp_path: Path) -> None:
    pcm = np.arange(16_000, dtype="<i2")
    done = run("stdin", "--bus-path", tmp_path / "b.sqlite3", "--stream-id", "pipe", stdin=pcm.tobytes())
    assert done.returncode == 0, done.stderr
    found = chunks(tmp_path / "b.sqlite3")
    assert [c.seq for c in found] == [0, 1]
    assert np.array_equal(np.concatenate([c.pcm for c in found])[:16_000], pcm)


def config_errors(tmp_path: Path) -> Sequence[tuple[str, ...]]:
    write(tmp_path / "a.wav", 0.1)
    (tmp_path / "bad.yaml").write_text("bus:\n  kind: pigeon\n")
    (tmp_path / "kafka.yaml").write_text("bus:\n  kind: kafka\n")
    a = str(tmp_path / "a.wav")
    return [
        ("file", a, "--config", str(tmp_path / "bad.yaml")),
        ("file", a, "--config", str(tmp_path / "missing.yaml")),
        ("file", a, "--config", str(tmp_path / "kafka.yaml"), "--bus-path", "x"),
        ("file", a, "--start-time", "yesterday"),
        ("file", a, "--location", "here"),
        ("file", a, "--stream-id", "{what}"),
        ("scene", "--script", str(tmp_path / "missing.yaml")),
        ("scene", "--origin", "91,0"),
        ("stdin", "--rate", "768000"),
        ("url", "no-address"),
    ]


def test_a_configuration_that_can_not_be_used_is_exit_code_78(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    import producers.__main__
    from producers.__main__ import main

    monkeypatch.setattr(producers.__main__, "configure_logging", lambda settings: None)

    for arguments in config_errors(tmp_path):
        result = CliRunner().invoke(main, list(arguments))
        assert result.exit_code == 78, (arguments, result.output, result.exception)
        assert "Error: " in result.output
        assert "Traceback" not in result.output


def test_a_damaged_bus_file_is_a_clear_error_not_a_hang(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", 3.0)
    (tmp_path / "b.sqlite3").write_bytes(b"this is no database, but long enough to look at\n" * 100)
    done = run("file", tmp_path / "a.wav", "--fast", "--bus-path", tmp_path / "b.sqlite3")
    assert done.returncode == 1
    assert b"Nothing more can be published" in done.stderr
    assert b"b.sqlite3" in done.stderr


def test_a_locked_bus_is_waited_for(tmp_path: Path) -> None:
    import sqlite3

    bus_path = tmp_path / "b.sqlite3"
    EmbeddedBus(bus_path).close()
    write(tmp_path / "a.wav", 2.0)
    locker = sqlite3.connect(bus_path, isolation_level=None)
    locker.execute("BEGIN EXCLUSIVE")
    process = subprocess.Popen(
        command("file", str(tmp_path / "a.wav"), "--realtime", "--bus-path", str(bus_path)),
        stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert b"The bus is away" in line, line
        locker.execute("ROLLBACK")
        locker.close()
        _, errors = process.communicate(timeout=40)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    assert [c.seq for c in chunks(bus_path)] == [0, 1, 2]
