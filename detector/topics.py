"""How the topics are made, and what is wrong with those there are.

``topic_settings`` says how each is created; ``check_facts`` holds Kafka's answer against the settings. It is pure: the
asking is done by ``check_topics``, for ``detector topics`` and for the daemon at its start.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from detector.bus.base import Bus, TopicSettings
from detector.errors import BusError

if TYPE_CHECKING:
    from detector.bus.kafka_topics import TopicFacts
    from detector.config import Settings, TopicsSettings

log = logging.getLogger(__name__)

CREATE = "detector topics create"
ALTER = "detector topics create --alter"

_CHUNK_BYTES = 32_768  # a chunk of PCM with its headers and those of its batch
_LETTER_BYTES = 16_384  # what a dead letter adds to the record it holds, at most
_MIN_SEGMENT_SECONDS, _MAX_SEGMENT_SECONDS = 600.0, 604_800.0
_SEGMENTS = 8  # a topic's age limit is held to within one part in so many
_SAME_MARGIN = 0.001
# How far a producer's clock may be ahead: without a limit, as wrong clocks must silence no sensor.
_CLOCK_SETTING, _CLOCK_MS = "message.timestamp.after.max.ms", 2**63 - 1


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with a topic. error: what is promised can't be kept. warning: it is kept less well."""

    severity: Literal["error", "warning"]
    topic: str
    text: str
    remedy: str

    def __str__(self) -> str:
        return f"Topic {self.topic}: {self.text} {self.remedy}"


def topic_settings(topics: TopicsSettings) -> dict[str, TopicSettings]:
    """How the detector's topics are created where they do not exist."""

    def one(retention_seconds: float, max_message_bytes: int) -> TopicSettings:
        # Kafka drops whole segments: without a limit of its own, old audio stays until the segment is 1 GiB full.
        segment_seconds = min(max(retention_seconds / _SEGMENTS, _MIN_SEGMENT_SECONDS), _MAX_SEGMENT_SECONDS)
        configs = {
            "cleanup.policy": "delete",  # compaction would keep one chunk, one alert of each stream
            "max.message.bytes": str(max_message_bytes),
            "message.timestamp.type": "CreateTime",
            _CLOCK_SETTING: str(_CLOCK_MS),
            "segment.ms": str(int(segment_seconds * 1000)),
        }
        if topics.min_insync_replicas is not None:
            configs["min.insync.replicas"] = str(topics.min_insync_replicas)
        return TopicSettings(
            partitions=topics.partitions,
            replication_factor=topics.replication_factor,
            retention_seconds=retention_seconds,
            configs=tuple(configs.items()),
        )

    limit_bytes = topics.max_message_bytes
    return {
        topics.chunks: one(topics.chunks_retention_seconds, limit_bytes),
        topics.alerts: one(topics.alerts_retention_seconds, limit_bytes),
        topics.deadletter: one(topics.alerts_retention_seconds, limit_bytes + _LETTER_BYTES),
    }


def kafka_configs(settings: TopicSettings) -> dict[str, str]:
    """Kafka's own names and texts for everything but partitions and copies."""
    found = {}
    if settings.retention_seconds is not None:
        found["retention.ms"] = str(int(settings.retention_seconds * 1000))
    return found | dict(settings.configs)


def check_topics(bus: Bus, settings: Settings) -> list[Finding]:
    """What is wrong with the topics of this bus, errors first. Raises BusError where it can't be asked."""
    names = list(topic_settings(settings.topics))
    if settings.bus.kind == "kafka":
        from detector.bus.kafka import KafkaBus

        assert isinstance(bus, KafkaBus)
        return check_facts(settings, bus.topic_facts(names))
    return list(_check_embedded(settings, {name: bus.partitions(name) for name in names}))


def tell_findings(bus: Bus, settings: Settings, told: frozenset[str]) -> frozenset[str]:
    """Log what is wrong with the topics and was not ``told`` before; returns what is wrong now."""
    try:
        findings = check_topics(bus, settings)
    except BusError as error:
        log.warning("The topics could not be checked: %s", error)
        return told
    for finding in findings:
        if str(finding) not in told:
            log.log(logging.ERROR if finding.severity == "error" else logging.WARNING, "%s", finding)
    return frozenset(map(str, findings))


def _check_embedded(settings: Settings, partitions: Mapping[str, int | None]) -> Iterator[Finding]:
    for name, count in partitions.items():
        if count is None:
            yield Finding("warning", name, "it does not exist yet.", f"The detector makes it; or now: {CREATE}.")
        elif count < settings.topics.partitions:
            yield Finding(
                "warning",
                name,
                f"{count} partitions, and topics.partitions is {settings.topics.partitions}: at most {count} detectors "
                "share the work.",
                "A topic of the embedded bus keeps its number; for another one start with a new file in "
                "bus.embedded.path.",
            )


def check_facts(settings: Settings, facts: Mapping[str, TopicFacts | None]) -> list[Finding]:
    """What is wrong with topics on Kafka, errors first."""
    findings: list[Finding] = []
    for name, wanted in topic_settings(settings.topics).items():
        found = facts[name]
        if found is None:
            findings.append(Finding("error", name, "it does not exist.", f"Make it: {CREATE}."))
            continue
        findings += _check_copies(name, wanted, found)
        if found.configs is None:
            text = "this user may not read its settings, so they were not checked."
            findings.append(Finding("warning", name, text, "Grant DESCRIBE_CONFIGS on the topic (docs/kafka.md)."))
            continue
        findings += _check_configs(settings, name, wanted, found.configs)
    return sorted(findings, key=lambda finding: finding.severity)


