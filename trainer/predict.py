"""Clips -> predictions -> CSV, as the YouTube-8M starter code's ``inference.py`` writes it, and back from there."""

from __future__ import annotations

import csv
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from detector.classifiers import Classifier
from detector.errors import ConfigError, DataError
from trainer.labels import LabelSet
from trainer.records import ClipSet, video_matrix_in_graph
from trainer.run import put_in_place

logger = logging.getLogger(__name__)

HEADER = ("VideoId", "LabelConfidencePairs")
DEFAULT_TOP_K = 20
DEFAULT_BATCH_CLIPS = 256

Float32Array = npt.NDArray[np.float32]


def predictions(
    classifier: Classifier, clips: ClipSet, *, batch_clips: int = DEFAULT_BATCH_CLIPS
) -> Iterator[tuple[tuple[str, ...], Float32Array]]:
    """All clips in their order, a batch at a time: ``B`` video ids and ``(B, V)`` float32 probabilities.

    A batch is padded to its own longest clip only. Video-level models take frame-level clips as their means.

    Raises ConfigError for clips of another feature size than the model's, and for video-level clips where the model
    needs frames.
    """
    import tensorflow as tf

    size = clips.spec.size
    if size != classifier.input_size:
        raise ConfigError(f"The clips have {size} values a frame; the model takes {classifier.input_size}.")
    if batch_clips < 1:
        raise ConfigError(f"batch_clips is {batch_clips}; 1 or more is needed.")
    frames_spec = tf.TensorSpec([None], tf.int32)
    if clips.spec.level == "video":
        if not classifier.video_level:
            raise ConfigError("The clips are video-level, one vector each; this model needs frame-level clips.")
        call = tf.function(lambda x, n: classifier(x, n), input_signature=[tf.TensorSpec([None, size]), frames_spec])
    else:
        call = tf.function(
            lambda x, n: classifier(video_matrix_in_graph(x, n), n),
            input_signature=[tf.TensorSpec([None, None, size], tf.uint8), frames_spec],
        )
    for start in range(0, len(clips), batch_clips):
        chosen = np.arange(start, min(start + batch_clips, len(clips)))
        batch = clips.gather(chosen, frames=max(int(clips.num_frames[chosen].max()), 1))
        yield batch.video_ids, call(batch.features, batch.num_frames).numpy()


def top_pairs(scores: Float32Array, top_k: int = DEFAULT_TOP_K) -> list[tuple[int, float]]:
    """The ``top_k`` largest of ``(V,)`` scores (all, where there are fewer) as (class, score), best first.

    Equal scores come in the order of their classes; the original leaves that open. NaN counts as the smallest.
    """
    order = np.argsort(-np.nan_to_num(scores, nan=-np.inf, posinf=np.inf, neginf=-np.inf), kind="stable")
    return [(int(index), float(scores[index])) for index in order[:top_k]]


def pairs_text(scores: Float32Array, top_k: int = DEFAULT_TOP_K, names: Sequence[str] | None = None) -> str:
    """``label confidence`` pairs, confidences to 6 significant digits.

    By class index they are separated by spaces, as the original does. By name, which may hold spaces and commas,
    by ``; ``: split there, then at each part's last space.
    """
    pairs = top_pairs(scores, top_k)
    if names is None:
        return " ".join(f"{index} {score:g}" for index, score in pairs)
    return "; ".join(f"{names[index]} {score:g}" for index, score in pairs)


def write_predictions(
    path: Path,
    batches: Iterable[tuple[Sequence[str], Float32Array]],
    *,
    top_k: int = DEFAULT_TOP_K,
    names: Sequence[str] | None = None,
) -> int:
    """Write the CSV whole or not at all; returns the number of clips.

    Args:
        path: its folder must exist.
        batches: video ids and ``(B, V)`` scores, as ``predictions`` gives them.
        names: of the V classes, in place of their indices.

    Raises ConfigError for ``top_k`` below 1 or names that don't fit the scores; DataError where the disk refuses.
    """
    if top_k < 1:
        raise ConfigError(f"top_k is {top_k}; 1 or more is needed.")
    counts: list[int] = []

    def write(partial: Path) -> None:
        try:
            with partial.open("w", encoding="utf-8", newline="") as file:
                counts.append(write_rows(file, batches, top_k=top_k, names=names))
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    put_in_place(path, write)
    return counts[0]


def write_rows(
    file: TextIO,
    batches: Iterable[tuple[Sequence[str], Float32Array]],
    *,
    top_k: int = DEFAULT_TOP_K,
    names: Sequence[str] | None = None,
) -> int:
    """Header and rows of ``write_predictions`` to an open file; returns the number of clips.

    A clip for which the model gives no number (one without frames, with some models) is left out, with a warning.
    """
    # Quotes only what needs it, so that ids of letters and digits come as the original writes them.
    writer: Any = csv.writer(file, lineterminator="\n")
    writer.writerow(HEADER)
    count = 0
    left_out: list[str] = []
    for video_ids, scores in batches:
        if names is not None and len(names) != scores.shape[1]:
            raise ConfigError(f"{len(names)} names are given for {scores.shape[1]} classes.")
        for video_id, row in zip(video_ids, scores, strict=True):
            if not np.isfinite(row).all():
                left_out.append(video_id)
                continue
            writer.writerow((video_id, pairs_text(row, top_k, names)))
            count += 1
    if left_out:
        shown = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        logger.warning("%d clips left out, as the model gives no number for them: %s", len(left_out), shown)
    return count


def read_predictions(path: Path, labels: LabelSet) -> dict[str, dict[int, float]]:
    """What ``write_predictions`` or the starter code wrote: id -> class index -> confidence, best first.

    Labels may be indices or names. Of an id that occurs twice each class's highest confidence counts.

    Raises DataError with the line for another header or form, or an unknown label.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            if tuple(next(rows, ())) != HEADER:
                raise DataError(f"{path} does not begin with the line {','.join(HEADER)}: it holds no predictions.")
            found: dict[str, dict[int, float]] = {}
            for row in rows:
                try:
                    if len(row) != 2:
                        raise ValueError(f"an id and pairs are expected, found {len(row)} fields.")
                    _merge(found.setdefault(row[0], {}), _pairs(row[1], labels))
                except (ValueError, DataError) as error:
                    raise DataError(f"{path}, line {rows.line_num}: {error}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} can't be read: {error}.") from error
    if not found:
        raise DataError(f"{path} holds no prediction.")
    return {video: dict(sorted(pairs.items(), key=lambda pair: -pair[1])) for video, pairs in found.items()}


def _merge(into: dict[int, float], pairs: Iterable[tuple[int, float]]) -> None:
    for index, score in pairs:
        into[index] = max(score, into.get(index, score))


def _pairs(text: str, labels: LabelSet) -> list[tuple[int, float]]:
    tokens = text.split()
    by_index = all(token.isdecimal() for token in tokens[::2])
    if by_index:
        if len(tokens) % 2:
            raise ValueError(f"{len(tokens)} values are no pairs of label and confidence.")
        parts = list(zip(tokens[::2], tokens[1::2], strict=True))
    else:
        split = (part.rpartition(" ") for part in text.split("; "))
        parts = [(label, score) for label, _, score in split]
    pairs = []
    for label, score in parts:
        try:
            confidence = float(score)
            if not math.isfinite(confidence):
                raise ValueError
        except ValueError:
            raise ValueError(f"{score!r} is no confidence.") from None
        pairs.append((labels.index(int(label) if by_index else label), confidence))
    return pairs
