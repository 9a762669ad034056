"""The LSTM is blind to padding, learns, and takes no weights but its own."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from detector.classifiers import assign, build_classifier, shapes, weights
from detector.classifiers.lstm import LstmConfig, LstmModel
from detector.errors import ModelError


@pytest.mark.parametrize("final", ["moe", "logistic"])
def test_padding_has_no_effect_not_even_nan(final: str) -> None:
    random = np.random.default_rng(1)
    model = LstmModel(LstmConfig(classes=5, input_size=16, cells=12, final=final), seed=3)
    num_frames = np.array([0, 1, 4, 10], np.int32)
    x = random.standard_normal((4, 10, 16)).astype(np.float32)
    expected = model(x, num_frames).numpy()
    for filler in (0.0, 1e30, np.nan, np.inf):
        other = x.copy()
        other[np.arange(10)[None, :] >= num_frames[:, None]] = filler
        np.testing.assert_array_equal(model(other, num_frames).numpy(), expected)
    np.testing.assert_array_equal(model.pooled(x, num_frames)[0], np.zeros(12))


def test_a_longer_window_gives_the_same_scores() -> None:
    model = LstmModel(LstmConfig(classes=3, input_size=16, cells=12), seed=3)
    x = np.random.default_rng(2).standard_normal((2, 6, 16)).astype(np.float32)
    longer = np.pad(x, ((0, 0), (0, 30), (0, 0)))
    num_frames = np.array([6, 3], np.int32)
    np.testing.assert_allclose(model(x, num_frames), model(longer, num_frames), rtol=0, atol=1e-6)


@pytest.mark.parametrize("final", ["moe", "logistic"])
def test_gradients_are_those_of_finite_differences_and_training_lowers_the_loss(final: str) -> None:
    model = LstmModel(LstmConfig(classes=2, input_size=8, cells=6, layers=2, final=final), seed=3)
    random = np.random.default_rng(3)
    x = random.standard_normal((8, 5, 8)).astype(np.float32)
    num_frames = np.array([5, 5, 1, 2, 3, 4, 5, 0], np.int32)
    labels = (random.random((8, 2)) < 0.5).astype(np.float32)
    variables = list(model.named_variables().values())

    def loss() -> tf.Tensor:
        return tf.reduce_sum((model(x, num_frames) - labels) ** 2)

    for variable in variables:
        with tf.GradientTape() as tape:
            value = loss()
        gradient = tape.gradient(value, variable).numpy()
        direction = random.standard_normal(gradient.shape).astype(np.float32)
        original, step = variable.numpy(), np.float32(1e-2)
        variable.assign(original + step * direction)
        above = float(loss())
        variable.assign(original - step * direction)
        below = float(loss())
        variable.assign(original)
        np.testing.assert_allclose(np.sum(gradient * direction), (above - below) / (2 * step), rtol=2e-2, atol=2e-3)
    first = float(loss())
    for _ in range(50):
        with tf.GradientTape() as tape:
            value = loss()
        for variable, gradient in zip(variables, tape.gradient(value, variables), strict=True):
            variable.assign_sub(0.3 * gradient)
    assert float(loss()) < 0.8 * first


def test_same_seed_same_weights_and_weights_round_trip() -> None:
    params = {"classes": 4, "input_size": 8, "cells": 5, "layers": 3}
    one, two, other = (build_classifier("lstm", params, seed=s) for s in (7, 7, 8))
    assert list(shapes(one)) == list(weights(two))
    assert all(np.array_equal(weights(one)[name], weights(two)[name]) for name in weights(one))
    assert not all(np.array_equal(weights(one)[name], weights(other)[name]) for name in weights(one))
    assign(other, weights(one))
    assert all(np.array_equal(weights(one)[name], weights(other)[name]) for name in weights(one))


@pytest.mark.parametrize(
    ("kind", "params", "words"),
    [
        ("gru", {}, "'gru' is unknown"),
        ("lstm", {"cell": 3}, "'cell'.* unknown"),
        ("lstm", {"cells": 0}, "cells is 0"),
        ("lstm", {"cells": 3.0}, "cells is 3.0"),
        ("lstm", {"layers": True}, "layers is True"),
        ("lstm", {"final": "softmax"}, "allowed: moe, logistic"),
    ],
)
def test_unfit_parameters(kind: str, params: dict[str, object], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        build_classifier(kind, params)


def test_assign_refuses_other_weights() -> None:
    model = build_classifier("lstm", {"classes": 4, "input_size": 8, "cells": 5})
    good = weights(model)
    with pytest.raises(ModelError, match="tower/gates/weights is missing"):
        assign(model, {k: v for k, v in good.items() if k != "tower/gates/weights"})
    with pytest.raises(ModelError, match="extra is not expected"):
        assign(model, good | {"extra": np.zeros(3, np.float32)})
    with pytest.raises(ModelError, match="float64; float32"):
        assign(model, good | {"tower/experts/biases": good["tower/experts/biases"].astype(np.float64)})
