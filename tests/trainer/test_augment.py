"""Augmentation follows from seed and step alone, and does to batches what the recipe says, no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.errors import ConfigError, DataError
from trainer.augment import Augmentation, Augmented, read_qualities, thinned
from trainer.labels import Label, LabelSet, Node, Ontology, general_class, gunfire_classes
from trainer.recipes import Recipe
from trainer.records import Batch, ClipSet, FeatureSpec, RecordWriter, encode_clip, encode_video, read_clips

NAMES = ("Speech", "Gunshot, gunfire", "Fusillade", "Fireworks")
MIDS = ("/m/09x0r", "/m/032s66", "/m/02z32qm", "/m/0g6b5")
LABELS = LabelSet([Label(i, mid, name) for i, (mid, name) in enumerate(zip(MIDS, NAMES, strict=True))])
FAMILY, LOOK_ALIKES = (1, 2), (3,)
# The first ten are speech, then come 2 shots, 1 fusillade with fireworks, 3 fireworks.
OF_CLIPS = [(0,)] * 10 + [(0, 1), (1,), (2, 3), (3,), (0, 3), (3,)]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> ClipSet:
    path = tmp_path_factory.mktemp("augment") / "clips.tfrecord"
    random = np.random.default_rng(1)
    with RecordWriter(path) as writer:
        for i, labels in enumerate(OF_CLIPS):
            frames = random.integers(0, 256, (1 + i % 10, 8), np.uint8)
            writer.write(encode_clip(f"clip{i}", frames, labels))
    return read_clips([path], classes=len(LABELS), spec=FeatureSpec(("audio_embedding",), (8,)))


def augmentation(clips: ClipSet, seed: int = 5, **recipe: Any) -> Augmentation:
    return Augmentation(Recipe(**recipe), clips, LABELS, FAMILY, LOOK_ALIKES, seed, general=1)


def whole(clips: ClipSet) -> Batch:
    return clips.gather(np.arange(len(clips)), 10)


def check_same(one: Augmented, other: Augmented) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_plain_recipe_changes_nothing(clips: ClipSet) -> None:
    batch, plain = whole(clips), augmentation(clips)
    found = plain(batch, 3)
    assert found.features is batch.features
    assert found.labels is batch.labels
    assert found.num_frames is batch.num_frames
    assert found.weights is None
    for epoch in (0, 1):
        np.testing.assert_array_equal(plain.order(epoch), clips.order(5, epoch))


EVERYTHING: dict[str, Any] = {
    "mixup_alpha": 0.5,
    "mixup_share": 0.7,
    "frame_dropout": 0.3,
    "imply_family": True,
    "label_smoothing": 0.1,
    "class_weight_power": 0.5,
    "balanced_sampling_power": 0.5,
    "label_quality": "audioset",
    "hard_negative_weight": 3.0,
    "hard_negative_sampling": 2.0,
}


def test_a_step_follows_from_seed_and_step_alone(clips: ClipSet) -> None:
    batch = whole(clips)
    one, other = augmentation(clips, **EVERYTHING), augmentation(clips, **EVERYTHING)
    expected = [one(batch, step) for step in range(4)]
    check_same(other(batch, 3), expected[3])  # as after a resumption: steps 0 to 2 were never drawn here
    check_same(one(batch, 1), expected[1])
    assert not np.array_equal(expected[0].features, expected[1].features)
    assert not np.array_equal(augmentation(clips, seed=6, **EVERYTHING)(batch, 0).features, expected[0].features)
    np.testing.assert_array_equal(one.order(2), other.order(2))
    assert not np.array_equal(one.order(2), one.order(3))


def test_mixed_clips_lie_between_two_and_labels_and_frames_with_them(clips: ClipSet) -> None:
    batch = whole(clips)
    found = augmentation(clips, mixup_alpha=1.0)(batch, 0)
    values, labels = batch.values, batch.labels.astype(np.float32)
    partners = set()
    for i in range(len(values)):
        fits = []
        for j in range(len(values)):
            apart = values[i] - values[j]
            kept = 1.0 if i == j else float(np.sum((found.features[i] - values[j]) * apart) / np.sum(apart * apart))
            mixed = kept * values[i] + (1 - kept) * values[j]
            if np.abs(mixed - found.features[i]).max() < 1e-4:
                fits.append((j, kept))
        j, kept = fits[0] if len(fits) == 1 else next(fit for fit in fits if fit[0] == i)
        assert 0.5 <= kept <= 1.0
        np.testing.assert_allclose(found.labels[i], kept * labels[i] + (1 - kept) * labels[j], atol=1e-4)
        assert found.num_frames[i] == max(batch.num_frames[i], batch.num_frames[j])
        partners.add(j)
    assert len(partners) == len(values)  # everyone is mixed into one other


def test_mixup_leaves_the_share_alone_that_is_not_to_be_mixed(clips: ClipSet) -> None:
    batch = whole(clips)
    mixing = augmentation(clips, mixup_alpha=0.4, mixup_share=0.25)
    values = batch.values
    untouched = 0
    for step in range(100):
        found = mixing(batch, step)
        same = (found.features == values).all(axis=(1, 2))
        np.testing.assert_array_equal(found.labels[same], batch.labels[same])
        np.testing.assert_array_equal(found.num_frames[same], batch.num_frames[same])
        untouched += int(same.sum())
    assert 0.72 < untouched / (100 * len(values)) < 0.83  # 0.75, and who is mixed with itself


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0.0, 0.95), st.lists(st.integers(0, 6), min_size=1, max_size=8))
def test_thinned_clips_keep_order_and_one_frame_at_least(seed: int, share: float, counts: list[int]) -> None:
    num_frames = np.array(counts, np.int32)
    features = np.arange(1, len(counts) * 6 + 1, dtype=np.uint8).reshape(len(counts), 6, 1)
    features = np.where(np.arange(6)[:, None] < num_frames[:, None, None], features, 0).astype(np.uint8)
    before = features.copy()
    found, left = thinned(features, num_frames, share, np.random.default_rng(seed))
    np.testing.assert_array_equal(features, before)
    assert found.dtype == np.uint8
    assert found.shape == features.shape
    for i, count in enumerate(counts):
        assert min(count, 1) <= left[i] <= count
        kept = found[i, : left[i], 0].tolist()
        assert kept == sorted(set(kept))
        assert set(kept) <= set(before[i, :count, 0].tolist())
        assert not found[i, left[i] :].any()
    if share == 0:
        np.testing.assert_array_equal(found, before)


def test_frames_are_thinned_by_the_share(clips: ClipSet) -> None:
    batch = whole(clips)
    thin = augmentation(clips, frame_dropout=0.4)
    full = batch.num_frames == 10
    left = np.concatenate([thin(batch, step).num_frames[full] for step in range(300)])
    assert 5.7 < left.mean() < 6.3


def test_any_label_of_the_family_implies_its_general_class(clips: ClipSet) -> None:
    batch = whole(clips)
    before = batch.labels.copy()
    found = augmentation(clips, imply_family=True)(batch, 0)
    expected = before.copy()
    expected[:, 1] |= before[:, 2]
    assert expected[:, 1].sum() > before[:, 1].sum()
    np.testing.assert_array_equal(found.labels, expected)
    np.testing.assert_array_equal(batch.labels, before)
    nothing = Augmentation(Recipe(imply_family=True), clips, LABELS, FAMILY, (), 0)(batch, 0)
    np.testing.assert_array_equal(nothing.labels, before)


def labels_of(*names: str) -> LabelSet:
    return LabelSet([Label(i, f"/m/{i}", name) for i, name in enumerate(names)])


def test_only_a_class_that_all_others_are_kinds_of_is_implied() -> None:
    weapons = labels_of("Pistol", "Rifle", "Traffic", "Firearm")
    children = {"Firearm": ("/m/0", "/m/1")}
    tree = Ontology([Node(each.mid, each.name, children.get(each.name, ()), False) for each in weapons])
    assert general_class(weapons, (0, 1)) is None  # the first is no kind of the other
    assert general_class(weapons, (0, 1), tree) is None
    assert general_class(weapons, (0, 1, 3), tree) == 3
    assert general_class(weapons, (0, 1, 3)) is None
    assert general_class(weapons, (0, 2, 3), tree) is None
    assert general_class(labels_of("Rifle", "Gunshot, gunfire", "Dog"), (0, 1)) == 1
    assert general_class(labels_of("Rifle", "Gunshot, gunfire", "Dog"), (0,)) is None


@pytest.mark.parametrize("with_ontology", [False, True])
def test_of_audioset_it_is_gunshot_gunfire(data_dir: Path, with_ontology: bool) -> None:
    labels = LabelSet.read(next(data_dir.rglob("class_labels_indices.csv")))
    ontology = Ontology.read(next(data_dir.rglob("ontology.json"))) if with_ontology else None
    assert general_class(labels, gunfire_classes(labels, ontology), ontology) == 427


def test_labels_are_smoothed(clips: ClipSet) -> None:
    batch = whole(clips)
    found = augmentation(clips, label_smoothing=0.2)(batch, 0)
    np.testing.assert_allclose(found.labels, np.where(batch.labels, 0.9, 0.1), atol=1e-6)


def test_positives_weigh_by_their_quality(clips: ClipSet, tmp_path: Path) -> None:
    batch = whole(clips)
    found = augmentation(clips, label_quality="audioset")(batch, 0).weights
    assert found is not None
    expected = np.ones(batch.labels.shape)
    expected[batch.labels[:, 2], 2] = 0.1  # Fusillade
    np.testing.assert_allclose(found, expected, atol=1e-6)
    table = tmp_path / "quality.csv"
    table.write_text("class,quality\nfireworks,0.25\n/m/032s66,0\n")
    found = augmentation(clips, label_quality=str(table), label_quality_power=0.5)(batch, 0).weights
    assert found is not None
    expected = np.ones(batch.labels.shape)
    expected[batch.labels[:, 3], 3], expected[batch.labels[:, 1], 1] = 0.5, 0.1
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_classes_weigh_by_their_rarity(clips: ClipSet) -> None:
    weights = augmentation(clips, class_weight_power=1.0)(whole(clips), 0).weights
    assert weights is not None
    assert weights.shape == (4,)
    counts = clips.label_counts()
    np.testing.assert_allclose(weights * counts, (weights * counts)[0], rtol=1e-5)
    assert weights.mean() == pytest.approx(1.0)


def test_hard_negatives_weigh_more_for_the_family_alone(clips: ClipSet) -> None:
    batch = whole(clips)
    weights = augmentation(clips, hard_negative_weight=3.0)(batch, 0).weights
    assert weights is not None
    expected = np.ones(batch.labels.shape)
    for i, labels in enumerate(OF_CLIPS):
        if 3 in labels and not {1, 2} & set(labels):
            expected[i, [1, 2]] = 3.0
    np.testing.assert_array_equal(weights, expected)


def test_uneven_sampling_draws_by_shares(clips: ClipSet) -> None:
    drawing = augmentation(clips, hard_negative_sampling=4.0)
    orders = [drawing.order(epoch) for epoch in range(60)]
    assert all(len(order) == len(clips) for order in orders)
    drawn = np.bincount(np.concatenate(orders), minlength=len(clips))
    hard = np.array([3 in labels and not {1, 2} & set(labels) for labels in OF_CLIPS])
    assert drawn[hard].mean() / drawn[~hard].mean() == pytest.approx(4.0, rel=0.1)
    balanced = augmentation(clips, balanced_sampling_power=1.0)
    drawn = np.bincount(np.concatenate([balanced.order(epoch) for epoch in range(60)]), minlength=len(clips))
    assert drawn[12] > 2 * drawn[:10].mean()  # the only fusillade
    assert drawn.min() > 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,quality\n", "does not begin with the line class,quality"),
        ("class,quality\nSpeech\n", "line 2: a class and a number"),
        ("class,quality\nSpeech,1.5\n", "line 2: a quality from 0 to 1"),
        ("class,quality\nSpeech,nan\n", "line 2: a quality from 0 to 1"),
        ("class,quality\nSpeech,1,2\n", "line 2: a quality from 0 to 1"),
        ("class,quality\nSpeach,1\n", "'Speach' is no class"),
        ("class,quality\nSpeech,1\n0,0.5\n", "line 3: '0' has a quality already"),
    ],
)
def test_tables_of_quality_that_cannot_be_used(tmp_path: Path, text: str, words: str) -> None:
    table = tmp_path / "quality.csv"
    table.write_text(text)
    with pytest.raises(DataError, match=words):
        read_qualities(table, LABELS)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv can't be read"):
        read_qualities(tmp_path / "none.csv", LABELS)


def test_what_the_clips_do_not_have_is_refused(clips: ClipSet, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --family and --look-alikes, or the classes' names"):
        Augmentation(Recipe(hard_negative_weight=2.0), clips, LABELS, FAMILY, (), 0)
    path = tmp_path / "video.tfrecord"
    with RecordWriter(path) as writer:
        writer.write(encode_video("a", np.ones(8, np.float32), [0]))
        writer.write(encode_video("b", np.zeros(8, np.float32), [1]))
    videos = read_clips([path], classes=4, spec=FeatureSpec(("mean_audio",), (8,), "video"))
    with pytest.raises(ConfigError, match="frame_dropout needs frame-level"):
        augmentation(videos, frame_dropout=0.1)
    mixed = augmentation(videos, mixup_alpha=1.0)(videos.gather([0, 1]), 0)
    assert mixed.features.shape == (2, 8)
    np.testing.assert_allclose(mixed.features.sum(axis=0), 1.0, atol=1)
