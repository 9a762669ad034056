"""What was trained is exported as it is, with thresholds that keep their promise, and the detector serves it."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from prometheus_client import CollectorRegistry

from detector.bus.embedded import EmbeddedBus
from detector.config import load_settings
from detector.daemon import Daemon
from detector.errors import DataError, ModelError
from detector.model import MANIFEST_NAME, Manifest, load_classifier, load_model
from tests.test_detector_commands import alerts_of, publish, shots
from tests.trainer.small_models import (
    LABELS,
    SMALL,
    make_run,
    make_starter_folder,
    write_labels,
    write_records,
)
from trainer.__main__ import main
from trainer.export import close_threshold, operation_at, served_scores
from trainer.records import video_matrix
from trainer.trained import open_trained, read_data

KINDS = list(SMALL)
DEADLINE_SECONDS = 60
TEN_PERCENT = ("--false-positive-rate", "0.1")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def export(model: Path, output: Path, *more: object) -> Manifest:
    found = run("export", "--model", model, "--output", output, "--name", "trial", *more)
    assert found.exit_code == 0, found.output
    return load_classifier(output).manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    make_run(folder / "run")
    write_records(folder / "clips.tfrecord", 80)
    write_labels(folder / "labels.csv")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_detector_serves_a_trained_model_of_every_kind(kind: str, tmp_path: Path) -> None:
    """The whole of ``detector run`` but its signals, on the embedded bus, with the built-in model's embedder."""
    make_run(tmp_path / "run", kind)
    package = tmp_path / "package"
    manifest = export(tmp_path / "run", package, "--embedder", "compact-gunfire", "--open-threshold", "0.000001")
    assert manifest.classifier.kind == kind
    assert manifest.self_test.input == "pcm"
    settings = load_settings(
        None,
        {
            "DETECTOR__MODEL__NAME": str(package),
            "DETECTOR__BUS__EMBEDDED__PATH": str(tmp_path / "bus.sqlite3"),
            "DETECTOR__CONSOLE__PORT": "0",
            "DETECTOR__BATCH__MAX_BATCH": "4",
        },
    )
    bus = EmbeddedBus(tmp_path / "bus.sqlite3")
    daemon = Daemon(settings, registry=CollectorRegistry())
    thread = threading.Thread(target=daemon.run)
    thread.start()
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not daemon.ready()["ok"]:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        publish(bus, shots(14, 6), ["roof"])
        while not (found := alerts_of(bus)):
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        daemon.stop()
        thread.join(DEADLINE_SECONDS)
        bus.close()
    assert found[0].model.name == "trial"
    assert found[0].label in ("Gunshot, gunfire", "Machine gun")


def test_a_package_is_the_run_it_was_made_of(folder: Path, tmp_path: Path) -> None:
    manifest = export(
        folder / "run", tmp_path / "package", "--data", folder, *TEN_PERCENT, "--version", "1.2", "--license", "X"
    )
    assert open_trained(tmp_path / "package").sha256 == open_trained(folder / "run").sha256
    assert manifest.labels == LABELS.names
    assert manifest.family == ("Gunshot, gunfire", "Machine gun")
    assert manifest.look_alikes == ("Fireworks", "Thunder")
    assert manifest.training.command == "trainer train --seed 3"
    assert manifest.training.data == ("train/*.tfrecord (9 clips)",)
    assert manifest.training.recipe["kind"] == "lstm"
    assert (manifest.version, manifest.license) == ("1.2", "X")
    # VGGish's weights are fetched where it is served; the classifier is tested without them
    assert manifest.embedder.from_store
    assert manifest.postprocess.kind == "pca_quantise"
    assert manifest.self_test.input == "embeddings"
    measured = json.loads(run("evaluate", "--model", folder / "run", "--data", folder, "--format", "json").stdout)
    assert manifest.evaluation is not None
    assert manifest.evaluation.clips == 80
    for name in ("map", "gap", "gunfire_family_ap"):
        assert manifest.evaluation.metrics[name] == pytest.approx(measured[name], abs=1e-6)
    with pytest.raises(ModelError, match="models fetch vggish"):
        load_model(tmp_path / "package", store=tmp_path / "empty")


