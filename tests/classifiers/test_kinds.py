"""What every kind promises the pipeline and the trainer, whatever the starter code did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from detector.classifiers import KINDS, assign, build_classifier, regularisation_loss, weights
from detector.classifiers.dbof import DbofConfig, DbofModel
from detector.classifiers.lstm import LstmConfig, LstmModel
from detector.embedders.compact import CompactNetwork
from detector.errors import ModelError
from detector.model import load_model, save_package

SMALL: dict[str, dict[str, Any]] = {
    "lstm": {"cells": 12, "layers": 2},
    "attention_lstm": {"dense": 24, "cells": 12},
    "logistic": {},
    "moe": {"mixtures": 3},
    "frame_logistic": {},
    "dbof": {"clusters": 24, "hidden": 12, "iterations": 20},
}


def windows(count: int, rows: int = 10, size: int = 128, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, rows, size)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_of_each_kind_loads_tests_itself_and_classifies(kind: str, tmp_path: Path) -> None:
    labels = ["Gunshot, gunfire", "Fireworks", "Other"]
    params = {**SMALL[kind], "classes": 3, "input_size": 128}
    classifier = build_classifier(kind, params, seed=5)
    draft = {
        "format_version": 1,
        "name": f"trial-{kind}".replace("_", "-"),
        "version": "0.1",
        "license": "Apache-2.0",
        "labels": labels,
        "family": labels[:1],
        "embedder": {"kind": "compact"},
        "classifier": {"kind": kind, "params": SMALL[kind]},
        "decision": {"open_threshold": 0.5, "close_threshold": 0.3},
        "training": {"command": "none", "data": ["none"], "date": "2026-01-31"},
    }
    save_package(
        tmp_path,
        draft,
        classifier_weights=weights(classifier),
        embedder_weights=CompactNetwork(folded=True, seed=5).weights(),
    )
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert any(0.0 < score < 1.0 for score in manifest["self_test"]["expected_scores"])
    model = load_model(tmp_path)
    model.self_test()
    model.warm_up(4)
    x, num_frames = windows(7), np.array([1, 2, 3, 5, 8, 9, 10], np.int32)
    x[np.arange(10)[None, :] >= num_frames[:, None]] = 0.0
    scores = model.classify(x, num_frames)
    assert scores.shape == (7, 3)
    np.testing.assert_allclose(scores, classifier(x, num_frames).numpy(), rtol=0, atol=1e-6)
    short = model.classify(x[:2, :2], num_frames[:2])
    np.testing.assert_allclose(short, scores[:2], rtol=0, atol=1e-6)
    x[np.arange(10)[None, :] >= num_frames[:, None]] = np.nan
    np.testing.assert_array_equal(model.classify(x, num_frames), scores)


@pytest.mark.parametrize("kind", ["lstm", "attention_lstm", "logistic", "moe", "dbof"])
def test_padding_has_no_effect_not_even_nan(kind: str) -> None:
    classifier = build_classifier(kind, {**SMALL[kind], "classes": 4}, seed=3)
    x, num_frames = windows(5), np.array([1, 2, 4, 7, 10], np.int32)
    expected = classifier(x, num_frames).numpy()
    for filler in (0.0, 1e30, np.nan):
        other = x.copy()
        other[np.arange(10)[None, :] >= num_frames[:, None]] = filler
        np.testing.assert_array_equal(classifier(other, num_frames).numpy(), expected)


@pytest.mark.parametrize("kind", ["logistic", "moe"])
def test_video_level_kinds_take_a_window_as_its_mean(kind: str) -> None:
    classifier = build_classifier(kind, {**SMALL[kind], "classes": 4}, seed=3)
    x, num_frames = windows(3), np.array([10, 4, 0], np.int32)
    means = np.stack([x[0].mean(axis=0), x[1, :4].mean(axis=0), np.zeros(128)]).astype(np.float32)
    of_means = classifier(means, np.ones(3, np.int32)).numpy()
    np.testing.assert_allclose(classifier(x, num_frames), of_means, rtol=0, atol=1e-6)
    np.testing.assert_allclose(classifier(7.5 * means, np.ones(3, np.int32)), of_means, rtol=0, atol=1e-6)


def test_served_dbof_weighs_every_row_and_scores_a_window_the_same_twice() -> None:
    config = {"clusters": 24, "hidden": 12, "iterations": 30, "pooling": "average", "classes": 4}
    model = build_classifier("dbof", config, seed=3)
    x, num_frames = windows(4), np.array([10, 5, 3, 1], np.int32)
    served = model(x, num_frames).numpy()
    np.testing.assert_array_equal(model(x, num_frames).numpy(), served)
    shuffled = x[:, ::-1].copy()
    for row, n in enumerate(num_frames):
        shuffled[row, :n] = x[row, :n][::-1]
    np.testing.assert_allclose(model(shuffled, num_frames), served, rtol=0, atol=1e-6)
    for row, n in enumerate(num_frames):
        for t in range(n):
            other = x.copy()
            other[row, t] = -other[row, t]
            assert np.abs(model(other, num_frames).numpy()[row] - served[row]).max() > 1e-6, f"row {t} of {n} unseen"


def test_dbof_never_samples_outside_a_clip_nor_fails_on_an_empty_one() -> None:
    for random_frames in (True, False):
        model = DbofModel(
            DbofConfig(classes=4, input_size=8, clusters=6, hidden=5, iterations=7, random_frames=random_frames)
        )
        x, num_frames = windows(5, rows=9, size=8), np.array([0, 1, 4, 8, 9], np.int32)
        x[np.arange(9)[None, :] >= np.maximum(num_frames, 1)[:, None]] = np.nan
        almost_one = np.full((5, model.uniforms_per_clip), np.nextafter(np.float32(1), np.float32(0)))
        for uniforms in (np.zeros_like(almost_one), almost_one):
            pooled = model.pooled(x, num_frames, uniforms=uniforms)
            assert np.isfinite(pooled.numpy()).all()


def test_a_sequence_of_frames_is_in_sequence() -> None:
    model = DbofModel(DbofConfig(classes=2, input_size=4, clusters=3, hidden=2, iterations=3, random_frames=False))
    rows = model._sampled_rows(np.array([5, 5, 2], np.int32), np.array([[0.0], [0.99], [0.5]], np.float32))
    np.testing.assert_array_equal(rows, [[0, 1, 2], [2, 3, 4], [0, 1, 1]])


@pytest.mark.parametrize("mixed_precision", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 10])
def test_training_finds_the_same_values_and_gradients_on_the_faster_way(rows: int, mixed_precision: bool) -> None:
    model = LstmModel(LstmConfig(classes=3, input_size=20, cells=64, layers=2), seed=3)
    x = windows(6, rows=rows, size=20)
    num_frames = np.minimum(np.array([0, 1, 2, 4, 9, 10], np.int32), rows)
    variables = list(model.named_variables().values())
    found = []
    for training in (False, True):
        with tf.GradientTape() as tape:
            pooled = model.pooled(x, num_frames, training=training, mixed_precision=mixed_precision)
            loss = tf.reduce_sum(model.final(pooled) * np.arange(1.0, 4.0, dtype=np.float32))
        found.append([pooled, *tape.gradient(loss, variables)])
    for exact, fast in zip(*found, strict=True):
        scale = float(tf.reduce_max(tf.abs(exact)))
        np.testing.assert_allclose(fast, exact, rtol=0, atol=scale * (3e-2 if mixed_precision else 3e-6))
    assert mixed_precision == any(np.abs(f - e).max() > 1e-5 for e, f in zip(*found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_weights_and_they_round_trip(kind: str) -> None:
    params = {**SMALL[kind], "classes": 4}
    one, two, other = (build_classifier(kind, params, seed=s) for s in (7, 7, 8))
    assert all(np.array_equal(value, weights(two)[name]) for name, value in weights(one).items())
    assert not all(np.array_equal(value, weights(other)[name]) for name, value in weights(one).items())
    assign(other, weights(one))
    assert all(np.array_equal(value, weights(other)[name]) for name, value in weights(one).items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_counts_weights_of_the_final_layer_only(kind: str) -> None:
    classifier = build_classifier(kind, {**SMALL[kind], "classes": 4}, seed=7)
    counted = [
        value
        for name, value in weights(classifier).items()
        if name.endswith("/weights") and name.split("/")[1] in ("fully_connected", "gates", "experts")
    ]
    expected = 0.5e-8 * sum(np.sum(value.astype(np.float64) ** 2) for value in counted)
    np.testing.assert_allclose(regularisation_loss(classifier), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "params", "words"),
    [
        ("logistic", {"cells": 3}, "Logistic parameters .'cells'.* unknown"),
        ("moe", {"mixtures": 0}, "MoE parameter mixtures is 0"),
        ("frame_logistic", {"classes": "527"}, "classes is '527'"),
        ("dbof", {"pooling": "attention"}, "pooling is 'attention'; allowed: max, average"),
        ("dbof", {"activation": "gelu"}, "allowed: sigmoid, relu6, relu, tanh"),
        ("dbof", {"batch_norm": 1}, "batch_norm is 1; true or false"),
        ("dbof", {"final": "lstm"}, "final is 'lstm'"),
        ("dbof", {"pooling": ["max"]}, "pooling is"),
    ],
)
def test_unfit_parameters(kind: str, params: dict[str, object], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        build_classifier(kind, params)
