"""Pools hold what may be trained on; scenes say what they hold; a tiny run learns and gives a package that loads."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner

from detector.audio import int16_to_float
from detector.chunk import RATE_HZ
from detector.embedders.compact import CompactNetwork
from detector.embedders.log_mel import log_mel_examples
from detector.embedders.params import EMBEDDING_SIZE, EXAMPLE_SAMPLES
from detector.errors import ConfigError, ModelError
from detector.model import load_model
from trainer.__main__ import main
from trainer.compact import evaluation, synthesis
from trainer.compact.dataset import (
    SCENE_FRAMES,
    TAUGHT_POSITIONS,
    DataPlan,
    TrainingData,
    load_arrays,
    load_data,
    make_shard,
    make_shards,
    save_arrays,
    teach_shards,
)
from trainer.compact.packaging import choose_thresholds, export, operating_curve
from trainer.compact.pools import LABELS, Clip, IndexRow, Pool, find_onsets, load_pool, read_index
from trainer.compact.scenes import (
    MIXTURES,
    POSITION_HOP_SAMPLES,
    POSITIONS,
    SCENE_SAMPLES,
    UNDECIDED_SAMPLES,
    compose,
    moved_elsewhere,
)
from trainer.compact.teachers import CED_CLASSES, YAMNET_CLASSES, YAMNET_EMBEDDING, YAMNET_GUNFIRE, Teachers
from trainer.compact.training import (
    Alterations,
    Draws,
    ExampleHead,
    Trained,
    TrainingSettings,
    augment,
    begin_from,
    belief,
    beside_a_machine,
    recorded_otherwise,
    scene_embeddings,
    scorer_of,
    train_embedder,
    train_head,
    wrongly_believed,
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
    for source in ("ambient", "katsis"):
        add(f"{source}/b.flac", "background", LABELS.index("Environmental noise"), noise)
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


@pytest.mark.parametrize(
    ("licence", "trainable"),
    [
        *((licence, True) for licence in ("CC0", "CC BY", "CC BY 3.0", "CC BY 4.0", "MIT")),
        *((licence, True) for licence in ("CC0 / public domain / CC BY", "Pixabay Content License / CC0")),
        *((licence, False) for licence in ("", "unknown", "not stated: evaluate only, never train", "CC BY 4.0 / ")),
        *((licence, False) for licence in ("CC BY-NC 4.0", "CC BY-ND", "CC BY-SA 4.0", "CC BY NC", "CC0 / CC BY-NC")),
    ],
)
def test_only_licences_that_allow_it_are_trainable(licence: str, trainable: bool) -> None:
    assert IndexRow("a/b.flac", "gunshot", "train", licence, "g").trainable is trainable
    assert not IndexRow("a/b.flac", "gunshot", "dev", licence, "g").trainable


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
        scene = compose(pool, 1, index, mixture=sorted(MIXTURES)[index % len(MIXTURES)], codecs=False)
        assert scene.pcm.shape == (SCENE_SAMPLES,)
        assert scene.targets.shape == scene.weights.shape == (POSITIONS, len(LABELS))
        assert np.isin(scene.targets, (0, 1)).all()
        assert (scene.weights >= 0).all()
        assert (scene.weights <= 1).all()
        for k in range(POSITIONS):
            heard = scene.pcm[k * POSITION_HOP_SAMPLES :][: EXAMPLE_SAMPLES - UNDECIDED_SAMPLES]
            if scene.targets[k, 0] and scene.weights[k, 0] > 0.5:
                assert heard.any(), f"scene {index}, example {k}: a sure shot in digital silence"
        shots += int(scene.targets[:, 0].sum())
        decided += int(((scene.targets[:, 0] == 0) & (scene.weights[:, 0] == 1)).sum())
    assert shots > 200
    assert decided > 1500


def test_scenes_of_recordings_without_any_sound_are_labelled_too(pool: Pool) -> None:
    silent = replace(pool, pcm=np.zeros_like(pool.pcm))
    for index in range(40):
        scene = compose(silent, 1, index, codecs=False)
        assert np.isfinite(scene.targets).all()
        assert np.isfinite(scene.weights).all()


def test_a_recording_moved_elsewhere_keeps_its_onsets_and_its_silence() -> None:
    x = np.zeros(4 * RATE_HZ, np.float32)
    x[RATE_HZ:] = 1e-4 * np.random.default_rng(1).standard_normal(3 * RATE_HZ)
    x[2 * RATE_HZ : 2 * RATE_HZ + 8] = 1.0
    x[3 * RATE_HZ :] = 0.0
    changed = 0
    for seed in range(12):
        moved, (onset,) = moved_elsewhere(np.random.default_rng(seed), x, (2 * RATE_HZ,))
        assert 0.86 < len(moved) / len(x) < 1.16
        np.testing.assert_allclose(onset / len(moved), 0.5, atol=1e-3)
        assert abs(int(np.argmax(np.abs(moved) > 0.2)) - onset) < RATE_HZ // 100
        assert not moved[: RATE_HZ // 2].any()
        assert not moved[-RATE_HZ // 2 :].any()
        changed += len(moved) != len(x) or not np.array_equal(moved, x)
    assert changed > 6


@pytest.fixture(scope="module")
def teachers(data_dir: Path) -> Teachers:
    for package in ("ai_edge_litert", "onnxruntime"):
        pytest.importorskip(package, reason=f"The teachers need {package}: install the extra `peers`.")
    return Teachers(data_dir)


@pytest.fixture(scope="module")
def plan(pool_folder: Path, teachers: Teachers, tmp_path_factory: pytest.TempPathFactory) -> DataPlan:
    made = DataPlan(pool_folder, tmp_path_factory.mktemp("data"), 16, 5, close_scenes=4, codecs=False)
    assert list(make_shards(made, processes=1)) == [0, 16, 20]
    with pytest.raises(ConfigError, match="teach"):
        load_data(made)
    assert list(teach_shards(made, teachers)) == [0, 16, 20]
    assert list(teach_shards(made, teachers)) == [20]
    return made


@pytest.fixture(scope="module")
def data(plan: DataPlan) -> TrainingData:
    return load_data(plan)


def test_yamnet_in_float_says_what_the_published_quantised_network_says(data_dir: Path, teachers: Teachers) -> None:
    from ai_edge_litert.interpreter import Interpreter

    rng = np.random.default_rng(3)
    sounds = [
        synthesis.firecrackers(rng),
        synthesis.babble(rng, 1.0),
        synthesis.close_report(rng),
        synthesis.knocks(rng),
    ]
    pcm = np.stack([(20_000 * np.resize(x, EXAMPLE_SAMPLES)).astype(np.int16) for x in sounds])
    logits = teachers.yamnet(teachers.log_mel(pcm))[0].astype(np.float64)
    interpreter = Interpreter(str(data_dir / "yamnet" / "yamnet.tflite"))
    interpreter.allocate_tensors()
    for x, ours in zip(pcm, logits, strict=True):
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x.astype(np.float32) / 32768)
        interpreter.invoke()
        theirs = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0]
        assert np.corrcoef(theirs, 1 / (1 + np.exp(-ours)))[0, 1] > 0.97


def test_every_example_of_a_scene_is_a_cut_of_its_log_mel(
    pool: Pool, plan: DataPlan, data: TrainingData, teachers: Teachers
) -> None:
    scene = compose(pool, 5, 1, codecs=False)
    assert data.log_mel.shape[1:] == (SCENE_FRAMES, 64)
    for position in (0, 5, POSITIONS - 1):
        cut = data.examples(np.array([1]), np.array([position]))[0]
        pcm = scene.pcm[position * POSITION_HOP_SAMPLES :][:EXAMPLE_SAMPLES]
        np.testing.assert_array_equal(cut, teachers.log_mel(pcm[None])[0])
        magnitude = np.exp(log_mel_examples(int16_to_float(pcm))[0]) - 0.01
        np.testing.assert_allclose(np.exp(cut.astype(np.float64)) - 0.001, magnitude, rtol=0.01, atol=2e-4)
    opinion = teachers.yamnet(data.examples(np.array([1]), np.array([TAUGHT_POSITIONS[2]])))
    np.testing.assert_allclose(data.yamnet_logits[1, 2], opinion[0][0], atol=0.02)


def test_teachers_answer_for_every_class_of_theirs(plan: DataPlan, data: TrainingData) -> None:
    scenes, taught = plan.scenes + plan.close_scenes, len(TAUGHT_POSITIONS)
    assert data.yamnet_logits.shape == (scenes, taught, YAMNET_CLASSES)
    assert data.yamnet_embeddings.shape == (scenes, taught, YAMNET_EMBEDDING)
    assert data.ced_probabilities.shape == (scenes, 5, CED_CLASSES)
    assert ((data.ced_probabilities >= 0) & (data.ced_probabilities <= 1)).all()


def test_shards_are_kept_and_made_again_alike(plan: DataPlan, data: TrainingData) -> None:
    shard = plan.shards()[0]
    before = shard.path.stat().st_mtime_ns
    assert list(make_shards(plan, processes=1)) == [20]
    assert shard.path.stat().st_mtime_ns == before
    make_shard(plan, shard)
    np.testing.assert_array_equal(data.targets, load_data(plan).targets)


def test_opinions_of_another_version_are_named(plan: DataPlan, data: TrainingData, tmp_path: Path) -> None:
    other = replace(plan, folder=tmp_path)
    for mine, theirs in zip(plan.shards(), other.shards(), strict=True):
        shutil.copy(mine.path, theirs.path)
        arrays = load_arrays(mine.taught_path, "")
        save_arrays(
            theirs.taught_path, arrays | {"ced_probabilities": np.repeat(arrays["ced_probabilities"], 2, axis=1)}
        )
    with pytest.raises(ConfigError, match=r"10 examples a scene, not 5.*trainer compact teach"):
        load_data(other)


def test_only_sure_negatives_are_mined_and_the_most_believed_of_them(
    data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, head = CompactNetwork(folded=False, seed=3), ExampleHead(3)
    monkeypatch.setattr("trainer.compact.training._ASKED_AT_ONCE", 70)
    settings = replace(TrainingSettings(), mined_fraction=0.1)
    mined = wrongly_believed(data, network, head, settings, replace(settings.first, mined_scenes=1.0))

    scenes, numbers = (part.ravel() for part in np.indices((len(data), len(TAUGHT_POSITIONS))))
    positions = numbers * TAUGHT_POSITIONS.step
    logits = head(network.embedding(network.pooled(tf.cast(data.examples(scenes, positions), tf.float32)))).numpy()
    gunfire = logits[:, :2].max(axis=1)
    sure = ((data.targets[scenes, positions, :2] == 0) & (data.weights[scenes, positions, :2] > 0.99)).all(axis=1)
    assert 0 < len(mined) == int(0.1 * sure.sum())
    assert sure[mined].all()
    left = np.setdiff1d(np.flatnonzero(sure), mined)
    assert gunfire[mined].min() > gunfire[left].max() - 0.1  # mined in half precision


def test_negatives_can_be_mined_among_some_of_the_scenes(data: TrainingData) -> None:
    network, head = CompactNetwork(folded=False, seed=3), ExampleHead(3)
    settings = replace(TrainingSettings(), mined_fraction=1.0)
    stage = replace(settings.onward, mined_scenes=0.5)
    among = np.unique(wrongly_believed(data, network, head, settings, stage) // len(TAUGHT_POSITIONS))
    everywhere = replace(stage, mined_scenes=1.0)
    every = np.unique(wrongly_believed(data, network, head, settings, everywhere) // len(TAUGHT_POSITIONS))
    assert len(data) / 4 < len(among) <= len(data) / 2 < len(every)


def test_training_goes_on_from_a_served_embedder(data: TrainingData) -> None:
    served = CompactNetwork(folded=True, seed=5)
    settings = replace(TrainingSettings(), batch_examples=32, example_head_steps=150)
    said: list[str] = []
    begun = begin_from(served, data, settings, lambda *args: said.append(args[2]))
    assert float(said[-1].split()[1]) < 0.7 * float(said[0].split()[1])
    x = tf.cast(data.examples(np.array([3, 4]), np.array([0, 17])), tf.float32)
    wanted = served.embedding(served.pooled(x)).numpy()
    network = CompactNetwork(folded=False)
    network.load(begun.embedder)
    np.testing.assert_allclose(network.embedding(network.pooled(x)), wanted, atol=1e-4)
    # Nor do the first steps shake it: a batch's own statistics are much like those it was given.
    rng = np.random.default_rng(0)
    many = tf.cast(data.examples(rng.integers(0, len(data), 200), rng.integers(0, POSITIONS, 200)), tf.float32)
    served_many = served.embedding(served.pooled(many)).numpy()
    apart = network.embedding(network.pooled(many, training=True)).numpy() - served_many
    assert np.sqrt(np.mean(apart**2)) < 0.25 * served_many.std()


def test_a_command_trains_on_from_the_shipped_package(
    plan: DataPlan, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.compact.commands._Run.plans", lambda run: (plan,))
    settings = replace(TrainingSettings(), batch_examples=16, head_epochs=1.0)
    monkeypatch.setattr("trainer.compact.commands._Run.settings", lambda run: settings.with_steps(run.steps))
    monkeypatch.setattr("trainer.compact.training._STATISTICS_OF", 100)
    options = ["compact", "--data-dir", str(tmp_path), "--work", str(tmp_path / "w"), "--steps", "10"]
    found = CliRunner().invoke(main, [*options, "train", "--from", "compact-gunfire"])
    assert found.exit_code == 0, found.output
    names = ("begun", "onward", "abreast", "trained")
    begun, onward, abreast, trained = (Trained.load(tmp_path / "w" / f"{name}.npz") for name in names)
    for name, value in trained.embedder.items():
        mean = 0.3 * begun.embedder[name] + 0.35 * (onward.embedder[name] + abreast.embedder[name])
        np.testing.assert_allclose(value, mean, rtol=1e-5, atol=1e-6, err_msg=name)
    assert trained.head
    made = json.loads((tmp_path / "w" / "run.json").read_text())
    assert made["begun"].startswith("compact-gunfire ")
    assert any("Free Firearm" in name for name in made["inherited"])
    assert "trained already" in CliRunner().invoke(main, [*options, "train", "--from", "compact-gunfire"]).output
    # Stopped between the stages: what was made stays, and the rest comes out as it did.
    (tmp_path / "w" / "trained.npz").unlink()
    (tmp_path / "w" / "abreast.npz").unlink()
    (tmp_path / "w" / "abreast.checkpoint.npz").unlink()
    kept = (tmp_path / "w" / "onward.npz").stat().st_mtime_ns
    assert CliRunner().invoke(main, [*options, "train", "--from", "compact-gunfire"]).exit_code == 0
    assert (tmp_path / "w" / "onward.npz").stat().st_mtime_ns == kept
    resumed = Trained.load(tmp_path / "w" / "abreast.npz")
    for name, value in resumed.embedder.items():
        np.testing.assert_allclose(value, abreast.embedder[name], rtol=1e-2, atol=1e-3, err_msg=name)


def test_where_nothing_is_surely_negative_nothing_is_mined(data: TrainingData) -> None:
    network, head, settings = CompactNetwork(folded=False), ExampleHead(3), TrainingSettings()
    unsure = replace(data, weights=np.zeros_like(data.weights))
    assert not len(wrongly_believed(unsure, network, head, settings, settings.onward))


@pytest.mark.parametrize("quick", [True, False])
def test_products_are_in_bfloat16_where_that_is_quicker(
    data: TrainingData, monkeypatch: pytest.MonkeyPatch, quick: bool
) -> None:
    used: set[bool] = set()
    pooled = CompactNetwork.pooled

    def noted(
        self: CompactNetwork, x: tf.Tensor, *, training: bool = False, mixed_precision: bool = False
    ) -> tf.Tensor:
        used.add(mixed_precision)
        return pooled(self, x, training=training)

    monkeypatch.setattr(CompactNetwork, "pooled", noted)
    monkeypatch.setattr("trainer.compact.training.quick_in_bfloat16", lambda: quick)
    settings = TrainingSettings(batch_examples=16)
    stage = replace(settings.first, steps=1, mined_at=(0.0,))
    train_embedder(data, settings, stage, lambda *args: None)
    assert used == {quick}


def test_half_of_what_is_drawn_at_random_was_shown_to_the_slow_teacher(data: TrainingData) -> None:
    settings = replace(TrainingSettings(), perhaps_share=0.0, batch_examples=256)
    draws = Draws.of(data, settings, settings.first)
    asked = np.mean([draws.batch(step)[-1].mean() for step in range(20)])
    assert 0.58 < asked < 0.68  # a half, and five in nineteen of the other half


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


def test_a_tiny_run_learns_and_its_package_scores_like_what_was_trained(data: TrainingData, tmp_path: Path) -> None:
    settings = TrainingSettings(batch_examples=32, average_momentum=0.9, head_epochs=8, head_scenes=4).with_steps(60)
    said: list[str] = []

    def progress(*args: object) -> None:
        said.append(str(args[2]))

    first, losses = train_embedder(data, settings, settings.first, progress)
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:5])
    second, more_losses = train_embedder(data, settings, settings.second, progress, begun=first)
    assert len(more_losses) == settings.second.steps
    assert np.mean(more_losses) < np.mean(losses[:5])
    embedder = Trained.mean([first, second])
    lstm, head_losses = train_head(data, embedder, settings, progress)
    assert np.mean(head_losses[-3:]) < np.mean(head_losses[:3])
    assert said
    head = {name: variable.numpy() for name, variable in lstm.named_variables().items()}
    trained = Trained(embedder.embedder, embedder.example_head, head)
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
    loud = replace(scored[1], scores=np.full_like(scored[1].scores, 0.96875))  # ambient audio, another recorder
    assert choose_thresholds(scored, [scored, [scored[0], loud]])[0] == pytest.approx(0.96875, abs=1e-4)
    clips = [replace(loud, recording=replace(loud.recording, set="esc10"))] * 2
    assert choose_thresholds(scored, [[*scored, *clips]])[0] == pytest.approx(0.96875, abs=1e-4)
    assert choose_thresholds(scored, [[*scored * 100, *clips]]) == thresholds  # less than 2 % of them
    model = export(
        trained,
        tmp_path / "package",
        version="0.0.1",
        command="a test",
        date="2026-01-01",
        data=["made sounds"],
        thresholds=thresholds,
        curve=operating_curve(scored),
    )
    served = load_model(tmp_path / "package")
    served.self_test()
    assert served.sha256 == model.sha256
    again = evaluation.score_recordings(served, recordings)
    for one, other in zip(scored, again, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)


def test_an_echo_comes_later_and_quieter_and_brings_no_sound_of_its_own() -> None:
    random = tf.random.Generator.from_seed(1)
    x = np.full((64, 96, 64), np.log(0.001), np.float32)
    x[:, 10] = 0.0  # one frame of sound
    flat = np.zeros((64, len(LABELS)), np.float32)
    heard, weights = augment(
        random, tf.constant(x), tf.constant(flat), tf.constant(flat + 1), Alterations(mixed=0.0, echo=1.0, limited=0.0)
    )
    magnitude = np.exp(heard.numpy()) - 0.001
    assert magnitude[:, :10].max() < 1e-5
    assert magnitude[:, 11:14].max() < 1e-5
    direct, echoes = magnitude[:, 10].max(axis=1), magnitude[:, 14:].max(axis=(1, 2))
    assert (echoes < 0.75 * direct).all()
    assert (echoes > 0.03 * direct).mean() > 0.9
    np.testing.assert_array_equal(weights, 1.0)


def test_what_is_recorded_otherwise_is_the_same_sound_at_another_level_or_without_treble() -> None:
    magnitude = np.exp(np.random.default_rng(2).normal(-1.0, 1.0, (64, 96, 64)))
    x = tf.constant(np.log(magnitude + 0.001), tf.float32)
    random = tf.random.Generator.from_seed(1)
    gain = (np.exp(recorded_otherwise(random, x, quieter=0.5, narrower=0.0).numpy()) - 0.001) / magnitude
    each = np.median(gain, axis=(1, 2))
    np.testing.assert_allclose(gain, np.broadcast_to(each[:, None, None], gain.shape), rtol=0.02)
    assert 0.3 < (np.abs(each - 1) < 1e-3).mean() < 0.7
    assert 10 ** (-26 / 20) * 0.99 < each.min() < 0.3
    assert each.max() < 10 ** (6 / 20) * 1.01
    gain = (np.exp(recorded_otherwise(random, x, quieter=0.0, narrower=0.5).numpy()) - 0.001) / magnitude
    kept = gain.mean(axis=1) > 0.5
    np.testing.assert_allclose(gain, np.broadcast_to(kept[:, None, :], gain.shape), atol=0.02)
    widths = kept.sum(axis=1)
    assert 0.3 < (widths == 64).mean() < 0.7
    assert 44 <= widths.min() < 50


def test_a_machine_hums_through_the_recorder_and_leaves_what_is_clear() -> None:
    rng = np.random.default_rng(2)
    magnitude = np.exp(rng.normal(-3.0, 0.3, (256, 96, 64)))
    magnitude[:, 40:43, 5:30] += 2.0  # a shot, 30 dB over the background
    magnitude[:, :, 56:] = 0.0  # and a recorder's edge
    x = tf.constant(np.log(magnitude + 0.001), tf.float32)
    heard = np.exp(beside_a_machine(tf.random.Generator.from_seed(1), x, 0.5).numpy()) - 0.001
    assert heard[:, :, 56:].max() < 1e-5
    changed = np.abs(heard / np.maximum(magnitude, 1e-9) - 1)[:, :, :56].max(axis=(1, 2)) > 0.001
    assert 0.4 < changed.mean() < 0.6
    mean_db = 20 * np.log10(heard[changed][:, :40, :56].mean(axis=1))
    shot_db = 20 * np.log10(heard[changed][:, 40:43, :56].max(axis=1))
    clearest_db = (shot_db - mean_db).max(axis=1)
    assert 8 < clearest_db.min() < 15
    assert clearest_db.max() > 25
    hum_db = mean_db.max(axis=1) - np.median(mean_db, axis=1)
    assert (hum_db > 20).any()
    assert (mean_db.max(axis=1) > shot_db.min()).any()


def test_some_scenes_are_beside_a_machine_for_the_lstm(data: TrainingData) -> None:
    network = CompactNetwork(folded=False).folded()
    scenes = np.repeat(np.arange(3), len(TAUGHT_POSITIONS))
    heard = tf.cast(data.examples(scenes, np.tile(np.array(TAUGHT_POSITIONS), 3)), tf.float32)
    alone = network.embedding(network.pooled(heard)).numpy().reshape(3, -1, EMBEDDING_SIZE)
    for share in (0.0, 0.5, 1.0):
        embeddings, hums = scene_embeddings(network, data, 1, share)
        assert embeddings.shape == (len(data), len(TAUGHT_POSITIONS), EMBEDDING_SIZE)
        assert abs(hums.mean() - share) < 0.2
        for one, other, hum in zip(embeddings, alone, hums, strict=False):
            assert np.allclose(one, other, atol=1e-4) != hum


def test_a_stopped_run_goes_on_to_the_same_weights(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after what was wrongly believed was looked up, so that this is taken up again too."""
    monkeypatch.setattr("trainer.compact.training._CHECKPOINT_STEPS", 8)
    settings = TrainingSettings(batch_examples=32)
    stage = replace(settings.first, steps=12, mined_at=(0.5,))

    def stop(done: int, total: int, note: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # at its last step, after the checkpoint of the eighth
        train_embedder(data, settings, stage, stop, tmp_path / "embedder.checkpoint.npz")
    resumed, losses = train_embedder(data, settings, stage, lambda *args: None, tmp_path / "embedder.checkpoint.npz")
    whole, again = train_embedder(data, settings, stage, lambda *args: None)
    assert len(losses) == len(again) == 12
    assert_same(resumed, losses, whole, again)


def test_the_checkpoint_of_a_longer_run_is_refused(data: TrainingData, tmp_path: Path) -> None:
    settings = TrainingSettings(batch_examples=32).with_steps(2)
    kept = tmp_path / "first.checkpoint.npz"
    train_embedder(data, settings, settings.first, lambda *args: None, kept)
    with pytest.raises(ModelError, match="2 steps"):
        train_embedder(data, settings, replace(settings.first, steps=1), lambda *args: None, kept)


def assert_same(one: Trained, losses: list[float], other: Trained, again: list[float]) -> None:
    np.testing.assert_allclose(losses, again, rtol=1e-2)
    for name, value in other.embedder.items():
        np.testing.assert_allclose(one.embedder[name], value, atol=2e-2, err_msg=name)


def test_the_mean_of_paths_is_that_of_every_weight() -> None:
    def run(value: float) -> Trained:
        return Trained({"k": np.full(3, value, np.float32)}, {"weights": np.array([value], np.float32)}, {})

    mean = Trained.mean([run(1.0), run(2.0), run(6.0)])
    np.testing.assert_allclose(mean.embedder["k"], 3.0)
    np.testing.assert_allclose(mean.example_head["weights"], 3.0)
    assert mean.embedder["k"].dtype == np.float32
    np.testing.assert_allclose(Trained.mean([run(1.0), run(2.0)], (0.75, 0.25)).embedder["k"], 1.25)


def test_belief_is_swayed_by_either_and_by_what_speaks_against() -> None:
    def logits(**raised: float) -> tf.Tensor:
        x = np.full((1, len(LABELS) + YAMNET_CLASSES + CED_CLASSES + 1), -8.0, np.float32)
        for name, value in raised.items():
            kind, _, number = name.partition("_")
            x[0, int(number) + (len(LABELS) if kind == "yamnet" else 0)] = value
        return tf.constant(x)

    def believed(**raised: float) -> float:
        return float(belief(logits(**raised))[0])

    gunshot, yamnet_gunshot, door, yamnet_door, yamnet_dog = (
        {f"own_{LABELS.index('Gunshot, gunfire')}": 5.0},
        {f"yamnet_{YAMNET_GUNFIRE[0]}": 2.0},
        {f"own_{LABELS.index('Door')}": 1.0},
        {"yamnet_348": 0.0},
        {"yamnet_74": 1.0},
    )
    nothing = believed()
    assert believed(**gunshot) > nothing + 4
    assert believed(**yamnet_gunshot) > nothing + 4
    for against in (door, yamnet_door, yamnet_dog):
        assert believed(**gunshot, **against) < believed(**gunshot) - 1
    for place in (494, 500, 503, 504):
        assert believed(**gunshot, **{f"yamnet_{place}": 2.0}) == believed(**gunshot)


def test_edges_are_reported_in_other_places_than_those_that_choose_a_threshold() -> None:
    pcm = (3000 * np.random.default_rng(1).standard_normal(40_000)).astype(np.int16)
    negative = evaluation.Recording("b", "ambient", "ambient", False, pcm)
    gunfire = evaluation.Recording("a", "made", "gunshot", True, pcm, (0.3,))
    draws = (*evaluation.CHOOSING_DRAWS, *evaluation.REPORTED_DRAWS)
    for edge in evaluation.edges():
        changed = evaluation.edged([negative, gunfire], edge, draws)
        assert len({r.pcm.tobytes() for r in changed}) == len(changed) == len(draws)
