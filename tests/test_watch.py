"""Alerts as they come, also where the bus file comes later or is another one by now."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from detector.alert import Alert, encode
from detector.bus import open_bus
from detector.bus.base import TopicSettings
from detector.bus.embedded import EmbeddedBus
from detector.chunk import CHUNK_SAMPLES
from detector.config import BusSettings, EmbeddedBusSettings
from detector.errors import BusMissing
from detector.watch import follow_alerts
from tests.test_pipeline import audio, chunks_of, feed, log_of, make_pipeline

TOPIC = "gunfire.alerts"


@pytest.fixture(scope="module")
def alert() -> Alert:
    shot = chunks_of("a", audio(np.random.default_rng(1), 8, [4 * CHUNK_SAMPLES + 4321]))
    return feed(make_pipeline(), log_of(shot))[0].alert


def publish(path: Path, alert: Alert) -> None:
    bus = EmbeddedBus(path)
    bus.create_topics({TOPIC: TopicSettings(partitions=1)})
    producer = bus.producer()
    producer.send(TOPIC, *encode(alert))
    bus.close()


def next_alert(alerts: Iterator[Alert | None]) -> Alert:
    return next(found for found, _ in zip(alerts, range(100), strict=False) if found is not None)


def test_what_reads_makes_no_bus_file(tmp_path):
    settings = BusSettings(kind="embedded", embedded=EmbeddedBusSettings(path=tmp_path / "none" / "bus.sqlite3"))
    with pytest.raises(BusMissing, match=r"no bus file .*--bus-path"):
        open_bus(settings, create=False)
    assert not (tmp_path / "none").exists()


def test_watching_waits_for_the_file_and_goes_on_in_its_successor(tmp_path, alert):
    path = tmp_path / "bus.sqlite3"
    settings = BusSettings(kind="embedded", embedded=EmbeddedBusSettings(path=path))
    told: list[str] = []
    alerts = follow_alerts(
        lambda: open_bus(settings, create=False),
        TOPIC,
        threading.Event(),
        on_bad=lambda record, error: pytest.fail(str(error)),
        on_wait=told.append,
    )
    assert next(alerts) is None
    assert next(alerts) is None
    assert len(told) == 1
    assert "There is no bus file" in told[0]
    publish(path, alert)
    assert next_alert(alerts) == alert
    for file in tmp_path.iterdir():
        file.unlink()
    assert [a for a, _ in zip(alerts, range(3), strict=False) if a is not None] == []
    publish(path, alert)
    assert next_alert(alerts) == alert
    assert "removed or replaced" in told[1]
    alerts.close()
