"""The numbers of the front end and of the embedding; everything else is derived from these.

Source: AudioSet's ``vggish_params.py`` (tensorflow/models, research/audioset/vggish).
Changing one breaks every trained model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class FrontEndParams:
    """Waveform -> log-mel examples. The defaults are the only values that any published VGGish weights fit."""

    sample_rate_hz: int = 16_000
    stft_window_seconds: float = 0.025
    stft_hop_seconds: float = 0.010
    mel_bands: int = 64
    mel_min_hz: float = 125.0
    mel_max_hz: float = 7_500.0
    log_offset: float = 0.01
    example_window_seconds: float = 0.96
    example_hop_seconds: float = 0.96

    @property
    def window_samples(self) -> int:
        """Length of one STFT frame."""
        return round(self.sample_rate_hz * self.stft_window_seconds)

    @property
    def hop_samples(self) -> int:
        """From the start of one STFT frame to the next."""
        return round(self.sample_rate_hz * self.stft_hop_seconds)

    @property
    def fft_samples(self) -> int:
        """The next power of two; the frame is zero-padded at its end."""
        return int(1 << (self.window_samples - 1).bit_length())

    @property
    def spectrum_bins(self) -> int:
        return self.fft_samples // 2 + 1

    @property
    def example_frames(self) -> int:
        return round(self.example_window_seconds / self.stft_hop_seconds)

    @property
    def example_hop_frames(self) -> int:
        return round(self.example_hop_seconds / self.stft_hop_seconds)

    @property
    def example_samples(self) -> int:
        """PCM one example needs: its frames overlap beyond its nominal length."""
        return (self.example_frames - 1) * self.hop_samples + self.window_samples

    @property
    def example_hop_samples(self) -> int:
        return self.example_hop_frames * self.hop_samples

    @property
    def carry_samples(self) -> int:
        """What an example needs beyond one hop; a stream looks back by this much."""
        return self.example_samples - self.example_hop_samples

    def hann(self) -> FloatArray:
        """``(window_samples,)``: periodic, so its first value is exactly 0."""
        i = np.arange(self.window_samples)
        return np.asarray(0.5 - 0.5 * np.cos(2.0 * np.pi / self.window_samples * i), np.float64)

    def mel_matrix(self) -> FloatArray:
        """``(spectrum_bins, mel_bands)``: triangles linear in mel, not normalised; bin 0 (DC) counts nowhere."""
        bins_mel = _hertz_to_mel(np.linspace(0.0, self.sample_rate_hz / 2.0, self.spectrum_bins))
        edges_mel = np.linspace(_hertz_to_mel(self.mel_min_hz), _hertz_to_mel(self.mel_max_hz), self.mel_bands + 2)
        lower, centre, upper = edges_mel[:-2], edges_mel[1:-1], edges_mel[2:]
        rising = (bins_mel[:, None] - lower) / (centre - lower)
        falling = (upper - bins_mel[:, None]) / (upper - centre)
        matrix = np.maximum(0.0, np.minimum(rising, falling))
        matrix[0, :] = 0.0
        return np.asarray(matrix, np.float64)


def _hertz_to_mel(hz: FloatArray | float) -> FloatArray:
    """HTK's scale as AudioSet writes it: ``1127 ln(1 + f / 700)``."""
    return np.asarray(1127.0 * np.log(1.0 + np.asarray(hz, np.float64) / 700.0), np.float64)


FRONT_END = FrontEndParams()
EXAMPLE_SAMPLES = 15_600
EXAMPLE_HOP_SAMPLES = 15_360
EXAMPLE_FRAMES = 96
MEL_BANDS = 64
CARRY_SAMPLES = 240
EMBEDDING_SIZE = 128

assert FRONT_END.example_samples == EXAMPLE_SAMPLES
assert FRONT_END.example_hop_samples == EXAMPLE_HOP_SAMPLES
assert FRONT_END.example_frames == EXAMPLE_FRAMES
assert FRONT_END.mel_bands == MEL_BANDS
assert FRONT_END.carry_samples == CARRY_SAMPLES
