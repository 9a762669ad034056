"""Recordings and continuous audio through the detector's own pipeline -> what an operator and a buyer want to know.

Recall by set, distance and signal-to-noise ratio; errors of the onset; false alerts an hour with their confidence
interval; and the curve of false alerts a day against recall and latency. Any number of models, and peers, on the same
files. A shot counts as heard only where an alert names an onset within the tolerance of the tagged one.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from detector.alert import ModelIdentity
from detector.chunk import CHUNK_SAMPLES, RATE_HZ, Chunk
from detector.decision import DecisionSettings, ScoredExample
from detector.errors import DataError
from detector.model import FalseAlertsSection
from detector.operating_point import MIN_PEAKS, Rate, expected_per_day, threshold_for
from detector.pipeline import Emitted, Pipeline
from detector.stream import Arrival
from trainer.compact.evaluation import (
    CLIP_FALSE_ALARMS,
    Recording,
    false_alerts_section,
    is_continuous,
    poisson_interval,
)
from trainer.compact.pools import onsets_file

Float32Array = npt.NDArray[np.float32]
ONSET_TOLERANCE_SECONDS = 0.1
DISTANCE_BANDS_METRES = (0.0, 150.0, 300.0, 450.0, 600.0, 900.0, math.inf)
SNR_BANDS_DB = (-math.inf, 10.0, 15.0, 20.0, 25.0, 30.0, math.inf)
RATES_PER_DAY = (0.1, 1.0, 5.0, 10.0, 24.0, 50.0, 100.0, 240.0)
_RECORDINGS_AT_ONCE = 48


class Scorer(Protocol):
    """What the pipeline asks of a model; ``detector.model.Model`` and ``trainer.peers.Peer`` are such."""

    def embed(self, pcm: npt.NDArray[np.int16]) -> Float32Array: ...

    def classify(self, windows: Float32Array, num_frames: npt.NDArray[np.int32]) -> Float32Array: ...


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """Who is examined.

    Attributes:
        decision: settings it is served with; its open threshold is its own default, None for ``own_threshold`` where
            it has none.
    """

    name: str
    scorer: Scorer
    labels: tuple[str, ...]
    identity: ModelIdentity
    window_examples: int
    decision: DecisionSettings
    own_threshold: float | None


@dataclass(frozen=True, slots=True)
class Shot:
    """A tagged shot in a recording; what is not known is NaN."""

    onset_seconds: float
    distance_metres: float
    snr_db: float


@dataclass(frozen=True, slots=True)
class HeardAlert:
    """An alert of the pipeline: all its onsets, and the end of the chunk with which it was told; seconds."""

    onsets_seconds: tuple[float, ...]
    told_seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class Listening:
    """What one subject made of one recording at one threshold. ``scores``: family score of each example, in order."""

    recording: Recording
    scores: Float32Array
    alerts: tuple[HeardAlert, ...]

    @property
    def peak(self) -> float:
        return float(self.scores.max(initial=0.0))


class Remembering:
    """A scorer that answers for audio and windows it met before from memory: every threshold costs one pass only."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._embeddings: dict[bytes, Float32Array] = {}
        self._scores: dict[bytes, Float32Array] = {}

    def embed(self, pcm: npt.NDArray[np.int16]) -> Float32Array:
        keys = [_digest(row) for row in pcm]
        new = [i for i, key in enumerate(keys) if key not in self._embeddings]
        if new:
            for i, embedding in zip(new, self._scorer.embed(np.ascontiguousarray(pcm[new])), strict=True):
                self._embeddings[keys[i]] = embedding
        return np.stack([self._embeddings[key] for key in keys])

    def classify(self, windows: Float32Array, num_frames: npt.NDArray[np.int32]) -> Float32Array:
        keys = [_digest(window[:count]) for window, count in zip(windows, num_frames, strict=True)]
        new = [i for i, key in enumerate(keys) if key not in self._scores]
        if new:
            found = self._scorer.classify(np.ascontiguousarray(windows[new]), np.ascontiguousarray(num_frames[new]))
            for i, scores in zip(new, found, strict=True):
                self._scores[keys[i]] = scores
        return np.stack([self._scores[key] for key in keys])


