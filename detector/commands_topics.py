"""``detector topics create | check``: make the topics, and say what is wrong with those there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import tenacity

from detector.cli import CONTEXT, ErrorGroup, bus_path_option, config_option, configure_logging, settings_of

if TYPE_CHECKING:
    from detector.bus.base import Bus, TopicSettings
    from detector.config import Settings
    from detector.topics import Finding


_LOOK_SECONDS, _SETTLE_SECONDS = 0.3, 5.0


@click.group("topics", cls=ErrorGroup, context_settings=CONTEXT)
def topics_group() -> None:
    """The topics on the bus: make them, check them."""


@topics_group.command("create")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--alter", is_flag=True, help="Also bring topics that exist to the settings (Kafka only).")
@config_option
@bus_path_option
def create_command(dry_run: bool, alter: bool, config_path: Path | None, bus_path: Path | None) -> None:
    """Make the topics that do not exist, as section topics of the configuration says. Safe to repeat.

    Topics that exist stay as they are; with --alter their settings and their number of partitions are brought to the
    configuration. Copies are never changed. Exit code 1 where something is wrong afterwards.
    """
    from detector.topics import topic_settings

    settings = settings_of(config_path, bus_path)
    configure_logging(settings.log)
    if alter and settings.bus.kind == "embedded":
        raise click.UsageError("--alter is for Kafka: a topic of the embedded bus keeps the settings it was made with.")
    with _opened(settings) as bus:
        for name, wanted in topic_settings(settings.topics).items():
            partitions = bus.partitions(name)
            if partitions is None:
                click.echo(f"{name}: {'would be made' if dry_run else 'made'}, {_shown(wanted, settings)}")
                if not dry_run:
                    bus.create_topics({name: wanted})
            elif alter:
                _alter(bus, name, wanted, dry_run)
            else:
                click.echo(f"{name}: exists, {partitions} partitions; left as it is")
        if settings.bus.kind == "embedded":
            _explain_embedded()
        if not dry_run:
            _report(_settled_findings(bus, settings))


@topics_group.command("check")
@config_option
@bus_path_option
def check_command(config_path: Path | None, bus_path: Path | None) -> None:
    """Say what is wrong with the topics, each with its remedy. Exit code 1 where there is an error."""
    from detector.topics import check_topics, topic_settings

    settings = settings_of(config_path, bus_path)
    configure_logging(settings.log)
    with _opened(settings) as bus:
        findings = check_topics(bus, settings)
    if settings.bus.kind == "embedded":
        _explain_embedded()
    _report(findings)
    if not findings:
        click.echo(f"{', '.join(topic_settings(settings.topics))}: all is well.")


@contextmanager
def _opened(settings: Settings) -> Iterator[Bus]:
    from detector.bus import open_bus

    bus = open_bus(settings.bus)
    try:
        yield bus
    finally:
        bus.close()


def _settled_findings(bus: Bus, settings: Settings) -> list[Finding]:
    """What is wrong once every broker knows of what was just made: they learn of it one after the other."""
    from detector.topics import check_topics

    settled: list[Finding] = tenacity.Retrying(
        retry=tenacity.retry_if_result(lambda findings: any(one.severity == "error" for one in findings)),
        wait=tenacity.wait_fixed(_LOOK_SECONDS),
        stop=tenacity.stop_after_delay(_SETTLE_SECONDS),
        retry_error_callback=lambda state: state.outcome.result() if state.outcome is not None else [],
    )(lambda: check_topics(bus, settings))
    return settled


def _shown(wanted: TopicSettings, settings: Settings) -> str:
    if settings.bus.kind == "embedded":
        return f"{wanted.partitions} partitions, kept {wanted.retention_seconds:g} s"
    from detector.topics import kafka_configs

    configs = ", ".join(f"{name}={value}" for name, value in kafka_configs(wanted).items())
    return f"{wanted.partitions} partitions, {wanted.replication_factor} copies, {configs}"


def _alter(bus: Bus, name: str, wanted: TopicSettings, dry_run: bool) -> None:
    from detector.bus.kafka import KafkaBus
    from detector.topics import kafka_configs

    assert isinstance(bus, KafkaBus)
    facts = bus.topic_facts([name])[name]
    if facts is None:  # removed this very moment
        click.echo(f"{name}: does not exist any more")
        return
    now = facts.configs or {}
    configs = {key: value for key, value in kafka_configs(wanted).items() if now.get(key) != value}
    partitions = wanted.partitions if facts.partitions < wanted.partitions else None
    changes = [f"{key} {now.get(key, 'unknown')} -> {value}" for key, value in configs.items()]
    if partitions is not None:
        changes.append(f"partitions {facts.partitions} -> {partitions}")
    if not changes:
        click.echo(f"{name}: exists, as configured")
        return
    if not dry_run:
        bus.change_topic(name, partitions, configs)
    click.echo(f"{name}: {'would be changed' if dry_run else 'changed'}, {', '.join(changes)}")


def _explain_embedded() -> None:
    click.echo(
        "The embedded bus has partitions and ages; copies, sizes of batches and cleanup policies are Kafka's, so "
        "topics.replication_factor, max_message_bytes and min_insync_replicas mean nothing here. "
        "bus.embedded.retention_bytes bounds all topics together."
    )


def _report(findings: list[Finding]) -> None:
    """Print them; exit with 1 where there is an error."""
    for finding in findings:
        click.echo(f"{finding.severity.capitalize()}: {finding}", err=True)
    if any(finding.severity == "error" for finding in findings):
        raise SystemExit(1)
