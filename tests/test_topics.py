"""Promises of ``detector topics`` and of the check at start: each thing that is wrong with a topic is named, graded by
what it costs, and comes with the command that mends it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from detector.__main__ import main
from detector.bus import open_bus
from detector.bus.base import Bus, TopicSettings
from detector.bus.kafka_topics import TopicFacts
from detector.config import Settings, load_settings
from detector.errors import BusUnavailable, ConfigError
from detector.topics import Finding, check_facts, kafka_configs, tell_findings, topic_settings

CHUNKS, ALERTS, LETTERS = "audio.chunks", "gunfire.alerts", "audio.deadletter"


@pytest.fixture
def settings() -> Settings:
    environment = {"DETECTOR__BUS__KIND": "kafka", "DETECTOR__TOPICS__REPLICATION_FACTOR": "3"}
    return load_settings(None, environment)


@pytest.fixture
def facts(settings: Settings) -> dict[str, TopicFacts | None]:
    """All as it is made."""
    return {
        name: TopicFacts(
            partitions=wanted.partitions,
            copies=3,
            in_sync=3,
            configs=kafka_configs(wanted) | {"min.insync.replicas": "2", "unclean.leader.election.enable": "false"},
        )
        for name, wanted in topic_settings(settings.topics).items()
    }


def with_configs(facts: TopicFacts | None, **configs: str) -> TopicFacts:
    assert facts is not None
    assert facts.configs is not None
    return replace(facts, configs={**facts.configs, **{key.replace("_", "."): value for key, value in configs.items()}})


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, list(map(str, findings))
    return findings[0]


def test_topics_as_they_are_made_are_well(settings: Settings, facts: dict[str, TopicFacts | None]) -> None:
    assert check_facts(settings, facts) == []


def test_more_than_wanted_is_well(settings: Settings, facts: dict[str, TopicFacts | None]) -> None:
    more = replace(with_configs(facts[CHUNKS], retention_ms="-1"), partitions=64, copies=5, in_sync=5)
    assert check_facts(settings, facts | {CHUNKS: more}) == []


def test_a_missing_topic(settings: Settings, facts: dict[str, TopicFacts | None]) -> None:
    finding = only(check_facts(settings, facts | {ALERTS: None}))
    assert (finding.severity, finding.topic) == ("error", ALERTS)
    assert "detector topics create" in finding.remedy


@pytest.mark.parametrize(
    ("changes", "severity", "words", "remedy"),
    [
        ({"partitions": 4}, "warning", "at most 4 detectors share the work", "topics create --alter"),
        (
            {"copies": 1, "in_sync": 1},
            "error",
            "1 copies and min.insync.replicas 2: every write",
            "reassign-partitions",
        ),
        ({"in_sync": 1}, "error", "only 1 of 3 copies are up to date", "Start the brokers"),
        ({"in_sync": 2}, "warning", "only 2 of 3 copies are up to date.", "Start the brokers"),
        ({"copies": 2, "in_sync": 2}, "warning", "2 copies, and topics.replication_factor is 3", "reassign-partitions"),
        ({"configs": None}, "warning", "may not read its settings", "DESCRIBE_CONFIGS"),
    ],
)
def test_partitions_and_copies(
    settings: Settings,
    facts: dict[str, TopicFacts | None],
    changes: dict[str, int | None],
    severity: str,
    words: str,
    remedy: str,
) -> None:
    changed = replace(facts[CHUNKS], **changes)  # type: ignore[type-var]
    finding = only(check_facts(settings, facts | {CHUNKS: changed}))
    assert finding.severity == severity
    assert words in finding.text
    assert remedy in finding.remedy


@pytest.mark.parametrize(
    ("topic", "key", "value", "severity", "words"),
    [
        (CHUNKS, "cleanup.policy", "compact", "error", "only the newest record stays"),
        (ALERTS, "cleanup.policy", "compact,delete", "error", "only the newest record stays"),
        (CHUNKS, "max.message.bytes", "30000", "error", "a chunk takes up to 32768: none gets through"),
        (CHUNKS, "max.message.bytes", "500000", "error", "a full batch never gets through"),
        (LETTERS, "max.message.bytes", "30000", "error", "none gets through"),
        (CHUNKS, "retention.ms", "60000", "error", "kept 60 s (retention.ms), and up to 120 s are read again"),
        (CHUNKS, "retention.ms", "1800000", "warning", "kept 1800 s (retention.ms), not the 3600 s"),
        (ALERTS, "retention.ms", "60000", "warning", "kept 60 s (retention.ms), not the 604800 s"),
        (CHUNKS, "retention.bytes", "1000000", "error", "holds 29 s of one stream"),
        (CHUNKS, "retention.bytes", "100000000", "warning", "holds 2930 s of one stream"),
        (CHUNKS, "message.timestamp.after.max.ms", "3600000", "warning", "a clock further ahead than 3600 s"),
        (CHUNKS, "message.timestamp.type", "LogAppendTime", "warning", "time of arrival"),
        (ALERTS, "unclean.leader.election.enable", "true", "warning", "what it lacks is lost"),
    ],
)
def test_settings_of_topics(
    settings: Settings,
    facts: dict[str, TopicFacts | None],
    topic: str,
    key: str,
    value: str,
    severity: str,
    words: str,
) -> None:
    found = facts[topic]
    assert found is not None
    assert found.configs is not None
    finding = only(check_facts(settings, facts | {topic: replace(found, configs={**found.configs, key: value})}))
    assert (finding.severity, finding.topic) == (severity, topic)
    assert words in finding.text
    assert "topics create --alter" in finding.remedy or "kafka-configs.sh" in finding.remedy


def test_brokers_too_old_for_the_clock_setting_are_told(
    settings: Settings, facts: dict[str, TopicFacts | None]
) -> None:
    found = facts[CHUNKS]
    assert found is not None
    assert found.configs is not None
    old = {key: value for key, value in found.configs.items() if key != "message.timestamp.after.max.ms"}
    finding = only(check_facts(settings, facts | {CHUNKS: replace(found, configs=old)}))
    assert finding.severity == "warning"
    assert "older than Kafka 3.6" in finding.text


def test_errors_come_before_warnings(settings: Settings, facts: dict[str, TopicFacts | None]) -> None:
    few = replace(with_configs(facts[CHUNKS]), partitions=1)
    findings = check_facts(settings, facts | {CHUNKS: few, LETTERS: None})
    assert [finding.severity for finding in findings] == ["error", "warning"]


def test_how_topics_are_made() -> None:
    settings = load_settings(
        None,
        {
            "DETECTOR__TOPICS__PARTITIONS": "12",
            "DETECTOR__TOPICS__REPLICATION_FACTOR": "3",
            "DETECTOR__TOPICS__MIN_INSYNC_REPLICAS": "2",
            "DETECTOR__TOPICS__MAX_MESSAGE_BYTES": "2000000",
        },
    )
    chunks = topic_settings(settings.topics)[CHUNKS]
    assert (chunks.partitions, chunks.replication_factor) == (12, 3)
    assert kafka_configs(chunks) == {
        "retention.ms": "3600000",
        "cleanup.policy": "delete",
        "max.message.bytes": "2000000",
        "message.timestamp.type": "CreateTime",
        "message.timestamp.after.max.ms": "9223372036854775807",
        "segment.ms": "600000",  # audio goes within 10 minutes of its time
        "min.insync.replicas": "2",
    }
    letters = kafka_configs(topic_settings(settings.topics)[LETTERS])
    assert int(letters["max.message.bytes"]) > 2_000_000  # a letter holds a whole record, and why


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"TOPICS__MIN_INSYNC_REPLICAS": "2"}, "every write would be refused"),
        ({"BUS__KIND": "kafka", "BUS__KAFKA__BATCH_SIZE_BYTES": "2000000"}, "a full batch would never be taken"),
        (
            {
                "BUS__KIND": "kafka",
                "BUS__KAFKA__GROUP_INSTANCE_ID": "deadletters",
                "DAEMON__DELIVERY": "exactly_once",
            },
            "would throw each other out",
        ),
    ],
)
def test_settings_that_could_not_work_are_refused(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_settings(None, {f"DETECTOR__{key}": value for key, value in environment.items()})


# --- the embedded bus


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["topics", *arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def bus_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "bus.sqlite3")


def test_on_the_embedded_bus_topics_are_made_once_and_it_says_what_is_kafkas(bus_path: str) -> None:
    dry = run("create", "--dry-run", "--bus-path", bus_path)
    assert f"{CHUNKS}: would be made, 8 partitions, kept 3600 s" in dry
    assert "it does not exist yet" in run("check", "--bus-path", bus_path)
    assert f"{CHUNKS}: made, 8 partitions" in run("create", "--bus-path", bus_path)
    again = run("create", "--bus-path", bus_path)
    assert f"{CHUNKS}: exists, 8 partitions; left as it is" in again
    assert "replication_factor, max_message_bytes and min_insync_replicas mean nothing here" in again
    assert "all is well" in run("check", "--bus-path", bus_path)


def test_on_the_embedded_bus_fewer_partitions_are_a_warning_and_alter_is_refused(
    bus_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("create", "--bus-path", bus_path)
    monkeypatch.setenv("DETECTOR__TOPICS__PARTITIONS", "16")
    assert "at most 8 detectors share the work" in run("check", "--bus-path", bus_path)
    assert "keeps the settings it was made with" in run("create", "--alter", "--bus-path", bus_path, code=2)


# --- the daemon's start


def test_at_start_each_finding_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    settings = load_settings(None, {"DETECTOR__BUS__EMBEDDED__PATH": str(tmp_path / "bus.sqlite3")})
    bus = open_bus(settings.bus)
    bus.create_topics({name: TopicSettings(partitions=2) for name in topic_settings(settings.topics)})
    told = tell_findings(bus, settings, frozenset())
    assert len(caplog.records) == len(told) == 3
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert tell_findings(bus, settings, told) == told
    assert len(caplog.records) == 3
    bus.close()


def test_a_bus_that_cant_be_asked_does_not_stop_the_start(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(bus: Bus, settings: Settings) -> list[Finding]:
        raise BusUnavailable("no right to look")

    monkeypatch.setattr("detector.topics.check_topics", refuse)
    assert tell_findings(None, settings, frozenset({"before"})) == {"before"}  # type: ignore[arg-type]
    assert "could not be checked: no right to look" in caplog.text
