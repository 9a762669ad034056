"""The recording chain: band limits, bit depths and codecs do what they say and keep the time axis."""

from __future__ import annotations

import numpy as np
import pytest

from detector.chunk import RATE_HZ
from trainer.compact import channel


def _noise(seconds: float = 1.0) -> np.ndarray:
    return (0.1 * np.random.default_rng(1).standard_normal(int(seconds * RATE_HZ))).astype(np.float32)


@pytest.mark.parametrize("cutoff_hz", [3000.0, 4000.0, 6000.0])
def test_nothing_is_left_above_a_band_limit(cutoff_hz: float) -> None:
    power = np.abs(np.fft.rfft(channel.band_limit(_noise(), cutoff_hz))) ** 2
    hz = np.fft.rfftfreq(RATE_HZ, 1 / RATE_HZ)
    above, below = power[hz > 1.05 * cutoff_hz].mean(), power[(hz > 200) & (hz < 0.9 * cutoff_hz)].mean()
    assert 10 * np.log10(above / below) < -40


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_requantised_sound_has_that_many_levels_and_clips(bits: int) -> None:
    pcm = channel.quantise(np.linspace(-1.5, 1.5, 500_000), bits)
    assert len(np.unique(pcm)) == 2**bits
    assert pcm.min() == -32768


def test_mu_law_keeps_level_and_quiet_detail() -> None:
    x = 0.01 * np.sin(np.arange(16000) * 0.1)
    error = channel.mu_law(x) / 32768 - x
    assert np.std(error) < 0.05 * np.std(x)


@pytest.mark.parametrize("codec", channel._CODECS, ids=lambda c: f"{c[0]}-{c[2]}")
def test_codecs_keep_length_and_moment(codec: tuple[str, int, int]) -> None:
    x = 0.003 * _noise(3.0)
    at = 20_000
    x[at : at + 400] += 0.6 * np.random.default_rng(2).standard_normal(400) * np.exp(-np.arange(400) / 100)
    pcm = channel.quantise(x, 16)
    back = channel.through_codec(pcm, *codec)
    assert back.shape == pcm.shape
    loudest = np.argmax(np.convolve(back.astype(float) ** 2, np.ones(160), "same"))
    assert abs(loudest - np.argmax(np.convolve(pcm.astype(float) ** 2, np.ones(160), "same"))) < 0.01 * RATE_HZ


def test_a_compressor_turns_loud_down_and_leaves_quiet_alone() -> None:
    x = np.concatenate([0.01 * _noise(), _noise()])
    y = channel.compress(x, threshold_db=-20, ratio=10, attack_seconds=0.002, release_seconds=0.1)
    half = len(x) // 2
    np.testing.assert_allclose(y[: half - 200], x[: half - 200], rtol=1e-5)
    assert y[half + 2000 :].std() < 0.4 * x[half + 2000 :].std()


def test_the_chain_is_a_function_of_its_generator_and_says_where_it_silenced() -> None:
    x = _noise(10.0)
    for seed in range(12):
        first, again = (channel.record(np.random.default_rng(seed), x, codecs=False) for _ in range(2))
        np.testing.assert_array_equal(first.pcm, again.pcm)
        assert first.pcm.shape == x.shape
        assert not first.pcm[~first.audible].any()
