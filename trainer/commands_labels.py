"""Which classes a command means: its options, what they resolve to, and ``trainer ontology`` that shows the tree."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from detector.errors import ConfigError
from trainer.labels import GUNFIRE, LOOK_ALIKES, LabelSet, Ontology, gunfire_classes, look_alike_classes

if TYPE_CHECKING:
    from trainer.trained import Trained

_FILE = click.Path(path_type=Path, dir_okay=False)
# AudioSet's places of the default sets, for a model of 527 classes that names none.
_AUDIOSET_CLASSES = 527
_AUDIOSET_FAMILY = "427-430"
_AUDIOSET_LOOK_ALIKES = "287, 426, 432-434, 436"

labels_option = click.option(
    "--labels",
    "labels_path",
    type=_FILE,
    help="class_labels_indices.csv. Needed where neither model nor records name the classes.",
)
ontology_option = click.option(
    "--ontology", "ontology_path", type=_FILE, help="ontology.json; with it a name stands for its whole family."
)
family_option = click.option(
    "--family",
    help=f"Classes of gunfire: names, MIDs, indices, ranges. Default: the model's; else {GUNFIRE!r}.",
)
look_alikes_option = click.option(
    "--look-alikes", help=f"Classes taken for gunfire, likewise. Default: the model's; else {LOOK_ALIKES!r}."
)


@dataclass(frozen=True, slots=True, eq=False)
class Classes:
    """Of a command: all classes, and which of them it is about.

    Attributes:
        family, look_alikes: indices, ascending, of which no index is in both.
        ontology: None where none was given.
    """

    labels: LabelSet
    family: tuple[int, ...]
    look_alikes: tuple[int, ...]
    ontology: Ontology | None = None


def classes_of(
    trained: Trained,
    labels_path: Path | None,
    ontology_path: Path | None,
    family: str | None,
    look_alikes: str | None,
) -> Classes:
    """The options' word, else the model's, else the defaults.

    Raises ConfigError for a list of classes that is not the model's, a set that names no class, overlapping sets, and
    where nothing says which classes are gunfire; DataError for unknown classes and files that can't be read.
    """
    ontology = Ontology.read(ontology_path) if ontology_path is not None else None
    labels = _labels_of(trained, labels_path)
    members: tuple[int, ...]
    if family is not None:
        members = labels.resolve(family, ontology)
    elif trained.family:
        members = trained.family
    else:
        members = gunfire_classes(labels, ontology)
        if not members and _is_unnamed_audioset(trained, labels_path):
            members = labels.resolve(_AUDIOSET_FAMILY)
    if not members:
        raise ConfigError(
            f"None of the {len(labels)} classes of {labels.source} is gunfire by its name. Say which are with --family "
            "(indices or names), or give their names with --labels."
        )
    if look_alikes is not None:
        similar = labels.resolve(look_alikes, ontology)
        both = sorted(set(members) & set(similar))
        if both:
            raise ConfigError(f"{', '.join(labels[i].name for i in both)}: in --family and in --look-alikes.")
    elif trained.look_alikes:
        similar = trained.look_alikes
    else:
        similar = look_alike_classes(labels, ontology)
        if not similar and _is_unnamed_audioset(trained, labels_path):
            similar = labels.resolve(_AUDIOSET_LOOK_ALIKES)
    return Classes(labels, members, tuple(i for i in similar if i not in members), ontology)


def _is_unnamed_audioset(trained: Trained, labels_path: Path | None) -> bool:
    return trained.labels is None and labels_path is None and trained.classes == _AUDIOSET_CLASSES


def _labels_of(trained: Trained, path: Path | None) -> LabelSet:
    if path is None:
        if trained.labels is not None:
            return trained.labels
        return _shipped_labels(trained.classes) or LabelSet.of_names(
            [f"class {i}" for i in range(trained.classes)], f"model {trained.name}"
        )
    given = LabelSet.read(path)
    if len(given) != trained.classes:
        raise ConfigError(f"{path} holds {len(given)} classes; model {trained.name} has {trained.classes}.")
    if trained.labels is not None:
        for mine, theirs in zip(trained.labels, given, strict=True):
            if mine.name != theirs.name:
                raise ConfigError(
                    f"{path} calls class {mine.index} {theirs.name!r}; model {trained.name} calls it {mine.name!r}."
                )
    return given


def _shipped_labels(classes: int) -> LabelSet | None:
    """AudioSet's, from a shipped model that names as many; None where there is none."""
    from detector.model import shipped_models

    if classes != _AUDIOSET_CLASSES:
        return None
    for manifest in shipped_models():
        if len(manifest.labels) == classes:
            return LabelSet.of_names(manifest.labels, f"model {manifest.name}")
    return None


# --- trainer ontology ---------------------------------------------------------------------------------------------


@click.command("ontology")
@click.argument("names", nargs=-1)
@click.option("--ontology", "ontology_path", type=_FILE, required=True, envvar="ONTOLOGY", help="ontology.json.")
@labels_option
@click.option("--tree/--list", default=True, show_default=True, help="As a tree, or one class a line.")
@click.option("--format", "output_format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--depth", type=click.IntRange(0), default=None, help="Levels below each name. Default: all.")
def ontology_command(
    names: Sequence[str],
    ontology_path: Path,
    labels_path: Path | None,
    tree: bool,
    output_format: str,
    depth: int | None,
) -> None:
    """Show families of sounds: NAMES or MIDs and all below them; without any, the whole tree.

    What is shown here can be written wherever a command takes classes, such as --family: a name with an ontology means
    itself and all below it.
    """
    ontology = Ontology.read(ontology_path)
    labels = LabelSet.read(labels_path) if labels_path is not None else None
    roots = [ontology.node(name) for name in names] if names else list(ontology.roots)
    entries = [
        _entry(level, node.mid, ontology, labels)
        for root in roots
        for level, node in ontology.walk(root.mid)
        if depth is None or level <= depth
    ]
    if not tree:
        entries = list({entry["mid"]: entry for entry in entries}.values())
    if output_format == "json":
        click.echo(json.dumps(entries, indent=1, ensure_ascii=False))
        return
    _print_entries(entries, tree)


def _entry(level: int, mid: str, ontology: Ontology, labels: LabelSet | None) -> dict[str, Any]:
    node = ontology.nodes[mid]
    entry: dict[str, Any] = {"name": node.name, "mid": mid, "depth": level, "abstract": node.abstract}
    if labels is not None:
        found = labels.find(mid) or labels.find(node.name)
        entry["index"] = None if found is None else found.index
    return entry


def _print_entries(entries: Sequence[dict[str, Any]], tree: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.tree import Tree

    def words(entry: dict[str, Any]) -> str:
        index = "" if entry.get("index") is None else f" [cyan]{entry['index']}[/]"
        grouped = " [dim](groups others)[/]" if entry["abstract"] else ""
        return f"{escape(entry['name'])} [dim]{escape(entry['mid'])}[/]{index}{grouped}"

    console = Console(highlight=False, soft_wrap=True)
    if not tree:
        for entry in entries:
            console.print(words(entry))
        return
    above: list[Tree] = []
    for entry in entries:
        if entry["depth"] == 0:
            if above:
                console.print(above[0])
            above = [Tree(words(entry))]
            continue
        del above[entry["depth"] :]
        above.append(above[-1].add(words(entry)))
    if above:
        console.print(above[0])
