"""The attention LSTM is blind to padding, serves windows of any length, and hides by seed alone while it trains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from detector.classifiers import assign, build_classifier, shapes, weights
from detector.classifiers.attention_lstm import AttentionLstmConfig, AttentionLstmModel
from detector.errors import ModelError
from trainer.train_step import StepSettings, TrainStep

SMALL: dict[str, Any] = {"classes": 5, "input_size": 16, "dense": 20, "cells": 12}


def model_of(**changes: Any) -> AttentionLstmModel:
    return AttentionLstmModel(AttentionLstmConfig(**{**SMALL, **changes}), seed=3)


def windows(count: int = 4, rows: int = 10, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, rows, 16)).astype(np.float32)


def seed_of(*values: int) -> tf.Tensor:
    return tf.constant(values, tf.int64)


@pytest.mark.parametrize("final", ["logistic", "moe"])
def test_padding_has_no_effect_not_even_nan(final: str) -> None:
    model = model_of(final=final)
    num_frames = np.array([0, 1, 4, 10], np.int32)
    x = windows()
    expected = model(x, num_frames).numpy()
    assert np.isfinite(expected).all()
    for filler in (0.0, 1e30, np.nan, np.inf):
        other = x.copy()
        other[np.arange(10)[None, :] >= num_frames[:, None]] = filler
        np.testing.assert_array_equal(model(other, num_frames).numpy(), expected)
    np.testing.assert_array_equal(model.pooled(x, num_frames)[0], np.zeros(32))


def test_a_window_that_fills_scores_as_one_that_was_never_longer() -> None:
    model = model_of()
    x = windows(1)
    for rows in range(1, 11):
        alone = model(x[:, :rows], np.array([rows], np.int32))
        np.testing.assert_allclose(model(x, np.array([rows], np.int32)), alone, rtol=0, atol=1e-6)


def test_every_row_counts_and_so_does_their_order() -> None:
    model = model_of()
    x, num_frames = windows(1), np.array([10], np.int32)
    expected = model(x, num_frames).numpy()
    for t in range(10):
        other = x.copy()
        other[0, t] = -other[0, t]
        assert np.abs(model(other, num_frames).numpy() - expected).max() > 1e-6, f"row {t} unseen"
    assert np.abs(model(x[:, ::-1], num_frames).numpy() - expected).max() > 1e-6


def test_pooling_is_a_weighted_mean_of_steps() -> None:
    """Rows all alike: whatever the attention, what is pooled of the dense layers is what one row gives."""
    model = model_of()
    x = np.repeat(windows(1, rows=1), 10, axis=1)
    pooled = [model.pooled(x[:, :rows], np.array([rows], np.int32))[:, :20] for rows in (1, 10)]
    np.testing.assert_allclose(pooled[1], pooled[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shares", [(0.5, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.5)])
def test_dropout_follows_from_the_seed_and_is_off_outside_training(shares: tuple[float, float, float]) -> None:
    names = ("input_dropout", "dropout", "pooled_dropout")
    model, bare = model_of(**dict(zip(names, shares, strict=True))), model_of(**dict.fromkeys(names, 0.0))
    x, num_frames = windows(), np.array([2, 5, 9, 10], np.int32)
    served = bare.pooled(x, num_frames).numpy()
    np.testing.assert_array_equal(model.pooled(x, num_frames), served)
    np.testing.assert_array_equal(model.pooled(x, num_frames, seed=seed_of(1, 2)), served)
    np.testing.assert_allclose(model.pooled(x, num_frames, training=True), served, rtol=0, atol=1e-6)

    def trained(*seed: int) -> np.ndarray:
        return np.asarray(model.pooled(x, num_frames, training=True, seed=seed_of(*seed)))

    np.testing.assert_array_equal(trained(1, 2), trained(1, 2))
    for other in ((1, 3), (2, 2), (2, 1)):
        assert not np.array_equal(trained(1, 2), trained(*other))


def test_the_largest_share_leaves_something() -> None:
    model = model_of(input_dropout=0.999, dropout=0.0, pooled_dropout=0.0)
    x = tf.ones((8, 10, model.input_size))
    pooled = model.pooled(x, tf.fill([8], 10), training=True, seed=tf.constant([1, 2], tf.int64)).numpy()
    assert np.isfinite(pooled).all()


def test_dropout_keeps_the_mean_and_hides_the_share() -> None:
    model = model_of(input_dropout=0.0, dropout=0.0, pooled_dropout=0.25)
    x, num_frames = windows(), np.full(4, 10, np.int32)
    served = model.pooled(x, num_frames).numpy()
    alive = served != 0  # a ReLU may give 0 at all steps
    trained = tf.function(lambda seed: model.pooled(x, num_frames, training=True, seed=seed))
    drawn = np.stack([trained(seed_of(0, k)).numpy()[alive] for k in range(300)])
    hidden = drawn == 0
    assert hidden.mean() == pytest.approx(0.25, abs=0.01)
    assert np.abs(hidden.mean(axis=0) - 0.25).max() < 0.12
    np.testing.assert_allclose(
        drawn[~hidden], np.broadcast_to(served[alive] / 0.75, drawn.shape)[~hidden], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("mixed_precision", [False, True])
def test_training_finds_the_same_values_and_gradients_on_the_faster_way(mixed_precision: bool) -> None:
    model = model_of(cells=64)
    x, num_frames = windows(), np.array([0, 1, 4, 10], np.int32)
    variables = list(model.named_variables().values())
    found = []
    for training in (False, True):
        with tf.GradientTape() as tape:
            pooled = model.pooled(x, num_frames, training=training, mixed_precision=mixed_precision)
            loss = tf.reduce_sum(model.final(pooled) * np.arange(1.0, 6.0, dtype=np.float32))
        found.append([pooled, *tape.gradient(loss, variables)])
    for exact, fast in zip(*found, strict=True):
        scale = float(tf.reduce_max(tf.abs(exact)))
        np.testing.assert_allclose(fast, exact, rtol=0, atol=scale * (5e-2 if mixed_precision else 1e-5))
    assert mixed_precision == any(np.abs(f - e).max() > 1e-4 for e, f in zip(*found, strict=True))


def test_training_with_dropout_goes_on_where_it_stopped_bit_for_bit() -> None:
    x, num_frames = windows(8), np.array([1, 2, 3, 5, 7, 9, 10, 10], np.int32)
    labels = np.random.default_rng(2).random((8, 5)) < 0.4
    settings = StepSettings(batch_size=8, base_learning_rate=0.01, seed=9)

    def steps_of(count: int, state: dict[str, np.ndarray] | None = None) -> tuple[list[float], dict[str, np.ndarray]]:
        step = TrainStep(build_classifier("attention_lstm", SMALL, seed=1), settings)
        if state is not None:
            step.restore(state)
        losses = [float(step(x, labels, num_frames).loss) for _ in range(count)]
        return losses, step.state()

    losses, state = steps_of(6)
    first, half = steps_of(3)
    second, resumed = steps_of(3, half)
    assert first + second == losses
    for name, value in state.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)
    assert len(set(losses)) == 6


def test_it_learns_what_depends_on_the_order_of_rows() -> None:
    """Two rows in one order or the other: no mean of rows can tell, the LSTM can."""
    random = np.random.default_rng(4)
    one, other = random.standard_normal((2, 16)).astype(np.float32)
    x = np.stack([np.stack([one, other]), np.stack([other, one])] * 8)
    labels = np.array([[True], [False]] * 8)
    num_frames = np.full(16, 2, np.int32)
    model = build_classifier("attention_lstm", {**SMALL, "classes": 1}, seed=2)
    step = TrainStep(model, StepSettings(batch_size=16, base_learning_rate=0.01))
    for _ in range(120):
        step(x, labels, num_frames)
    scores = model(x, num_frames).numpy()
    assert scores[::2].min() > 0.9
    assert scores[1::2].max() < 0.1


def test_variables_have_names_and_round_trip() -> None:
    model = model_of()
    assert shapes(model) == {
        "tower/dense_0/weights": (16, 20),
        "tower/dense_0/gains": (20,),
        "tower/dense_0/biases": (20,),
        "tower/dense_1/weights": (20, 20),
        "tower/dense_1/gains": (20,),
        "tower/dense_1/biases": (20,),
        "tower/lstm/kernel": (32, 48),
        "tower/lstm/bias": (48,),
        "tower/attention/weights": (32, 32),
        "tower/fully_connected/weights": (32, 5),
        "tower/fully_connected/biases": (5,),
    }
    other = AttentionLstmModel(AttentionLstmConfig(**SMALL), seed=4)
    x, num_frames = windows(), np.array([1, 3, 6, 10], np.int32)
    assert not np.array_equal(other(x, num_frames), model(x, num_frames))
    assign(other, weights(model))
    np.testing.assert_array_equal(other(x, num_frames), model(x, num_frames))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"dense": 0}, "dense is 0"),
        ({"dense_layers": 0}, "dense_layers is 0"),
        ({"cells": 2.5}, "cells is 2.5"),
        ({"dropout": 1.0}, "dropout is 1.0; a number from 0 to below 1"),
        ({"input_dropout": -0.1}, "input_dropout is -0.1"),
        ({"pooled_dropout": "much"}, "pooled_dropout is 'much'"),
        ({"dropout": True}, "dropout is True"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"final": "softmax"}, "allowed: moe, logistic"),
        ({"heads": 2}, "'heads'.* unknown"),
    ],
)
def test_unfit_parameters(params: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        build_classifier("attention_lstm", {**SMALL, **params})
