"""The shipped head on AudioSet's embeddings: small, as good as its card says, and served once VGGish is fetched."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from detector.checkpoint import write_safetensors
from detector.demo import free_port
from detector.errors import WeightsMissing
from detector.fetch import PCA_NAME, WEIGHTS_NAME
from detector.model import PackagedClassifier, load_classifier, load_model, self_test_embeddings, self_test_pcm
from detector.store import Lock, sha256_of_file
from trainer.metrics import Curve, family_labels, family_scores, per_class
from trainer.recipes import RECOMMENDED
from trainer.records import ClipSet, find_files, read_clips

PACKAGE = Path(__file__).parents[2] / "detector" / "models" / "vggish-audioset"
FAMILY = (427, 428, 429, 430)


@pytest.fixture(scope="module")
def packaged() -> PackagedClassifier:
    return load_classifier("vggish-audioset")


@pytest.fixture(scope="module")
def clips(data_dir: Path) -> ClipSet:
    return read_clips(find_files(data_dir / "audioset/features/audioset_v1_embeddings/eval_dev"), classes=527)


@pytest.fixture(scope="module")
def store(
    tmp_path_factory: pytest.TempPathFactory, golden_dir: Path, vggish_tensors: dict[str, np.ndarray]
) -> Iterator[Path]:
    """As ``detector models fetch`` leaves it, with seeded weights instead of the published ones."""
    folder = tmp_path_factory.mktemp("store")
    write_safetensors(folder / WEIGHTS_NAME, vggish_tensors)
    (folder / PCA_NAME).write_bytes((golden_dir / PCA_NAME).read_bytes())
    lock = Lock(folder)
    for name in (WEIGHTS_NAME, PCA_NAME):
        lock.pin(name, sha256_of_file(folder / name), origin="the recipe of the golden vectors")
    lock.save()
    yield folder
    (folder / WEIGHTS_NAME).unlink()  # 288 MB


def scores_of(packaged: PackagedClassifier, clips: ClipSet, rows: int = 10, step: int = 1) -> np.ndarray:
    """``(N, 527)`` scores of the first ``rows`` rows of every ``step``-th clip."""
    chosen = np.arange(0, len(clips), step)
    found = []
    for start in range(0, len(chosen), 1024):
        batch = clips.gather(chosen[start : start + 1024], rows)
        found.append(packaged.classifier(batch.values, batch.num_frames).numpy())
    return np.concatenate(found)


@pytest.fixture(scope="module")
def scores(packaged: PackagedClassifier, clips: ClipSet) -> np.ndarray:
    return scores_of(packaged, clips)


def test_it_is_small() -> None:
    assert (PACKAGE / "classifier.safetensors").stat().st_size <= 8_000_000
    assert sorted(path.name for path in PACKAGE.iterdir()) == [
        "MODEL_CARD.md",
        "classifier.safetensors",
        "manifest.json",
    ]


def test_the_manifest_says_all_there_is_to_know(packaged: PackagedClassifier) -> None:
    manifest = packaged.manifest
    assert manifest.embedder.kind == "vggish"
    assert manifest.embedder.from_store
    assert manifest.postprocess.kind == "pca_quantise"
    assert manifest.postprocess.from_store
    assert manifest.classifier.kind == "attention_lstm"
    assert (manifest.window.examples, manifest.window.hop_seconds) == (10, 0.96)
    assert len(manifest.labels) == 527
    assert [manifest.labels.index(label) for label in manifest.family] == list(FAMILY)
    assert {"Fireworks", "Firecracker", "Explosion", "Thunder"} <= set(manifest.look_alikes)
    assert "trainer train --recipe recommended" in manifest.training.command
    assert "--seed" in manifest.training.command
    assert manifest.evaluation is not None
    assert manifest.evaluation.clips == 10_114
    thresholds = [point.threshold for point in manifest.operating_curve]
    recalls = [point.recall for point in manifest.operating_curve]
    assert len(thresholds) >= 5
    assert thresholds == sorted(thresholds)
    assert recalls == sorted(recalls, reverse=True)
    assert 0 < manifest.decision.close_threshold < manifest.decision.open_threshold < 1


def test_it_was_trained_by_the_recommended_recipe(packaged: PackagedClassifier) -> None:
    said = packaged.manifest.training.recipe
    for name, value in RECOMMENDED.model_dump(mode="json").items():
        if name not in ("evaluate_every_epochs", "checkpoint_every_seconds", "log_every_steps"):
            assert said[name] == value, name
    assert packaged.manifest.classifier.params.items() >= RECOMMENDED.params.items()


def test_the_classifier_gives_the_scores_of_its_self_test(packaged: PackagedClassifier) -> None:
    test = packaged.manifest.self_test
    assert test.input == "embeddings"
    window = self_test_embeddings(test.seed, 10)[None]
    scores = packaged.classifier(window, np.array([10], np.int32)).numpy()[0]
    np.testing.assert_allclose(scores, test.expected_scores, rtol=0, atol=test.tolerance)


def test_it_is_as_good_as_manifest_and_card_say(
    packaged: PackagedClassifier, clips: ClipSet, scores: np.ndarray
) -> None:
    labels = clips.label_matrix()
    family = Curve.of(family_scores(scores, FAMILY), family_labels(labels, FAMILY)).average_precision
    overall = per_class(scores, labels).mean_average_precision
    assert family >= 0.46
    assert overall >= 0.285
    assert packaged.manifest.evaluation is not None
    metrics = packaged.manifest.evaluation.metrics
    assert metrics["gunfire_family_ap"] == pytest.approx(family, abs=2e-3)
    assert metrics["map"] == pytest.approx(overall, abs=2e-3)
    card = (PACKAGE / "MODEL_CARD.md").read_text("utf-8")
    for name, value in (("gunshot-family AP", family), ("mAP over 527 classes", overall)):
        told = re.search(rf"\| {name} \| (0\.\d+) \|", card)
        assert told is not None, name
        assert float(told[1]) == pytest.approx(value, abs=2e-3)


def test_its_operating_curve_is_that_of_the_clips(
    packaged: PackagedClassifier, clips: ClipSet, scores: np.ndarray
) -> None:
    curve = Curve.of(family_scores(scores, FAMILY), family_labels(clips.label_matrix(), FAMILY))
    for point in packaged.manifest.operating_curve:
        recall, false_positive_rate = curve.at_threshold(point.threshold)
        assert recall == pytest.approx(point.recall, abs=0.02)
        assert point.false_positive_rate == pytest.approx(false_positive_rate, abs=1e-3)


def test_a_window_that_only_fills_is_scored_sanely(packaged: PackagedClassifier, clips: ClipSet) -> None:
    """As a stream begins: with every row it knows more, and with one it knows something already."""
    labels = family_labels(clips.label_matrix(np.arange(0, len(clips), 2)), FAMILY)
    aps = []
    for rows in (1, 3, 10):
        scores = family_scores(scores_of(packaged, clips, rows, step=2), FAMILY)
        assert np.isfinite(scores).all()
        assert scores.mean() == pytest.approx(labels.mean(), abs=0.03)  # no louder for knowing less
        aps.append(Curve.of(scores, labels).average_precision)
    assert 0.08 < aps[0] < aps[1] < aps[2]


def test_without_the_fetched_weights_a_person_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match="detector models fetch vggish"):
        load_model("vggish-audioset", store=tmp_path)
    environ = {
        **os.environ,
        "DETECTOR__MODEL__NAME": "vggish-audioset",
        "DETECTOR__MODEL__STORE": str(tmp_path),
        "DETECTOR__CONSOLE__PORT": str(free_port()),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    arguments = [sys.executable, "-m", "detector", "run", "--bus-path", str(tmp_path / "bus.sqlite3")]
    done = subprocess.run(arguments, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 78, done.stderr
    assert "detector models fetch vggish" in done.stderr


@pytest.mark.golden
def test_once_the_weights_are_there_it_serves(store: Path) -> None:
    model = load_model("vggish-audioset", store=store)
    model.self_test()
    embeddings = model.embed(self_test_pcm(3, 10))
    steps = np.unique(embeddings)
    assert len(steps) <= 256  # quantised, as what it was trained on
    assert np.abs(embeddings).max() < 2.01
    windows = np.repeat(embeddings[None], 10, axis=0)
    scores = model.classify(windows, np.arange(1, 11, dtype=np.int32))
    assert scores.shape == (10, 527)
    assert np.isfinite(scores).all()
    expected = load_classifier("vggish-audioset").classifier(windows, np.arange(1, 11, dtype=np.int32)).numpy()
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)


def test_it_is_listed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "detector", "models", "list"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "vggish-audioset" in done.stdout


def test_its_labels_are_audiosets_in_their_order(packaged: PackagedClassifier, data_dir: Path) -> None:
    lines = (data_dir / "audioset" / "class_labels_indices.csv").read_text("utf-8").splitlines()[1:]
    names = [line.split(",", 2)[2].strip('"') for line in lines]
    assert list(packaged.manifest.labels) == names
    assert json.loads((PACKAGE / "manifest.json").read_text("utf-8"))["license"] == "CC-BY-4.0"
