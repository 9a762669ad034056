"""Pools hold what may be trained on; scenes say what they hold; a tiny run learns and gives a package that loads."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from detector.chunk import RATE_HZ
from detector.embedders.params import EXAMPLE_HOP_SAMPLES, EXAMPLE_SAMPLES
from detector.errors import ConfigError, ModelError
from detector.model import load_model
from trainer.__main__ import main
from trainer.compact import evaluation, synthesis
from trainer.compact.dataset import DataPlan, load_data, make_shard, make_shards
from trainer.compact.packaging import choose_thresholds, export, operating_curve
from trainer.compact.pools import LABELS, Clip, Pool, find_onsets, load_pool, read_index
from trainer.compact.scenes import SCENE_EXAMPLES, SCENE_SAMPLES, UNDECIDED_SAMPLES, compose
from trainer.compact.training import Trained, TrainingSettings, blended, scorer_of, train_embedder, train_head


@pytest.fixture(scope="module")
def pool_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool made of nothing but synthesis, of every kind and source that scenes ask for."""
    folder = tmp_path_factory.mktemp("pool")
    rng = np.random.default_rng(7)
    pieces: list[np.ndarray] = []
    clips: list[Clip] = []

    def add(path: str, kind: str, label: int, x: np.ndarray, onsets: tuple[int, ...] = ()) -> None:
        pcm = np.clip(np.rint(x * 32768), -32768, 32767).astype(np.int16)
        clips.append(Clip(path, kind, label, sum(map(len, pieces)), len(pcm), onsets))
        pieces.append(pcm)

    noise = 0.01 * synthesis.coloured_noise(rng, 10 * RATE_HZ)
    blast = synthesis.convolve(synthesis.shot(rng, 20.0, supersonic=False)[0], synthesis.place_response(rng, "urban"))
    sound = noise.copy()
    sound[5 * RATE_HZ : 5 * RATE_HZ + len(blast)] += 0.5 * blast
    sound[: 2 * RATE_HZ] = 0
    onset = 5 * RATE_HZ + synthesis.LEAD_SAMPLES
    add("shotspotter/a.flac", "live", 0, sound, (onset,))
    for source in ("ffsl", "kabealo", "sesa", "katsis"):
        add(f"{source}/a.flac", "shot", 0, sound[4 * RATE_HZ :], (onset - 4 * RATE_HZ,))
    add("ambient/a.flac", "background", LABELS.index("Environmental noise"), noise)
    add("esc50/a.flac", "event", LABELS.index("Knock"), synthesis.knocks(rng))
    np.save(folder / "pool.npy", np.concatenate(pieces))
    (folder / "pool.json").write_text(json.dumps([asdict(clip) for clip in clips]))
    return folder


@pytest.fixture(scope="module")
def pool(pool_folder: Path) -> Pool:
    return load_pool(pool_folder)


def test_nothing_of_dev_or_without_a_licence_is_trainable(data_dir: Path) -> None:
    rows = read_index(data_dir / "audio")
    for row in rows:
        if row.split != "train" or row.licence.startswith("not stated"):
            assert not row.trainable, row.path
    assert sum(row.trainable for row in rows) > 1000


def test_onsets_of_made_shots_are_found_to_a_few_milliseconds() -> None:
    rng = np.random.default_rng(4)
    x = 0.001 * rng.standard_normal(3 * RATE_HZ)
    at = [8_000, 20_000, 36_000]
    for start in at:
        shot, onset = synthesis.shot(rng, 10.0, supersonic=False)
        x[start - onset : start - onset + len(shot)] += 0.5 * shot
    found = find_onsets(x, rise_db=9.0, range_db=22.0, low_hz=150.0)
    assert len(found) == len(at)
    np.testing.assert_allclose(found, at, atol=0.006 * RATE_HZ)


def test_scenes_are_a_function_of_seed_and_number(pool: Pool) -> None:
    for index in range(6):
        first, again = compose(pool, 3, index, codecs=False), compose(pool, 3, index, codecs=False)
        np.testing.assert_array_equal(first.pcm, again.pcm)
        np.testing.assert_array_equal(first.targets, again.targets)
    assert not np.array_equal(first.pcm, compose(pool, 4, index, codecs=False).pcm)


