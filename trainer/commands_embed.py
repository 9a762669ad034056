"""``trainer embed``: recordings in, TFRecord files of embeddings out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from detector.cli import quiet_tensorflow
from detector.errors import ConfigError
from trainer.commands_labels import labels_option, ontology_option

if TYPE_CHECKING:
    from rich.console import Console

    from trainer.embed import EmbedReport, Progress
    from trainer.recordings import Recording

_SHOWN = 10
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("embed")
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option("--wav-file", "--wav_file", "whole", multiple=True, type=_FILE, help="A recording taken as one clip.")
@click.option(
    "--output",
    "--tfrecord-file",
    "--tfrecord_file",
    "output",
    type=click.Path(path_type=Path),
    required=True,
    help="A file NAME.tfrecord, or a folder for several.",
)
@click.option("--shards", type=click.IntRange(1, 100_000), default=1, show_default=True, help="Files, in a folder.")
@click.option("--embedder", default="vggish", show_default=True, help="vggish, or a package with quantised embeddings.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="VGGish's weights. Default: what was fetched.")
@click.option("--pca-params", "--pca_params", type=_FILE, help="VGGish's PCA. Default: what was fetched.")
@click.option("--store", type=click.Path(path_type=Path, file_okay=False), help="Folder of fetched weights.")
@labels_option
@ontology_option
@click.option("--label", "path_labels", default="", help="Labels of the recordings named here: names, MIDs, indices.")
@click.option(
    "--clip-seconds",
    type=click.FloatRange(0, 36_000),
    default=10.0,
    show_default=True,
    help="Cut recordings into clips this long; 0: leave them whole.",
)
@click.option("--pad-short", is_flag=True, help="Append silence to what is shorter than one example, 0.975 s.")
@click.option("--workers", type=click.IntRange(1, 256), help="Threads that read files. Default: one a processor.")
@click.option("--strict", is_flag=True, help="Exit with 1 where anything could not be embedded.")
@click.option("--format", "output_format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--progress/--no-progress", default=None, help="Default: on a terminal.")
def embed_command(
    paths: tuple[Path, ...],
    whole: tuple[Path, ...],
    output: Path,
    shards: int,
    embedder: str,
    checkpoint: Path | None,
    pca_params: Path | None,
    store: Path | None,
    labels_path: Path | None,
    ontology_path: Path | None,
    path_labels: str,
    clip_seconds: float,
    pad_short: bool,
    workers: int | None,
    strict: bool,
    output_format: str,
    progress: bool | None,
) -> None:
    """Embed recordings as AudioSet's features are published: one TFRecord SequenceExample a clip.

    PATHS are audio files, folders of them, and CSV lists with lines path,labels[,start,end] (paths relative to the
    list). A line with an end is one clip; everything else is cut into clips of --clip-seconds.

    Killed at any moment, the same command goes on where it was; what is embedded and unchanged is not embedded again.
    Exit code 0 also where some recordings could not be read (see --strict), 1 where none could.
    """
    quiet_tensorflow()
    from rich.console import Console

    from detector.model import configure_tensorflow
    from trainer.embed import EXAMPLE_SECONDS, embed_recordings, open_network
    from trainer.labels import LabelSet, Ontology
    from trainer.recordings import gather, indices_of

    if 0 < clip_seconds < EXAMPLE_SECONDS:
        raise ConfigError(f"--clip-seconds {clip_seconds:g} is less than one example, {EXAMPLE_SECONDS:g} s.")
    labels = None if labels_path is None else LabelSet.read(labels_path)
    ontology = None if ontology_path is None else Ontology.read(ontology_path)
    recordings = gather(
        paths,
        whole=whole,
        clip_seconds=clip_seconds or None,
        pad_short=pad_short,
        path_labels=indices_of(path_labels, labels, ontology),
        labels=labels,
        ontology=ontology,
    )
    configure_tensorflow()
    network = open_network(embedder, checkpoint=checkpoint, pca_params=pca_params, store=store)
    console = Console(stderr=True)
    with _bar(recordings, console, console.is_terminal if progress is None else progress) as told:
        report = embed_recordings(recordings, network, output, shards=shards, workers=workers, on_progress=told)
    if output_format == "json":
        click.echo(json.dumps(_as_json(report), indent=1, ensure_ascii=False))
    else:
        _print(report)
    if report.clips == 0 or (strict and report.failures):
        raise SystemExit(1)


@contextlib.contextmanager
def _bar(recordings: tuple[Recording, ...], console: Console, shown: bool) -> Iterator[Callable[[Progress], None]]:
    """Files done and time left, by the bytes of what is read."""
    import time

    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    total_bytes = sum(recording.path.stat().st_size for recording in recordings if recording.path.is_file())
    columns = (TextColumn("Embedding"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    started = time.monotonic()
    with Bar(*columns, console=console, disable=not shown) as bar:
        task = bar.add_task("Embedding", total=max(total_bytes, 1), note="")

        def told(progress: Progress) -> None:
            times = progress.audio_seconds / max(time.monotonic() - started, 1e-3)
            note = f"{progress.recordings}/{len(recordings)} files, {times:.0f}x real time, left"
            bar.update(task, completed=progress.file_bytes, note=note)

        yield told


def _print(report: EmbedReport) -> None:
    def listed(title: str, lines: list[str]) -> None:
        click.echo(f"{title}:")
        for line in lines[:_SHOWN]:
            click.echo(f"  {line}")
        if len(lines) > _SHOWN:
            click.echo(f"  and {len(lines) - _SHOWN} more (all with --format json)")

    click.echo(
        f"{report.clips} clips ({report.examples} examples, {report.clip_seconds:.1f} s of audio) of "
        f"{report.recordings} recordings."
    )
    before = f"; {report.done_before} recordings were done before" if report.done_before else ""
    changed = f"; {report.changed} had changed" if report.changed else ""
    factor = "" if report.realtime_factor is None else f", {report.realtime_factor:.1f} times real time"
    click.echo(
        f"Embedded now: {report.embedded_seconds:.1f} s of audio in {report.wall_seconds:.1f} s{factor}"
        f"{before}{changed}."
    )
    if report.left_out_seconds:
        click.echo(f"Left out: {report.left_out_seconds:.1f} s at ends of recordings, each shorter than one example.")
    if report.renamed:
        listed(
            f"{len(report.renamed)} recordings share their name with another; their video_id begins with",
            [f"{name}  ({path})" for path, name in report.renamed.items()],
        )
    if report.notes:
        listed(f"{len(report.notes)} recordings could be read only in part", report.notes)
    if report.failures:
        listed(f"{len(report.failures)} not embedded", [str(failure) for failure in report.failures])
    for path in report.outputs[:_SHOWN]:
        click.echo(f"Written: {path}")
    if len(report.outputs) > _SHOWN:
        click.echo(f"Written: {len(report.outputs) - _SHOWN} more")
    if not report.outputs:
        click.echo("Nothing was written: not one clip could be embedded.")


def _as_json(report: EmbedReport) -> dict[str, object]:
    return {**dataclasses.asdict(report), "realtime_factor": report.realtime_factor}
