"""Starter-code train directories load and predict as there; their CSV comes out the same; foreign ones are refused."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from detector.classifiers import build_classifier, weights
from detector.errors import ConfigError, DataError, ModelError
from trainer.predict import pairs_text, predictions, top_pairs, write_predictions
from trainer.records import ClipSet, FeatureSpec, RecordWriter, encode_clip, read_clips
from trainer.starter_checkpoint import FLAGS_NAME, StarterModel, is_starter_folder, load_starter_model


def folders(golden_dir: Path) -> list[Path]:
    found = sorted(path for path in golden_dir.glob("e2e_*") if is_starter_folder(path))
    assert found
    return found


def golden_clips(golden_dir: Path, model: StarterModel) -> ClipSet:
    spec = FeatureSpec(names=model.feature_names, sizes=model.feature_sizes)
    return read_clips([golden_dir / "yt8m_style.tfrecord"], classes=model.params["classes"], spec=spec)


def read_pairs(path: Path) -> dict[str, list[tuple[str, str]]]:
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["VideoId", "LabelConfidencePairs"]
    return {video: list(zip(pairs.split()[::2], pairs.split()[1::2], strict=True)) for video, pairs in rows}


def last_digit(text: str) -> float:
    """What 1 in the last of 6 significant digits is worth."""
    return 10.0 ** (np.floor(np.log10(max(float(text), 1e-300))) - 5)


@pytest.mark.golden
def test_a_train_directory_predicts_as_the_starter_code(golden_dir: Path) -> None:
    for folder in folders(golden_dir):
        model = load_starter_model(folder)
        stored = np.load(folder / "predictions.npz")
        expected = next(stored[key] for key in stored.files if stored[key].ndim == 2)
        for batch_clips in (2, 256):
            found = np.concatenate(
                [
                    scores
                    for _, scores in predictions(
                        model.classifier, golden_clips(golden_dir, model), batch_clips=batch_clips
                    )
                ]
            )
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=folder.name)


@pytest.mark.golden
def test_the_csv_is_the_original_one(golden_dir: Path, tmp_path: Path) -> None:
    for folder in folders(golden_dir):
        model = load_starter_model(folder)
        original = read_pairs(folder / "inference.csv")
        top_k = max(len(pairs) for pairs in original.values())
        path = tmp_path / "predictions.csv"
        clips = golden_clips(golden_dir, model)
        assert write_predictions(path, predictions(model.classifier, clips), top_k=top_k) == len(original)
        found = read_pairs(path)
        assert list(found) == list(original)
        for video, pairs in original.items():
            assert len(found[video]) == len(pairs)
            scores = [float(score) for _, score in pairs]
            for i, ((label, score), (our_label, our_score)) in enumerate(zip(pairs, found[video], strict=True)):
                near = [abs(scores[i] - scores[j]) for j in (i - 1, i + 1) if 0 <= j < len(scores)]
                if min(near) > 1e-5 and i + 1 < len(scores):
                    assert our_label == label, f"{folder.name} {video} place {i}"
                assert abs(float(our_score) - float(score)) <= 1.01 * last_digit(score) + 1e-12


@pytest.mark.golden
def test_what_the_directory_says_of_itself(golden_dir: Path) -> None:
    for folder in folders(golden_dir):
        flags = json.loads((folder / FLAGS_NAME).read_text())
        model = load_starter_model(folder)
        assert ",".join(model.feature_names) == flags["feature_names"]
        assert model.frame_features == flags["frame_features"]
        assert abs(model.global_step - int(model.checkpoint.name.rpartition("-")[2])) <= 1  # saved after the next step
        assert {f"{name}/Adam_1" for name in weights(model.classifier)} <= set(model.optimiser)


def test_pairs_are_written_as_the_original_formats_them() -> None:
    scores = np.array([0.25078741, 1e-7, 0.5, 0.5, 1.0, 0.0], np.float32)
    assert pairs_text(scores, 5) == "4 1 2 0.5 3 0.5 0 0.250787 1 1e-07"
    assert pairs_text(scores, 2, ["a", "b", "c", "d", "Gunshot, gunfire", "e"]) == "Gunshot, gunfire 1; c 0.5"
    assert len(top_pairs(scores, 99)) == 6
    assert top_pairs(np.array([np.nan, 0.1, 0.2], np.float32), 2)[0][0] == 2


def test_names_and_odd_ids_survive_a_csv_reader(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    scores = np.array([[0.25, 0.75]], np.float32)
    write_predictions(path, [(['a,"b"'], scores), (["plain"], scores)], names=["Gunshot, gunfire", "Boom"])
    with path.open(newline="") as file:
        _, odd, plain = csv.reader(file)
    assert odd == ['a,"b"', "Boom 0.75; Gunshot, gunfire 0.25"]
    assert plain[0] == "plain"
    write_predictions(path, [(["plain"], scores)])
    assert path.read_text() == "VideoId,LabelConfidencePairs\nplain,1 0.75 0 0.25\n"


def test_a_failed_run_leaves_the_earlier_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("earlier")
    with pytest.raises(ConfigError, match="3 names are given for 2 classes"):
        write_predictions(path, [(["a"], np.zeros((1, 2), np.float32))], names=["x", "y", "z"])
    with pytest.raises(ConfigError, match="top_k is 0"):
        write_predictions(path, [], top_k=0)
    assert [p.name for p in tmp_path.iterdir()] == ["p.csv"]
    assert path.read_text() == "earlier"
    with pytest.raises(DataError, match="can't be written"):
        write_predictions(tmp_path / "absent" / "p.csv", [])


def clips_of(tmp_path: Path, spec: FeatureSpec) -> ClipSet:
    path = tmp_path / "clips.tfrecord"
    random = np.random.default_rng(1)
    with RecordWriter(path) as writer:
        for i in range(5):
            writer.write(encode_clip(f"clip{i}", random.integers(0, 256, (3 + i, spec.size), np.uint8), [i % 3]))
    return read_clips([path], classes=3, spec=spec)


def test_clips_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    clips = clips_of(tmp_path, FeatureSpec())
    with pytest.raises(ConfigError, match="128 values a frame; the model takes 64"):
        next(predictions(build_classifier("lstm", {"classes": 3, "cells": 4, "input_size": 64}), clips))
    with pytest.raises(ConfigError, match="batch_clips is 0"):
        next(predictions(build_classifier("moe", {"classes": 3}), clips, batch_clips=0))


@pytest.mark.parametrize("kind", ["lstm", "logistic", "moe", "frame_logistic", "dbof"])
def test_a_clip_scores_the_same_alone_and_among_longer_ones(kind: str, tmp_path: Path) -> None:
    small = {"lstm": {"cells": 8}, "dbof": {"clusters": 16, "hidden": 8}}.get(kind, {})
    classifier = build_classifier(kind, {"classes": 3, **small}, seed=2)
    clips = clips_of(tmp_path, FeatureSpec())
    alone = [scores for _, scores in predictions(classifier, clips, batch_clips=1)]
    ((ids, together),) = predictions(classifier, clips)
    assert ids == tuple(f"clip{i}" for i in range(5))
    np.testing.assert_allclose(np.concatenate(alone), together, rtol=0, atol=1e-6)


# --- made directories: every kind, and every fault ----------------------------------------------------------------


def write_folder(
    folder: Path, model: str, kind: str, params: dict[str, object], step: int = 7
) -> dict[str, np.ndarray]:
    """A train directory of the starter code's form, with weights of ours."""
    folder.mkdir(exist_ok=True)
    values = weights(build_classifier(kind, params, seed=step))
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variables = [tf.compat.v1.get_variable(n, initializer=v, use_resource=False) for n, v in values.items()]
        tf.compat.v1.get_variable("global_step", initializer=np.int64(step), use_resource=False)
        session.run(tf.compat.v1.global_variables_initializer())
        saver = tf.compat.v1.train.Saver(tf.compat.v1.global_variables())
        saver.save(session, str(folder / "model.ckpt"), global_step=step, write_meta_graph=False)
        assert variables
    flags = {
        "model": model,
        "feature_sizes": "128",
        "feature_names": "audio",
        "frame_features": kind not in ("logistic", "moe"),
        "label_loss": "CrossEntropyLoss",
    }
    (folder / FLAGS_NAME).write_text(json.dumps(flags))
    return values


