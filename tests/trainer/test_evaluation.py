"""Evaluation frames recordings as the daemon does, and counts honestly."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from detector.embedders.params import CARRY_SAMPLES, EXAMPLE_HOP_SAMPLES, EXAMPLE_SAMPLES
from detector.errors import AudioError
from detector.examples import ExampleAssembler
from trainer.compact import evaluation
from trainer.compact.evaluation import Recording, Scored


@given(st.integers(1, 5 * EXAMPLE_HOP_SAMPLES), st.booleans())
def test_examples_are_those_of_the_stream_assembler(length: int, half_hop: bool) -> None:
    pcm = np.random.default_rng(length).integers(-32768, 32767, length).astype(np.int16)
    hop = EXAMPLE_HOP_SAMPLES // 2 if half_hop else EXAMPLE_HOP_SAMPLES
    padded = np.pad(pcm, (0, -length % EXAMPLE_HOP_SAMPLES))
    assembler = ExampleAssembler(hop)
    expected = [
        example.pcm
        for start in range(0, len(padded), EXAMPLE_HOP_SAMPLES)
        for example in assembler.push(padded[start : start + EXAMPLE_HOP_SAMPLES], start)
    ]
    whole = evaluation.examples_of(pcm)
    if half_hop:
        seams = evaluation.examples_of(pcm, EXAMPLE_HOP_SAMPLES // 2)
        found = np.empty((len(whole) + len(seams), EXAMPLE_SAMPLES), np.int16)
        found[0::2], found[1::2] = whole, seams
    else:
        found = whole
    np.testing.assert_array_equal(found, np.stack(expected))


@pytest.fixture
def audio_dir(tmp_path: Path) -> Path:
    """One dev recording of rain, and no live fire."""
    folder = tmp_path / "audio"
    (folder / "shotspotter").mkdir(parents=True)
    (folder / "shotspotter" / "onsets.csv").write_text("file,num_rounds,onset_seconds\n")
    (folder / "index.csv").write_text("path,label,split,licence,group\na/rain.wav,rain,dev,CC0,g\n")
    (folder / "a").mkdir()
    soundfile.write(folder / "a" / "rain.wav", np.full(8_000, 0.1), 8_000)
    return folder


def test_the_cache_is_used_until_a_file_changes(
    audio_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is called; and another resampling is another cache."""
    cache = tmp_path / "new" / "cache"
    (first,) = evaluation.load_recordings(audio_dir, cache)
    assert [path.name for path in cache.parent.iterdir()] == ["cache"]
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "_read", None)
        (again,) = evaluation.load_recordings(audio_dir, cache)
        np.testing.assert_array_equal(first.pcm, again.pcm)
        with pytest.raises(TypeError):
            evaluation.load_recordings(audio_dir, cache.with_name("other"))
    rain = audio_dir / "a" / "rain.wav"
    soundfile.write(rain, np.full(8_000, 0.2), 8_000)
    os.utime(rain, ns=(0, 5))  # as large as before
    (changed,) = evaluation.load_recordings(audio_dir, cache)
    assert changed.pcm.max() > 1.5 * first.pcm.max()
    before = cache.stat().st_mtime_ns
    evaluation.load_recordings(audio_dir, cache, quick=True)
    assert cache.stat().st_mtime_ns != before


@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_cache_cut_short_is_made_anew(audio_dir: Path, tmp_path: Path, kept: float) -> None:
    cache = tmp_path / "cache.npz"
    (first,) = evaluation.load_recordings(audio_dir, cache)
    whole = cache.read_bytes()
    cache.write_bytes(whole[: int(kept * len(whole))])
    (again,) = evaluation.load_recordings(audio_dir, cache)
    np.testing.assert_array_equal(first.pcm, again.pcm)
    assert len(cache.read_bytes()) == len(whole)


def test_a_recording_that_is_missing_or_empty_is_named(audio_dir: Path, tmp_path: Path) -> None:
    rain = audio_dir / "a" / "rain.wav"
    soundfile.write(rain, np.zeros(0), 8_000)
    with pytest.raises(AudioError, match=r"rain\.wav holds no sample"):
        evaluation.load_recordings(audio_dir)
    rain.unlink()
    with pytest.raises(AudioError, match=r"rain\.wav can't be read"):
        evaluation.load_recordings(audio_dir, tmp_path / "cache.npz")


class _Loudness:
    """A scorer whose score is the newest example's mean level: transparent enough to check the plumbing."""

    labels = ("Gunshot, gunfire", "Machine gun")
    window_examples = 3

    def embed(self, pcm: np.ndarray) -> np.ndarray:
        return np.abs(pcm / 32768.0).mean(axis=1, keepdims=True).astype(np.float32)

    def classify(self, windows: np.ndarray, num_frames: np.ndarray) -> np.ndarray:
        newest = windows[np.arange(len(windows)), num_frames - 1, 0]
        return np.stack([newest, newest / 2], axis=1)


def _recording(levels: list[float], label: str, onsets: tuple[float, ...] = ()) -> Recording:
    pcm = np.repeat(np.array(levels) * 32767, EXAMPLE_HOP_SAMPLES).astype(np.int16)
    return Recording(
        f"made/{label}", "ambient" if label == "ambient" else "made", label, label == "gunshot", pcm, onsets
    )


def test_each_example_is_scored_in_its_place() -> None:
    (scored,) = evaluation.score_recordings(_Loudness(), [_recording([0.1, 0.9, 0.3, 0.2, 0.5], "gunshot")])
    np.testing.assert_allclose(scored.scores, [0.1, 0.9, 0.3, 0.2, 0.5], atol=0.02)


def test_a_shot_counts_as_heard_only_where_it_is() -> None:
    recordings = [_recording([0.1, 0.9, 0.1, 0.1], "gunshot", (1.2, 3.2)), _recording([0.5], "ambient")]
    found = evaluation.report(evaluation.score_recordings(_Loudness(), recordings), 0.6)
    assert found.recall == {"made": 1.0}
    assert found.tagged_shots_heard == 0.5


def test_the_threshold_lets_no_more_than_its_share_of_negatives_through() -> None:
    scores = np.linspace(0, 1, 250, dtype=np.float32)
    scored = [
        Scored(Recording(str(i), "n", "rain", False, np.zeros(CARRY_SAMPLES, np.int16)), np.array([s]), 15360)
        for i, s in enumerate(scores)
    ]
    for share in (0.0, 0.01, 0.05):
        assert np.mean(scores > evaluation.clip_threshold(scored, share)) <= share


def test_poisson_intervals_are_the_exact_ones() -> None:
    assert evaluation.poisson_interval(0)[1] == pytest.approx(3.689, abs=1e-3)  # Garwood 1936, table
    assert evaluation.poisson_interval(10) == pytest.approx((4.795, 18.39), abs=5e-3)
