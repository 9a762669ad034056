"""Classes by index, MID, display name or family. Every command that takes classes resolves them here.

A ``LabelSet`` is the ordered list of classes a model knows (``class_labels_indices.csv``); an ``Ontology`` is the tree
above them (``ontology.json``), in which a name stands for a whole family. Source of both files: AudioSet,
research.google.com/audioset.

A set of classes is written as a list of items with commas between (names may hold commas themselves):

    427          the class of this index            427-430    of these, both included
    /m/032s66    the class of this MID              =Explosion the class of this name alone
    Explosion    this class and all below it in the ontology
    -Cap gun     without it (= and - go together: -=Explosion)
"""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detector.errors import DataError

GUNFIRE = "Gunshot, gunfire, -Cap gun"
LOOK_ALIKES = "Fireworks, Firecracker, =Explosion, Thunder, Burst, pop, Boom"
GUNFIRE_CLASSES = ("Gunshot, gunfire", "Machine gun", "Fusillade", "Artillery fire")
"""``GUNFIRE`` where no ontology says what lies below."""
_NO_GUNFIRE = ("Cap gun",)
LOOK_ALIKE_ITEMS = ("Fireworks", "Firecracker", "=Explosion", "Thunder", "Burst, pop", "Boom")

_HEADER = ["index", "mid", "display_name"]
_RANGE = re.compile(r"(\d+)\s*-\s*(\d+)")
_MID = re.compile(r"/[a-z]/\S+")
_NEAREST = 3


@dataclass(frozen=True, slots=True)
class Label:
    """A class: its place in a model's output, its MID (empty where a model names classes only) and its name."""

    index: int
    mid: str
    name: str


@dataclass(frozen=True, slots=True)
class Node:
    """A sound of the ontology.

    Attributes:
        mid: its identifier there.
        name: for people.
        children: MIDs.
        abstract: it only groups others, no clip is labelled with it.
    """

    mid: str
    name: str
    children: tuple[str, ...]
    abstract: bool


class Ontology:
    """AudioSet's tree of sounds (in places a node has two parents)."""

    def __init__(self, nodes: Sequence[Node], source: str = "the ontology") -> None:
        self.nodes = {node.mid: node for node in nodes}
        self._by_name = {_plain(node.name): node for node in nodes}
        self.source = source
        for node in nodes:
            missing = [child for child in node.children if child not in self.nodes]
            if missing:
                raise DataError(f"{source}: {node.name!r} has children that are not there: {', '.join(missing)}.")

    @classmethod
    def read(cls, path: Path) -> Ontology:
        """From ``ontology.json``; DataError for a missing or damaged file."""
        try:
            entries = json.loads(_text(path))
            nodes = [_node(entry) for entry in entries]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is not AudioSet's ontology.json ({type(error).__name__}: {error}). Get it again."
            ) from error
        return cls(nodes, str(path))

    @property
    def roots(self) -> tuple[Node, ...]:
        """Nodes without a parent, in the file's order."""
        below = {child for node in self.nodes.values() for child in node.children}
        return tuple(node for node in self.nodes.values() if node.mid not in below)

    def find(self, key: str) -> Node | None:
        """By MID or name, whatever the case; None where there is none."""
        return self.nodes.get(key.strip()) or self._by_name.get(_plain(key))

    def node(self, key: str) -> Node:
        """``find``, with DataError that names the nearest names where there is none."""
        found = self.find(key)
        if found is None:
            names = [node.name for node in self.nodes.values()]
            raise DataError(f"{key!r} is in no family of {self.source}.{nearest(key, names)}")
        return found

    def family(self, key: str) -> tuple[Node, ...]:
        """The node and everything below it, each once, parents first."""
        return tuple(dict.fromkeys(node for _, node in self.walk(key)))

    def walk(self, key: str) -> Iterator[tuple[int, Node]]:
        """``(depth, node)`` from the node down, as a person reads a tree; DataError where it leads back to itself."""
        yield from self._walk(self.node(key), ())

    def _walk(self, node: Node, above: tuple[str, ...]) -> Iterator[tuple[int, Node]]:
        if node.mid in above:
            raise DataError(f"{self.source}: {node.name!r} lies below itself.")
        yield len(above), node
        for child in node.children:
            yield from self._walk(self.nodes[child], (*above, node.mid))


