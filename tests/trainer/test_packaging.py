"""What a package of the recipe says about itself."""

from __future__ import annotations

import numpy as np

from trainer.compact.evaluation import Recording, Scored, poisson_interval
from trainer.compact.packaging import data_names, operating_curve
from trainer.compact.pools import Clip


def _scored(name: str, label: str, *scores: float) -> Scored:
    pcm = np.zeros(3600 * 16, np.int16)  # a thousandth of an hour
    return Scored(Recording(name, name, label, label == "gunshot", pcm), np.array(scores, np.float32), 15360)


def test_each_threshold_of_the_curve_comes_once() -> None:
    scored = [_scored("ambient", "rain", 0.2), _scored("a", "gunshot", 0.9)]
    scored += [_scored("a", "door", score) for score in (0.5, 0.5, 0.5000001, 0.3, 0.8) * 6]
    curve = operating_curve(scored)
    thresholds = [point["threshold"] for point in curve]
    assert len(thresholds) == len(set(thresholds)) < 15
    assert thresholds == sorted(thresholds)


def test_false_alarms_of_the_curve_are_the_upper_end_of_their_interval() -> None:
    point = operating_curve([_scored("ambient", "rain", 0.2), _scored("a", "gunshot", 0.9)])[-1]
    assert point["false_alarms_per_hour"] == round(poisson_interval(0)[1] / 0.001, 3)


def test_a_package_names_the_sources_that_were_learnt_from() -> None:
    def clip(path: str) -> Clip:
        return Clip(path, "event", 0, 0, 1)

    mine = data_names([clip("mine/a.wav"), clip("esc50/a.ogg"), clip("esc10/b.ogg"), clip("ffsl/c.flac")])
    assert mine[:3] == [
        "Free Firearm Sound Library (CC0)",
        "ESC-10 and ESC-50 clips under CC0 or CC BY: split train",
        "mine",
    ]
    assert len(mine) == 5
    assert mine[3].startswith("sounds synthesised")
    assert "YAMNet" in mine[4]
