"""Promises of ``detector topics`` on a real broker: made as configured, safe to repeat, mended only when asked to."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from detector.__main__ import main
from detector.bus.kafka import KafkaBus
from detector.config import KafkaSettings

pytestmark = pytest.mark.kafka


@pytest.fixture
def prefix() -> str:
    return f"t{uuid.uuid4().hex[:8]}"


@pytest.fixture
def config(tmp_path: Path, kafka_address: str, prefix: str) -> Path:
    return write(tmp_path, kafka_address, prefix)


def write(folder: Path, address: str, prefix: str, **topics: object) -> Path:
    names = {name: f"{prefix}.{name}" for name in ("chunks", "alerts", "deadletter")}
    path = folder / f"{uuid.uuid4().hex}.yaml"
    bus = {"kind": "kafka", "kafka": {"bootstrap_servers": [address]}}
    path.write_text(yaml.safe_dump({"bus": bus, "topics": {**names, "partitions": 3, **topics}}))
    return path


@pytest.fixture
def bus(kafka_address: str) -> Iterator[KafkaBus]:
    bus = KafkaBus(KafkaSettings(bootstrap_servers=(kafka_address,)))
    yield bus
    bus.close()


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["topics", *arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def test_topics_are_made_as_configured_and_only_once(bus: KafkaBus, config: Path, prefix: str) -> None:
    assert f"{prefix}.chunks: would be made, 3 partitions, 1 copies" in run(
        "create", "--dry-run", "--config", str(config)
    )
    assert bus.partitions(f"{prefix}.chunks") is None
    assert f"Error: Topic {prefix}.chunks: it does not exist." in run("check", "--config", str(config), code=1)
    run("create", "--config", str(config))
    facts = bus.topic_facts([f"{prefix}.chunks"])[f"{prefix}.chunks"]
    assert facts is not None
    assert facts.configs is not None
    assert (facts.partitions, facts.copies, facts.in_sync) == (3, 1, 1)
    assert facts.configs["retention.ms"] == "3600000"
    assert facts.configs["cleanup.policy"] == "delete"
    assert facts.configs["max.message.bytes"] == "1048588"
    assert "exists, 3 partitions; left as it is" in run("create", "--config", str(config))
    assert "all is well" in run("check", "--config", str(config))


def test_an_existing_topic_is_changed_only_with_alter(
    bus: KafkaBus, config: Path, prefix: str, tmp_path: Path, kafka_address: str
) -> None:
    run("create", "--config", str(config))
    chunks = f"{prefix}.chunks"
    bus.change_topic(chunks, None, {"cleanup.policy": "compact", "retention.ms": "60000", "max.message.bytes": "20000"})
    found = run("check", "--config", str(config), code=1)
    for words in ("only the newest record stays", "none gets through", "kept 60 s"):
        assert words in found
    assert "left as it is" in run("create", "--config", str(config), code=1)
    wider = str(write(tmp_path, kafka_address, prefix, partitions=5))
    dry = run("create", "--alter", "--dry-run", "--config", wider)
    assert f"{chunks}: would be changed" in dry
    assert "cleanup.policy compact -> delete" in dry
    assert "partitions 3 -> 5" in dry
    assert f"{chunks}: changed" in run("create", "--alter", "--config", wider)
    assert "all is well" in run("check", "--config", wider)
    assert f"{chunks}: exists, as configured" in run("create", "--alter", "--config", wider)
    assert "all is well" in run("check", "--config", str(config))  # more partitions than asked for harm nobody


def test_more_copies_than_brokers_is_refused_in_words(tmp_path: Path, kafka_address: str, prefix: str) -> None:
    config = write(tmp_path, kafka_address, prefix, replication_factor=3)
    assert "INVALID_REPLICATION_FACTOR" in run("create", "--config", str(config), code=1).upper().replace(
        "INVALIDREPLICATIONFACTOR", "INVALID_REPLICATION_FACTOR"
    )