def _node(entry: Any) -> Node:
    mid, name, children = entry["id"], entry["name"], entry["child_ids"]
    if not (isinstance(mid, str) and isinstance(name, str) and all(isinstance(child, str) for child in children)):
        raise TypeError(f"id, name and child_ids of {mid!r} must be text")
    return Node(mid, name, tuple(children), "abstract" in entry.get("restrictions", ()))


class LabelSet:
    """The classes a model knows, in its order."""

    def __init__(self, labels: Sequence[Label], source: str = "the list of classes") -> None:
        self.labels = tuple(labels)
        self.source = source
        self._by_mid = {label.mid: label for label in labels if label.mid}
        self._by_name = {_plain(label.name): label for label in labels}
        if not labels:
            raise DataError(f"{source} holds no class.")
        for i, label in enumerate(labels):
            if label.index != i:
                raise DataError(f"{source}: class {label.name!r} has index {label.index}; {i} is next.")
        if len(self._by_name) < len(labels) or len(self._by_mid) < sum(bool(label.mid) for label in labels):
            raise DataError(f"{source} holds a name or MID twice.")

    @classmethod
    def read(cls, path: Path) -> LabelSet:
        """From a CSV ``index,mid,display_name``; DataError with the line for anything else."""
        labels: list[Label] = []
        rows = csv.reader(_text(path).splitlines())
        if next(rows, None) != _HEADER:
            raise DataError(f"{path} does not begin with the line {','.join(_HEADER)}; give class_labels_indices.csv.")
        for row in rows:
            if len(row) != 3 or not row[0].isdecimal():
                raise DataError(f"{path}, line {rows.line_num}: an index, a MID and a name are expected, found {row}.")
            labels.append(Label(int(row[0]), row[1].strip(), row[2].strip()))
        return cls(labels, str(path))

    @classmethod
    def of_names(cls, names: Sequence[str], source: str = "the list of classes") -> LabelSet:
        """Of a model that names its classes and nothing more."""
        return cls([Label(i, "", name) for i, name in enumerate(names)], source)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Label:
        return self.labels[index]

    def __iter__(self) -> Iterator[Label]:
        return iter(self.labels)

    @property
    def names(self) -> tuple[str, ...]:
        """Display names, in order."""
        return tuple(label.name for label in self.labels)

    def find(self, key: int | str) -> Label | None:
        """One class by index (a number, or its digits), MID or name, whatever the case; None where there is none."""
        if isinstance(key, str):
            found = self._by_mid.get(key.strip()) or self._by_name.get(_plain(key))
            if found is not None or not key.strip().isdecimal():
                return found
            key = int(key)
        return self.labels[key] if 0 <= key < len(self.labels) else None

    def index(self, key: int | str) -> int:
        """``find``'s index; DataError with the range or the nearest names where there is no such class."""
        found = self.find(key)
        if found is None:
            raise DataError(self._unknown(key))
        return found.index

    def resolve(self, wanted: str | Sequence[int | str], ontology: Ontology | None = None) -> tuple[int, ...]:
        """Indices, ascending, of a set written as this module's docstring says (a text, or its items).

        Without an ontology a name means its class alone. DataError for an unknown name, or where no class is left.
        """
        items = self._split(wanted, ontology) if isinstance(wanted, str) else [str(item).strip() for item in wanted]
        chosen: set[int] = set()
        dropped: set[int] = set()
        for item in items:
            if item.startswith("-"):
                dropped.update(self._item(item[1:].strip(), ontology))
            else:
                chosen.update(self._item(item, ontology))
        if not chosen - dropped:
            raise DataError(f"{wanted!r} leaves no class of {self.source}.")
        return tuple(sorted(chosen - dropped))

    def _item(self, item: str, ontology: Ontology | None) -> Sequence[int]:
        spanned = _RANGE.fullmatch(item)
        if spanned:
            first, last = self.index(spanned[1]), self.index(spanned[2])
            if last < first:
                raise DataError(f"The range {item} runs backwards.")
            return range(first, last + 1)
        if item.startswith("="):
            return [self.index(item[1:].strip())]
        label = self.find(item)
        if label is not None and (ontology is None or item.isdecimal() or _MID.fullmatch(item)):
            return [label.index]
        node = ontology.find(item) if ontology is not None else None
        if ontology is not None and node is not None:
            below = (
                self._by_mid.get(each.mid) or self._by_name.get(_plain(each.name)) for each in ontology.family(item)
            )
            return [each.index for each in below if each is not None]
        if label is None:
            raise DataError(self._unknown(item, ontology))
        return [label.index]

    def _split(self, text: str, ontology: Ontology | None) -> list[str]:
        """At commas, but the longest known name wins: ``Gunshot, gunfire, Boom`` are two items."""
        parts = [part.strip() for part in text.split(",") if part.strip()]
        items: list[str] = []
        at = 0
        while at < len(parts):
            for end in range(len(parts), at, -1):
                item = ", ".join(parts[at:end])
                bare = item.lstrip("-=").strip()
                if end == at + 1 or self.find(bare) or (ontology is not None and ontology.find(bare)):
                    items.append(item)
                    at = end
                    break
        return items

    def _unknown(self, key: int | str, ontology: Ontology | None = None) -> str:
        if isinstance(key, int) or key.strip().isdecimal():
            return f"There is no class {key}: {self.source} has indices 0 to {len(self) - 1}."
        names = [*self.names, *(node.name for node in ontology.nodes.values())] if ontology is not None else self.names
        hint = "" if ontology is not None else " (Names of families need ontology.json.)"
        return f"{key!r} is no class of {self.source}.{nearest(key, names)}{hint}"


