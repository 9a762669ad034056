"""A part of a set of clips is the set that those clips alone would make."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.trainer.made_clips import CLASSES, SIZE, write_clips
from trainer.records import FeatureSpec, RecordWriter, encode_clip, read_clips


def test_a_subset_holds_its_clips_whole_and_in_order(tmp_path: Path) -> None:
    path = write_clips(tmp_path / "clips.tfrecord", 20)
    clips = read_clips([path], classes=CLASSES, spec=FeatureSpec(sizes=(SIZE,)))
    chosen = np.array([7, 0, 19, 3])
    part = clips.subset(chosen)
    assert len(part) == 4
    for i, clip in enumerate(chosen.tolist()):
        assert part.video_id(i) == clips.video_id(clip)
        assert np.array_equal(part.frames_of(i), clips.frames_of(clip))
        assert np.array_equal(part.labels_of(i), clips.labels_of(clip))
    assert np.array_equal(part.label_matrix(), clips.label_matrix(chosen))


def test_a_fingerprint_tells_sets_apart(tmp_path: Path) -> None:
    spec = FeatureSpec(sizes=(SIZE,))
    one, same, other = (
        read_clips([write_clips(tmp_path / f"{name}.tfrecord", 20, seed=seed)], classes=CLASSES, spec=spec)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert one.subset(np.arange(19)).fingerprint != one.fingerprint
    assert one.subset(np.arange(20)).fingerprint == one.fingerprint
    features = one.features.copy()
    features[-1, -1] ^= 1
    one.features = features
    assert one.fingerprint != same.fingerprint


def test_parts_of_a_recording_share_its_id(tmp_path: Path) -> None:
    given = [
        ("rec_0", 0.0, "rec"),
        ("rec_10000", 10.0, "rec"),
        ("street/rec_86399040#2", 86399.04, "street/rec"),
        ("rec_2", 10.0, "rec_2"),  # a file of that name
        ("rec", 0.0, "rec"),
        ("AbC_-123456", 30.0, "AbC_-123456"),
        ("AbC_30000", None, "AbC_30000"),
    ]
    with RecordWriter(tmp_path / "parts.tfrecord") as writer:
        for name, start, _ in given:
            writer.write(encode_clip(name, np.zeros((1, SIZE), np.uint8), [0], start_seconds=start))
    clips = read_clips([tmp_path / "parts.tfrecord"], classes=CLASSES, spec=FeatureSpec(sizes=(SIZE,)))
    assert [clips.recording_id(i) for i in range(len(clips))] == [expected for *_, expected in given]
