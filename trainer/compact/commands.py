"""``trainer compact``: the whole recipe of the built-in model, step by step. Each step takes up where it was stopped.

prepare     recordings of split train -> pool
synthesise  pool -> scenes -> shards of examples with targets
train       shards -> embedder and LSTM head
evaluate    dev recordings through what was trained, or through any package
export      -> package: weights, operating point, curve
all         these five in order
"""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from detector.errors import ConfigError

if TYPE_CHECKING:
    from trainer.compact.dataset import DataPlan
    from trainer.compact.evaluation import Report, Scored, Scorer
    from trainer.compact.training import Trained, TrainingSettings

_VERSION = "0.1.1"


@dataclass(frozen=True, slots=True)
class _Run:
    """What all steps share."""

    work: Path
    data_dir: Path
    seed: int
    scenes: int
    epochs: float
    teacher: bool

    @property
    def audio_dir(self) -> Path:
        return self.data_dir / "audio"

    @property
    def trained_path(self) -> Path:
        return self.work / "trained.npz"

    @property
    def command(self) -> str:
        teacher = "" if self.teacher else " --no-teacher"
        return f"trainer compact --seed {self.seed} --scenes {self.scenes} --epochs {self.epochs:g}{teacher} all"

    def plan(self) -> DataPlan:
        from trainer.compact.dataset import DataPlan

        teacher = self.data_dir / "ced" / "ced_tiny.onnx" if self.teacher else None
        if teacher is not None and not teacher.is_file():
            raise ConfigError(f"The teacher {teacher} is missing: set DATA_DIR, or go without it (--no-teacher).")
        return DataPlan(self.work / "pool", self.work / "data", self.scenes, self.seed, teacher)

    def settings(self) -> TrainingSettings:
        from trainer.compact.training import TrainingSettings

        return replace(TrainingSettings(), epochs=self.epochs, seed=self.seed)


@click.group("compact")
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path("var/compact"), show_default=True, help="Work folder."
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="DATA_DIR",
    default=Path("../shared/data"),
    show_default=True,
    help="Folder of recordings and teachers (environment: DATA_DIR).",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=1, show_default=True)
@click.option("--scenes", type=click.IntRange(1), default=11_000, show_default=True, help="Scenes of ten examples.")
@click.option("--epochs", type=click.FloatRange(min=0.0, min_open=True), default=4.0, show_default=True)
@click.option("--teacher/--no-teacher", default=True, show_default=True, help="Ask CED what it hears in every example.")
@click.pass_context
def compact(
    context: click.Context, work: Path, data_dir: Path, seed: int, scenes: int, epochs: float, teacher: bool
) -> None:
    """Make the built-in model: prepare, synthesise, train, evaluate, export (or all)."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    context.obj = _Run(work, data_dir, seed, scenes, epochs, teacher)


@compact.command()
@click.pass_obj
def prepare(run: _Run) -> None:
    """Read, resample and sort every recording that may be trained on."""
    _prepare(run)


@compact.command()
@click.option("--processes", type=click.IntRange(1, 64), default=None, help="Default: one a core.")
@click.pass_obj
def synthesise(run: _Run, processes: int | None) -> None:
    """Compose and record scenes; what was made already is kept."""
    _synthesise(run, processes)


@compact.command()
@click.option("--again", is_flag=True, help="Train although something is trained already.")
@click.option(
    "--start-from",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=None,
    help="Weights (trained.npz of another work folder) to go on from instead of random ones.",
)
@click.pass_obj
def train(run: _Run, again: bool, start_from: Path | None) -> None:
    """Train the embedder, then the LSTM head."""
    _train(run, again, start_from)


@compact.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.pass_obj
def blend(run: _Run, runs: tuple[Path, ...]) -> None:
    """Average the embedders of RUNS (trained.npz each, one begun from the other); the first one's heads are kept."""
    from trainer.compact.training import Trained, blended

    blended([Trained.load(path) for path in runs]).save(run.trained_path)
    click.echo(f"{run.trained_path}: mean of {len(runs)} embedders.")


@compact.command()
@click.option(
    "--model", "model_name", default=None, help="A package (name or folder) instead of what was trained here."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), default=None, help="Write all figures there.")
@click.pass_obj
def evaluate(run: _Run, model_name: str | None, json_path: Path | None) -> None:
    """Dev recordings, streamed: recall by set, false alarms by class, robustness; hop 0.96 s and 0.48 s."""
    _evaluate(run, model_name, json_path)


@compact.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="Package folder; default: in the work folder."
)
@click.option("--version", default=_VERSION, show_default=True)
@click.option("--after", default="", help="Commands that came before, for the manifest.")
@click.pass_obj
def export(run: _Run, out: Path | None, version: str, after: str) -> None:
    """Write the package: folded weights, thresholds from dev, operating curve, self-test."""
    _export(run, out, version, after)


@compact.command("all")
@click.option("--processes", type=click.IntRange(1, 64), default=None, help="Default: one a core.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="Package folder; default: in the work folder."
)
@click.pass_obj
def everything(run: _Run, processes: int | None, out: Path | None) -> None:
    """Every step in order."""
    _prepare(run)
    _synthesise(run, processes)
    _train(run, again=False)
    _export(run, out, _VERSION)
    _evaluate(run, str(_package_folder(run, out).absolute()), None)


def _prepare(run: _Run) -> None:
    from trainer.compact.pools import build_pool

    folder = run.work / "pool"
    if (folder / "pool.json").is_file():
        click.echo(f"{folder} is prepared already.")
        return
    started = time.monotonic()
    pool = build_pool(run.audio_dir, folder)
    hours = len(pool.pcm) / 16_000 / 3600
    click.echo(f"{len(pool.clips)} clips, {hours:.1f} h, in {time.monotonic() - started:.0f} s.")


