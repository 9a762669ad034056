"""Alerts as they come: a table for people, JSON lines for programs. Reads the alert topic, joins no group."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from detector.alert import Alert, decode, to_json
from detector.bus.base import Bus, Record
from detector.errors import AlertError, BusMissing, BusReplaced

MAX_ROWS = 200
WIDE_COLUMNS = 100
_LOOK_SECONDS = 0.5


def read_alerts(
    bus: Bus, topic: str, stop: threading.Event, *, start: str = "latest", on_bad: Callable[[Record, AlertError], None]
) -> Iterator[Alert | None]:
    """Yield each alert event of the topic, and None at least every 0.2 s, until ``stop``.

    Args:
        start: ``latest`` or ``earliest``.
        on_bad: told of each record that is no alert; reading goes on.

    Raises:
        BusError: the bus failed.
    """
    while bus.partitions(topic) is None:  # the detector creates it once it is loaded
        if stop.wait(_LOOK_SECONDS):
            return
        yield None
    consumer = bus.consumer([topic], None, start=start)
    try:
        while not stop.is_set():
            for record in consumer.poll(0.2):
                try:
                    yield decode(record.key, record.value, record.headers)
                except AlertError as e:
                    on_bad(record, e)
            yield None
    finally:
        consumer.close()


def follow_alerts(
    open_bus: Callable[[], Bus],
    topic: str,
    stop: threading.Event,
    *,
    start: str = "latest",
    on_bad: Callable[[Record, AlertError], None],
    on_wait: Callable[[str], None],
) -> Iterator[Alert | None]:
    """``read_alerts``, whether the bus file is there already or not, and from the next one where it is replaced.

    Args:
        on_wait: told once each time there is something to wait for.

    Raises:
        BusError: the bus failed.
    """
    waiting = False
    while not stop.is_set():
        try:
            bus = open_bus()
        except BusMissing as e:
            if not waiting:
                on_wait(f"{e} Waiting for it.")
            waiting, start = True, "earliest"  # nothing in a file that is not there yet can be old
            yield None
            stop.wait(_LOOK_SECONDS)
            continue
        waiting = False
        try:
            yield from read_alerts(bus, topic, stop, start=start, on_bad=on_bad)
        except BusReplaced as e:
            on_wait(f"{e} Reading on in the new one.")
            start = "earliest"
        finally:
            bus.close()


class AlertTable:
    """The newest state of each alert, newest alert first; at most MAX_ROWS."""

    def __init__(self) -> None:
        self._alerts: OrderedDict[str, Alert] = OrderedDict()

    def add(self, alert: Alert) -> None:
        """Take an event. One that is older than what is known (a duplicate) changes nothing."""
        known = self._alerts.get(alert.alert_id)
        if known is not None and known.revision >= alert.revision:
            return
        self._alerts[alert.alert_id] = alert
        while len(self._alerts) > MAX_ROWS:
            self._alerts.popitem(last=False)

    def render(self, max_rows: int = 20, width: int = 80) -> Table:
        """A rich table of the newest ``max_rows`` alerts; with the strongest look-alike where ``width`` has room."""
        wide = width >= WIDE_COLUMNS
        table = Table(title="Gunfire alerts", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
        table.add_column("onset (UTC)", min_width=12, no_wrap=True)
        table.add_column("stream", no_wrap=True)
        table.add_column("label", no_wrap=True)
        table.add_column("score", min_width=5, justify="right")
        table.add_column("shots", min_width=5, justify="right")
        table.add_column("latency", min_width=7, justify="right")
        table.add_column("state", min_width=7)
        if wide:
            table.add_column("look-alike", no_wrap=True)
        for alert in list(reversed(self._alerts.values()))[:max_rows]:
            row: list[str | Text] = [
                alert.onset_at[11:23],
                Text(alert.stream),
                Text(alert.label + (" (canary)" if alert.canary else "")),
                f"{alert.peak_score:.3f}",
                str(alert.onset_count),
                "" if alert.latency_seconds is None else f"{alert.latency_seconds * 1000:.0f} ms",
                Text(alert.state, style="bold red" if alert.state != "closed" else "dim"),
            ]
            if wide:
                like = max(alert.look_alikes.items(), key=lambda item: item[1], default=None)
                row.append(Text("" if like is None else f"{like[0]} {like[1]:.2f}"))
            table.add_row(*row)
        return table


def watch_table(alerts: Iterator[Alert | None], console: Console) -> None:
    """Draw the table anew with each alert; on something that is no terminal, one line an event."""
    table = AlertTable()
    if not console.is_terminal:
        for alert in alerts:
            if alert is not None:
                console.print(one_line(alert), highlight=False, markup=False, soft_wrap=True)
        return
    with Live(table.render(), console=console, auto_refresh=False) as live:
        for alert in alerts:
            if alert is not None:
                table.add(alert)
                live.update(table.render(max(1, console.height - 5), console.width), refresh=True)


def one_line(alert: Alert) -> str:
    """An alert event in one line of text."""
    return (
        f"{alert.onset_at[:23]}Z {alert.state:<7} {alert.stream} {alert.label} score {alert.peak_score:.3f} "
        f"shots {alert.onset_count}"
    )


def watch_json(alerts: Iterator[Alert | None], out: TextIO) -> None:
    """One JSON object a line, as published."""
    for alert in alerts:
        if alert is not None:
            out.write(to_json(alert) + "\n")
            out.flush()
