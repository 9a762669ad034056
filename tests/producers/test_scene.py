"""The synthetic city: the same from the same seed, true to its ground truth, in bounded memory."""

from __future__ import annotations

import itertools
import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_bus import MemoryBus

from detector.chunk import CHUNK_SAMPLES
from detector.errors import ConfigError, SourceError
from producers.publish import Publisher
from producers.scene import Scene, SceneRenderer, Truth, load_scene, play_scene, random_scene, render_scene

QUIET = {"noise_db": 0.0, "z": 1.5}


def scene(events: list[dict[str, Any]], sensors: list[dict[str, Any]] | None = None, **more: Any) -> Scene:
    places = sensors or [{"id": "near", "x": 50.0, "y": 0.0, **QUIET}, {"id": "far", "x": 0.0, "y": 300.0, **QUIET}]
    return Scene.model_validate({"sensors": places, "events": events, "seconds": 6.0, **more})


def shot(**more: Any) -> dict[str, Any]:
    return {"kind": "shot", "at_seconds": 1.0, "x": 0.0, "y": 0.0, "level_db": 150.0, **more}


def test_the_same_seed_gives_the_same_samples_and_another_seed_others() -> None:
    first, truth = render_scene(random_scene(sensors=2, seconds=8, seed=5))
    again, truth_again = render_scene(random_scene(sensors=2, seconds=8, seed=5))
    other, _ = render_scene(random_scene(sensors=2, seconds=8, seed=6))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert truth == truth_again
    assert not any(np.array_equal(first[name], other[name]) for name in first)


def onset(pcm: np.ndarray, from_sample: int = 0, share: float = 0.2) -> int:
    """First sample that reaches a share of the peak."""
    return from_sample + int(np.argmax(np.abs(pcm[from_sample:].astype(int)) >= share * np.abs(pcm.astype(int)).max()))


def test_a_shot_arrives_after_the_distance_at_the_speed_of_sound_and_fades_with_it() -> None:
    pcm, truth = render_scene(scene([shot()]))
    near, far = truth[0].heard
    for heard, metres in ((near, 50.0), (far, 300.0)):
        assert heard.distance_metres == metres
        assert heard.arrival_sample == round((1.0 + metres / 343.0) * 16_000)
        assert abs(onset(pcm[heard.stream_id]) - heard.arrival_sample) <= 4
    spreading_db = 20 * math.log10(300 / 50)
    assert spreading_db - 1 < near.peak_dbfs - far.peak_dbfs < spreading_db + 12
    for heard in (near, far):
        peak = np.abs(pcm[heard.stream_id].astype(float)).max() / 32768
        assert 20 * math.log10(peak) == pytest.approx(heard.peak_dbfs, abs=0.5)


def test_a_burst_is_heard_shot_by_shot() -> None:
    event = shot(kind="burst", shots=3, interval_seconds=0.5)
    pcm, truth = render_scene(scene([event], decay_seconds=0.05))
    heard = truth[0].heard[0]
    assert len(heard.arrivals_seconds) == 3
    for arrival in heard.arrivals_seconds:
        assert abs(onset(pcm["near"], round(arrival * 16_000) - 800) - arrival * 16_000) <= 8


def test_a_bullet_faster_than_sound_is_heard_before_its_muzzle_where_its_cone_passes() -> None:
    sensors = [{"id": "beside", "x": 200.0, "y": 20.0, **QUIET}, {"id": "behind", "x": -200.0, "y": 20.0, **QUIET}]
    _, truth = render_scene(scene([shot(mach=2.2, heading_degrees=0.0)], sensors))
    beside, behind = truth[0].heard
    assert beside.shock_seconds is not None
    assert beside.shock_seconds < beside.arrivals_seconds[0] - 0.2
    assert beside.arrival_sample == round(beside.shock_seconds * 16_000)
    assert behind.shock_seconds is None
    assert behind.peak_dbfs < beside.peak_dbfs


def test_chunks_are_exact_and_only_what_sounds_is_held() -> None:
    renderer = SceneRenderer(random_scene(sensors=2, seconds=None, seed=3))
    for chunk in itertools.islice(renderer, 80):
        assert [c.shape for c in chunk] == [(CHUNK_SAMPLES,)] * 2
        assert all(c.dtype == np.int16 for c in chunk)
        held = sum(len(wave) for ear in renderer._ears for _, wave in ear._sounding)
        assert held < 2 * 40 * 16_000


@pytest.mark.parametrize("seed", range(8))
def test_a_random_scene_of_40_seconds_has_shots_and_look_alikes_apart_from_each_other(seed: int) -> None:
    events = list(random_scene(seconds=40, seed=seed).schedule())
    assert [e.at_seconds for e in events] == sorted(e.at_seconds for e in events)
    impulsive = [e for e in events if e.kind not in ("traffic", "babble")]
    assert sum(e.gunfire for e in impulsive) >= 2
    assert sum(not e.gunfire for e in impulsive) >= 1
    gaps = np.diff([e.at_seconds for e in impulsive])
    assert gaps.min() >= 3.0
    assert max(e.at_seconds for e in impulsive) < 39