@pytest.mark.parametrize(
    ("model", "kind", "params"),
    [
        ("LogisticModel", "logistic", {}),
        ("MoeModel", "moe", {"mixtures": 4}),
        ("FrameLevelLogisticModel", "frame_logistic", {}),
        ("LstmModel", "lstm", {"cells": 6, "layers": 3, "mixtures": 1}),
        ("LstmModel", "lstm", {"cells": 6, "layers": 1, "final": "logistic"}),
        ("DbofModel", "dbof", {"clusters": 12, "hidden": 6}),
        ("DbofModel", "dbof", {"clusters": 12, "hidden": 6, "batch_norm": False, "final": "logistic"}),
    ],
)
def test_every_kind_is_known_by_its_shapes(model: str, kind: str, params: dict[str, object], tmp_path: Path) -> None:
    values = write_folder(tmp_path / "train", model, kind, {"classes": 5, **params})
    loaded = load_starter_model(tmp_path / "train")
    assert loaded.kind == kind
    assert loaded.global_step == 7
    assert loaded.params == {"classes": 5, "input_size": 128, **params} | (
        {name: value for name, value in loaded.params.items() if name not in params}
    )
    for name, value in weights(loaded.classifier).items():
        np.testing.assert_array_equal(value, values[name])


def test_the_newest_checkpoint_is_taken_unless_the_state_file_names_another(tmp_path: Path) -> None:
    for step in (9, 100):
        write_folder(tmp_path, "LogisticModel", "logistic", {"classes": 5}, step)
    (tmp_path / "checkpoint").unlink()
    assert load_starter_model(tmp_path).global_step == 100
    state = 'model_checkpoint_path: "/elsewhere/model.ckpt-9"\nall_model_checkpoint_paths: "x"\n'
    (tmp_path / "checkpoint").write_text(state)
    assert load_starter_model(tmp_path).global_step == 9
    (tmp_path / "checkpoint").write_bytes(b"\xff\x00 garbage")
    assert load_starter_model(tmp_path).global_step == 100
    assert load_starter_model(tmp_path, checkpoint=tmp_path / "model.ckpt-9").global_step == 9


