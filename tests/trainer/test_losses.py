"""The losses are the starter code's, and a gradient flows through each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from detector.errors import ConfigError
from trainer.losses import LOSS_NAMES, cross_entropy, hinge, loss_named, softmax


def cases(golden: np.lib.npyio.NpzFile) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Predictions and labels of every case that has a loss, stored or by its recipe."""
    found = {}
    for case in sorted({key.split("/")[0] for key in golden.files if "/loss_" in key}):
        if f"{case}/predictions" in golden.files:
            found[case] = golden[f"{case}/predictions"], golden[f"{case}/labels"]
            continue
        rows, classes, share = golden[f"{case}/recipe_N_V_p"]
        shape = int(rows), int(classes)
        random = np.random.RandomState(int(golden[f"{case}/recipe_seed"]))
        labels = random.random_sample(shape) < share
        found[case] = 1 / (1 + np.exp(-(2.5 * labels + random.standard_normal(shape) - 2))), labels
    return found


@pytest.mark.golden
@pytest.mark.parametrize("compiled", [False, True])
def test_losses_are_the_starter_codes(golden_dir: Path, compiled: bool) -> None:
    golden = np.load(golden_dir / "yt8m_metrics.npz")
    functions = {"xent": cross_entropy, "hinge": hinge, "softmax": softmax}
    for case, (predictions, labels) in cases(golden).items():
        tolerance = 1e-4 if case == "extreme" else 1e-5
        for name, function in functions.items():
            if f"{case}/loss_{name}" in golden.files:
                loss = (tf.function(function) if compiled else function)(tf.constant(predictions, tf.float32), labels)
                np.testing.assert_allclose(
                    loss, golden[f"{case}/loss_{name}"], rtol=tolerance, err_msg=f"{case} {name}"
                )
        if f"{case}/loss_xent_weighted" in golden.files:
            loss = cross_entropy(tf.constant(predictions, tf.float32), labels, golden[f"{case}/label_weights"])
            np.testing.assert_allclose(loss, golden[f"{case}/loss_xent_weighted"], rtol=tolerance)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_gradients_are_those_of_the_difference_quotient(name: str) -> None:
    random = np.random.default_rng(3)
    predictions = random.uniform(0.1, 0.9, (3, 4)).astype(np.float32)
    labels = random.random((3, 4)) < 0.4
    loss = loss_named(name)
    variable = tf.Variable(predictions)
    with tf.GradientTape() as tape:
        value = loss(variable, labels)
    gradient = tape.gradient(value, variable).numpy()
    step = 1e-2
    for i in np.ndindex(predictions.shape):
        up, down = predictions.copy(), predictions.copy()
        up[i] += step
        down[i] -= step
        expected = (float(loss(tf.constant(up), labels)) - float(loss(tf.constant(down), labels))) / (2 * step)
        assert gradient[i] == pytest.approx(expected, rel=0.02, abs=2e-3)


def test_certain_mistakes_cost_much_but_stay_finite() -> None:
    predictions = tf.Variable([[0.0, 1.0]])
    with tf.GradientTape() as tape:
        loss = cross_entropy(predictions, [[True, False]])
    assert float(loss) == pytest.approx(-2 * np.log(1e-5), rel=1e-3)
    assert np.isfinite(tape.gradient(loss, predictions).numpy()).all()


def test_soft_labels_count_in_proportion() -> None:
    predictions = tf.constant([[0.2, 0.7]])
    ones, zeros = cross_entropy(predictions, [[1.0, 0.0]]), cross_entropy(predictions, [[0.0, 1.0]])
    mixed = cross_entropy(predictions, tf.constant([[0.25, 0.75]]))
    assert float(mixed) == pytest.approx(0.25 * float(ones) + 0.75 * float(zeros), rel=1e-5)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_weights_may_be_of_classes_or_of_rows(name: str) -> None:
    loss = loss_named(name)
    predictions, labels = tf.constant([[0.2, 0.7], [0.4, 0.1]]), np.array([[True, True], [False, True]])
    one = np.float32(1.0)
    plain = float(loss(predictions, labels))
    assert float(loss(predictions, labels, tf.constant([one, one]))) == pytest.approx(plain, rel=1e-6)
    of_rows = float(loss(predictions, labels, tf.constant([[2.0], [0.0]])))
    assert of_rows == pytest.approx(float(loss(predictions[:1], labels[:1])), rel=1e-5)
    first, second = (float(loss(predictions, labels, tf.constant(each))) for each in ([one, 0.0], [0.0, one]))
    assert first + second == pytest.approx(plain, rel=1e-5)
    of_classes = float(loss(predictions, labels, tf.constant([3.0, 0.5])))
    assert of_classes == pytest.approx(3 * first + second / 2, rel=1e-5)


def test_weights_of_cross_entropy_are_factors_of_its_terms() -> None:
    predictions, labels = tf.constant([[0.2, 0.7], [0.4, 0.1]]), np.array([[True, False], [False, True]])
    each = [
        [float(cross_entropy(predictions[i : i + 1, j : j + 1], labels[i : i + 1, j : j + 1])) for j in (0, 1)]
        for i in (0, 1)
    ]
    of_classes = cross_entropy(predictions, labels, tf.constant([3.0, 0.5]))
    assert float(of_classes) == pytest.approx(float(np.mean(np.array(each) @ [3.0, 0.5])), rel=1e-5)
    of_rows = cross_entropy(predictions, labels, tf.constant([[2.0], [0.0]]))
    assert float(of_rows) == pytest.approx(float(np.sum(each[0])), rel=1e-5)


def test_an_unknown_loss_names_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match="'MeanSquares' is unknown; there are CrossEntropyLoss, HingeLoss, SoftmaxLoss"
    ):
        loss_named("MeanSquares")