def test_the_thresholds_keep_their_promise_on_the_data(folder: Path, tmp_path: Path) -> None:
    manifest = export(folder / "run", tmp_path / "package", "--data", folder, *TEN_PERCENT)
    trained = open_trained(tmp_path / "package")
    clips = read_data(trained, str(folder), LABELS)
    batch = clips.gather(np.arange(len(clips)))
    scores = trained.classifier(batch.values, batch.num_frames).numpy()[:, [1, 2]].max(axis=1)
    gunfire = batch.labels[:, [1, 2]].any(axis=1)
    threshold = manifest.decision.open_threshold
    assert (scores[~gunfire] >= threshold).mean() <= 0.1
    stricter = [t for t in scores if (scores[~gunfire] >= t).mean() <= 0.1]
    assert (scores[gunfire] >= threshold).mean() == max((scores[gunfire] >= t).mean() for t in stricter)
    assert 0 < manifest.decision.close_threshold < threshold
    assert len(manifest.operating_curve) >= 3
    for point in manifest.operating_curve:
        assert point.recall == pytest.approx((scores[gunfire] >= point.threshold).mean(), abs=1e-6)
        rate = (scores[~gunfire] >= point.threshold).mean()
        assert point.false_positive_rate == pytest.approx(rate, abs=1e-6)
        assert point.false_alarms_per_hour == pytest.approx(rate * 3600 / 9.6, abs=1e-3)
    rates = [point.false_positive_rate for point in manifest.operating_curve]
    assert rates == sorted(rates, reverse=True)


def test_a_long_clip_scores_as_its_loudest_window(tmp_path: Path) -> None:
    trained = open_trained(make_run(tmp_path / "run").folder)
    clips = read_data(trained, str(write_records(tmp_path / "long.tfrecord", 12, frames=9)), LABELS)
    found = served_scores(trained, clips, [1, 2], 4)
    for clip in range(len(clips)):
        frames = clips.frames_of(clip)[None]
        values = video_matrix(frames, np.array([frames.shape[1]], np.int32))
        windows = [values[:, s : s + 4] for s in range(max(1, frames.shape[1] - 3))]
        scores = [trained.classifier(w, np.array([w.shape[1]], np.int32)).numpy()[0, [1, 2]].max() for w in windows]
        assert found[clip] == pytest.approx(max(scores), abs=1e-6)


def test_thresholds_without_data_and_against_it(folder: Path, tmp_path: Path) -> None:
    manifest = export(folder / "run", tmp_path / "a", "--open-threshold", "0.5")
    assert manifest.decision.open_threshold == 0.5
    assert manifest.decision.close_threshold == pytest.approx(1 / 3, abs=1e-6)
    assert manifest.operating_curve == ()
    assert manifest.evaluation is None
    manifest = export(folder / "run", tmp_path / "b", "--open-threshold", "0.5", "--data", folder)
    assert manifest.decision.open_threshold == 0.5
    assert manifest.operating_curve


def test_no_threshold_where_there_is_nothing_to_choose_by(caplog: pytest.LogCaptureFixture) -> None:
    scores = np.array([0.1, 0.9], np.float32)
    for positive, words in (([True, True], "lacks"), ([False, False], "carries")):
        with pytest.raises(DataError, match=words):
            operation_at(scores, np.array(positive), 0.01, 10)
    with pytest.raises(DataError, match="the highest score is a false positive"):
        operation_at(scores, np.array([True, False]), 0.01, 10)
    scores = np.array([0.9, 0.5, 0.1, 0.2], np.float32)
    positive = np.array([False, True, True, False])
    with pytest.raises(DataError, match="hears none of 2 gunfire clips"):
        operation_at(np.array([0.9, 0.5, 0.1, 0.6], np.float32), positive, 0.5, 10)
    assert operation_at(scores, positive, 0.5, 10, open_threshold=0.6).recall == 0
    assert "deaf" in caplog.text
    with pytest.raises(DataError, match="opens an alert on silence"):
        operation_at(np.zeros(4, np.float32), positive, 1.0, 10)
    assert close_threshold(0.0) == 0.0
    assert 0.99 < close_threshold(1.0) <= 1.0


def test_a_starter_checkpoint_needs_the_names_of_its_classes(folder: Path, tmp_path: Path) -> None:
    starter = make_starter_folder(tmp_path / "starter", "MoeModel")
    found = run(
        "export", "--model", starter, "--output", tmp_path / "p", "--name", "x", "--open-threshold", "0.5", "--family",
        "1-2",
    )  # fmt: skip
    assert found.exit_code == 78
    assert "give --labels" in found.stderr
    manifest = export(starter, tmp_path / "package", "--open-threshold", "0.5", "--labels", folder / "labels.csv")
    assert manifest.family == ("Gunshot, gunfire", "Machine gun")
    assert manifest.training.command == "the YouTube-8M starter code's train.py, checkpoint model.ckpt-7"


