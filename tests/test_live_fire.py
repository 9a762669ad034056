"""Real shots through real processes: ``producers file`` beside ``detector run``, against the tagged onsets."""

import csv
import os
import subprocess
import sys
from collections import defaultdict

import pytest

from detector.bus.embedded import EmbeddedBus
from tests.test_detector_commands import Daemon, alerts_of

POSITION = "FP5"
NEAR_SECONDS = 0.1
MIN_ALERTS_AT_A_SHOT = 0.9
MIN_FILES_HEARD = 0.6  # at the default threshold, which no ambient dev recording may reach


@pytest.fixture
def tagged(data_dir):
    onsets = defaultdict(list)
    with (data_dir / "audio" / "shotspotter" / "onsets.csv").open() as file:
        for row in csv.DictReader(file):
            if row["firing_position"] == POSITION:
                onsets[row["file"].rpartition("/")[2]].append(float(row["onset_seconds"]))
    return dict(onsets)


def test_alerts_on_live_fire_carry_the_onsets_that_people_tagged(data_dir, tagged, tmp_path):
    folder = data_dir / "audio" / "shotspotter"
    files = sorted(p for p in (folder / POSITION).rglob("*.flac") if p.name in tagged)
    daemon = Daemon(tmp_path, environ={})
    command = [sys.executable, "-m", "producers", "file", *map(str, files), "--fast", "--stream-id", "{name}"]
    played = subprocess.run(
        [*command, "--bus-path", str(tmp_path / "bus.sqlite3")],
        env=dict(os.environ), capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    chunks = len(files) * 11  # 10 s are 10.4 chunks
    assert f"{chunks} chunks" in played.stderr
    daemon.wait_for("gunfire_chunks_analysed_total", chunks)
    bus = EmbeddedBus(tmp_path / "bus.sqlite3")
    assert daemon.end(15) == 0
    final = {}
    for alert in alerts_of(bus):
        if alert.alert_id not in final or alert.revision > final[alert.alert_id].revision:
            final[alert.alert_id] = alert
    bus.close()
    at_a_shot = [
        any(abs(o.sample / 16_000 - t) <= NEAR_SECONDS for o in a.onsets for t in tagged[a.stream])
        for a in final.values()
    ]
    assert sum(at_a_shot) >= MIN_ALERTS_AT_A_SHOT * len(at_a_shot)
    heard = {a.stream for a, right in zip(final.values(), at_a_shot, strict=True) if right}
    assert len(heard) >= MIN_FILES_HEARD * len(files)
