"""``trainer export``: a trained classifier as a model package that the detector serves."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from detector.cli import quiet_tensorflow
from detector.errors import ConfigError
from trainer.commands_evaluate import (
    damage_option,
    feature_names_option,
    feature_sizes_option,
    read_shown,
    which_option,
)
from trainer.commands_labels import family_option, labels_option, look_alikes_option, ontology_option
from trainer.progress import shown

if TYPE_CHECKING:
    from trainer.classes import Classes
    from trainer.evaluate import Evaluation
    from trainer.export import Operation
    from trainer.trained import Trained


@click.command("export")
@click.option(
    "--model",
    "--train_dir",
    "--train-dir",
    "model_name",
    required=True,
    help="A training run, a train directory of the starter code, a package's folder, or a shipped model's name.",
)
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="The package's folder.")
@click.option("--name", required=True, help="Of the package: small letters, digits, '.', '_' and '-'.")
@click.option("--version", default="0.1.0", show_default=True)
@click.option("--license", "license_text", default="not stated", show_default=True)
@click.option("--description", default="")
@click.option(
    "--embedder",
    default="vggish",
    show_default=True,
    help="What makes the embeddings it was trained on: vggish, or a package (name or folder) whose embedder it takes.",
)
@click.option(
    "--pca-params",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="vggish_pca_params.npz to put into the package. Default: the fetched one is used where it is served.",
)
@click.option("--window", "window_examples", type=int, default=10, show_default=True, help="Examples it hears at once.")
@click.option("--data", "pattern", help="TFRecord files to measure thresholds and figures on: folder or pattern.")
@click.option(
    "--false-positive-rate",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.01,
    show_default=True,
    help="Share of the data's clips without gunfire that may open an alert: sets the threshold.",
)
@click.option(
    "--open-threshold",
    type=click.FloatRange(0, 1, min_open=True),
    help="Open alerts here, whatever the data says. Needs no --data.",
)
@labels_option
@ontology_option
@family_option
@look_alikes_option
@click.option("--trained-on", multiple=True, help="What it was trained on, for the manifest. Default: as the run says.")
@click.option("--command", default="", help="How it was made, for the manifest. Default: as the run says.")
@click.option("--overwrite", is_flag=True, help="Put it in the place of a package that is there.")
@feature_names_option
@feature_sizes_option
@which_option
@damage_option
def export_command(
    model_name: str,
    output: Path,
    name: str,
    version: str,
    license_text: str,
    description: str,
    embedder: str,
    pca_params: Path | None,
    window_examples: int,
    pattern: str | None,
    false_positive_rate: float,
    open_threshold: float | None,
    labels_path: Path | None,
    ontology_path: Path | None,
    family: str | None,
    look_alikes: str | None,
    trained_on: tuple[str, ...],
    command: str,
    overwrite: bool,
    feature_names: str | None,
    feature_sizes: str | None,
    which: str,
    stop_on_damage: bool,
) -> None:
    """Make a model package of a trained classifier: manifest, weights, thresholds, operating curve, self-test.

    The package serves where its embedder's weights are: VGGish's are fetched once (`detector models fetch vggish`),
    a package's own go along.
    """
    if pattern is None and open_threshold is None:
        raise ConfigError("Give --data to measure thresholds on, or --open-threshold.")
    quiet_tensorflow()
    from detector.model import configure_tensorflow
    from trainer.classes import classes_of
    from trainer.export import PackageText, check_fit, check_folder, check_name, embedder_parts, export
    from trainer.trained import open_trained

    configure_tensorflow()
    trained = open_trained(model_name, "latest" if which == "latest" else "best")
    check_folder(output, overwrite)
    check_name(name, version)
    classes = classes_of(trained, labels_path, ontology_path, family, look_alikes)
    check_fit(trained, classes, window_examples)
    parts = embedder_parts(embedder, pca_params)
    evaluation: Evaluation | None = None
    if pattern is not None:
        from trainer.evaluate import evaluate

        with shown() as tell:
            clips = read_shown(
                tell, trained, pattern, classes.labels, feature_names, feature_sizes, stop_on_damage=stop_on_damage
            )
            evaluation = evaluate(
                trained, clips, classes, pattern=pattern, on_clips=lambda done: tell("Clips", done, len(clips), "")
            )
        if clips.report.damages:
            click.echo(str(clips.report), err=True)
    operation = _operation(trained, classes, evaluation, window_examples, false_positive_rate, open_threshold)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    text = PackageText(name, version, description, license_text, command, tuple(trained_on), today)
    manifest = export(
        trained,
        output,
        text,
        classes=classes,
        embedder=parts,
        operation=operation,
        window_examples=window_examples,
        evaluation=evaluation,
        overwrite=overwrite,
    )
    kind = manifest.classifier.kind
    click.echo(f"{output}: {manifest.name} {manifest.version}, {kind} on {manifest.embedder.kind}, self-test passed.")
    click.echo(
        f"Alerts open at {manifest.decision.open_threshold:.6g} and close at {manifest.decision.close_threshold:.6g}."
    )
    if operation.recall is not None:
        click.echo(f"There {100 * operation.recall:.1f} % of the gunfire clips are heard.")
    if manifest.embedder.from_store:
        click.echo("It serves where VGGish's weights are: detector models fetch vggish.")


def _operation(
    trained: Trained,
    classes: Classes,
    evaluation: Evaluation | None,
    window_examples: int,
    false_positive_rate: float,
    open_threshold: float | None,
) -> Operation:
    from trainer.export import Operation, close_threshold, operation_at, served_scores
    from trainer.metrics import family_labels

    if evaluation is None:
        assert open_threshold is not None
        return Operation(open_threshold, close_threshold(open_threshold))
    scores = served_scores(trained, evaluation.clips, classes.family, window_examples)
    finite = np.isfinite(scores)
    positive = family_labels(evaluation.clips.label_matrix(), classes.family)
    return operation_at(
        scores[finite], positive[finite], false_positive_rate, window_examples, open_threshold=open_threshold
    )