def test_a_packages_own_embedder_and_pca_go_along(folder: Path, tmp_path: Path, golden_dir: Path) -> None:
    pca = golden_dir / "vggish_pca_params.npz"
    manifest = export(folder / "run", tmp_path / "a", "--open-threshold", "0.5", "--pca-params", pca)
    assert manifest.postprocess.sha256
    assert not manifest.postprocess.from_store
    again = export(folder / "run", tmp_path / "b", "--open-threshold", "0.5", "--embedder", f"{tmp_path / 'a'}")
    assert again.postprocess == manifest.postprocess
    assert (tmp_path / "b" / pca.name).read_bytes() == pca.read_bytes()
    found = run(
        "export", "--model", folder / "run", "--output", tmp_path / "c", "--name", "x", "--open-threshold", "0.5",
        "--embedder", "compact-gunfire", "--pca-params", pca,
    )  # fmt: skip
    assert found.exit_code == 78
    assert "brings its own" in found.stderr


@pytest.mark.parametrize(
    ("more", "words", "code"),
    [
        (["--window", "301"], "A window of 301 examples can't be: 1 to 300", 78),
        (["--window", "0"], "A window of 0 examples", 78),
        (["--name", "Has Spaces"], "--name 'Has Spaces' can't be: small letters", 78),
        (["--version", ""], "--version '' can't be", 78),
        (["--open-threshold", "0"], "'--open-threshold': 0.0 is not in the range 0<x<=1", 2),
        (["--family", "Bagpipe"], "'Bagpipe' is no class", 1),
        (["--family", "3-4", "--look-alikes", "4"], "in --family and in --look-alikes", 78),
        (["--embedder", "vggvox"], "'vggvox' is not among the shipped ones", 1),
        (["--labels", "absent.csv"], "absent.csv can't be read", 1),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    folder: Path, tmp_path: Path, more: list[str], words: str, code: int
) -> None:
    output = tmp_path / "package"
    found = run(
        "export", "--model", folder / "run", "--output", output, "--name", "x", "--open-threshold", "0.5", *more
    )
    assert found.exit_code == code, found.output
    assert words in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_of_another_size_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run", input_size=64)
    found = run(
        "export", "--model", tmp_path / "run", "--output", tmp_path / "p", "--name", "x", "--open-threshold", "0.5"
    )
    assert found.exit_code == 78
    assert "takes 64 values an example; embedders of the detector give 128" in found.stderr


def test_neither_data_nor_threshold_is_refused(folder: Path, tmp_path: Path) -> None:
    found = run("export", "--model", folder / "run", "--output", tmp_path / "p", "--name", "x")
    assert found.exit_code == 78
    assert "--data" in found.stderr


def test_a_folder_in_use_is_left_alone_unless_told(folder: Path, tmp_path: Path) -> None:
    given = ("--open-threshold", "0.5")
    export(folder / "run", tmp_path / "package", *given)
    (tmp_path / "package" / "MODEL_CARD.md").write_text("card")
    before = (tmp_path / "package" / MANIFEST_NAME).read_bytes()
    arguments = ("export", "--model", folder / "run", "--output", tmp_path / "package", "--name", "other", *given)
    found = run(*arguments)
    assert found.exit_code == 78
    assert "--overwrite" in found.stderr
    assert (tmp_path / "package" / MANIFEST_NAME).read_bytes() == before
    assert run(*arguments, "--overwrite").exit_code == 0
    assert load_classifier(tmp_path / "package").manifest.name == "other"
    assert (tmp_path / "package" / "MODEL_CARD.md").read_text() == "card"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    foreign = run(*arguments[:4], tmp_path / "mine", *arguments[5:], "--overwrite")
    assert foreign.exit_code == 78
    assert "holds thesis.txt and no package" in foreign.stderr


def test_the_detector_refuses_a_package_whose_parts_do_not_fit(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    given = ("--embedder", "compact-gunfire", "--open-threshold", "0.5")
    export(tmp_path / "run", tmp_path / "package", *given)
    make_run(tmp_path / "wider", cells=16)
    export(tmp_path / "wider", tmp_path / "other", *given)
    whole = (tmp_path / "package" / "classifier.safetensors").read_bytes()
    (tmp_path / "package" / "classifier.safetensors").write_bytes(
        (tmp_path / "other" / "classifier.safetensors").read_bytes()
    )
    with pytest.raises(ModelError, match="SHA-256"):
        load_model(tmp_path / "package")
    manifest = json.loads((tmp_path / "package" / MANIFEST_NAME).read_text())
    other = json.loads((tmp_path / "other" / MANIFEST_NAME).read_text())
    manifest["classifier"]["sha256"] = other["classifier"]["sha256"]
    (tmp_path / "package" / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=r"shape \(.*\).*"):
        load_model(tmp_path / "package")
    (tmp_path / "package" / "classifier.safetensors").write_bytes(whole)
