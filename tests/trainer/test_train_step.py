"""A step is the starter code's; it goes on where it stopped, bit for bit; NaN changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from detector.classifiers import Classifier, build_classifier, weights
from detector.errors import ConfigError, ModelError
from tests.classifiers.golden_cases import built, cases
from trainer.losses import cross_entropy
from trainer.records import video_matrix
from trainer.starter_checkpoint import is_starter_folder, load_starter_model
from trainer.train_step import StepSettings, TrainStep

_FLAGS = (
    "batch_size",
    "base_learning_rate",
    "learning_rate_decay",
    "learning_rate_decay_examples",
    "clip_gradient_norm",
    "regularization_penalty",
)
# Its true gradient is 0: Adam makes steps of what rounding leaves.
_UNDETERMINED = "input_bn/beta"


@pytest.mark.golden
def test_every_golden_training_run(golden_dir: Path) -> None:
    for name, case in cases(golden_dir / "yt8m_training.npz"):
        flags = case["config"]
        step = TrainStep(built(case), StepSettings(**{flag: flags[flag] for flag in _FLAGS}))
        for k in range(len(case["losses"])):
            uniforms = case["u"][k] if "u" in case else None
            result = step(case["x_raw"][k], case["labels"][k], case["num_frames"][k], uniforms=uniforms)
            assert result.applied
            np.testing.assert_allclose(result.loss, case["losses"][k], rtol=1e-5, err_msg=f"{name} step {k}")
            np.testing.assert_allclose(result.learning_rate, case["learning_rates"][k], rtol=1e-6, err_msg=name)
            if k == 0:
                np.testing.assert_allclose(result.predictions, case["predictions_step0"], rtol=0, atol=1e-5)
            state, prefix = step.state(), f"after{k + 1}/"
            for key, value in case.items():
                if key.startswith(prefix) and not key.endswith(_UNDETERMINED):
                    found = state[key.removeprefix(prefix)]
                    np.testing.assert_allclose(found, value, rtol=0, atol=2e-5, err_msg=f"{name} {key}")
        assert step.global_step == len(case["losses"])


@pytest.mark.golden
def test_training_goes_on_from_the_starter_codes_checkpoint(golden_dir: Path) -> None:
    for folder in golden_dir.glob("e2e_*"):
        if not is_starter_folder(folder):
            continue
        model = load_starter_model(folder)
        step = TrainStep(model.classifier, StepSettings(batch_size=4))
        step.restore({**weights(model.classifier), **model.optimiser})
        assert step.global_step == model.global_step
        state = step.state()
        assert all(np.array_equal(state[name], value) for name, value in model.optimiser.items())
        assert step(*batch(model.classifier, classes=model.params["classes"])).applied


def small(kind: str, seed: int = 3) -> Classifier:
    sizes: dict[str, dict[str, Any]] = {
        "lstm": {"cells": 64, "layers": 2},
        "dbof": {"clusters": 16, "hidden": 8, "iterations": 6},
    }
    return build_classifier(kind, {"classes": 5, "input_size": 16, **sizes.get(kind, {})}, seed=seed)


def batch(classifier: Classifier, seed: int = 0, classes: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.integers(0, 256, (8, 6, classifier.input_size), np.uint8)
    num_frames = random.integers(1, 7, 8).astype(np.int32)
    return video_matrix(x, num_frames), random.random((8, classes)) < 0.3, num_frames


KINDS = ["lstm", "logistic", "moe", "frame_logistic", "dbof"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_bit_for_bit(kind: str) -> None:
    settings = StepSettings(batch_size=8, learning_rate_decay_examples=16, learning_rate_decay=0.5, seed=11)
    whole = TrainStep(small(kind), settings)
    for k in range(3):
        whole(*batch(whole.classifier, seed=k))
    kept = whole.state()
    resumed = TrainStep(small(kind, seed=99), settings)
    resumed.restore(kept)
    for k in range(3, 6):
        first, second = whole(*batch(whole.classifier, seed=k)), resumed(*batch(resumed.classifier, seed=k))
        assert first.loss == second.loss
        assert first.learning_rate == second.learning_rate
    a, b = whole.state(), resumed.state()
    assert list(a) == list(b)
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert not np.array_equal(a["beta1_power"], kept["beta1_power"])
    assert whole.global_step == resumed.global_step == 6


def test_dbof_samples_other_rows_every_step_and_for_every_seed() -> None:
    def losses(seed: int) -> list[float]:
        # A rate of next to nothing: what changes from step to step is the sample.
        step = TrainStep(small("dbof"), StepSettings(batch_size=8, base_learning_rate=1e-12, seed=seed))
        return [float(step(*batch(step.classifier)).loss) for _ in range(3)]

    assert losses(1) == losses(1)
    assert len(set(losses(1) + losses(2))) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss(kind: str) -> None:
    step = TrainStep(small(kind), StepSettings(batch_size=8))
    losses = [float(step(*batch(step.classifier)).loss) for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.75 * losses[0]


def test_mixed_precision_learns_about_the_same() -> None:
    runs = []
    for mixed_precision in (False, True):
        settings = StepSettings(batch_size=8, base_learning_rate=0.001, mixed_precision=mixed_precision)
        step = TrainStep(small("lstm"), settings)
        runs.append([float(step(*batch(step.classifier)).loss) for _ in range(20)])
        assert all(value.dtype == np.float32 for value in weights(step.classifier).values())
    assert runs[0] != runs[1]
    np.testing.assert_allclose(runs[1], runs[0], rtol=0.03)


def test_bytes_and_their_dequantised_values_train_alike() -> None:
    random = np.random.default_rng(5)
    x, num_frames = random.integers(0, 256, (8, 6, 16), np.uint8), random.integers(1, 7, 8).astype(np.int32)
    labels = random.random((8, 5)) < 0.3
    one, two = (TrainStep(small("frame_logistic"), StepSettings(batch_size=8)) for _ in range(2))
    of_bytes = one(x, labels, num_frames)  # what lies beyond num_frames is cut off
    of_floats = two(video_matrix(x, num_frames), labels.astype(np.float32), num_frames)
    np.testing.assert_allclose(of_bytes.loss, of_floats.loss, rtol=1e-6)
    np.testing.assert_allclose(of_bytes.predictions, of_floats.predictions, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["lstm", "moe", "dbof"])
def test_a_loss_that_is_no_number_changes_nothing(kind: str) -> None:
    step = TrainStep(small(kind), StepSettings(batch_size=8))
    x, labels, num_frames = batch(step.classifier)
    step(x, labels, num_frames)
    before = step.state()
    broken = labels.astype(np.float32)
    broken[3, 2] = np.nan
    result = step(x, broken, num_frames)
    assert not result.applied
    assert not np.isfinite(result.loss)
    assert all(np.array_equal(value, before[name]) for name, value in step.state().items())
    assert step(x, labels, num_frames).applied


def test_gradients_without_a_number_change_nothing_even_where_the_loss_has_one() -> None:
    def loss(predictions: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.sqrt(predictions * 0.0)) + tf.reduce_sum(labels)  # 0 * inf in the gradient

    step = TrainStep(small("frame_logistic"), StepSettings(batch_size=8), loss)
    before = step.state()
    result = step(*batch(step.classifier))
    assert np.isfinite(result.loss)
    assert not result.applied
    assert all(np.array_equal(value, before[name]) for name, value in step.state().items())


def test_a_changed_weight_moves_no_further_than_the_rate() -> None:
    settings = StepSettings(batch_size=8, base_learning_rate=0.01, clip_gradient_norm=0.0)
    step = TrainStep(small("moe"), settings)
    before = weights(step.classifier)
    step(*batch(step.classifier))
    moved = [np.abs(value - before[name]).max() for name, value in weights(step.classifier).items()]
    np.testing.assert_allclose(moved, 0.01, rtol=1e-3)  # Adam's first step


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_other_sizes_and_lengths_train_on(kind: str) -> None:
    step, straight = (TrainStep(small(kind), StepSettings(batch_size=8)) for _ in range(2))
    x, labels, num_frames = batch(step.classifier)
    for clips, rows in ((8, 6), (5, 6), (3, 4), (1, 5)):
        frames = np.minimum(num_frames[:clips], rows)
        found = step(x[:clips, :rows], labels[:clips], frames)
        straight._traced = straight._step  # never traced: op by op
        expected = straight(x[:clips, :rows], labels[:clips], frames)
        np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-4)
        assert found.applied


def test_weights_reach_the_loss() -> None:
    step = TrainStep(small("logistic"), StepSettings(batch_size=8))
    x, labels, num_frames = batch(step.classifier)
    factors = np.random.default_rng(4).random((8, 5)).astype(np.float32)
    result = step(x, labels, num_frames, weights=factors)
    np.testing.assert_allclose(result.loss, cross_entropy(result.predictions, labels, factors), rtol=1e-5)
    unweighted = TrainStep(small("logistic"), StepSettings(batch_size=8))(x, labels, num_frames)
    assert abs(float(result.loss) - float(unweighted.loss)) > 0.1


def test_the_rate_falls_in_stairs_in_and_out_of_the_graph() -> None:
    settings = StepSettings(
        batch_size=8, base_learning_rate=0.02, learning_rate_decay=0.7, learning_rate_decay_examples=20
    )
    step = TrainStep(small("logistic"), settings)
    rates = [float(step(*batch(step.classifier)).learning_rate) for _ in range(8)]
    np.testing.assert_allclose(rates, [settings.learning_rate(k) for k in range(8)], rtol=1e-6)
    np.testing.assert_allclose(rates, [0.02 * 0.7 ** (k * 8 // 20) for k in range(8)], rtol=1e-6)


def test_the_rate_rises_then_falls_along_a_cosine_in_and_out_of_the_graph() -> None:
    settings = StepSettings(
        batch_size=8,
        base_learning_rate=0.02,
        learning_rate_schedule="cosine",
        warm_up_steps=4,
        total_steps=12,
        final_learning_rate_share=0.1,
    )
    step = TrainStep(small("logistic"), settings)
    rates = [float(step(*batch(step.classifier)).learning_rate) for _ in range(14)]
    np.testing.assert_allclose(rates, [settings.learning_rate(k) for k in range(14)], rtol=1e-6)
    np.testing.assert_allclose(rates[:5], [0.005, 0.01, 0.015, 0.02, 0.02], rtol=1e-6)
    np.testing.assert_allclose(rates[8], 0.011, rtol=1e-6)  # half way down
    np.testing.assert_allclose(rates[12:], 0.002, rtol=1e-6)


def test_averages_follow_the_weights_and_are_what_is_served() -> None:
    step = TrainStep(small("moe"), StepSettings(batch_size=8, average_decay=0.5))
    expected = weights(step.classifier)
    for k in range(12):
        step(*batch(step.classifier, seed=k))
        decay = min(0.5, (1 + k) / (10 + k))
        expected = {n: decay * expected[n] + (1 - decay) * value for n, value in weights(step.classifier).items()}
    for name, value in step.served_weights().items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-6)
    assert any(not np.array_equal(value, step.served_weights()[n]) for n, value in weights(step.classifier).items())


def test_matrices_decay_beside_adam_and_biases_do_not() -> None:
    plain, decayed = (TrainStep(small("moe"), StepSettings(batch_size=8, weight_decay=decay)) for decay in (0.0, 0.5))
    before = weights(plain.classifier)
    for step in (plain, decayed):
        step(*batch(step.classifier))
    for name, value in weights(decayed.classifier).items():
        lost = 0.01 * 0.5 * before[name] if value.ndim == 2 else 0.0
        np.testing.assert_allclose(value, weights(plain.classifier)[name] - lost, rtol=0, atol=1e-6, err_msg=name)


def test_gradients_clipped_together_keep_their_proportions() -> None:
    def slots(**changes: Any) -> dict[str, np.ndarray]:
        step = TrainStep(small("moe"), StepSettings(batch_size=8, **changes))
        step(*batch(step.classifier))
        return {name: value for name, value in step.state().items() if name.endswith("/Adam")}

    free, clipped = slots(clip_gradient_norm=0.0), slots(clip_gradient_norm=0.1, clip_gradients="together")
    norm = np.sqrt(sum(float(np.square(value * 10).sum()) for value in free.values()))  # slots: 0.1 of the gradient
    assert norm > 0.1
    for name, value in clipped.items():
        np.testing.assert_allclose(value, free[name] * (0.1 / norm), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"average_decay": 1.0}, "average_decay is 1.0; a number below 1"),
        ({"learning_rate_schedule": "cosine", "warm_up_steps": 9, "total_steps": 9}, "warms up for 9 steps of 9"),
        ({"batch_size": 0}, "batch_size is 0; a number above 0"),
        ({"base_learning_rate": float("nan")}, "base_learning_rate is nan"),
        ({"learning_rate_decay_examples": -1}, "learning_rate_decay_examples is -1"),
        ({"clip_gradient_norm": -0.5}, "clip_gradient_norm is -0.5; a number 0 or more"),
        ({"regularization_penalty": float("inf")}, "regularization_penalty is inf"),
    ],
)
def test_settings_that_can_not_be(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        StepSettings(**changed)


def test_a_foreign_state_is_refused_and_changes_nothing() -> None:
    step = TrainStep(small("lstm"), StepSettings(batch_size=8))
    before = step.state()
    other = {name: value + 1 for name, value in before.items()}
    for state, words in (
        (TrainStep(small("moe"), StepSettings()).state(), "is missing|has shape"),
        (
            {k: v for k, v in other.items() if k != "tower/gates/weights/Adam_1"},
            "tower/gates/weights/Adam_1 is missing",
        ),
        ({k: v for k, v in other.items() if k != "global_step"}, "no usable global_step"),
        (other | {"global_step": np.float32(3)}, "no usable global_step"),
        (other | {"beta1_power": np.float32(np.nan)}, "beta1_power .*NaN"),
    ):
        with pytest.raises(ModelError, match=words):
            step.restore(state)
        assert all(np.array_equal(value, before[name]) for name, value in step.state().items())
