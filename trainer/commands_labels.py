"""The options that say which classes a command means, and ``trainer ontology``, which shows what may be named."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from trainer.labels import GUNFIRE, LOOK_ALIKES, LabelSet, Ontology

_FILE = click.Path(path_type=Path, dir_okay=False)

list_option = click.option(
    "--labels", "labels_path", type=_FILE, help="class_labels_indices.csv: names and MIDs of the classes."
)
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


@click.command("ontology")
@click.argument("names", nargs=-1)
@click.option("--ontology", "ontology_path", type=_FILE, required=True, envvar="ONTOLOGY", help="ontology.json.")
@list_option
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
    wanted, left_out = _wanted(names, ontology)
    roots = [ontology.node(name) for name in wanted] if wanted else list(ontology.roots)
    entries = [
        _entry(level, node.mid, ontology, labels)
        for root in roots
        for level, node in ontology.walk(root.mid)
        if (depth is None or level <= depth) and node.mid not in left_out
    ]
    if not tree:
        entries = list({entry["mid"]: entry for entry in entries}.values())
    if output_format == "json":
        click.echo(json.dumps(entries, indent=1, ensure_ascii=False))
        return
    _print_entries(entries, tree)


def _wanted(names: Sequence[str], ontology: Ontology) -> tuple[list[str], set[str]]:
    """Families to show, and MIDs of all that a minus leaves out (``Gunshot, gunfire, -Cap gun``)."""
    wanted: list[str] = []
    left_out: set[str] = set()
    for name in names:
        first, *minus = re.split(r",\s*-", name)
        if first:
            wanted.append(first)
        for each in minus:
            left_out.update(node.mid for node in ontology.family(each.strip()))
    return wanted, left_out


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
