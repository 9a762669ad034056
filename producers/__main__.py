"""python -m producers file | mic | devices | url | stdin | scene: sound into the bus.

Exit codes: 0 all went well (also when stopped by SIGINT or SIGTERM), 1 some input failed or something was lost,
78 the configuration can't be used.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from detector.bus import open_bus
from detector.chunk import Location
from detector.cli import (
    CONTEXT,
    ErrorGroup,
    bus_path_option,
    config_option,
    configure_logging,
    settings_of,
    stop_signals,
)
from detector.config import Settings
from detector.errors import ChunkError, ConfigError, GunfireError, SourceError
from detector.topics import topic_settings
from producers.publish import Publisher, Report
from producers.source import Source

if TYPE_CHECKING:
    from producers.microphone import Level

_log = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Any])
CLOSE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Run:
    """What every command shares: settings, what stops it, and what is said of each stream."""

    settings: Settings
    location: Location | None
    clock_error_seconds: float | None
    canary: str | None
    stop: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def publisher(self) -> Iterator[Publisher]:
        """A publisher to the configured bus; SIGINT and SIGTERM set ``stop``. Prints the sum; exits 1 on a loss."""
        topics = self.settings.topics
        publisher = Publisher(
            lambda: open_bus(self.settings.bus),
            topic=topics.chunks,
            topic_settings=topic_settings(topics)[topics.chunks],
            encoding=self.settings.producer.encoding,
            spool_seconds=self.settings.producer.spool_seconds,
            stop=self.stop,
        )
        with stop_signals(self.stop.set):
            try:
                yield publisher
            finally:
                report = publisher.close(CLOSE_SECONDS)
                _print_report(report)
        if report.chunks_dropped or report.failure:
            raise SystemExit(1)


def _print_report(report: Report) -> None:
    click.echo(str(report), err=True)
    for dropped in report.ranges:
        click.echo(f"  lost: {dropped}", err=True)
    if report.failure:
        click.echo(f"  {report.failure}", err=True)


def _load_run(
    config: Path | None, bus_path: Path | None, location: str | None, clock_error: float | None, canary: str | None
) -> Run:
    settings = settings_of(config, bus_path)
    configure_logging(settings.log)
    try:
        place = None if location is None else Location.from_text(location)
    except ChunkError as e:
        raise ConfigError(f"--location: {e}") from None
    return Run(settings, place, clock_error, canary)


def _common(command: F) -> F:
    """Add the options that every publishing command has."""
    for option in reversed(
        (
            config_option,
            bus_path_option,
            click.option("--location", metavar="LAT,LON[,ALT]|FRAME:X,Y[,Z]", help="Where the sensor is."),
            click.option(
                "--clock-error", type=click.FloatRange(min=0), metavar="SECONDS", help="Known error of this clock."
            ),
            click.option("--canary", metavar="ID", help="Mark the sound as a test; alerts from it carry the mark."),
        )
    ):
        command = option(command)
    return command


def _run_of(options: dict[str, Any]) -> Run:
    """Take the common options out of a command's options."""
    return _load_run(
        options.pop("config_path"),
        options.pop("bus_path"),
        options.pop("location"),
        options.pop("clock_error"),
        options.pop("canary"),
    )


@click.group(cls=ErrorGroup, context_settings=CONTEXT)
def main() -> None:
    """Bring sound into the bus, cut into chunks of 0.96 s."""


@main.command("file")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--realtime/--fast", default=True, help="At the pace of life, or as fast as the bus takes it.")
@click.option("--loop", is_flag=True, help="Start each file again at its end, until stopped.")
@click.option(
    "--stream-id", metavar="PATTERN", help="Stream of a file: text with {stem} {name} {parent} {path} {index}."
)
@click.option("--start-time", default="now", metavar="now|ISO", help="Capture time of each file's first sample.")
@click.option("--spread", is_flag=True, help="Start the files spread over one chunk, as sensors would.")
@_common
def file_command(
    paths: tuple[Path, ...],
    realtime: bool,
    loop: bool,
    stream_id: str | None,
    start_time: str,
    spread: bool,
    **common: Any,
) -> None:
    """Play recordings: each file, and each audio file below a folder, as a stream of its own."""
    from producers.files import FilePlayer, find_files, name_streams

    run = _run_of(common)
    start_ns = _start_ns(start_time)
    files = name_streams(find_files(paths), stream_id)
    _allow_open_files(len(files))
    with run.publisher() as publisher:
        player = FilePlayer(
            files,
            publisher,
            realtime=realtime,
            loop=loop,
            start_ns=start_ns,
            spread=spread,
            location=run.location,
            clock_error_seconds=run.clock_error_seconds,
            canary=run.canary,
        )
        played = player.run(run.stop)
    if played.failures:
        click.echo(f"{len(played.failures)} of {played.files} files failed:", err=True)
        for why in played.failures.values():
            click.echo(f"  {why}", err=True)
        raise SystemExit(1)


