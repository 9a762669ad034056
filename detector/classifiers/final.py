"""The video-level layer that ends a frame-level model: the starter code's ``--video_level_classifier_model``."""

from __future__ import annotations

import numpy as np

from detector.classifiers.logistic import Logistic
from detector.classifiers.moe import Moe

FINALS = ("moe", "logistic")


def build_final(
    final: str, input_size: int, classes: int, mixtures: int, random: np.random.Generator
) -> Moe | Logistic:
    """``(B, input_size)`` -> ``(B, classes)``; ``final`` is one of ``FINALS``, ``mixtures`` counts for ``moe``."""
    assert final in FINALS
    if final == "moe":
        return Moe(input_size, classes, mixtures, random=random)
    return Logistic(input_size, classes, random=random)