def _digest(values: npt.NDArray[Any]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=12).digest()


def read_shots(audio_dir: Path) -> dict[str, tuple[Shot, ...]]:
    """Recording's path -> its tagged shots, from ``shotspotter/onsets.csv``; empty where there is no such file.

    Raises DataError for a row that can't be read.
    """
    path = onsets_file(audio_dir)
    if not path.is_file():
        return {}
    shots: dict[str, list[Shot]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                shot = Shot(
                    float(row["onset_seconds"]),
                    float(row.get("distance_metres") or math.nan),
                    float(row.get("snr_db") or math.nan),
                )
            except (KeyError, ValueError) as error:
                raise DataError(
                    f"{path}, line {number}: no usable onset_seconds, distance_metres or snr_db: {error}."
                ) from None
            shots.setdefault(row["file"], []).append(shot)
    return {name: tuple(sorted(found, key=lambda s: s.onset_seconds)) for name, found in shots.items()}


def listen(
    subject: Subject,
    recordings: Sequence[Recording],
    threshold: float,
    hop_seconds: float,
    close_threshold: float | None = None,
    told: Callable[[int], None] | None = None,
) -> list[Listening]:
    """Every recording as a stream of its own through the pipeline that serves, opening alerts at ``threshold``.

    Args:
        close_threshold: None = half the odds of ``threshold``.
        told: called with the number of recordings done.
    """
    close = _half_odds(threshold) if close_threshold is None else close_threshold
    decision = dataclasses.replace(subject.decision, open_threshold=threshold, close_threshold=close)
    scores: dict[str, list[float]] = {}

    def observe(stream_id: str, scored: ScoredExample, score: float) -> None:
        scores[stream_id].append(score)

    found: list[Listening] = []
    for first in range(0, len(recordings), _RECORDINGS_AT_ONCE):
        group = recordings[first : first + _RECORDINGS_AT_ONCE]
        pipeline = Pipeline(
            subject.scorer,
            labels=subject.labels,
            model=subject.identity,
            window_examples=subject.window_examples,
            decision=decision,
            hop_seconds=hop_seconds,
            observer=observe,
        )
        streams = {str(i): list(_chunks(str(i), recording.pcm)) for i, recording in enumerate(group)}
        scores.update({stream: [] for stream in streams})
        alerts: dict[str, dict[str, HeardAlert]] = {stream: {} for stream in streams}
        for seq in range(max((len(chunks) for chunks in streams.values()), default=0)):
            for chunks in streams.values():
                if seq < len(chunks):
                    pipeline.submit(Arrival(chunks[seq]))
            if seq % 8 == 7:
                _note(alerts, pipeline.run())
        _note(alerts, pipeline.run())
        for stream in streams:
            _note(alerts, pipeline.end_stream(stream))
        found += [
            Listening(recording, np.asarray(scores.pop(str(i)), np.float32), tuple(alerts[str(i)].values()))
            for i, recording in enumerate(group)
        ]
        if told is not None:
            told(len(found))
    return found


def _note(alerts: dict[str, dict[str, HeardAlert]], emitted: Iterable[Emitted]) -> None:
    for one in emitted:
        alert = one.alert
        known = alerts[alert.stream].get(alert.alert_id)
        told = _arrived_seconds(alert.decided_sample) if known is None else known.told_seconds
        onsets = tuple(onset.sample / RATE_HZ for onset in alert.onsets)
        alerts[alert.stream][alert.alert_id] = HeardAlert(onsets, told)


def _arrived_seconds(sample: int) -> float:
    """When the audio up to ``sample`` is all there: a sensor publishes whole chunks."""
    return math.ceil(sample / CHUNK_SAMPLES) * CHUNK_SAMPLES / RATE_HZ


def _chunks(stream_id: str, pcm: npt.NDArray[np.int16]) -> Iterable[Chunk]:
    for seq in range(math.ceil(len(pcm) / CHUNK_SAMPLES)):
        part = pcm[seq * CHUNK_SAMPLES : (seq + 1) * CHUNK_SAMPLES]
        yield Chunk(
            stream_id=stream_id,
            session="evaluation",
            seq=seq,
            captured_at_ns=seq * CHUNK_SAMPLES * 1_000_000_000 // RATE_HZ,
            pcm=np.pad(part, (0, CHUNK_SAMPLES - len(part))),
        )


def _half_odds(threshold: float) -> float:
    odds = threshold / max(1.0 - threshold, 1e-9) / 2.0
    return odds / (1.0 + odds)


def clip_threshold(heard: Sequence[Listening], share: float = CLIP_FALSE_ALARMS) -> float:
    """The lowest threshold that at most ``share`` of the negative recordings reach. DataError without negatives.

    Reach, as the pipeline opens alerts; ``trainer.compact.evaluation`` has the score that they must exceed.
    """
    peaks = np.sort(np.array([h.peak for h in heard if not h.recording.positive], np.float32))[::-1]
    if not len(peaks):
        raise DataError("No recording without gunfire: a threshold can't be compared without any.")
    at = peaks[int(share * len(peaks))]
    return float(min(np.nextafter(at, np.float32(2.0)), np.float32(1.0)))


@dataclass(frozen=True, slots=True)
class Share:
    """``part`` of ``whole``, with the 95 % Wilson interval."""

    part: int
    whole: int

    @property
    def value(self) -> float:
        return self.part / self.whole if self.whole else math.nan

    def interval(self) -> tuple[float, float]:
        if not self.whole:
            return math.nan, math.nan
        z, n, p = 1.959964, self.whole, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True, slots=True)
