"""A command that takes minutes says into a log how far it is and how long it still takes, and not too often."""

from __future__ import annotations

import pytest

from trainer import progress


def test_a_log_gets_first_last_and_now_and_then_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("trainer.progress.time.monotonic", lambda: now)
    with progress.shown(lines=True) as tell:
        for done in range(101):
            tell("Scenes", done, 100, f"note {done}")
            now += 10.0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Scenes: 0 of 100, 0:00 gone, note 0"
    assert lines[1] == "Scenes: 3 of 100, 0:30 gone, 16:10 left, note 3"
    assert lines[-1].startswith("Scenes: 100 of 100, 16:40 gone, 0:00 left")
    assert len(lines) == 35


def test_what_is_over_in_seconds_leaves_no_line_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.shown() as tell:
        tell("Clips", 5, 10, "")
    assert capsys.readouterr().err == ""