def test_an_exported_model_is_found(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", "LogisticModel", "logistic", {"classes": 5})
    (tmp_path / "train" / "checkpoint").unlink()
    for path in list((tmp_path / "train").glob("model.ckpt-7*")):
        path.rename(path.with_name(path.name.replace("model.ckpt-7", "inference_model")))
    assert load_starter_model(tmp_path / "train").checkpoint.name == "inference_model"


def test_given_params_complete_what_shapes_tell(tmp_path: Path) -> None:
    write_folder(tmp_path, "DbofModel", "dbof", {"classes": 5, "clusters": 12, "hidden": 6})
    assert load_starter_model(tmp_path).params.get("activation") is None
    assert load_starter_model(tmp_path, params={"activation": "relu6"}).params["activation"] == "relu6"
    with pytest.raises(ModelError, match=r"clusters is given as 13; .* holds 12"):
        load_starter_model(tmp_path, params={"clusters": 13})
    with pytest.raises(ModelError, match=r"'depth'.* unknown"):
        load_starter_model(tmp_path, params={"depth": 3})


def flags_of(**changed: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        flags = json.loads((folder / FLAGS_NAME).read_text())
        (folder / FLAGS_NAME).write_text(json.dumps({**flags, **changed}))

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, "is no folder"),
        (lambda f: (f / FLAGS_NAME).unlink(), "model_flags.json does not exist: .* is no train directory"),
        (lambda f: (f / FLAGS_NAME).write_bytes(b"\x80{"), "is no JSON"),
        (lambda f: (f / FLAGS_NAME).write_text("[1]"), "holds no flags"),
        (flags_of(model="NetVLAD"), "names model 'NetVLAD'; known are LogisticModel"),
        (flags_of(model=None), "names model None"),
        (flags_of(model="MoeModel"), "holds no moe model: tower/gates/weights is missing"),
        (flags_of(model="LstmModel"), "holds no lstm model: .*bias is missing"),
        (flags_of(feature_sizes="64"), r"feature_sizes \[64\]; .* takes 128"),
        (flags_of(feature_sizes="128, 128"), "they don't match"),
        (flags_of(feature_sizes="many"), "whole numbers are needed"),
        (flags_of(feature_names=3), "feature_names 3; text"),
        (flags_of(frame_features="yes"), "frame_features 'yes'"),
        (lambda f: [p.unlink() for p in f.glob("*.index")], "holds no checkpoint"),
        (lambda f: [p.unlink() for p in f.glob("*.data-*")], "can't be read|damaged"),
        (lambda f: [p.write_bytes(p.read_bytes()[:40]) for p in f.glob("*.index")], "can't be read"),
        (lambda f: [p.write_bytes(p.read_bytes()[:-80]) for p in f.glob("*.data-*")], "damaged"),
        (lambda f: write_folder(f, "LogisticModel", "moe", {"classes": 5}), "holds no logistic model"),
    ],
)
def test_foreign_and_damaged_directories_are_refused(
    damage: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    folder = tmp_path / "train"
    write_folder(folder, "LogisticModel", "logistic", {"classes": 5})
    damage(folder)
    with pytest.raises(ModelError, match=words):
        load_starter_model(folder)


def test_gates_and_experts_that_fit_no_number_of_classes(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    write_folder(folder, "MoeModel", "moe", {"classes": 5})
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, shape in (("gates/weights", (128, 15)), ("experts/weights", (128, 7)), ("experts/biases", (7,))):
            initial = np.zeros(shape, np.float32)
            tf.compat.v1.get_variable(f"tower/{name}", initializer=initial, use_resource=False)
        session.run(tf.compat.v1.global_variables_initializer())
        saver = tf.compat.v1.train.Saver(tf.compat.v1.global_variables())
        saver.save(session, str(folder / "model.ckpt"), global_step=7, write_meta_graph=False)
    with pytest.raises(ModelError, match="15 gates and 7 experts"):
        load_starter_model(folder)
