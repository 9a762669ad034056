"""What synthesis promises: the same sound from the same seed, and the physics it claims."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detector.chunk import RATE_HZ
from trainer.compact import synthesis
from trainer.compact.synthesis import LEAD_SAMPLES

MAKERS: list[Callable[[np.random.Generator], np.ndarray]] = [
    synthesis.firework,
    synthesis.firecrackers,
    synthesis.door_slam,
    synthesis.knocks,
    synthesis.metal_hit,
    synthesis.claps,
    synthesis.applause,
    synthesis.creak,
    synthesis.shatter,
    synthesis.hits,
    synthesis.pneumatic_tool,
    synthesis.hammering,
    synthesis.drums,
    synthesis.drops,
    synthesis.pop_and_hiss,
    synthesis.thunder,
    synthesis.explosion,
    synthesis.backfire,
    synthesis.clicks,
    synthesis.action_clatter,
    lambda rng: synthesis.shot(rng, 120.0)[0],
    lambda rng: synthesis.place_response(rng, "urban"),
    lambda rng: synthesis.babble(rng, 1.0),
    lambda rng: synthesis.machinery(rng, 16_000),
]


@pytest.mark.parametrize("make", MAKERS)
def test_same_seed_gives_the_same_finite_sound_and_another_seed_another(
    make: Callable[[np.random.Generator], np.ndarray],
) -> None:
    first, again, other = (make(np.random.default_rng(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert np.isfinite(first).all()
    assert first.dtype == np.float32
    assert not np.array_equal(first[: len(other)], other[: len(first)])


@given(st.floats(0.0003, 0.02))
def test_a_blast_crosses_zero_after_its_positive_phase(duration_seconds: float) -> None:
    blast = synthesis.friedlander(duration_seconds)
    peak = int(np.argmax(blast))
    crossing = peak + int(np.argmax(blast[peak:] < 0))
    assert abs(peak - LEAD_SAMPLES) <= 2
    assert abs((crossing - LEAD_SAMPLES) / RATE_HZ - duration_seconds) < 1.5e-4


def test_a_shock_wave_comes_before_the_blast_of_its_shot() -> None:
    """The blast alone begins with its peak; with a shock wave the loudest part may come later, the onset does not."""
    leads = 0
    for seed in range(40):
        with_shock, onset = synthesis.shot(np.random.default_rng(seed), 150.0, supersonic=True)
        without, _ = synthesis.shot(np.random.default_rng(seed), 150.0, supersonic=False)
        assert onset == LEAD_SAMPLES
        assert np.max(np.abs(with_shock[onset - 16 : onset + 48])) > 0.02
        leads += len(with_shock) > len(without) + 16
    assert 5 < leads < 40  # not every microphone lies where the cone passes


def test_air_takes_the_treble_first_and_more_with_distance() -> None:
    click = np.zeros(4096, np.float32)
    click[100] = 1.0

    def level_db(distance_metres: float, hz: float) -> float:
        spectrum = np.abs(np.fft.rfft(synthesis.air_absorption(click, distance_metres)))
        return float(20 * np.log10(spectrum[round(hz * len(click) / RATE_HZ)]))

    assert level_db(500, 500) - level_db(500, 4000) > 5
    assert level_db(100, 4000) - level_db(1000, 4000) > 15
    assert abs(level_db(0, 4000)) < 0.1


@pytest.mark.parametrize("place", ["open", "urban", "forest", "indoor"])
def test_direct_sound_arrives_first(place: str) -> None:
    response = synthesis.place_response(np.random.default_rng(3), place)
    assert response[0] == pytest.approx(1.0, abs=0.5)
    assert np.argmax(np.abs(response) > 0) == 0


def test_automatic_fire_is_regular_and_firecrackers_are_not() -> None:
    gaps = np.diff(synthesis.burst_times(np.random.default_rng(2), "automatic"))
    assert 1 / 22 < gaps.mean() < 1 / 6
    assert gaps.std() < 0.1 * gaps.mean()


def test_a_pneumatic_tool_strikes_steadily_at_its_rate() -> None:
    """The envelope repeats itself between 9 and 45 times a second, in most of them clearly."""
    clear = 0
    for seed in range(30):
        x = synthesis.pneumatic_tool(np.random.default_rng(seed))
        level = np.sqrt(np.mean(x[: len(x) // 16 * 16].reshape(-1, 16) ** 2, axis=1))
        level = level - level.mean()
        spectrum = np.abs(np.fft.rfft(level * np.hanning(len(level)), 1 << 14)) ** 2
        hz = np.fft.rfftfreq(1 << 14, 16 / RATE_HZ)
        band = (hz >= 8.5) & (hz <= 46)
        clear += spectrum[band].max() > 20 * np.median(spectrum[(hz > 2) & (hz < 90)])
    assert clear >= 20
