"""Scores of one stream -> lifecycle of its alerts. Pure Python, no clock: time is the sample count of the session.

Stands between ``classifiers`` and ``alert``. Two thresholds: an alert opens when ``min_support`` of the last
``support_window_examples`` examples reach ``open_threshold``; it stays open until ``hold_seconds`` of stream time have
been examined after the last example that reached ``close_threshold``. Whatever the hop between examples is, support is
counted on examples that do not overlap, and an onset seen by two examples is one onset.

No shot is lost to a rule that only limits how often alerts come: what is heard during the cooldown is kept and opens
its alert when the cooldown ends (or at once, when the stream is interrupted).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from detector.chunk import RATE_HZ
from detector.errors import ConfigError, ModelError
from detector.onset import Onset

State = Literal["opened", "updated", "closed"]
CloseReason = Literal["quiet", "max_duration", "gap", "new_session", "stream_lost", "overload", "model_changed"]
InterruptReason = Literal["gap", "new_session", "stream_lost", "overload"]
OnsetFinder = Callable[[], Sequence[Onset]]

OVERLAP_SAMPLES = 240  # what an example shares with its neighbour chunk anyway: not an overlap in time
LOOKBACK_SAMPLES = 8_000  # an onset this far before its example's start still belongs to it
SAME_ONSET_SAMPLES = 480  # 30 ms: two searches of the same shot differ by less, two shots of a gun by more
MAX_ONSETS = 128
MAX_TIMELINE = 128


@dataclass(frozen=True, slots=True)
class DecisionSettings:
    """When alerts open and close.

    Attributes:
        open_threshold: family score (0 to 1) that an example must reach to support an alert.
        close_threshold: at or above it an open alert stays open; at most ``open_threshold``.
        family: label indices that mean gunfire.
        look_alikes: label indices carried along in the alert, never part of the decision.
        min_support: how many of the last ``support_window_examples`` examples must reach ``open_threshold``.
        support_window_examples: counted in whole examples of 0.96 s, whatever the hop.
        hold_seconds: stream time that must be examined after the last active example before the alert closes.
        cooldown_seconds: after an alert closed because it was quiet, how long no alert may open. What is heard
            meanwhile opens one when the cooldown ends: later, never lost. Not applied after ``max_duration``, since the
            fire goes on, nor after an interruption, since nothing is known of what came between.
        max_alert_seconds: an alert that covers this much is closed; continuing fire opens the next one.
        update_score_step: how much the peak must have risen since last told to be worth an ``updated``.
        combine: family score from its labels' probabilities. ``max``: the labels overlap (a machine gun is a gunshot),
            so their probabilities are not independent evidence. ``noisy_or``, 1 - prod(1 - p): for models whose
            family labels exclude one another.
    """

    open_threshold: float
    close_threshold: float
    family: tuple[int, ...]
    look_alikes: tuple[int, ...] = ()
    min_support: int = 1
    support_window_examples: int = 1
    hold_seconds: float = 2.0
    cooldown_seconds: float = 0.0
    max_alert_seconds: float = 30.0
    update_score_step: float = 0.1
    combine: Literal["max", "noisy_or"] = "max"

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.open_threshold <= 1:
            problems.append(f"open_threshold is {self.open_threshold}; allowed is above 0 to 1.")
        if not 0 <= self.close_threshold <= self.open_threshold:
            problems.append(
                f"close_threshold is {self.close_threshold}; allowed is 0 to open_threshold ({self.open_threshold})."
            )
        if not self.family:
            problems.append("family is empty; name at least one label that means gunfire.")
        if any(i < 0 for i in (*self.family, *self.look_alikes)):
            problems.append("family or look_alikes holds a negative label index.")
        if len(set(self.family)) < len(self.family) or len(set(self.look_alikes)) < len(self.look_alikes):
            problems.append("family or look_alikes names a label twice.")
        if both := set(self.family) & set(self.look_alikes):
            problems.append(f"labels {sorted(both)} are in family and in look_alikes.")
        if not 1 <= self.min_support <= self.support_window_examples <= 100:
            problems.append(
                f"min_support is {self.min_support} of support_window_examples {self.support_window_examples}; allowed "
                "is 1 <= min_support <= support_window_examples <= 100."
            )
        for name, value, lowest, highest in (
            ("hold_seconds", self.hold_seconds, 0.0, 3600.0),
            ("cooldown_seconds", self.cooldown_seconds, 0.0, 3600.0),
            ("max_alert_seconds", self.max_alert_seconds, 1.0, 3600.0),
        ):
            if not lowest <= value <= highest:
                problems.append(f"{name} is {value}; allowed is {lowest:g} to {highest:g}.")
        if not 0 < self.update_score_step <= 1:
            problems.append(f"update_score_step is {self.update_score_step}; allowed is above 0 to 1.")
        if self.combine not in ("max", "noisy_or"):
            problems.append(f"combine is {self.combine!r}; allowed are max and noisy_or.")
        if problems:
            raise ConfigError("Decision settings: " + " ".join(problems))

    def family_score(self, scores: Sequence[float]) -> float:
        """One score (0 to 1) from all labels' scores.

        Raises:
            ModelError: a family label is missing or its score is not within 0 to 1 (NaN included).
        """
        try:
            members = [float(scores[i]) for i in self.family]
        except IndexError:
            raise ModelError(
                f"The model gave {len(scores)} scores; the family needs label index {max(self.family)}."
            ) from None
        for index, score in zip(self.family, members, strict=True):
            if not 0.0 <= score <= 1.0:
                raise ModelError(f"The model's score for label index {index} is {score}, not within 0 to 1.")
        if self.combine == "max":
            return max(members)
        return 1.0 - math.prod(1.0 - score for score in members)


@dataclass(frozen=True, slots=True)
class ScoredExample:
    """One example's classifier output. ``start_sample`` is -240 for a session's first; ``end_sample`` is exclusive."""

    start_sample: int
    end_sample: int
    scores: Sequence[float]


@dataclass(frozen=True, slots=True)
class TimelinePoint:
    """Family score of the example that starts at ``start_sample`` of the session (may be -240)."""

    start_sample: int
    score: float


@dataclass(frozen=True, slots=True)
class Transition:
    """Something to tell about an alert; complete in itself, so that ``alert`` needs no earlier one.

    Attributes:
        revision: 0 for ``opened``, then one more for each transition of this alert.
        at_sample: stream time of the decision: end of the newest example seen.
        score: family score of the newest example of the timeline.
        peak_score: highest family score so far, and ``peak_scores`` all labels' scores of that example.
        support: examples without overlap that reached ``open_threshold``.
        onsets: distinct shots, oldest first, at most MAX_ONSETS; never empty, ``onsets[0]`` never changes and
            is the alert's identity. ``onset_count`` counts also those beyond MAX_ONSETS.
        timeline: the newest MAX_TIMELINE examples, oldest first.
        first_sample: start of the first example that supports it (0 at least).
        last_sample: end (exclusive) of the last example at or above ``close_threshold``.
    """

    state: State
    revision: int
    close_reason: CloseReason | None
    at_sample: int
    score: float
    peak_score: float
    peak_scores: tuple[float, ...]
    support: int
    onsets: tuple[Onset, ...]
    onset_count: int
    timeline: tuple[TimelinePoint, ...]
    first_sample: int
    last_sample: int

    @property
    def onset_sample(self) -> int:
        return self.onsets[0].sample

    @property
    def ended_sample(self) -> int | None:
        """End of the last active example, once closed."""
        return self.last_sample if self.state == "closed" else None


@dataclass(frozen=True, slots=True)
class _Support:
    """An example that reached ``open_threshold`` while no alert was open."""

    start_sample: int
    end_sample: int
    score: float
    scores: tuple[float, ...]
    onsets: tuple[Onset, ...]


@dataclass(frozen=True, slots=True)
class _Closed:
    """What must be known of the alert before, until no example can reach back into it."""

    covered_end: int
    last_onset: int

    @property
    def matters_until(self) -> int:
        """Examples that start here or later can't see anything of it."""
        return max(self.covered_end, self.last_onset + SAME_ONSET_SAMPLES + 1) + LOOKBACK_SAMPLES