def _synthesise(run: _Run, processes: int | None) -> None:
    from trainer.compact.dataset import make_shards

    plan = run.plan()
    with _progress() as progress:
        task = progress.add_task("Scenes", total=plan.shards, note="")
        for done in make_shards(plan, processes or os.cpu_count() or 1):
            progress.update(task, completed=done)


def _train(run: _Run, again: bool, start_from: Path | None = None) -> None:
    if run.trained_path.is_file() and not again:
        click.echo(f"{run.trained_path} is trained already (--again to train anew).")
        return
    from trainer.compact.dataset import load_data
    from trainer.compact.training import Trained, train_embedder, train_head

    data, settings = load_data(run.plan()), run.settings()
    if start_from is not None:
        settings = replace(settings, learning_rate=settings.learning_rate / 2)  # what was learnt is not to be undone
    embedder_path = run.work / "embedder.npz"
    with _progress() as progress:
        task = progress.add_task("Embedder", total=None, note="")
        network, example_head, _ = train_embedder(
            data,
            settings,
            lambda done, total, note: progress.update(task, completed=done, total=total, note=note),
            start=Trained.load(start_from) if start_from is not None else None,
        )
        weights = {"weights": example_head.weights.numpy(), "bias": example_head.bias.numpy()}
        Trained(network.weights(), weights, {}).save(embedder_path)
        head_task = progress.add_task("LSTM head", total=None, note="")
        lstm, _ = train_head(
            data,
            network,
            settings,
            lambda done, total, note: progress.update(head_task, completed=done, total=total, note=note),
        )
    head = {name: variable.numpy() for name, variable in lstm.named_variables().items()}
    Trained(network.weights(), weights, head).save(run.trained_path)


def _evaluate(run: _Run, model_name: str | None, json_path: Path | None) -> None:
    from trainer.compact import evaluation
    from trainer.compact.packaging import report_as_json

    scorer = _scorer(run, model_name)
    recordings = evaluation.load_recordings(run.audio_dir, run.work / "dev.npz")
    scored = evaluation.score_recordings(scorer, recordings)
    threshold = evaluation.clip_threshold(scored)
    results = {"1 % of negative clips, hop 0.96 s": evaluation.report(scored, threshold)}
    if model_name is not None:
        from detector.model import load_model

        opened = load_model(_name_or_path(model_name)).manifest.decision.open_threshold
        results["shipped default, hop 0.96 s"] = evaluation.report(scored, opened)
    dense = evaluation.score_recordings(scorer, recordings, half_hop=True)
    results["1 % of negative clips, hop 0.48 s"] = evaluation.report(dense, evaluation.clip_threshold(dense))
    for treatment in evaluation.treatments():
        changed = evaluation.score_recordings(scorer, evaluation.altered(recordings, treatment))
        results[f"{treatment}, same threshold"] = evaluation.report(changed, threshold)
    _show(results, scored, threshold)
    edges = evaluation.score_streams(scorer, evaluation.edges(recordings))
    loudest = max(float(scores.max()) for scores in edges)
    click.echo(f"Waking from silence and gain steps, {len(edges)} streams: highest score {loudest:.4f}.")
    if json_path is not None:
        json_path.write_text(report_as_json(results) + "\n", encoding="utf-8")


def _export(run: _Run, out: Path | None, version: str, after: str = "") -> None:
    from trainer.compact import evaluation, packaging

    trained = _trained(run)
    recordings = evaluation.load_recordings(run.audio_dir, run.work / "dev.npz")
    scored = evaluation.score_recordings(_scorer(run, None), recordings)
    folder = _package_folder(run, out)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    model = packaging.export(
        trained,
        folder,
        version=version,
        command=f"{after}; trainer compact export" if after else run.command,
        date=today,
        thresholds=packaging.choose_thresholds(scored),
        curve=packaging.operating_curve(scored),
    )
    click.echo(f"{folder}: opens at {model.manifest.decision.open_threshold}, self-test passed.")


def _package_folder(run: _Run, out: Path | None) -> Path:
    return out if out is not None else run.work / "package"


def _trained(run: _Run) -> Trained:
    from trainer.compact.training import Trained

    return Trained.load(run.trained_path)


def _name_or_path(text: str) -> str | Path:
    return Path(text) if os.sep in text else text


def _scorer(run: _Run, model_name: str | None) -> Scorer:
    if model_name is not None:
        from detector.model import load_model

        return load_model(_name_or_path(model_name))
    from trainer.compact.training import scorer_of

    return scorer_of(_trained(run))


def _show(results: dict[str, Report], scored: Sequence[Scored], threshold: float) -> None:
    console = Console()
    console.width = max(console.width, 150)  # eleven columns, also where no terminal says how wide it is
    sets = sorted(next(iter(results.values())).recall)
    table = Table("", "threshold", *sets, "tagged shots", "negative clips", "ambient alerts")
    for name, found in results.items():
        table.add_row(
            name,
            f"{found.threshold:.4f}",
            *(f"{found.recall[s]:.3f}" for s in sets),
            f"{found.tagged_shots_heard:.3f}",
            f"{100 * found.clip_false_alarms:.2f} %",
            f"{found.ambient_alerts} in {found.ambient_hours:.2f} h",
        )
    console.print(table)
    first = next(iter(results.values()))
    for name, (above, count) in sorted(first.false_alarms.items()):
        if above:
            console.print(f"  {name}: {above} of {count} clips above {threshold:.4f}")


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(file=sys.stderr), refresh_per_second=2) as progress:
        yield progress
