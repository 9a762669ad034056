"""Small sets of clips that can be learnt: each class moves a few of a frame's values."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainer.records import RecordWriter, encode_clip

CLASSES = 6
NAMES = ("Speech", "Gunshot, gunfire", "Machine gun", "Fireworks", "Thunder", "Dog")
SIZE = 16


def write_clips(path: Path, count: int, *, seed: int = 0, prefix: str = "clip", frames: int = 4) -> Path:
    """``count`` clips of up to ``frames`` frames of 16 bytes, with 1 or 2 of 6 labels."""
    random = np.random.default_rng(seed)
    places = np.random.default_rng(99).integers(0, SIZE, (CLASSES, 4))
    path.parent.mkdir(parents=True, exist_ok=True)
    with RecordWriter(path) as writer:
        for i in range(count):
            labels = sorted({i % CLASSES, int(random.integers(0, CLASSES))})
            values = random.integers(60, 120, (int(random.integers(1, frames + 1)), SIZE))
            for label in labels:
                values[:, places[label]] += 60
            writer.write(encode_clip(f"{prefix}{i}", values.astype(np.uint8), labels))
    return path


def write_labels(path: Path, names: tuple[str, ...] = NAMES) -> Path:
    """``class_labels_indices.csv`` of the six."""
    rows = [f'{i},/m/{i:03d},"{name}"' for i, name in enumerate(names)]
    path.write_text("\n".join(["index,mid,display_name", *rows]) + "\n")
    return path