@dataclass(slots=True)
class _Alert:
    """An alert that is open, or waits for the end of the cooldown (``told`` is then False)."""

    first_sample: int
    last_sample: int
    onsets: list[Onset]
    onset_count: int
    last_onset: int
    peak_score: float
    peak_scores: tuple[float, ...]
    support: int
    last_support_start: int
    score: float
    timeline: deque[TimelinePoint] = field(default_factory=lambda: deque(maxlen=MAX_TIMELINE))
    told: bool = False
    told_peak: float = 0.0
    told_onsets: int = 0
    revision: int = 0

    def transition(self, state: State, at_sample: int, reason: CloseReason | None = None) -> Transition:
        transition = Transition(
            state=state,
            revision=self.revision,
            close_reason=reason,
            at_sample=at_sample,
            score=self.score,
            peak_score=self.peak_score,
            peak_scores=self.peak_scores,
            support=self.support,
            onsets=tuple(self.onsets),
            onset_count=self.onset_count,
            timeline=tuple(self.timeline),
            first_sample=self.first_sample,
            last_sample=self.last_sample,
        )
        self.revision += 1
        self.told = True
        self.told_peak = self.peak_score
        self.told_onsets = self.onset_count
        return transition

    def add_onsets(self, onsets: Sequence[Onset]) -> None:
        """Add the certain ones that are new. None before the first: it is the alert's identity."""
        for onset in onsets:
            if not onset.certain or onset.sample <= self.onsets[0].sample + SAME_ONSET_SAMPLES:
                continue
            if self.onset_count > len(self.onsets):
                known = onset.sample <= self.last_onset + SAME_ONSET_SAMPLES
            else:
                known = any(abs(onset.sample - o.sample) <= SAME_ONSET_SAMPLES for o in self.onsets)
            if known:
                continue
            self.onset_count += 1
            self.last_onset = max(self.last_onset, onset.sample)
            if len(self.onsets) < MAX_ONSETS:
                self.onsets.append(onset)
                self.onsets.sort(key=lambda o: o.sample)


