"""Sounds varied as widely as the world does: shots and what is taken for shots. First stage of the recipe.

The physics (blast, shock wave, air) is that of ``detector.synthesis``; here every parameter is drawn at random. Every
function takes a ``numpy.random.Generator`` and returns float32 at 16 kHz with peak 1 unless said otherwise, its onset
at ``LEAD_SAMPLES``: the band limiting rings a little before it.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import fft, signal

from detector.chunk import RATE_HZ
from detector.synthesis import (
    SPEED_OF_SOUND_METRES_PER_SECOND,
    absorption_db_per_metre,
    muzzle_blast,
    shock_arrival,
    shock_wave,
)

LEAD_SAMPLES = 64

Samples = npt.NDArray[np.float32]


# --- pulses -------------------------------------------------------------------------------------------------------


def friedlander(duration_seconds: float, decay: float = 1.0, length_seconds: float | None = None) -> Samples:
    """Blast wave with a positive phase of ``duration_seconds``, then weak suction; cut at ``length_seconds``."""
    wave = muzzle_blast(0.0, duration_seconds, decay=decay, lead_samples=LEAD_SAMPLES)
    return _unit(wave if length_seconds is None else wave[: LEAD_SAMPLES + round(length_seconds * RATE_HZ)])


# --- paths --------------------------------------------------------------------------------------------------------


def air_absorption(x: npt.NDArray[np.floating], distance_metres: float) -> Samples:
    """What ``distance_metres`` of air leave of each frequency (no spreading loss), without delay; full spectrum."""
    n = fft.next_fast_len(len(x) + RATE_HZ // 8, real=True)
    loss_db = np.interp(np.fft.rfftfreq(n, 1.0 / RATE_HZ), _absorption_grid_hz(), _absorption_grid()) * distance_metres
    gain = (10.0 ** (-loss_db / 20.0)).astype(np.float32)
    return np.asarray(fft.irfft(fft.rfft(np.asarray(x, np.float32), n) * gain, n)[: len(x)], np.float32)


def _absorption_grid_hz() -> npt.NDArray[np.float64]:
    return np.linspace(0.0, RATE_HZ / 2, 65)


@lru_cache(maxsize=1)
def _absorption_grid() -> npt.NDArray[np.float64]:
    return absorption_db_per_metre(_absorption_grid_hz())


def place_response(rng: np.random.Generator, place: str, length_seconds: float = 2.0) -> Samples:
    """Impulse response of a place, direct sound 1.0 at sample 0.

    ``open``: ground reflection only. ``urban``: ground, facades (sparse echoes to 1.5 s) and their diffuse
    tail. ``forest``: scattering off stems, dense, treble first to go. ``indoor``: dense from the start.
    """
    n = round(length_seconds * RATE_HZ)
    response = np.zeros(n)
    response[0] = 1.0
    ground = int(rng.uniform(0.0003, 0.006) * RATE_HZ)
    response[ground] += rng.uniform(0.2, 0.9) * (1 if place != "open" else rng.choice([1, -0.5]))
    if place == "open":
        if rng.random() < 0.5:
            response[int(rng.uniform(0.1, 1.2) * RATE_HZ)] += rng.uniform(0.01, 0.15)
        return (response + _diffuse(rng, n, rng.uniform(0.1, 0.8), rng.uniform(0.002, 0.03), 0.01)).astype(np.float32)
    if place == "urban":
        for _ in range(rng.integers(2, 14)):
            delay = rng.uniform(0.008, 1.2) ** rng.uniform(1.0, 1.6)
            spread = int(rng.uniform(1, 60))
            start = int(delay * RATE_HZ)
            echo = rng.standard_normal(spread) * np.hanning(spread + 2)[1:-1]
            end = min(n, start + spread)
            response[start:end] += (rng.uniform(0.05, 0.8) * math.exp(-1.5 * delay) * _unit(echo))[: end - start]
        tail = _diffuse(rng, n, rng.uniform(0.5, 2.5), rng.uniform(0.01, 0.15), rng.uniform(0.005, 0.08))
    elif place == "forest":
        tail = _diffuse(rng, n, rng.uniform(0.4, 1.8), rng.uniform(0.02, 0.25), rng.uniform(0.003, 0.05))
    else:
        tail = _diffuse(rng, n, rng.uniform(0.15, 1.3), rng.uniform(0.05, 0.4), rng.uniform(0.001, 0.01))
    return (response + tail).astype(np.float32)


def _diffuse(
    rng: np.random.Generator, n: int, decay_seconds: float, level: float, rise_seconds: float
) -> npt.NDArray[np.float64]:
    """Exponentially decaying noise in three bands, the treble decaying 1.5 to 4 times faster than the bass."""
    t = np.arange(n) / RATE_HZ
    noise = rng.standard_normal(n)
    low = signal.lfilter(*signal.butter(1, rng.uniform(300, 900), fs=RATE_HZ), noise)
    high = noise - signal.lfilter(*signal.butter(1, rng.uniform(2000, 4000), fs=RATE_HZ), noise)
    middle = noise - low - high
    treble = rng.uniform(1.5, 4.0)
    tail = sum(
        band * np.exp(-6.9 * t * factor / decay_seconds) * weight
        for band, factor, weight in (
            (low, 1.0, 10 ** rng.uniform(-0.8, 0.5)),
            (middle, 1.3, 1.0),
            (high, treble, 10 ** rng.uniform(-1.0, 0.0)),
        )
    )
    return np.asarray(level * (1 - np.exp(-t / rise_seconds)) * tail)


def low_passed(x: npt.NDArray[np.floating], corner_hz: float) -> Samples:
    """First order, -3 dB at ``corner_hz``."""
    return np.asarray(signal.lfilter(*signal.butter(1, corner_hz, fs=RATE_HZ), x), np.float32)


def convolve(x: npt.NDArray[np.floating], response: npt.NDArray[np.floating]) -> Samples:
    return np.asarray(signal.fftconvolve(x, response), np.float32)


# --- shots --------------------------------------------------------------------------------------------------------


def shot(rng: np.random.Generator, distance_metres: float, *, supersonic: bool | None = None) -> tuple[Samples, int]:
    """One dry shot as heard ``distance_metres`` away: (samples, index of its first arrival).

    Where a fast projectile passes by, its shock wave comes first; then the muzzle blast, whose positive phase stretches
    with distance. Their levels are those of the pressures at that distance.
    """
    stretch = 1.0 + 0.15 * math.log2(1.0 + distance_metres / 10.0)
    blast = muzzle_blast(
        rng.uniform(148, 168),
        rng.uniform(0.00025, 0.0022) * stretch,
        decay=rng.uniform(0.6, 2.0),
        lead_samples=LEAD_SAMPLES,
    ) / max(1.0, distance_metres)
    # Combustion noise of the muzzle jet, below the blast and a few ms long.
    jet_length = int(rng.uniform(0.003, 0.03) * RATE_HZ)
    jet = rng.standard_normal(jet_length) * np.exp(-np.arange(jet_length) / (jet_length / 4))
    wave = np.zeros(max(len(blast), LEAD_SAMPLES + jet_length))
    wave[: len(blast)] += blast
    wave[LEAD_SAMPLES : LEAD_SAMPLES + jet_length] += rng.uniform(0.03, 0.5) * np.max(np.abs(blast)) * _unit(jet)
    mach, angle_radians = rng.uniform(1.1, 2.8), float(np.exp(rng.uniform(math.log(0.02), math.log(1.3))))
    if supersonic if supersonic is not None else rng.random() < 0.4:
        arrival = shock_arrival(distance_metres, angle_radians, mach)
        if arrival is not None:
            seconds, miss_metres = arrival
            lead = int(max(0.0, distance_metres / SPEED_OF_SOUND_METRES_PER_SECOND - seconds) * RATE_HZ)
            shock = shock_wave(miss_metres, mach, lead_samples=LEAD_SAMPLES)
            joined = np.zeros(max(len(shock), lead + len(wave)))
            joined[: len(shock)] += shock
            joined[lead : lead + len(wave)] += wave
            wave = joined
    return air_absorption(_unit(wave), distance_metres), LEAD_SAMPLES


def close_report(rng: np.random.Generator) -> Samples:
    """One shot close to a phone or camera: a crack, then broadband noise that fades over 25 to 450 ms.

    What a muzzle does to a small microphone among reflecting things is noise more than a pulse; half of them with the
    gun's action behind.
    """
    n = int(rng.uniform(0.25, 1.2) * RATE_HZ)
    t = np.arange(n) / RATE_HZ
    noise = rng.standard_normal(n)
    low = signal.lfilter(*signal.butter(1, rng.uniform(300, 900), fs=RATE_HZ), noise)
    high = noise - signal.lfilter(*signal.butter(1, rng.uniform(1800, 4000), fs=RATE_HZ), noise)
    decay_seconds = 10 ** rng.uniform(-1.6, -0.35)
    body = np.zeros(n)
    for band, gain, longer in (
        (low, rng.uniform(1, 4), rng.uniform(0.8, 1.3)),
        (noise - low - high, 1.0, 1.0),
        (high, 10 ** (rng.uniform(-12, 8) / 20), rng.uniform(0.4, 1.0)),
    ):
        body += gain * band * np.exp(-t / (decay_seconds * longer))
    crack = noise * np.exp(-t / 10 ** rng.uniform(-2.7, -1.6))
    out = np.zeros(LEAD_SAMPLES + n + RATE_HZ // 2)
    out[LEAD_SAMPLES : LEAD_SAMPLES + n] = _unit(body) + 10 ** (rng.uniform(-10, 12) / 20) * _unit(crack)
    if rng.random() < 0.5:
        _add(out, action_clatter(rng), rng.uniform(0.02, 0.15), 10 ** (rng.uniform(-30, -6) / 20))
    return _unit(out)


def burst_times(rng: np.random.Generator, kind: str) -> npt.NDArray[np.float64]:
    """Seconds of each shot from the first: ``single``, ``aimed`` (0.4 to 8 a second) or ``automatic`` (7 to 20)."""
    if kind == "single":
        return np.zeros(1)
    if kind == "aimed":
        gaps = rng.uniform(0.18, 1.8) * rng.uniform(0.7, 1.4, rng.integers(1, 7))
    else:
        gaps = 1.0 / rng.uniform(7, 20) * (1.0 + rng.normal(0, 0.03, rng.integers(2, 40)))
    return np.concatenate([[0.0], np.cumsum(gaps)])


def action_clatter(rng: np.random.Generator) -> Samples:
    """Slide, bolt and ejected case: two to four short metallic clicks within 0.15 s of a close shot."""
    out = np.zeros(int(0.25 * RATE_HZ))
    for _ in range(rng.integers(2, 5)):
        click = _modes(rng, rng.uniform(1500, 7000, 5), rng.uniform(0.002, 0.012))
        start = int(rng.uniform(0.01, 0.15) * RATE_HZ)
        out[start : start + len(click)] += rng.uniform(0.2, 1.0) * click[: len(out) - start]
    return _unit(out)


# --- look-alikes --------------------------------------------------------------------------------------------------


def firework(rng: np.random.Generator) -> Samples:
    """Mortar thump, sometimes a whistle on the way up, the burst, then crackle; several in a row, or a finale."""
    out = np.zeros(int(7.0 * RATE_HZ))
    finale = rng.random() < 0.2
    start = 0.0
    for _ in range(rng.integers(6, 30) if finale else rng.integers(1, 6)):
        launched = start
        if rng.random() < (0.2 if finale else 0.5):
            thump = low_passed(friedlander(rng.uniform(0.004, 0.02), rng.uniform(0.5, 1.5)), rng.uniform(150, 1200))
            _add(out, _unit(thump), launched, rng.uniform(0.1, 0.9))
            start += rng.uniform(0.3, 2.0)
        if rng.random() < (0.2 if finale else 0.5):
            length = rng.uniform(0.4, 1.4)
            t = np.arange(int(length * RATE_HZ)) / RATE_HZ
            sweep = np.linspace(rng.uniform(1500, 4500), rng.uniform(800, 5000), len(t))
            wobble = 1 + 0.01 * np.sin(2 * np.pi * rng.uniform(5, 30) * t)
            whistle = (
                np.sin(2 * np.pi * np.cumsum(sweep * wobble) / RATE_HZ) * np.hanning(len(t)) * rng.uniform(0.03, 0.4)
            )
            hiss = rng.standard_normal(len(t)) * np.hanning(len(t)) * rng.uniform(0.0, 0.06)
            _add(out, (whistle + hiss).astype(np.float32), launched)
            start = max(start, launched + length * rng.uniform(0.8, 1.0))
        burst = friedlander(rng.uniform(0.0025, 0.014), rng.uniform(0.5, 1.5))
        _add(out, burst, start, rng.uniform(0.2 if finale else 0.4, 1.0))
        if rng.random() < 0.75:
            _add(out, crackle(rng, rng.uniform(0.4, 2.2)), start + rng.uniform(0.02, 0.5), rng.uniform(0.08, 0.6))
        start = launched + rng.uniform(0.03, 0.5) if finale else start + rng.uniform(0.15, 1.5)
        if start > 6.5:
            break
    return _unit(out)


def crackle(rng: np.random.Generator, length_seconds: float) -> Samples:
    """Crackling stars: pops at random moments, 40 to 400 a second, of random loudness."""
    out = np.zeros(int(length_seconds * RATE_HZ))
    count = int(rng.uniform(40, 400) * length_seconds)
    pops = [friedlander(rng.uniform(0.0001, 0.0006), 1.0, 0.004) for _ in range(6)]
    envelope_peak = rng.uniform(0.1, 0.6) * length_seconds
    for moment in rng.uniform(0, length_seconds, count):
        loud = rng.exponential(1.0) * math.exp(-((moment - envelope_peak) ** 2) / (0.5 * length_seconds) ** 2)
        _add(out, pops[rng.integers(6)], moment, loud)
    return _unit(out)


def firecrackers(rng: np.random.Generator) -> Samples:
    """A string of crackers: 8 to 60 irregular pops a second (never regular like a machine gun), uneven, overlapping."""
    length = rng.uniform(0.5, 5.0)
    out = np.zeros(int((length + 0.3) * RATE_HZ))
    moment = 0.0
    while moment < length:
        _add(out, friedlander(rng.uniform(0.0001, 0.0006), rng.uniform(0.8, 2.0)), moment, rng.lognormal(0, 0.7))
        moment += rng.exponential(1.0 / rng.uniform(8, 60))
    return _unit(out)


def door_slam(rng: np.random.Generator) -> Samples:
    """Panel and frame ring at 40 to 400 Hz, the latch clicks shortly before or after."""
    out = np.zeros(int(0.9 * RATE_HZ))
    _add(out, _modes(rng, rng.uniform(40, 400, 8), rng.uniform(0.03, 0.18)), 0.03)
    thud = _fading_noise(rng, int(0.03 * RATE_HZ), 6)
    thud = signal.lfilter(*signal.butter(2, rng.uniform(300, 2500), fs=RATE_HZ), thud)
    _add(out, _unit(thud), 0.03, rng.uniform(0.3, 1.5))
    for _ in range(rng.integers(1, 4)):
        _add(out, _modes(rng, rng.uniform(800, 6000, 4), 0.008), rng.uniform(0.0, 0.15), rng.uniform(0.1, 0.6))
    return _unit(out)


def knocks(rng: np.random.Generator) -> Samples:
    """Knuckles or a hammer: one to eight equal modal hits, 2 to 9 a second."""
    rate = rng.uniform(2.0, 9.0)
    count = int(rng.integers(1, 9))
    out = np.zeros(int((count / rate + 0.5) * RATE_HZ))
    frequencies, decay = rng.uniform(120, 2500, rng.integers(4, 9)), rng.uniform(0.006, 0.05)
    for i in range(count):
        hit = _modes(rng, frequencies, decay * rng.uniform(0.9, 1.1))
        _add(out, hit, i / rate * rng.uniform(0.95, 1.05), rng.uniform(0.5, 1.0))
    return _unit(out)


def metal_hit(rng: np.random.Generator) -> Samples:
    """Something of metal or glass struck or dropped: inharmonic, ringing 0.03 to 0.8 s; bounces."""
    out = np.zeros(int(2.0 * RATE_HZ))
    frequencies, decay = rng.uniform(500, 7800, rng.integers(6, 16)), rng.uniform(0.03, 0.8)
    moment, gap, loud = 0.0, rng.uniform(0.1, 0.5), 1.0
    for _ in range(rng.integers(1, 7)):
        _add(out, _modes(rng, frequencies, decay), moment, loud)
        moment, gap, loud = moment + gap, gap * rng.uniform(0.5, 0.95), loud * rng.uniform(0.4, 0.9)
    return _unit(out)


def claps(rng: np.random.Generator) -> Samples:
    """One to ten hand claps: band noise around 1 to 3 kHz, under 15 ms each."""
    count = int(rng.integers(1, 11))
    rate = rng.uniform(1.0, 6.0)
    out = np.zeros(int((count / rate + 0.3) * RATE_HZ))
    centre = rng.uniform(700, 3000)
    band = signal.butter(1, [0.5 * centre, min(7500, 2.0 * centre)], "bandpass", fs=RATE_HZ)
    for i in range(count):
        n = int(rng.uniform(0.008, 0.04) * RATE_HZ)
        clap = signal.lfilter(*band, _fading_noise(rng, n, 7))
        _add(out, _unit(clap), i / rate + rng.uniform(0, 0.04), rng.uniform(0.4, 1.0))
    return _unit(out)


def applause(rng: np.random.Generator) -> Samples:
    """Many hands: 15 to 400 claps a second around 0.5 to 4 kHz, swelling and fading."""
    length = rng.uniform(0.8, 5.0)
    out = np.zeros(int((length + 0.1) * RATE_HZ))
    claps_of = []
    for _ in range(12):
        centre, n = rng.uniform(500, 4000), int(rng.uniform(0.004, 0.03) * RATE_HZ)
        band = signal.butter(1, [0.6 * centre, min(7500, 1.7 * centre)], "bandpass", fs=RATE_HZ)
        claps_of.append(_unit(signal.lfilter(*band, _fading_noise(rng, n, 7))))
    moments = rng.uniform(0, length, int(10 ** rng.uniform(1.2, 2.6) * length))
    swell = np.interp(moments, [0.0, rng.uniform(0.0, 0.5) * length, length], [rng.uniform(0, 1), 1, rng.uniform(0, 1)])
    for moment, loud in zip(moments, swell, strict=True):
        _add(out, claps_of[rng.integers(12)], moment, loud * rng.lognormal(0, 0.6))
    return _unit(out)


def creak(rng: np.random.Generator) -> Samples:
    """A hinge or a board: stick-slip pulses at a gliding rate of 8 to 300 a second through a body's resonances."""
    length = rng.uniform(0.3, 4.0)
    n = int(length * RATE_HZ)
    low, high = np.log(8.0), np.log(300.0)
    rate = np.exp(np.clip(rng.uniform(low, high) + rng.uniform(0.1, 0.8) * _wander(rng, n, 0.3), low, high))
    slips = np.flatnonzero(np.diff(np.floor(np.cumsum(rate) / RATE_HZ), prepend=0.0))
    strength = np.clip(1.0 + _wander(rng, n, rng.uniform(0.05, 0.4)), 0, None)
    pulses = np.zeros(n)
    pulses[np.minimum(n - 1, slips + rng.integers(0, 1 + int(rng.uniform(0, 40)), len(slips)))] = 1.0
    body = _modes(rng, rng.uniform(150, 6500, rng.integers(4, 12)), rng.uniform(0.001, 0.02))
    return _unit(signal.fftconvolve(pulses * strength * rng.lognormal(0, 0.4, n), body)[:n])


