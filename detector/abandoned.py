"""Alerts that nobody goes on with: found in the alert topic and closed.

Another model or other settings opened them (``model_changed``), or their audio is gone from the log (``gap``). The
decision that held them is gone as well, so the closing says what was last told.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from detector import alert as alert_wire
from detector.alert import Alert
from detector.bus.base import Bus, Headers, Record, TopicPartition
from detector.chunk import RATE_HZ
from detector.decision import CloseReason
from detector.errors import AlertError, BusUnavailable
from detector.pipeline import stream_key

_NS = 1_000_000_000
_READ_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Left:
    """What may have been left open of a partition's audio.

    Attributes:
        since_ms: when the oldest of these alerts may have been opened, Unix milliseconds.
        streams: ``stream_key`` of those that may have an open alert; None: any.
        reason: why nobody goes on with them.
    """

    since_ms: int
    streams: frozenset[bytes] | None
    reason: CloseReason = "model_changed"


def find_open(
    bus: Bus, topic: str, left: Mapping[TopicPartition, Left]
) -> dict[TopicPartition, list[tuple[Alert, Headers]]]:
    """For each partition of audio the last event of each alert that was published and never closed, oldest alert
    first; and the header that says what served it. The topic of the alerts is read once, for all of them.

    Raises:
        BusUnavailable: the topic could not be read to its end.
    """
    newest: dict[str, tuple[Alert, Headers]] = {}
    oldest_ms = min(one.since_ms for one in left.values())
    for record in _read(bus, topic, oldest_ms):
        try:
            alert = alert_wire.decode(record.key, record.value, record.headers)
        except AlertError:  # not ours; nothing to close
            continue
        if alert.audio is None:
            continue
        one = left.get(TopicPartition(alert.audio.topic, alert.audio.partition))
        if one is None or record.timestamp_ms < one.since_ms:
            continue
        if one.streams is not None and stream_key(alert.stream) not in one.streams:
            continue
        known = newest.get(alert.alert_id)
        if known is None or alert.revision > known[0].revision:
            served = tuple(h for h in record.headers if h[0] == alert_wire.SERVED_HEADER)
            newest[alert.alert_id] = alert, served
    found: dict[TopicPartition, list[tuple[Alert, Headers]]] = {partition: [] for partition in left}
    for alert, headers in sorted(newest.values(), key=lambda one: (one[0].onset_at_ns, one[0].alert_id)):
        if alert.state != "closed" and alert.audio is not None:
            found[TopicPartition(alert.audio.topic, alert.audio.partition)].append((alert, headers))
    return found


def _read(bus: Bus, topic: str, since_ms: int) -> Iterator[Record]:
    consumer = bus.consumer([topic], None)
    try:
        ends = consumer.end_offsets(consumer.assignment())
        for part, end in ends.items():
            first = consumer.offset_at(part, since_ms)
            consumer.seek(part, end if first is None else first)
        deadline = time.monotonic() + _READ_SECONDS
        while any(consumer.position(part) < end for part, end in ends.items()):
            if time.monotonic() > deadline:
                raise BusUnavailable(f"Topic {topic} could not be read to its end within {_READ_SECONDS:g} s.")
            yield from consumer.poll(0.2)
    finally:
        consumer.close()


def closing(alert: Alert, reason: CloseReason = "model_changed") -> Alert:
    """The event that closes it where it was last told; ``latency_seconds`` is null, as nothing was heard."""
    ended_at_ns = alert.onset_at_ns + (alert.decided_sample - alert.onset_sample) * _NS // RATE_HZ
    return replace(
        alert,
        state="closed",
        revision=alert.revision + 1,
        close_reason=reason,
        ended_sample=alert.decided_sample,
        ended_at=alert_wire.rfc3339(ended_at_ns),
        ended_at_ns=ended_at_ns,
        latency_seconds=None,
    )
