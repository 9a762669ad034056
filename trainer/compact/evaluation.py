"""Dev recordings through a model the way it is served -> recall, false alarms and the operating curve. Sixth stage.

A recording is a stream of 0.96 s chunks, the last one filled up with zeros; example k is the 240 samples before
chunk k and the chunk; each window holds the last ten embeddings 0.96 s apart. A recording's score is the largest
family score.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol
from zlib import crc32

import numpy as np
import numpy.typing as npt

from detector.audio import float_to_int16, resample_reference, to_mono
from detector.chunk import RATE_HZ
from detector.embedders.params import CARRY_SAMPLES, EXAMPLE_HOP_SAMPLES, EXAMPLE_SAMPLES
from detector.errors import AudioError, ConfigError, DataError
from detector.model import FalseAlertsSection
from trainer.compact.channel import band_limit, quantise
from trainer.compact.dataset import load_arrays, save_arrays
from trainer.compact.pools import FAMILY, IndexRow, decode, onsets_file, read_audio, read_index, read_onsets

Int16Array = npt.NDArray[np.int16]
Float32Array = npt.NDArray[np.float32]
_MAX_PEAKS = 1000
_CLUSTERED_SHARE = 0.02  # of continuous examples: what counts as a false alert worth keeping
CLIP_FALSE_ALARMS = 0.01  # the share of negative dev clips that the comparison threshold lets through


class Scorer(Protocol):
    """What evaluation asks of a model; ``detector.model.Model`` is one."""

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def window_examples(self) -> int: ...

    def embed(self, pcm: Int16Array) -> Float32Array:
        """``(n, 15600)`` int16 -> ``(n, 128)``."""
        ...

    def classify(self, windows: Float32Array, num_frames: npt.NDArray[np.int32]) -> Float32Array:
        """``(n, T, 128)`` and ``(n,)`` -> ``(n, labels)``."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """A dev recording.

    Attributes:
        path: below the audio folder.
        set: ``shotspotter``, ``video``, ``sesa``, ...: which recall it counts in; sources of negatives likewise.
        label: of the index.
        positive: it holds gunfire.
        pcm: ``(n,)`` int16 at 16 kHz.
        onsets_seconds: tagged shots, live fire only.
    """

    path: str
    set: str
    label: str
    positive: bool
    pcm: Int16Array
    onsets_seconds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A recording's family scores, example by example (0.96 s apart, or 0.48 s)."""

    recording: Recording
    scores: Float32Array
    hop_samples: int

    @property
    def peak(self) -> float:
        return float(self.scores.max())


@dataclass(frozen=True, slots=True)
class Report:
    """What one threshold gives.

    Attributes:
        threshold: family score that an example must exceed.
        clip_false_alarms: share of negative clips above it.
        recall: set -> share of its recordings above it.
        tagged_shots_heard: share of tagged live-fire shots whose example (or the next, where the shot lies at the end)
            is above it.
        false_alarms: negative label -> (clips above it, clips).
        ambient_alerts: examples of continuous ambient dev audio above it.
        ambient_hours: how much of that there is.
    """

    threshold: float
    clip_false_alarms: float
    recall: Mapping[str, float]
    tagged_shots_heard: float
    false_alarms: Mapping[str, tuple[int, int]]
    ambient_alerts: int
    ambient_hours: float

    def alerts_per_hour(self) -> tuple[float, float, float]:
        """Estimate with its 95 % Poisson interval."""
        low, high = poisson_interval(self.ambient_alerts)
        return tuple(value / self.ambient_hours for value in (self.ambient_alerts, low, high))  # type: ignore[return-value]