class AudioReport:
    """What one subject gives at one threshold.

    Attributes:
        recall: set -> recordings with gunfire that were heard. With tagged shots: at the right time.
        shots: tagged shots with an onset of an alert within the tolerance; ``by_distance``, ``by_snr`` likewise.
        onset_errors_seconds: alert's onset less the tagged one, of the shots heard.
        latencies_seconds: from the tagged onset of an alert's first shot to the end of the chunk that told it.
        negatives: recordings without gunfire that have an alert; ``by_label``: by source and label.
        false_alerts: alerts in continuous audio, in ``audio_hours`` of it.
        rate: false alerts a day at this threshold, by the scores of the continuous audio; None where there is none.
    """

    subject: str
    threshold: float
    hop_seconds: float
    recall: Mapping[str, Share]
    shots: Share
    by_distance: Mapping[str, Share]
    by_snr: Mapping[str, Share]
    onset_errors_seconds: tuple[float, ...]
    latencies_seconds: tuple[float, ...]
    negatives: Share
    by_label: Mapping[str, Share]
    false_alerts: int
    audio_hours: float
    rate: Rate | None

    def per_hour(self) -> tuple[float, float, float]:
        """False alerts an hour and their 95 % Poisson interval."""
        if not self.audio_hours:
            return math.nan, math.nan, math.nan
        low, high = poisson_interval(self.false_alerts)
        return self.false_alerts / self.audio_hours, low / self.audio_hours, high / self.audio_hours

    def as_json(self) -> dict[str, Any]:
        """Strict JSON; what is not known is null."""
        errors, delays = np.array(self.onset_errors_seconds), np.array(self.latencies_seconds)
        rate, low, high = self.per_hour()
        content: dict[str, Any] = _plain(
            {
                "subject": self.subject,
                "threshold": self.threshold,
                "hop_seconds": self.hop_seconds,
                "recall": {name: _share(share) for name, share in self.recall.items()},
                "tagged_shots": _share(self.shots),
                "tagged_shots_by_distance_metres": {name: _share(s) for name, s in self.by_distance.items()},
                "tagged_shots_by_snr_db": {name: _share(s) for name, s in self.by_snr.items()},
                "onset_error_seconds": {
                    "median_absolute": float(np.median(np.abs(errors))) if len(errors) else math.nan,
                    "p90_absolute": float(np.quantile(np.abs(errors), 0.9)) if len(errors) else math.nan,
                },
                "latency_seconds": {
                    "median": float(np.median(delays)) if len(delays) else math.nan,
                    "p90": float(np.quantile(delays, 0.9)) if len(delays) else math.nan,
                },
                "negative_recordings": _share(self.negatives),
                "negative_recordings_by_label": {name: _share(s) for name, s in self.by_label.items()},
                "continuous": {
                    "false_alerts": self.false_alerts,
                    "audio_hours": self.audio_hours,
                    "per_hour": {"estimate": rate, "low_95": low, "high_95": high},
                    "per_day": None if self.rate is None else self.rate.per_day,
                    "per_day_bound": None if self.rate is None else self.rate.bound,
                    "extrapolation": None if self.rate is None else self.rate.extrapolation,
                },
            }
        )
        return content


