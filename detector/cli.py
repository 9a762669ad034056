"""What all command lines (``detector``, ``producers``, ``trainer``) share: errors, signals, logging, configuration."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from detector.config import LogSettings, Settings, load_settings
from detector.errors import ConfigError, GunfireError, WeightsMissing

_KAFKA_LOG_SECONDS, _KAFKA_KINDS = 10.0, 1_000
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class ErrorGroup(click.Group):
    """Turns the project's errors into a message and an exit code: 78 for what a person has to set right, else 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ConfigError, WeightsMissing) as e:
            click.echo(f"Error: {e}", err=True)
            raise SystemExit(e.exit_code) from None
        except GunfireError as e:
            click.echo(f"Error: {e}", err=True)
            raise SystemExit(1) from None
        except BrokenPipeError:
            # whoever read the output has enough; nothing more can be said on it, not even at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise SystemExit(0) from None


config_option = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="config.yaml. Default: ./config.yaml where there is one, else the defaults.",
)
bus_path_option = click.option(
    "--bus-path", type=click.Path(path_type=Path, dir_okay=False), help="File of the embedded bus."
)


_ISO_TIME = re.compile(
    r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?)?\s?(Z|UTC|[+-]\d\d:?\d\d)?", re.IGNORECASE
)
_UNIX_TIME = re.compile(r"(\d{1,19})(?:\.(\d{1,9}))?")


def time_ns(text: str) -> int:
    """A time as people and programs write it -> Unix nanoseconds, exact to all nine digits.

    ISO 8601 (``2018-10-09T14:03:07.25Z``; without a zone: UTC) or Unix time: seconds with or without a fraction, or a
    whole number too large for seconds (from 10^11 on), read as milliseconds, microseconds or nanoseconds by its size.

    Raises:
        ValueError: it is no time.
    """
    text = text.strip()
    if found := _UNIX_TIME.fullmatch(text):
        whole = int(found[1])
        if whole < 10**11:
            return whole * 10**9 + _nanoseconds(found[2])
        return whole * (10**6 if whole < 10**14 else 10**3 if whole < 10**17 else 1)
    found = _ISO_TIME.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no time; write 2018-10-09T14:03:07Z or Unix seconds.")
    day, minute, second, fraction, zone = found.groups()
    zone = "+00:00" if zone is None or zone.upper() in ("Z", "UTC") else f"{zone[:3]}:{zone[-2:]}"
    at = datetime.datetime.fromisoformat(f"{day}T{minute or '00:00'}:{second or '00'}{zone}")
    return int(at.timestamp()) * 10**9 + _nanoseconds(fraction)


def _nanoseconds(fraction: str | None) -> int:
    return int((fraction or "").ljust(9, "0"))


def time_option(text: str) -> int:
    """``time_ns`` as the ``type`` of an option."""
    try:
        return time_ns(text)
    except ValueError as e:
        raise click.BadParameter(str(e)) from None


def config_or_default(path: Path | None) -> Path | None:
    """``./config.yaml`` where no file was named and there is one."""
    default = Path("config.yaml")
    return default if path is None and default.is_file() else path


def settings_of(config_path: Path | None, bus_path: Path | None = None) -> Settings:
    """The settings a command runs with. Raises ConfigError."""
    settings = load_settings(config_or_default(config_path), os.environ)
    if bus_path is None:
        return settings
    if settings.bus.kind != "embedded":
        raise ConfigError(f"--bus-path names an embedded bus, and bus.kind is {settings.bus.kind}.")
    embedded = settings.bus.embedded.model_copy(update={"path": bus_path.absolute()})
    return settings.model_copy(update={"bus": settings.bus.model_copy(update={"embedded": embedded})})


# Of what TensorFlow's libraries write before they know any log level. The filter is a process of its own, so that what
# they say on aborting comes through too.
_STARTUP_FILTER = r"""
import os, re, sys
dull = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog|[IW]\d{4} \d\d:\d\d:\S+ +\d+ \S+\.cc:\d+\] "
    rb"|E\d{4} .*Unable to register cu\w+ factory|INFO: Created TensorFlow Lite XNNPACK delegate"
)
for line in sys.stdin.buffer:
    if not dull.match(line):
        os.write(2, line)
"""
_FILTER_END_SECONDS = 2.0


def quiet_tensorflow() -> None:
    """Import TensorFlow without its informational lines, also that oneDNN is on by default; all else is passed on.

    No environment variable reaches what is logged while its libraries are loaded, so standard error goes through a
    filter for that long. Whoever sets TF_CPP_MIN_LOG_LEVEL to 0 or 1 gets every line.
    """
    level = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    if "tensorflow" in sys.modules or level in ("0", "1"):
        return
    # where it is missing, whoever needs it says so
    with startup_lines_left_out(), contextlib.suppress(ImportError):
        importlib.import_module("tensorflow")


@contextlib.contextmanager
def startup_lines_left_out() -> Iterator[None]:
    """While inside, standard error of the whole process loses the lines that TensorFlow starts with."""
    command = [sys.executable, "-S", "-E", "-c", _STARTUP_FILTER]
    try:
        before = os.dup(2)
        # of a session of its own: Ctrl-C is not for it
        filtering = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    except OSError:  # no standard error, or no more processes: then with those lines
        yield
        return
    assert filtering.stdin is not None
    os.dup2(filtering.stdin.fileno(), 2)
    filtering.stdin.close()
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        # A process started meanwhile may hold its input; then the filter goes on for that one.
        with contextlib.suppress(subprocess.TimeoutExpired):
            filtering.wait(_FILTER_END_SECONDS)


@contextlib.contextmanager
def stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """While inside, the first SIGINT or SIGTERM calls ``stop``; a second one ends the process as usual."""

    def on_signal(number: int, frame: object) -> None:
        restore()
        stop()

    def restore() -> None:
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    for each in before:
        signal.signal(each, on_signal)
    try:
        yield
    finally:
        restore()


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class SparseKafkaLog(logging.Filter):
    """One line in 10 s of each kind from the Kafka library, which says the same dozens of times a second while a broker
    is away; the next says how many were left out. What it comes to, the bus says in its own words."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._next: dict[tuple[str, str], float] = {}
        self._left_out: dict[tuple[str, str], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith("kafka."):
            return True
        kind = (record.name, str(record.msg)[:80])
        now = self._clock()
        if now < self._next.get(kind, now):
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return False
        if len(self._next) >= _KAFKA_KINDS:
            self._next.clear()
        self._next[kind] = now + _KAFKA_LOG_SECONDS
        more = self._left_out.pop(kind, 0)
        if more:
            record.msg, record.args = f"{record.getMessage()} ({more} more of this kind before it.)", ()
        return True


def configure_logging(settings: LogSettings) -> None:
    """Log to standard error, as text for people or JSON lines for programs."""
    handler = logging.StreamHandler()
    if settings.format == "json":
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(SparseKafkaLog())
    logging.basicConfig(level=settings.level, handlers=[handler], force=True)
    logging.getLogger("kafka").setLevel(max(logging.WARNING, logging.getLogger().level))
