"""A bus in memory that can be taken away and brought back, for what a real one does only by accident."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from detector.bus.base import Headers, TopicSettings
from detector.chunk import Chunk, decode
from detector.errors import BusUnavailable


class MemoryBus:
    """Bus and producer in one. What was sent but not flushed is kept over failures, as the contract says."""

    def __init__(self) -> None:
        self.away = threading.Event()
        self.fail_flush = threading.Event()
        self.damage: Exception | None = None
        self.topics: dict[str, TopicSettings] = {}
        self.stored: list[tuple[bytes | None, bytes, Headers]] = []
        self.refused = 0
        self._sent: list[tuple[bytes | None, bytes, Headers]] = []
        self._changed = threading.Condition()

    def open(self) -> Any:
        self._check()
        return self

    def _check(self) -> None:
        if self.damage is not None:
            raise self.damage
        if self.away.is_set():
            with self._changed:
                self.refused += 1
                self._changed.notify_all()
            raise BusUnavailable("The bus is away.")

    def create_topics(self, topics: Mapping[str, TopicSettings]) -> None:
        self.topics.update(topics)

    def producer(self, *, transactional_id: str | None = None) -> Any:
        return self

    def send(self, topic: str, key: bytes | None, value: bytes, headers: Headers = (), **_: Any) -> None:
        self._check()
        assert topic in self.topics
        self._sent.append((key, value, headers))

    def flush(self, timeout_seconds: float = 30.0) -> None:
        self._check()
        if self.fail_flush.is_set():
            with self._changed:
                self.refused += 1
                self._changed.notify_all()
            raise BusUnavailable("Not flushed in time.")
        with self._changed:
            self.stored += self._sent
            self._sent = []
            self._changed.notify_all()

    def close(self) -> None:
        return

    def chunks(self) -> list[Chunk]:
        with self._changed:
            return [decode(*record) for record in self.stored]

    def wait_stored(self, count: int, deadline_seconds: float = 10.0) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.stored) >= count, deadline_seconds), len(self.stored)

    def wait_refused(self, count: int = 1, deadline_seconds: float = 10.0) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.refused >= count, deadline_seconds)
