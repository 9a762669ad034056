"""Metrics are the starter code's to 1e-9, ties included, and those of one class mean what their names say."""

from __future__ import annotations

import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import metrics
from trainer.metrics import AveragePrecision, Curve, EvaluationMetrics

EXACT = {"rtol": 0, "atol": 1e-9}


def cases(golden: np.lib.npyio.NpzFile) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Predictions and labels of every case, stored or by its recipe."""
    found = {}
    for case in sorted({key.split("/")[0] for key in golden.files if key.endswith("/hit_at_one")}):
        if f"{case}/predictions" in golden.files:
            found[case] = golden[f"{case}/predictions"], golden[f"{case}/labels"]
            continue
        rows, classes, share = golden[f"{case}/recipe_N_V_p"]
        shape = int(rows), int(classes)
        random = np.random.RandomState(int(golden[f"{case}/recipe_seed"]))
        labels = random.random_sample(shape) < share
        predictions = 1 / (1 + np.exp(-(2.5 * labels + random.standard_normal(shape) - 2)))
        np.testing.assert_allclose(
            [predictions.sum(), labels.sum()], [golden[f"{case}/pred_sum"], golden[f"{case}/label_sum"]]
        )
        found[case] = predictions, labels
    return found


# --- golden -------------------------------------------------------------------------------------------------------


@pytest.mark.golden
def test_all_rows_at_once_give_the_starter_codes_metrics(golden_dir: Path) -> None:
    golden = np.load(golden_dir / "yt8m_metrics.npz")
    for case, (predictions, labels) in cases(golden).items():
        found = {
            "hit_at_one": metrics.hit_at_one(predictions, labels),
            "perr": metrics.perr(predictions, labels),
            "gap20": metrics.gap(predictions, labels),
            "gap5": metrics.gap(predictions, labels, 5),
            "gap_all": metrics.gap(predictions, labels, predictions.shape[1]),
        }
        for name, value in found.items():
            np.testing.assert_allclose(value, golden[f"{case}/{name}"], **EXACT, err_msg=f"{case} {name}")


@pytest.mark.golden
def test_batches_give_the_starter_codes_epoch(golden_dir: Path) -> None:
    golden = np.load(golden_dir / "yt8m_metrics.npz")
    for case, (predictions, labels) in cases(golden).items():
        evaluation = EvaluationMetrics(predictions.shape[1], 20)
        size, batches = int(golden[f"{case}/epoch_batch_size"]), []
        for i in range(0, len(predictions), size):
            batches.append(evaluation.add(predictions[i : i + size], labels[i : i + size], float(i + 1)))
        expected = golden[f"{case}/epoch_batches_hit_perr_loss"]
        np.testing.assert_allclose([(b.hit_at_one, b.perr, b.loss) for b in batches], expected, **EXACT, err_msg=case)
        epoch = evaluation.value()
        for name, value in {
            "avg_hit_at_one": epoch.hit_at_one,
            "avg_perr": epoch.perr,
            "avg_loss": epoch.loss,
            "gap": epoch.gap,
            "map": epoch.map,
            "aps": epoch.aps,
            "num_classes": len(epoch.classes),
        }.items():
            np.testing.assert_allclose(value, golden[f"{case}/epoch_{name}"], **EXACT, err_msg=f"{case} {name}")
        assert epoch.examples == len(predictions)
        assert epoch.classes == tuple(np.flatnonzero(labels.any(0)))


@pytest.mark.golden
def test_one_list_gives_the_starter_codes_average_precision(golden_dir: Path) -> None:
    golden = np.load(golden_dir / "yt8m_metrics.npz")
    p, y = golden["ap/predictions"], golden["ap/actuals"]
    half = len(p) // 2
    limited = AveragePrecision(10)
    limited.add(p[:half], y[:half])
    limited.add(p[half:], y[half:])
    found = {
        "ap_all": metrics.average_precision(p, y),
        "ap_at_20": metrics.average_precision(p, y, 20),
        "ap_at_20_total50": metrics.average_precision(p, y, 20, 50),
        "ap_all_total50": metrics.average_precision(p, y, None, 50),
        "calc_top10": limited.value(),
    }
    for name, value in found.items():
        np.testing.assert_allclose(value, golden[f"ap/{name}"], **EXACT, err_msg=name)


# --- against naive definitions ------------------------------------------------------------------------------------

# A coarse grid makes ties, which is where ranking goes wrong.
SCORE = st.integers(0, 12).map(lambda i: i / 12)
COLUMN = st.lists(st.tuples(SCORE, st.booleans()), min_size=1, max_size=40)


def split(column: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([score for score, _ in column]), np.array([positive for _, positive in column])


@st.composite
def tables(draw: st.DrawFn, tied: bool = True) -> tuple[np.ndarray, np.ndarray]:
    rows, classes = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    p = (
        random.integers(0, 5, (rows, classes)) / 4
        if tied
        else random.permutation(rows * classes).reshape(rows, classes) + 1.0
    )
    return p, random.random((rows, classes)) < draw(st.sampled_from([0.0, 0.2, 0.6, 1.0]))


@given(COLUMN)
@settings(deadline=None)
def test_average_precision_and_auc_mean_what_their_names_say(column: list[tuple[float, bool]]) -> None:
    p, y = split(column)
    curve = Curve.of(p, y)
    if not y.any():
        assert np.isnan(curve.average_precision)
        assert np.isnan(curve.auc)
        return
    # Mean over positives of the share of positives among what scores at least as high.
    assert curve.average_precision == pytest.approx(np.mean([y[p >= score].mean() for score in p[y]]), abs=1e-12)
    if y.all():
        assert np.isnan(curve.auc)
        return
    wins = [(a > b) + 0.5 * (a == b) for a in p[y] for b in p[~y]]
    assert curve.auc == pytest.approx(np.mean(wins), abs=1e-12)
    assert metrics.auc_between(p[y], p[~y]) == curve.auc


@given(COLUMN, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_no_order_of_clips_matters_to_a_curve(column: list[tuple[float, bool]], random: Random) -> None:
    shuffled = list(column)
    random.shuffle(shuffled)
    ours, theirs = Curve.of(*split(column)), Curve.of(*split(shuffled))
    for name in ("thresholds", "true_positives", "false_positives"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


@given(COLUMN, st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]))
@settings(deadline=None)
def test_an_operating_point_keeps_its_promise_and_none_hears_more(
    column: list[tuple[float, bool]], rate: float
) -> None:
    p, y = split(column)
    (point,) = metrics.recall_at_false_positive_rates(p, y, [rate])

    def recall(threshold: float) -> float:
        return float((p[y] >= threshold).mean()) if y.any() else float("nan")

    def let_through(threshold: float) -> float:
        return float((p[~y] >= threshold).mean()) if not y.all() else 0.0

    assert let_through(point.threshold) <= rate + 1e-12
    if not y.all():
        assert point.false_positive_rate == pytest.approx(let_through(point.threshold))
    if y.any():
        assert point.recall == pytest.approx(recall(point.threshold))
        best = max([recall(t) for t in p if let_through(t) <= rate + 1e-12], default=0.0)
        assert point.recall == pytest.approx(best)


@given(COLUMN, SCORE)
@settings(deadline=None)
def test_a_threshold_hears_and_lets_through_what_reaches_it(column: list[tuple[float, bool]], threshold: float) -> None:
    p, y = split(column)
    for shift in (0.0, 1e-6, -1e-6, 2.0):
        recall, rate = Curve.of(p, y).at_threshold(threshold + shift)
        if y.any():
            assert recall == pytest.approx((p[y] >= threshold + shift).mean())
        if not y.all():
            assert rate == pytest.approx((p[~y] >= threshold + shift).mean())


@given(COLUMN, st.integers(1, 20))
@settings(deadline=None)
def test_calibration_counts_each_score_once_in_its_bin(column: list[tuple[float, bool]], bins: int) -> None:
    p, y = split(column)
    found = metrics.calibration(p, y, bins)
    assert found.counts.sum() == len(p)
    error = 0.0
    for low, high, count, mean, rate in zip(
        found.edges, found.edges[1:], found.counts, found.mean_scores, found.positive_rates, strict=False
    ):
        inside = (p > low) & (p <= high) | ((p == 0) & (low == 0))
        assert inside.sum() == count
        if count:
            assert (mean, rate) == (pytest.approx(p[inside].mean()), pytest.approx(y[inside].mean()))
            error += abs(p[inside].mean() - y[inside].mean()) * count / len(p)
    assert found.expected_error == pytest.approx(error)
    assert found.brier == pytest.approx(np.mean((p - y) ** 2))


@given(tables(tied=False), st.integers(1, 10))
@settings(deadline=None)
def test_the_starter_codes_metrics_are_their_definitions(table: tuple[np.ndarray, np.ndarray], top_k: int) -> None:
    p, y = table
    assert metrics.hit_at_one(p, y) == pytest.approx(np.mean([t[np.argmax(s)] for s, t in zip(p, y, strict=True)]))
    precisions = []
    for scores, truth in zip(p, y, strict=True):
        top = np.argsort(scores)[::-1][: truth.sum()]
        precisions.append(truth[top].mean() if truth.any() else 0.0)
    assert metrics.perr(p, y) == pytest.approx(np.mean(precisions), abs=1e-12)
    ranked = sorted(
        (pair for s, t in zip(p, y, strict=True) for pair in sorted(zip(s, t, strict=True), reverse=True)[:top_k]),
        reverse=True,
    )
    hits, total = 0, 0.0
    for i, (_, positive) in enumerate(ranked):
        hits += positive
        total += positive * hits / (i + 1)
    assert metrics.gap(p, y, top_k) == pytest.approx(total / y.sum() if y.any() else 0.0, abs=1e-12)


@given(tables(), st.integers(1, 5))
@settings(deadline=None)
def test_zeros_and_ties_leave_every_metric_in_its_range(table: tuple[np.ndarray, np.ndarray], size: int) -> None:
    p, y = table
    evaluation = EvaluationMetrics(p.shape[1])
    for i in range(0, len(p), size):
        evaluation.add(p[i : i + size], y[i : i + size], np.ones(len(p[i : i + size])))
    epoch = evaluation.value()
    assert all(0 <= value <= 1 + 1e-12 for value in (epoch.hit_at_one, epoch.perr, epoch.gap, epoch.map, *epoch.aps))
    assert epoch.loss == pytest.approx(1.0)
    assert epoch.hit_at_one == pytest.approx(metrics.hit_at_one(p, y))
    evaluation.clear()
    with pytest.raises(ValueError, match="no examples"):
        evaluation.value()


@given(tables())
@settings(deadline=None)
def test_per_class_is_each_class_alone(table: tuple[np.ndarray, np.ndarray]) -> None:
    p, y = table
    found = metrics.per_class(p, y)
    curves = [Curve.of(p[:, i], y[:, i]) for i in range(p.shape[1])]
    np.testing.assert_array_equal(found.average_precision, [curve.average_precision for curve in curves])
    np.testing.assert_array_equal(found.auc, [curve.auc for curve in curves])
    np.testing.assert_array_equal(found.positives, y.sum(0))
    assert np.isnan(found.average_precision).tolist() == (~y.any(0)).tolist()
    if y.any():
        assert found.mean_average_precision == pytest.approx(np.nanmean(found.average_precision))


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60), st.integers(1, 20))
@settings(deadline=None)
def test_a_limited_list_ranks_as_the_whole_one(column: list[tuple[float, bool]], top_n: int) -> None:
    p, y = split(column)
    p = np.argsort(np.argsort(p, kind="stable")) / len(p)  # no ties
    limited = AveragePrecision(top_n)
    for i in range(0, len(p), 7):
        limited.add(p[i : i + 7], y[i : i + 7])
    assert limited.value() == pytest.approx(metrics.average_precision(p, y, top_n), abs=1e-12)


# --- single promises ----------------------------------------------------------------------------------------------


def test_d_prime_is_the_distance_of_two_normal_distributions() -> None:
    assert metrics.d_prime(0.5) == 0.0
    assert metrics.d_prime(0.9) == pytest.approx(1.8123876048736)
    assert metrics.d_prime(0.1) == -metrics.d_prime(0.9)
    assert metrics.d_prime(1.0) == float("inf")
    assert metrics.d_prime(0.0) == float("-inf")
    assert np.isnan(metrics.d_prime(float("nan")))
    random = np.random.default_rng(1)
    auc = metrics.auc_between(random.standard_normal(40_000) + 1.5, random.standard_normal(40_000))
    assert metrics.d_prime(auc) == pytest.approx(1.5, abs=0.02)


def test_a_prediction_of_zero_is_no_prediction_to_perr() -> None:
    assert metrics.perr([[0.9, 0.0]], [[True, True]]) == 0.5
    assert metrics.perr([[0.9, 0.1], [0.5, 0.4]], [[True, True], [False, False]]) == 0.5


def test_a_family_scores_as_its_highest_member() -> None:
    p = np.array([[0.1, 0.9, 0.3], [0.5, 0.2, 0.4]], np.float32)
    y = np.array([[True, False, False], [False, True, False]])
    np.testing.assert_array_equal(metrics.family_scores(p, (0, 2)), p[[0, 1], [2, 0]])
    np.testing.assert_array_equal(metrics.family_labels(y, (0, 2)), [True, False])
    with pytest.raises(ValueError, match="no member"):
        metrics.family_scores(p, ())


def test_a_class_that_never_occurs_is_no_number_and_no_part_of_a_mean() -> None:
    p, y = np.array([[0.1, 0.9], [0.8, 0.2]]), np.array([[False, False], [True, False]])
    found = metrics.per_class(p, y)
    assert found.mean_average_precision == 1.0
    assert np.isnan(found.auc[1])
    assert np.isnan(metrics.per_class(p, np.zeros((2, 2), bool)).mean_auc)
    assert np.isnan(metrics.auc_between([], [0.5]))


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([[0.5, float("nan")]], [[True, False]], "NaN"),
        ([[0.5, 0.1]], [[True]], "one shape"),
        ([0.5], [True], "2 dimensions"),
        (np.zeros((0, 3)), np.zeros((0, 3)), "nothing to measure"),
    ],
)
def test_what_can_not_be_measured_is_refused(predictions: object, labels: object, message: str) -> None:
    for metric in (metrics.hit_at_one, metrics.perr, metrics.gap, metrics.per_class):
        with pytest.raises(ValueError, match=message):
            metric(predictions, labels)  # type: ignore[arg-type]


def test_other_sizes_and_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match="2 classes; 3 were promised"):
        EvaluationMetrics(3).add([[0.5, 0.1]], [[True, False]], 0.0)
    with pytest.raises(ValueError, match="probabilities"):
        metrics.calibration([1.5], [True])
    with pytest.raises(ValueError, match="top_k is 0"):
        metrics.gap([[0.5]], [[True]], 0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        metrics.recall_at_false_positive_rates([0.5], [True], [2.0])


def test_audiosets_evaluation_is_measured_in_seconds() -> None:
    random = np.random.default_rng(0)
    labels = random.random((10_000, 527)) < 0.005
    predictions = (0.3 * labels + random.random(labels.shape)).astype(np.float32)
    started = time.process_time()
    metrics.per_class(predictions, labels)
    assert time.process_time() - started < 5
