"""The commands as people run them: real processes, a real bus file, the built-in model."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import soundfile
import yaml

from detector import alert as alerts
from detector.audio import float_to_int16
from detector.bus.embedded import EmbeddedBus
from detector.chunk import CHUNK_SAMPLES, Chunk, encode
from detector.demo import free_port, wait_ready
from tests.sounds import noise_with_shots, reverberant_shot

# Low enough that a synthetic shot opens an alert whatever model is shipped: what is tested is all around it.
EAGER = {"DETECTOR__DECISION__OPEN_THRESHOLD": "0.05", "TF_CPP_MIN_LOG_LEVEL": "2"}
DEADLINE_SECONDS = 60


def shots(chunks, every):
    at = range(2 * CHUNK_SAMPLES + 4000, (chunks - 1) * CHUNK_SAMPLES, every * CHUNK_SAMPLES)
    return float_to_int16(noise_with_shots(np.random.default_rng(1), chunks, at, reverberant_shot))


def command(*arguments, **environ):
    return subprocess.run(
        [sys.executable, "-m", "detector", *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=DEADLINE_SECONDS,
        env={**os.environ, **environ},
        check=False,
    )


class Daemon:
    """``detector run`` as a process."""

    def __init__(self, folder, environ=EAGER):
        self.folder, self.port = folder, free_port()
        environ = {**os.environ, **environ, "DETECTOR__CONSOLE__PORT": str(self.port)}
        arguments = [sys.executable, "-m", "detector", "run", "--bus-path", str(folder / "bus.sqlite3")]
        self.log = (folder / "detector.log").open("ab")
        self.process = subprocess.Popen(arguments, env=environ, stdout=self.log, stderr=self.log, cwd=folder)
        try:
            wait_ready(self.process, self.port, folder)
        except BaseException:
            self.end(signal.SIGKILL)
            raise

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as reply:
            return reply.read().decode()

    def metric(self, name):
        for line in self.get("/metrics").splitlines():
            if line.startswith(name + " "):
                return float(line.split()[1])
        return 0.0

    def wait_for(self, name, value):
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self.metric(name) < value:
            assert time.monotonic() < deadline, f"{name} stays at {self.metric(name)}, below {value}"
            assert self.process.poll() is None

    def end(self, number):
        self.process.send_signal(number)
        code = self.process.wait(DEADLINE_SECONDS)
        self.log.close()
        return code


def publish(bus, pcm, streams, first=0, last=None):
    producer = bus.producer()
    for seq in range(first, last or len(pcm) // CHUNK_SAMPLES):
        part = pcm[seq * CHUNK_SAMPLES : (seq + 1) * CHUNK_SAMPLES]
        for stream in streams:
            captured_at_ns = 1_790_000_000_000_000_000 + seq * 960_000_000
            producer.send("audio.chunks", *encode(Chunk(stream, "s1", seq, captured_at_ns, part)))
    producer.flush()
    producer.close()


def alerts_of(bus):
    consumer = bus.consumer(["gunfire.alerts"], None)
    found = []
    while more := consumer.poll(0.05):
        found += [alerts.decode(r.key, r.value, r.headers) for r in more]
    consumer.close()
    return found


def test_a_killed_daemon_goes_on_where_it_was_and_a_stopped_one_drains(tmp_path):
    pcm, streams = shots(30, every=6), ["a", "b", "c"]
    daemon = Daemon(tmp_path)
    assert json.loads(daemon.get("/readyz")) == {"missing": [], "ok": True}
    assert json.loads(daemon.get("/livez"))["ok"]
    bus = EmbeddedBus(tmp_path / "bus.sqlite3")
    publish(bus, pcm, streams, 0, 15)
    daemon.wait_for("gunfire_chunks_analysed_total", 20)
    assert daemon.end(signal.SIGKILL) == -signal.SIGKILL
    publish(bus, pcm, streams, 15)
    daemon = Daemon(tmp_path)
    daemon.wait_for("gunfire_chunks_analysed_total", 45)
    daemon.wait_for('gunfire_commits_total{outcome="stored"}', 1)
    assert daemon.end(signal.SIGTERM) == 0
    found = alerts_of(bus)
    bus.close()
    opened = {(a.stream, a.onset_sample) for a in found if a.state == "opened"}
    expected = [2 * CHUNK_SAMPLES + 4000 + k * 6 * CHUNK_SAMPLES for k in range(5)]
    for stream in streams:
        onsets = sorted(o for s, o in opened if s == stream)
        assert len(onsets) == len(expected)
        assert np.abs(np.subtract(onsets, expected)).max() <= 800
    assert {a.alert_id for a in found if a.state == "opened"} == {a.alert_id for a in found if a.state == "closed"}


def test_a_port_that_is_taken_ends_the_daemon_with_code_78(tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = command("run", "--bus-path", tmp_path / "bus.sqlite3", DETECTOR__CONSOLE__PORT=port)
    assert done.returncode == 78
    assert "console.port" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_bus_ends_the_daemon_with_a_clear_error(tmp_path):
    (tmp_path / "bus.sqlite3").write_bytes(b"no database" * 1000)
    done = command("run", "--bus-path", tmp_path / "bus.sqlite3", DETECTOR__CONSOLE__PORT="0")
    assert done.returncode == 1
    assert "bus.sqlite3 is damaged or no bus file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    soundfile.write(folder / "shots.wav", shots(10, every=4), 16_000)
    soundfile.write(folder / "quiet.flac", np.zeros(48_000, np.int16), 16_000)
    stereo = np.repeat(shots(10, every=4)[:, None], 2, axis=1)
    soundfile.write(folder / "stereo.wav", stereo, 16_000, subtype="PCM_24")
    (folder / "broken.wav").write_bytes(b"RIFF nothing")
    (folder / "empty.mp3").write_bytes(b"")
    whole = (folder / "shots.wav").read_bytes()
    (folder / "cut.wav").write_bytes(whole[: len(whole) // 2])
    (folder / "dr\udcffhn.wav").write_bytes(whole)
    return folder


def test_a_scan_gives_each_file_a_row_and_bad_ones_their_error(recordings, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text(f"{recordings / 'missing.wav'}\n")
    done = command("scan", recordings, "--files-from", listed, "--threshold", "0.05")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    rows = {row["path"].rpartition("/")[2]: row for row in csv.DictReader(io.StringIO(done.stdout))}
    assert list(next(iter(rows.values()))) == ["path", "peak_score", "alerts", "onsets_seconds", "error"]
    assert set(rows) == {
        "shots.wav",
        "quiet.flac",
        "stereo.wav",
        "broken.wav",
        "empty.mp3",
        "missing.wav",
        "cut.wav",
        "dr\udcffhn.wav",
    }
    for bad in ("broken.wav", "empty.mp3", "missing.wav"):
        assert bad in rows[bad]["error"]
        assert (rows[bad]["peak_score"], rows[bad]["alerts"], rows[bad]["onsets_seconds"]) == ("", "", "")
    assert "truncated" in rows["cut.wav"]["error"]
    assert rows["cut.wav"]["peak_score"]
    assert rows["quiet.flac"]["alerts"] == "0"
    assert rows["quiet.flac"]["error"] == ""
    for name in ("shots.wav", "stereo.wav"):
        onsets = [float(s) for s in rows[name]["onsets_seconds"].split()]
        expected = [(2 + 4 * k) * 0.96 + 0.25 for k in range(2)]
        assert all(min(abs(o - e) for o in onsets) < 0.05 for e in expected)
        assert int(rows[name]["alerts"]) >= 1
    assert rows["shots.wav"]["peak_score"] == rows["stereo.wav"]["peak_score"]


def test_a_scan_as_json_has_the_same_fields(recordings):
    done = command("scan", recordings / "quiet.flac", "--format", "json")
    assert done.returncode == 0
    (row,) = json.loads(done.stdout)
    assert set(row) == {"path", "peak_score", "alerts", "onsets_seconds", "error"}
    assert row["alerts"] == 0
    assert 0 <= row["peak_score"] <= 1


def test_a_scan_names_an_empty_folder_and_does_the_rest(recordings, tmp_path):
    done = command("scan", tmp_path, recordings / "quiet.flac", recordings / "broken.wav", "--format", "json")
    assert done.returncode == 1
    assert f"Folder {tmp_path} holds no audio file" in done.stderr
    assert [row["alerts"] for row in json.loads(done.stdout)] == [0, None]
    nothing = command("scan", tmp_path)
    assert nothing.returncode == 2
    assert f"Folder {tmp_path} holds no audio file" in nothing.stderr


def test_a_scan_is_the_same_whatever_is_scanned_beside(recordings):
    alone = command("scan", recordings / "shots.wav").stdout.splitlines()[1]
    beside = command("scan", *[recordings / "shots.wav"] * 3, recordings / "quiet.flac", "--workers", "1").stdout
    assert beside.splitlines()[1:4] == [alone] * 3


def test_watch_shows_alerts_and_ends_on_a_signal(tmp_path):
    daemon = Daemon(tmp_path)
    arguments = [sys.executable, "-m", "detector", "watch", "--format", "json", "--from-beginning", "--bus-path"]
    watch = subprocess.Popen([*arguments, str(tmp_path / "bus.sqlite3")], stdout=subprocess.PIPE, text=True)
    bus = EmbeddedBus(tmp_path / "bus.sqlite3")
    publish(bus, shots(8, every=6), ["roof"])
    line = json.loads(watch.stdout.readline())
    watch.send_signal(signal.SIGINT)
    assert watch.wait(DEADLINE_SECONDS) == 0
    watch.stdout.close()
    assert (line["stream"], line["state"]) == ("roof", "opened")
    assert daemon.end(signal.SIGTERM) == 0
    bus.close()


def test_check_prints_the_settings_that_apply_and_refuses_what_is_wrong():
    good = command("check", DETECTOR__BATCH__MAX_BATCH="32")
    assert good.returncode == 0
    assert "max_batch: 32" in good.stdout
    bad = command("check", DETECTOR__BATCH__MAX_BATCH="many", DETECTOR__BATCH__MAX_BACH="1")
    assert bad.returncode == 78
    assert "batch.max_batch" in bad.stderr
    assert "MAX_BACH" in bad.stderr


def test_check_reads_the_models_manifest_and_says_where_alerts_open():
    chosen = command("check", DETECTOR__DECISION__FALSE_ALERTS_PER_DAY="10")
    assert chosen.returncode == 0
    assert re.search(r"^# Model compact-gunfire .* Alerts open at .* 10 false alerts a day", chosen.stdout, re.M)
    assert yaml.safe_load(chosen.stdout)["decision"]["false_alerts_per_day"] == 10
    unknown = command("check", DETECTOR__MODEL__NAME="loud-gunfire")
    assert (unknown.returncode, unknown.stdout) == (78, "")
    assert "model.name: Model 'loud-gunfire' is not among the shipped ones (compact-gunfire" in unknown.stderr
    label = command("check", DETECTOR__DECISION__FAMILY="[Cannon]")
    assert label.returncode == 78
    assert "decision.family: model compact-gunfire has no label 'Cannon'" in label.stderr


def test_reading_a_manifest_imports_no_tensorflow():
    code = "import sys, detector.pipeline; from detector.model import load_manifest; load_manifest('compact-gunfire')"
    done = subprocess.run([sys.executable, "-c", f"{code}; sys.exit('tensorflow' in sys.modules)"], check=False)
    assert done.returncode == 0


def test_the_shipped_models_are_listed_and_verify():
    assert "compact-gunfire" in command("models", "list").stdout
    verified = command("models", "verify")
    assert verified.returncode == 0
    assert "self-test passed" in verified.stdout


def test_a_model_that_does_not_exist_is_named_with_those_that_do(recordings):
    done = command("scan", recordings / "quiet.flac", "--model", "loud-gunfire")
    assert done.returncode == 1
    assert "loud-gunfire" in done.stderr
    assert "compact-gunfire" in done.stderr
