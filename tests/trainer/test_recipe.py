"""Pools hold what may be trained on; scenes say what they hold; a tiny run learns and gives a package that loads."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from detector.chunk import RATE_HZ
from detector.embedders.compact import CompactNetwork
from detector.embedders.params import EXAMPLE_HOP_SAMPLES, EXAMPLE_SAMPLES
from detector.errors import ConfigError, ModelError
from detector.model import load_model
from trainer.__main__ import main
from trainer.compact import evaluation, synthesis
from trainer.compact.dataset import DataPlan, load_data, make_shard, make_shards, teach_shards
from trainer.compact.packaging import choose_thresholds, export, operating_curve
from trainer.compact.pools import LABELS, Clip, Pool, find_onsets, load_pool, read_index
from trainer.compact.scenes import SCENE_EXAMPLES, SCENE_SAMPLES, UNDECIDED_SAMPLES, compose
from trainer.compact.teacher import Teacher, teacher_labels
from trainer.compact.training import (
    Trained,
    TrainingSettings,
    begin,
    blended,
    scorer_of,
    train_head,
    train_top,
    train_whole,
)


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
        scene = compose(pool, 1, index, mixture=("mixed", "close")[index % 2], codecs=False)
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
def teacher(data_dir: Path) -> Teacher:
    return Teacher(data_dir / "yamnet" / "yamnet.tflite")


@pytest.fixture(scope="module")
def plan(pool_folder: Path, data_dir: Path, teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> DataPlan:
    folder = tmp_path_factory.mktemp("data")
    made = DataPlan(pool_folder, folder, 40, 5, data_dir / "yamnet" / "yamnet.tflite", codecs=False)
    assert list(make_shards(made, processes=1)) == [0, 1]
    with pytest.raises(ConfigError, match="teach"):
        load_data(made)
    assert list(teach_shards(made, teacher)) == [0, 1]
    assert list(teach_shards(made, teacher)) == [1]
    return made


def test_the_teacher_in_float_says_what_the_published_quantised_network_says(data_dir: Path, teacher: Teacher) -> None:
    from ai_edge_litert.interpreter import Interpreter

    rng = np.random.default_rng(3)
    sounds = [
        synthesis.firecrackers(rng),
        synthesis.babble(rng, 1.0),
        synthesis.close_report(rng),
        synthesis.knocks(rng),
    ]
    pcm = np.stack([(20_000 * np.resize(x, EXAMPLE_SAMPLES)).astype(np.int16) for x in sounds])
    logits = teacher.opinion(pcm)[2].astype(np.float64)
    interpreter = Interpreter(str(data_dir / "yamnet" / "yamnet.tflite"))
    interpreter.allocate_tensors()
    for x, ours in zip(pcm, logits, strict=True):
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x.astype(np.float32) / 32768)
        interpreter.invoke()
        theirs = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0]
        assert np.corrcoef(theirs, 1 / (1 + np.exp(-ours)))[0, 1] > 0.97
    assert len(teacher_labels(data_dir)) == logits.shape[1]


def test_training_begins_where_the_teacher_stands(data_dir: Path, teacher: Teacher, plan: DataPlan) -> None:
    data = load_data(plan)
    network = CompactNetwork()
    network.load(begin(teacher.trunk(), seed=1).embedder)
    features = network.trunk(data.log_mel[0].astype(np.float32)).numpy()
    np.testing.assert_allclose(features, data.features[0].astype(np.float32), atol=0.05)


def test_shards_are_kept_and_made_again_alike(plan: DataPlan) -> None:
    before = plan.shards()[0].path.stat().st_mtime_ns
    assert list(make_shards(plan, processes=1)) == [1]
    assert plan.shards()[0].path.stat().st_mtime_ns == before
    first = load_data(plan)
    make_shard(plan, plan.shards()[0])
    np.testing.assert_array_equal(first.targets, load_data(plan).targets)


def test_missing_steps_are_named(tmp_path: Path, plan: DataPlan) -> None:
    with pytest.raises(ConfigError, match="trainer compact prepare"):
        load_pool(tmp_path)
    with pytest.raises(ConfigError, match="synthesise"):
        load_data(DataPlan(plan.pool_folder, tmp_path, 10, 1, plan.teacher))
    with pytest.raises(ModelError, match="trainer compact train"):
        Trained.load(tmp_path / "trained.npz")
    command = ["compact", "--data-dir", str(tmp_path), "--work", str(tmp_path / "w"), "prepare"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 78
    assert "DATA_DIR" in result.output


def test_a_tiny_run_learns_and_its_package_scores_like_what_was_trained(
    plan: DataPlan, teacher: Teacher, tmp_path: Path
) -> None:
    data = load_data(plan)
    settings = TrainingSettings(top_epochs=6, whole_steps=12, batch_examples=32, head_epochs=4)
    said: list[str] = []

    def progress(*args: object) -> None:
        said.append(str(args[2]))

    top, losses = train_top(data, begin(teacher.trunk(), 1), settings, progress)
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    whole, _ = train_whole(data, top, settings, progress)
    lstm, head_losses = train_head(data, top, settings, progress)
    assert np.mean(head_losses[-3:]) < np.mean(head_losses[:3])
    assert said
    mixed = blended(top, whole, settings.whole_share)
    trained = Trained(
        mixed.embedder,
        mixed.example_head,
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


def test_a_stopped_run_goes_on_to_the_same_weights(
    plan: DataPlan, teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_data(plan)
    monkeypatch.setattr("trainer.compact.training._CHECKPOINT_STEPS", 4)
    settings = TrainingSettings(top_epochs=0.7, batch_examples=32)
    first = begin(teacher.trunk(), 1)

    def stop(done: int, total: int, note: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # at its last step, after the checkpoint of the eighth
        train_top(data, first, settings, stop, tmp_path / "top.checkpoint.npz")
    resumed, losses = train_top(data, first, settings, lambda *args: None, tmp_path / "top.checkpoint.npz")
    whole, again = train_top(data, first, settings, lambda *args: None)
    assert len(losses) == len(again)
    np.testing.assert_allclose(losses, again, rtol=1e-3)
    for name, value in whole.embedder.items():
        np.testing.assert_allclose(resumed.embedder[name], value, atol=1e-3, err_msg=name)


def test_blending_takes_shares_of_embedders_and_the_first_lstm() -> None:
    def run(value: float, size: int = 3) -> Trained:
        return Trained(
            {"k": np.full(size, value, np.float32)}, {"weights": np.array([value])}, {"h": np.array([value])}
        )

    mixed = blended(run(1.0), run(2.0), 0.25)
    np.testing.assert_allclose(mixed.embedder["k"], 1.25)
    np.testing.assert_allclose(mixed.example_head["weights"], 1.25)
    assert mixed.head["h"] == 1.0
    with pytest.raises(ModelError, match="different networks"):
        blended(run(1.0), run(2.0, size=4), 0.5)