def shatter(rng: np.random.Generator) -> Samples:
    """Glass or crockery that breaks: a crack, then 10 to 150 shards that ring above 1.5 kHz and fall within 1.5 s."""
    out = np.zeros(int(2.5 * RATE_HZ))
    n = int(rng.uniform(0.005, 0.08) * RATE_HZ)
    crack = np.diff(rng.standard_normal(n), prepend=0.0) * np.exp(-np.linspace(0, 6, n))
    _add(out, _unit(crack), 0.02, rng.uniform(0.2, 1.5))
    if rng.random() < 0.5:
        _add(out, _modes(rng, rng.uniform(60, 900, 5), rng.uniform(0.01, 0.06)), 0.02, rng.uniform(0.2, 1.5))
    fall = rng.uniform(0.05, 0.5)
    shards = [_modes(rng, rng.uniform(1500, 7900, 5), rng.uniform(0.003, 0.08)) for _ in range(10)]
    for _ in range(rng.integers(10, 150)):
        later = rng.exponential(fall)
        _add(out, shards[rng.integers(10)], 0.02 + later, rng.lognormal(-0.7, 0.7) * math.exp(-later / (2 * fall)))
    return _unit(out)


def hits(rng: np.random.Generator) -> Samples:
    """Something struck, dropped or shaken, of any material: noise and ringing in any mixture, in any rhythm."""
    count = 1 if rng.random() < 0.3 else int(rng.integers(2, 16))
    gap = 10 ** rng.uniform(-1.5, 0.0)
    gaps = gap * (rng.uniform(0.6, 0.98) ** np.arange(count) if rng.random() < 0.3 else np.ones(count))
    gaps = gaps * (1.0 + rng.choice([0.02, 0.2, 0.7]) * rng.uniform(-1, 1, count))
    moments = np.concatenate([[0.0], np.cumsum(gaps)])[:count]
    moments = moments[moments < 4.0]
    centre, decay = 10 ** rng.uniform(2.0, 3.8), 10 ** rng.uniform(-2.7, -1.4)
    width = rng.uniform(1.2, 6.0)
    band = signal.butter(1, [centre / width, min(7800, centre * width)], "bandpass", fs=RATE_HZ)
    frequencies = 10 ** rng.uniform(1.8, 3.89, rng.integers(2, 14))
    ringing, rattle = rng.uniform(0, 1.5), decay * 10 ** rng.uniform(-1.0, 0.7)
    out = np.zeros(int((moments[-1] + 1.0) * RATE_HZ))
    for moment in moments:
        n = int((7 * decay + 0.002) * RATE_HZ)
        rise = 1 - np.exp(-np.arange(n) / (RATE_HZ * decay * rng.uniform(0.001, 0.3)))
        noise = signal.lfilter(*band, rng.standard_normal(n) * rise * np.exp(-np.arange(n) / (RATE_HZ * decay)))
        loud = rng.uniform(0.3, 1.0)
        _add(out, _unit(noise), moment, loud)
        _add(out, _modes(rng, frequencies * rng.uniform(0.97, 1.03), min(0.3, rattle)), moment, loud * ringing)
    return _unit(out)


