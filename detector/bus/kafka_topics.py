"""What there is to know of a Kafka topic, and how an existing one is changed. Works on the library's admin client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kafka import errors
from kafka.admin import ConfigResource, ConfigResourceType

_MISSING = errors.UnknownTopicOrPartitionError.errno


@dataclass(frozen=True, slots=True)
class TopicFacts:
    """A topic as the brokers have it.

    Attributes:
        partitions: their number.
        copies: replicas of the partition that has fewest.
        in_sync: replicas in sync of the partition that has fewest right now; 0 also where a partition has no leader.
        configs: every setting in effect, by Kafka's names; None where this user may not look (DESCRIBE_CONFIGS).
    """

    partitions: int
    copies: int
    in_sync: int
    configs: Mapping[str, str] | None


def facts_of(admin: Any, names: Sequence[str]) -> dict[str, TopicFacts | None]:
    """By name; None for a topic that does not exist. Raises the library's errors."""
    answers = {answer["name"]: answer for answer in admin.describe_topics(list(names))}
    for answer in answers.values():
        if answer["error_code"] not in (0, _MISSING):
            raise errors.for_code(answer["error_code"])({answer["name"]})
    there = [name for name in names if answers[name]["error_code"] == 0]
    configs = _configs(admin, there)
    facts: dict[str, TopicFacts | None] = dict.fromkeys(names)
    for name in there:
        partitions = answers[name]["partitions"]
        facts[name] = TopicFacts(
            partitions=len(partitions),
            copies=min(len(p["replica_nodes"]) for p in partitions),
            in_sync=min(0 if p["error_code"] or p["leader_id"] < 0 else len(p["isr_nodes"]) for p in partitions),
            configs=configs.get(name) or None,
        )
    return facts


def _configs(admin: Any, names: Sequence[str]) -> dict[str, dict[str, str]]:
    if not names:
        return {}
    wanted = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
    answer = admin.describe_configs(wanted, config_filter="all").get("topic", {})
    return {name: {key: str(one["value"]) for key, one in found.items()} for name, found in answer.items()}


def change_topic(admin: Any, name: str, partitions: int | None, configs: Mapping[str, str]) -> None:
    """Set configurations, and raise the number of partitions. Raises the library's errors."""
    if configs:
        wanted = ConfigResource(ConfigResourceType.TOPIC, name, dict(configs))
        # Not asked beforehand which settings there are: that takes another right, and the broker says it as well.
        outcome = admin.alter_configs([wanted], raise_on_unknown=False)["topic"][name]
        if outcome != "OK":
            kind = errors.TopicAuthorizationFailedError if "AUTHORIZATION" in outcome.upper() else errors.KafkaError
            raise kind(outcome)
    if partitions is not None:
        admin.create_partitions({name: partitions})