class Decision:
    """State machine of one stream's contiguous run of examples. Bounded memory; not thread-safe."""

    def __init__(self, settings: DecisionSettings) -> None:
        self.settings = settings
        self._hold_samples = round(settings.hold_seconds * RATE_HZ)
        self._cooldown_samples = round(settings.cooldown_seconds * RATE_HZ)
        self._max_alert_samples = round(settings.max_alert_seconds * RATE_HZ)
        self.reset()

    def reset(self) -> None:
        """Forget everything and tell nothing. To end a run with what is owed to subscribers: ``interrupt``."""
        self._alert: _Alert | None = None
        self._supports: list[_Support] = []
        self._closed: _Closed | None = None
        self._cooldown_until: int | None = None
        self._needed_from: int | None = None
        self._last: ScoredExample | None = None

    @property
    def is_open(self) -> bool:
        """An alert was told as opened and not yet as closed."""
        return self._alert is not None and self._alert.told

    @property
    def open_onset_sample(self) -> int | None:
        """First onset of the alert that is open or waits for the cooldown's end; None if there is none."""
        return None if self._alert is None else self._alert.onsets[0].sample

    @property
    def quiescent(self) -> bool:
        """Nothing is remembered: this state is the state after ``reset``, whatever came before."""
        return self._needed_from is None

    @property
    def oldest_sample_needed(self) -> int | None:
        """Start of the oldest example that a fresh machine must be fed to stand where this one stands; None: none.

        Feeding the same examples from there on, discarding the transitions, gives identical transitions afterwards.
        """
        return self._needed_from

    def step(self, example: ScoredExample, find_onsets: OnsetFinder) -> list[Transition]:
        """Take the stream's next example and say what changed.

        Args:
            example: later than the one before; overlap is allowed.
            find_onsets: called (once at most) only if the example supports an alert. What it returns more than
                LOOKBACK_SAMPLES before the example, before the session or after the example is ignored.

        Raises:
            ModelError: scores that are missing or not within 0 to 1. The state is unchanged.
            ValueError: the example does not come after the one before it.
        """
        if self._last is not None and example.start_sample <= self._last.start_sample:
            raise ValueError(
                f"Example at sample {example.start_sample} does not come after the one at {self._last.start_sample}."
            )
        score = self.settings.family_score(example.scores)
        self._last = example
        if self._needed_from is None:
            self._needed_from = example.start_sample
        transitions: list[Transition] = []
        alert = self._alert
        if alert is not None and example.start_sample >= alert.last_sample + self._hold_samples and alert.told:
            transitions += self._close("quiet", min(example.start_sample, alert.last_sample + self._hold_samples))
        if self._alert is None:
            self._gather(example, score, find_onsets)
        else:
            self._extend(self._alert, example, score, find_onsets)
        transitions += self._tell(example.end_sample)
        self._forget(example)
        return transitions

    def interrupt(self, reason: InterruptReason) -> list[Transition]:
        """The run ends here: close what is open, tell what waited for the cooldown, then forget everything.

        Shutdown is no interruption: the state is rebuilt after a restart, and open alerts go on.
        """
        transitions = []
        if self._alert is not None and self._last is not None:
            if not self._alert.told:
                transitions.append(self._alert.transition("opened", self._last.end_sample))
            transitions += self._close(reason, self._last.end_sample)
        self.reset()
        return transitions

    def _gather(self, example: ScoredExample, score: float, find_onsets: OnsetFinder) -> None:
        """No alert: remember support, and begin an alert when there is enough."""
        settings = self.settings
        window_samples = settings.support_window_examples * _example_step(example)
        self._supports = [s for s in self._supports if s.start_sample > example.start_sample - window_samples]
        if score < settings.open_threshold:
            return
        if self._closed is not None and example.start_sample < self._closed.covered_end - OVERLAP_SAMPLES:
            return  # mostly audio of the alert before; what is new in it comes again in the next example
        onsets = self._sane_onsets(example, find_onsets)
        self._supports.append(
            _Support(example.start_sample, example.end_sample, score, tuple(map(float, example.scores)), onsets)
        )
        support, last_start = _count_without_overlap(self._supports)
        if support >= settings.min_support:
            self._begin(support, last_start)

    def _begin(self, support: int, last_support_start: int) -> None:
        supports, self._supports = self._supports, []
        floor = -1 if self._closed is None else self._closed.last_onset + SAME_ONSET_SAMPLES
        found = sorted((o for s in supports for o in s.onsets if o.sample > floor), key=lambda o: o.sample)
        first = next((o for o in found if o.certain), found[0] if found else None)
        if first is None:  # nothing found that the alert before has not reported: say where its audio begins
            first = Onset(max(supports[0].start_sample, 0, floor + 1), peak_dbfs=None, rise_db=0.0, certain=False)
        peak = max(supports, key=lambda s: s.score)
        alert = _Alert(
            first_sample=max(supports[0].start_sample, 0),
            last_sample=supports[-1].end_sample,
            onsets=[first],
            onset_count=1,
            last_onset=first.sample,
            peak_score=peak.score,
            peak_scores=peak.scores,
            support=support,
            last_support_start=last_support_start,
            score=supports[-1].score,
        )
        alert.add_onsets(found)
        alert.timeline.extend(TimelinePoint(s.start_sample, s.score) for s in supports)
        self._alert = alert

    def _extend(self, alert: _Alert, example: ScoredExample, score: float, find_onsets: OnsetFinder) -> None:
        alert.score = score
        alert.timeline.append(TimelinePoint(example.start_sample, score))
        if score < self.settings.close_threshold:
            return
        alert.last_sample = example.end_sample
        alert.add_onsets(self._sane_onsets(example, find_onsets))
        if score > alert.peak_score:
            alert.peak_score = score
            alert.peak_scores = tuple(map(float, example.scores))
        if score >= self.settings.open_threshold and example.start_sample >= alert.last_support_start + _example_step(
            example
        ):
            alert.support += 1
            alert.last_support_start = example.start_sample

    def _tell(self, now_sample: int) -> list[Transition]:
        """What became worth saying by stream time ``now_sample``."""
        if self._cooldown_until is not None and now_sample >= self._cooldown_until:
            self._cooldown_until = None
        alert = self._alert
        if alert is None or self._cooldown_until is not None:
            return []
        transitions = []
        if not alert.told:
            transitions.append(alert.transition("opened", now_sample))
        elif (
            alert.onset_count > alert.told_onsets
            or alert.peak_score >= alert.told_peak + self.settings.update_score_step
        ):
            transitions.append(alert.transition("updated", now_sample))
        if now_sample - alert.first_sample >= self._max_alert_samples:
            transitions += self._close("max_duration", now_sample)
        elif now_sample > alert.last_sample and now_sample >= alert.last_sample + self._hold_samples:
            transitions += self._close("quiet", now_sample)
        return transitions

    def _close(self, reason: CloseReason, now_sample: int) -> list[Transition]:
        alert = self._alert
        assert alert is not None
        self._alert = None
        self._closed = _Closed(alert.last_sample, alert.last_onset)
        if reason == "quiet" and self._cooldown_samples:
            self._cooldown_until = now_sample + self._cooldown_samples
        return [alert.transition("closed", now_sample, reason)]

    def _forget(self, example: ScoredExample) -> None:
        """Drop what can't matter any more and note from where a rebuild would have to start."""
        oldest = self._supports[0].start_sample if self._supports else example.start_sample
        if self._closed is not None and self._alert is None and oldest >= self._closed.matters_until:
            self._closed = None
        if self._alert is None and self._closed is None and self._cooldown_until is None:
            self._needed_from = self._supports[0].start_sample if self._supports else None

    def _sane_onsets(self, example: ScoredExample, find_onsets: OnsetFinder) -> tuple[Onset, ...]:
        lowest = max(0, example.start_sample - LOOKBACK_SAMPLES)
        return tuple(o for o in find_onsets() if lowest <= o.sample < example.end_sample)


def _example_step(example: ScoredExample) -> int:
    """Samples between two examples that do not overlap: 15,360 for an example of 15,600."""
    return max(1, example.end_sample - example.start_sample - OVERLAP_SAMPLES)


def _count_without_overlap(supports: Sequence[_Support]) -> tuple[int, int]:
    """Most supports that do not overlap, and the start of the last counted one."""
    count, last_end = 0, -(2**63)
    last_start = supports[0].start_sample
    for support in supports:
        if support.start_sample >= last_end - OVERLAP_SAMPLES:
            count, last_end, last_start = count + 1, support.end_sample, support.start_sample
    return count, last_start
