"""``detector deadletters``: which records were refused and why, and the way back for them."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from detector.cli import bus_path_option, config_option, configure_logging, settings_of, time_option

if TYPE_CHECKING:
    from detector.config import Settings
    from detector.deadletters import DeadLetter

_HEAD_BYTES = 256
_F = TypeVar("_F", bound=Callable[..., Any])


def _letter(text: str) -> tuple[int, int]:
    partition, _, offset = text.partition(":")
    if not (partition.isdecimal() and offset.isdecimal()):
        raise click.BadParameter(f"{text!r} is not PARTITION:OFFSET, as the list shows it (3:17).")
    return int(partition), int(offset)


def _filters(command: _F) -> _F:
    for option in (
        click.option("--until", "until_ns", type=time_option, metavar="TIME", help="Refused before this time."),
        click.option(
            "--since",
            "since_ns",
            type=time_option,
            metavar="TIME",
            help="Refused at this time or later: ISO 8601 or Unix seconds.",
        ),
        click.option("--stream", "streams", multiple=True, help="Of this stream only; may be given several times."),
        click.option("--reason", "reasons", multiple=True, help="Of this reason only; may be given several times."),
    ):
        command = option(command)
    return command


def _wanted(
    reasons: Sequence[str], streams: Sequence[str], since_ns: int | None, until_ns: int | None
) -> Callable[[DeadLetter], bool]:
    def wanted(letter: DeadLetter) -> bool:
        return (
            (not reasons or letter.reason in reasons)
            and (not streams or letter.stream in streams)
            and (since_ns is None or letter.at_ns >= since_ns)
            and (until_ns is None or letter.at_ns < until_ns)
        )

    return wanted


@click.group("deadletters", invoke_without_command=True)
@_filters
@click.option(
    "--show", "shown", type=_letter, metavar="P:O", help="One letter in full, with a hexdump of its first bytes."
)
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="Newest rows of the table.")
@click.option("--format", "output_format", type=click.Choice(["table", "json"]), default="table", show_default=True)
@config_option
@bus_path_option
@click.pass_context
def deadletters_group(
    context: click.Context,
    reasons: tuple[str, ...],
    streams: tuple[str, ...],
    since_ns: int | None,
    until_ns: int | None,
    shown: tuple[int, int] | None,
    limit: int,
    output_format: str,
    config_path: Path | None,
    bus_path: Path | None,
) -> None:
    """List records that could not be used, and why; `retry` puts them back.

    As JSON: all of them, one object a line.
    """
    if context.invoked_subcommand is not None:
        if context.args or reasons or streams or since_ns or until_ns or shown:
            raise click.UsageError(f"Write the options behind `{context.invoked_subcommand}`.")
        context.obj = (config_path, bus_path)
        return
    settings = settings_of(config_path, bus_path)
    configure_logging(settings.log)
    from detector.bus import open_bus
    from detector.bus.log_reader import LogReader
    from detector.deadletters import read_letters

    bus = open_bus(settings.bus, create=False)
    try:
        with LogReader(bus, settings.topics.deadletter) as reader:
            if shown is not None:
                _show(reader, *shown, output_format)
                return
            letters = read_letters(reader, _wanted(reasons, streams, since_ns, until_ns))
    finally:
        bus.close()
    if output_format == "json":
        for letter in letters:
            click.echo(json.dumps(_fields(letter), ensure_ascii=False))
        return
    _print_table(letters, limit, settings)


@deadletters_group.command("retry")
@_filters
@click.option(
    "--letter",
    "names",
    type=_letter,
    metavar="P:O",
    multiple=True,
    help="This one, as the list names it; may be given several times.",
)
@click.option("--all", "everything", is_flag=True, help="All of them; needed where nothing else chooses.")
@click.option("--again", is_flag=True, help="Also what was put back before.")
@click.option("--dry-run", is_flag=True, help="Only say what would be put back.")
@config_option
@bus_path_option
@click.pass_context
def retry_command(
    context: click.Context,
    reasons: tuple[str, ...],
    streams: tuple[str, ...],
    since_ns: int | None,
    until_ns: int | None,
    names: tuple[tuple[int, int], ...],
    everything: bool,
    again: bool,
    dry_run: bool,
    config_path: Path | None,
    bus_path: Path | None,
) -> None:
    """Put refused records back to where they came from, once each, for the detector to try again.

    It helps where the cause is gone: a detector that knew a newer format, or had room for more streams. A record goes
    to the end of its partition; docs/replay.md says what the detector makes of a chunk that comes late.
    """
    if not (reasons or streams or since_ns is not None or until_ns is not None or names or everything):
        raise click.UsageError("Say which: --letter, --reason, --stream, --since, --until or --all.")
    before_config, before_path = context.obj
    settings = settings_of(config_path or before_config, bus_path or before_path)
    configure_logging(settings.log)
    from detector.bus import open_bus
    from detector.deadletters import put_back
    from detector.errors import BusError

    matches = _wanted(reasons, streams, since_ns, until_ns)

    def wanted(letter: DeadLetter) -> bool:
        return (not names or (letter.partition, letter.offset) in names) and matches(letter)

    bus = open_bus(settings.bus, create=False)
    try:
        outcome = put_back(
            bus,
            settings.topics.deadletter,
            wanted,
            owner=settings.daemon.group,
            now_ns=time.time_ns,
            again=again,
            dry_run=dry_run,
        )
    finally:
        bus.close()
    for letter in outcome.done:
        click.echo(
            f"{letter.name} ({letter.reason}, refused {_times(letter.attempts)}) "
            f"-> {letter.source_topic}[{letter.source_partition}]"
        )
    verb = "would go back" if dry_run else "put back"
    click.echo(f"{len(outcome.done)} {verb}.")
    if outcome.before:
        click.echo(f"{len(outcome.before)} had been put back before; --again puts them back once more.")
    if outcome.cut:
        cut = (
            f"{len(outcome.cut)} can't go back, since the record was too large for {settings.topics.deadletter} and "
            f"only a part of it was kept: {_names(outcome.cut)}. Send it anew from where it came."
        )
        if names:
            raise BusError(cut)
        click.echo(cut)
    found = {(letter.partition, letter.offset) for letter in (*outcome.done, *outcome.before)}
    if absent := [f"{p}:{o}" for p, o in names if (p, o) not in found]:
        raise BusError(
            f"No such dead letter: {', '.join(absent)}. `detector deadletters` lists those there are; of several "
            "letters on one record only the first is listed."
        )


def _names(letters: Sequence[DeadLetter]) -> str:
    shown = ", ".join(f"{letter.name} ({letter.size_bytes} bytes)" for letter in letters[:5])
    return shown + (f" and {len(letters) - 5} more" if len(letters) > 5 else "")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _at(at_ns: int | None) -> str:
    from detector.alert import rfc3339

    return "" if at_ns is None else rfc3339(at_ns)[:19] + "Z"


def _fields(letter: DeadLetter) -> dict[str, Any]:
    from detector.alert import rfc3339

    fields = asdict(letter)
    fields["letter"] = letter.name
    fields["at"] = rfc3339(letter.at_ns)
    fields["headers"] = {name: value.decode("utf-8", "backslashreplace") for name, value in letter.headers}
    return fields


def _print_table(letters: list[DeadLetter], limit: int, settings: Settings) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not letters:
        click.echo(f"No dead letters of that kind on {settings.topics.deadletter}.")
        return
    console = Console() if sys.stdout.isatty() else Console(width=160)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for name in ("letter", "refused (UTC)", "reason", "from", "stream"):
        table.add_column(name, no_wrap=name != "stream")
    table.add_column("tries", justify="right")
    table.add_column("bytes", justify="right")
    table.add_column("put back", no_wrap=True)
    for letter in letters[-limit:]:
        source = f"{letter.source_partition}:{letter.source_offset}"
        if letter.source_topic != settings.topics.chunks:
            source = f"{letter.source_topic} {source}"
        table.add_row(
            letter.name,
            _at(letter.at_ns),
            Text(letter.reason),
            Text(source),
            Text("" if letter.stream is None else letter.stream),
            str(letter.attempts),
            f"{letter.size_bytes}{' (cut)' if letter.cut else ''}",
            _at(letter.put_back_at_ns),
        )
    console.print(table)
    counts = Counter(letter.reason for letter in letters)
    shown = f", the newest {limit} shown" if len(letters) > limit else ""
    console.print(
        f"{len(letters)} dead letter{'' if len(letters) == 1 else 's'}{shown}: "
        + ", ".join(f"{n} {reason}" for reason, n in counts.most_common())
        + ".",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _show(reader: Any, partition: int, offset: int, output_format: str) -> None:
    from detector.deadletters import parse, read_letters, read_record

    record = read_record(reader, partition, offset)
    letter = parse(record)
    if letter is None:
        from detector.errors import BusError

        raise BusError(f"{reader.topic}[{partition}]@{offset} is no dead letter.")
    known = [x for x in read_letters(reader) if (x.partition, x.offset) == (partition, offset)]
    letter = known[0] if known else letter
    if output_format == "json":
        click.echo(json.dumps({**_fields(letter), "head_hex": record.value[:_HEAD_BYTES].hex()}, ensure_ascii=False))
        return
    fields = _fields(letter)
    headers = fields.pop("headers")
    for name in ("letter", "at", "reason", "message", "stream", "attempts", "size_bytes", "cut"):
        click.echo(f"{name:10} {fields[name]}")
    click.echo(f"{'from':10} {letter.source_topic}[{letter.source_partition}]@{letter.source_offset}")
    click.echo(f"{'put back':10} {_at(letter.put_back_at_ns) or 'never'}")
    for name, value in headers.items():
        click.echo(f"{'header':10} {name}: {value[:200]}")
    click.echo(hexdump(record.value[:_HEAD_BYTES]))
    if len(record.value) > _HEAD_BYTES:
        click.echo(f"... {len(record.value) - _HEAD_BYTES} bytes more")


def hexdump(data: bytes) -> str:
    """Offset, 16 bytes in hexadecimal, and as ASCII, a line each."""
    lines = []
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        text = "".join(chr(b) if 32 <= b < 127 else "." for b in row)
        lines.append(f"{at:08x}  {row.hex(' '):47}  |{text}|")
    return "\n".join(lines)