def _share(share: Share) -> dict[str, Any]:
    low, high = share.interval()
    return {"value": share.value, "part": share.part, "whole": share.whole, "low_95": low, "high_95": high}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def report(
    subject: Subject,
    heard: Sequence[Listening],
    shots: Mapping[str, tuple[Shot, ...]],
    threshold: float,
    hop_seconds: float,
    counted: FalseAlertsSection | None,
    tolerance_seconds: float = ONSET_TOLERANCE_SECONDS,
) -> AudioReport:
    """Judge what was heard at ``threshold``; ``counted`` gives the rate a day where the audio is too short for one."""
    recall: dict[str, list[bool]] = {}
    judged: list[tuple[Shot, float | None]] = []
    delays: list[float] = []
    for one in heard:
        if not one.recording.positive:
            continue
        tagged = shots.get(one.recording.path, ())
        if not tagged:
            recall.setdefault(one.recording.set, []).append(bool(one.alerts))
            continue
        onsets = [onset for alert in one.alerts for onset in alert.onsets_seconds]
        errors = [_nearest(onsets, shot.onset_seconds, tolerance_seconds) for shot in tagged]
        judged += zip(tagged, errors, strict=True)
        recall.setdefault(one.recording.set, []).append(any(error is not None for error in errors))
        for alert in one.alerts:
            first = [
                s.onset_seconds for s in tagged if abs(s.onset_seconds - alert.onsets_seconds[0]) <= tolerance_seconds
            ]
            if first:
                delays.append(alert.told_seconds - first[0])
    by_label: dict[str, list[bool]] = {}
    for one in heard:
        if not one.recording.positive:
            by_label.setdefault(f"{one.recording.set}/{one.recording.label}", []).append(bool(one.alerts))
    continuous = [one for one in heard if is_continuous(one.recording)]
    hours = sum(len(one.recording.pcm) for one in continuous) / RATE_HZ / 3600
    return AudioReport(
        subject=subject.name,
        threshold=threshold,
        hop_seconds=hop_seconds,
        recall={name: _of(found) for name, found in sorted(recall.items())},
        shots=_of([error is not None for _, error in judged]),
        by_distance=_by_band(judged, lambda s: s.distance_metres, DISTANCE_BANDS_METRES),
        by_snr=_by_band(judged, lambda s: s.snr_db, SNR_BANDS_DB),
        onset_errors_seconds=tuple(error for _, error in judged if error is not None),
        latencies_seconds=tuple(delays),
        negatives=_of([alerted for found in by_label.values() for alerted in found]),
        by_label={name: _of(found) for name, found in sorted(by_label.items())},
        false_alerts=sum(len(one.alerts) for one in continuous),
        audio_hours=hours,
        rate=None if counted is None else expected_per_day(threshold, counted),
    )


