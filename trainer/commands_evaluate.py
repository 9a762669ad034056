"""``trainer evaluate``: how good a trained model is, as text, JSON or a page; the starter code's ``eval.py``."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from detector.cli import quiet_tensorflow
from detector.errors import ConfigError
from trainer.commands_labels import family_option, labels_option, look_alikes_option, ontology_option
from trainer.progress import Tell, shown

if TYPE_CHECKING:
    from trainer.classes import Classes
    from trainer.evaluate import Evaluation
    from trainer.labels import LabelSet
    from trainer.records import ClipSet
    from trainer.trained import Trained

FORMATS = ("text", "json", "html")
_FORMAT_BY_SUFFIX = {".json": "json", ".html": "html", ".htm": "html"}

feature_names_option = click.option(
    "--feature-names", "--feature_names", help="Keys of the features, commas between. Default: the model's."
)
feature_sizes_option = click.option("--feature-sizes", "--feature_sizes", help="Their sizes. Default: the model's.")
which_option = click.option(
    "--which",
    type=click.Choice(["best", "latest"]),
    default="best",
    show_default=True,
    help="Weights of a training run.",
)
damage_option = click.option(
    "--stop-on-damage", is_flag=True, help="Stop at the first damaged record instead of counting it."
)

_LEVEL = "Records and model say by themselves whether they are frame-level."
_WITHOUT_EFFECT = {
    "frame_features": _LEVEL,
    "noframe_features": _LEVEL,
    "num_readers": "Records are read once, by as many threads as help.",
}
_REFUSED = {
    "segment_labels": "Clips are labelled as wholes.",
    "norun_once": "This evaluates once; `trainer train` evaluates as it goes.",
    "input_model_tgz": "Unpack it and give its folder as --train_dir.",
    "untar_model_dir": "Unpack the model and give its folder as --train_dir.",
    "checkpoint_file": "Give the checkpoint as --model, such as DIR/model.ckpt-1000.",
    "segment_label_ids_file": "Clips are scored as wholes.",
    "segment_max_pred": "Clips are scored as wholes.",
}


def starter_flags(*names: str) -> Callable[[Any], Any]:
    """Flags of the starter code's scripts that change nothing here (said so), or can't be had (refused, with what to
    do instead); hidden.
    """

    def told(_context: click.Context, parameter: click.Parameter, value: str | None) -> None:
        name = str(parameter.name)
        if not value:
            return
        if name in _REFUSED:
            raise ConfigError(f"--{name} has no meaning here. {_REFUSED[name]}")
        click.echo(f"--{name} has no effect: {_WITHOUT_EFFECT[name]}", err=True)

    def decorate(function: Any) -> Any:
        for name in names:
            flag = click.option(
                f"--{name}", name, hidden=True, is_flag=False, flag_value="true", callback=told, expose_value=False
            )
            function = flag(function)
        return function

    return decorate


@click.command("evaluate")
@click.option(
    "--model",
    "--train_dir",
    "--train-dir",
    "model_name",
    required=True,
    help="A training run, a train directory of the starter code, a package's folder, or a shipped model's name.",
)
@click.option("--data", "--eval_data_pattern", "pattern", required=True, help="TFRecord files: folder or pattern.")
@click.option("--format", "output_format", type=click.Choice(FORMATS), help="Default: by --output's ending, else text.")
@click.option(
    "--output",
    "outputs",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="Write there, not to standard output; several may be given, such as eval.json and eval.html.",
)
@labels_option
@ontology_option
@family_option
@look_alikes_option
@click.option(
    "--by-clip", type=click.Path(path_type=Path, dir_okay=False), help="Also write each clip's family score: CSV."
)
@click.option(
    "--label-loss",
    "--label_loss",
    type=click.Choice(["CrossEntropyLoss", "HingeLoss", "SoftmaxLoss"]),
    help="Default: what the model was trained with.",
)
@click.option(
    "--top-k", "--top_k", type=click.IntRange(1), default=20, show_default=True, help="Classes a clip, in GAP."
)
@click.option("--batch-size", "--batch_size", type=click.IntRange(1), default=1024, show_default=True)
@feature_names_option
@feature_sizes_option
@which_option
@damage_option
@starter_flags("frame_features", "noframe_features", "num_readers", "segment_labels", "norun_once")
@click.option("--run_once", type=bool, is_flag=False, flag_value="true", hidden=True)
def evaluate_command(
    model_name: str,
    pattern: str,
    output_format: str | None,
    outputs: tuple[Path, ...],
    labels_path: Path | None,
    ontology_path: Path | None,
    family: str | None,
    look_alikes: str | None,
    by_clip: Path | None,
    label_loss: str | None,
    top_k: int,
    batch_size: int,
    feature_names: str | None,
    feature_sizes: str | None,
    which: str,
    stop_on_damage: bool,
    run_once: bool | None,
) -> None:
    """Measure a model on labelled clips: Hit@1, PERR, GAP, mAP, AUC, d-prime, and how well it tells gunfire.

    Flags of the starter code's eval.py go by their own names too.
    """
    if run_once is False:
        raise ConfigError(
            "--run_once=False is not to be had: this evaluates once. `trainer train` evaluates as it goes."
        )
    check_outputs(*outputs, by_clip)
    quiet_tensorflow()
    from trainer.evaluate import evaluate, unscored_clips

    formats = [(path, output_format or _FORMAT_BY_SUFFIX.get(path.suffix.lower(), "text")) for path in outputs]
    trained, classes, clips = read_for(
        model_name,
        pattern,
        labels_path,
        ontology_path,
        family,
        look_alikes,
        feature_names=feature_names,
        feature_sizes=feature_sizes,
        which=which,
        stop_on_damage=stop_on_damage,
    )
    with shown() as tell:
        evaluation = evaluate(
            trained,
            clips,
            classes,
            pattern=pattern,
            label_loss=label_loss,
            top_k=top_k,
            batch_clips=batch_size,
            on_clips=lambda done: tell("Clips", done, len(clips), ""),
        )
    if evaluation.unscored:
        click.echo(unscored_clips(evaluation), err=True)
    for path, chosen in formats or [(Path("-"), output_format or "text")]:
        _write(path, chosen, evaluation)
    if by_clip is not None:
        from trainer.evaluate import by_clip_rows

        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(by_clip_rows(evaluation))
        _to_file(by_clip, text.getvalue())


def read_for(
    model_name: str,
    pattern: str,
    labels_path: Path | None,
    ontology_path: Path | None,
    family: str | None,
    look_alikes: str | None,
    *,
    feature_names: str | None,
    feature_sizes: str | None,
    which: str,
    stop_on_damage: bool,
) -> tuple[Trained, Classes, ClipSet]:
    """The model, the classes that count, and the clips, with a bar for the files; damage is told at the end."""
    from detector.model import configure_tensorflow
    from trainer.classes import classes_of
    from trainer.trained import open_trained

    configure_tensorflow()
    trained = open_trained(model_name, "latest" if which == "latest" else "best")
    classes = classes_of(trained, labels_path, ontology_path, family, look_alikes)
    with shown() as tell:
        clips = read_shown(
            tell, trained, pattern, classes.labels, feature_names, feature_sizes, stop_on_damage=stop_on_damage
        )
    if clips.report.damages:
        click.echo(str(clips.report), err=True)
    return trained, classes, clips


def _write(path: Path, chosen: str, evaluation: Evaluation) -> None:
    from trainer import report

    if chosen == "text":
        if str(path) == "-":
            report.print_text(evaluation, sys.stdout)
            return
        text = io.StringIO()
        report.print_text(evaluation, text)
        _to_file(path, text.getvalue())
        return
    if chosen == "json":
        content = report.as_json(evaluation)
    else:
        from trainer.report_page import as_html

        content = as_html(evaluation)
    if str(path) == "-":
        click.echo(content, nl=False)
    else:
        _to_file(path, content)


def _to_file(path: Path, content: str) -> None:
    from trainer.run import write_whole

    write_whole(path, content.encode())
    click.echo(f"{path} is written.", err=True)


def check_outputs(*paths: Path | None) -> None:
    """ConfigError where one can't be written to, before anything takes time; ``-`` and None are fine."""
    for path in paths:
        if path is None or str(path) == "-":
            continue
        folder = path.absolute().parent
        if not folder.is_dir():
            raise ConfigError(f"{path} can't be written: there is no folder {folder}; make it, or name another.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"{path} can't be written: folder {folder} may not be written to; name another.")


def check_picture(path: Path) -> None:
    """Raises ConfigError for a suffix other than .png or .svg, or without matplotlib, before anything takes time."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"{path}: a picture's name must end in .png or .svg.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("Pictures need matplotlib: install the extra `trainer`.")


def read_shown(
    tell: Tell,
    trained: Trained,
    pattern: str,
    labels: LabelSet,
    feature_names: str | None,
    feature_sizes: str | None,
    *,
    stop_on_damage: bool,
) -> ClipSet:
    """``trainer.trained.read_data`` with a bar for the files."""
    from trainer.trained import read_data

    return read_data(
        trained,
        pattern,
        labels,
        feature_names=feature_names,
        feature_sizes=feature_sizes,
        stop_on_damage=stop_on_damage,
        on_file=lambda done, total: tell("Files", done, total, ""),
    )
