"""A synthetic city: sensors, events, the sound's way between them, and the truth about it.

A scene comes from a YAML script (``load_scene``) or from a seed (``random_scene``). ``SceneRenderer`` renders it chunk
by chunk: delay by distance, spherical spreading, absorption by air, a reflection from the ground, echoes from
facades, a reverberant tail and a noise floor for each sensor. The same scene gives the same samples, on any machine
with the same numpy and scipy. ``play_scene`` publishes them and writes the ground truth as JSON lines:

* first ``{"record": "scene", "start_ns", "seconds", "seed", "sensors": [{"stream_id", "x", "y", "z", "noise_dbfs"}]}``
* then for each event, when its sound begins, ``{"record": "event", "event_id", "kind", "gunfire", "at_seconds",
  "at_ns", "x", "y", "z", "shots", "sensors": [{"stream_id", "session", "distance_metres", "arrival_seconds",
  "arrival_ns", "arrival_sample", "arrivals_seconds", "shock_seconds", "peak_dbfs", "audible"}]}``
* last ``{"record": "end", "seconds", "events"}``.

``arrival_*`` is the first sound of the event at the sensor (a bullet's shock wave can be before the muzzle's blast; of
a firework its report, not its whistle); ``arrivals_seconds`` one blast for each shot. Seconds and samples count from
the scene's start, nanoseconds are Unix time. An event whose sound comes after the scene's end misses at that sensor.
``audible``: the peak stands at least 20 dB over the sensor's noise (RMS).
"""

from __future__ import annotations

import heapq
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from scipy import signal

from detector.audio import Int16Array, float_to_int16
from detector.chunk import CHUNK_SAMPLES, CHUNK_SECONDS, RATE_HZ, Location
from detector.errors import ConfigError, SourceError
from detector.synthesis import (
    SPEED_OF_SOUND_METRES_PER_SECOND,
    Ambience,
    air_absorption,
    babble,
    burst,
    firecrackers,
    firework,
    muzzle_blast,
    pascal_to_full_scale,
    reverberation,
    shock_arrival,
    shock_wave,
    thunder,
    traffic,
)
from producers.publish import Publisher
from producers.source import NS, Block, samples_to_ns

_log = logging.getLogger(__name__)

Kind = Literal["shot", "burst", "automatic", "firework", "firecrackers", "thunder", "traffic", "babble"]
GUNFIRE: tuple[Kind, ...] = ("shot", "burst", "automatic")
AUDIBLE_DB = 20.0
MAX_SENSORS = 1000
MAX_SCRIPT_BYTES = 1 << 20
_LEAD_SAMPLES = 8
_METRES_PER_DEGREE = 111_320.0

FloatArray = npt.NDArray[np.float64]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Metres = Annotated[float, Field(ge=-20_000, le=20_000)]


class Sensor(_Value):
    """A microphone on a roof or pole. ``noise_db``: RMS sound pressure level of its place."""

    id: Annotated[str, Field(min_length=1, max_length=200)]
    x: Metres
    y: Metres
    z: Metres = 6.0
    noise_db: Annotated[float, Field(ge=0, le=110)] = 55.0


class Event(_Value):
    """Something that sounds from ``at_seconds`` on at one place.

    ``shots``, ``interval_seconds``: of a burst or automatic fire. ``level_db``: peak level at 1 m of a shot, None =
    drawn. ``mach``: bullet speed over that of sound, 0 = no shock wave. ``heading_degrees``: line of fire, from x
    towards y. ``duration_seconds``: of traffic and babble.
    """

    kind: Kind
    at_seconds: Annotated[float, Field(ge=0, le=1e9)]
    x: Metres
    y: Metres
    z: Metres = 1.5
    shots: Annotated[int, Field(ge=1, le=500)] = 1
    interval_seconds: Annotated[float, Field(gt=0, le=60)] = 0.4
    level_db: Annotated[float, Field(ge=60, le=200)] | None = None
    mach: Annotated[float, Field(ge=0, le=5)] = 0.0
    heading_degrees: Annotated[float, Field(ge=-360, le=360)] = 0.0
    duration_seconds: Annotated[float, Field(gt=0, le=600)] = 8.0

    @property
    def gunfire(self) -> bool:
        return self.kind in GUNFIRE


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