def load_recordings(
    audio_dir: Path, cache: Path | None = None, *, quick: bool = False, tags_needed: bool = True
) -> list[Recording]:
    """Every dev recording that can be judged, resampled the reference way; ``cache`` (.npz) saves the resampling.

    ``quick`` resamples by polyphase filters instead (differs near the band edge only). Live-fire files without a tagged
    onset are left out: they are neither; all of them where there is no table of onsets and ``tags_needed`` is not set.
    The cache is made anew where it can't be read, or where any file's path, size or time of change is another.

    Raises ConfigError where index or onsets are bad, AudioError where a file is, DataError where the cache can't be
    written.
    """
    tagged = read_onsets(audio_dir) if tags_needed or onsets_file(audio_dir).is_file() else {}
    rows = _dev_rows(audio_dir, tagged)
    paths = [row.path for row in rows]
    key = _cache_key(audio_dir, paths, quick) if cache is not None else ""
    pcms = _cached(cache, key) if cache is not None else None
    if pcms is None:
        pcms = [(read_audio if quick else _read)(audio_dir / path) for path in paths]
        if cache is not None:
            lengths = np.array([len(pcm) for pcm in pcms])
            save_arrays(cache, {"pcm": np.concatenate(pcms), "lengths": lengths, "key": np.array(key)})
    return [
        Recording(row.path, row.source, row.label, row.label == "gunshot", pcm, tuple(tagged.get(row.path, ((), 0))[0]))
        for row, pcm in zip(rows, pcms, strict=True)
    ]


def _dev_rows(audio_dir: Path, tagged: Container[str]) -> list[IndexRow]:
    rows = read_index(audio_dir)
    return [row for row in rows if row.split == "dev" and (row.source != "shotspotter" or row.path in tagged)]


def check_recordings(audio_dir: Path) -> None:
    """Raises DataError where split ``dev`` lacks something that thresholds and reports need; reads no audio."""
    rows = _dev_rows(audio_dir, read_onsets(audio_dir))
    needed = {
        "recording labelled gunshot": [row for row in rows if row.label == "gunshot"],
        "recording without gunfire": [row for row in rows if row.label != "gunshot"],
        "continuous audio (folder ambient)": [r for r in rows if r.label != "gunshot" and r.source == "ambient"],
    }
    if missing := [what for what, found in needed.items() if not found]:
        raise DataError(f"{audio_dir / 'index.csv'}, split dev, lists no {', no '.join(missing)}: add some.")


def _cache_key(audio_dir: Path, paths: Sequence[str], quick: bool) -> str:
    files = []
    for path in paths:
        try:
            found = (audio_dir / path).stat()
        except OSError as error:
            raise AudioError(f"{audio_dir / path} can't be read: {error.strerror or error}.") from error
        files.append((path, found.st_size, found.st_mtime_ns))
    return json.dumps({"quick": quick, "files": files})


def _cached(cache: Path, key: str) -> list[Int16Array] | None:
    try:
        stored = load_arrays(cache, "this command")
    except DataError:  # absent, cut short or something else
        return None
    if not stored.keys() >= {"pcm", "lengths", "key"} or str(stored["key"]) != key:
        return None
    return np.split(stored["pcm"], np.cumsum(stored["lengths"])[:-1])


def _read(path: Path) -> Int16Array:
    x, rate_hz = decode(path, "float64")
    return float_to_int16(resample_reference(to_mono(x), rate_hz))


def examples_of(pcm: Int16Array, offset_samples: int = 0) -> Int16Array:
    """``(n,)`` -> ``(E, 15600)``: as a stream's chunks give them, or shifted by ``offset_samples`` for the seams."""
    count = max(1, math.ceil((len(pcm) - offset_samples) / EXAMPLE_HOP_SAMPLES)) if len(pcm) > offset_samples else 0
    if offset_samples:  # an example across a seam needs both chunks
        count = math.ceil(len(pcm) / EXAMPLE_HOP_SAMPLES) - 1
    if count <= 0:
        return np.zeros((0, EXAMPLE_SAMPLES), np.int16)
    need = offset_samples + count * EXAMPLE_HOP_SAMPLES
    stream = np.concatenate([np.zeros(CARRY_SAMPLES, np.int16), pcm, np.zeros(max(0, need - len(pcm)), np.int16)])
    return np.lib.stride_tricks.sliding_window_view(stream, EXAMPLE_SAMPLES)[offset_samples::EXAMPLE_HOP_SAMPLES][
        :count
    ]


