"""Onsets: exact on made-up shots, close on real ones, and never an edge, a step or an echo."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.audio import Int16Array
from detector.embedders.params import EXAMPLE_SAMPLES
from detector.onset import MIN_SPACING_SAMPLES, SEARCH_BACK_SAMPLES, Onset, find_onsets

CONTEXT_SAMPLES = 23_600  # half a second and an example
Signal = npt.NDArray[np.float64]


def _noise(rng: np.random.Generator, level: float) -> Signal:
    return rng.standard_normal(CONTEXT_SAMPLES) * level


def _add_shot(x: Signal, at: int, level: float, rng: np.random.Generator, decay_samples: float = 500.0) -> None:
    length = len(x) - at
    x[at:] += rng.choice([-1.0, 1.0], length) * level * np.exp(-np.arange(length) / decay_samples)


def _pcm(x: Signal, limit: float = 32767.0) -> Int16Array:
    return np.clip(x, -limit, limit).astype(np.int16)


def _certain(onsets: list[Onset]) -> list[int]:
    return [onset.sample for onset in onsets if onset.certain]


@pytest.mark.parametrize("level", [0.0, 3.0, 100.0, 1000.0])
@pytest.mark.parametrize("seed", range(8))
def test_a_shot_is_found_within_10_ms(level: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, at = _noise(rng, level), int(rng.integers(8_200, 18_000))
    _add_shot(x, at, max(level, 30.0) * 12, rng)
    onsets = find_onsets(_pcm(x), 100_000, search_from=108_000)
    assert len(onsets) == 1
    assert onsets[0].certain
    assert abs(onsets[0].sample - (100_000 + at)) <= 160


@pytest.mark.parametrize("spacing_ms", [55, 60, 65])
def test_the_fastest_fire_is_found_to_the_end_of_an_example(spacing_ms: int) -> None:
    """Over all that the pipeline searches: 0.4 s before an example, and the example."""
    rng = np.random.default_rng(7)
    x = _noise(rng, 50.0)
    start = len(x) - EXAMPLE_SAMPLES - SEARCH_BACK_SAMPLES
    shots = list(range(start + 200, len(x) - 1_000, spacing_ms * 16))
    for at in shots:
        _add_shot(x, at, 3000.0, rng, decay_samples=160.0)
    found = _certain(find_onsets(_pcm(x), 0, search_from=start))
    assert abs(found[-1] - shots[-1]) <= 160


@pytest.mark.parametrize("spacing_ms", [60, 80, 100, 150, 200])
@pytest.mark.parametrize("decay_ms", [10, 25])
def test_every_shot_of_automatic_fire_is_an_onset(spacing_ms: int, decay_ms: int) -> None:
    rng = np.random.default_rng(7)
    x = _noise(rng, 50.0)
    shots = [9_000 + i * spacing_ms * 16 for i in range(5)]
    for at in shots:
        _add_shot(x, at, 800.0, rng, decay_ms * 16.0)
    found = _certain(find_onsets(_pcm(x), 0, search_from=8_000))
    assert len(found) == len(shots)
    assert max(abs(f - at) for f, at in zip(found, shots, strict=True)) <= 160


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("seed", range(10))
def test_edges_of_digital_silence_and_steps_of_the_gain_are_no_shots(offset: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    begins, ends, louder, softer = (_noise(rng, 200.0) + offset for _ in range(4))
    begins[:12_000] = 0.0
    ends[12_000:] = 0.0
    louder[12_000:] = (louder[12_000:] - offset) * 5 + offset
    softer[12_000:] = (softer[12_000:] - offset) / 5 + offset
    for x in (begins, ends, louder, softer):
        onsets = find_onsets(_pcm(x), 0, search_from=8_000)
        assert _certain(onsets) == []
        assert len(onsets) == 1  # a place is named even so
        assert abs(onsets[0].sample - 12_000) > 32


def test_a_shot_soon_after_the_edge_of_silence_is_found() -> None:
    rng = np.random.default_rng(3)
    x = _noise(rng, 100.0)
    x[:9_000] = 0.0
    _add_shot(x, 11_000, 3_000.0, rng)
    assert [abs(f - 11_000) <= 160 for f in _certain(find_onsets(_pcm(x), 0, search_from=8_000))] == [True]


@pytest.mark.parametrize("limit", [600.0, 2_000.0])
def test_clipping_moves_no_onset(limit: float) -> None:
    rng = np.random.default_rng(5)
    x = _noise(rng, 60.0)
    _add_shot(x, 12_345, 30_000.0, rng)
    onsets = find_onsets(_pcm(x, limit), 0, search_from=8_000)
    assert [abs(f - 12_345) <= 160 for f in _certain(onsets)] == [True]
    assert onsets[0].peak_dbfs == pytest.approx(20 * math.log10(limit / 32768), abs=0.1)


def test_a_weak_echo_is_no_second_shot() -> None:
    rng = np.random.default_rng(6)
    x = _noise(rng, 20.0)
    _add_shot(x, 10_000, 8_000.0, rng)
    _add_shot(x, 15_000, 800.0, rng)  # 20 dB weaker, 0.3 s later
    found = _certain(find_onsets(_pcm(x), 0, search_from=8_000))
    assert [abs(f - 10_000) <= 160 for f in found] == [True]


def test_the_look_back_is_background_only() -> None:
    rng = np.random.default_rng(8)
    x = _noise(rng, 50.0)
    _add_shot(x, 5_000, 3_000.0, rng)
    _add_shot(x, 16_000, 3_000.0, rng)
    assert len(_certain(find_onsets(_pcm(x), 0))) == 2
    assert [abs(f - 16_000) <= 160 for f in _certain(find_onsets(_pcm(x), 0, search_from=8_000))] == [True]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    samples=st.integers(1, 32_000),
    first_sample=st.integers(-8_240, 10**12),
    kind=st.sampled_from(["noise", "full", "silence", "constant", "sparse"]),
)
def test_any_pcm_gives_ordered_onsets_inside_it(seed: int, samples: int, first_sample: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    pcm = {
        "noise": lambda: rng.normal(0, 300, samples).astype(np.int16),
        "full": lambda: rng.integers(-32768, 32768, samples).astype(np.int16),
        "silence": lambda: np.zeros(samples, np.int16),
        "constant": lambda: np.full(samples, -32768, np.int16),
        "sparse": lambda: (rng.random(samples) < 0.001).astype(np.int16) * np.int16(30_000),
    }[kind]()
    if first_sample + samples <= 0:
        first_sample = -samples + 1
    onsets = find_onsets(pcm, first_sample)
    assert onsets
    assert onsets == find_onsets(pcm.copy(), first_sample)
    found = [onset.sample for onset in onsets]
    assert all(max(first_sample, 0) <= f < first_sample + samples for f in found)
    assert all(b - a >= MIN_SPACING_SAMPLES - 32 for a, b in itertools.pairwise(found))
    assert all(math.isfinite(o.rise_db) and o.peak_dbfs is not None and o.peak_dbfs <= 0 for o in onsets)


@pytest.mark.parametrize(
    ("pcm", "search_from"),
    [
        (np.zeros(0, np.int16), None),
        (np.zeros((2, 4), np.int16), None),
        (np.zeros(400, np.float64), None),
        (np.zeros(400, np.int16), 400),
    ],
)
def test_what_can_not_be_searched_is_refused(pcm: Int16Array, search_from: int | None) -> None:
    with pytest.raises(ValueError, match=r"PCM is|search_from"):
        find_onsets(pcm, 0, search_from=search_from)


def test_a_search_is_fast_even_where_every_second_block_is_silent() -> None:
    rng = np.random.default_rng(9)
    x = _noise(rng, 300.0).reshape(-1, 40)
    x[::2] = 0.0
    fastest = math.inf
    for _ in range(20):
        began = time.perf_counter()
        find_onsets(_pcm(x.reshape(-1)), 0)
        fastest = min(fastest, time.perf_counter() - began)
    assert fastest < 0.01  # under 1 ms on an idle core


def _bench() -> ModuleType:
    path = Path(__file__).parent / "benchmarks/bench_onset.py"
    spec = importlib.util.spec_from_file_location("bench_onset", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_onsets_of_live_fire_are_found_within_50_ms(data_dir: Path) -> None:
    if not (data_dir / "audio/shotspotter/onsets.csv").exists():
        pytest.skip("DATA_DIR has no audio/shotspotter/onsets.csv")
    bench = _bench()
    tagged = dict(list(bench.read_tags(data_dir, ("FP5", "FP6")).items())[::3])
    recordings = {path: bench.read_pcm(data_dir / "audio" / path) for path in tagged}
    figures = bench.measure(recordings, tagged)
    assert figures.tags >= 80
    assert figures.within_50_ms >= 0.92
    assert figures.median_absolute_error_ms <= 3.0
    assert abs(figures.median_error_ms) <= 3.0
    assert figures.false_extras_per_example <= 0.35
