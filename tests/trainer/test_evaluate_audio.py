"""evaluate-audio judges by time, counts false alerts in hours, and says what its audio can't show."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from detector.chunk import RATE_HZ
from detector.decision import DecisionSettings
from detector.errors import DataError
from tests.scorers import IDENTITY, LABELS, CrestScorer
from tests.sounds import noise_with_shots
from trainer.__main__ import main
from trainer.compact.evaluation import Recording, false_alert_peaks
from trainer.evaluate_audio import (
    Remembering,
    Share,
    Shot,
    Subject,
    clip_threshold,
    examine,
    listen,
    report,
)

SUBJECT = Subject(
    "crest",
    CrestScorer(),
    LABELS,
    IDENTITY,
    10,
    DecisionSettings(open_threshold=0.6, close_threshold=0.4, family=(0, 1), look_alikes=(2,)),
    0.6,
)
SHOT_SECONDS = 4.0


def _recording(name: str, seed: int, shot: bool, folder: str = "street", seconds: int = 8) -> Recording:
    rng = np.random.default_rng(seed)
    at = range(int(SHOT_SECONDS * RATE_HZ), int(SHOT_SECONDS * RATE_HZ) + 1) if shot else range(0)
    x = noise_with_shots(rng, seconds, at)
    label = "gunshot" if shot else "noise"
    return Recording(f"{folder}/{name}", folder, label, shot, np.round(x * 32767).astype(np.int16))


RECORDINGS = [
    *(_recording(f"shot{i}", i, True) for i in range(4)),
    *(_recording(f"quiet{i}", 100 + i, False) for i in range(4)),
    *(_recording(f"place{i}", 200 + i, False, "ambient", 40) for i in range(3)),
]
TAGGED = {f"street/shot{i}": (Shot(SHOT_SECONDS, 100.0 + 200 * i, 12.0),) for i in range(4)}


def _report(shots, threshold: float = 0.6):
    heard = listen(SUBJECT, RECORDINGS, threshold, 0.96)
    return report(SUBJECT, heard, shots, threshold, 0.96, None)


def test_a_tagged_shot_is_heard_with_its_onset_its_distance_and_its_delay():
    found = _report(TAGGED)
    assert found.recall["street"] == Share(4, 4)
    assert found.shots == Share(4, 4)
    assert found.by_distance == {
        "under 150": Share(1, 1),
        "300 to 450": Share(1, 1),
        "450 to 600": Share(1, 1),
        "600 to 900": Share(1, 1),
    }
    assert found.by_snr == {"10 to 15": Share(4, 4)}
    assert max(map(abs, found.onset_errors_seconds)) < 0.01
    assert all(0.0 < delay <= 0.96 + 0.02 for delay in found.latencies_seconds)


def test_with_two_examples_a_chunk_the_delay_still_counts_to_the_end_of_the_chunk():
    delays = {
        hop: report(SUBJECT, listen(SUBJECT, RECORDINGS, 0.6, hop), TAGGED, 0.6, hop, None).latencies_seconds
        for hop in (0.96, 0.48)
    }
    chunk_ends = np.arange(1, 10) * 0.96 - SHOT_SECONDS
    for found in delays.values():
        assert len(found) == 4
        assert all(np.abs(chunk_ends - delay).min() < 1e-6 for delay in found)
    assert max(delays[0.48]) <= max(delays[0.96])


def test_an_alert_at_the_wrong_time_is_no_hearing():
    elsewhere = {path: (Shot(SHOT_SECONDS + 0.5, 100.0, 12.0),) for path in TAGGED}
    found = _report(elsewhere)
    assert found.recall["street"] == Share(0, 4)
    assert found.shots == Share(0, 4)
    assert found.onset_errors_seconds == ()
    assert found.latencies_seconds == ()


def test_without_tags_any_alert_counts():
    assert _report({}).recall["street"] == Share(4, 4)


def test_false_alerts_are_counted_by_the_hour_with_their_interval():
    found = _report(TAGGED)
    assert found.audio_hours == pytest.approx(3 * 40 * 0.96 / 3600)
    assert found.false_alerts == 0
    rate, low, high = found.per_hour()
    assert (rate, low) == (0.0, 0.0)
    assert high == pytest.approx(3.689 / found.audio_hours, rel=1e-3)
    assert found.negatives == Share(0, 7)


def test_one_pass_of_the_network_serves_every_threshold():
    scorer = CrestScorer()
    remembering = Remembering(scorer)
    pcm = np.random.default_rng(3).integers(-999, 999, (5, 15_600)).astype(np.int16)
    first = remembering.embed(pcm)
    again = remembering.embed(pcm[::-1])
    np.testing.assert_array_equal(first[::-1], again)
    np.testing.assert_array_equal(first, CrestScorer().embed(pcm))
    assert sum(scorer.calls) == 5
    windows = np.random.default_rng(4).random((6, 10, 128)).astype(np.float32)
    frames = np.array([1, 4, 10, 4, 2, 10], np.int32)
    np.testing.assert_array_equal(remembering.classify(windows, frames), scorer.classify(windows, frames))
    np.testing.assert_array_equal(remembering.classify(windows, frames), scorer.classify(windows, frames))


def test_peaks_close_together_are_one_false_alert():
    scores = np.zeros(1000, np.float32)
    scores[[100, 102, 500, 900, 901, 902]] = (0.5, 0.7, 0.3, 0.2, 0.6, 0.1)
    peaks = false_alert_peaks([scores], hop_seconds=0.96, hold_seconds=1.92)
    assert peaks == pytest.approx((0.7, 0.6, 0.3))
    assert false_alert_peaks([], 0.96, 1.92) == ()


def test_the_compared_threshold_lets_one_percent_of_negative_recordings_through():
    heard = listen(SUBJECT, RECORDINGS, 1.0, 0.96, 1.0)
    threshold = clip_threshold(heard)
    assert sum(h.peak >= threshold for h in heard if not h.recording.positive) == 0
    half = clip_threshold(heard, 0.5)
    assert sum(h.peak >= half for h in heard if not h.recording.positive) == 3
    with pytest.raises(DataError, match="without gunfire"):
        clip_threshold([h for h in heard if h.recording.positive])


def test_an_examination_is_strict_json_and_has_a_curve_only_where_it_can():
    found = examine(SUBJECT, RECORDINGS, TAGGED)
    content = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert content["at_own_threshold"]["recall"]["street"]["value"] == 1.0
    assert content["at_clip_threshold"]["tagged_shots"]["whole"] == 4
    if len(found.counted.peaks) < 10:
        assert found.curve == ()
    rates = [point.rate.per_day for point in found.curve]
    assert rates == sorted(rates, reverse=True)


def test_an_interval_of_nothing_is_not_known():
    assert all(math.isnan(value) for value in Share(0, 0).interval())
    low, high = Share(9, 10).interval()
    assert 0.5 < low < 0.9 < high < 1.0


@pytest.fixture
def audio_folder(tmp_path):
    rows = ["path,label,split,seconds,sample_rate_hz,source,licence,group"]
    tags = ["file,test_id,firing_position,firearm,num_rounds,shot_index,onset_seconds,distance_metres,snr_db"]
    for recording in RECORDINGS:
        path = tmp_path / "audio" / f"{recording.path}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, recording.pcm, RATE_HZ)
        rows.append(f"{recording.path}.wav,{recording.label},dev,8,16000,made,CC0,{recording.path}")
    tags += [f"{name}.wav,1,A,pistol,1,0,{SHOT_SECONDS},100,12" for name in TAGGED]
    (tmp_path / "audio" / "index.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "audio" / "shotspotter").mkdir()
    (tmp_path / "audio" / "shotspotter" / "onsets.csv").write_text("\n".join(tags) + "\n")
    return tmp_path


def test_the_command_hears_the_built_in_model_and_says_what_it_found(audio_folder):
    out = audio_folder / "report.json"
    arguments = ["evaluate-audio", "--data-dir", str(audio_folder), "--format", "json", "--output", str(out)]
    result = CliRunner().invoke(main, [*arguments, "--plot", str(audio_folder / "curve.svg")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    content = json.loads(out.read_text())
    (found,) = content["subjects"]
    assert [line[:10] for line in content["left_out"]] == ["Peer yamne", "Peer ced-t"]  # not in this folder
    assert found["subject"].startswith("compact-gunfire")
    assert found["at_clip_threshold"]["negative_recordings"]["whole"] == 7
    assert (audio_folder / "curve.svg").read_text().startswith("<?xml")
    text = CliRunner().invoke(main, arguments[:3], catch_exceptions=False)
    assert "Recordings with gunfire that were heard" in text.stdout
    assert "Recordings without gunfire that have an alert: none." in text.stdout
    for said in (text.stdout, text.stderr):
        assert f"Left out. Peer yamnet: {audio_folder}/yamnet/yamnet.tflite is missing" in said


def test_without_tagged_shots_and_continuous_audio_the_rest_is_examined_and_what_is_missing_said(audio_folder):
    (audio_folder / "audio" / "shotspotter" / "onsets.csv").unlink()
    arguments = ["evaluate-audio", "--data-dir", str(audio_folder), "--no-peers", "--set", "street"]
    plot = audio_folder / "curve.svg"
    result = CliRunner().invoke(main, [*arguments, "--plot", str(plot)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for said in (result.stdout, result.stderr):
        assert f"Left out. Tagged shots and set shotspotter: {audio_folder}/audio/shotspotter/onsets.csv is" in said
        assert "Left out. False alerts an hour and a day: no continuous audio (set `ambient`)" in said
    assert "Tagged shots with an onset within the tolerance: none." in result.stdout
    assert "100.0 % of 4" in result.stdout
    assert "nan" not in result.stdout
    assert "for a curve" not in result.stdout


@pytest.mark.parametrize(
    ("option", "name", "words"),
    [
        ("--output", "nowhere/report.txt", "there is no folder"),
        ("--plot", "nowhere/curve.svg", "there is no folder"),
        ("--plot", "curve.pdf", r"must end in .png or .svg"),
    ],
)
def test_what_can_not_be_written_is_refused_before_anything_is_heard(audio_folder, monkeypatch, option, name, words):
    monkeypatch.setattr("detector.model.load_model", None)  # it does not get there
    arguments = ["evaluate-audio", "--data-dir", str(audio_folder), option, str(audio_folder / name)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 78
    assert name in result.stderr
    assert words in result.stderr


def test_what_is_missing_is_named(tmp_path, audio_folder):
    result = CliRunner().invoke(main, ["evaluate-audio", "--data-dir", str(tmp_path / "nowhere"), "--no-peers"])
    assert result.exit_code == 78
    assert f"{tmp_path / 'nowhere'} (environment: DATA_DIR) holds no audio/index.csv" in result.output
    result = CliRunner().invoke(main, ["evaluate-audio", "--data-dir", str(audio_folder), "--set", "moon"])
    assert result.exit_code == 78
    assert "there are ambient, street" in result.output
