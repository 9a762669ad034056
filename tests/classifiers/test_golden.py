"""All five kinds are the starter code's: outputs, pooled features, losses, penalties, variables, moving statistics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from detector.classifiers import Classifier, build_classifier, regularisation_loss, shapes, weights
from tests.classifiers.golden_cases import Case, built, cases, features
from trainer.starter_checkpoint import KIND_BY_MODEL, params_from_shapes

_ARCHIVES = {
    "yt8m_video_models.npz": None,
    "yt8m_frame_logistic.npz": "frame_logistic",
    "yt8m_lstm.npz": "lstm",
    "yt8m_dbof.npz": "dbof",
}


def kind_of(archive: str, case: Case) -> str:
    return _ARCHIVES[archive] or ("moe" if "tower/gates/weights" in case["w"] else "logistic")


def run(classifier: Classifier, case: Case) -> tuple[np.ndarray, np.ndarray]:
    x = features(case)
    num_frames = case.get("num_frames", np.ones(len(x), np.int32))
    training = bool(case["config"].get("is_training", False))
    pooled = classifier.pooled(x, num_frames, training=training, uniforms=case.get("u"))
    return pooled.numpy(), classifier.final(pooled).numpy()


def cross_entropy(predictions: np.ndarray, labels: np.ndarray) -> float:
    p, y = predictions.astype(np.float64), labels.astype(np.float64)
    return float(np.mean(np.sum(-y * np.log(p + 1e-5) - (1 - y) * np.log(1 - p + 1e-5), axis=1)))


@pytest.mark.golden
@pytest.mark.parametrize("archive", _ARCHIVES)
def test_every_forward_pass(golden_dir: Path, archive: str) -> None:
    for name, case in cases(golden_dir / archive):
        classifier = built(case, kind_of(archive, case))
        pooled, predictions = run(classifier, case)
        np.testing.assert_allclose(predictions, case["predictions"], rtol=0, atol=1e-5, err_msg=name)
        if "pooled" in case:
            np.testing.assert_allclose(pooled, case["pooled"], rtol=0, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(cross_entropy(predictions, case["labels"]), case["loss"], rtol=1e-5, err_msg=name)
        penalty = regularisation_loss(classifier, 1e-3 if name.endswith("_l2") else 1e-8)
        np.testing.assert_allclose(penalty, case["reg_loss"], rtol=1e-5, err_msg=name)
        moved = {key.removeprefix("after/"): value for key, value in case.items() if key.startswith("after/")}
        for variable, value in moved.items():
            found = weights(classifier)[variable]
            np.testing.assert_allclose(found, value, rtol=1e-6, atol=1e-6, err_msg=f"{name} {variable}")
        if not case["config"].get("is_training", False):
            after = weights(classifier)
            assert all(np.array_equal(after[key], value) for key, value in case["w"].items()), name


@pytest.mark.golden
def test_names_order_shapes_and_trainability_of_every_variable(golden_dir: Path) -> None:
    listed = json.loads((golden_dir / "yt8m_variables.json").read_text())
    kinds = {"logistic": "logistic", "moe": "moe", "flogistic": "frame_logistic", "lstm": "lstm", "dbof": "dbof"}
    for case, variables in listed.items():
        expected = {name: tuple(shape) for name, shape, _, _ in variables}
        if case.startswith("DEFAULT_"):
            model, *flags = case.removeprefix("DEFAULT_").split("_", 1)
            kind = KIND_BY_MODEL[model]
            params = {"batch_norm": False} if flags == ["dbof_add_batch_norm=False"] else {}
        else:
            kind = kinds[case.split("_")[0]]
            params = params_from_shapes(kind, expected, case)
        classifier = build_classifier(kind, params)
        found = classifier.named_variables()
        assert list(shapes(classifier).items()) == list(expected.items()), case
        assert [found[name].trainable for name in expected] == [trainable for *_, trainable in variables], case
        assert all(found[name].dtype.name == dtype for name, _, dtype, _ in variables), case


@pytest.mark.golden
def test_given_row_of_each_frame_draw_decides_what_dbof_sees(golden_dir: Path) -> None:
    for name, case in cases(golden_dir / "yt8m_dbof.npz"):
        if case["config"].get("is_training"):
            continue
        classifier = built(case)
        other = {**case, "u": (case["u"] + np.float32(0.37)) % np.float32(1.0)}
        assert np.abs(run(classifier, other)[1] - case["predictions"]).max() > 1e-4, name
