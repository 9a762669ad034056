"""Synthesised sounds keep to the physics they come from."""

from __future__ import annotations

import math

import numpy as np
import pytest

from detector.synthesis import (
    Ambience,
    absorption_db_per_metre,
    air_absorption,
    babble,
    burst,
    firecrackers,
    firework,
    muzzle_blast,
    peak_pascal,
    reverberation,
    shock_arrival,
    shock_wave,
    thunder,
    traffic,
)


def level_db(x: np.ndarray) -> float:
    return 20 * math.log10(float(np.max(np.abs(x))) / 20e-6)


@pytest.mark.parametrize("phase_seconds", [0.0005, 0.001, 0.003])
def test_a_muzzle_blast_has_its_peak_its_positive_phase_and_then_suction(phase_seconds: float) -> None:
    x = muzzle_blast(155.0, phase_seconds, rate_hz=48_000)
    assert level_db(x) == pytest.approx(155.0, abs=1.5)
    start = int(np.argmax(x > 0.3 * x.max()))
    assert abs(start - 8) <= 2
    crossing = start + int(np.argmax(x[start:] < 0))
    assert (crossing - 8) / 48_000 == pytest.approx(phase_seconds, rel=0.2)
    assert x[crossing : crossing + round(phase_seconds * 48_000)].min() < -0.05 * x.max()


def test_a_shock_wave_is_an_n_and_weakens_with_the_miss_distance() -> None:
    near, far = shock_wave(10.0, 2.2, rate_hz=96_000), shock_wave(80.0, 2.2, rate_hz=96_000)
    assert np.argmax(near) < np.argmin(near)
    assert near.max() == pytest.approx(-near.min(), rel=0.2)
    assert level_db(near) - level_db(far) == pytest.approx(20 * 0.75 * math.log10(8), abs=2.0)
    for wrong in ((10.0, 1.0), (0.0, 2.0)):
        with pytest.raises(ValueError, match="shock wave needs"):
            shock_wave(*wrong)


def test_the_mach_cone_passes_only_ahead_of_the_gun_and_before_the_muzzles_sound() -> None:
    for angle in (0.1, 0.4, 0.8):
        arrival = shock_arrival(200.0, angle, 2.2)
        assert arrival is not None
        assert arrival[0] < 200.0 / 343.0
        assert arrival[1] == pytest.approx(200.0 * math.sin(angle))
    for angle in (1.3, 2.0, 3.1):
        assert shock_arrival(200.0, angle, 2.2) is None


def test_air_takes_highs_and_more_of_them_the_farther() -> None:
    # ISO 9613-1, table 1: 20 degrees, 60 % (values in dB/km to a few per cent).
    table = {500.0: 2.8, 1000.0: 4.8, 4000.0: 25.7}
    found = absorption_db_per_metre(np.array(list(table))) * 1000
    assert found == pytest.approx(list(table.values()), rel=0.06)
    impulse = np.zeros(512)
    impulse[256] = 1.0
    for metres in (100.0, 300.0, 800.0):
        spectrum = np.abs(np.fft.rfft(air_absorption(impulse, metres)))
        at = np.array([1000, 4000, 6000]) * 512 // 16_000
        expected = 10 ** (-absorption_db_per_metre(at * 16_000 / 512) * metres / 20)
        assert spectrum[at] == pytest.approx(expected, abs=0.03)


def test_a_tail_falls_by_60_db_in_its_decay_time() -> None:
    tail = reverberation(np.random.default_rng(0), decay_seconds=1.0, direct_to_tail_db=6.0)
    assert tail[0] == 1.0
    assert np.sum(tail[1:] ** 2) == pytest.approx(10**-0.6, rel=0.01)

    def db(seconds: float) -> float:
        at = round((0.02 + seconds) * 16_000)
        return 10 * math.log10(float(np.mean(tail[at - 800 : at + 800] ** 2)))

    assert db(0.25) - db(0.75) == pytest.approx(30.0, abs=4.0)


def test_ambience_is_seamless_and_has_its_level() -> None:
    whole = Ambience(np.random.default_rng(3), 55.0).read(64_000)
    other = Ambience(np.random.default_rng(3), 55.0)
    pieces = np.concatenate([other.read(n) for n in (16_000, 1, 31_999, 16_000)])
    assert np.allclose(whole, pieces, atol=1e-12)
    rms_db = 20 * math.log10(float(np.sqrt(np.mean(whole**2))) / 20e-6)
    assert rms_db == pytest.approx(55.0, abs=3.0)


def test_every_sound_is_finite_has_its_length_and_comes_from_its_seed() -> None:
    makers = {
        "firework": lambda rng: firework(rng)[0],
        "firecrackers": firecrackers,
        "thunder": lambda rng: thunder(rng, distance_metres=700.0),
        "babble": lambda rng: babble(rng, 3.0),
        "traffic": lambda rng: traffic(rng, 3.0),
        "burst": lambda rng: burst(rng, 6, 0.1, jitter=0.1),
    }
    for name, make in makers.items():
        x = make(np.random.default_rng(7))
        assert np.isfinite(x).all(), name
        assert np.array_equal(x, make(np.random.default_rng(7))), name
        assert not np.array_equal(x, make(np.random.default_rng(8))), name
    assert len(babble(np.random.default_rng(0), 3.0)) == len(traffic(np.random.default_rng(0), 3.0)) == 48_000


def test_thunder_grows_weaker_and_deeper_with_distance() -> None:
    near, far = (thunder(np.random.default_rng(5), distance_metres=d) for d in (300.0, 3000.0))
    assert level_db(near) - level_db(far) == pytest.approx(20.0, abs=0.1)

    def centroid(x: np.ndarray) -> float:
        power = np.abs(np.fft.rfft(x)) ** 2
        return float(np.sum(power * np.fft.rfftfreq(len(x), 1 / 16_000)) / np.sum(power))

    assert centroid(far) < 0.8 * centroid(near)


def test_levels_are_peak_pressures() -> None:
    assert peak_pascal(94.0) == pytest.approx(1.0, rel=0.01)
