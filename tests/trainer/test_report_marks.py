"""Marks of a plot never overprint each other."""

from __future__ import annotations

from trainer.evaluate import Point
from trainer.report_plots import _together


def test_thresholds_that_coincide_share_one_mark() -> None:
    points = [Point("", rate, 0.5, recall, rate, 0.9) for rate, recall in ((0.001, 0.2), (0.01, 0.6), (0.05, 0.61))]
    own = Point("", float("nan"), 0.5, 0.6, 0.01, 0.9)
    assert [rules for _, rules in _together([*points, own])][-1].endswith("package")
    recalls = [point.recall for point, _ in _together([*points, own])]
    assert len(set(recalls)) == len(recalls)
    assert all(abs(a - b) > 0.03 for i, a in enumerate(recalls) for b in recalls[:i])
