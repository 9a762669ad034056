"""Every form of a trained model opens to the same classifier; what is none is named with what it holds."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from detector.errors import ConfigError, DataError, ModelError
from detector.model import load_model
from tests.trainer.small_models import LABELS, make_run, make_starter_folder, write_labels, write_records
from trainer.classes import classes_of, labels_of
from trainer.records import FeatureSpec, RecordWriter, encode_clip, encode_video
from trainer.trained import open_trained, read_data


def test_a_run_says_all_of_itself(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    trained = open_trained(str(tmp_path / "run"))
    assert (trained.form, trained.kind, trained.classes, trained.steps) == ("run", "lstm", 7, 11)
    assert trained.labels is not None
    assert trained.labels.names == LABELS.names
    assert trained.family == (1, 2)
    assert trained.look_alikes == (3, 4)
    assert trained.features == FeatureSpec()


def test_a_starter_checkpoint_opens_by_folder_prefix_and_index_file(tmp_path: Path) -> None:
    folder = make_starter_folder(tmp_path / "starter")
    found = [open_trained(path) for path in (folder, folder / "model.ckpt-7", folder / "model.ckpt-7.index")]
    assert {trained.sha256 for trained in found} == {found[0].sha256}
    assert found[0].steps == 7
    assert found[0].labels is None
    assert found[0].features.names == ()  # its "audio" is AudioSet's audio_embedding too


def test_the_same_weights_have_the_same_hash_in_every_form(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    run = open_trained(tmp_path / "run")
    starter = open_trained(make_starter_folder(tmp_path / "starter"))
    assert run.sha256 == starter.sha256
    make_run(tmp_path / "other", seed=4)
    assert open_trained(tmp_path / "other").sha256 != run.sha256


def test_a_shipped_model_opens_by_name_with_its_classifier_alone() -> None:
    trained = open_trained("compact-gunfire")
    shipped = load_model("compact-gunfire")
    assert trained.form == "shipped"
    assert trained.labels is not None
    assert trained.labels.names == shipped.labels
    x, n = np.random.default_rng(0).random((4, 10, 128), np.float32), np.full(4, 10, np.int32)
    np.testing.assert_allclose(trained.classifier(x, n).numpy(), shipped.classify(x, n), atol=1e-6)
    assert tuple(trained.labels.names[i] for i in trained.family) == shipped.manifest.family
    assert open_trained(trained.source).form == "package"


def test_what_is_no_model_is_named_with_what_was_found_and_what_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "saved_model.pb").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    accepted = "run of `trainer train`.*train directory.*package"
    for path, words in (
        ("foreign", "holds saved_model.pb"),
        ("file", "is a file, no trained model"),
        ("absent", "neither a folder nor a shipped model's name.*compact-gunfire"),
    ):
        with pytest.raises(ModelError, match=words) as caught:
            open_trained(tmp_path / path)
        assert re.search(accepted, str(caught.value))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds nothing"):
        open_trained(tmp_path / "empty")


def test_a_damaged_run_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run.folder / "best.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"best.safetensors"):
        open_trained(run.folder)


def test_classes_come_from_options_then_the_model_then_defaults(tmp_path: Path) -> None:
    run = open_trained(make_run(tmp_path / "run").folder)
    labels = write_labels(tmp_path / "labels.csv")
    assert classes_of(run, None, None, None, None).family == (1, 2)
    assert classes_of(run, labels, None, "5, Machine gun", "0").family == (2, 5)
    assert classes_of(run, labels, None, "/m/001", None).look_alikes == (3, 4)
    starter = open_trained(make_starter_folder(tmp_path / "starter"))
    assert classes_of(starter, labels, None, None, None).family == (1, 2)
    assert labels_of(starter, None).names[2] == "class 2"
    with pytest.raises(ConfigError, match=r"None of the 7 classes .* --family"):
        classes_of(starter, None, None, None, None)
    assert classes_of(starter, None, None, "1-2", None).look_alikes == ()
    with pytest.raises(ConfigError, match="Machine gun: in --family and in --look-alikes"):
        classes_of(run, None, None, None, "2, 3")


def test_a_list_of_other_classes_is_refused(tmp_path: Path) -> None:
    run = open_trained(make_run(tmp_path / "run").folder)
    path = write_labels(tmp_path / "labels.csv")
    path.write_text(path.read_text().replace("Dog", "Cat"))
    with pytest.raises(ConfigError, match=r"calls class 5 'Cat'; model .* calls it 'Dog'"):
        labels_of(run, path)
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(ConfigError, match=r"holds 6 classes; model .* has 7"):
        labels_of(run, path)


def test_a_damaged_first_file_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = open_trained(make_run(tmp_path / "run", "logistic").folder)
    whole = write_records(tmp_path / "b.tfrecord", 4).read_bytes()
    (tmp_path / "a.tfrecord").write_bytes(whole[:-5])
    clips = read_data(run, str(tmp_path), LABELS)
    assert len(clips) == 7
    assert len([record for record in caplog.records if "Skipped" in record.message]) == 1


def test_data_is_read_in_the_form_the_model_takes(tmp_path: Path) -> None:
    frames = write_records(tmp_path / "frames.tfrecord", 5)
    with RecordWriter(tmp_path / "video.tfrecord") as writer:
        for i in range(3):
            writer.write(encode_video(f"v{i}", np.full(128, 0.5, np.float32), [i]))
    moe = open_trained(make_run(tmp_path / "moe", "moe").folder)
    assert read_data(moe, str(frames), LABELS).spec.level == "frame"
    assert read_data(moe, str(tmp_path / "video.tfrecord"), LABELS).spec.level == "video"
    lstm = open_trained(make_run(tmp_path / "lstm").folder)
    with pytest.raises(DataError, match="is it video-level"):
        read_data(lstm, str(tmp_path / "video.tfrecord"), LABELS)
    with pytest.raises(ConfigError, match=r"64 \+ 32 values are asked for; model .* takes 128"):
        read_data(lstm, str(frames), LABELS, feature_names="a,b", feature_sizes="64,32")
    with pytest.raises(ConfigError, match="no whole numbers"):
        read_data(lstm, str(frames), LABELS, feature_sizes="many")


def test_bad_data_is_told_with_file_and_byte(tmp_path: Path) -> None:
    trained = open_trained(make_run(tmp_path / "run").folder)
    good = write_records(tmp_path / "good.tfrecord", 4)
    with pytest.raises(DataError, match="matches no file"):
        read_data(trained, str(tmp_path / "none-*.tfrecord"), LABELS)
    (tmp_path / "cut.tfrecord").write_bytes(good.read_bytes()[:-30])
    clips = read_data(trained, str(tmp_path / "cut.tfrecord"), LABELS)
    assert len(clips) == 3
    assert "cut.tfrecord, byte" in str(clips.report.damages[0])
    with pytest.raises(DataError, match="cut off"):
        read_data(trained, str(tmp_path / "cut.tfrecord"), LABELS, stop_on_damage=True)
    with pytest.raises(DataError, match="frames of 64 bytes; 128 are expected"):
        read_data(trained, str(write_records(tmp_path / "narrow.tfrecord", 2, size=64)), LABELS)
    with RecordWriter(tmp_path / "label.tfrecord") as writer:
        writer.write(encode_clip("far", np.zeros((1, 128), np.uint8), [7]))
    with pytest.raises(DataError, match="Label 7 is out of range: there are 7 classes"):
        read_data(trained, str(tmp_path / "label.tfrecord"), LABELS)
