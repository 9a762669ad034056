"""False alerts a day -> threshold, from the audio without gunfire in which the model's makers counted them.

A model package keeps the peaks of its loudest false alerts and the hours they were found in (``FalseAlertsSection``).
Within what those hours can show, the threshold lies between two peaks. Beyond, the tail is continued as an exponential
in log odds (peaks over a threshold, as in extreme value statistics), and how far is said. What the counts can only
bound is said as a bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal
from typing import TYPE_CHECKING, Literal

from detector.errors import ConfigError

if TYPE_CHECKING:
    from detector import config
    from detector.model import FalseAlertsSection, Manifest

MIN_PEAKS = 10  # fewer give no tail worth continuing
_TAIL_PEAKS = 50
_MAX_LOG_ODDS = 16.0  # float32 scores end there: 1 - 1.1e-7
_RAREST = 1e-6  # of what the audio shows once: no tail is believed any further


@dataclass(frozen=True, slots=True)
class Rate:
    """False alerts of one stream a day.

    Attributes:
        bound: ``at least`` below the lowest peak kept, ``under`` where the audio showed none and its tail says no more.
        extrapolation: how many times rarer than what the audio could show; 1 = not extrapolated.
    """

    per_day: float
    bound: Literal["about", "at least", "under"] = "about"
    extrapolation: float = 1.0

    def __str__(self) -> str:
        number = plain(self.per_day)
        return f"{self.bound} {number} false alert{'' if number == '1' else 's'} a day and stream"


@dataclass(frozen=True, slots=True)
class ChosenThreshold:
    """Where alerts open, and what that means in false alerts.

    Attributes:
        open_threshold: family score, 0 to 1.
        close_threshold: as configured, or in the model's ratio to the open one.
        rate: expected at that threshold; None where the model has no count.
        countable_per_day: the rate at which the audio counted in would have held one; None likewise.
        audio_hours: how much audio that was; 0 where there is none.
        hop_seconds: between the examples that were counted.
        origin: what chose the threshold: ``decision.open_threshold``, ``decision.false_alerts_per_day`` or ``model``.
    """

    open_threshold: float
    close_threshold: float
    rate: Rate | None
    countable_per_day: float | None
    audio_hours: float
    hop_seconds: float
    origin: str

    def __str__(self) -> str:
        text = (
            f"Alerts open at {self.open_threshold:.6g} and fall silent below {self.close_threshold:.6g} ({self.origin})"
        )
        if self.rate is None or self.countable_per_day is None:
            return f"{text}; the model does not say how many false alerts a day that gives."
        text += f": {self.rate}"
        counted = f"{plain(self.audio_hours)} h of audio without gunfire, {self.hop_seconds:g} s between examples"
        if self.rate.extrapolation > 1.0:
            return (
                f"{text}, extrapolated by a factor of {plain(self.rate.extrapolation)}: {counted}, show no rate under "
                f"{plain(self.countable_per_day)} a day."
            )
        if self.rate.bound == "under":
            return f"{text} (what the audio could show): {counted}, and none as loud."
        return f"{text}, counted in {counted}."


def choose_threshold(
    manifest: Manifest, configured: config.DecisionSettings, hop_seconds: float = 0.96
) -> ChosenThreshold:
    """What the configuration asks for, and the model's own threshold where it asks for nothing.

    Raises:
        ConfigError: ``false_alerts_per_day`` with a model that has no count, or a rate out of its reach.
    """
    model_open, model_close = manifest.decision.open_threshold, manifest.decision.close_threshold
    counted = _counted(manifest.false_alerts, hop_seconds)
    wanted = configured.false_alerts_per_day
    if wanted is not None:
        if counted is None or len(counted.peaks) < MIN_PEAKS:
            raise ConfigError(
                f"decision.false_alerts_per_day: model {manifest.name} does not say how many false alerts a threshold "
                f"gives (it needs at least {MIN_PEAKS} counted ones). Set decision.open_threshold instead, or count "
                f"them with: trainer evaluate-audio."
            )
        open_threshold, origin = threshold_for(wanted, counted), "decision.false_alerts_per_day"
    elif configured.open_threshold is not None:
        open_threshold, origin = configured.open_threshold, "decision.open_threshold"
    else:
        open_threshold, origin = model_open, "model"
    close_threshold = configured.close_threshold
    if close_threshold is None:
        close_threshold = open_threshold * (model_close / model_open if model_open else 1.0)
    elif close_threshold > open_threshold:
        raise ConfigError(
            f"decision.close_threshold: {close_threshold} is over the open threshold {open_threshold:.6g} "
            f"({origin}); it is at most that. Lower it, or leave it null."
        )
    return ChosenThreshold(
        open_threshold=open_threshold,
        close_threshold=close_threshold,
        rate=None if counted is None else expected_per_day(open_threshold, counted),
        countable_per_day=None if counted is None else 24.0 / counted.audio_hours,
        audio_hours=0.0 if counted is None else counted.audio_hours,
        hop_seconds=hop_seconds if counted is None else counted.hop_seconds,
        origin=origin,
    )


def threshold_for(false_alerts_per_day: float, counted: FalseAlertsSection) -> float:
    """The family score that false alerts of one stream reach this often; ``counted`` has ``MIN_PEAKS`` or more.

    Raises:
        ConfigError: more are asked for than were counted, or so few that no score is high enough.
    """
    n = false_alerts_per_day * counted.audio_hours / 24.0
    odds = [_log_odds(peak) for peak in counted.peaks]
    if n > len(odds):
        reach = len(odds) * 24.0 / counted.audio_hours
        raise ConfigError(
            f"decision.false_alerts_per_day: {false_alerts_per_day:g} is over the {plain(reach, ROUND_FLOOR)} a day "
            f"that the model's counts reach; ask for fewer, or set decision.open_threshold."
        )
    if n >= 1.0:  # peak k (from 1) is reached k times; log-linear between two of them
        k = min(int(n), len(odds) - 1)
        share = (math.log(n) - math.log(k)) / (math.log(k + 1) - math.log(k))
        z = odds[k - 1] + share * (odds[k] - odds[k - 1])
    else:
        once, scale = _tail(odds)
        z = once - scale * math.log(n)
    if z > _MAX_LOG_ODDS or n < _RAREST:
        least = expected_per_day(_probability(_MAX_LOG_ODDS), counted)
        assert least is not None
        raise ConfigError(
            f"decision.false_alerts_per_day: {false_alerts_per_day:g} a day is rarer than any score of this model can "
            f"promise; ask for {plain(least.per_day, ROUND_CEILING)} or more."
        )
    return _probability(z)


def expected_per_day(threshold: float, counted: FalseAlertsSection) -> Rate | None:
    """The inverse of ``threshold_for``, a bound where the counts give no more; None where nothing was counted."""
    odds = [_log_odds(peak) for peak in counted.peaks]
    if not odds:
        return None
    countable_per_day = 24.0 / counted.audio_hours
    z = _log_odds(threshold)
    if z < odds[-1] and not math.isclose(z, odds[-1], abs_tol=1e-9):
        return Rate(len(odds) * countable_per_day, "at least")
    if z > odds[0]:
        if len(odds) < MIN_PEAKS:
            return Rate(countable_per_day, "under")
        once, scale = _tail(odds)
        n = min(1.0, math.exp((once - z) / scale))
        if n < _RAREST:
            return Rate(_RAREST * countable_per_day, "under", 1.0 / _RAREST)
        return Rate(n * countable_per_day, extrapolation=1.0 / n)
    n = float(len(odds))
    if z > odds[-1]:
        k = next(i for i in range(1, len(odds)) if odds[i] < z or i == len(odds) - 1)
        above, below = odds[k - 1], odds[k]
        share = (above - z) / (above - below) if above > below else 0.0
        n = math.exp(math.log(k) + share * (math.log(k + 1) - math.log(k)))
    return Rate(n * countable_per_day)


def plain(value: float, rounding: str = ROUND_HALF_EVEN) -> str:
    """Two significant digits, never with an exponent: 120, 0.004."""
    return f"{Context(prec=2, rounding=rounding).create_decimal(Decimal(value)).normalize():f}"


def _tail(odds: Sequence[float]) -> tuple[float, float]:
    """(what is reached once, never under the loudest; by how much more for e times rarer): an exponential's tail."""
    count = min(_TAIL_PEAKS, len(odds) - 1)
    if count < 1:
        return odds[0], 1.0
    start = odds[count]
    scale = max(sum(z - start for z in odds[:count]) / count, 1e-3)
    return max(odds[0], start + scale * math.log(count)), scale


def _counted(sections: Sequence[FalseAlertsSection], hop_seconds: float) -> FalseAlertsSection | None:
    """The count with the examples as far apart as they are served; else the one with the shortest hop."""
    for section in sections:
        if math.isclose(section.hop_seconds, hop_seconds):
            return section
    return min(sections, key=lambda section: section.hop_seconds, default=None)


def _log_odds(probability: float) -> float:
    p = min(max(probability, 1e-9), 1.0 - 1e-9)
    return math.log(p / (1.0 - p))


def _probability(log_odds: float) -> float:
    return 1.0 / (1.0 + math.exp(-log_odds))
