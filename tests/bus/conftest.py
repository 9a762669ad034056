"""The buses the contract is held against: the embedded one, and Kafka on a real broker started for the session."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import kafka
import pytest

from detector.bus import open_bus
from detector.bus.base import Bus
from detector.bus.sqlite_file import OFFSET_BITS
from detector.config import BusSettings, EmbeddedBusSettings, KafkaSettings
from tests.kafka_broker import broker_module


@pytest.fixture(scope="session")
def kafka_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A broker of this session's own. Skips where Java or Maven is missing, but fails so in CI."""
    module = broker_module()
    broker = module.Broker(tmp_path_factory.mktemp("kafka"), module.free_port())
    broker.start()
    try:
        yield broker.address
    finally:
        broker.stop()


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def bus_settings(request: pytest.FixtureRequest, tmp_path: Path) -> BusSettings:
    """Settings with short timeouts; each test has its own file, or its own topics on the shared broker."""
    if request.param == "embedded":
        return BusSettings(
            kind="embedded", embedded=EmbeddedBusSettings(path=tmp_path / "bus.sqlite3", session_timeout_seconds=1.0)
        )
    address = request.getfixturevalue("kafka_address")
    return BusSettings(kind="kafka", kafka=KafkaSettings(bootstrap_servers=(address,), session_timeout_seconds=6.0))


def opener(settings: BusSettings) -> Iterator[Callable[[], Bus]]:
    opened: list[Bus] = []

    def make() -> Bus:
        bus = open_bus(settings)
        opened.append(bus)
        return bus

    yield make
    for bus in opened:
        bus.close()


@pytest.fixture
def bus_factory(bus_settings: BusSettings) -> Iterator[Callable[[], Bus]]:
    """Opens the test's bus, as often as asked: each call is another process's view."""
    yield from opener(bus_settings)


@pytest.fixture
def patient_bus_factory(bus_settings: BusSettings) -> Iterator[Callable[[], Bus]]:
    """The same where a member that is gone without a word is waited for longer than any test waits."""
    patient = {"session_timeout_seconds": 300.0}
    yield from opener(
        bus_settings.model_copy(
            update={
                "embedded": bus_settings.embedded.model_copy(update=patient),
                "kafka": bus_settings.kafka.model_copy(update=patient),
            }
        )
    )


@pytest.fixture
def bus(bus_factory: Callable[[], Bus]) -> Bus:
    return bus_factory()


@pytest.fixture
def drop_before(bus_settings: BusSettings) -> Callable[[str, int], None]:
    """Drops a topic's records below an offset of partition 0, as retention would."""

    def drop(topic: str, offset: int) -> None:
        if bus_settings.kind == "kafka":
            admin = kafka.KafkaAdminClient(bootstrap_servers=bus_settings.kafka.bootstrap_servers)
            admin.delete_records({kafka.TopicPartition(topic, 0): offset})
            admin.close()
            return
        with closing(sqlite3.connect(bus_settings.embedded.path, timeout=30)) as db, db:
            (log_id,) = db.execute(
                "SELECT log_id FROM logs JOIN topics USING(topic_id) WHERE name=? AND partition=0", (topic,)
            ).fetchone()
            base = log_id << OFFSET_BITS
            db.execute("DELETE FROM records WHERE id >= ? AND id < ?", (base, base + offset))
            db.execute("UPDATE logs SET oldest_offset=? WHERE log_id=?", (offset, log_id))

    return drop


@pytest.fixture
def name() -> str:
    """A topic and group name no other test has."""
    return f"t-{uuid.uuid4().hex[:12]}"
