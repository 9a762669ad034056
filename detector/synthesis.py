"""Sounds of a city from first principles: shots and what is mistaken for them, and the way from there to a microphone.

Pure numpy and scipy; every random choice comes from the ``numpy.random.Generator`` handed in, so that the same seed
gives the same sound. Sources are pressures in pascal at 1 m (``(n,) float64``, 16 kHz unless ``rate_hz`` says
otherwise), except ``shock_wave``, which has no source point. Nothing here is normalised or clipped:
``pascal_to_full_scale`` does the rest.

Sources: R. C. Maher, "Modeling and signal processing of acoustic gunshot recordings", IEEE SPW 2006 (muzzle blast,
N-wave); G. B. Whitham, "The flow pattern of a supersonic projectile", 1952 (length and pressure of the N-wave); F. G.
Friedlander, 1946 (blast pulse); ISO 9613-1:1993 (absorption of air); J. A. Moorer, "About this reverberation
business", 1979 (exponentially decaying noise as a diffuse tail); H. S. Ribner and D. Roy, "Acoustics of thunder",
1982 (thunder as the N-waves of a tortuous channel).
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
from scipy import signal

from detector.chunk import RATE_HZ

FloatArray = npt.NDArray[np.float64]

SPEED_OF_SOUND_METRES_PER_SECOND = 343.0  # dry air of 20 degrees Celsius
REFERENCE_PASCAL = 20e-6
ATMOSPHERE_PASCAL = 101_325.0
_FINE = 8  # pulses are computed at this multiple of the rate, then band-limited, so that their edges do not alias


def peak_pascal(level_db: float) -> float:
    """Peak sound pressure level re 20 micropascal -> pascal."""
    return float(REFERENCE_PASCAL * 10.0 ** (level_db / 20.0))


def pascal_to_full_scale(x: FloatArray, full_scale_db: float) -> FloatArray:
    """Pascal -> units in which a microphone overloads at ±1, the peak level ``full_scale_db``. Not clipped."""
    return x / peak_pascal(full_scale_db)


def _band_limited(fine: FloatArray) -> FloatArray:
    return np.asarray(signal.resample_poly(fine, 1, _FINE), np.float64)


def muzzle_blast(
    level_db: float, positive_phase_seconds: float, *, decay: float = 1.0, lead_samples: int = 8, rate_hz: int = RATE_HZ
) -> FloatArray:
    """Friedlander pulse ``P (1 - t/T) exp(-decay t/T)``, with T the positive phase: 0.3 to 1 ms a pistol, 5 ms a
    cannon.

    The pulse sets in ``lead_samples`` after the first sample, which leaves room for the band limit's ringing.
    """
    length = math.ceil((8.0 * positive_phase_seconds + 0.004) * rate_hz) * _FINE
    t = np.arange(length) / (rate_hz * _FINE) / positive_phase_seconds
    pulse = peak_pascal(level_db) * (1.0 - t) * np.exp(-decay * t)
    return _band_limited(np.concatenate([np.zeros(lead_samples * _FINE), pulse]))


def shock_wave(
    miss_metres: float,
    mach: float,
    *,
    diameter_metres: float = 0.0078,
    length_metres: float = 0.030,
    lead_samples: int = 8,
    rate_hz: int = RATE_HZ,
) -> FloatArray:
    """N-wave of a bullet passing at ``miss_metres``, in pascal at the microphone (Whitham's far field).

    ``T = 1.82 M b^(1/4) d / (c (M^2-1)^(3/8) l^(1/4))``, ``P = 0.53 P0 (M^2-1)^(1/8) d / (b^(3/4) l^(1/4))``.
    """
    if mach <= 1.0 or miss_metres <= 0.0:
        raise ValueError("a shock wave needs mach > 1 and miss_metres > 0")
    excess = mach * mach - 1.0
    slender = length_metres**0.25
    seconds = (
        1.82 * mach * miss_metres**0.25 * diameter_metres / (SPEED_OF_SOUND_METRES_PER_SECOND * excess**0.375 * slender)
    )
    pressure = 0.53 * ATMOSPHERE_PASCAL * excess**0.125 * diameter_metres / (miss_metres**0.75 * slender)
    n = max(2, round(seconds * rate_hz * _FINE))
    wave = pressure * np.linspace(1.0, -1.0, n)
    lead = np.zeros(lead_samples * _FINE)
    return _band_limited(np.concatenate([lead, wave, np.zeros(16 * _FINE)]))


def shock_arrival(
    distance_metres: float, angle_radians: float, mach: float, range_metres: float = 600.0
) -> tuple[float, float] | None:
    """Where the Mach cone of a bullet meets a microphone.

    Args:
        distance_metres: muzzle to microphone. angle_radians: between that line and the line of fire.

    Returns:
        ``(seconds after the shot, miss distance in metres)``, or None outside the cone (the microphone is behind the
        region swept by it, or beyond ``range_metres``).
    """
    miss = distance_metres * math.sin(angle_radians)
    along = distance_metres * math.cos(angle_radians)
    left = along - miss / math.sqrt(mach * mach - 1.0)  # where on its way the bullet sent what arrives
    if mach <= 1.0 or miss < 0.3 or not 0.0 < left < range_metres:
        return None
    return (left / mach + math.hypot(along - left, miss)) / SPEED_OF_SOUND_METRES_PER_SECOND, miss


def burst(
    rng: np.random.Generator,
    shots: int,
    interval_seconds: float,
    *,
    jitter: float = 0.0,
) -> FloatArray:
    """Times of a burst's shots: ``(shots,)`` seconds from the first. ``jitter``: relative spread of the intervals."""
    gaps = interval_seconds * np.clip(1.0 + jitter * rng.standard_normal(max(0, shots - 1)), 0.3, 3.0)
    return np.concatenate([[0.0], np.cumsum(gaps)])


def firework(rng: np.random.Generator, *, rate_hz: int = RATE_HZ) -> tuple[FloatArray, float]:
    """A rocket: rising whistle, a deep report, crackle. Returns ``(pressure at 1 m, seconds until the report)``."""
    whistle_seconds = rng.uniform(0.5, 1.2)
    out = np.zeros(round((whistle_seconds + 3.2) * rate_hz))
    n = round(whistle_seconds * rate_hz)
    t = np.arange(n) / rate_hz
    start_hz, end_hz = rng.uniform(1500, 2200), rng.uniform(2600, 3600)
    wobble = 60.0 * np.sin(2 * np.pi * rng.uniform(15, 30) * t)
    phase = 2 * np.pi * np.cumsum(start_hz + (end_hz - start_hz) * t / whistle_seconds + wobble) / rate_hz
    hiss = signal.sosfilt(signal.butter(2, [800, 6000], "bandpass", fs=rate_hz, output="sos"), rng.standard_normal(n))
    fade = np.minimum(1.0, np.minimum(t / 0.1, (whistle_seconds - t) / 0.15))
    out[:n] += peak_pascal(108) * fade * (np.sin(phase) + 0.3 * np.sin(2 * phase) + 0.5 * hiss)
    report_seconds = whistle_seconds + 0.1
    _add(out, report_seconds, muzzle_blast(rng.uniform(146, 150), rng.uniform(0.004, 0.008), rate_hz=rate_hz), rate_hz)
    for at in report_seconds + 0.25 + rng.gamma(2.0, 0.45, size=int(rng.integers(25, 70))):
        _add(out, at, muzzle_blast(rng.uniform(112, 126), rng.uniform(0.0002, 0.0005), rate_hz=rate_hz), rate_hz)
    return out, report_seconds


def firecrackers(rng: np.random.Generator, count: int = 20, *, rate_hz: int = RATE_HZ) -> FloatArray:
    """A string of firecrackers: short, bright pulses of uneven strength at uneven intervals."""
    times = np.cumsum(rng.exponential(0.07, size=count))
    out = np.zeros(round((times[-1] + 0.1) * rate_hz))
    for at in times - times[0]:
        _add(out, at, muzzle_blast(rng.uniform(130, 141), rng.uniform(0.0002, 0.0006), rate_hz=rate_hz), rate_hz)
    return out


def thunder(rng: np.random.Generator, *, distance_metres: float, rate_hz: int = RATE_HZ) -> FloatArray:
    """Thunder as heard at ``distance_metres`` (pascal there): N-waves of a tortuous channel's segments, and rumble.

    The segments' sound arrives over seconds, as they are at different distances; the farther, the deeper and smoother.
    """
    seconds = rng.uniform(4.0, 8.0)
    n = round(seconds * rate_hz)
    impulses = np.zeros(n)
    clap_times = np.sort(rng.uniform(0.0, 0.55 * seconds, size=int(rng.integers(4, 9))))
    clap_times[0] = 0.05
    for clap, at in enumerate(clap_times):
        strength = rng.uniform(0.4, 1.0) * math.exp(-0.35 * clap)
        spread = rng.uniform(0.05, 0.35)
        for step in rng.normal(at + spread, spread / 2, size=60):
            k = int(step * rate_hz)
            if 0 <= k < n:
                impulses[k] += strength * rng.normal()
    wave_seconds = 0.01  # of one segment's N-wave, some metres long
    pulse = np.linspace(1.0, -1.0, round(wave_seconds * rate_hz))
    cutoff_hz = float(np.clip(400.0 * 1000.0 / distance_metres, 60.0, 1500.0))
    low = signal.butter(1, cutoff_hz, fs=rate_hz, output="sos")
    claps = signal.sosfilt(low, signal.fftconvolve(impulses, pulse)[:n])
    envelope = np.exp(-np.arange(n) / rate_hz / (seconds / 4.0))
    rumble = signal.sosfilt(signal.butter(2, [20, 120], "bandpass", fs=rate_hz, output="sos"), rng.standard_normal(n))
    fade = np.minimum(1.0, np.minimum(np.arange(n) / (0.03 * rate_hz), (n - np.arange(n)) / (0.5 * rate_hz)))
    mixed = fade * (claps / _rms(claps) + 0.8 * envelope * rumble / _rms(rumble))
    return np.asarray(mixed / np.max(np.abs(mixed)) * peak_pascal(116.0) * 500.0 / distance_metres)


_VOWELS_HZ = (
    (730, 1090, 2440),
    (270, 2290, 3010),
    (300, 870, 2240),
    (530, 1840, 2480),
    (570, 840, 2410),
    (660, 1720, 2410),
)


def babble(rng: np.random.Generator, seconds: float, *, voices: int = 3, rate_hz: int = RATE_HZ) -> FloatArray:
    """Several people at once: glottal pulses through the formants of Peterson and Barney's vowels, and hiss."""
    n = round(seconds * rate_hz)
    out = np.zeros(n)
    for _ in range(voices):
        pitch_hz = rng.uniform(90, 230)
        at = int(rng.uniform(0.0, 0.3) * rate_hz)
        while at < n:
            length = min(n - at, int(rng.uniform(0.10, 0.28) * rate_hz))
            if length > 400 and rng.uniform() < 0.85:
                out[at : at + length] += _syllable(rng, length, pitch_hz * rng.uniform(0.85, 1.25), rate_hz)
            at += length + (int(rng.uniform(0.2, 0.8) * rate_hz) if rng.uniform() < 0.12 else 0)
    return out / max(_rms(out), 1e-12) * peak_pascal(68.0)


def _syllable(rng: np.random.Generator, n: int, pitch_hz: float, rate_hz: int) -> FloatArray:
    t = np.arange(n) / rate_hz
    glide = pitch_hz * (1.0 + 0.15 * np.sin(2 * np.pi * rng.uniform(1, 3) * t + rng.uniform(0, 6)))
    phase = np.cumsum(glide) / rate_hz
    source = np.diff(np.floor(phase), prepend=0.0) + 0.02 * rng.standard_normal(n)
    for formant_hz in _VOWELS_HZ[int(rng.integers(len(_VOWELS_HZ)))]:
        b, a = signal.iirpeak(min(formant_hz, 0.45 * rate_hz), 8.0, fs=rate_hz)
        source = source + 4.0 * signal.lfilter(b, a, source)
    if rng.uniform() < 0.4:
        hiss = signal.sosfilt(signal.butter(2, 3000, "highpass", fs=rate_hz, output="sos"), rng.standard_normal(n))
        source = source + 0.2 * _rms(source) * hiss * (t < 0.06)
    window = np.sin(np.pi * np.minimum(1.0, np.arange(n) / n)) ** 0.5
    voiced = source * window
    return np.asarray(voiced / max(_rms(voiced), 1e-12) * rng.uniform(0.4, 1.0))


def traffic(rng: np.random.Generator, seconds: float, *, rate_hz: int = RATE_HZ) -> FloatArray:
    """A vehicle that passes: engine harmonics and tyre noise, swelling and fading."""
    n = round(seconds * rate_hz)
    t = np.arange(n) / rate_hz
    idle_hz = rng.uniform(25, 60) * (1.0 + 0.2 * np.sin(2 * np.pi * t / seconds * rng.uniform(0.3, 1.2)))
    phase = 2 * np.pi * np.cumsum(idle_hz) / rate_hz
    engine = np.sum([np.sin(k * phase + rng.uniform(0, 6)) / k for k in range(1, 9)], axis=0)
    tyres = signal.sosfilt(
        signal.butter(1, [200, rng.uniform(1200, 2500)], "bandpass", fs=rate_hz, output="sos"), rng.standard_normal(n)
    )
    passing = 1.0 / np.sqrt(1.0 + ((t - seconds * rng.uniform(0.4, 0.6)) / (0.12 * seconds)) ** 2)
    fade = np.minimum(1.0, np.minimum(t, seconds - t) / (0.1 * seconds))
    mixed = fade * passing * (0.5 * engine / _rms(engine) + tyres / _rms(tyres))
    return np.asarray(mixed / _rms(mixed) * peak_pascal(rng.uniform(84, 92)))


class Ambience:
    """Endless background noise of a place: pink to brown, slowly breathing. Blocks join without a seam."""

    def __init__(self, rng: np.random.Generator, level_db: float, *, rate_hz: int = RATE_HZ) -> None:
        self._rng = rng
        self._rate_hz = rate_hz
        self._b, self._a = _pink_filter()
        self._state = signal.lfilter_zi(self._b, self._a) * 0.0
        self._rumble = signal.butter(2, rng.uniform(150, 400), fs=rate_hz, output="sos")
        self._rumble_state = np.zeros((self._rumble.shape[0], 2))
        self._gain = peak_pascal(level_db)
        self._breath_hz = rng.uniform(0.05, 0.2)
        self._breath_phase = rng.uniform(0.0, 6.28)
        self._position = 0
        self.read(rate_hz // 4)  # the filters settle

    def read(self, samples: int) -> FloatArray:
        """Return the next ``(samples,)`` pascal."""
        white = self._rng.standard_normal(samples)
        pink, self._state = signal.lfilter(self._b, self._a, white, zi=self._state)
        low, self._rumble_state = signal.sosfilt(self._rumble, white, zi=self._rumble_state)
        t = (self._position + np.arange(samples)) / self._rate_hz
        self._position += samples
        breath = 1.0 + 0.3 * np.sin(2 * np.pi * self._breath_hz * t + self._breath_phase)
        # The two filters' outputs have about unit and 0.2 rms of white noise.
        return np.asarray(self._gain * breath * (8.0 * pink + 3.0 * low) / 1.2)


def _pink_filter() -> tuple[FloatArray, FloatArray]:
    """White -> pink within 0.05 dB above 9 Hz at 44.1 kHz (P. Kellet, refined by J. O. Smith, SASP)."""
    b = np.array([0.049922035, -0.095993537, 0.050612699, -0.004408786])
    a = np.array([1.0, -2.494956002, 2.017265875, -0.522189400])
    return b, a


def absorption_db_per_metre(
    frequency_hz: FloatArray, *, temperature_celsius: float = 20.0, humidity_percent: float = 60.0
) -> FloatArray:
    """Attenuation of pure tones by air at sea level, ISO 9613-1 equations (3) to (5)."""
    kelvin = temperature_celsius + 273.15
    ratio = kelvin / 293.15
    saturation = 10.0 ** (-6.8346 * (273.16 / kelvin) ** 1.261 + 4.6151)
    humidity = humidity_percent * saturation
    oxygen_hz = 24.0 + 4.04e4 * humidity * (0.02 + humidity) / (0.391 + humidity)
    nitrogen_hz = ratio**-0.5 * (9.0 + 280.0 * humidity * math.exp(-4.170 * (ratio ** (-1 / 3) - 1.0)))
    f2 = np.asarray(frequency_hz, np.float64) ** 2
    relaxation = 0.01275 * math.exp(-2239.1 / kelvin) / (oxygen_hz + f2 / oxygen_hz) + 0.1068 * math.exp(
        -3352.0 / kelvin
    ) / (nitrogen_hz + f2 / nitrogen_hz)
    return np.asarray(8.686 * f2 * (1.84e-11 * ratio**0.5 + ratio**-2.5 * relaxation))


def air_absorption(x: FloatArray, distance_metres: float, *, rate_hz: int = RATE_HZ) -> FloatArray:
    """What air leaves of ``x`` after ``distance_metres``: same length, no delay (the delay is the caller's)."""
    if distance_metres <= 1.0 or not len(x):
        return x
    return np.asarray(signal.fftconvolve(x, _absorption_filter(round(distance_metres, -1), rate_hz), mode="same"))


@functools.lru_cache(maxsize=512)
def _absorption_filter(distance_metres: float, rate_hz: int) -> FloatArray:
    taps = 63
    frequency = np.linspace(0.0, rate_hz / 2, 129)
    gain = 10.0 ** (-absorption_db_per_metre(frequency) * distance_metres / 20.0)
    return np.asarray(signal.firwin2(taps, frequency, gain, fs=rate_hz), np.float64)


def reverberation(
    rng: np.random.Generator,
    *,
    decay_seconds: float,
    direct_to_tail_db: float = 12.0,
    first_echo_seconds: float = 0.02,
    rate_hz: int = RATE_HZ,
) -> FloatArray:
    """Impulse response of streets: 1, then a diffuse tail that falls by 60 dB in ``decay_seconds``, highs in half of
    that.

    ``direct_to_tail_db``: energy of the direct sound over that of the tail, in dB.
    """
    n = round(1.1 * decay_seconds * rate_hz)
    t = np.arange(n) / rate_hz
    noise = rng.standard_normal(n)
    split = signal.butter(2, 1500, fs=rate_hz, output="sos")
    low = signal.sosfilt(split, noise)
    tail = low * np.exp(-6.908 * t / decay_seconds) + (noise - low) * np.exp(-2 * 6.908 * t / decay_seconds)
    tail *= 1.0 - np.exp(-t / 0.03)  # echoes grow dense before they fade
    out = np.zeros(round(first_echo_seconds * rate_hz) + n)
    out[-n:] = tail / math.sqrt(float(np.sum(tail * tail))) * 10.0 ** (-direct_to_tail_db / 20.0)
    out[0] = 1.0
    return out


def _rms(x: FloatArray) -> float:
    return math.sqrt(float(np.mean(np.square(x))))


def _add(out: FloatArray, at_seconds: float, x: FloatArray, rate_hz: int) -> None:
    start = round(at_seconds * rate_hz)
    piece = x[: max(0, len(out) - start)]
    out[start : start + len(piece)] += piece