def test_every_kind_of_event_is_audible_near_by() -> None:
    kinds = ("shot", "burst", "automatic", "firework", "firecrackers", "thunder", "traffic", "babble")
    for kind in kinds:
        _, truth = render_scene(
            Scene.model_validate(
                {
                    "sensors": [{"id": "s", "x": 10.0, "y": 0.0, "noise_db": 40.0}],
                    "events": [{"kind": kind, "at_seconds": 0.5, "x": 0.0, "y": 0.0, "shots": 2}],
                    "seconds": 6.0,
                }
            )
        )
        assert truth[0].heard[0].audible, kind
        assert truth[0].event.gunfire == (kind in ("shot", "burst", "automatic"))


def test_a_sound_that_would_come_after_the_end_is_not_in_the_truth() -> None:
    _, truth = render_scene(scene([shot(at_seconds=5.5)]))
    assert [h.stream_id for h in truth[0].heard] == ["near"]


def test_played_chunks_are_the_rendered_ones_and_the_truth_lies_beside(tmp_path: Path) -> None:
    city = random_scene(sensors=3, seconds=9, seed=2)
    bus = MemoryBus()
    path = tmp_path / "deep" / "truth.jsonl"
    with Publisher(bus.open, topic="audio.chunks") as publisher:
        events = play_scene(city, publisher, realtime=False, truth=path, start_ns=10**18)
    pcm, truth = render_scene(city)
    sessions = {}
    for name, expected in pcm.items():
        chunks = [c for c in bus.chunks() if c.stream_id == name]
        assert [c.seq for c in chunks] == list(range(10))
        assert np.array_equal(np.concatenate([c.pcm for c in chunks]), expected)
        assert chunks[3].captured_at_ns == 10**18 + 3 * 960_000_000
        assert chunks[0].location is not None
        assert chunks[0].location.frame == "scene"
        sessions[name] = chunks[0].session
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["record"] for line in lines] == ["scene", *["event"] * events, "end"]
    assert lines[0]["start_ns"] == 10**18
    assert [line["stream_id"] for line in lines[0]["sensors"]] == list(pcm)
    for line, expected_truth in zip(lines[1:-1], truth, strict=True):
        assert_line(line, expected_truth, sessions)


def assert_line(line: dict[str, Any], truth: Truth, sessions: dict[str, str]) -> None:
    assert (line["event_id"], line["kind"], line["gunfire"]) == (truth.event_id, truth.event.kind, truth.event.gunfire)
    for sensor, heard in zip(line["sensors"], truth.heard, strict=True):
        assert sensor["arrival_sample"] == heard.arrival_sample
        assert sensor["arrival_ns"] == 10**18 + heard.arrival_sample * 62_500
        assert sensor["session"] == sessions[sensor["stream_id"]]
        assert sensor["audible"] == heard.audible


def test_in_real_time_a_chunk_goes_out_when_it_is_over_and_stop_ends_it() -> None:
    now, stop, bus = [0.0], threading.Event(), MemoryBus()

    class Waits(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            now[0] += timeout or 0.0
            if now[0] > 3.0:
                stop.set()
            return stop.is_set()

        def is_set(self) -> bool:
            return stop.is_set()

    with Publisher(bus.open, topic="audio.chunks") as publisher:
        play_scene(
            random_scene(sensors=1, seconds=None), publisher, realtime=True, stop=Waits(), monotonic=lambda: now[0]
        )
    assert [c.seq for c in bus.chunks()] == [0, 1, 2]


def test_an_origin_puts_the_sensors_on_the_globe() -> None:
    bus = MemoryBus()
    with Publisher(bus.open, topic="audio.chunks") as publisher:
        play_scene(scene([]), publisher, realtime=False, origin=(60.0, 20.0))
    places = {c.stream_id: c.location for c in bus.chunks()}
    near, far = places["near"], places["far"]
    assert near is not None
    assert far is not None
    assert (near.frame, near.a, round((near.b - 20) * 111_320 * 0.5)) == ("wgs84", 60.0, 50)
    assert round((far.a - 60) * 111_320) == 300


def test_a_truth_that_can_not_be_written_is_a_clear_error(tmp_path: Path) -> None:
    with (
        Publisher(MemoryBus().open, topic="audio.chunks") as publisher,
        pytest.raises(SourceError, match="ground truth can't be written"),
    ):
        play_scene(scene([]), publisher, realtime=False, truth=tmp_path)


def test_a_script_is_read_and_each_of_its_faults_named(tmp_path: Path) -> None:
    path = tmp_path / "scene.yaml"
    path.write_text(
        "seconds: 4.0\nsensors:\n- {id: a, x: 0.0, y: 0.0}\nevents:\n"
        "- {kind: automatic, at_seconds: 1.5, x: 30.0, y: 4.0, shots: 8, interval_seconds: 0.08, mach: 2.1}\n"
    )
    loaded = load_scene(path)
    assert (loaded.seconds, loaded.events[0].shots, loaded.random_events) == (4.0, 8, False)
    path.write_text("seconds: -1\nsensors: []\nevents: [{kind: bomb, at_seconds: now}]\nspeed: 3\n")
    with pytest.raises(ConfigError) as caught:
        load_scene(path)
    for place in ("seconds", "sensors", "events.0.kind", "events.0.at_seconds", "events.0.x", "speed"):
        assert f"scene.yaml: {place}: " in str(caught.value)
    for text in ("", "- 1\n", "a: [", "sensors:\n- {id: a, x: 0.0, y: 0.0}\n- {id: a, x: 1.0, y: 0.0}\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"scene\.yaml"):
            load_scene(path)
    with pytest.raises(ConfigError, match="can't be read"):
        load_scene(tmp_path / "missing.yaml")
