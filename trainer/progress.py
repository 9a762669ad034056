"""How far a command is, on standard error: a bar where that is a terminal, a line now and then where it is a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Tell = Callable[[str, int, int, str], None]
"""(what is being done, how many are done, of how many, a note; "" for none)."""

_LINE_SECONDS = 30.0


@contextmanager
def shown(*, stay: bool = False, lines: bool = False) -> Iterator[Tell]:
    """A ``Tell`` for the time of a block.

    Args:
        stay: bars remain on the screen when done.
        lines: write into logs too, for what takes minutes: of each thing its first and last count, and one every 30 s
            with the time left.
    """
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _Lines(console).tell if lines else _silent
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, refresh_per_second=2, transient=not stay) as bar:
        tasks = {}

        def tell(what: str, done: int, whole: int, note: str) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=whole, note=note)
            bar.update(tasks[what], completed=done, total=whole, note=note)

        yield tell


def _silent(what: str, done: int, whole: int, note: str) -> None:
    pass


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._began: dict[str, tuple[float, int]] = {}
        self._last = 0.0

    def tell(self, what: str, done: int, whole: int, note: str) -> None:
        now = time.monotonic()
        is_new = what not in self._began
        began, first = self._began.setdefault(what, (now, done))
        if not is_new and done < whole and now - self._last < _LINE_SECONDS:
            return
        self._last = now
        left = f", {_clock((now - began) / (done - first) * (whole - done))} left" if done > first else ""
        self._console.print(
            f"{what}: {done} of {whole}, {_clock(now - began)} gone{left}{', ' + note if note else ''}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
