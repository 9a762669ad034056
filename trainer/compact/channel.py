"""What happens to sound between air and file: the same chances for every scene, whatever it holds.

A detector that learns a source's sample rate, bit depth, level or codec learns nothing; so band limits, compression,
clipping, noise floors, requantising, codecs, digital silence and gain steps are drawn here without knowing the labels.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import signal

from detector.chunk import RATE_HZ
from trainer.compact.synthesis import coloured_noise

FloatArray = npt.NDArray[np.float32]
_MU_LAW = 0
_QUIETEST_PEAK_DBFS = {16: -50.0, 12: -42.0, 8: -40.0, _MU_LAW: -42.0}
_QUANTISATION_DBFS = {16: -101.0, 12: -77.0, 8: -53.0, _MU_LAW: -70.0}


@dataclass(frozen=True, slots=True)
class Recording:
    """A scene as recorded.

    Attributes:
        pcm: int16, as long as the scene.
        audible: bool per sample; False where digital silence replaced the sound.
        noise_dbfs: RMS of what the chain itself added (noise floor, quantisation), in dB below full scale.
        gain_db: from scene units to full scale 1.0, compression left out.
    """

    pcm: npt.NDArray[np.int16]
    audible: npt.NDArray[np.bool_]
    noise_dbfs: float
    gain_db: float


def record(rng: np.random.Generator, x: FloatArray, *, codecs: bool = True, loud: bool = False) -> Recording:
    """Scene ``(n,)`` of any level -> 16 kHz int16 through a random microphone, amplifier, converter and codec.

    ``loud``: near full scale in 16 bit mostly, and less often processed further: what comes from a camera.
    """
    x = np.asarray(x, np.float32)
    plain = rng.random() < (0.75 if loud else 0.45)  # a clean recorder: level, band limit and word length only
    if not plain:
        x = _amplifier(rng, _microphone(rng, x))
    peak = float(np.max(np.abs(x))) + 1e-9
    if rng.random() < (0.25 if loud else 0.35 if plain else 0.6):
        x = band_limit(x, float(rng.choice([3000, 3400, 4000, 4000, 5000, 5500, 6000, 6000, 7000])))
    bits = int(rng.choice([16, 12, 8, _MU_LAW], p=[0.75, 0.0, 0.25, 0.0] if plain else [0.6, 0.07, 0.23, 0.1]))
    if loud:
        bits = 16 if rng.random() < 0.7 else bits
        level_db = rng.uniform(-9.0, 3.0)
    else:
        level_db = rng.triangular(_QUIETEST_PEAK_DBFS[bits], 0.0, 6.0)
    gain = 10 ** (level_db / 20) / peak
    x = x * np.float32(gain)
    floor_dbfs = rng.uniform(-105, -75) if plain else rng.uniform(-100, -45)
    x = x + np.float32(10 ** (floor_dbfs / 20)) * coloured_noise(rng, len(x))
    if rng.random() < 0.16:
        at = int(rng.uniform(0.05, 0.95) * len(x))
        x[at:] *= np.float32(10 ** (rng.uniform(-30, 30) / 20))
    if rng.random() < 0.1:
        x = x + np.float32(rng.uniform(-0.05, 0.05))
    x, audible = _silence(rng, x)
    if not audible.all() and rng.random() < 0.5:  # wakes loud: what begins at once and clipped is no shot yet
        louder = 10 ** (rng.uniform(0, 22) / 20)
        x, gain = x * np.float32(louder), gain * louder
    pcm = mu_law(x) if bits == _MU_LAW else quantise(x, bits)
    if codecs and (loud or not plain) and rng.random() < 0.25:
        pcm = through_codec(pcm, *_CODECS[rng.integers(len(_CODECS))])
    noise = 10 * np.log10(10 ** (floor_dbfs / 10) + 10 ** (_QUANTISATION_DBFS[bits] / 10))
    return Recording(pcm, audible, float(noise), float(20 * np.log10(gain)))


def _amplifier(rng: np.random.Generator, x: FloatArray) -> FloatArray:
    """Automatic gain and overload, each in some recordings."""
    if rng.random() < 0.4:
        x = compress(
            x,
            threshold_db=rng.uniform(-45, -6),
            ratio=float(rng.choice([2.0, 4.0, 10.0, 50.0])),
            attack_seconds=float(10 ** rng.uniform(-3.3, -1.5)),
            release_seconds=float(10 ** rng.uniform(-1.5, 0.2)),
        )
    if rng.random() < 0.3:
        limit = (float(np.max(np.abs(x))) + 1e-9) * 10 ** (-rng.uniform(1, 26) / 20)
        x = limit * np.tanh(x / limit) if rng.random() < 0.5 else np.clip(x, -limit, limit)
    return np.asarray(x, np.float32)


def _microphone(rng: np.random.Generator, x: FloatArray) -> FloatArray:
    """High-pass of small microphones and wind filters, a tilt and a resonance."""
    if rng.random() < 0.5:
        x = signal.lfilter(*signal.butter(int(rng.integers(1, 3)), rng.uniform(40, 450), "highpass", fs=RATE_HZ), x)
    if rng.random() < 0.5:
        corner = rng.uniform(500, 3000)
        low = signal.lfilter(*signal.butter(1, corner, fs=RATE_HZ), x)
        x = low + 10 ** (rng.uniform(-12, 9) / 20) * (x - low)
    if rng.random() < 0.3:
        b, a = signal.iirpeak(rng.uniform(300, 6000), rng.uniform(1, 5), fs=RATE_HZ)
        x = x + rng.uniform(-0.6, 1.5) * signal.lfilter(b, a, x)
    return np.asarray(x, np.float32)


def compress(
    x: FloatArray, *, threshold_db: float, ratio: float, attack_seconds: float, release_seconds: float
) -> FloatArray:
    """Automatic gain of cameras and phones; ``threshold_db`` is relative to the loudest millisecond.

    Level is followed in steps of 1 ms; gain in between is linear. No make-up gain: the chain sets the level later.
    """
    step = RATE_HZ // 1000
    blocks = np.sqrt(np.mean(np.pad(x, (0, -len(x) % step)).reshape(-1, step) ** 2, axis=1)) + 1e-9
    level_db = 20 * np.log10(blocks / blocks.max())
    reduction_db = np.maximum(0.0, level_db - threshold_db) * (1.0 - 1.0 / ratio)
    attack, release = 1.0 - np.exp(-0.001 / attack_seconds), 1.0 - np.exp(-0.001 / release_seconds)
    smooth, now = np.empty_like(reduction_db), 0.0
    for i, wanted in enumerate(reduction_db.tolist()):
        now += (attack if wanted > now else release) * (wanted - now)
        smooth[i] = now
    gain_db = np.interp(np.arange(len(x)), np.arange(len(smooth)) * step + step // 2, smooth)
    return np.asarray(x * 10.0 ** (-gain_db / 20.0), np.float32)


def band_limit(x: npt.NDArray[np.floating], cutoff_hz: float) -> FloatArray:
    """What a recorder of twice ``cutoff_hz`` samples a second leaves: nothing above, steep edge."""
    if cutoff_hz >= RATE_HZ / 2:
        return np.asarray(x, np.float32)
    sos = signal.ellip(8, 0.2, 70, 0.96 * cutoff_hz, fs=RATE_HZ, output="sos")
    return np.asarray(signal.sosfilt(sos, x), np.float32)


def quantise(x: npt.NDArray[np.floating], bits: int) -> npt.NDArray[np.int16]:
    """Full scale 1.0 -> int16 that holds only ``2**bits`` levels, clipped."""
    half = 2 ** (bits - 1)
    return np.asarray(np.clip(np.rint(x * half), -half, half - 1) * (32768 // half), np.int16)


def mu_law(x: npt.NDArray[np.floating]) -> npt.NDArray[np.int16]:
    """G.711's 8-bit companding (mu = 255) and back."""
    y = np.clip(x, -1, 1)
    code = np.rint(127 * np.sign(y) * np.log1p(255 * np.abs(y)) / np.log(256))
    expanded = np.sign(code) * (np.power(256.0, np.abs(code) / 127) - 1) / 255
    return np.asarray(np.clip(np.rint(expanded * 32767), -32768, 32767), np.int16)