def score_streams(scorer: Scorer, pcms: Sequence[Int16Array], *, half_hop: bool = False) -> list[Float32Array]:
    """Each stream's family score at each example, in time order; with ``half_hop`` the examples across seams too."""
    runs = [
        examples_of(pcm, offset) for pcm in pcms for offset in ((0, EXAMPLE_HOP_SAMPLES // 2) if half_hop else (0,))
    ]
    lengths = [len(run) for run in runs]
    embeddings = np.concatenate([scorer.embed(np.ascontiguousarray(run)) for run in _grouped(runs)])
    scores = _window_scores(scorer, np.split(embeddings, np.cumsum(lengths)[:-1]))
    if not half_hop:
        return scores
    return [_interleave(scores[2 * i], scores[2 * i + 1]) for i in range(len(pcms))]


def _grouped(runs: Sequence[Int16Array], at_least: int = 512) -> list[Int16Array]:
    """Short runs joined, so that batches are full without all audio being copied at once."""
    groups: list[Int16Array] = []
    waiting: list[Int16Array] = []
    for run in runs:
        waiting.append(run)
        if sum(map(len, waiting)) >= at_least:
            groups.append(np.concatenate(waiting))
            waiting = []
    return [*groups, np.concatenate(waiting)] if waiting else groups


def _window_scores(scorer: Scorer, runs: Sequence[Float32Array]) -> list[Float32Array]:
    longest = scorer.window_examples
    family = [scorer.labels.index(label) for label in FAMILY]
    scores = []
    for run in runs:
        windows = np.zeros((len(run), longest, run.shape[1]), np.float32)
        frames = np.minimum(np.arange(1, len(run) + 1), longest).astype(np.int32)
        for k, count in enumerate(frames):
            windows[k, :count] = run[k + 1 - count : k + 1]
        scores.append(scorer.classify(windows, frames)[:, family].max(axis=1) if len(run) else np.zeros(0, np.float32))
    return scores


def _interleave(whole: Float32Array, seams: Float32Array) -> Float32Array:
    out = np.empty(len(whole) + len(seams), np.float32)
    out[0::2], out[1::2] = whole, seams
    return out


def score_recordings(scorer: Scorer, recordings: Sequence[Recording], *, half_hop: bool = False) -> list[Scored]:
    hop = EXAMPLE_HOP_SAMPLES // 2 if half_hop else EXAMPLE_HOP_SAMPLES
    scores = score_streams(scorer, [r.pcm for r in recordings], half_hop=half_hop)
    return [Scored(r, s, hop) for r, s in zip(recordings, scores, strict=True)]


def clip_threshold(scored: Sequence[Scored], share: float = CLIP_FALSE_ALARMS) -> float:
    """The score that at most ``share`` of the negative clips exceed."""
    peaks = np.sort([s.peak for s in scored if not s.recording.positive])[::-1]
    return float(peaks[int(share * len(peaks))])


def ambient_threshold(scored: Sequence[Scored]) -> float:
    """The largest score anywhere in continuous ambient audio: no threshold above it alerts there."""
    return max(s.peak for s in scored if is_continuous(s.recording))


def report(scored: Sequence[Scored], threshold: float) -> Report:
    """What ``threshold`` gives on these recordings."""
    negatives = [s for s in scored if not s.recording.positive]
    positives = [s for s in scored if s.recording.positive]
    sets = sorted({s.recording.set for s in positives})
    by_label: dict[str, tuple[int, int]] = {}
    for s in negatives:
        name = f"{s.recording.set}/{s.recording.label}"
        above, count = by_label.get(name, (0, 0))
        by_label[name] = (above + (s.peak > threshold), count + 1)
    ambient = [s for s in negatives if is_continuous(s.recording)]
    heard = [
        _heard(s, onset, threshold)
        for s in positives
        if s.recording.onsets_seconds
        for onset in s.recording.onsets_seconds
    ]
    return Report(
        threshold=threshold,
        clip_false_alarms=float(np.mean([s.peak > threshold for s in negatives])),
        recall={
            name: float(np.mean([s.peak > threshold for s in positives if s.recording.set == name])) for name in sets
        },
        tagged_shots_heard=float(np.mean(heard)) if heard else math.nan,
        false_alarms=by_label,
        ambient_alerts=int(sum(_rising(s.scores > threshold) for s in ambient)),
        ambient_hours=sum(len(s.recording.pcm) for s in ambient) / RATE_HZ / 3600,
    )


def is_continuous(recording: Recording) -> bool:
    """Minutes of one place, not clips of seconds: what false alarms an hour can be counted in."""
    return not recording.positive and recording.set == "ambient"


class Heard(Protocol):
    """A recording with its scores, example by example: ``Scored`` here, a ``Listening`` of the whole pipeline."""

    @property
    def recording(self) -> Recording: ...

    @property
    def scores(self) -> Float32Array: ...


def false_alert_peaks(streams: Sequence[Float32Array], hop_seconds: float, hold_seconds: float) -> tuple[float, ...]:
    """Loudest false alerts of continuous audio without gunfire, descending: at most 1,000 peaks.

    Scores above the level that one in fifty exceeds, those no further apart than ``hold_seconds`` taken as one alert.
    """
    if not streams:
        return ()
    level = float(np.quantile(np.concatenate(streams), 1.0 - _CLUSTERED_SHARE))
    peaks: list[float] = []
    for scores in streams:
        last = -math.inf
        for i in np.flatnonzero(scores > level):
            if (i - last) * hop_seconds > hold_seconds + hop_seconds:
                peaks.append(0.0)
            peaks[-1] = max(peaks[-1], float(scores[i]))
            last = float(i)
    return tuple(round(peak, 7) for peak in sorted(peaks, reverse=True)[:_MAX_PEAKS])


def false_alerts_section(heard: Sequence[Heard], hop_seconds: float, hold_seconds: float) -> FalseAlertsSection:
    """What a model package keeps of continuous audio. DataError where there is none."""
    continuous = [h for h in heard if is_continuous(h.recording)]
    if not continuous:
        raise DataError("No continuous recording without gunfire (set `ambient`): false alerts can't be counted.")
    hours = sum(len(h.recording.pcm) for h in continuous) / RATE_HZ / 3600
    peaks = false_alert_peaks([h.scores for h in continuous], hop_seconds, hold_seconds)
    return FalseAlertsSection(audio_hours=round(hours, 4), hop_seconds=hop_seconds, peaks=peaks)


def _heard(scored: Scored, onset_seconds: float, threshold: float) -> bool:
    """An example that holds the onset, or begins within 0.1 s after it, is above the threshold."""
    sample = onset_seconds * RATE_HZ
    starts = np.arange(len(scored.scores)) * scored.hop_samples - CARRY_SAMPLES
    near = (starts <= sample + 0.1 * RATE_HZ) & (sample < starts + EXAMPLE_SAMPLES)
    return bool(np.any(scored.scores[near] > threshold))


def _rising(above: npt.NDArray[np.bool_]) -> int:
    """Runs of True: alerts, not examples."""
    return int(np.sum(above & ~np.concatenate([[False], above[:-1]])))


def poisson_interval(count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact (Garwood) interval of a Poisson mean from one count."""
    from scipy.stats import chi2

    tail = (1 - confidence) / 2
    low = 0.0 if count == 0 else float(chi2.ppf(tail, 2 * count) / 2)
    return low, float(chi2.ppf(1 - tail, 2 * count + 2) / 2)


# --- traps ----------------------------------------------------------------------------------------------------------

_ROBUSTNESS: dict[str, Callable[[Int16Array], Int16Array]] = {
    "band limit 4 kHz": lambda pcm: float_to_int16(band_limit(pcm / 32768.0, 4_000.0)),
    "band limit 6 kHz": lambda pcm: float_to_int16(band_limit(pcm / 32768.0, 6_000.0)),
    "8 bit": lambda pcm: quantise(pcm / 32768.0, 8),
    "20 dB quieter": lambda pcm: float_to_int16(pcm / 32768.0 * 0.1),
}


def altered(recordings: Sequence[Recording], treatment: str) -> list[Recording]:
    """The same recordings as another recorder would have stored them. Raises ConfigError for an unknown treatment."""
    if treatment not in _ROBUSTNESS:
        raise ConfigError(f"Treatment {treatment!r} is unknown; there are {', '.join(_ROBUSTNESS)}.")
    change = _ROBUSTNESS[treatment]
    return [Recording(r.path, r.set, r.label, r.positive, change(r.pcm), r.onsets_seconds) for r in recordings]


def treatments() -> tuple[str, ...]:
    return tuple(_ROBUSTNESS)


CHOOSING_DRAWS = (0, 1, 2)
"""Where edges lie when a threshold is chosen by them."""
REPORTED_DRAWS = (3, 4)
"""Where they lie when it is judged: what is reported has chosen nothing."""


def edged(recordings: Sequence[Recording], edge: str, draws: Sequence[int]) -> list[Recording]:
    """The negatives, at most 20 s of each, with an edge in them that no sound has: each once for each of ``draws``.

    Raises ConfigError for an unknown edge.
    """
    if edge not in _EDGES:
        raise ConfigError(f"Edge {edge!r} is unknown; there are {', '.join(_EDGES)}.")
    change = _EDGES[edge]
    return [
        replace(r, pcm=change(np.random.default_rng([draw, crc32(r.path.encode())]), r.pcm[: 20 * RATE_HZ]))
        for draw in draws
        for r in recordings
        if not r.positive
    ]


def edges() -> tuple[str, ...]:
    """What any stream may hold: at the default threshold at most 2 % of the clips with one alert, and no ambient audio.

    So it is in the places of ``CHOOSING_DRAWS``, by which thresholds are chosen. ``OVERDRIVEN`` is only reported.
    """
    return tuple(edge for edge in _EDGES if edge != OVERDRIVEN)


def _woken(rng: np.random.Generator, pcm: Int16Array) -> Int16Array:
    """Digital silence, then sound, then digital silence."""
    pcm = pcm.copy()
    pcm[: int(rng.uniform(0.05, 0.5) * len(pcm))] = 0
    pcm[len(pcm) - int(rng.uniform(0.05, 0.3) * len(pcm)) :] = 0
    return pcm


def _woken_loud(rng: np.random.Generator, pcm: Int16Array) -> Int16Array:
    """As ``_woken``, so loud that its loudest 6 to 20 dB are clipped."""
    gain = 10 ** (rng.uniform(6, 20) / 20) / max(1.0, float(np.abs(pcm.astype(np.float64)).max()))
    return _woken(rng, float_to_int16(pcm * gain))


def _stepped(rng: np.random.Generator, pcm: Int16Array) -> Int16Array:
    """Up by 10 to 30 dB at some moment, to the level it had."""
    stepped = pcm / 32768.0
    stepped[: int(rng.uniform(0.2, 0.8) * len(pcm))] *= 10 ** (-rng.uniform(10, 30) / 20)
    return float_to_int16(stepped)


def _with_dropouts(rng: np.random.Generator, pcm: Int16Array) -> Int16Array:
    """Two to six gaps of 5 to 500 ms without a sample."""
    pcm = pcm.copy()
    for _ in range(rng.integers(2, 7)):
        start = int(rng.uniform(0, len(pcm)))
        pcm[start : start + int(10 ** rng.uniform(-2.3, -0.3) * RATE_HZ)] = 0
    return pcm


OVERDRIVEN = "waking from silence, clipped"
_EDGES: dict[str, Callable[[np.random.Generator, Int16Array], Int16Array]] = {
    "waking from silence": _woken,
    "a step of gain": _stepped,
    "dropouts": _with_dropouts,
    OVERDRIVEN: _woken_loud,
}
