"""Scenes of ten consecutive examples, with what each example holds. Third stage of the recipe.

A scene is a stretch of one stream: a background, events at chosen loudness above it, one recording chain over it all.
Labels belong to single examples, of which one begins every 0.12 s: "gunfire" means that a shot begins in this example,
so the tail of one that began earlier is no gunfire, and a shot that begins in the last moments of an example is left
undecided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import soxr

from detector.chunk import RATE_HZ
from detector.embedders.params import CARRY_SAMPLES, EXAMPLE_HOP_SAMPLES, EXAMPLE_SAMPLES
from trainer.compact import synthesis
from trainer.compact.channel import compress, record
from trainer.compact.pools import LABELS, Clip, Pool
from trainer.compact.synthesis import LEAD_SAMPLES

SCENE_EXAMPLES = 10
SCENE_SAMPLES = CARRY_SAMPLES + SCENE_EXAMPLES * EXAMPLE_HOP_SAMPLES
POSITIONS_A_HOP = 8
POSITION_HOP_SAMPLES = EXAMPLE_HOP_SAMPLES // POSITIONS_A_HOP
POSITIONS = (SCENE_SAMPLES - EXAMPLE_SAMPLES) // POSITION_HOP_SAMPLES + 1
"""Examples that a scene is cut into, the overlapping ones included."""
UNDECIDED_SAMPLES = RATE_HZ * 60 // 1000  # a shot this close to an example's end may or may not be heard in it
_AUTOMATIC_GAP_SAMPLES = RATE_HZ // 6
_QUIETEST_SNR_DB, _SURE_SNR_DB = -4.0, 6.0
# Log-mel's offset of 0.01 hides noise below about 5 int16 steps: power a bin, on the scale of ``_contrast_db``.
_UNSEEN_POWER = 10.0

FloatArray = npt.NDArray[np.float32]
GUNSHOT, MACHINE_GUN = LABELS.index("Gunshot, gunfire"), LABELS.index("Machine gun")
NOTHING = LABELS.index("Environmental noise")
_STARTS = np.arange(POSITIONS) * POSITION_HOP_SAMPLES
_FRAME = RATE_HZ // 50
_FOREST_SOURCE = "katsis"


@dataclass(frozen=True, slots=True)
class Scene:
    """A training scene.

    Attributes:
        pcm: ``(SCENE_SAMPLES,)`` int16.
        targets: ``(POSITIONS, labels)`` float32 0 or 1, of the examples that begin every ``POSITION_HOP_SAMPLES``.
        weights: ``(POSITIONS, labels)`` float32 in [0, 1]; 0 where nobody can say.
        kind: what was composed, for statistics.
    """

    pcm: npt.NDArray[np.int16]
    targets: FloatArray
    weights: FloatArray
    kind: str


@dataclass(slots=True)
class _Event:
    """A sound put into a scene: where, what, and its level against the background before the chain."""

    samples: FloatArray
    start: int
    label: int
    onsets: tuple[int, ...] = ()
    complete: bool = True
    sure: float = 1.0
    level_db: float = 0.0
    mixed: bool = False  # already part of the background


MIXTURES: Mapping[str, Mapping[str, float]] = {
    "mixed": {"live": 0.25, "single": 0.2, "forest": 0.08, "shots": 0.25, "look-alikes": 0.22},
    "close": {"live": 0.16, "single": 0.22, "forest": 0.04, "camera": 0.28, "shots": 0.15, "look-alikes": 0.15},
    "elsewhere": {"live": 0.28, "single": 0.22, "forest": 0.14, "shots": 0.14, "look-alikes": 0.22},
}
"""Mixture -> composition -> its share of the scenes. In "elsewhere" most of the single recordings,
whatever they hold, are moved to other places: echoes, reverberation, another speed."""


def compose(pool: Pool, seed: int, index: int, *, mixture: str = "mixed", codecs: bool = True) -> Scene:
    """Scene ``index`` of the data set that ``seed`` and ``mixture`` name: the same whenever and wherever it is made."""
    rng = np.random.default_rng([seed, index])
    composition = _composition(mixture, rng.random())
    moved = mixture == "elsewhere"
    if composition == "live":
        return _live_scene(rng, pool, codecs, moved=moved)
    if composition in ("single", "forest"):
        return _single_recording(rng, pool, codecs, forest=composition == "forest", moved=moved)
    if composition == "camera":
        return _camera_scene(rng, pool, codecs)
    has_shots = composition == "shots"
    background = _background(rng, pool)
    events: list[_Event] = []
    if has_shots:
        close = rng.random() < 0.55
        events += _shots(rng, pool, close=close)
    if rng.random() < (0.3 if has_shots else 0.85):
        events += _look_alikes(rng, pool, int(rng.integers(1, 5)))
    kind = "shots" if has_shots else "look-alikes" if events else "background"
    return _finish(rng, background, events, kind, codecs)


def is_as_recorded(seed: int, index: int, mixture: str = "mixed") -> bool:
    """Whether that scene is one recording (live fire, a clip, a camera's) and not mixed from several."""
    return _composition(mixture, np.random.default_rng([seed, index]).random()) not in ("shots", "look-alikes")


def _composition(mixture: str, draw: float) -> str:
    below = 0.0
    for name, share in MIXTURES[mixture].items():
        below += share
        if draw < below:
            return name
    return name


# --- what is in the scene -------------------------------------------------------------------------------------------


def _background(rng: np.random.Generator, pool: Pool) -> FloatArray:
    """One or two recorded backgrounds, or made noise or babble; RMS 1, but for a machine in some of them.

    A machine's hum may be far louder than all the rest and hide little of it: events are set against the rest, and
    shots that it hides after all are found by their contrast. Other labels count it as nothing.
    """
    x = _without_machine(rng, pool)
    if rng.random() < 0.2:
        x = x + np.float32(10 ** (rng.uniform(-10, 25) / 20)) * synthesis.machinery(rng, SCENE_SAMPLES)
    return x


def _without_machine(rng: np.random.Generator, pool: Pool) -> FloatArray:
    x = np.zeros(SCENE_SAMPLES, np.float32)
    for _ in range(1 if rng.random() < 0.7 else 2):
        draw = rng.random()
        if draw < 0.72:
            layer = _looped(rng, pool.samples(_choose(rng, pool, "background")))
        elif draw < 0.9:
            layer = synthesis.coloured_noise(rng, SCENE_SAMPLES)
        else:
            layer = synthesis.babble(rng, SCENE_SAMPLES / RATE_HZ + 0.01)[:SCENE_SAMPLES]
        rms = np.sqrt(np.mean(layer**2))
        if rms > 0:
            x += layer / rms * np.float32(10 ** (rng.uniform(-12, 0) / 20))
    if (rms := np.sqrt(np.mean(x**2))) < 1e-6:
        return synthesis.coloured_noise(rng, SCENE_SAMPLES)
    return np.asarray(x / rms, np.float32)


def _choose(rng: np.random.Generator, pool: Pool, kind: str, source: str | None = None) -> Clip:
    """A clip of ``kind``: first a source, if none is given, then a clip of it, so that no big one drowns the small."""
    clips = pool.of_kind(kind)
    if source is None:
        sources = sorted({clip.path.split("/")[0] for clip in clips})
        source = sources[rng.integers(len(sources))]
    mine = [clip for clip in clips if clip.path.startswith(source + "/")]
    return mine[rng.integers(len(mine))]


def _looped(rng: np.random.Generator, x: FloatArray) -> FloatArray:
    """``SCENE_SAMPLES`` of a recording from a random place on, repeated with crossfades where it is shorter."""
    if len(x) > SCENE_SAMPLES:
        start = rng.integers(len(x) - SCENE_SAMPLES)
        return x[start : start + SCENE_SAMPLES]
    fade = min(RATE_HZ // 10, len(x) // 4)
    ramp = np.linspace(0, 1, fade, dtype=np.float32)
    period = len(x) - fade
    piece = x[:period].copy()
    piece[:fade] = piece[:fade] * ramp + x[period:] * (1 - ramp)
    return np.roll(np.tile(piece, SCENE_SAMPLES // period + 1)[:SCENE_SAMPLES], rng.integers(SCENE_SAMPLES))


def _shots(rng: np.random.Generator, pool: Pool, *, close: bool) -> list[_Event]:
    """One to three groups of shots from one gun or recording, each in its place, near or far."""
    draw = rng.random()
    if draw < 0.3:
        return [_recorded(rng, pool, _choose(rng, pool, "shot"), close)]
    place = str(rng.choice(["open", "urban", "forest", "indoor"], p=[0.2, 0.4, 0.25, 0.15]))
    distance = float(np.exp(rng.uniform(np.log(2), np.log(60)) if close else rng.uniform(np.log(40), np.log(1500))))
    response = synthesis.place_response(rng, place, 2.5 if place != "indoor" else 1.5)
    if not close and rng.random() < 0.3:
        response[0] *= rng.uniform(0.05, 0.5)  # no line of sight
    events = []
    start = int(rng.integers(0, SCENE_SAMPLES // 2))
    for _ in range(rng.integers(1, 4)):
        kind = str(rng.choice(["single", "aimed", "automatic"], p=[0.4, 0.25, 0.35] if close else [0.5, 0.3, 0.2]))
        times = synthesis.burst_times(rng, kind)
        single = _dry_excerpt(rng, pool) if draw < 0.6 else None
        dry, onsets = _volley(rng, times, distance, single, close)
        wet = synthesis.convolve(dry, response)
        if close and rng.random() < 0.7:
            wet = _camera(rng, wet)
        events.append(_Event(wet, start, GUNSHOT, onsets, level_db=_loudness(rng, close)))
        start += onsets[-1] + int(rng.uniform(0.3, 4.0) * RATE_HZ)
        if start > SCENE_SAMPLES - RATE_HZ:
            break
    for event in events[1:]:
        event.level_db = events[0].level_db + rng.uniform(-4, 4)
    return events


def _volley(
    rng: np.random.Generator,
    times: npt.NDArray[np.float64],
    distance: float,
    single: FloatArray | None,
    close: bool,
) -> tuple[FloatArray, tuple[int, ...]]:
    """A dry sequence of shots that differ a little, and the sample where each begins."""
    if single is None:
        variants = [synthesis.shot(rng, distance, supersonic=bool(rng.random() < 0.4))[0]]
        onset = LEAD_SAMPLES
    else:
        variants, onset = [synthesis.air_absorption(single, max(0.0, distance - 20.0))], LEAD_SAMPLES
    longest = max(map(len, variants))
    starts = (times * RATE_HZ).astype(int)
    starts = starts[starts < SCENE_SAMPLES]
    out = np.zeros(int(starts[-1]) + longest + RATE_HZ // 4, np.float32)
    for start in starts:
        wave = variants[rng.integers(len(variants))]
        out[start : start + len(wave)] += np.float32(rng.uniform(0.7, 1.0)) * wave
        if close and rng.random() < 0.4:
            clatter = synthesis.action_clatter(rng)[: len(out) - start]
            out[start : start + len(clatter)] += np.float32(rng.uniform(0.005, 0.08)) * clatter
    return out, tuple(int(s) + onset for s in starts)


def _dry_excerpt(rng: np.random.Generator, pool: Pool) -> FloatArray:
    """One recorded shot cut out, up to 0.5 s, faded: to be fired again in other rhythms and places."""
    clips = [clip for clip in pool.of_kind("shot") if not clip.weak]
    close_sources = ("ffsl", "kabealo", "sesa")
    source = close_sources[rng.integers(3)]
    mine = [clip for clip in clips if clip.path.startswith(source)]
    clip = mine[rng.integers(len(mine))]
    x = pool.samples(clip)
    i = int(rng.integers(len(clip.onsets)))
    begin = max(0, clip.onsets[i] - LEAD_SAMPLES)
    after = [o for o in clip.onsets if o > clip.onsets[i] + RATE_HZ // 10]
    end = min(len(x), begin + RATE_HZ // 2, (after[0] - 80) if after else len(x))
    piece = np.concatenate([np.zeros(max(0, LEAD_SAMPLES - clip.onsets[i]), np.float32), x[begin:end]])
    fade = min(len(piece) // 2, RATE_HZ // 12)
    piece[len(piece) - fade :] *= np.linspace(1, 0, fade, dtype=np.float32) ** 2
    return np.asarray(piece / (np.max(np.abs(piece)) + np.float32(1e-9)), np.float32)


def _camera(rng: np.random.Generator, wet: FloatArray) -> FloatArray:
    """A camera's limiter on a close shot: blast and reverberation end up nearly as loud as each other, for long."""
    wet = compress(
        wet / (np.max(np.abs(wet)) + np.float32(1e-9)),
        threshold_db=rng.uniform(-50, -20),
        ratio=float(rng.choice([4.0, 10.0, 100.0])),
        attack_seconds=float(10 ** rng.uniform(-3.5, -2)),
        release_seconds=float(10 ** rng.uniform(-1.7, 0.0)),
    )
    limit = np.max(np.abs(wet)) * np.float32(10 ** (-rng.uniform(0, 24) / 20))
    return np.clip(wet, -limit, limit)


def _camera_scene(rng: np.random.Generator, pool: Pool, codecs: bool) -> Scene:
    """What happens close to a phone or camera, as it keeps it: near full scale, limited, clipped, tilted.

    Six in ten hold shots, in bursts that may fill whole examples with no quiet before an onset; the others what else
    is loud and close, through the same chain.
    """
    floor = np.float32(10 ** (rng.uniform(-50, -18) / 20))
    x = floor * _background(rng, pool)
    events: list[_Event] = []
    response = synthesis.place_response(rng, str(rng.choice(["open", "urban", "forest", "indoor"])), 1.5)
    response[1:] *= np.float32(10 ** (rng.uniform(-30, -3) / 20))
    has_shots = rng.random() < 0.6
    if has_shots:
        start = int(rng.uniform(-1.0, 3.0) * RATE_HZ)
        kind = str(rng.choice(["single", "aimed", "automatic"], p=[0.25, 0.35, 0.4]))
        single = _close_shot(rng, pool)
        pause = rng.uniform(0.1, 3.0)
        while start < SCENE_SAMPLES - RATE_HZ // 4:
            dry, onsets = _volley(rng, synthesis.burst_times(rng, kind), 5.0, single, close=True)
            wet = synthesis.convolve(dry, response)
            wet /= np.max(np.abs(wet)) + np.float32(1e-9)
            events.append(_Event(wet, start, GUNSHOT, onsets, mixed=True))
            start += onsets[-1] + int((pause * rng.uniform(0.5, 1.5) + rng.uniform(0.08, 0.3)) * RATE_HZ)
    else:
        for event in _look_alikes(rng, pool, int(rng.integers(1, 9))):
            wet = event.samples / (np.max(np.abs(event.samples)) + np.float32(1e-9))
            events.append(_Event(wet * np.float32(rng.uniform(0.2, 1.0)), event.start, event.label, mixed=True))
    for event in events:
        begin, end = max(0, event.start), min(SCENE_SAMPLES, event.start + len(event.samples))
        if end > begin:
            x[begin:end] += event.samples[begin - event.start : end - event.start]
        event.level_db = max(6.0, 20 * np.log10(_loudest_rms(event.samples) / floor + 1e-9))
    low = synthesis.low_passed(x, rng.uniform(500, 2000))
    x = low + np.float32(10 ** (rng.uniform(-9, 6) / 20)) * (x - low)
    x /= np.max(np.abs(x)) + np.float32(1e-9)
    if rng.random() < 0.6:
        x = compress(
            x,
            threshold_db=rng.uniform(-35, -5),
            ratio=float(rng.choice([4.0, 20.0])),
            attack_seconds=float(10 ** rng.uniform(-3.5, -2)),
            release_seconds=float(10 ** rng.uniform(-1.7, 0.0)),
        )
    limit = np.max(np.abs(x)) * np.float32(10 ** (-rng.uniform(0, 26) / 20))
    return _finish(rng, np.clip(x, -limit, limit) / floor, events, "camera", codecs, loud=True)


def _close_shot(rng: np.random.Generator, pool: Pool) -> FloatArray:
    """A shot close by, dry: made as noise, recorded, or made from blast and shock wave."""
    draw = rng.random()
    if draw < 0.55:
        return synthesis.close_report(rng)
    return _dry_excerpt(rng, pool) if draw < 0.8 else synthesis.shot(rng, float(rng.uniform(2, 40)))[0]


def _recorded(rng: np.random.Generator, pool: Pool, clip: Clip, close: bool) -> _Event:
    """A whole recording of shots, sometimes moved into another place."""
    x = pool.samples(clip)
    if len(x) > SCENE_SAMPLES:
        x = x[:SCENE_SAMPLES]
    start = int(rng.integers(-len(x) // 3, SCENE_SAMPLES - RATE_HZ))
    if not clip.weak and rng.random() < 0.4:
        distance = rng.uniform(0, 400)
        x = synthesis.air_absorption(x, distance)
        response = synthesis.place_response(rng, str(rng.choice(["open", "urban", "forest", "indoor"])), 1.5)
        x = synthesis.convolve(x, response)
    if close and not clip.weak and rng.random() < 0.6:
        x = _camera(rng, x)
    level = rng.uniform(8, 50) if not clip.weak else rng.uniform(6, 30)
    return _Event(x, start, GUNSHOT, clip.onsets, clip.complete, 0.7 if clip.weak else 1.0, level)


def _loudness(rng: np.random.Generator, close: bool) -> float:
    return float(rng.uniform(8, 55) if close else rng.uniform(-4, 32))


_MADE: tuple[tuple[Callable[[np.random.Generator], FloatArray], str, float], ...] = (
    (synthesis.firework, "Fireworks", 4.0),
    (synthesis.firecrackers, "Firecracker", 1.5),
    (synthesis.door_slam, "Door", 1.5),
    (synthesis.knocks, "Knock", 1.0),
    (synthesis.metal_hit, "Generic impact sounds", 1.0),
    (synthesis.claps, "Clapping", 1.0),
    (synthesis.thunder, "Thunder", 1.5),
    (synthesis.explosion, "Explosion", 0.7),
    (synthesis.backfire, "Generic impact sounds", 0.7),
    (synthesis.clicks, "Generic impact sounds", 1.5),
    (synthesis.hits, "Generic impact sounds", 3.0),
    (synthesis.pop_and_hiss, "Generic impact sounds", 1.0),
    (synthesis.shatter, "Glass", 1.5),
    (synthesis.creak, "Door", 1.5),
    (synthesis.applause, "Clapping", 1.0),
    (synthesis.pneumatic_tool, "Generic impact sounds", 3.0),
    (synthesis.hammering, "Generic impact sounds", 2.0),
    (synthesis.drums, "Generic impact sounds", 1.0),
    (synthesis.drops, "Generic impact sounds", 1.0),
)
_RECORDED_WEIGHT = {"Fireworks": 4.0, "Clapping": 2.0, "Thunder": 2.0, "Knock": 2.0, "Glass": 2.0, "Door": 1.0}


def _look_alikes(rng: np.random.Generator, pool: Pool, count: int) -> list[_Event]:
    """Sounds that are no gunfire, recorded and made, near and far."""
    events = []
    for _ in range(count):
        if rng.random() < 0.6:
            clip = _weighted_event(rng, pool)
            x, label = pool.samples(clip), clip.label
        else:
            weights = np.array([w for _, _, w in _MADE])
            make, name, _ = _MADE[rng.choice(len(_MADE), p=weights / weights.sum())]
            x, label = make(rng), LABELS.index(name)
        if len(x) > 6 * RATE_HZ:
            begin = int(rng.integers(len(x) - 6 * RATE_HZ))
            x = x[begin : begin + 6 * RATE_HZ]
        if rng.random() < 0.5:
            place = str(rng.choice(["open", "urban", "forest", "indoor"]))
            distance = float(np.exp(rng.uniform(np.log(2), np.log(800))))
            x = synthesis.convolve(synthesis.air_absorption(x, distance), synthesis.place_response(rng, place, 1.5))
        if rng.random() < 0.2:
            x = _camera(rng, x)
        start = int(rng.integers(-len(x) // 3, SCENE_SAMPLES - RATE_HZ // 2))
        events.append(_Event(x, start, label, level_db=float(rng.uniform(-4, 50))))
    return events


def _weighted_event(rng: np.random.Generator, pool: Pool) -> Clip:
    clips = pool.of_kind("event")
    names = ["" if clip.label < 0 else LABELS[clip.label] for clip in clips]
    counts = {name: names.count(name) for name in set(names)}
    weights = np.array([_RECORDED_WEIGHT.get(name, 3.0) / counts[name] for name in names])
    return clips[rng.choice(len(clips), p=weights / weights.sum())]


# --- putting it together --------------------------------------------------------------------------------------------


def _finish(
    rng: np.random.Generator,
    background: FloatArray,
    events: Sequence[_Event],
    kind: str,
    codecs: bool,
    *,
    loud: bool = False,
) -> Scene:
    """Mix (background RMS 1, each event by the RMS of its loudest 20 ms), record, and say what each example holds."""
    x = background.copy()
    placed: list[_Event] = []
    for event in events:
        if event.mixed:
            placed.append(event)
            continue
        loudest = _loudest_rms(event.samples)
        if loudest <= 0:
            continue
        gain = np.float32(10 ** (event.level_db / 20) / loudest)
        begin, end = max(0, event.start), min(SCENE_SAMPLES, event.start + len(event.samples))
        if end <= begin:
            continue
        x[begin:end] += gain * event.samples[begin - event.start : end - event.start]
        placed.append(event)
    recording = record(rng, x, codecs=codecs, loud=loud)
    # What the chain adds hides quiet events too: its noise in scene units.
    chain_noise_db = recording.noise_dbfs - recording.gain_db
    hidden_db = max(0.0, float(10 * np.log10(1.0 + 10 ** (chain_noise_db / 10))))
    targets = np.zeros((POSITIONS, len(LABELS)), np.float32)
    weights = np.ones((POSITIONS, len(LABELS)), np.float32)
    active = np.zeros(POSITIONS, np.bool_)
    heard_share = np.concatenate([[0], np.cumsum(recording.audible)])
    heard_share = (heard_share[_STARTS + EXAMPLE_SAMPLES] - heard_share[_STARTS]) / EXAMPLE_SAMPLES
    for event in placed:
        snr_db = event.level_db - hidden_db
        sure = event.sure * float(np.clip((snr_db - _QUIETEST_SNR_DB) / (_SURE_SNR_DB - _QUIETEST_SNR_DB), 0, 1))
        if event.label == GUNSHOT:
            contrast_db = _contrast_db(recording.pcm, np.array(event.onsets) + event.start)
            sure *= float(np.clip((contrast_db - 2.0) / 3.0, 0, 1))
            active |= _mark_shots(event, sure, recording.audible, targets, weights)
        elif event.label >= 0:
            active |= _mark_other(event, snr_db, heard_share, targets, weights)
        else:
            active |= snr_db > 0
    targets[:, NOTHING] = ~active
    return Scene(recording.pcm, targets, weights, kind)


def _contrast_db(pcm: npt.NDArray[np.int16], onsets: npt.NDArray[np.int64]) -> float:
    """How far the clearest onset rises, in the band where it rises most, above the 80 ms before it: as recorded."""
    before, after = RATE_HZ * 80 // 1000, RATE_HZ * 50 // 1000
    frequencies_hz = np.fft.rfftfreq(2048, 1.0 / RATE_HZ)
    best = 0.0
    for onset in onsets[(onsets >= before) & (onsets < SCENE_SAMPLES - after)]:
        powers = [
            np.abs(np.fft.rfft(piece * np.hanning(len(piece)), 2048)) ** 2 / len(piece)
            for piece in (pcm[onset - before : onset], pcm[onset - 80 : onset + after])
        ]
        for low, high in ((100, 350), (350, 900), (900, 2500), (2500, 6000)):
            band = (frequencies_hz >= low) & (frequencies_hz < high)
            earlier, later = (float(np.mean(power[band])) + _UNSEEN_POWER for power in powers)
            best = max(best, 10 * np.log10(later / earlier))
    return best


def _mark_shots(
    event: _Event, sure: float, audible: npt.NDArray[np.bool_], targets: FloatArray, weights: FloatArray
) -> npt.NDArray[np.bool_]:
    """Mark the examples in which shots of ``event`` begin; returns those the event reaches into."""
    onsets = np.array(event.onsets, np.int64) + event.start
    inside = np.sort(onsets[(onsets >= 0) & (onsets < SCENE_SAMPLES)])
    heard, cut = inside[audible[inside]], inside[~audible[inside]]
    stops = _STARTS + EXAMPLE_SAMPLES
    touched = (event.start < stops) & (event.start + len(event.samples) > _STARTS)

    def any_between(moments: npt.NDArray[np.int64], begin: npt.NDArray[np.int64], end: npt.NDArray[np.int64]) -> Any:
        return np.searchsorted(moments, end) > np.searchsorted(moments, begin)

    first, last = np.searchsorted(heard, _STARTS), np.searchsorted(heard, stops - UNDECIDED_SAMPLES)
    undecided = any_between(heard, _STARTS - UNDECIDED_SAMPLES, stops) | any_between(cut, _STARTS - RATE_HZ // 2, stops)
    if not event.complete:
        undecided |= touched
    shot = last > first
    for k in np.flatnonzero(shot):
        here = heard[first[k] : last[k]]
        automatic = len(here) >= 3 and np.median(np.diff(here)) < _AUTOMATIC_GAP_SAMPLES
        targets[k, MACHINE_GUN] = float(automatic)
        weights[k, MACHINE_GUN] = sure if event.complete else 0.0
    targets[shot, GUNSHOT], weights[shot, GUNSHOT] = 1.0, sure
    for column in (GUNSHOT, MACHINE_GUN):
        weights[undecided & ~shot & (targets[:, GUNSHOT] == 0), column] = 0.0
    return np.asarray(touched, np.bool_)


def _mark_other(
    event: _Event, snr_db: float, heard_share: npt.NDArray[np.floating], targets: FloatArray, weights: FloatArray
) -> npt.NDArray[np.bool_]:
    """Mark the examples in which another event sounds (its level, example by example, within 12 dB of its loudest)."""
    powers = _frame_powers(event.samples)
    loudest = powers.max(initial=1e-30)
    begins = np.maximum(0, _STARTS - event.start)
    stops = np.minimum(len(event.samples), _STARTS + EXAMPLE_SAMPLES - event.start)
    touched = (stops > begins) & (begins < len(event.samples))
    for k in np.flatnonzero(touched):
        here = powers[begins[k] // _FRAME : -(-stops[k] // _FRAME)].max()
        here_db = 10 * np.log10(here / loudest + 1e-12)
        if snr_db + here_db > 6 and here_db > -12 and heard_share[k] > 0.5:
            targets[k, event.label] = 1.0
            weights[k, event.label] = 1.0
        elif snr_db + here_db > -6 and targets[k, event.label] == 0:
            weights[k, event.label] = 0.0
    return np.asarray(touched, np.bool_)


def moved_elsewhere(
    rng: np.random.Generator, x: FloatArray, onsets: tuple[int, ...]
) -> tuple[FloatArray, tuple[int, ...]]:
    """A whole recording as another place and another size of the same thing would give it; silence stays silence."""
    if rng.random() < 0.5:
        factor = rng.uniform(0.87, 1.15)
        x = soxr.resample(x, RATE_HZ, RATE_HZ * factor).astype(np.float32)
        onsets = tuple(round(onset * factor) for onset in onsets)
    if rng.random() < 0.7:
        silent = _runs(x == 0, RATE_HZ // 5)
        response = synthesis.place_response(rng, str(rng.choice(["urban", "forest", "open"], p=[0.6, 0.25, 0.15])), 1.5)
        x = np.where(silent, np.float32(0), synthesis.convolve(x, response)[: len(x)])
    return x, onsets


def _live_scene(rng: np.random.Generator, pool: Pool, codecs: bool, *, moved: bool = False) -> Scene:
    """A live-fire file framed anew, sometimes with more noise, air or a look-alike on top; padding stays silent."""
    clip = _choose(rng, pool, "live")
    recorded, clip_onsets = pool.samples(clip), clip.onsets
    if moved:
        recorded, clip_onsets = moved_elsewhere(rng, recorded, clip_onsets)
    shift = int(rng.integers(-EXAMPLE_HOP_SAMPLES, EXAMPLE_HOP_SAMPLES))
    x = np.zeros(SCENE_SAMPLES, np.float32)
    begin, end = max(0, shift), min(SCENE_SAMPLES, shift + len(recorded))
    x[begin:end] = recorded[begin - shift : end - shift]
    quiet = x[x != 0]
    noise_rms = float(np.median(np.abs(quiet)) / 0.67) if len(quiet) else 1e-3
    x /= np.float32(noise_rms + 1e-9)
    padding = x == 0
    events: list[_Event] = []
    if rng.random() < 0.35:
        x = synthesis.air_absorption(x, rng.uniform(10, 400))
    extra_db = 0.0
    if rng.random() < 0.6:
        noise_db = rng.uniform(-15, 12)
        x = x + np.float32(10 ** (noise_db / 20)) * _background(rng, pool)
        extra_db = float(10 * np.log10(1 + 10 ** (noise_db / 10)))
    if rng.random() < 0.2:
        events = _look_alikes(rng, pool, 1)
    if rng.random() < 0.5:
        x = np.where(_runs(padding, RATE_HZ // 5), np.float32(0), x)
    onsets = tuple(o + shift for o in clip_onsets)
    shots = _Event(np.zeros(SCENE_SAMPLES, np.float32), 0, GUNSHOT, onsets, clip.complete, mixed=True)
    shots.level_db = max(4.0, 20 * np.log10(_loudest_rms(np.where(padding, 0, x)) + 1e-9)) - extra_db
    scene = _finish(rng, x, [shots, *events], "live", codecs)
    weights = scene.weights.copy()
    weights[:, NOTHING] = 0.0
    # Nothing was tagged before the first tag, so there is nothing to be unsure of.
    weights[min(onsets) > _STARTS + EXAMPLE_SAMPLES, GUNSHOT] = 1.0
    return Scene(scene.pcm, scene.targets, weights, "live")


def _single_recording(
    rng: np.random.Generator, pool: Pool, codecs: bool, *, forest: bool = False, moved: bool = False
) -> Scene:
    """One recording as it is, in digital silence or on repeat: how clips are kept, whatever they hold.

    ``forest``: one of the recorders in a forest, with a distant shot or without.
    """
    if forest:
        kind = ("shot", "background")[int(rng.integers(2))]
        clip = _choose(rng, pool, kind, _FOREST_SOURCE)
    else:
        kind = str(rng.choice(["event", "background", "shot"], p=[0.42, 0.23, 0.35]))
        clip = _weighted_event(rng, pool) if kind == "event" and rng.random() < 0.5 else _choose(rng, pool, kind)
    recorded, onsets = pool.samples(clip), clip.onsets
    if moved:
        recorded, onsets = moved_elsewhere(rng, recorded, onsets)
    if len(recorded) > SCENE_SAMPLES:
        begin = int(rng.integers(len(recorded) - SCENE_SAMPLES))
        onsets = tuple(o - begin for o in onsets)
        recorded = recorded[begin : begin + SCENE_SAMPLES]
    start = int(rng.integers(0, SCENE_SAMPLES - len(recorded) + 1)) if rng.random() < 0.6 else 0
    x = np.zeros(SCENE_SAMPLES, np.float32)
    x[start : start + len(recorded)] = recorded
    if kind == "background" and len(recorded) < SCENE_SAMPLES:
        x = _looped(rng, recorded)
    noise_rms = float(np.median(np.abs(recorded)) / 0.67) + 1e-6
    x /= np.float32(noise_rms)
    if kind == "background":
        return _finish(rng, x, [], "single", codecs)
    event = _Event(recorded, start, clip.label, onsets, clip.complete, 0.8 if clip.weak else 1.0, mixed=True)
    event.level_db = max(6.0, 20 * np.log10(_loudest_rms(x) + 1e-9))
    return _finish(rng, x, [event], "single", codecs)


def _runs(mask: npt.NDArray[np.bool_], at_least: int) -> npt.NDArray[np.bool_]:
    """Only those runs of True that are ``at_least`` long."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    out = np.zeros_like(mask)
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        if end - begin >= at_least:
            out[begin:end] = True
    return out


def _frame_powers(x: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Mean power of each 20 ms; the last filled up with zeros."""
    return np.asarray(np.mean(np.pad(x, (0, -len(x) % _FRAME)).reshape(-1, _FRAME) ** 2, axis=1))


def _loudest_rms(x: npt.NDArray[np.floating]) -> float:
    """RMS of the loudest 20 ms."""
    return float(np.sqrt(np.max(_frame_powers(x)))) if len(x) else 0.0