def gunfire_classes(labels: LabelSet, ontology: Ontology | None = None) -> tuple[int, ...]:
    """Indices of ``GUNFIRE``, with or without an ontology; none where the labels hold no gunfire."""
    if ontology is not None and ontology.find(GUNFIRE_CLASSES[0]) is not None:
        items = [GUNFIRE_CLASSES[0], *(f"-{name}" for name in _NO_GUNFIRE if ontology.find(name) is not None)]
        try:
            return labels.resolve(items, ontology)
        except DataError:
            return ()
    return tuple(sorted(found.index for name in GUNFIRE_CLASSES if (found := labels.find(name)) is not None))


def general_class(labels: LabelSet, family: Sequence[int], ontology: Ontology | None = None) -> int | None:
    """The class that every other one of ``family`` is a kind of: the one called "Gunshot, gunfire", else the one that
    the ontology puts above all others; None where neither is in the family.
    """
    named = labels.find(GUNFIRE_CLASSES[0])
    if named is not None and named.index in family:
        return named.index
    for index in family if ontology is not None else ():
        assert ontology is not None
        node = ontology.find(labels[index].mid) or ontology.find(labels[index].name)
        if node is not None:
            below = (labels.find(each.mid) or labels.find(each.name) for each in ontology.family(node.mid))
            if set(family) <= {each.index for each in below if each is not None}:
                return index
    return None


def look_alike_classes(labels: LabelSet, ontology: Ontology | None = None) -> tuple[int, ...]:
    """Indices of those ``LOOK_ALIKES`` that the labels hold, gunfire left out; maybe none."""
    chosen: set[int] = set()
    for item in LOOK_ALIKE_ITEMS:
        if labels.find(item.lstrip("=")) is not None:
            chosen.update(labels.resolve([item], ontology))
    return tuple(sorted(chosen - set(gunfire_classes(labels, ontology))))


def nearest(key: str, names: Sequence[str]) -> str:
    """A sentence with the names that are most like ``key``, or nothing; for error messages."""
    wanted = _plain(key)
    spellings = {part: name for name in reversed(names) for part in (*_plain(name).split(", "), _plain(name))}
    near = [name for part, name in spellings.items() if any(word.startswith(wanted) for word in part.split())]
    near += [spellings[part] for part in difflib.get_close_matches(wanted, spellings, _NEAREST, 0.5)]
    chosen = list(dict.fromkeys(near))[:_NEAREST]
    return f" Nearest: {'; '.join(chosen)}." if chosen else ""


def _plain(name: str) -> str:
    return re.sub(r"\s*,\s*", ", ", " ".join(name.split())).casefold()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text: {error}.") from error
