"""``trainer predict`` (the starter code's ``inference.py``) and ``trainer check-segments``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from detector.cli import quiet_tensorflow
from detector.errors import ConfigError, DataError
from trainer.commands_evaluate import (
    check_outputs,
    damage_option,
    feature_names_option,
    feature_sizes_option,
    read_shown,
    starter_flags,
    which_option,
)
from trainer.commands_labels import family_option, labels_option, list_option, ontology_option
from trainer.progress import shown

if TYPE_CHECKING:
    from rich.console import Console

    from trainer.check_segments import Disagreement, SegmentCheck

_CLASSES_IN_TEXT = 12


@click.command("predict")
@click.option(
    "--model",
    "--train_dir",
    "--train-dir",
    "model_name",
    required=True,
    help="A training run, a train directory of the starter code, a package's folder, or a shipped model's name.",
)
@click.option("--data", "--input_data_pattern", "pattern", required=True, help="TFRecord files: folder or pattern.")
@click.option(
    "--output",
    "--output_file",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    required=True,
    help="CSV to write; - is standard output.",
)
@click.option("--top-k", "--top_k", type=click.IntRange(1), default=20, show_default=True, help="Predictions a clip.")
@click.option("--label-names", is_flag=True, help="Names in place of class indices; pairs are then parted by '; '.")
@labels_option
@click.option("--batch-size", "--batch_size", type=click.IntRange(1), default=256, show_default=True)
@feature_names_option
@feature_sizes_option
@which_option
@damage_option
@starter_flags(
    "frame_features",
    "noframe_features",
    "num_readers",
    "input_model_tgz",
    "untar_model_dir",
    "checkpoint_file",
    "segment_label_ids_file",
    "segment_max_pred",
)
def predict_command(
    model_name: str,
    pattern: str,
    output: Path,
    top_k: int,
    label_names: bool,
    labels_path: Path | None,
    batch_size: int,
    feature_names: str | None,
    feature_sizes: str | None,
    which: str,
    stop_on_damage: bool,
) -> None:
    """Write each clip's best classes with their confidences as CSV, as the starter code's inference.py does.

    Own recordings become records with `trainer embed` first.
    """
    check_outputs(output)
    quiet_tensorflow()
    from detector.model import configure_tensorflow
    from trainer.classes import labels_of
    from trainer.predict import predictions, write_predictions, write_rows
    from trainer.trained import is_numbered, open_trained

    configure_tensorflow()
    trained = open_trained(model_name, "latest" if which == "latest" else "best")
    labels = labels_of(trained, labels_path)
    if label_names and is_numbered(labels):
        raise ConfigError(f"Model {trained.name} does not name its classes; give --labels with --label-names.")
    with shown() as tell:
        clips = read_shown(tell, trained, pattern, labels, feature_names, feature_sizes, stop_on_damage=stop_on_damage)

        def counted() -> Iterator[tuple[Sequence[str], Any]]:
            done = 0
            for ids, scores in predictions(trained.classifier, clips, batch_clips=batch_size):
                yield ids, scores
                done += len(ids)
                tell("Clips", done, len(clips), "")

        names = labels.names if label_names else None
        if str(output) == "-":
            write_rows(sys.stdout, counted(), top_k=top_k, names=names)
        else:
            write_predictions(output, counted(), top_k=top_k, names=names)
    where = "" if str(output) == "-" else f" -> {output}"
    click.echo(f"{clips.report}{where}", err=True)


@click.command("check-segments")
@click.option(
    "--predictions",
    "predictions_path",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="CSV of `trainer predict`, or of the starter code's inference.py.",
)
@click.option(
    "--segments",
    "segments_path",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="AudioSet's list, such as eval_segments.csv.",
)
@list_option
@ontology_option
@family_option
@click.option("--worst", type=click.IntRange(0), default=20, show_default=True, help="Disagreements of each kind.")
@click.option("--format", "output_format", type=click.Choice(["text", "json"]), default="text", show_default=True)
def check_segments_command(
    predictions_path: Path,
    segments_path: Path,
    labels_path: Path | None,
    ontology_path: Path | None,
    family: str | None,
    worst: int,
    output_format: str,
) -> None:
    """Compare predictions with a segment list: what was found, and the worst disagreements about gunfire.

    `found` counts a clip whose predictions hold the label at any place; `first` one whose best prediction it is.
    """
    from trainer.check_segments import as_dict, check_segments
    from trainer.labels import LabelSet, Ontology, gunfire_classes
    from trainer.predict import read_predictions
    from trainer.segments import read_segments

    if labels_path is None:
        raise ConfigError("Segment lists name classes by MID: give --labels class_labels_indices.csv.")
    labels = LabelSet.read(labels_path)
    ontology = Ontology.read(ontology_path) if ontology_path is not None else None
    members = labels.resolve(family, ontology) if family is not None else gunfire_classes(labels, ontology)
    if not members:
        raise ConfigError(f"None of the classes of {labels.source} is gunfire by its name; say which are: --family.")
    found, segments = read_predictions(predictions_path, labels), read_segments(segments_path, labels)
    try:
        check = check_segments(found, segments, labels, members, worst=worst)
    except ValueError:
        raise DataError(
            f"No id of {predictions_path} ({next(iter(found))}, ...) is in {segments_path} ({segments[0].video_id}, "
            "...): they are of other clips."
        ) from None
    if output_format == "json":
        click.echo(json.dumps(as_dict(check), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        _print_check(check, members)


def _print_check(check: SegmentCheck, members: Sequence[int]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from trainer.check_segments import one_sided

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 100
    console.print(
        f"{check.compared} clips compared, {check.top_k} predictions each; the first is a label in "
        f"{100 * check.hit_at_one:.1f} %."
    )
    for ids, where in ((check.only_predicted, "predictions"), (check.only_listed, "segments")):
        if ids:
            console.print(Text(one_sided(ids, where)))
    table = Table("Class", "labelled", "found", "recall", "first", "first right", box=SIMPLE_HEAD)
    of_family = [each for each in check.per_class if each.label.index in members]
    others = sorted((each for each in check.per_class if each not in of_family), key=lambda each: -each.labelled)
    for each in [check.family, *of_family, *others[:_CLASSES_IN_TEXT]]:
        table.add_row(
            Text(each.label.name),
            str(each.labelled),
            str(each.found),
            "–" if each.recall is None else f"{100 * each.recall:.1f} %",
            str(each.first),
            "–" if each.agreement_at_one is None else f"{100 * each.agreement_at_one:.1f} %",
        )
    console.print(table)
    _print_worst(console, "Gunfire by the segments: the lowest scores", check.lowest_with_gunfire)
    _print_worst(console, "No gunfire by the segments: the highest scores", check.highest_without_gunfire)


def _print_worst(console: Console, title: str, clips: Sequence[Disagreement]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    if not clips:
        console.print(f"{title}: none.")
        return
    table = Table("Clip", "from", "family", "labels", "predicted", box=SIMPLE_HEAD, title=title, title_justify="left")
    for each in clips:
        predicted = ", ".join(f"{name} {score:.2g}" for name, score in each.predicted)
        table.add_row(
            Text(each.video_id),
            f"{each.start_seconds:g} s",
            f"{each.score:.3g}",
            Text(", ".join(each.labels)),
            Text(predicted),
        )
    console.print(table)
