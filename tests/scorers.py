"""A scorer without weights, for tests of what is around the network: exact, cheap and sensitive to every input."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from detector.alert import ModelIdentity
from detector.embedders.params import EMBEDDING_SIZE

LABELS = ("Gunshot, gunfire", "Machine gun", "Fireworks")
IDENTITY = ModelIdentity("crest", "1", "c" * 64)


class CrestScorer:
    """Embedding: peaks of 128 slices. Score: crest of the newest example, nudged by everything older in the window.

    The nudge (up to 0.2) makes a score depend on each embedding in the window, so that a window rebuilt wrongly shows.
    """

    def __init__(self) -> None:
        self.calls: list[int] = []

    def embed(self, pcm: npt.NDArray[np.int16]) -> npt.NDArray[np.float32]:
        self.calls.append(len(pcm))
        x = np.abs(pcm[:, : 121 * EMBEDDING_SIZE].astype(np.int32)).reshape(len(pcm), EMBEDDING_SIZE, 121)
        last = np.abs(pcm[:, 121 * EMBEDDING_SIZE :].astype(np.int32)).max(axis=1)
        peaks = x.max(axis=2)
        peaks[:, -1] = np.maximum(peaks[:, -1], last)
        return (peaks / 32768.0).astype(np.float32)

    def classify(self, windows: npt.NDArray[np.float32], num_frames: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        out = np.zeros((len(windows), len(LABELS)), np.float32)
        for i, (window, count) in enumerate(zip(windows, num_frames, strict=True)):
            newest = window[count - 1]
            crest = newest.max() / (newest.mean() + 0.01)
            nudge = 0.2 * (10.0 * float(window[: count - 1].astype(np.float64).sum()) % 1.0)
            out[i, 0] = 0.75 * np.clip((crest - 4.0) / 3.0, 0, 1) + nudge  # never clipped: each nudge shows
            out[i, 1] = out[i, 0] / 2
            out[i, 2] = 0.25
        return out