def pneumatic_tool(rng: np.random.Generator) -> Samples:
    """Jackhammers, hammer drills, diesel engines: 9 to 45 equal blows a second, each a puff of air, a clang and a thud.

    In two of three the puff is the loudest, and there is noise beneath: YAMNet calls many of those a jackhammer.
    """
    n = int(rng.uniform(1.0, 6.0) * RATE_HZ)
    rate = float(np.exp(rng.uniform(math.log(9), math.log(45))))
    gaps = (1.0 + 0.02 * rng.standard_normal(int(n / RATE_HZ * rate) + 1)) / rate
    if rng.random() < 0.4:
        gaps[rng.random(len(gaps)) < 0.03] += rng.uniform(0.2, 1.2)
    moments = np.cumsum(gaps)
    low = rng.uniform(2.3, 3.2)
    clang = _modes(rng, 10 ** rng.uniform(low, low + 0.65, rng.integers(3, 12)), 10 ** rng.uniform(-2.7, -1.5))
    thud = _modes(rng, rng.uniform(40, 400, 4), rng.uniform(0.005, 0.03))
    centre, width = 10 ** rng.uniform(2.4, 3.6), rng.uniform(1.5, 6.0)
    band = signal.butter(1, [centre / width, min(7800, width * centre)], "bandpass", fs=RATE_HZ)
    length = int(2 * 10 ** rng.uniform(-2.3, -1.2) * RATE_HZ)
    puff_gain, thud_gain, clang_gain = 10 ** (rng.uniform(-15, 3, 3) / 20)
    if rng.random() < 0.67:
        puff_gain = 1.5
    out = np.zeros(n)
    for moment in moments[moments < n / RATE_HZ]:
        puff = signal.lfilter(*band, _fading_noise(rng, length, 5))
        loud = rng.uniform(0.8, 1.0)
        _add(out, _unit(puff), moment + rng.uniform(0.0, 0.002), loud * puff_gain)
        _add(out, clang, moment, loud * clang_gain)
        _add(out, thud, moment, loud * thud_gain)
    out /= np.sqrt(np.mean(out**2)) + 1e-12
    out += 10 ** (rng.uniform(-35, 0) / 20) * coloured_noise(rng, n)
    if rng.random() < 0.5:
        out += 10 ** (rng.uniform(-30, 0) / 20) * machinery(rng, n)
    return _unit(out)


