"""When to stop collecting and run: ``max_batch`` items, or ``max_wait_seconds`` after the first.

While a batch runs the next one gathers on the bus by itself, so under load batches are full without any waiting; the
wait only matters when chunks trickle in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Batcher:
    """Gathers items from a poll function. Knows the time only through ``clock``."""

    def __init__(self, max_batch: int, max_wait_seconds: float, clock: Callable[[], float]) -> None:
        self._max_batch = max_batch
        self._max_wait_seconds = max_wait_seconds
        self._clock = clock

    def gather(self, poll: Callable[[float, int], list[T]], idle_seconds: float, max_items: int) -> list[T]:
        """Poll until there is a batch. Empty when nothing came within ``idle_seconds``.

        Args:
            poll: ``poll(timeout_seconds, max_items)`` returns what there is, at once if there is anything.
            max_items: most items returned; may be several batches when the bus holds a backlog.
        """
        items = poll(idle_seconds, max_items)
        if not items:
            return items
        deadline = self._clock() + self._max_wait_seconds
        while len(items) < min(self._max_batch, max_items):
            left = deadline - self._clock()
            if left <= 0:
                break
            items += poll(left, max_items - len(items))
        return items