class Scene(_Value):
    """A city. ``seconds`` None: without end (the events may end)."""

    sensors: Annotated[tuple[Sensor, ...], BeforeValidator(_tuple), Field(min_length=1, max_length=MAX_SENSORS)]
    events: Annotated[tuple[Event, ...], BeforeValidator(_tuple), Field(max_length=100_000)] = ()
    seconds: Annotated[float, Field(gt=0, le=1e9)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**63)] = 0
    full_scale_db: Annotated[float, Field(ge=80, le=180)] = 120.0  # peak level at which the microphones overload
    decay_seconds: Annotated[float, Field(ge=0.05, le=5)] = 1.1  # of the streets: time in which sound falls by 60 dB
    random_events: bool = False  # after those listed, events without end drawn from the seed

    def schedule(self) -> Iterator[Event]:
        """All events by time."""
        listed = sorted(self.events, key=lambda e: e.at_seconds)
        if not self.random_events:
            return iter(listed)
        drawn = _random_events(np.random.default_rng([self.seed, 1]), self.sensors, self.seconds)
        return heapq.merge(listed, drawn, key=lambda e: e.at_seconds)


def random_scene(
    *,
    sensors: int = 6,
    seconds: float | None = 40.0,
    seed: int = 1,
    prefix: str = "sensor-",
    spacing_metres: float = 150.0,
    decay_seconds: float = 1.1,
) -> Scene:
    """A city from a seed: sensors on a jittered grid; shots, look-alikes and background at random times and places.

    Raises ConfigError for less than 1 or more than 1,000 sensors, and for other values that make no scene.
    """
    rng = np.random.default_rng([seed, 0])
    columns = max(1, math.ceil(math.sqrt(max(1, sensors))))
    width = len(str(sensors))
    places = []
    for i in range(min(sensors, MAX_SENSORS + 1)):
        x, y = (spacing_metres * (cell + rng.uniform(-0.25, 0.25)) for cell in (i % columns, i // columns))
        places.append(
            {
                "id": f"{prefix}{i + 1:0{width}}",
                "x": round(x, 1),
                "y": round(y, 1),
                "z": round(rng.uniform(4, 20), 1),
                "noise_db": round(rng.uniform(50, 60), 1),
            }
        )
    return _scene(
        {
            "sensors": places,
            "seconds": seconds,
            "seed": seed,
            "decay_seconds": decay_seconds,
            "random_events": True,
        },
        "The random scene",
    )


def load_scene(path: Path) -> Scene:
    """Read a script: the fields of ``Scene`` as YAML. Raises ConfigError naming the file and each wrong field."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_SCRIPT_BYTES + 1)
    except OSError as e:
        raise ConfigError(f"{path}: can't be read: {e.strerror}.") from None
    if len(text) > MAX_SCRIPT_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_SCRIPT_BYTES} bytes.")
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: is no valid YAML: {' '.join(str(e).split())}.") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds no mapping; a scene has {', '.join(Scene.model_fields)}.")
    return _scene(tree, str(path))


def _scene(tree: dict[str, Any], name: str) -> Scene:
    try:
        scene = Scene.model_validate(tree)
    except ValidationError as e:
        lines = [f"{name}: {'.'.join(map(str, one['loc']))}: {one['msg']}." for one in e.errors()[:20]]
        raise ConfigError("\n".join(lines)) from None
    ids = [sensor.id for sensor in scene.sensors]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise ConfigError(f"{name}: sensors: the id {twice[0]!r} stands twice; each sensor has its own.")
    return scene


def _random_events(rng: np.random.Generator, sensors: Sequence[Sensor], seconds: float | None) -> Iterator[Event]:
    """Impulsive events one after another, at least 3 s apart, over a background of traffic and voices."""
    return heapq.merge(
        _random_impulses(np.random.default_rng(rng.integers(2**63)), sensors, seconds),
        _random_background(np.random.default_rng(rng.integers(2**63)), sensors, seconds),
        key=lambda e: e.at_seconds,
    )


def _random_impulses(rng: np.random.Generator, sensors: Sequence[Sensor], seconds: float | None) -> Iterator[Event]:
    bag: list[Kind] = []
    at = rng.uniform(2.0, 3.0)
    while True:
        if not bag:
            bag = ["shot", "shot", "burst", "automatic", "firework", "thunder", "firecrackers"]
            rng.shuffle(bag)
        kind = bag.pop()
        place = _near(rng, sensors, 0.6)
        heading = float(rng.uniform(-180, 180))
        if kind == "thunder":
            angle, distance = rng.uniform(0, 2 * math.pi), rng.uniform(500, 900)
            x, y = place[0] + distance * math.cos(angle), place[1] + distance * math.sin(angle)
            event, lasts = Event(kind=kind, at_seconds=at, x=x, y=y, z=300.0), 5.0
        elif kind in ("firework", "firecrackers"):
            event, lasts = Event(kind=kind, at_seconds=at, x=place[0], y=place[1], z=1.0), 3.5
        else:
            rifle = bool(rng.uniform() < 0.5)
            shots, interval = 1, 0.4
            if kind == "burst":
                shots, interval = int(rng.integers(2, 6)), float(rng.uniform(0.25, 0.6))
            elif kind == "automatic":
                shots, interval = int(rng.integers(5, 14)), float(rng.uniform(0.065, 0.1))
            event = Event(
                kind=kind,
                at_seconds=at,
                x=place[0],
                y=place[1],
                shots=shots,
                interval_seconds=interval,
                mach=float(rng.uniform(1.8, 2.6)) if rifle else 0.0,
                heading_degrees=heading,
            )
            lasts = shots * interval + 1.0
        if seconds is not None and at + lasts > seconds - 1.0:
            return
        yield event
        at += lasts + rng.uniform(2.0, 3.0)


def _random_background(rng: np.random.Generator, sensors: Sequence[Sensor], seconds: float | None) -> Iterator[Event]:
    at = rng.uniform(0.0, 4.0)
    while seconds is None or at < seconds - 2.0:
        near = sensors[int(rng.integers(len(sensors)))]
        reach = rng.uniform(8, 40)
        angle = rng.uniform(0, 2 * math.pi)
        yield Event(
            kind="traffic" if rng.uniform() < 0.6 else "babble",
            at_seconds=at,
            x=float(near.x + reach * math.cos(angle)),
            y=float(near.y + reach * math.sin(angle)),
            duration_seconds=float(rng.uniform(5, 12)),
        )
        at += rng.uniform(4.0, 10.0)


def _near(rng: np.random.Generator, sensors: Sequence[Sensor], margin: float) -> tuple[float, float]:
    """A place among the sensors, or around a lone one; no closer than 20 m to any."""
    xs, ys = [s.x for s in sensors], [s.y for s in sensors]
    pad = 60.0 * margin
    for _ in range(100):
        x = float(rng.uniform(min(xs) - pad, max(xs) + pad))
        y = float(rng.uniform(min(ys) - pad, max(ys) + pad))
        if all(math.hypot(s.x - x, s.y - y) > 20.0 for s in sensors):
            break
    return x, y


@dataclass(frozen=True, slots=True)
class Heard:
    """What one sensor hears of one event. Times in seconds, samples: from the scene's start. None: no such sound."""

    stream_id: str
    distance_metres: float
    arrival_sample: int
    arrivals_seconds: tuple[float, ...]
    shock_seconds: float | None
    peak_dbfs: float
    audible: bool

    @property
    def arrival_seconds(self) -> float:
        return self.arrival_sample / RATE_HZ


@dataclass(frozen=True, slots=True)
class Truth:
    """An event and what every sensor hears of it."""

    event_id: str
    event: Event
    heard: tuple[Heard, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Dry:
    """A source before its way: ``(n,) float64`` pascal at 1 m, and where in it the shots (or what counts) set in."""

    pressure: FloatArray
    onsets_seconds: tuple[float, ...]


class SceneRenderer:
    """Renders a scene, one chunk of every sensor after another. Holds only what sounds at the moment.

    Args:
        on_truth: called with each event when the chunk in which it happens is rendered.
    """

    def __init__(self, scene: Scene, on_truth: Callable[[Truth], None] | None = None) -> None:
        self._scene = scene
        self._on_truth = on_truth or (lambda truth: None)
        self._coming = scene.schedule()
        self._next_event = next(self._coming, None)
        self._events = 0
        self._chunks = 0
        self._ears = [_Ear(scene, index) for index in range(len(scene.sensors))]

    @property
    def events(self) -> int:
        """Number of events that have begun."""
        return self._events

    @property
    def noise_dbfs(self) -> list[float]:
        """Noise floor of each sensor, RMS."""
        return [ear.noise_dbfs for ear in self._ears]

    def __iter__(self) -> Iterator[list[Int16Array]]:
        """Yield ``[(15360,) int16 of each sensor]`` until the scene's end; the last chunk is whole."""
        total = math.inf if self._scene.seconds is None else math.ceil(self._scene.seconds / CHUNK_SECONDS - 1e-9)
        while self._chunks < total:
            yield self.render()

    def render(self) -> list[Int16Array]:
        """Return the next chunk of each sensor: ``(15360,) int16`` each."""
        end_seconds = (self._chunks + 1) * CHUNK_SECONDS
        while self._next_event is not None and self._next_event.at_seconds < end_seconds:
            self._begin(self._next_event)
            self._next_event = next(self._coming, None)
        self._chunks += 1
        return [ear.render() for ear in self._ears]

    def _begin(self, event: Event) -> None:
        number = self._events
        self._events += 1
        rng = np.random.default_rng([self._scene.seed, 2, number])
        heard = []
        if event.kind == "thunder":  # its sound depends on the distance, so it is not the same for all
            seed = int(rng.integers(2**63))
            for ear in self._ears:
                away = max(50.0, _distance(ear.sensor, event))
                clap = thunder(np.random.default_rng(seed), distance_metres=away) * away  # pascal at 1 m
                heard.append(ear.hear(event, number, _Dry(clap, (0.05,))))
        else:
            dry = _dry_sound(event, rng)
            heard = [ear.hear(event, number, dry) for ear in self._ears]
        self._on_truth(Truth(f"event-{number:06d}", event, tuple(h for h in heard if h is not None)))


def _dry_sound(event: Event, rng: np.random.Generator) -> _Dry:
    if event.kind == "firework":
        pressure, report = firework(rng)
        return _Dry(pressure, (report,))
    if event.kind == "firecrackers":
        return _Dry(firecrackers(rng), (0.0,))
    if event.kind in ("traffic", "babble"):
        make = traffic if event.kind == "traffic" else babble
        return _Dry(make(rng, event.duration_seconds), (0.0,))
    level_db = rng.uniform(152.0, 159.0) if event.level_db is None else event.level_db
    phase_seconds = rng.uniform(0.0005, 0.0015)
    decay = rng.uniform(0.8, 2.0)
    onsets = burst(rng, event.shots, event.interval_seconds, jitter=0.15 if event.kind == "burst" else 0.02)
    blasts = [
        muzzle_blast(level_db + rng.normal(0, 1), phase_seconds * rng.uniform(0.9, 1.1), decay=decay) for _ in onsets
    ]
    pressure = np.zeros(round(onsets[-1] * RATE_HZ) + max(len(b) for b in blasts) + 1)
    for onset, blast in zip(onsets, blasts, strict=True):
        start = round(onset * RATE_HZ)
        pressure[start : start + len(blast)] += blast
    return _Dry(pressure, tuple(float(v) for v in onsets))


def _distance(a: Sensor | Event, b: Sensor | Event) -> float:
    return math.dist((a.x, a.y, a.z), (b.x, b.y, b.z))


class _Ear:
    """One sensor: its noise, the facades around it, and the sounds that are on at the moment."""

    def __init__(self, scene: Scene, index: int) -> None:
        self.sensor = scene.sensors[index]
        self._scene = scene
        self._index = index
        rng = np.random.default_rng([scene.seed, 3, index])
        self._ambience = Ambience(rng, self.sensor.noise_db)
        angles, reach = rng.uniform(0, 2 * math.pi, 5), rng.uniform(12, 130, 5)
        self._facades = [
            (self.sensor.x + r * math.cos(a), self.sensor.y + r * math.sin(a))
            for a, r in zip(angles, reach, strict=True)
        ]
        self._facade_gains = rng.uniform(0.25, 0.6, 5)
        self._position = 0
        self._sounding: list[tuple[int, FloatArray]] = []  # (first sample in the scene, pascal)
        self.noise_dbfs = self.sensor.noise_db - scene.full_scale_db

    def hear(self, event: Event, number: int, dry: _Dry) -> Heard | None:
        """Start an event's sound. Returns what is heard; None if it comes after the scene's end."""
        rng = np.random.default_rng([self._scene.seed, 4, number, self._index])
        distance = max(1.0, _distance(self.sensor, event))
        delay_seconds = distance / SPEED_OF_SOUND_METRES_PER_SECOND
        direct_sample = round((event.at_seconds + delay_seconds) * RATE_HZ) - _LEAD_SAMPLES
        wave = self._carry(event, dry, distance, rng)
        arrivals = tuple(event.at_seconds + delay_seconds + onset for onset in dry.onsets_seconds)
        pieces = [(direct_sample, wave)]
        shock_seconds = None
        if event.mach > 1.0:
            shock = self._shock(event, distance)
            if shock is not None:
                shock_seconds = event.at_seconds + shock[0]
                for onset in dry.onsets_seconds:
                    pieces.append((round((shock_seconds + onset) * RATE_HZ) - _LEAD_SAMPLES, shock[1]))
        first_seconds = min(arrivals[0], math.inf if shock_seconds is None else shock_seconds)
        if self._scene.seconds is not None and first_seconds >= self._scene.seconds:
            return None
        self._sounding.extend(pieces)
        peak = max(float(np.max(np.abs(piece))) for _, piece in pieces)
        peak_dbfs = 20 * math.log10(
            max(1e-9, float(pascal_to_full_scale(np.array([peak]), self._scene.full_scale_db)[0]))
        )
        return Heard(
            stream_id=self.sensor.id,
            distance_metres=round(distance, 2),
            arrival_sample=round(first_seconds * RATE_HZ),
            arrivals_seconds=tuple(round(a, 6) for a in arrivals),
            shock_seconds=None if shock_seconds is None else round(shock_seconds, 6),
            peak_dbfs=round(peak_dbfs, 1),
            audible=peak_dbfs - self.noise_dbfs >= AUDIBLE_DB,
        )

    def _carry(self, event: Event, dry: _Dry, distance: float, rng: np.random.Generator) -> FloatArray:
        """The way from the source: direct sound, ground, facades, and the streets' tail."""
        pressure = dry.pressure / distance
        if event.gunfire:  # a gun is louder ahead of it than behind
            pressure = pressure * 10.0 ** (-6.0 * (1.0 - math.cos(self._angle(event))) / 20.0)
        near = air_absorption(np.pad(pressure, (0, 64)), distance)
        ground = math.dist((self.sensor.x, self.sensor.y, -self.sensor.z), (event.x, event.y, event.z))
        echoes = [(max(0.0, ground - distance), 0.6 * distance / max(1.0, ground))]
        for (x, y), gain in zip(self._facades, self._facade_gains, strict=True):
            path = math.hypot(event.x - x, event.y - y) + math.hypot(self.sensor.x - x, self.sensor.y - y)
            if path > distance + 1.0:
                echoes.append((path - distance, gain * distance / path))
        street = reverberation(
            rng,
            decay_seconds=self._scene.decay_seconds * rng.uniform(0.8, 1.2),
            # The farther away, the more of what arrives has gone around corners.
            direct_to_tail_db=max(0.0, 14.0 - 8.0 * math.log10(max(1.0, distance / 30.0))),
            first_echo_seconds=rng.uniform(0.01, 0.03),
        )
        out = np.zeros(len(near) + len(street) + round(0.9 * RATE_HZ))
        out[: len(near) + len(street) - 1] = signal.fftconvolve(near, street)
        for extra_metres, gain in echoes:
            start = round(extra_metres / SPEED_OF_SOUND_METRES_PER_SECOND * RATE_HZ)
            echo = near if extra_metres < 20.0 else air_absorption(near, extra_metres)
            end = min(len(out), start + len(echo))
            if start < end:
                out[start:end] += gain * echo[: end - start]
        return out

    def _angle(self, event: Event) -> float:
        """Between the line of fire (level) and the way to the sensor."""
        dx, dy, dz = self.sensor.x - event.x, self.sensor.y - event.y, self.sensor.z - event.z
        heading = math.radians(event.heading_degrees)
        ahead = dx * math.cos(heading) + dy * math.sin(heading)
        return math.acos(max(-1.0, min(1.0, ahead / max(1e-9, math.sqrt(dx * dx + dy * dy + dz * dz)))))

    def _shock(self, event: Event, distance: float) -> tuple[float, FloatArray] | None:
        arrival = shock_arrival(distance, self._angle(event), event.mach)
        if arrival is None:
            return None
        wave = shock_wave(arrival[1], event.mach)
        return arrival[0], air_absorption(np.pad(wave, (0, 64)), arrival[1])

    def render(self) -> Int16Array:
        start, end = self._position, self._position + CHUNK_SAMPLES
        mix = self._ambience.read(CHUNK_SAMPLES)
        for first, wave in self._sounding:
            a, b = max(start, first), min(end, first + len(wave))
            if a < b:
                mix[a - start : b - start] += wave[a - first : b - first]
        self._sounding = [(first, wave) for first, wave in self._sounding if first + len(wave) > end]
        self._position = end
        return float_to_int16(pascal_to_full_scale(mix, self._scene.full_scale_db))


def render_scene(scene: Scene) -> tuple[dict[str, Int16Array], list[Truth]]:
    """Render a whole scene into memory: ``({stream id: (n,) int16}, events)``. For tests and small experiments.

    Raises ConfigError for a scene without an end.
    """
    if scene.seconds is None:
        raise ConfigError("A scene without an end can't be rendered whole; give it seconds.")
    truth: list[Truth] = []
    chunks = list(SceneRenderer(scene, truth.append))
    return {sensor.id: np.concatenate([chunk[i] for chunk in chunks]) for i, sensor in enumerate(scene.sensors)}, truth


def play_scene(
    scene: Scene,
    publisher: Publisher,
    *,
    realtime: bool,
    truth: Path | None = None,
    start_ns: int | None = None,
    origin: tuple[float, float] | None = None,
    canary: str | None = None,
    stop: threading.Event | None = None,
    monotonic: Callable[[], float] = time.monotonic,
) -> int:
    """Publish a scene, each sensor a stream; return the number of events.

    Args:
        realtime: each chunk when its last sample has been "captured"; else as fast as the bus takes them.
        truth: where the ground truth goes (see the module); replaced if it exists.
        start_ns: capture time of the first sample; None: now.
        origin: latitude and longitude of the scene's x = y = 0; None: locations are ``scene:x,y,z`` in metres.

    Raises SourceError where the truth can't be written.
    """
    stop = stop or threading.Event()
    streams = [
        publisher.stream(s.id, location=_location(s, origin), canary=canary, waits=not realtime) for s in scene.sensors
    ]
    sessions = {stream.stream_id: stream.session for stream in streams}
    began_ns = time.time_ns() if start_ns is None else start_ns
    try:
        with _TruthFile(truth) as file:
            renderer = SceneRenderer(scene, lambda event: file.write(_event_line(event, began_ns, sessions)))
            file.write(_scene_line(scene, renderer, began_ns))
            began = monotonic()
            rendered = iter(renderer)
            published = 0
            # The next chunk is rendered while its time has not come, so that it is never late.
            while (chunk := next(rendered, None)) is not None:
                if realtime and stop.wait(max(0.0, began + (published + 1) * CHUNK_SECONDS - monotonic())):
                    break
                if stop.is_set() or publisher.failed:
                    break
                at_ns = began_ns + samples_to_ns(published * CHUNK_SAMPLES)
                for stream, pcm in zip(streams, chunk, strict=True):
                    stream.write(Block(pcm, at_ns))
                published += 1
            file.write({"record": "end", "seconds": round(published * CHUNK_SECONDS, 6), "events": renderer.events})
    except OSError as e:
        raise SourceError(f"{truth}: the ground truth can't be written: {e.strerror}.") from None
    return renderer.events


class _TruthFile:
    """JSON lines, each readable as soon as it is written."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> _TruthFile:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", encoding="utf-8")
        return self

    def write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()


def _scene_line(scene: Scene, renderer: SceneRenderer, began_ns: int) -> dict[str, Any]:
    return {
        "record": "scene",
        "start_ns": began_ns,
        "seconds": scene.seconds,
        "seed": scene.seed,
        "sensors": [
            {"stream_id": s.id, "x": s.x, "y": s.y, "z": s.z, "noise_dbfs": round(noise, 1)}
            for s, noise in zip(scene.sensors, renderer.noise_dbfs, strict=True)
        ],
    }


def _event_line(truth: Truth, began_ns: int, sessions: dict[str, str]) -> dict[str, Any]:
    event = truth.event
    return {
        "record": "event",
        "event_id": truth.event_id,
        "kind": event.kind,
        "gunfire": event.gunfire,
        "at_seconds": round(event.at_seconds, 6),
        "at_ns": began_ns + int(event.at_seconds * NS),
        "x": round(event.x, 2),
        "y": round(event.y, 2),
        "z": round(event.z, 2),
        "shots": event.shots if event.gunfire else 0,
        "sensors": [
            {
                "stream_id": h.stream_id,
                "session": sessions[h.stream_id],
                "distance_metres": h.distance_metres,
                "arrival_seconds": round(h.arrival_seconds, 6),
                "arrival_ns": began_ns + samples_to_ns(h.arrival_sample),
                "arrival_sample": h.arrival_sample,
                "arrivals_seconds": list(h.arrivals_seconds),
                "shock_seconds": h.shock_seconds,
                "peak_dbfs": h.peak_dbfs,
                "audible": h.audible,
            }
            for h in truth.heard
        ],
    }


def _location(sensor: Sensor, origin: tuple[float, float] | None) -> Location:
    if origin is None:
        return Location("scene", sensor.x, sensor.y, sensor.z)
    latitude, longitude = origin
    east = _METRES_PER_DEGREE * max(1e-6, math.cos(math.radians(latitude)))
    return Location.wgs84(latitude + sensor.y / _METRES_PER_DEGREE, longitude + sensor.x / east, sensor.z)