def hammering(rng: np.random.Generator) -> Samples:
    """A hammer, a sledge or a pile driver: up to 20 like blows, 0.4 to 5 a second: click, thud, ring, some rebound."""
    rate = float(np.exp(rng.uniform(math.log(0.4), math.log(5))))
    gaps = np.maximum(0.1, 1.0 + 0.06 * rng.standard_normal(int(rng.integers(1, 21)))) / rate
    moments = 0.05 + np.cumsum(gaps) - gaps[0]
    moments = moments[moments < 5.5]
    out = np.zeros(int((moments[-1] + 1.2) * RATE_HZ))
    ring = _modes(rng, 10 ** rng.uniform(2.2, 3.88, rng.integers(3, 14)), 10 ** rng.uniform(-2.2, -0.6))
    thud = _modes(rng, rng.uniform(50, 700, 6), 10 ** rng.uniform(-2.3, -1.2))
    length, corner_hz = int(10 ** rng.uniform(-2.6, -1.5) * RATE_HZ), 10 ** rng.uniform(3.0, 3.85)
    ring_gain, thud_gain, click_gain = 10 ** (rng.uniform(-15, 3, 3) / 20)
    for moment in moments:
        click = _unit(low_passed(_fading_noise(rng, length, 6), corner_hz))
        loud = rng.uniform(0.6, 1.0)
        for at, gain in ((moment, loud), (moment + rng.uniform(0.04, 0.2), loud * rng.choice([0.0, 0.0, 0.3]))):
            _add(out, ring, at, gain * ring_gain * rng.uniform(0.7, 1.0))
            _add(out, thud, at, gain * thud_gain)
            _add(out, click, at, gain * click_gain)
    return _unit(out)