def _silence(rng: np.random.Generator, x: FloatArray) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """Digital silence as padding at either end and as dropouts; hard edges."""
    audible = np.ones(len(x), np.bool_)
    if rng.random() < 0.15:
        audible[: int(rng.uniform(0.2, 4.0) * RATE_HZ)] = False
    if rng.random() < 0.08:
        audible[len(x) - int(rng.uniform(0.2, 3.0) * RATE_HZ) :] = False
    if rng.random() < 0.1:
        for _ in range(rng.integers(1, 5)):
            start = int(rng.uniform(0, 0.95) * len(x))
            audible[start : start + int(rng.uniform(0.005, 0.8) * RATE_HZ)] = False
    return np.where(audible, x, np.float32(0)), audible


_CODECS = (
    ("aac", 16_000, 32_000),
    ("aac", 16_000, 64_000),
    ("libmp3lame", 16_000, 24_000),
    ("libmp3lame", 16_000, 64_000),
    ("libopus", 16_000, 12_000),
    ("libopus", 16_000, 24_000),
    ("g722", 16_000, 64_000),
    ("adpcm_ima_wav", 16_000, 64_000),
)
_CONTAINERS = {"aac": "adts", "libmp3lame": "mp3", "libopus": "ogg", "g722": "g722", "adpcm_ima_wav": "wav"}