def _start_ns(text: str) -> int | None:
    if text == "now":
        return None
    try:
        moment = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise ConfigError(f"--start-time {text!r} is neither now nor like 2026-05-01T12:00:00Z.") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.timezone.utc)
    delta = moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
    if delta.total_seconds() < 0:
        raise ConfigError(f"--start-time {text!r} is before 1970.")
    return (delta.days * 86_400 + delta.seconds) * 1_000_000_000 + delta.microseconds * 1000


def _allow_open_files(count: int) -> None:
    """Raise the soft limit on open files: each file being played is open, some of them twice."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 3 * count + 64
    if soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


@main.command("scene")
@click.option("--script", type=click.Path(path_type=Path, dir_okay=False), help="A scene as YAML; else a random one.")
@click.option("--sensors", default=6, show_default=True, type=click.IntRange(1, 1000), help="Of a random scene.")
@click.option("--seconds", type=click.FloatRange(min=0.96), help="Length; default: the script's, or without end.")
@click.option("--seed", default=1, show_default=True, type=click.IntRange(min=0), help="Of a random scene.")
@click.option(
    "--spacing", default=150.0, show_default=True, type=click.FloatRange(10, 5000), help="Metres between sensors."
)
@click.option("--decay", default=1.1, show_default=True, type=click.FloatRange(0.05, 5), help="Reverberation, seconds.")
@click.option(
    "--truth", type=click.Path(path_type=Path, dir_okay=False), help="Write the ground truth here (JSON lines)."
)
@click.option("--realtime/--fast", default=True, help="At the pace of life, or as fast as the bus takes it.")
@click.option("--start-time", default="now", metavar="now|ISO", help="Capture time of the first sample.")
@click.option("--origin", metavar="LAT,LON", help="Where the scene's x = y = 0 lies; else locations are in metres.")
@click.option("--stream-prefix", default="sensor-", show_default=True, help="Of the stream ids of a random scene.")
@_common
def scene_command(
    script: Path | None,
    sensors: int,
    seconds: float | None,
    seed: int,
    spacing: float,
    decay: float,
    truth: Path | None,
    realtime: bool,
    start_time: str,
    origin: str | None,
    stream_prefix: str,
    **common: Any,
) -> None:
    """Play a synthetic city: shots, fireworks, thunder, traffic and voices, heard by sensors."""
    from producers.scene import load_scene, play_scene, random_scene

    run = _run_of(common)
    if script is None:
        scene = random_scene(
            sensors=sensors,
            seconds=seconds,
            seed=seed,
            prefix=stream_prefix,
            spacing_metres=spacing,
            decay_seconds=decay,
        )
    else:
        scene = load_scene(script)
        if seconds is not None:
            scene = scene.model_copy(update={"seconds": seconds})
    start_ns, place = _start_ns(start_time), _origin(origin)
    with run.publisher() as publisher:
        events = play_scene(
            scene,
            publisher,
            realtime=realtime,
            truth=truth,
            start_ns=start_ns,
            origin=place,
            canary=run.canary,
            stop=run.stop,
        )
        click.echo(f"{events} events", err=True)


def _origin(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        place = Location.from_text(text)
    except ChunkError as e:
        raise ConfigError(f"--origin: {e}") from None
    if place.frame != "wgs84":
        raise ConfigError(f"--origin {text!r} is not LAT,LON.")
    return place.a, place.b


@main.command("devices")
def devices_command() -> None:
    """List the microphones of this machine."""
    from rich.console import Console
    from rich.table import Table

    from producers.microphone import list_devices

    table = Table("device", "name", "channels", "rate", "default", title="Inputs")
    for device in list_devices():
        table.add_row(
            str(device.index),
            device.name,
            str(device.channels),
            f"{device.rate_hz} Hz",
            "yes" if device.is_default else "",
        )
    Console().print(table)


@main.command("mic")
@click.option("--device", help="Number or part of the name, as `producers devices` lists them. Default: the system's.")
@click.option("--stream-id", help="Default: mic-HOST.")
@click.option("--rate", type=click.IntRange(min=1), help="Sample rate in Hz. Default: the device's own.")
@click.option("--meter/--no-meter", default=None, help="Show the level. Default: on a terminal.")
@_common
def mic_command(device: str | None, stream_id: str | None, rate: int | None, meter: bool | None, **common: Any) -> None:
    """Listen to a microphone."""
    import socket

    from producers.microphone import MicrophoneSource

    run = _run_of(common)
    show = sys.stderr.isatty() if meter is None else meter
    with contextlib.ExitStack() as stack:
        on_level = stack.enter_context(_level_meter()) if show else None
        source = MicrophoneSource(device, rate_hz=rate, on_level=on_level)
        _run_sources(run, [(stream_id or f"mic-{socket.gethostname()}", source)])


@contextlib.contextmanager
def _level_meter() -> Iterator[Callable[[Level], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    with Progress(
        TextColumn("level"),
        BarColumn(bar_width=50),
        TextColumn(
            "peak {task.fields[peak]:6.1f} dBFS  rms {task.fields[rms]:6.1f} dBFS  overflows {task.fields[lost]}"
        ),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task("level", total=60, peak=-99.0, rms=-99.0, lost=0)
        yield lambda level: progress.update(
            task,
            completed=max(0.0, 60.0 + level.peak_dbfs),
            peak=level.peak_dbfs,
            rms=level.rms_dbfs,
            lost=level.overflows,
        )


@main.command("url")
@click.argument("urls", nargs=-1, required=True)
@click.option("--stream-id", metavar="PATTERN", help="Stream of an address: text with {host} {index}.")
@click.option(
    "--timeout",
    default=10.0,
    show_default=True,
    type=click.FloatRange(min=0.1),
    help="Seconds of silence until an address counts as gone.",
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    help="Attempts without any sound until an address is given up. Default: without end.",
)
@_common
def url_command(
    urls: tuple[str, ...], stream_id: str | None, timeout: float, retries: int | None, **common: Any
) -> None:
    """Listen to addresses: RTSP, HTTP, anything FFmpeg opens."""
    from producers.network import NetworkSource, name_urls

    run = _run_of(common)
    sources: list[tuple[str, Source]] = [
        (name, NetworkSource(url, timeout_seconds=timeout, retries=retries))
        for name, url in zip(name_urls(urls, stream_id), urls, strict=True)
    ]
    _run_sources(run, sources)


@main.command("stdin")
@click.option("--rate", default=16_000, show_default=True, type=int, help="Sample rate in Hz.")
@click.option("--channels", default=1, show_default=True, type=int)
@click.option(
    "--format",
    "sample_format",
    default="s16le",
    show_default=True,
    type=click.Choice(["u8", "s16le", "s16be", "s24le", "s32le", "f32le", "f64le"]),
)
@click.option("--stream-id", default="stdin", show_default=True)
@click.option("--realtime/--fast", default=True, help="Live sound; or sound from store, for which the pipe may wait.")
@_common
def stdin_command(rate: int, channels: int, sample_format: str, stream_id: str, realtime: bool, **common: Any) -> None:
    """Read raw PCM from standard input."""
    from producers.pipe import PipeSource

    run = _run_of(common)
    source = PipeSource(0, rate, channels, sample_format, live=realtime)
    _run_sources(run, [(stream_id, source)], waits=not realtime)


def _run_sources(run: Run, sources: list[tuple[str, Source]], *, waits: bool = False) -> None:
    """Publish sources, each in a thread of its own, until all have ended or a signal comes. Exits 1 if one failed."""
    failures: list[str] = []
    with run.publisher() as publisher:
        threads = []
        for stream_id, source in sources:
            try:
                stream = publisher.stream(
                    stream_id,
                    location=run.location,
                    clock_error_seconds=run.clock_error_seconds,
                    canary=run.canary,
                    waits=waits,
                )
            except ChunkError as e:
                raise ConfigError(f"{source.name}: {e}") from None

            def listen(source: Source = source, stream: Any = stream) -> None:
                try:
                    for block in source.blocks(run.stop):
                        stream.write(block)
                except GunfireError as e:
                    _log.error("%s", e)
                    failures.append(str(e))
                except Exception as e:  # noqa: BLE001 - the thread's boundary: the other streams go on
                    _log.exception("Source %s failed.", source.name)
                    failures.append(f"{source.name}: {type(e).__name__}: {e}")
                finally:
                    source.close()
                    stream.end_session()

            threads.append(threading.Thread(target=listen, name=f"source-{stream_id}", daemon=True))
        for thread in threads:
            thread.start()
        # The main thread only waits, so that signals are served at once.
        while any(thread.is_alive() for thread in threads) and not run.stop.is_set() and not publisher.failed:
            run.stop.wait(0.1)
        run.stop.set()
        deadline = time.monotonic() + 3.0
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for (_, source), thread in zip(sources, threads, strict=True):
            if thread.is_alive():
                _log.warning("%s does not let go; its last fraction of a chunk is lost.", source.name)
    if failures:
        raise SourceError("\n".join(failures))


if __name__ == "__main__":
    main(prog_name="producers")