def drums(rng: np.random.Generator) -> Samples:
    """A drum kit, or hands on one drum, at 70 to 180 beats a minute, alone or with chords."""
    n = int(rng.uniform(2.0, 6.0) * RATE_HZ)
    step = 60.0 / rng.uniform(70, 180) / rng.choice([2, 4])
    t = np.arange(int(0.4 * RATE_HZ)) / RATE_HZ
    low, high = rng.uniform(40, 70), rng.uniform(90, 250)
    kick = np.sin(2 * np.pi * np.cumsum(low + (high - low) * np.exp(-t / 0.03)) / RATE_HZ)
    kick *= np.exp(-t / rng.uniform(0.05, 0.15))
    centre = rng.uniform(1500, 4000)
    band = signal.butter(1, [centre / 4, min(7800, 2 * centre)], "bandpass", fs=RATE_HZ)
    snare = _unit(signal.lfilter(*band, rng.standard_normal(len(t))) * np.exp(-t / rng.uniform(0.03, 0.12)))
    _add(snare, _modes(rng, rng.uniform(150, 450, 3), rng.uniform(0.02, 0.08)), 0.0, rng.uniform(0.2, 1.0))
    hat = np.diff(rng.standard_normal(len(t)), prepend=0.0) * np.exp(-t / 10 ** rng.uniform(-2.0, -0.9))
    tom = _modes(rng, rng.uniform(80, 600) * np.array([1, 1.59, 2.14, 2.3, 2.65]), rng.uniform(0.03, 0.25))
    gains, chances = 10 ** (rng.uniform(-15, 0, 4) / 20), rng.uniform(0, 0.8, 4) * (rng.random(4) < 0.75)
    bar = rng.random((4, rng.choice([8, 12, 16]))) < chances[:, None]
    bar[rng.integers(4), 0] = True
    kit, out, swing_seconds = (_unit(kick), snare, _unit(hat), tom), np.zeros(n), rng.uniform(0.0, 0.01)
    for i in range(int(n / RATE_HZ / step)):
        for part in np.flatnonzero(bar[:, i % bar.shape[1]]):
            _add(out, kit[part], max(0.0, i * step + rng.normal(0, swing_seconds)), gains[part] * rng.uniform(0.6, 1.0))
    if rng.random() < 0.5:
        chord = np.zeros(n)
        for note in rng.integers(-24, 25, rng.integers(1, 6)):
            change = np.repeat(2 ** (rng.choice([-5, 0, 0, 2, 4], n // 8000 + 1) / 12), 8000)[:n]
            turns = np.cumsum(220.0 * 2 ** (note / 12) * change) / RATE_HZ
            steepness = rng.uniform(1, 2)
            for k in range(1, 6):
                chord += np.sin(2 * np.pi * k * turns) / k**steepness
        out = _unit(out) + 10 ** (rng.uniform(-24, 3) / 20) * _unit(chord)
    return _unit(out)


def drops(rng: np.random.Generator) -> Samples:
    """Rain or twigs on a housing, popping and pattering: 0.5 to 50 short knocks a second at random moments."""
    length = rng.uniform(2.0, 6.0)
    out = np.zeros(int(length * RATE_HZ))
    kinds = [
        _modes(rng, 10 ** rng.uniform(2.0, 3.7, rng.integers(1, 6)), 10 ** rng.uniform(-3, -1.7)) for _ in range(6)
    ]
    for moment in rng.uniform(0, length, 1 + int(10 ** rng.uniform(-0.3, 1.7) * length)):
        _add(out, kinds[rng.integers(6)], moment, rng.lognormal(0, 0.8))
    return _unit(out)


def pop_and_hiss(rng: np.random.Generator) -> Samples:
    """A can, a bottle or a valve opened: a click, sometimes a pop, then 0.05 to 1.5 s of hiss that fades."""
    out = np.zeros(int(2.0 * RATE_HZ))
    click = _modes(rng, rng.uniform(800, 7500, 6), rng.uniform(0.001, 0.02))
    _add(out, click, 0.02, rng.uniform(0.3, 1.0))
    n = int(rng.uniform(0.05, 1.5) * RATE_HZ)
    low = rng.uniform(800, 4000)
    band = signal.butter(1, [low, rng.uniform(low + 1000, 7900)], "bandpass", fs=RATE_HZ)
    hiss = signal.lfilter(*band, rng.standard_normal(n)) * np.exp(-np.linspace(0, rng.uniform(2, 8), n))
    start = 0.02 + rng.choice([0.0, rng.uniform(0.0, 0.3)])
    _add(out, _unit(hiss), start, rng.uniform(0.1, 1.0))
    if rng.random() < 0.5:
        _add(out, _modes(rng, rng.uniform(150, 1500, 3), rng.uniform(0.004, 0.03)), start, rng.uniform(0.2, 1.0))
    for _ in range(rng.integers(0, 4)):
        _add(out, click, rng.uniform(0.1, 1.7), rng.uniform(0.05, 0.6))
    return _unit(out)


def thunder(rng: np.random.Generator) -> Samples:
    """Rumble below 100 to 900 Hz with a slow, wandering envelope; near strokes begin with crackling tears."""
    n = int(rng.uniform(2.5, 7.0) * RATE_HZ)
    t = np.arange(n) / RATE_HZ
    knots = np.cumsum(rng.normal(0, 0.5, n // 1600 + 2))
    envelope = np.exp(np.interp(np.arange(n), np.arange(len(knots)) * 1600, knots) - 0.6 * t) * (
        1 - np.exp(-t / rng.uniform(0.03, 0.8))
    )
    rumble = signal.lfilter(*signal.butter(2, rng.uniform(100, 900), fs=RATE_HZ), rng.standard_normal(n)) * envelope
    out = _unit(rumble).astype(np.float64)
    if rng.random() < 0.4:
        _add(out, crackle(rng, rng.uniform(0.2, 0.9)), rng.uniform(0, 0.3), rng.uniform(0.1, 0.7))
    return _unit(out)


def explosion(rng: np.random.Generator) -> Samples:
    """A charge: blast wave of 5 to 40 ms, then seconds of rumble and falling debris."""
    out = np.zeros(int(4.0 * RATE_HZ))
    _add(out, friedlander(rng.uniform(0.005, 0.04), rng.uniform(0.4, 1.2), 0.4), 0.0)
    n = int(rng.uniform(1.0, 3.8) * RATE_HZ)
    rumble = signal.lfilter(*signal.butter(2, rng.uniform(80, 700), fs=RATE_HZ), rng.standard_normal(n))
    rumble *= np.exp(-np.linspace(0, rng.uniform(3, 7), n)) * (1 - np.exp(-np.arange(n) / (0.03 * RATE_HZ)))
    _add(out, _unit(rumble), 0.005, rng.uniform(0.3, 1.5))
    if rng.random() < 0.5:
        _add(out, crackle(rng, rng.uniform(0.5, 2.0)), rng.uniform(0.1, 0.6), rng.uniform(0.02, 0.2))
    return _unit(out)


def backfire(rng: np.random.Generator) -> Samples:
    """An exhaust's bangs, 1 to 4, through its pipe's resonance, on an engine's hum."""
    length = rng.uniform(1.0, 3.0)
    t = np.arange(int(length * RATE_HZ)) / RATE_HZ
    engine = sum(np.sin(2 * np.pi * k * rng.uniform(25, 80) * t + rng.uniform(0, 6)) / k for k in range(1, 8))
    out = rng.uniform(0.02, 0.2) * np.asarray(engine)
    for _ in range(rng.integers(1, 5)):
        bang = _modes(rng, rng.uniform(60, 900, 6), rng.uniform(0.02, 0.08))
        _add(out, bang, rng.uniform(0.0, length - 0.3), rng.uniform(0.4, 1.0))
    return _unit(out)


def clicks(rng: np.random.Generator) -> Samples:
    """Faults and bumps: single samples, short dropouts' edges, a hand on the microphone."""
    out = np.zeros(int(2.0 * RATE_HZ))
    for _ in range(rng.integers(1, 12)):
        kind, moment = rng.integers(3), rng.uniform(0, 1.8)
        if kind == 0:
            pop = np.zeros(int(rng.integers(1, 12)))
            pop[:] = rng.choice([-1, 1])
        elif kind == 1:
            n = int(rng.uniform(0.02, 0.15) * RATE_HZ)
            pop = np.sin(np.linspace(0, np.pi * rng.uniform(1, 6), n)) * np.exp(-np.linspace(0, 4, n))
        else:
            pop = _modes(rng, rng.uniform(1000, 7500, 4), rng.uniform(0.0005, 0.006)).astype(np.float64)
        _add(out, pop, moment, rng.uniform(0.2, 1.0))
    return _unit(out)


def babble(rng: np.random.Generator, length_seconds: float) -> Samples:
    """Speech-like: one to four voices of glottal pulses through wandering formants, in syllables, with fricatives."""
    n = int(length_seconds * RATE_HZ)
    t = np.arange(n) / RATE_HZ
    out = np.zeros(n)
    for _ in range(rng.integers(1, 5)):
        pitch = rng.uniform(85, 260) * np.exp(0.15 * _wander(rng, n, 0.3))
        pulses = np.diff(np.floor(np.cumsum(pitch) / RATE_HZ), prepend=0.0)
        syllables = np.clip(np.sin(2 * np.pi * rng.uniform(2.5, 6) * t + 2 * _wander(rng, n, 0.5)), 0, None)
        voice = np.zeros(n)
        for centre in (rng.uniform(300, 800), rng.uniform(900, 2200), rng.uniform(2300, 3500)):
            band = signal.butter(1, [0.85 * centre, 1.15 * centre], "bandpass", fs=RATE_HZ)
            voice += signal.lfilter(*band, pulses)
        fricative = np.diff(rng.standard_normal(n), prepend=0.0) * np.clip(_wander(rng, n, 0.1) - 1.0, 0, None) * 0.01
        out += rng.uniform(0.3, 1.0) * (voice * syllables + fricative)
    return _unit(out)


def coloured_noise(rng: np.random.Generator, n: int) -> Samples:
    """Noise with a random slope from +3 to -9 dB an octave and slow swelling; RMS 1."""
    size = fft.next_fast_len(n, real=True)
    spectrum = fft.rfft(rng.standard_normal(size, np.float32))
    f = np.fft.rfftfreq(size, 1.0 / RATE_HZ)
    slope_db = rng.uniform(-9, 3)
    spectrum *= ((np.maximum(f, 60.0) / 1000.0) ** (slope_db / 6.02)).astype(np.float32)
    noise = fft.irfft(spectrum, size)[:n] * np.exp(rng.uniform(0, 0.4) * _wander(rng, n, 0.5))
    return np.asarray(noise / (np.sqrt(np.mean(noise**2)) + 1e-12), np.float32)


def machinery(rng: np.random.Generator, n: int) -> Samples:
    """Fans, compressors, mains: one to three rows of harmonics of 15 to 400 Hz over bands of noise, steady; RMS 1."""
    out = np.zeros(n)
    for _ in range(rng.integers(1, 4)):
        base_hz, slope_db = float(np.exp(rng.uniform(math.log(15), math.log(400)))), rng.uniform(-12, -1)
        turns = np.cumsum(1 + rng.choice([0.0, 0.003, 0.02]) * _wander(rng, n, 0.5)) * (base_hz / RATE_HZ)
        k = np.arange(1, 1 + min(int(rng.integers(1, 24)), int(6000 / base_hz)))
        levels_db = slope_db * np.log2(k) + rng.normal(0, 6, len(k))
        row = np.zeros(2049, np.complex128)
        row[k] = 10 ** (levels_db / 20) * np.exp(1j * rng.uniform(0, 6.28, len(k)))
        one_turn = fft.irfft(row) * 2048
        out += one_turn[((turns % 1.0) * 4096).astype(np.int64) % 4096]
    out /= np.sqrt(np.mean(out**2)) + 1e-12
    if bands := rng.integers(0, 5):
        size = fft.next_fast_len(n, real=True)
        octaves = np.log2(np.maximum(np.fft.rfftfreq(size, 1.0 / RATE_HZ), 1.0))
        gain = np.zeros(len(octaves))
        for _ in range(bands):
            centre, width, level_db = np.log2(10 ** rng.uniform(1.7, 3.5)), rng.uniform(0.05, 1.0), rng.uniform(-20, 10)
            shape = np.exp(-(((octaves - centre) / width) ** 2))
            gain += 10 ** (level_db / 20) * shape / (np.sqrt(np.mean(shape**2)) + 1e-12)
        out += fft.irfft(fft.rfft(rng.standard_normal(size, np.float32)) * gain.astype(np.float32), size)[:n]
    out *= np.exp(rng.choice([0.0, 0.1]) * _wander(rng, n, 0.7))
    return np.asarray(out / (np.sqrt(np.mean(out**2)) + 1e-12), np.float32)


def _wander(rng: np.random.Generator, n: int, step_seconds: float) -> npt.NDArray[np.float64]:
    """Smooth random curve of unit variance that changes over ``step_seconds``."""
    step = max(1, int(step_seconds * RATE_HZ))
    knots = rng.standard_normal(n // step + 2)
    return np.interp(np.arange(n), np.arange(len(knots)) * step, knots)


def _fading_noise(rng: np.random.Generator, n: int, decays: float) -> npt.NDArray[np.float64]:
    """``n`` samples of white noise whose level falls at once and by a factor of e ``decays`` times."""
    return np.asarray(rng.standard_normal(n) * np.exp(-np.linspace(0, decays, n)))


def _modes(rng: np.random.Generator, frequencies_hz: npt.NDArray[np.float64], decay_seconds: float) -> Samples:
    """A struck body: decaying sines, the higher the shorter."""
    n = int(min(1.5, 7.0 * decay_seconds + 0.01) * RATE_HZ)
    t = np.arange(n) / RATE_HZ
    lowest = frequencies_hz.min()
    tones = [
        rng.uniform(0.2, 1.0)
        * np.sin(2 * np.pi * f * t + rng.uniform(0, 6.28))
        * np.exp(-t / decay_seconds * (f / lowest) ** 0.3)
        for f in frequencies_hz
    ]
    return _unit(np.sum(tones, axis=0))


def _add(out: npt.NDArray[np.floating], x: npt.NDArray[np.floating], start_seconds: float, gain: float = 1.0) -> None:
    start = int(start_seconds * RATE_HZ)
    end = min(len(out), start + len(x))
    if end > start:
        out[start:end] += gain * x[: end - start]


def _unit(x: npt.NDArray[np.floating]) -> Samples:
    peak = np.max(np.abs(x)) if len(x) else 0.0
    return (x / peak if peak > 0 else x).astype(np.float32)
