"""The lifecycle of alerts: opened, updated, closed, by stream time alone, and rebuilt exactly by a replay."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.decision import (
    MAX_ONSETS,
    MAX_TIMELINE,
    SAME_ONSET_SAMPLES,
    Decision,
    DecisionSettings,
    InterruptReason,
    ScoredExample,
    Transition,
)
from detector.errors import ConfigError, ModelError
from detector.onset import Onset

HOP = 15_360


def _settings(**changes: Any) -> DecisionSettings:
    return DecisionSettings(**{"open_threshold": 0.5, "close_threshold": 0.3, "family": (0,), **changes})


def _example(k: float, score: float, hop: int = HOP) -> ScoredExample:
    start = round(k * hop) - 240
    return ScoredExample(start, start + 15_600, (score, 0.05))


def _onset(sample: int, *, certain: bool = True) -> Onset:
    return Onset(sample, -12.0, 15.0, certain)


def _feed(
    decision: Decision, scores: list[float], *, hop: int = HOP, first: int = 0, at: int = 5_000
) -> list[list[Transition]]:
    """Feed examples; each that is asked has one certain onset ``at`` samples after its start."""
    steps = []
    for k, score in enumerate(scores, first):
        example = _example(k, score, hop)
        steps.append(decision.step(example, lambda example=example: [_onset(example.start_sample + at)]))
    return steps


def _states(steps: list[list[Transition]]) -> list[str]:
    return [" ".join(t.state for t in step) for step in steps]


def test_an_alert_opens_stays_through_the_hold_and_closes_by_stream_time() -> None:
    steps = _feed(Decision(_settings(hold_seconds=1.92)), [0.1, 0.9, 0.1, 0.1, 0.1])
    assert _states(steps) == ["", "opened", "", "closed", ""]
    opened, closed = steps[1][0], steps[3][0]
    assert opened.onset_sample == closed.onset_sample == HOP - 240 + 5_000
    assert (opened.revision, closed.revision) == (0, 1)
    assert (closed.close_reason, closed.ended_sample) == ("quiet", 2 * HOP)
    assert [p.score for p in closed.timeline] == [0.9, 0.1, 0.1]
    assert opened.ended_sample is None


def test_nothing_below_the_open_threshold_opens_and_no_onset_is_searched() -> None:
    def never() -> list[Onset]:
        raise AssertionError("searched without support")

    decision = Decision(_settings())
    for k in range(20):
        assert decision.step(_example(k, 0.499), never) == []
    assert decision.quiescent


def test_scores_between_the_thresholds_keep_an_alert_open() -> None:
    steps = _feed(Decision(_settings(hold_seconds=0)), [0.9, 0.31, 0.31, 0.29, 0.31])
    assert _states(steps) == ["opened", "updated", "updated", "closed", ""]
    assert steps[3][0].support == 1
    assert steps[3][0].ended_sample == 3 * HOP


def test_an_update_is_told_only_for_a_new_onset_or_a_clearly_higher_peak() -> None:
    decision = Decision(_settings(update_score_step=0.2))
    told = [decision.step(_example(k, s), lambda: [_onset(700)]) for k, s in enumerate([0.5, 0.6, 0.69, 0.7, 0.8])]
    assert _states(told) == ["opened", "", "", "updated", ""]
    assert decision.step(_example(5, 0.6), lambda: [_onset(5 * HOP)])[0].onset_count == 2


def test_peak_scores_are_those_of_the_highest_example() -> None:
    decision = Decision(_settings(family=(0,)))
    decision.step(ScoredExample(-240, HOP, (0.6, 0.4)), list)
    (updated,) = decision.step(ScoredExample(HOP - 240, 2 * HOP, (0.8, 0.1)), list)
    assert (updated.peak_score, updated.peak_scores, updated.support) == (0.8, (0.8, 0.1), 2)


def test_minimum_support_counts_examples_of_the_window() -> None:
    assert (
        _states(_feed(Decision(_settings(min_support=2, support_window_examples=3)), [0.9, 0.1, 0.1, 0.9])) == [""] * 4
    )
    steps = _feed(Decision(_settings(min_support=2, support_window_examples=3)), [0.9, 0.1, 0.9])
    assert _states(steps) == ["", "", "opened"]
    assert steps[2][0].onset_sample == -240 + 5_000  # of the first that supports it
    assert steps[2][0].onset_count == 2


def test_overlapping_examples_count_as_one_support_and_one_onset() -> None:
    decision = Decision(_settings(min_support=2, support_window_examples=2))
    shot = [_onset(9_000)]
    assert decision.step(_example(0, 0.9, 7_680), lambda: shot) == []
    assert decision.step(_example(1, 0.9, 7_680), lambda: [_onset(9_000 + SAME_ONSET_SAMPLES)]) == []
    (opened,) = decision.step(_example(2, 0.9, 7_680), lambda: [])
    assert (opened.support, opened.onset_count, opened.onset_sample) == (2, 1, 9_000)


@pytest.mark.parametrize("hop", [HOP, HOP // 2])
def test_hold_and_end_do_not_depend_on_the_hop(hop: int) -> None:
    decision, told = Decision(_settings(hold_seconds=2.88)), []
    for k in range(12 * HOP // hop):
        start = k * hop - 240
        fires = start <= 2 * HOP + 1_000 < start + 15_600
        told += decision.step(
            ScoredExample(start, start + 15_600, (0.9 if fires else 0.0, 0.0)), lambda: [_onset(2 * HOP + 1_000)]
        )
    assert [t.state for t in told] == ["opened", "closed"]
    assert told[1].onset_sample == 2 * HOP + 1_000
    assert 0 <= told[1].at_sample - told[1].last_sample - 3 * HOP < hop


def test_fire_that_goes_on_opens_the_next_alert_without_a_hole() -> None:
    steps = _feed(Decision(_settings(max_alert_seconds=2.88, cooldown_seconds=60)), [0.9] * 7)
    assert _states(steps) == [
        "opened", "updated", "updated closed", "opened", "updated", "updated closed", "opened",
    ]  # fmt: skip
    assert steps[2][1].close_reason == "max_duration"
    told = [t for step in steps for t in step if t.state == "opened"]
    assert len({t.onset_sample for t in told}) == 3


def test_what_is_heard_in_the_cooldown_is_told_late_not_lost() -> None:
    steps = _feed(Decision(_settings(hold_seconds=0, cooldown_seconds=3.84)), [0.9, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1])
    assert _states(steps) == ["opened", "closed", "", "", "", "opened closed", ""]
    assert steps[5][0].onset_sample == 3 * HOP - 240 + 5_000


def test_an_interruption_tells_what_waited_for_the_cooldown() -> None:
    decision = Decision(_settings(hold_seconds=0, cooldown_seconds=30))
    _feed(decision, [0.9, 0.1, 0.9])
    told = decision.interrupt("gap")
    assert [(t.state, t.close_reason) for t in told] == [("opened", None), ("closed", "gap")]
    assert decision.quiescent


@pytest.mark.parametrize("reason", ["gap", "new_session", "stream_lost"])
def test_an_interruption_closes_and_forgets(reason: InterruptReason) -> None:
    decision = Decision(_settings())
    _feed(decision, [0.9, 0.1])
    (closed,) = decision.interrupt(reason)
    assert (closed.close_reason, closed.ended_sample, closed.revision) == (reason, HOP, 1)
    assert decision.quiescent
    assert decision.interrupt(reason) == []
    assert _states(_feed(decision, [0.9])) == ["opened"]  # sample counts may start again


def test_reset_tells_nothing_and_forgets() -> None:
    decision = Decision(_settings())
    _feed(decision, [0.9])
    decision.reset()
    assert decision.quiescent
    assert decision.interrupt("gap") == []


def test_an_alert_without_a_found_onset_begins_with_its_example() -> None:
    (opened,) = Decision(_settings()).step(_example(3, 0.9), list)
    assert opened.onsets == (Onset(3 * HOP - 240, None, 0.0, False),)
    (opened,) = Decision(_settings()).step(_example(0, 0.9), lambda: [_onset(-100), _onset(HOP)])
    assert opened.onset_sample == 0  # those outside the session or the example are ignored


def test_a_certain_onset_is_preferred_and_uncertain_ones_are_not_added() -> None:
    decision = Decision(_settings())
    (opened,) = decision.step(_example(0, 0.9), lambda: [_onset(100, certain=False), _onset(9_000)])
    assert opened.onsets == (_onset(9_000),)
    assert decision.step(_example(1, 0.9), lambda: [_onset(HOP + 5_000, certain=False)]) == []


def test_memory_is_bounded_in_an_hour_of_fire() -> None:
    decision = Decision(_settings(max_alert_seconds=3600))
    told: list[Transition] = []
    for k in range(3_000):
        example = _example(k, 0.9)
        onsets = [_onset(max(0, example.start_sample + i * 1_600)) for i in range(9)]
        told += decision.step(example, lambda onsets=onsets: onsets)
    assert len(told[-1].onsets) == MAX_ONSETS
    assert told[-1].onset_count > 25_000
    assert len(told[-1].timeline) == MAX_TIMELINE
    assert {t.onset_sample for t in told} == {0}


def test_noisy_or_and_max() -> None:
    assert _settings(family=(0, 1)).family_score((0.5, 0.4)) == 0.5
    assert _settings(family=(0, 1), combine="noisy_or").family_score((0.5, 0.4)) == pytest.approx(0.7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.01, 1.01])
def test_scores_that_are_no_probability_are_refused_and_change_nothing(bad: float) -> None:
    decision = Decision(_settings())
    with pytest.raises(ModelError, match="label index 0"):
        decision.step(_example(0, bad), list)
    with pytest.raises(ModelError, match="label index 0"):
        decision.step(ScoredExample(-240, HOP, ()), list)
    assert decision.quiescent
    assert _states(_feed(decision, [0.9])) == ["opened"]


def test_examples_out_of_order_are_refused() -> None:
    decision = Decision(_settings())
    _feed(decision, [0.1, 0.1])
    with pytest.raises(ValueError, match="does not come after"):
        _feed(decision, [0.1])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"open_threshold": 0.0}, "open_threshold"),
        ({"open_threshold": math.nan}, "open_threshold"),
        ({"close_threshold": 0.6}, "close_threshold"),
        ({"family": ()}, "family"),
        ({"family": (0, 0)}, "family"),
        ({"family": (-1,)}, "family"),
        ({"look_alikes": (0,)}, "look_alikes"),
        ({"min_support": 2}, "min_support"),
        ({"min_support": 0}, "min_support"),
        ({"hold_seconds": -1.0}, "hold_seconds"),
        ({"cooldown_seconds": math.nan}, "cooldown_seconds"),
        ({"max_alert_seconds": 0.5}, "max_alert_seconds"),
        ({"update_score_step": 0.0}, "update_score_step"),
        ({"combine": "mean"}, "combine"),
    ],
)
def test_settings_that_contradict_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        _settings(**changes)


any_settings = st.builds(
    lambda open_, close, need, window, hold, cooldown, longest: DecisionSettings(
        open_threshold=open_,
        close_threshold=open_ * close,
        family=(0,),
        min_support=min(need, window),
        support_window_examples=window,
        hold_seconds=hold,
        cooldown_seconds=cooldown,
        max_alert_seconds=longest,
    ),
    st.sampled_from([0.5, 0.9]),
    st.sampled_from([0.5, 1.0]),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.5, 1.92, 3.0]),
    st.sampled_from([0.0, 1.0, 4.0]),
    st.sampled_from([1.0, 3.0, 8.0]),
)
any_run = st.lists(
    st.tuples(st.sampled_from([0.0, 0.0, 0.0, 0.3, 0.6, 0.95]), st.lists(st.integers(-9_000, 16_000), max_size=3)),
    max_size=50,
)


def _play(decision: Decision, run: list[tuple[float, list[int]]], hop: int, indices: range) -> list[list[Transition]]:
    told = []
    for k in indices:
        score, offsets = run[k]
        start = k * hop - 240
        onsets = [_onset(start + o, certain=o % 5 > 0) for o in sorted(offsets)]
        told.append(decision.step(ScoredExample(start, start + 15_600, (score,)), lambda onsets=onsets: onsets))
    return told


@settings(max_examples=400, deadline=None)
@given(chosen=any_settings, run=any_run, hop=st.sampled_from([HOP, HOP // 2]), data=st.data())
def test_a_replay_from_the_oldest_sample_needed_gives_identical_transitions(
    chosen: DecisionSettings, run: list[tuple[float, list[int]]], hop: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(run)))
    original = Decision(chosen)
    _play(original, run, hop, range(cut))
    needed = original.oldest_sample_needed
    assert original.quiescent == (needed is None)
    rebuilt = Decision(chosen)
    _play(rebuilt, run, hop, range(cut if needed is None else (needed + 240) // hop, cut))
    rest = range(cut, len(run))
    assert _play(original, run, hop, rest) == _play(rebuilt, run, hop, rest)
    assert original.interrupt("gap") == rebuilt.interrupt("gap")


@settings(max_examples=400, deadline=None)
@given(chosen=any_settings, run=any_run, hop=st.sampled_from([HOP, HOP // 2]))
def test_every_lifecycle_is_well_formed(chosen: DecisionSettings, run: list[tuple[float, list[int]]], hop: int) -> None:
    decision = Decision(chosen)
    told = list(itertools.chain(*_play(decision, run, hop, range(len(run)))))
    told += decision.interrupt("stream_lost")
    onsets_of_alerts = []
    for _, life in itertools.groupby(told, key=lambda t: t.onset_sample):
        transitions = list(life)
        states = [t.state for t in transitions]
        assert states == ["opened"] + ["updated"] * (len(states) - 2) + ["closed"]
        assert [t.revision for t in transitions] == list(range(len(states)))
        assert len({(t.first_sample, t.onset_sample) for t in transitions}) == 1
        for t in transitions:
            samples = [o.sample for o in t.onsets]
            assert all(b - a > SAME_ONSET_SAMPLES for a, b in itertools.pairwise(samples))
            assert t.support >= chosen.min_support
            assert t.peak_score >= chosen.open_threshold
        onsets_of_alerts.append(transitions[0].onset_sample)
    assert onsets_of_alerts == sorted(set(onsets_of_alerts))  # no two alerts of a session share an id


@settings(max_examples=200, deadline=None)
@given(chosen=any_settings, run=any_run)
def test_with_support_of_one_no_firing_example_goes_unreported(
    chosen: DecisionSettings, run: list[tuple[float, list[int]]]
) -> None:
    if chosen.min_support > 1:
        return
    decision = Decision(chosen)
    told = list(itertools.chain(*_play(decision, run, HOP, range(len(run)))))
    told += decision.interrupt("stream_lost")
    covered = [(t.first_sample, t.last_sample) for t in told if t.state == "closed"]
    for k, (score, _) in enumerate(run):
        if score >= chosen.open_threshold:
            assert any(first <= max(0, k * HOP - 240) and (k + 1) * HOP <= last for first, last in covered)


def test_the_next_alert_reports_no_shot_of_the_one_before() -> None:
    decision = Decision(_settings(max_alert_seconds=1.0))
    shot = 2 * HOP - 360  # at the end of the example that closes the first alert
    decision.step(_example(0, 0.9), lambda: [_onset(5_000)])
    updated, closed = decision.step(_example(1, 0.9), lambda: [_onset(shot)])
    assert (updated.onsets[-1].sample, closed.close_reason) == (shot, "max_duration")
    (opened,) = decision.step(_example(2, 0.9), lambda: [_onset(shot + 100), _onset(40_000)])
    assert [o.sample for o in opened.onsets] == [40_000]
