"""Reading stretches of one topic again, from offset to offset, without joining a group. Works on either bus."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from detector.bus.base import Bus, Consumer, Record, TopicPartition
from detector.errors import BusError, BusUnavailable

_POLL_SECONDS = 0.5
_SILENCE_SECONDS = 60.0

Bounds = Mapping[TopicPartition, tuple[int, int]]


class LogReader:
    """One topic, to be read wherever one likes. Not thread-safe.

    Raises:
        BusError: the topic does not exist, or the bus failed.
    """

    def __init__(self, bus: Bus, topic: str) -> None:
        if bus.partitions(topic) is None:
            raise BusError(f"Topic {topic} does not exist on this bus; check `topics` and `bus` in the configuration.")
        self.topic = topic
        self.consumer: Consumer = bus.consumer([topic], None)

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.consumer.close()

    @property
    def partitions(self) -> list[TopicPartition]:
        return sorted(self.consumer.assignment())

    def bounds(self) -> dict[TopicPartition, tuple[int, int]]:
        """Oldest offset there is and the offset the next record will get, of each partition."""
        ends = self.consumer.end_offsets(self.partitions)
        return {p: (self.consumer.beginning_offset(p), end) for p, end in sorted(ends.items())}

    def read(self, stretches: Bounds) -> Iterator[Record]:
        """Yield what is stored from the first offset up to, not including, the second one of each partition.

        In order in each partition. Offsets that retention dropped, or that never held a record, are left out. Only one
        such reading at a time.

        Raises:
            BusUnavailable: nothing came for a minute although the end was not reached.
        """
        consumer = self.consumer
        left: dict[TopicPartition, int] = {}
        for partition in self.partitions:
            first, end = stretches.get(partition, (0, 0))
            if first < end:
                consumer.seek(partition, first)
                left[partition] = end
        consumer.pause(consumer.assignment() - left.keys())
        consumer.resume(left)
        heard_seconds = time.monotonic()
        while left:
            done = [p for p, end in left.items() if consumer.position(p) >= end]
            consumer.pause(done)
            for partition in done:
                del left[partition]
            if not left:
                return
            records = consumer.poll(_POLL_SECONDS)
            for record in records:
                if record.offset < left.get(record.topic_partition, 0):
                    yield record
            if records or done:
                heard_seconds = time.monotonic()
            elif time.monotonic() - heard_seconds > _SILENCE_SECONDS:
                places = ", ".join(f"[{p.partition}] from {consumer.position(p)} to {end}" for p, end in left.items())
                raise BusUnavailable(
                    f"Topic {self.topic} gave nothing for {_SILENCE_SECONDS:g} s although there is more: {places}."
                )