def test_scenes_hold_shots_and_quiet_and_never_label_what_digital_silence_hides(pool: Pool) -> None:
    shots = decided = 0
    for index in range(60):
        scene = compose(pool, 1, index, codecs=False)
        assert scene.pcm.shape == (SCENE_SAMPLES,)
        assert scene.targets.shape == scene.weights.shape == (SCENE_EXAMPLES, len(LABELS))
        assert np.isin(scene.targets, (0, 1)).all()
        assert (scene.weights >= 0).all()
        assert (scene.weights <= 1).all()
        for k in range(SCENE_EXAMPLES):
            heard = scene.pcm[k * EXAMPLE_HOP_SAMPLES :][: EXAMPLE_SAMPLES - UNDECIDED_SAMPLES]
            if scene.targets[k, 0] and scene.weights[k, 0] > 0.5:
                assert heard.any(), f"scene {index}, example {k}: a sure shot in digital silence"
        shots += int(scene.targets[:, 0].sum())
        decided += int(((scene.targets[:, 0] == 0) & (scene.weights[:, 0] == 1)).sum())
    assert shots > 30
    assert decided > 200


@pytest.fixture(scope="module")
def plan(pool_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DataPlan:
    made = DataPlan(pool_folder, tmp_path_factory.mktemp("data"), scenes=40, seed=5, codecs=False)
    assert list(make_shards(made, processes=1)) == [0, 1]
    return made


def test_shards_are_kept_and_made_again_alike(plan: DataPlan) -> None:
    before = plan.shard_path(0).stat().st_mtime_ns
    assert list(make_shards(plan, processes=1)) == [1]
    assert plan.shard_path(0).stat().st_mtime_ns == before
    first = load_data(plan)
    make_shard(plan, 0)
    np.testing.assert_array_equal(first.log_mel, load_data(plan).log_mel)


def test_missing_steps_are_named(tmp_path: Path, plan: DataPlan) -> None:
    with pytest.raises(ConfigError, match="trainer compact prepare"):
        load_pool(tmp_path)
    with pytest.raises(ConfigError, match="synthesise"):
        load_data(DataPlan(plan.pool_folder, tmp_path, 10, 1))
    with pytest.raises(ModelError, match="trainer compact train"):
        Trained.load(tmp_path / "trained.npz")
    command = ["compact", "--data-dir", str(tmp_path), "--work", str(tmp_path / "w"), "prepare"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 78
    assert "DATA_DIR" in result.output


def test_a_tiny_run_learns_and_its_package_scores_like_what_was_trained(plan: DataPlan, tmp_path: Path) -> None:
    data = load_data(plan)
    settings = TrainingSettings(epochs=5, batch_examples=32, head_epochs=4, head_passes=1)
    said: list[str] = []
    network, example_head, losses = train_embedder(data, settings, lambda *a: said.append(a[2]), max_steps=60)
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    lstm, head_losses = train_head(data, network, settings, lambda *a: said.append(a[2]))
    assert np.mean(head_losses[-3:]) < np.mean(head_losses[:3])
    assert said
    trained = Trained(
        network.weights(),
        {"weights": example_head.weights.numpy(), "bias": example_head.bias.numpy()},
        {name: variable.numpy() for name, variable in lstm.named_variables().items()},
    )
    trained.save(tmp_path / "trained.npz")
    scorer = scorer_of(Trained.load(tmp_path / "trained.npz"))
    pcm = (3000 * np.random.default_rng(1).standard_normal((3, EXAMPLE_SAMPLES))).astype(np.int16)
    recordings = [
        evaluation.Recording("a", "made", "gunshot", True, pcm[0], (0.3,)),
        evaluation.Recording("b", "ambient", "ambient", False, pcm[1]),
    ]
    scored = evaluation.score_recordings(scorer, recordings)
    thresholds = choose_thresholds(scored)
    assert thresholds[0] > evaluation.ambient_threshold(scored)
    model = export(
        trained,
        tmp_path / "package",
        version="0.0.1",
        command="a test",
        date="2026-01-01",
        thresholds=thresholds,
        curve=operating_curve(scored),
    )
    served = load_model(tmp_path / "package")
    served.self_test()
    assert served.sha256 == model.sha256
    again = evaluation.score_recordings(served, recordings)
    for one, other in zip(scored, again, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)


def test_blending_takes_the_mean_of_embedders_and_the_first_heads() -> None:
    def run(value: float, size: int = 3) -> Trained:
        return Trained(
            {"k": np.full(size, value, np.float32)}, {"weights": np.array([value])}, {"h": np.array([value])}
        )

    mixed = blended([run(1.0), run(2.0)])
    np.testing.assert_allclose(mixed.embedder["k"], 1.5)
    assert mixed.head["h"] == 1.0
    with pytest.raises(ModelError, match="different networks"):
        blended([run(1.0), run(2.0, size=4)])
