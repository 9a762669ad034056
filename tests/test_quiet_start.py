"""Commands say nothing of TensorFlow's start; everything else on standard error comes through."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.peers import YamnetPeer

START = "from detector.cli import quiet_tensorflow, startup_lines_left_out\nimport os, sys\n"


def said(code: str, **environment: str) -> tuple[int, list[str]]:
    """Exit code and lines on standard error of a Python process of its own."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    done = subprocess.run(
        [sys.executable, "-c", START + code], capture_output=True, text=True, env={**given, **environment}, check=False
    )
    return done.returncode, done.stderr.splitlines()


def test_importing_tensorflow_says_nothing() -> None:
    code = "quiet_tensorflow()\nimport tensorflow as tf\ntf.constant(1) + 1\nprint('done', file=sys.stderr)"
    assert said(code) == (0, ["done"])


def test_a_peer_starts_without_a_word(data_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ai_edge_litert")
    path = data_dir / "yamnet" / "yamnet.tflite"
    if not path.is_file():
        pytest.skip("no YAMNet in DATA_DIR")
    YamnetPeer(path, data_dir / "yamnet" / "yamnet_class_map.csv")
    assert capfd.readouterr().err == ""


def test_what_is_not_of_the_start_is_passed_on_in_order_and_errors_too() -> None:
    code = """
with startup_lines_left_out():
    os.write(2, b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\\n")
    os.write(2, b"I0000 00:00:1795387607.726198   25808 port.cc:153] oneDNN custom operations are on.\\n")
    os.write(2, b"E0000 00:00:1795387607.726198   25808 loader.cc:1] no GPU memory\\n")
    print("WARNING: disk nearly full", file=sys.stderr)
print("after", file=sys.stderr)
raise KeyError("traceback")
"""
    code_of_exit, lines = said(code)
    assert code_of_exit == 1
    assert lines[0].endswith("no GPU memory")
    assert lines[1:3] == ["WARNING: disk nearly full", "after"]
    assert "Traceback" in lines[3]
    assert lines[-1] == "KeyError: 'traceback'"


def test_the_last_words_of_a_library_that_aborts_come_through() -> None:
    # a core file would be left behind
    code = """
import resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
with startup_lines_left_out():
    os.write(2, b"compiled to use AVX instructions, but these aren't available\\n")
    os.abort()
"""
    code_of_exit, lines = said(code)
    assert code_of_exit < 0
    assert lines == ["compiled to use AVX instructions, but these aren't available"]