def _check_copies(name: str, wanted: TopicSettings, found: TopicFacts) -> Iterator[Finding]:
    if found.partitions < wanted.partitions:
        yield Finding(
            "warning",
            name,
            f"{found.partitions} partitions, and topics.partitions is {wanted.partitions}: at most {found.partitions} "
            "detectors share the work.",
            f"Add partitions: {ALTER}. Streams then change their partition, and alerts open at that moment are closed.",
        )
    least = int((found.configs or {}).get("min.insync.replicas", 1))
    reassign = "More copies take Kafka's own kafka-reassign-partitions.sh"
    if found.copies < least:
        yield Finding(
            "error",
            name,
            f"{found.copies} copies and min.insync.replicas {least}: every write is refused.",
            f"{reassign}; or lower topics.min_insync_replicas and run {ALTER}.",
        )
    elif found.in_sync < least:
        yield Finding(
            "error",
            name,
            f"only {found.in_sync} of {found.copies} copies are up to date and min.insync.replicas is {least}: writes "
            "are refused for now.",
            "Start the brokers that are down.",
        )
    elif found.in_sync < found.copies:
        yield Finding(
            "warning",
            name,
            f"only {found.in_sync} of {found.copies} copies are up to date.",
            "Start the brokers that are down; a copy that was away needs a while to catch up.",
        )
    elif found.copies < wanted.replication_factor:
        yield Finding(
            "warning",
            name,
            f"{found.copies} copies, and topics.replication_factor is {wanted.replication_factor}.",
            f"{reassign}, or make the topic anew.",
        )


def _check_configs(
    settings: Settings, name: str, wanted: TopicSettings, configs: Mapping[str, str]
) -> Iterator[Finding]:
    topics, kafka = settings.topics, settings.bus.kafka
    mend = f"Mend it: {ALTER}."
    if "compact" in configs.get("cleanup.policy", "delete"):
        yield Finding(
            "error",
            name,
            f"cleanup.policy is {configs['cleanup.policy']}: of each stream only the newest record stays.",
            mend,
        )
    limit_bytes = int(configs.get("max.message.bytes", 2**31))
    if name != topics.alerts and limit_bytes < _CHUNK_BYTES:
        yield Finding(
            "error",
            name,
            f"max.message.bytes is {limit_bytes}, and a chunk takes up to {_CHUNK_BYTES}: none gets through.",
            mend,
        )
    elif name != topics.deadletter and limit_bytes < kafka.batch_size_bytes:
        yield Finding(
            "error",
            name,
            f"max.message.bytes is {limit_bytes} and bus.kafka.batch_size_bytes {kafka.batch_size_bytes}: a full batch "
            "never gets through.",
            f"Mend it: {ALTER}; or lower bus.kafka.batch_size_bytes.",
        )
    if configs.get("message.timestamp.type", "CreateTime") != "CreateTime":
        yield Finding(
            "warning",
            name,
            f"message.timestamp.type is {configs['message.timestamp.type']}: looking for audio by its time, and the "
            "lag shown, go by the brokers' clocks and the time of arrival.",
            mend,
        )
    ahead_ms = int(configs.get(_CLOCK_SETTING, _CLOCK_MS))
    if _CLOCK_SETTING not in configs:
        yield Finding(
            "warning",
            name,
            f"the brokers are older than Kafka 3.6: they do not know {_CLOCK_SETTING}, so that `{CREATE}` is refused "
            "there, and may refuse whose clock is wrong.",
            "Take Kafka 3.6 or newer, or set message.timestamp.difference.max.ms to 9223372036854775807.",
        )
    elif ahead_ms < _CLOCK_MS:
        yield Finding(
            "warning",
            name,
            f"{_CLOCK_SETTING} is {ahead_ms}: who sends with a clock further ahead than "
            f"{ahead_ms / 1000:g} s is refused.",
            mend,
        )
    if configs.get("unclean.leader.election.enable") == "true":
        yield Finding(
            "warning",
            name,
            "unclean.leader.election.enable is true: a broker that lags may take over, and what it lacks is lost.",
            "Set it to false (kafka-configs.sh).",
        )
    yield from _check_retention(settings, name, wanted, configs)


def _check_retention(
    settings: Settings, name: str, wanted: TopicSettings, configs: Mapping[str, str]
) -> Iterator[Finding]:
    mend = f"Mend it: {ALTER}."
    kept_ms = int(configs.get("retention.ms", -1))
    kept_seconds = kept_ms / 1000 if kept_ms >= 0 else float("inf")
    kept_bytes = int(configs.get("retention.bytes", -1))
    rebuild_seconds = settings.daemon.rebuild_max_seconds
    assert wanted.retention_seconds is not None
    if name == settings.topics.chunks and kept_seconds < rebuild_seconds:
        yield Finding(
            "error",
            name,
            f"audio is kept {kept_seconds:g} s (retention.ms), and up to {rebuild_seconds:g} s are read again after a "
            "restart (daemon.rebuild_max_seconds): open alerts would be cut.",
            mend,
        )
    elif kept_seconds < wanted.retention_seconds * (1 - _SAME_MARGIN):
        yield Finding(
            "warning",
            name,
            f"records are kept {kept_seconds:g} s (retention.ms), not the {wanted.retention_seconds:g} s of the "
            "configuration.",
            mend,
        )
    if name == settings.topics.chunks and kept_bytes >= 0:
        one_stream_seconds = kept_bytes / _CHUNK_BYTES * 0.96
        severity: Literal["error", "warning"] = "error" if one_stream_seconds < rebuild_seconds else "warning"
        yield Finding(
            severity,
            name,
            f"retention.bytes of {kept_bytes} a partition holds {one_stream_seconds:.0f} s of one stream, a share of "
            f"that of each of several; {rebuild_seconds:g} s are read again after a restart.",
            "Take the limit away: kafka-configs.sh --alter --delete-config retention.bytes.",
        )
