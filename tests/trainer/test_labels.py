"""Classes are found by index, MID, name and family alike; what is unknown is told with what is near."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detector.errors import DataError
from trainer.labels import (
    GUNFIRE,
    LOOK_ALIKES,
    Label,
    LabelSet,
    Node,
    Ontology,
    gunfire_classes,
    look_alike_classes,
)
from trainer.segments import Segment, read_segments

NAMES = ("Speech", "Explosion", "Gunshot, gunfire", "Machine gun", "Cap gun", "Fireworks", "Burst, pop", "Boom")
LABELS = LabelSet([Label(i, f"/m/{i}", name) for i, name in enumerate(NAMES)])
ONTOLOGY = Ontology(
    [
        Node("/m/x", "Sounds of things", ("/m/1", "/t/y"), True),
        Node("/t/y", "Bangs", ("/m/6", "/m/7"), True),
        Node("/m/1", "Explosion", ("/m/2", "/m/5", "/m/6", "/m/7"), False),
        Node("/m/2", "Gunshot, gunfire", ("/m/3", "/m/4", "/m/f"), False),
        Node("/m/f", "Fusillade", (), False),
        *(Node(f"/m/{i}", NAMES[i], (), False) for i in (0, 3, 4, 5, 6, 7)),
    ]
)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (2, 2),
        ("2", 2),
        ("/m/2", 2),
        ("Gunshot, gunfire", 2),
        (" gunshot,  GUNFIRE ", 2),
        ("boom", 7),
    ],
)
def test_a_class_is_found_by_index_mid_or_name(wanted: int | str, expected: int) -> None:
    assert LABELS.index(wanted) == expected


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("Gunshot, gunfire", (2, 3, 4)),
        ("Gunshot, gunfire, -Cap gun", (2, 3)),
        ("-Cap gun, Gunshot, gunfire", (2, 3)),
        ("=Explosion, Burst, pop, Boom", (1, 6, 7)),
        ("Explosion, -Gunshot, gunfire, -=Explosion", (5, 6, 7)),
        ("/m/1", (1,)),
        ("1", (1,)),
        ("2-4, 0", (0, 2, 3, 4)),
        ("Bangs", (6, 7)),
        ("sounds of things, -5", (1, 2, 3, 4, 6, 7)),
        ("/t/y", (6, 7)),
        ([2, "Burst, pop", "/m/0"], (0, 2, 6)),
        (["Gunshot, gunfire", "-4"], (2, 3)),
    ],
)
def test_a_set_of_classes_is_found_from_any_mixture(wanted: str | list[int | str], expected: tuple[int, ...]) -> None:
    assert LABELS.resolve(wanted, ONTOLOGY) == expected


def test_without_an_ontology_a_name_is_its_class_alone() -> None:
    assert LABELS.resolve("Gunshot, gunfire, Boom") == (2, 7)


@given(st.sets(st.integers(0, len(NAMES) - 1), min_size=1))
def test_a_set_written_by_names_indices_or_mids_is_the_same_set(chosen: set[int]) -> None:
    expected = tuple(sorted(chosen))
    assert LABELS.resolve(", ".join(NAMES[i] for i in chosen)) == expected
    assert LABELS.resolve(",".join(f"={NAMES[i]}" for i in chosen), ONTOLOGY) == expected
    assert LABELS.resolve(",".join(f"/m/{i}" for i in chosen), ONTOLOGY) == expected
    assert LABELS.resolve(list(chosen), ONTOLOGY) == expected


def test_the_family_of_a_model_that_only_names_its_classes_is_found_by_name() -> None:
    model = LabelSet.of_names(["Machine gun", "Gunshot, gunfire", "Boom"])
    assert model.resolve(GUNFIRE, Ontology([*ONTOLOGY.nodes.values()])) == (0, 1)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("Gunshots", r"'Gunshots' is no class .* Nearest: Gunshot, gunfire"),
        ("Boom, Machne gun", r"'Machne gun' .* Nearest: Machine gun"),
        ("Fusilade", "Nearest: Fusillade"),
        ("Bang", "Nearest: Bangs"),
        ("xyzzy", r"'xyzzy' is no class of the list of classes\.$"),
        ("8", "no class 8: the list of classes has indices 0 to 7"),
        ("4-2", "runs backwards"),
        ("6-9", "no class 9"),
        ("Boom, -7", "leaves no class"),
        ("Fusillade", "leaves no class"),
        ("", "leaves no class"),
    ],
)
def test_what_is_unknown_is_told_with_what_is_near(wanted: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        LABELS.resolve(wanted, ONTOLOGY)


def test_a_family_without_an_ontology_says_what_it_needs() -> None:
    with pytest.raises(DataError, match=r"need ontology\.json"):
        LABELS.resolve("Bangs")
    with pytest.raises(DataError, match="no class -1"):
        LABELS.index(-1)
    with pytest.raises(DataError, match=r"'Bans' is in no family .* Nearest: Bangs"):
        ONTOLOGY.family("Bans")


def test_a_tree_is_walked_as_it_is_read() -> None:
    assert [(depth, node.name) for depth, node in ONTOLOGY.walk("Bangs")] == [
        (0, "Bangs"),
        (1, "Burst, pop"),
        (1, "Boom"),
    ]
    family = [node.name for node in ONTOLOGY.family("Sounds of things")]
    assert len(family) == len(set(family)) == 10
    assert [node.name for node in ONTOLOGY.roots] == ["Sounds of things", "Speech"]


def test_audiosets_own_files_give_gunfire_and_its_look_alikes(data_dir: Path) -> None:
    folder = data_dir / "audioset"
    labels, ontology = LabelSet.read(folder / "class_labels_indices.csv"), Ontology.read(folder / "ontology.json")
    assert labels.resolve(GUNFIRE, ontology) == (427, 428, 429, 430)
    found = [labels[i].name for i in labels.resolve(LOOK_ALIKES, ontology)]
    assert sorted(found) == ["Boom", "Burst, pop", "Explosion", "Firecracker", "Fireworks", "Thunder"]
    for label in labels:
        assert labels.resolve(f"={label.name}, {label.mid}, {label.index}", ontology) == (label.index,)
        assert ontology.node(label.name).mid == label.mid
    roots = [node.name for root in ontology.roots for node in ontology.family(root.mid)]
    assert set(roots) == {node.name for node in ontology.nodes.values()}
    for name, lines in (("balanced_train_segments.csv", 22_160), ("eval_segments.csv", 20_371)):
        assert len(read_segments(folder / name, labels)) == lines


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n", "does not begin with the line index,mid,display_name"),
        ("", "does not begin"),
        ("index,mid,display_name\n", "holds no class"),
        ("index,mid,display_name\n0,/m/a,A\n2,/m/b,B\n", "'B' has index 2; 1 is next"),
        ("index,mid,display_name\n0,/m/a,A\n1,/m/b,a\n", "twice"),
        ("index,mid,display_name\n0,/m/a,A\n1,/m/a,B\n", "twice"),
        ("index,mid,display_name\n0,/m/a,A, b\n", "line 2: an index, a MID and a name"),
        ("index,mid,display_name\nx,/m/a,A\n", "line 2"),
    ],
)
def test_a_damaged_list_of_classes_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        LabelSet.read(write(tmp_path / "labels.csv", text))
    assert "labels.csv" in str(caught.value)


@pytest.mark.parametrize(
    "content", ["", "{}x", '[{"id": "/m/a"}]', '{"a": 1}', '[{"id": 1, "name": "a", "child_ids": []}]', "[3]"]
)
def test_a_damaged_ontology_is_told(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"o\.json is not AudioSet's ontology"):
        Ontology.read(write(tmp_path / "o.json", content))


def test_an_ontology_that_is_no_tree_is_told(tmp_path: Path) -> None:
    lost = [{"id": "/m/a", "name": "A", "child_ids": ["/m/b"]}]
    with pytest.raises(DataError, match="'A' has children that are not there: /m/b"):
        Ontology.read(write(tmp_path / "o.json", json.dumps(lost)))
    ring = Ontology.read(
        write(tmp_path / "o.json", json.dumps([*lost, {"id": "/m/b", "name": "B", "child_ids": ["/m/a"]}]))
    )
    with pytest.raises(DataError, match="'B' lies below itself"):
        ring.family("B")
    with pytest.raises(DataError, match="can't be read"):
        Ontology.read(tmp_path / "missing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="is no text"):
        Ontology.read(tmp_path / "binary.json")


def test_segments_are_read_in_every_spelling(tmp_path: Path) -> None:
    text = '# made\n#\n-a, 30.000, 40.000, "/m/2,/m/7"\n\nb,0,4.5,"Gunshot, gunfire"\nc, 0, 1, 3\n'
    assert read_segments(write(tmp_path / "s.csv", text), LABELS) == (
        Segment("-a", 30.0, 40.0, (2, 7)),
        Segment("b", 0.0, 4.5, (2,)),
        Segment("c", 0.0, 1.0, (3,)),
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a, 1, 2", "found 3 fields"),
        ('a, one, 2, "/m/2"', "'one' .* is no number"),
        ('a, 2, 1, "/m/2"', "no stretch of time"),
        ('a, nan, 1, "/m/2"', "no stretch of time"),
        ('a, 0, 1, "/m/99"', "'/m/99' is no class"),
        ('a, 0, 1, "Bom"', "Nearest: Boom"),
    ],
)
def test_a_wrong_segment_is_told_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_segments(write(tmp_path / "s.csv", f"# made\n{line}\n"), LABELS)
    assert "s.csv, line 2: " in str(caught.value)


def test_an_empty_segment_list_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no segment"):
        read_segments(write(tmp_path / "s.csv", "# made\n"), LABELS)
    with pytest.raises(DataError, match="can't be read"):
        read_segments(tmp_path / "missing.csv", LABELS)


def test_gunfire_and_its_look_alikes_are_found_with_and_without_an_ontology() -> None:
    assert gunfire_classes(LABELS) == (2, 3)
    assert gunfire_classes(LABELS, ONTOLOGY) == (2, 3)
    without_cap_gun = Ontology(
        [Node("/m/2", "Gunshot, gunfire", ("/m/3",), False), Node("/m/3", "Machine gun", (), False)]
    )
    assert gunfire_classes(LABELS, without_cap_gun) == (2, 3)
    assert gunfire_classes(LABELS, Ontology([Node("/m/0", "Speech", (), False)])) == (2, 3)
    assert look_alike_classes(LABELS) == look_alike_classes(LABELS, ONTOLOGY) == (1, 5, 6, 7)
    none = LabelSet.of_names(["Speech", "Dog"])
    assert gunfire_classes(none) == gunfire_classes(none, ONTOLOGY) == look_alike_classes(none) == ()
