"""``detector`` with a scorer that needs no TensorFlow: the command, daemon, session and bus that people run, light
enough that processes can be killed by the hundred.

``FAULTS_SECONDS_PER_EXAMPLE`` makes it as slow as a network. ``FAULTS_DIE_AT=POINT:N`` kills it (SIGKILL) at that point
of the N-th commit that something was said before (``POINTS``).

    python -m tests.faults.crest_daemon run
"""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.scorers import IDENTITY, LABELS, CrestScorer

# Of a commit: before the outputs are flushed; when they are and the positions are not; when both are. Under
# ``exactly_once`` the second lies before the transaction's end.
POINTS = ("sent", "flushed", "stored")


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


def _die_at(wanted: str, count: int) -> None:
    """Die at ``wanted`` of the ``count``-th commit that something was said before.

    Where the bus flushes and stores is found below the detector's own commit, so that an order that is wrong there is
    met as well.
    """
    import kafka

    from detector.bus.embedded import EmbeddedConsumer, EmbeddedProducer
    from detector.bus.kafka import KafkaConsumer, KafkaProducer

    said, left = 0, count

    def reach(point: str) -> None:
        nonlocal said, left
        if point == "said":
            said += 1
        elif said and point == wanted:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        if point == "stored":
            said = 0

    def around(owner: type, method: str, before: str | None, after: str | None) -> None:
        inner = getattr(owner, method)

        def outer(self: Any, *args: Any, **more: Any) -> Any:
            if before is not None:
                reach(before)
            result = inner(self, *args, **more)
            if after is not None:
                reach(after)
            return result

        setattr(owner, method, outer)

    for producer in (KafkaProducer, EmbeddedProducer):
        around(producer, "send", None, "said")
        around(producer, "commit", "sent", None)
    around(KafkaConsumer, "commit", "flushed", "stored")
    around(kafka.KafkaProducer, "commit_transaction", "flushed", "stored")
    around(EmbeddedConsumer, "store_positions", None, "flushed")  # its transaction is still open
    around(EmbeddedConsumer, "commit", None, "stored")
    around(EmbeddedProducer, "commit", None, "stored")


def main() -> None:
    """The detector's own command line, this model in every place."""
    import detector.daemon
    from detector.__main__ import main as detector_main

    detector.daemon.load_model = lambda *_, **__: CrestModel()  # type: ignore[attr-defined]
    if aim := os.environ.get("FAULTS_DIE_AT"):
        point, _, count = aim.partition(":")
        _die_at(point, int(count))
    detector_main()


if __name__ == "__main__":
    main()