def through_codec(pcm: npt.NDArray[np.int16], codec: str, rate_hz: int, bits_per_second: int) -> npt.NDArray[np.int16]:
    """Encode and decode with FFmpeg's ``codec``; same length, the codec's delay taken out."""
    import av

    stored = io.BytesIO()
    with av.open(stored, "w", format=_CONTAINERS[codec]) as out:
        stream = out.add_stream(codec, rate=rate_hz, layout="mono")
        stream.bit_rate = bits_per_second
        resampler = av.AudioResampler(
            format=stream.format, layout="mono", rate=rate_hz, frame_size=stream.frame_size or 4096
        )
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(pcm[None, :]), format="s16", layout="mono")
        frame.sample_rate = rate_hz
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            out.mux(stream.encode(piece))
        out.mux(stream.encode(None))
    stored.seek(0)
    with av.open(stored, format=_CONTAINERS[codec]) as source:
        back = av.AudioResampler(format="s16", layout="mono", rate=RATE_HZ)
        pieces = [f.to_ndarray().ravel() for frame in source.decode(audio=0) for f in back.resample(frame)]
        pieces += [f.to_ndarray().ravel() for f in back.resample(None)]
    decoded = np.concatenate(pieces) if pieces else np.zeros(0, np.int16)
    delay = _delay(pcm, decoded)
    decoded = decoded[delay:] if delay >= 0 else np.concatenate([np.zeros(-delay, np.int16), decoded])
    return np.pad(decoded, (0, max(0, len(pcm) - len(decoded))))[: len(pcm)]


def _delay(reference: npt.NDArray[np.int16], delayed: npt.NDArray[np.int16], reach: int = 4096) -> int:
    """Samples by which ``delayed`` lags, by cross-correlation within ``reach``."""
    n = max(len(reference), len(delayed)) + reach
    size = 1 << n.bit_length()
    spectrum = np.fft.rfft(delayed, size) * np.conj(np.fft.rfft(reference, size))
    correlation = np.fft.irfft(spectrum, size)
    lags = np.concatenate([correlation[-reach:], correlation[:reach]])
    return int(np.argmax(lags)) - reach
