"""Reading gives what the starter code's reader gives, writing what AudioSet published; damage is told, not lost."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.errors import ConfigError, DataError
from trainer.labels import Label, LabelSet
from trainer.records import (
    Damage,
    FeatureSpec,
    RecordWriter,
    encode_clip,
    encode_video,
    find_files,
    masked_crc,
    read_clips,
    read_records,
    video_matrix,
    video_matrix_in_graph,
)

LABELS = LabelSet([Label(0, "/m/a", "Speech"), Label(1, "/m/b", "Gunshot, gunfire"), Label(2, "/m/c", "Boom")])
EMBEDDINGS = "audioset/features/audioset_v1_embeddings"


def frames_of(seed: int, count: int, size: int = 128) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size), np.uint8)


def write(path: Path, *records: bytes) -> Path:
    with RecordWriter(path) as writer:
        for record in records:
            writer.write(record)
    return path


def many(folder: Path, clips: int = 40) -> Path:
    """Clips of 0 to 12 frames, named by their number, labelled number % 3."""
    return write(
        folder / "many.tfrecord",
        *(
            encode_clip(f"clip{i}", frames_of(i, i % 13), [i % 3], start_seconds=i, end_seconds=i + 10)
            for i in range(clips)
        ),
    )


# --- golden -------------------------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("file", ["audioset_style.tfrecord", "yt8m_style.tfrecord"])
def test_both_key_styles_give_the_starter_codes_clips(golden_dir: Path, file: str) -> None:
    golden = np.load(golden_dir / "yt8m_readers.npz")
    clips = read_clips([golden_dir / file], classes=527)
    numbers = sorted(int(key[3:].split("/")[0]) for key in golden.files if re.fullmatch(r"rec\d+/video_matrix", key))
    assert len(clips) == len(numbers)
    (batch,) = clips.batches(len(clips), frames=300)
    for i in numbers:
        assert batch.video_ids[i].encode() == golden[f"rec{i}/video_id"][0]
        assert batch.num_frames[i] == golden[f"rec{i}/num_frames"][0]
        np.testing.assert_array_equal(np.flatnonzero(batch.labels[i]), np.unique(golden[f"rec{i}/labels_index"]))
        np.testing.assert_array_equal(clips.frames_of(i), golden[f"rec{i}/frames_uint8"][:300])
        np.testing.assert_allclose(batch.values[i], golden[f"rec{i}/video_matrix"], rtol=0, atol=1e-6)


@pytest.mark.golden
def test_fewer_frames_are_cut_as_the_starter_code_cuts(golden_dir: Path) -> None:
    golden = np.load(golden_dir / "yt8m_readers.npz")
    for key in [key for key in golden.files if re.fullmatch(r"maxframes\d+/video_matrix", key)]:
        expected, limit = golden[key], int(key.split("/")[0][9:])
        clips = read_clips([golden_dir / "yt8m_style.tfrecord"], classes=527, spec=FeatureSpec(max_frames=limit))
        batch = clips.gather(range(len(expected)), frames=limit)
        np.testing.assert_array_equal(batch.num_frames, golden[f"maxframes{limit}/num_frames"])
        np.testing.assert_allclose(batch.values, expected, rtol=0, atol=1e-6)


@pytest.mark.golden
def test_video_level_clips_are_the_starter_codes(golden_dir: Path) -> None:
    golden = np.load(golden_dir / "yt8m_readers.npz")
    clips = read_clips([golden_dir / "yt8m_video_level.tfrecord"], classes=527, spec=FeatureSpec(level="video"))
    (batch,) = clips.batches(100)
    assert [name.encode() for name in batch.video_ids] == golden["agg/video_ids"].tolist()
    np.testing.assert_allclose(batch.values, golden["agg/video_matrix"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(np.packbits(batch.labels, axis=1), golden["agg/labels_packed"])
    np.testing.assert_array_equal(batch.num_frames, golden["agg/num_frames"])


@pytest.mark.golden
def test_every_byte_dequantises_as_in_the_starter_code_also_on_the_device(golden_dir: Path) -> None:
    table = np.load(golden_dir / "yt8m_readers.npz")["dequant_table"]
    features = np.arange(256, dtype=np.uint8).reshape(1, 2, 128)
    two = np.array([2], np.int32)
    np.testing.assert_allclose(video_matrix(features, two).ravel(), table, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(video_matrix_in_graph(features, two).numpy(), video_matrix(features, two))
    one = np.array([1], np.int32)
    np.testing.assert_array_equal(video_matrix_in_graph(features, one).numpy(), video_matrix(features, one))


# --- published form -----------------------------------------------------------------------------------------------


def test_published_records_come_out_byte_for_byte(data_dir: Path) -> None:
    files = find_files(data_dir / EMBEDDINGS / "eval_dev")[:200]
    clips = read_clips(files, classes=527)
    originals = []
    for path in files:
        with path.open("rb") as stream:
            originals += [item[1] for item in read_records(stream, path) if not isinstance(item, Damage)]
    identical = 0
    for i, original in enumerate(originals):
        start, end = clips.times_seconds[i].tolist()
        again = encode_clip(
            clips.video_id(i), clips.frames_of(i), clips.labels_of(i).tolist(), start_seconds=start, end_seconds=end
        )
        assert sorted(again) == sorted(original)
        identical += again == original
    assert identical > len(originals) / 4, "the published records hold their keys in four orders; this is none of them"


def test_tensorflow_reads_what_is_written_here(tmp_path: Path) -> None:
    import tensorflow as tf

    frames = frames_of(1, 3)
    record = encode_clip("clip", frames, [5, 300], start_seconds=30.0, end_seconds=40.5)
    path = write(tmp_path / "a.tfrecord", record, encode_video("v", np.array([0.5, -1.5], np.float32), ["Boom"]))
    first, second = (item.numpy() for item in tf.data.TFRecordDataset(str(path)))
    clip = tf.train.SequenceExample.FromString(first)
    assert clip.context.feature["video_id"].bytes_list.value == [b"clip"]
    assert clip.context.feature["labels"].int64_list.value == [5, 300]
    assert clip.context.feature["start_time_seconds"].float_list.value == [30.0]
    assert clip.context.feature["end_time_seconds"].float_list.value == [40.5]
    stored = [f.bytes_list.value[0] for f in clip.feature_lists.feature_list["audio_embedding"].feature]
    assert b"".join(stored) == frames.tobytes()
    video = tf.train.Example.FromString(second)
    assert video.features.feature["mean_audio"].float_list.value == [0.5, -1.5]
    assert video.features.feature["labels"].bytes_list.value == [b"Boom"]


def test_messages_of_tensorflow_are_read_in_every_form(tmp_path: Path) -> None:
    """Unset features, frames out of the usual layout, fields split over two messages, unknown keys."""
    import tensorflow as tf

    frames = frames_of(2, 4, 200)
    clip = tf.train.SequenceExample()
    clip.context.feature["id"].bytes_list.value.append(b"clip")
    clip.context.feature["labels"].SetInParent()
    clip.context.feature["other"].float_list.value.extend([1.0, 2.0])
    for frame in frames:
        clip.feature_lists.feature_list["audio"].feature.add().bytes_list.value.append(frame.tobytes())
    more = tf.train.SequenceExample()
    more.context.feature["labels"].int64_list.value.extend([2, 0])
    unpacked = b"\x0a\x10" + b"\x0a\x0e" + b"\x0a\x06labels" + b"\x12\x04" + b"\x1a\x02" + b"\x08\x01"
    for extra, labels in ((b"", []), (more.SerializeToString(), [2, 0]), (unpacked, [1])):
        path = write(tmp_path / "a.tfrecord", clip.SerializeToString() + extra)
        read = read_clips([path], classes=3, spec=FeatureSpec(sizes=(200,)))
        np.testing.assert_array_equal(read.frames_of(0), frames)
        assert read.labels_of(0).tolist() == labels
        assert np.isnan(read.times_seconds).all()


@given(
    st.lists(st.tuples(st.integers(0, 20), st.lists(st.integers(0, 2), max_size=4), st.text(max_size=12)), min_size=1),
    st.sampled_from(["video_id", "id"]),
    st.integers(1, 300),
)
@settings(max_examples=40, deadline=None)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, clips: list[tuple[int, list[int], str]], id_key: str, size: int
) -> None:
    path = tmp_path_factory.mktemp("records") / "a.tfrecord"
    stored = [frames_of(i, count, size) for i, (count, _, _) in enumerate(clips)]
    write(path, *(encode_clip(c[2], f, c[1], id_key=id_key) for c, f in zip(clips, stored, strict=True)))
    read = read_clips([path], classes=3, spec=FeatureSpec(sizes=(size,)))
    assert [read.video_id(i) for i in range(len(read))] == [name for _, _, name in clips]
    assert [read.labels_of(i).tolist() for i in range(len(read))] == [labels for _, labels, _ in clips]
    for i, frames in enumerate(stored):
        np.testing.assert_array_equal(read.frames_of(i), frames)


def test_several_features_stand_side_by_side(tmp_path: Path) -> None:
    parts = {f"f{i}": frames_of(i, 5, 3 + i) for i in range(8)}
    path = write(tmp_path / "a.tfrecord", encode_clip("clip", parts))
    names = tuple(reversed(parts))
    spec = FeatureSpec(names, tuple(parts[name].shape[1] for name in names))
    expected = np.concatenate([parts[name] for name in names], axis=1)
    np.testing.assert_array_equal(read_clips([path], classes=1, spec=spec).frames_of(0), expected)
    vectors = {name: part[0].astype(np.float32) for name, part in parts.items()}
    path = write(tmp_path / "b.tfrecord", encode_video("clip", vectors))
    video = read_clips([path], classes=1, spec=FeatureSpec(names, spec.sizes, "video"))
    np.testing.assert_array_equal(video.gather([0]).values, expected[:1].astype(np.float32))


@pytest.mark.parametrize("labels", [["/m/b", "Boom"], ["Gunshot, gunfire", "/m/c"]])
def test_labels_may_be_mids_or_names(tmp_path: Path, labels: list[str]) -> None:
    path = write(tmp_path / "a.tfrecord", encode_clip("clip", frames_of(0, 1), labels))
    assert read_clips([path], classes=3, labels=LABELS).labels_of(0).tolist() == [1, 2]
    with pytest.raises(DataError, match="give the list of classes"):
        read_clips([path], classes=3)


# --- batches ------------------------------------------------------------------------------------------------------


def test_an_epoch_holds_every_clip_once_with_its_own_frames_and_labels(tmp_path: Path) -> None:
    clips = read_clips([many(tmp_path)], classes=3)
    seen = []
    for batch in clips.batches(7, seed=5):
        assert batch.features.shape[1:] == (12, 128)
        for name, features, count, labels in zip(
            batch.video_ids, batch.features, batch.num_frames, batch.labels, strict=True
        ):
            i = int(name[4:])
            seen.append(i)
            assert count == i % 13
            np.testing.assert_array_equal(features[:count], frames_of(i, i % 13))
            assert not features[count:].any()
            assert labels.tolist() == [i % 3 == label for label in range(3)]
    assert sorted(seen) == list(range(40))
    assert seen != sorted(seen)


def test_shuffling_depends_on_seed_and_epoch_alone_and_resumes_anywhere(tmp_path: Path) -> None:
    clips = read_clips([many(tmp_path)], classes=3)
    whole = [batch.video_ids for batch in clips.batches(7, seed=5, epoch=2)]
    assert [batch.video_ids for batch in clips.batches(7, seed=5, epoch=2, skip=3)] == whole[3:]
    assert [batch.video_ids for batch in clips.batches(7, seed=5, epoch=3)] != whole
    assert [batch.video_ids for batch in clips.batches(7, seed=6, epoch=2)] != whole
    assert [len(ids) for ids in whole] == [7, 7, 7, 7, 7, 5]
    assert [len(b.video_ids) for b in clips.batches(7, drop_remainder=True)] == [7] * 5


def test_label_counts_count_clips(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tfrecord", *(encode_clip("a", frames_of(0, 1), labels) for labels in ([2, 2, 0], [2], []))
    )
    clips = read_clips([path], classes=4)
    assert clips.label_counts().tolist() == [1, 0, 2, 0]
    assert clips.label_matrix().sum(0).tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize("level", ["frame", "video"])
def test_features_beyond_the_limit_lie_in_a_file_and_give_the_same_batches(tmp_path: Path, level: str) -> None:
    path = many(tmp_path)
    spec = FeatureSpec()
    if level == "video":
        vectors = [frames_of(i, 1)[0].astype(np.float32) for i in range(40)]
        path = write(tmp_path / "v.tfrecord", *(encode_video(f"clip{i}", v) for i, v in enumerate(vectors)))
        spec = FeatureSpec(level="video")
    held = read_clips([path], classes=3, spec=spec)
    spilled = read_clips([path, path], classes=3, spec=spec, memory_limit_bytes=1000, spill_folder=tmp_path)
    assert isinstance(spilled.features, np.memmap)
    assert len(spilled) == 80
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted({path.name, "many.tfrecord"}), "a file is left"
    for mine, theirs in zip(held.batches(40), spilled.batches(40), strict=False):
        assert mine.video_ids == theirs.video_ids
        np.testing.assert_array_equal(mine.values, theirs.values)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be kept in"):
        read_clips([many(tmp_path)], classes=3, memory_limit_bytes=0, spill_folder=tmp_path / "missing")
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "b.tfrecord.partial").symlink_to(full)
    with pytest.raises(DataError, match=r"b\.tfrecord can't be written"):
        write(tmp_path / "b.tfrecord", encode_clip("a", frames_of(0, 1)))
    assert not list(tmp_path.glob("b.*"))


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    def stops() -> None:
        with RecordWriter(tmp_path / "a.tfrecord") as writer:
            writer.write(b"record")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stops()
    assert not list(tmp_path.iterdir())


# --- damage -------------------------------------------------------------------------------------------------------


def offsets_of(path: Path) -> list[int]:
    with path.open("rb") as stream:
        return [item[0] for item in read_records(stream, path) if not isinstance(item, Damage)]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_changed_byte_costs_one_clip_and_is_located(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = many(tmp_path_factory.mktemp("damaged"), 12)
    content, offsets = bytearray(path.read_bytes()), offsets_of(path)
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    hit = max(i for i, offset in enumerate(offsets) if offset <= at)
    clips = read_clips([path], classes=3)
    assert [clips.video_id(i) for i in range(len(clips))] == [f"clip{i}" for i in range(12) if i != hit]
    (damage,) = clips.report.damages
    assert (damage.path, damage.offset_bytes) == (path, offsets[hit])
    with pytest.raises(DataError, match=f"byte {offsets[hit]}"):
        read_clips([path], classes=3, stop_on_damage=True)


def test_a_cut_file_gives_what_came_before_the_cut(tmp_path: Path) -> None:
    path = many(tmp_path, 6)
    content, offsets = path.read_bytes(), offsets_of(path)
    for cut in range(offsets[1], len(content), 37):
        path.write_bytes(content[:cut])
        whole = sum(end <= cut for end in [*offsets[1:], len(content)])
        clips = read_clips([path], classes=3)
        assert len(clips) == whole
        damages = [] if cut in offsets else [offsets[whole]]
        assert [damage.offset_bytes for damage in clips.report.damages] == damages


def test_records_behind_a_lost_length_are_found_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = many(tmp_path, 12)
    content, offsets = bytearray(path.read_bytes()), offsets_of(path)
    content[offsets[3]] ^= 1
    path.write_bytes(content)
    for block in range(1, 40):
        monkeypatch.setattr("trainer.records._SCAN_BYTES", block)
        assert offsets_of(path) == [offset for offset in offsets if offset != offsets[3]]


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_any_bytes_with_a_right_checksum_are_a_clip_or_a_told_error(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes
) -> None:
    path = tmp_path_factory.mktemp("junk") / "a.tfrecord"
    write(path, junk, encode_clip("good", frames_of(0, 1), [1]))
    try:
        clips = read_clips([path], classes=3)
    except DataError as error:
        told = str(error)
    else:
        assert clips.video_id(len(clips) - 1) == "good"
        assert len(clips) + len(clips.report.damages) == 2
        return
    assert told.startswith(f"{path}, byte 0: ")


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_wrong_byte_behind_a_right_checksum_is_told_or_leaves_frames_of_the_right_size(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    record = bytearray(encode_clip("clip", frames_of(0, 3), [1], start_seconds=1.0))
    at = data.draw(st.integers(0, len(record) - 1))
    record[at] ^= data.draw(st.integers(1, 255))
    path = write(tmp_path_factory.mktemp("wrong") / "a.tfrecord", bytes(record))
    try:
        clips = read_clips([path], classes=3)
    except DataError:
        return
    assert clips.frames_of(0).shape[1] == 128


def test_frames_in_another_layout_of_the_same_length_are_not_taken_for_frames(tmp_path: Path) -> None:
    record = bytearray(encode_clip("clip", frames_of(0, 3)))
    second = bytes(record).rindex(frames_of(0, 3)[1].tobytes()) - 9
    record[second + 6] = 0x12  # the frame's bytes under a number that means nothing
    with pytest.raises(DataError, match="is not one string of bytes"):
        read_clips([write(tmp_path / "a.tfrecord", bytes(record))], classes=3)


def test_packing_in_parts_gives_the_same_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = many(tmp_path)
    (whole,) = read_clips([path], classes=3).batches(40)
    monkeypatch.setattr("trainer.records._CLIPS_PER_PART", 3)
    (parts,) = read_clips([path], classes=3).batches(40)
    assert parts.video_ids == whole.video_ids
    np.testing.assert_array_equal(parts.features, whole.features)
    np.testing.assert_array_equal(parts.labels, whole.labels)


def test_files_that_are_no_records_are_counted_beside_good_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "archive.tfrecord"
    other.write_bytes(bytes(range(256)) * 20)
    gone = tmp_path / "gone.tfrecord"
    clips = read_clips([other, gone, many(tmp_path)], classes=3)
    assert len(clips) == 40
    reasons = [str(damage) for damage in clips.report.damages]
    assert "is this a TFRecord file?" in reasons[0]
    assert "No such file" in reasons[1]
    assert str(other) in caplog.text
    assert "2 damaged" in str(clips.report)
    with pytest.raises(DataError, match="None of 1 files holds a readable record"):
        read_clips([other], classes=3)


def test_a_large_length_is_no_allocation(tmp_path: Path) -> None:
    header = struct.pack("<Q", 1 << 60)
    path = tmp_path / "a.tfrecord"
    path.write_bytes(header + struct.pack("<I", masked_crc(header)) + b"x" * 100)
    with path.open("rb") as stream:
        (damage,) = read_records(stream, path)
    assert isinstance(damage, Damage)
    assert "cut off" in damage.reason


def test_large_files_are_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = many(tmp_path)
    monkeypatch.setattr("trainer.records._READ_WHOLE_BYTES", 10)
    monkeypatch.setattr("trainer.records._CLIPS_PER_PART", 3)
    assert len(read_clips([path] * 40, classes=3)) == 1600
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match="cut off"):
        read_clips([path] * 40, classes=3, stop_on_damage=True)


# --- what doesn't fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "spec", "message"),
    [
        (encode_clip("a", frames_of(0, 2, 64)), FeatureSpec(), "frames of 64 bytes; 128 are expected"),
        (encode_clip("a", frames_of(0, 2), [3]), FeatureSpec(), "Label 3 is out of range: there are 3 classes"),
        (encode_clip("a", frames_of(0, 2)), FeatureSpec(("rgb",), (128,)), "lacks .* rgb; it holds audio_embedding"),
        (
            encode_clip("a", {"rgb": frames_of(0, 2)}),
            FeatureSpec(),
            "lacks .* audio_embedding or audio; it holds .*rgb",
        ),
        (encode_video("a", np.zeros(128, np.float32)), FeatureSpec(), "is it video-level"),
        (encode_clip("a", frames_of(0, 2)), FeatureSpec(level="video"), "is it frame-level"),
        (encode_video("a", np.zeros(64, np.float32)), FeatureSpec(level="video"), "holds 64 values; 128 floats"),
        (encode_clip("a", frames_of(0, 2), ["Bom"]), FeatureSpec(), "'Bom' is no class .* Nearest: Boom"),
        (b"", FeatureSpec(), "neither video_id nor id; it holds nothing"),
    ],
)
def test_a_record_that_does_not_fit_names_place_and_remedy(
    tmp_path: Path, record: bytes, spec: FeatureSpec, message: str
) -> None:
    good = encode_video("g", np.zeros(128, np.float32)) if spec.level == "video" else encode_clip("g", frames_of(0, 1))
    path = write(tmp_path / "a.tfrecord", *([] if spec.names else [good]), record)
    second = 0 if spec.names else 16 + len(good)
    with pytest.raises(DataError, match=message) as caught:
        read_clips([path], classes=3, spec=spec, labels=LABELS)
    assert str(caught.value).startswith(f"{path}, byte {second}: ")


def test_features_of_different_length_do_not_fit(tmp_path: Path) -> None:
    import tensorflow as tf

    clip = tf.train.SequenceExample()
    clip.context.feature["id"].bytes_list.value.append(b"clip")
    for name, count in (("rgb", 2), ("audio", 3)):
        for _ in range(count):
            clip.feature_lists.feature_list[name].feature.add().bytes_list.value.append(b"abcd")
    path = write(tmp_path / "a.tfrecord", clip.SerializeToString())
    with pytest.raises(DataError, match="different numbers of frames: rgb 2, audio 3"):
        read_clips([path], classes=3, spec=FeatureSpec(("rgb", "audio"), (4, 4)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"names": ("a",) * 2, "sizes": (1, 1)},
        {"names": tuple("abcdefghi"), "sizes": (1,) * 9},
        {"names": ("a", "b"), "sizes": (128,)},
        {"sizes": (0,)},
        {"max_frames": 0},
    ],
)
def test_a_feature_list_that_can_not_be_is_refused(wrong: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(ConfigError):
        FeatureSpec(**wrong)  # type: ignore[arg-type]


def test_patterns_find_files_or_say_what_is_there(tmp_path: Path) -> None:
    names = ["-0.tfrecord", "a.tfrecord", "b.tfrecord", "notes.txt"]
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in find_files(tmp_path)] == names[:3]
    assert [path.name for path in find_files(f"{tmp_path}/a*,{tmp_path}/*.tfrecord")] == names[:3]
    assert [path.name for path in find_files([tmp_path / "b.tfrecord", f"{tmp_path}/-*"])] == [names[0], names[2]]
    with pytest.raises(DataError, match=r"eval\*' matches no file: .* holds -0.tfrecord, a.tfrecord"):
        find_files(f"{tmp_path}/a*,{tmp_path}/eval*")
    with pytest.raises(DataError, match=f"there is no folder {tmp_path}/missing"):
        find_files(f"{tmp_path}/missing/*.tfrecord")
    with pytest.raises(DataError, match="names no file"):
        find_files(" , ")
