"""python -m detector run | check | scan | watch | replay | topics | deadletters | demo | models.

Exit codes: 0 all went well (also when stopped by SIGINT or SIGTERM), 1 something failed, 78 the configuration can't be
used.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import TextIO

import click

from detector.cli import (
    CONTEXT,
    ErrorGroup,
    bus_path_option,
    config_option,
    config_or_default,
    configure_logging,
    quiet_tensorflow,
    settings_of,
    stop_signals,
)
from detector.commands_deadletters import deadletters_group
from detector.commands_replay import replay_command
from detector.commands_topics import topics_group
from detector.errors import ConfigError, ModelError

log = logging.getLogger(__name__)


@click.group(cls=ErrorGroup, context_settings=CONTEXT)
@click.version_option(package_name="gunfire-detector")
def main() -> None:
    """Hear gunfire on many audio streams."""


@main.command("run")
@config_option
@bus_path_option
def run_command(config_path: Path | None, bus_path: Path | None) -> None:
    """Serve: chunks from the bus in, alerts out, until SIGTERM."""
    settings = settings_of(config_path, bus_path)
    configure_logging(settings.log)
    quiet_tensorflow()
    from detector.daemon import Daemon

    daemon = Daemon(settings)
    drain_seconds = settings.daemon.drain_seconds

    def give_up() -> None:
        log.error("Not drained within %g s; what is not committed will be read again.", drain_seconds)
        logging.shutdown()
        os._exit(1)

    def stop() -> None:
        log.info("Stopping: finishing what was begun, at most %g s.", drain_seconds)
        timer = threading.Timer(drain_seconds, give_up)
        timer.daemon = True
        timer.start()
        daemon.stop()

    with stop_signals(stop):
        daemon.run()
    log.info("Stopped.")


@main.command("check")
@config_option
def check_command(config_path: Path | None) -> None:
    """Validate the configuration without starting; print the effective settings with secrets masked.

    The model's manifest is read too: labels must be its own, and the last line says where alerts open and what that
    means in false alerts. Its weights are not: that is for `detector models verify`.
    """
    from detector.config import check_report
    from detector.model import load_manifest
    from detector.operating_point import choose_threshold
    from detector.pipeline import decision_settings

    settings = settings_of(config_path)
    try:
        manifest = load_manifest(settings.model.name)
    except ModelError as error:
        raise ConfigError(f"model.name: {error}") from error
    hop_seconds = settings.batch.hop_seconds
    decision_settings(manifest, settings.decision, hop_seconds)
    click.echo(check_report(config_or_default(config_path), os.environ), nl=False)
    chosen = choose_threshold(manifest, settings.decision, hop_seconds)
    click.echo(f"# Model {manifest.name} {manifest.version}. {chosen}")


@main.command("scan")
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--files-from",
    type=click.File("r", encoding="utf-8", errors="surrogateescape"),
    help="List of paths, one a line; - is standard input.",
)
@click.option("--format", "output_format", type=click.Choice(["csv", "json"]), default="csv", show_default=True)
@click.option("--threshold", type=click.FloatRange(0, 1, min_open=True), help="Open alerts here, not at the model's.")
@click.option("--model", "model_name", help="A shipped model's name or a package folder.")
@click.option("--workers", type=click.IntRange(1, 256), help="Threads that read files. Default: one a processor.")
@click.option("--progress/--no-progress", default=None, help="Default: on a terminal.")
@config_option
def scan_command(
    paths: tuple[Path, ...],
    files_from: TextIO | None,
    output_format: str,
    threshold: float | None,
    model_name: str | None,
    workers: int | None,
    progress: bool | None,
    config_path: Path | None,
) -> None:
    """Run the same pipeline over recordings: files, folders, lists of them. One row a file.

    Columns: path, peak_score, alerts, onsets_seconds (separated by spaces), error. A file that can't be read gets a
    row with its error, and no number of alerts; the rest is done, and the exit code is 1.
    """
    listed = [Path(line.rstrip("\r\n")) for line in files_from if line.strip()] if files_from else []
    settings = settings_of(config_path)
    configure_logging(settings.log.model_copy(update={"level": "ERROR"}))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may be any bytes; they come out as they are
        sys.stdout.reconfigure(errors="surrogateescape")
    if threshold is not None:
        update = {"open_threshold": threshold, "close_threshold": None, "false_alerts_per_day": None}
        decision = settings.decision.model_copy(update=update)
        settings = settings.model_copy(update={"decision": decision})
    from detector.scan import CsvWriter, JsonWriter, find_recordings, scan

    found = [(path, find_recordings([path])) for path in (*paths, *listed)]
    for folder in (path for path, files in found if not files):
        click.echo(f"Folder {folder} holds no audio file. Name another, or the files themselves.", err=True)
    recordings = [file for _, files in found for file in files]
    if not recordings:
        raise click.UsageError("Nothing to scan: name files or folders with audio, or a list with --files-from.")
    quiet_tensorflow()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from detector.model import load_model
    from detector.pipeline import pipeline_for

    # how many files are read at once is the scan's own affair
    daemon = settings.daemon.model_copy(update={"max_streams": max(settings.daemon.max_streams, 1_000)})
    settings = settings.model_copy(update={"daemon": daemon})
    model = load_model(model_name or settings.model.name, store=settings.model.store, threads=settings.model.threads)
    model.self_test()
    writer = (CsvWriter if output_format == "csv" else JsonWriter)(sys.stdout)
    failed = 0
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = console.is_terminal if progress is None else progress
    with Progress(*columns, console=console, disable=not shown) as bar:
        task = bar.add_task("Scanning", total=len(recordings))
        for row in scan(recordings, lambda observer: pipeline_for(model, settings, observer=observer), workers=workers):
            writer.write(row)
            failed += bool(row.error)
            bar.advance(task)
    writer.close()
    if failed:
        click.echo(f"{failed} of {len(recordings)} files could not be read; see the column error.", err=True)
        raise SystemExit(1)


@main.command("watch")
@click.option("--format", "output_format", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("--from-beginning", is_flag=True, help="Also what was published before.")
@config_option
@bus_path_option
def watch_command(output_format: str, from_beginning: bool, config_path: Path | None, bus_path: Path | None) -> None:
    """Show alerts as they come: a table for people, JSON lines for programs."""
    settings = settings_of(config_path, bus_path)
    configure_logging(settings.log)
    from rich.console import Console

    from detector.bus import open_bus
    from detector.bus.base import Record
    from detector.errors import AlertError
    from detector.watch import follow_alerts, watch_json, watch_table

    def on_bad(record: Record, error: AlertError) -> None:
        log.warning("%s[%d]@%d is no alert: %s", record.topic, record.partition, record.offset, error)

    stop = threading.Event()
    with stop_signals(stop.set):
        alerts = follow_alerts(
            lambda: open_bus(settings.bus, create=False),
            settings.topics.alerts,
            stop,
            start="earliest" if from_beginning else "latest",
            on_bad=on_bad,
            on_wait=lambda text: click.echo(text, err=True),
        )
        if output_format == "json":
            watch_json(alerts, sys.stdout)
        else:
            watch_table(alerts, Console())


@main.command("demo")
@click.option("--sensors", type=click.IntRange(1, 100), default=6, show_default=True)
@click.option("--seconds", type=click.FloatRange(10, 3600), default=40.0, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=6074, show_default=True, help="Of the synthetic city.")
@click.option("--serve", is_flag=True, help="Keep detector and city running after the summary, until Ctrl-C.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Keep bus, truth and logs here.")
def demo_command(sensors: int, seconds: float, seed: int, serve: bool, folder: Path | None) -> None:
    """Show it all on one machine: a synthetic city in real time, the detector, alerts, and what was missed."""
    from rich.console import Console

    from detector.demo import run_demo

    console = Console()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "bus.sqlite3").exists():
            raise ConfigError(f"--folder {folder} holds the bus of an earlier demo; name an empty folder.")
        raise SystemExit(run_demo(folder, sensors=sensors, seconds=seconds, seed=seed, serve=serve, console=console))
    with tempfile.TemporaryDirectory(prefix="gunfire-demo-") as temporary:
        code = run_demo(Path(temporary), sensors=sensors, seconds=seconds, seed=seed, serve=serve, console=console)
    raise SystemExit(code)


main.add_command(deadletters_group)
main.add_command(replay_command)
main.add_command(topics_group)


@main.group("models")
def models_group() -> None:
    """Models on this machine: list, verify, fetch."""


@models_group.command("list")
def models_list_command() -> None:
    """The shipped models."""
    from detector.model import shipped_models

    for manifest in shipped_models():
        click.echo(f"{manifest.name} {manifest.version}: {manifest.description}")


@models_group.command("verify")
@click.argument("name", default="compact-gunfire")
@click.option("--store", type=click.Path(path_type=Path, file_okay=False), help="Folder of fetched weights.")
def models_verify_command(name: str, store: Path | None) -> None:
    """Check a model's hashes and run its golden self-test."""
    quiet_tensorflow()
    from detector.model import load_model

    model = load_model(name, store=store)
    model.self_test()
    click.echo(f"{model.name} {model.version} {model.sha256}: hashes match, self-test passed.")


@models_group.command("fetch")
@click.argument("name", type=click.Choice(["vggish"]))
@click.option("--store", type=click.Path(path_type=Path, file_okay=False), help="Default: the user's data folder.")
@click.option("--mirror", metavar="URL", help="Base address instead of AudioSet's own.")
@click.option(
    "--from", "source_dir", type=click.Path(path_type=Path, file_okay=False), help="Copy from here, without a network."
)
def models_fetch_command(name: str, store: Path | None, mirror: str | None, source_dir: Path | None) -> None:
    """Get the published VGGish, convert it once, and run its published smoke test."""
    quiet_tensorflow()
    from detector.fetch import fetch_vggish
    from detector.store import default_store

    outcome = fetch_vggish(store or default_store(), mirror=mirror, source_dir=source_dir, progress=True)
    click.echo(outcome.text)
    if not outcome.passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