def _nearest(onsets: Sequence[float], wanted: float, tolerance: float) -> float | None:
    error = min((onset - wanted for onset in onsets), key=abs, default=None)
    return error if error is not None and abs(error) <= tolerance else None


def _of(found: Sequence[bool]) -> Share:
    return Share(sum(found), len(found))


def _by_band(
    judged: Sequence[tuple[Shot, float | None]], value: Callable[[Shot], float], edges: Sequence[float]
) -> dict[str, Share]:
    bands: dict[str, Share] = {}
    for low, high in itertools.pairwise(edges):
        inside = [error is not None for shot, error in judged if low <= value(shot) < high]
        if inside:
            name = f"{low:g} to {high:g}"
            if low in (0.0, -math.inf):
                name = f"under {high:g}"
            elif math.isinf(high):
                name = f"{low:g} and more"
            bands[name] = _of(inside)
    return bands


@dataclass(frozen=True, slots=True)
class Examination:
    """One subject at every threshold asked for.

    Attributes:
        at_clip_threshold: at the threshold that 1 % of the negative recordings reach: what models are compared at.
        at_own_threshold: at its default; None for peers, which have none.
        curve: from many false alerts a day to few.
    """

    subject: str
    at_clip_threshold: AudioReport
    at_own_threshold: AudioReport | None
    curve: tuple[AudioReport, ...]
    counted: FalseAlertsSection | None

    def as_json(self) -> dict[str, Any]:
        own = self.at_own_threshold
        return {
            "subject": self.subject,
            "at_clip_threshold": self.at_clip_threshold.as_json(),
            "at_own_threshold": None if own is None else own.as_json(),
            "curve": [point.as_json() for point in self.curve],
            "false_alerts": None if self.counted is None else self.counted.model_dump(),
        }


def examine(
    subject: Subject,
    recordings: Sequence[Recording],
    shots: Mapping[str, tuple[Shot, ...]],
    *,
    hop_seconds: float = 0.96,
    rates_per_day: Sequence[float] = RATES_PER_DAY,
    tolerance_seconds: float = ONSET_TOLERANCE_SECONDS,
    told: Callable[[str, int, int], None] | None = None,
) -> Examination:
    """Everything about one subject. ``told`` is called with what is being done, how far it is, and the whole."""
    remembering = dataclasses.replace(subject, scorer=Remembering(subject.scorer))
    quiet = listen(
        remembering, recordings, 1.0, hop_seconds, 1.0, lambda n: told and told("scoring", n, len(recordings))
    )
    counted = None
    if any(is_continuous(r) for r in recordings):
        counted = false_alerts_section(quiet, hop_seconds, subject.decision.hold_seconds)

    def at(threshold: float, close: float | None = None) -> AudioReport:
        heard = listen(remembering, recordings, threshold, hop_seconds, close)
        return report(subject, heard, shots, threshold, hop_seconds, counted, tolerance_seconds)

    thresholds: list[float] = []
    if counted is not None and len(counted.peaks) >= MIN_PEAKS:
        reach = len(counted.peaks) * 24.0 / counted.audio_hours
        wanted = [threshold_for(rate, counted) for rate in sorted(rates_per_day, reverse=True) if rate <= reach]
        thresholds = list(dict.fromkeys(wanted))  # between few counted ones, neighbouring rates have one threshold
    steps = 2 + len(thresholds)
    done: list[AudioReport] = []
    for threshold in [clip_threshold(quiet), *thresholds]:
        done.append(at(max(threshold, 1e-6)))
        if told is not None:
            told("deciding", len(done), steps)
    own = at(subject.own_threshold, subject.decision.close_threshold) if subject.own_threshold is not None else None
    if told is not None:
        told("deciding", steps, steps)
    return Examination(subject.name, done[0], own, tuple(done[1:]), counted)
