"""False alerts a day set the threshold: what was counted is given back, what was not is extrapolated and said."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from detector.config import ConfigError, load_settings
from detector.model import FalseAlertsSection
from detector.operating_point import choose_threshold, expected_per_day, threshold_for


def _counted(peaks, hours: float = 2.0, hop: float = 0.96) -> FalseAlertsSection:
    return FalseAlertsSection(audio_hours=hours, hop_seconds=hop, peaks=tuple(sorted(peaks, reverse=True)))


def _exponential(seed: int) -> FalseAlertsSection:
    return _counted(1 / (1 + np.exp(-np.random.default_rng(seed).exponential(0.8, 400))))


EXPONENTIAL = _exponential(5)


class _Manifest:
    name = "counted"
    false_alerts = (EXPONENTIAL, _counted([0.9] * 20, hours=1.0, hop=0.48))

    class decision:
        open_threshold = 0.8
        close_threshold = 0.4


def _chosen(hop: float = 0.96, manifest=_Manifest, **environ):
    settings = load_settings(None, {f"DETECTOR__DECISION__{k}": v for k, v in environ.items()})
    return choose_threshold(manifest, settings.decision, hop)


@given(st.floats(0.01, 4000), st.integers(0, 30))
@example(8.0, 5)  # between the loudest, reached once, and where the tail alone would have that
def test_a_rate_gives_a_threshold_that_gives_the_rate_back(per_day, seed):
    counted = _exponential(seed)
    rate = expected_per_day(threshold_for(per_day, counted), counted)
    assert rate.per_day == pytest.approx(per_day, rel=1e-6)
    assert rate.bound == "about"


@given(st.floats(0.01, 4000), st.floats(1.001, 10))
def test_fewer_false_alerts_need_a_higher_threshold(per_day, factor):
    assert threshold_for(per_day / factor, EXPONENTIAL) >= threshold_for(per_day, EXPONENTIAL)


def test_within_the_audio_the_count_itself_is_the_answer():
    peaks = EXPONENTIAL.peaks
    for k in (1, 2, 17, 100):
        assert threshold_for(k * 24 / EXPONENTIAL.audio_hours, EXPONENTIAL) == pytest.approx(peaks[k - 1])


def test_the_tail_of_an_exponential_is_continued_as_it_is():
    # 400 peaks of scale 0.8 in 2 h: one in 2,000 h lies where 400,000 draws end
    expected = 0.8 * math.log(400 * 1000)
    threshold = threshold_for(24 / 2000, EXPONENTIAL)
    assert math.log(threshold / (1 - threshold)) == pytest.approx(expected, rel=0.25)


def test_the_choice_says_how_far_it_is_extrapolated():
    chosen = _chosen(FALSE_ALERTS_PER_DAY="0.5")
    assert chosen.rate.extrapolation == pytest.approx(24.0)
    assert "extrapolated by a factor of 24" in str(chosen)
    assert "2 h of audio" in str(chosen)
    assert chosen.close_threshold == pytest.approx(chosen.open_threshold / 2)
    loose = _chosen(FALSE_ALERTS_PER_DAY="120")
    assert loose.rate.extrapolation == 1.0
    assert "extrapolated" not in str(loose)
    assert "about 120 false alerts" in str(loose)


def test_a_raw_threshold_and_the_models_own_say_what_they_mean_too():
    raw = _chosen(OPEN_THRESHOLD="0.7")
    assert raw.open_threshold == 0.7
    assert raw.origin == "decision.open_threshold"
    assert raw.rate == expected_per_day(0.7, EXPONENTIAL)
    assert _chosen().open_threshold == 0.8
    assert _chosen().origin == "model"


def _says(counted, threshold: str) -> str:
    class Manifest(_Manifest):
        false_alerts = (counted,)

    return str(_chosen(manifest=Manifest, OPEN_THRESHOLD=threshold))


def test_one_is_singular_and_numbers_are_plain():
    assert "about 1 false alert a day and stream, extrapolated by a factor of 12:" in str(
        _chosen(FALSE_ALERTS_PER_DAY="1")
    )
    hundred = _says(_counted([0.1 + 0.001 * i for i in range(100)], hours=0.24), "0.99")
    assert "show no rate under 100 a day" in hundred
    assert "e+" not in hundred


def test_where_nothing_was_counted_nothing_is_said():
    assert expected_per_day(0.5, _counted([])) is None
    assert "does not say" in _says(_counted([]), "0.5")


def test_below_the_lowest_peak_kept_the_rate_is_a_lower_bound():
    peaks = [0.5 + 0.01 * i for i in range(20)]
    assert "at least 240 false alerts a day" in _says(_counted(peaks), "0.3")
    assert "about 240 false alerts a day" in _says(_counted(peaks), "0.5")


def test_few_peaks_are_not_continued():
    for peaks in ([0.5], [0.5 + 0.01 * i for i in range(9)]):
        said = _says(_counted(peaks), "0.9")
        assert "under 12 false alerts a day and stream (what the audio could show): 2 h of audio" in said
        assert "extrapolated" not in said
    assert "about 24 false alerts a day" in _says(_counted([0.5, 0.7]), "0.5")


def test_a_tail_that_ends_at_once_is_a_bound_and_not_zero():
    said = _says(_counted([0.5] * 20), "0.9")
    assert "under 0.000012 false alerts a day and stream, extrapolated by a factor of 1000000:" in said


def test_the_count_at_the_served_hop_is_the_one_that_counts():
    assert _chosen(hop=0.48).audio_hours == 1.0
    assert _chosen(hop=0.96).audio_hours == 2.0


def test_a_model_without_counts_is_refused_with_what_to_do():
    class Silent(_Manifest):
        false_alerts = ()

    with pytest.raises(ConfigError, match=r"decision\.false_alerts_per_day: model counted.*open_threshold instead"):
        _chosen(manifest=Silent, FALSE_ALERTS_PER_DAY="1")
    assert "does not say" in str(_chosen(manifest=Silent))


def test_rates_out_of_reach_are_refused():
    with pytest.raises(ConfigError, match=r"over the 4800 a day"):
        _chosen(FALSE_ALERTS_PER_DAY="5000")
    with pytest.raises(ConfigError, match=r"rarer than any score") as refused:
        _chosen(FALSE_ALERTS_PER_DAY="1e-9")
    # What is asked for instead is never what would be refused again.
    _chosen(FALSE_ALERTS_PER_DAY=str(refused.value).split("ask for ")[1].split(" or more")[0])


def test_both_ways_at_once_are_refused():
    with pytest.raises(ConfigError, match=r"one of them must be null"):
        _chosen(FALSE_ALERTS_PER_DAY="1", OPEN_THRESHOLD="0.5")


def test_a_close_threshold_over_the_chosen_one_is_refused():
    with pytest.raises(ConfigError, match=r"decision\.close_threshold: 0\.99 is over the open threshold"):
        _chosen(FALSE_ALERTS_PER_DAY="100", CLOSE_THRESHOLD="0.99")
