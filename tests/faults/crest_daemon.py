"""``detector`` with a scorer that needs no TensorFlow: the command, daemon, session and bus that people run, light
enough that processes can be killed by the hundred. ``FAULTS_SECONDS_PER_EXAMPLE`` makes it as slow as a network.

    python -m tests.faults.crest_daemon run
"""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt

from tests.scorers import IDENTITY, LABELS, CrestScorer


class CrestModel(CrestScorer):
    """What the daemon asks of a model. ``FAULTS_MODEL_SHA256`` makes it another one."""

    name, version = IDENTITY.name, IDENTITY.version
    labels = LABELS
    window_examples = 10
    manifest = SimpleNamespace(
        name=IDENTITY.name,
        labels=LABELS,
        family=LABELS[:2],
        look_alikes=LABELS[2:],
        false_alerts=(),
        operating_curve=(),
        decision=SimpleNamespace(open_threshold=0.6, close_threshold=0.4),
    )

    def __init__(self) -> None:
        super().__init__()
        self.sha256 = os.environ.get("FAULTS_MODEL_SHA256", IDENTITY.sha256)
        self._seconds_per_example = float(os.environ.get("FAULTS_SECONDS_PER_EXAMPLE", "0"))

    def embed(self, pcm: npt.NDArray[np.int16]) -> npt.NDArray[np.float32]:
        self.calls.clear()
        if self._seconds_per_example:
            time.sleep(self._seconds_per_example * len(pcm))
        return super().embed(pcm)

    def self_test(self) -> None:
        """Nothing that could be wrong."""

    def warm_up(self, max_batch: int) -> None:
        """Nothing to warm."""


def main() -> None:
    """The detector's own command line, this model in every place."""
    import detector.daemon
    from detector.__main__ import main as detector_main

    detector.daemon.load_model = lambda *_, **__: CrestModel()  # type: ignore[attr-defined]
    detector_main()


if __name__ == "__main__":
    main()
