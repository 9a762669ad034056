"""config.yaml and the environment -> frozen, validated settings. The only place that reads either.

``load_settings`` is the one door; what it returns is resolved once and passed down as values. Precedence, strongest
first: environment (``DETECTOR__SECTION__KEY``), the file, the defaults below. Relative paths, wherever they are
written, start at the folder of the configuration file (at the working folder where there is no file), so that every
process given the same file means the same places.

``python -m detector.config`` prints the JSON Schema that is kept in ``schemas/config.schema.json`` for editors.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from detector.errors import ConfigError

ENVIRONMENT_PREFIX = "DETECTOR__"
WINDOW_SECONDS = 9.6  # the longest window a classifier sees: 10 embeddings of 0.96 s
MAX_CONFIG_BYTES = 1 << 20
MAX_SECRET_BYTES = 16 << 10
MASK = "**********"

_HOST_PORT = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")


def _host_port(text: str) -> str:
    match = _HOST_PORT.fullmatch(text)
    if not match or not 1 <= int(match[1]) <= 65535:
        raise ValueError("HOST:PORT, e.g. broker-1.example.org:9092 or [::1]:9092")
    return text


def _topic(text: str) -> str:
    if not _TOPIC.fullmatch(text) or text in (".", ".."):
        raise ValueError("1 to 249 of A-Z a-z 0-9 . _ -")
    return text


def _power_of_two(number: int) -> int:
    if number & (number - 1):
        raise ValueError("a power of two from 1 to 1024")
    return number


def _hop(seconds: float) -> float:
    if seconds not in (0.96, 0.48):
        raise ValueError("0.96 or 0.48")
    return seconds


def _plain_text(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("text that is not blank and has no control characters")
    return text


def _path(value: object) -> object:
    """Text -> Path: strict validation of Python values refuses text for a path."""
    if isinstance(value, str):
        if not value.strip() or "\0" in value:
            raise ValueError("a path that is not blank")
        return Path(value)
    return value


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _servers(value: object) -> object:
    """Also takes Kafka's own form, one text with commas."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else _tuple(value)


Text = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_plain_text)]
TopicName = Annotated[str, Field(json_schema_extra={"pattern": _TOPIC.pattern}), AfterValidator(_topic)]
HostPort = Annotated[str, AfterValidator(_host_port)]
FilePath = Annotated[Path, BeforeValidator(_path)]
Labels = Annotated[tuple[Text, ...], BeforeValidator(_tuple), Field(min_length=1, max_length=1000)]
Score = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )


class EmbeddedBusSettings(_Section):
    """The bus in one SQLite file, for the processes of one machine."""

    path: FilePath = Field(
        default=Path("var/bus.sqlite3"),
        description="The bus file; it and its folder are created when they are missing. Must be on a local disk.",
    )
    retention_seconds: float = Field(
        default=86_400.0,
        ge=1,
        description="Age at which records of a topic without a retention of its own are dropped.",
    )
    retention_bytes: int = Field(
        default=1 << 30,
        ge=1 << 20,
        description="What all records together may take; then the fullest partition drops its oldest.",
    )
    session_timeout_seconds: float = Field(
        default=10.0, ge=0.1, le=3600, description="Silence after which a group member counts as dead and is replaced."
    )
    poll_interval_seconds: float = Field(
        default=0.01, ge=0.001, le=1, description="How often a waiting consumer looks for new records."
    )


class KafkaSettings(_Section):
    """The connection to a Kafka cluster."""

    bootstrap_servers: Annotated[
        tuple[HostPort, ...], BeforeValidator(_servers), Field(min_length=1, max_length=100)
    ] = Field(default=("127.0.0.1:9092",), description="Brokers to begin with, HOST:PORT each.")
    client_id: Text = Field(default="gunfire-detector", description="Name in the brokers' logs and quotas.")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        default="PLAINTEXT",
        description="SSL encrypts; SASL names who connects. Over any network you don't own: SASL_SSL.",
    )
    ssl_ca_file: FilePath | None = Field(
        default=None,
        description="Certificates (PEM) that broker certificates are checked against; null = the system's.",
    )
    ssl_certificate_file: FilePath | None = Field(default=None, description="This client's certificate (PEM).")
    ssl_key_file: FilePath | None = Field(
        default=None, description="Key (PEM) of this client's certificate; null = it stands in the certificate file."
    )
    ssl_key_password: SecretStr | None = Field(default=None, description="Secret: environment or file only.")
    ssl_key_password_file: FilePath | None = Field(default=None, description="File that holds the key's password.")
    ssl_check_hostname: bool = Field(
        default=True, description="Refuse a broker whose certificate is for another name. Leave it true."
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] | None = Field(
        default=None, description="How SASL_PLAINTEXT and SASL_SSL prove who connects."
    )
    sasl_username: Text | None = Field(default=None, description="User name for PLAIN and SCRAM.")
    sasl_password: SecretStr | None = Field(default=None, description="Secret: environment or file only.")
    sasl_password_file: FilePath | None = Field(default=None, description="File that holds the user's password.")
    oauth_token_file: FilePath | None = Field(
        default=None, description="OAUTHBEARER: file that holds the current token; read again at each connection."
    )
    oauth_token_command: (
        Annotated[tuple[Text, ...], BeforeValidator(_tuple), Field(min_length=1, max_length=100)] | None
    ) = Field(default=None, description="OAUTHBEARER: program and arguments that print a token; run without a shell.")
    request_timeout_seconds: float = Field(
        default=30.0, ge=1, le=300, description="How long a request to a broker may take."
    )
    session_timeout_seconds: float = Field(
        default=10.0, ge=6, le=1800, description="Silence after which the group counts a member as dead."
    )
    max_poll_interval_seconds: float = Field(
        default=300.0, ge=1, le=3600, description="Longest time between two polls before the group replaces the member."
    )
    max_partition_fetch_bytes: int = Field(
        default=1 << 20, ge=64 << 10, le=64 << 20, description="Most bytes of one partition in one answer."
    )
    batch_size_bytes: int = Field(
        default=1 << 20, ge=64 << 10, le=16 << 20, description="Most bytes of one partition in one send."
    )
    linger_seconds: float = Field(
        default=0.005, ge=0, le=10, description="How long a send waits for more records to go along."
    )
    compression: Literal["none", "gzip", "lz4", "zstd", "snappy"] = Field(
        default="none", description="Of record batches. PCM hardly shrinks; producer.encoding flac does better."
    )
    group_instance_id: TopicName | None = Field(
        default=None, description="Static membership: a restart within the session timeout moves no partition."
    )


class BusSettings(_Section):
    """Where chunks come from and alerts go."""

    kind: Literal["embedded", "kafka"] = Field(
        default="embedded", description="embedded: one file, one machine. kafka: any number of machines."
    )
    embedded: EmbeddedBusSettings = Field(default_factory=EmbeddedBusSettings)
    kafka: KafkaSettings = Field(default_factory=KafkaSettings)


class TopicsSettings(_Section):
    """Names of the topics, and how they are created where they do not exist."""

    chunks: TopicName = Field(default="audio.chunks", description="Topic of the audio.")
    alerts: TopicName = Field(default="gunfire.alerts", description="Topic of the alerts.")
    deadletter: TopicName = Field(
        default="audio.deadletter", description="Topic of records that were no chunk, with why."
    )
    partitions: int = Field(
        default=8, ge=1, le=10_000, description="Partitions of a new topic: the most detectors that can share the work."
    )
    replication_factor: int = Field(default=1, ge=1, le=100, description="Copies of a new topic (Kafka only).")
    chunks_retention_seconds: float = Field(
        default=3600.0,
        ge=1,
        description="Age at which audio is dropped. A chunk is 30,720 bytes, 0.96 s of one stream.",
    )
    alerts_retention_seconds: float = Field(default=604_800.0, ge=1, description="Age at which alerts are dropped.")
    max_message_bytes: int = Field(
        default=1_048_588,
        ge=65_536,
        le=16 << 20,
        description="Largest batch of records that a broker takes (Kafka only); at least bus.kafka.batch_size_bytes.",
    )
    min_insync_replicas: int | None = Field(
        default=None,
        ge=1,
        le=100,
        description="Copies that must have a record before it counts as stored (Kafka only); null = the brokers' own.",
    )


class ModelSettings(_Section):
    """What hears."""

    name: Text = Field(
        default="compact-gunfire", description="A shipped model's name, or a package folder (a value with a slash)."
    )
    store: FilePath | None = Field(
        default=None, description="Folder of fetched weights; null = the user's data folder."
    )
    threads: int = Field(default=0, ge=0, le=1024, description="CPU threads of the network; 0 = all cores.")


class BatchSettings(_Section):
    """How examples of all streams are put together for the network."""

    max_batch: Annotated[int, AfterValidator(_power_of_two)] = Field(
        default=64, ge=1, le=1024, description="Most examples in one network call; a power of two."
    )
    max_wait_seconds: float = Field(
        default=0.01, ge=0, le=1, description="Longest time an example waits for others to fill its batch."
    )
    hop_seconds: Annotated[float, AfterValidator(_hop)] = Field(
        default=0.48,
        description="0.48: an example a chunk and one across each seam. 0.96: one a chunk, half the work.",
        json_schema_extra={"enum": [0.96, 0.48]},
    )


class DecisionSettings(_Section):
    """When scores become an alert, and when it ends. Times are stream time."""

    open_threshold: Score | None = Field(
        default=None, description="Family score from which an alert opens; null = the model's."
    )
    false_alerts_per_day: float | None = Field(
        default=None,
        gt=0,
        le=10_000,
        allow_inf_nan=False,
        description="False alerts of one stream a day; sets the threshold by the model's own counts.",
    )
    close_threshold: Score | None = Field(
        default=None, description="Family score below which an open alert falls silent; null = derived from the other."
    )
    min_support: int = Field(
        default=1, ge=1, le=100, description="Examples at or over open_threshold that it takes to open an alert."
    )
    support_window_examples: int = Field(
        default=3, ge=1, le=100, description="Examples, the latest ones, among which min_support is counted."
    )
    hold_seconds: float = Field(default=1.92, ge=0, le=3600, description="Silence after which an open alert closes.")
    cooldown_seconds: float = Field(
        default=0.0, ge=0, le=3600, description="Time after a closed alert in which its stream opens no other."
    )
    max_alert_seconds: float = Field(
        default=60.0, ge=1, le=3600, description="Longest alert; what goes on after it is an alert of its own."
    )
    family: Labels | None = Field(
        default=None, description="Labels whose scores together are the family score; null = the model's."
    )
    look_alikes: Annotated[tuple[Text, ...], BeforeValidator(_tuple), Field(max_length=1000)] | None = Field(
        default=None, description="Labels whose scores go along in an alert for comparison; null = the model's."
    )


class DaemonSettings(_Section):
    """How `detector run` works through the bus, and how much it holds in memory."""

    group: Text = Field(
        default="gunfire-detector", description="Consumer group; the detectors of one group share the streams."
    )
    delivery: Literal["at_least_once", "exactly_once"] = Field(
        default="at_least_once", description="exactly_once: alerts and positions in one transaction."
    )
    poll_max_records: int = Field(default=500, ge=1, le=100_000, description="Most records taken from the bus at once.")
    commit_interval_seconds: float = Field(
        default=1.0, ge=0.01, le=300, description="Longest time between commits of the position in the bus."
    )
    drain_seconds: float = Field(
        default=10.0, ge=0.1, le=600, description="Time to finish what was begun after SIGTERM."
    )
    rebuild_max_seconds: float = Field(
        default=120.0, ge=0, le=86_400, description="How far back audio is read again to rebuild state after a restart."
    )
    stream_idle_seconds: float = Field(
        default=300.0, ge=1, le=86_400, description="Silence of a stream after which its state is forgotten."
    )
    max_streams: int = Field(
        default=10_000,
        ge=1,
        le=1_000_000,
        description="Most streams with state; a chunk of one more is refused, and dead-lettered.",
    )
    max_lag_seconds: float | None = Field(
        default=None, ge=1, le=86_400, description="Lag from which the detector counts as overloaded; null = never."
    )
    overload: Literal["process_all", "skip_to_latest"] = Field(
        default="process_all",
        description="What to do then. process_all: warn, and go on late. skip_to_latest: leave out what is waiting.",
    )


class ConsoleSettings(_Section):
    """The HTTP side: /metrics, /livez, /readyz."""

    host: Text = Field(default="127.0.0.1", description="Address to listen on; 0.0.0.0 = every one. There is no login.")
    port: int = Field(default=9464, ge=0, le=65_535, description="Port to listen on; 0 = any free one.")


class LogSettings(_Section):
    """What is written to standard error."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="The least that is written."
    )
    format: Literal["text", "json"] = Field(default="text", description="text for people, json for programs.")


class ProducerSettings(_Section):
    """The programs that bring audio in."""

    encoding: Literal["pcm_s16le", "flac"] = Field(
        default="pcm_s16le", description="Of chunks on the bus. flac: about half the size, lossless, some CPU."
    )
    spool_seconds: float = Field(
        default=60.0, ge=0, le=86_400, description="Audio of each stream kept in memory while the bus is away."
    )


class Contradictions(ValueError):
    """Settings that are fine alone and do not fit together: ``items`` of (key paths, message)."""

    def __init__(self, items: Sequence[tuple[tuple[str, ...], str]]) -> None:
        super().__init__("\n".join(f"{', '.join(keys)}: {message}" for keys, message in items))
        self.items = tuple(items)


class Settings(_Section):
    """All settings, in the order of config.yaml."""

    bus: BusSettings = Field(default_factory=BusSettings)
    topics: TopicsSettings = Field(default_factory=TopicsSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    batch: BatchSettings = Field(default_factory=BatchSettings)
    decision: DecisionSettings = Field(default_factory=DecisionSettings)
    daemon: DaemonSettings = Field(default_factory=DaemonSettings)
    console: ConsoleSettings = Field(default_factory=ConsoleSettings)
    log: LogSettings = Field(default_factory=LogSettings)
    producer: ProducerSettings = Field(default_factory=ProducerSettings)

    @model_validator(mode="after")
    def _fits_together(self) -> Settings:
        found = tuple(_contradictions(self))
        if found:
            raise Contradictions(found)
        return self


def _contradictions(s: Settings) -> Iterator[tuple[tuple[str, ...], str]]:
    d, topics, kafka = s.decision, s.topics, s.bus.kafka
    if d.open_threshold is not None and d.close_threshold is not None and d.close_threshold > d.open_threshold:
        yield (
            ("decision.close_threshold", "decision.open_threshold"),
            f"{d.close_threshold} is over {d.open_threshold}; close_threshold is at most open_threshold",
        )
    if d.open_threshold is not None and d.false_alerts_per_day is not None:
        yield (
            ("decision.false_alerts_per_day", "decision.open_threshold"),
            "both are set; each alone sets the threshold, so one of them must be null",
        )
    if d.min_support > d.support_window_examples:
        yield (
            ("decision.min_support", "decision.support_window_examples"),
            f"{d.min_support} is over {d.support_window_examples}; no more examples can be needed than are looked at",
        )
    if d.hold_seconds > d.max_alert_seconds:
        yield (
            ("decision.hold_seconds", "decision.max_alert_seconds"),
            f"{d.hold_seconds} is over {d.max_alert_seconds}; hold_seconds is at most max_alert_seconds",
        )
    overlap = sorted(set(d.family or ()) & set(d.look_alikes or ()))
    if overlap:
        yield (
            ("decision.family", "decision.look_alikes"),
            f"both hold {_shown(overlap)}; a label is one or the other",
        )
    needed_seconds = d.max_alert_seconds + d.cooldown_seconds + WINDOW_SECONDS
    if s.daemon.rebuild_max_seconds < needed_seconds:
        yield (
            ("daemon.rebuild_max_seconds", "decision.max_alert_seconds", "decision.cooldown_seconds"),
            f"{s.daemon.rebuild_max_seconds} is under {needed_seconds:g}; an open alert could not be rebuilt after a "
            f"restart. At least max_alert_seconds + cooldown_seconds + {WINDOW_SECONDS}",
        )
    if topics.chunks_retention_seconds < s.daemon.rebuild_max_seconds:
        yield (
            ("topics.chunks_retention_seconds", "daemon.rebuild_max_seconds"),
            f"{topics.chunks_retention_seconds} is under {s.daemon.rebuild_max_seconds}; audio needed to rebuild state "
            "would be gone. At least rebuild_max_seconds",
        )
    for a, b in (("chunks", "alerts"), ("chunks", "deadletter"), ("alerts", "deadletter")):
        if getattr(topics, a) == getattr(topics, b):
            yield (
                (f"topics.{a}", f"topics.{b}"),
                f"both are {_shown(getattr(topics, a))}; each topic has a name of its own",
            )
    if topics.min_insync_replicas is not None and topics.min_insync_replicas > topics.replication_factor:
        yield (
            ("topics.min_insync_replicas", "topics.replication_factor"),
            f"{topics.min_insync_replicas} is over {topics.replication_factor}; every write would be refused. At most "
            "replication_factor",
        )
    if s.daemon.overload == "skip_to_latest" and s.daemon.max_lag_seconds is None:
        yield (
            ("daemon.overload", "daemon.max_lag_seconds"),
            "skip_to_latest without a max_lag_seconds; say from which lag on audio is left out",
        )
    if s.daemon.delivery == "exactly_once" and s.daemon.commit_interval_seconds > 30:
        yield (
            ("daemon.commit_interval_seconds", "daemon.delivery"),
            f"{s.daemon.commit_interval_seconds} with exactly_once; at most 30, as a bus ends a transaction that stays "
            "open longer, and alerts are readable only after the commit",
        )
    if s.bus.kind == "embedded":
        embedded = s.bus.embedded
        if embedded.poll_interval_seconds > embedded.session_timeout_seconds / 3:
            yield (
                ("bus.embedded.poll_interval_seconds", "bus.embedded.session_timeout_seconds"),
                f"{embedded.poll_interval_seconds} is over a third of {embedded.session_timeout_seconds}; a waiting "
                "member would count as dead",
            )
        return
    yield from _kafka_contradictions(kafka)
    if s.daemon.delivery == "exactly_once" and kafka.group_instance_id == "deadletters":
        yield (
            ("bus.kafka.group_instance_id", "daemon.delivery"),
            "deadletters with exactly_once; `detector deadletters retry` takes the transactional id of that name, and "
            "the two would throw each other out. Another name",
        )
    if kafka.batch_size_bytes > topics.max_message_bytes:
        yield (
            ("bus.kafka.batch_size_bytes", "topics.max_message_bytes"),
            f"{kafka.batch_size_bytes} is over {topics.max_message_bytes}; a full batch would never be taken. At most "
            "max_message_bytes",
        )
    if s.daemon.drain_seconds > kafka.max_poll_interval_seconds:
        yield (
            ("daemon.drain_seconds", "bus.kafka.max_poll_interval_seconds"),
            f"{s.daemon.drain_seconds} is over {kafka.max_poll_interval_seconds}; the group would replace a member "
            "that is still draining",
        )


def _kafka_contradictions(k: KafkaSettings) -> Iterator[tuple[tuple[str, ...], str]]:
    def key(name: str) -> str:
        return f"bus.kafka.{name}"

    sasl = k.security_protocol.startswith("SASL_")
    ssl_names = ("ssl_ca_file", "ssl_certificate_file", "ssl_key_file", "ssl_key_password", "ssl_key_password_file")
    if not k.security_protocol.endswith("SSL"):
        for name in ssl_names:
            if getattr(k, name) is not None:
                yield (
                    (key(name), key("security_protocol")),
                    f"set, but security_protocol is {k.security_protocol}; needs SSL or SASL_SSL",
                )
    if k.ssl_key_file is not None and k.ssl_certificate_file is None:
        yield (
            (key("ssl_certificate_file"), key("ssl_key_file")),
            "null with an ssl_key_file; a key needs its certificate",
        )
    if k.ssl_key_password is not None and k.ssl_certificate_file is None:
        yield (
            (key("ssl_certificate_file"), key("ssl_key_password")),
            "null with an ssl_key_password; there is no key to open",
        )
    if sasl and k.sasl_mechanism is None:
        yield (
            (key("sasl_mechanism"), key("security_protocol")),
            f"null with {k.security_protocol}; needs PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 or OAUTHBEARER",
        )
    if not sasl and k.sasl_mechanism is not None:
        yield (
            (key("sasl_mechanism"), key("security_protocol")),
            f"{k.sasl_mechanism} with {k.security_protocol}; needs SASL_SSL or SASL_PLAINTEXT",
        )
    with_password = k.sasl_mechanism in ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
    if sasl and with_password and k.sasl_username is None:
        yield (key("sasl_username"), key("sasl_mechanism")), f"null; {k.sasl_mechanism} needs a user name"
    if sasl and with_password and k.sasl_password is None and k.sasl_password_file is None:
        yield (
            (key("sasl_password"), key("sasl_mechanism")),
            f"missing; {k.sasl_mechanism} needs a password: name its file in {key('sasl_password_file')} or set "
            f"{_variable(key('sasl_password'))}",
        )
    tokens = [name for name in ("oauth_token_file", "oauth_token_command") if getattr(k, name) is not None]
    if k.sasl_mechanism == "OAUTHBEARER" and len(tokens) != 1:
        yield (
            (key("oauth_token_file"), key("oauth_token_command"), key("sasl_mechanism")),
            f"{'both set' if tokens else 'both null'}; OAUTHBEARER needs exactly one of them",
        )
    if k.sasl_mechanism != "OAUTHBEARER":
        for name in tokens:
            yield (key(name), key("sasl_mechanism")), f"set, but sasl_mechanism is {k.sasl_mechanism or 'null'}"


# --- what the fields are ---------------------------------------------------------------------------------------------


def _sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section's key path ("" for the whole) and class."""
    yield prefix, model
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _sections(info.annotation, f"{prefix}.{name}" if prefix else name)


_SECTIONS = dict(_sections(Settings))
_FIELDS = {
    f"{prefix}.{name}": info
    for prefix, model in _SECTIONS.items()
    for name, info in model.model_fields.items()
    if prefix and f"{prefix}.{name}" not in _SECTIONS
}
_SECRETS = frozenset(path for path, info in _FIELDS.items() if SecretStr in get_args(info.annotation))
_PATHS = frozenset(path for path, info in _FIELDS.items() if path.endswith(("_file", ".path", ".store")))


def setting_paths() -> tuple[str, ...]:
    """Key paths of all settings, secrets included, in the order of config.yaml."""
    return tuple(_FIELDS)


def _variable(path: str) -> str:
    return ENVIRONMENT_PREFIX + path.upper().replace(".", "__")


_BY_VARIABLE = {_variable(path): path for path in _FIELDS}


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of config.yaml. Secrets are no part of it: they do not belong in the file."""
    schema = Settings.model_json_schema()
    for definition in schema["$defs"].values():
        for name in [n for n, p in definition["properties"].items() if _is_secret_schema(p)]:
            del definition["properties"][name]
    servers = schema["$defs"]["KafkaSettings"]["properties"]["bootstrap_servers"]
    servers["items"]["pattern"] = f"^{_HOST_PORT.pattern}$"
    for definition in (schema, *schema["$defs"].values()):
        for name, one in definition["properties"].items():
            if "$ref" in one:  # a section with nothing under it means its defaults
                definition["properties"][name] = {"anyOf": [{"$ref": one["$ref"]}, {"type": "null"}]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "config.yaml of the gunfire detector",
        **{key: value for key, value in schema.items() if key != "title"},
    }


def _is_secret_schema(prop: Mapping[str, Any]) -> bool:
    return any(option.get("format") == "password" for option in prop.get("anyOf", [prop]))


def _allowed(path: str) -> str:
    """What the setting takes, in words."""
    section, _, name = path.rpartition(".")
    prop = _SECTIONS[section].model_json_schema()["properties"][name]
    options = [_allowed_option(path, option, prop) for option in prop.get("anyOf", [prop])]
    return " or ".join(options)


def _allowed_option(path: str, option: Mapping[str, Any], prop: Mapping[str, Any]) -> str:
    kind = option.get("type")
    if "enum" in option:
        values = [str(v) for v in option["enum"]]
        return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} or {values[-1]}"
    if path == "batch.max_batch":
        return "a power of two from 1 to 1024"
    if kind in ("integer", "number"):
        low, over, high, under = (
            None if value is None else f"{value:g}" if kind == "number" else str(value)
            for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
            for value in (option.get(key, prop.get(key)),)
        )
        noun = "a whole number" if kind == "integer" else "a number"
        if low is not None and high is not None:
            return f"{noun} from {low} to {high}"
        limits = (("at least", low), ("over", over), ("at most", high), ("under", under))
        bounds = " and ".join(f"{words} {value}" for words, value in limits if value is not None)
        return f"{noun}, {bounds}" if bounds else noun
    if kind == "boolean":
        return "true or false"
    if kind == "array":
        return "a list of HOST:PORT" if path == "bus.kafka.bootstrap_servers" else "a list of texts"
    if kind == "null":
        return "null"
    if option.get("format") == "path":
        return "a path"
    if option.get("pattern") == _TOPIC.pattern:
        return "1 to 249 of A-Z a-z 0-9 . _ -"
    return "a text of 1 to 255 characters"


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass
class _Raw:
    """Values as they were written, by key path, and where; and every error so far."""

    base: Path
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    faulty: set[str] = field(default_factory=set)

    def refuse(self, path: str, found: str, allowed: str, place: str | None = None) -> None:
        where = place or self.places.get(path)
        self.errors.append(f"{f'{where}: ' if where else ''}{path}: {found}; allowed: {allowed}")
        self.faulty.add(path)
        self.values.pop(path, None)

    def tree(self) -> dict[str, Any]:
        root: dict[str, Any] = {}
        for path, value in self.values.items():
            *sections, name = path.split(".")
            node = root
            for section in sections:
                node = node.setdefault(section, {})
            node[name] = value
        return root


def load_settings(path: Path | None, environ: Mapping[str, str]) -> Settings:
    """Read, override, validate.

    Args:
        path: config.yaml; None: defaults and environment alone.
        environ: usually ``os.environ``; only variables beginning with ``DETECTOR__`` are looked at.

    Returns:
        Settings whose paths are absolute and whose secrets are read.

    Raises:
        ConfigError: one line for each thing that is wrong: where, key path, what was found, what is allowed.
    """
    try:
        raw = _Raw(base=(path.parent if path is not None else Path()).resolve())
    except (OSError, ValueError, RuntimeError) as e:
        raise ConfigError(f"{str(path)!r} can't be read: {e}.") from None
    if path is not None:
        _read_file(path, raw)
    _read_environment(environ, raw)
    _resolve(raw)
    settings = _validate(raw)
    if settings is not None and not raw.errors:
        settings = _with_files(settings, raw)
    if settings is None or raw.errors:
        count = len(raw.errors)
        source = f"Configuration {str(path)!r}" if path is not None else "The configuration"
        raise ConfigError(
            f"{source} can't be used, {count} error{'s' if count > 1 else ''}:\n"
            + "\n".join(f"  {line}" for line in raw.errors)
        )
    return settings


def _read_file(path: Path, raw: _Raw) -> None:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise ConfigError(f"Configuration {str(path)!r} can't be read: {reason}. Name another with --config.") from None
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"Configuration {str(path)!r} is over {MAX_CONFIG_BYTES} bytes; this is no config.yaml.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        raise ConfigError(
            f"{path.name}:{line}: byte {data[e.start]:#04x} is no UTF-8; save the file as UTF-8."
        ) from None
    node = _compose(text, path.name)
    if node is None or _is_null(node):
        return
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{_place(path.name, node)}: the file holds {_kind(node)}; "
            f"allowed: sections, {', '.join(Settings.model_fields)}"
        )
    _take_section("", node, path.name, raw)


class _Loader(yaml.SafeLoader):
    """Only composes nodes, with YAML 1.2's plain scalars (``1e-3`` is a number, ``on`` and ``12:30`` are texts)."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own form

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(
                None,
                None,
                "anchors (&) and aliases (*) are not used here; quote the text if it is one",
                event.start_mark,
            )
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+\Z"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
    list("-+0123456789."),
)


def _compose(text: str, name: str) -> yaml.Node | None:
    """Text -> node tree. Raises ConfigError with line and column."""
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise ConfigError(f"{where}: this is no valid YAML: {e.problem or e.context}.") from None
    except yaml.reader.ReaderError as e:
        line = text[: e.position].count("\n") + 1 if isinstance(e.position, int) else 1
        raise ConfigError(f"{name}:{line}: this is no valid YAML: {e.reason}.") from None
    except (yaml.YAMLError, ValueError) as e:
        raise ConfigError(f"{name}: this is no valid YAML: {e}.") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply; settings are two or three levels deep.") from None
    return node


def _place(name: str, node: yaml.Node) -> str:
    return f"{name}:{node.start_mark.line + 1}"


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    return "a list" if isinstance(node, yaml.SequenceNode) else _shown(_scalar(node))


def _scalar(node: yaml.Node) -> Any:
    """Value of a scalar or list node; a value with a tag that is not known stays text."""
    if isinstance(node, yaml.SequenceNode):
        return [_scalar(child) for child in node.value]
    if isinstance(node, yaml.MappingNode):
        return {str(_scalar(key)): _scalar(value) for key, value in node.value}
    text: str = node.value
    kind = node.tag.rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind in ("int", "float"):
        try:
            return int(text) if kind == "int" else float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        except ValueError:  # an explicit tag on something else, or thousands of digits
            return text
    return text


def _take_section(section: str, node: yaml.MappingNode, name: str, raw: _Raw) -> None:
    fields = _SECTIONS[section].model_fields
    seen: dict[str, str] = {}
    for key_node, value_node in node.value:
        place = _place(name, key_node)
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else _kind(key_node)
        path = f"{section}.{key}" if section else key
        if key in seen:
            raw.errors.append(f"{place}: {_clip(path)}: stands twice, first at {seen[key]}; allowed: once")
            continue
        seen[key] = place
        if key not in fields:
            raw.errors.append(f"{place}: {_unknown(section, key)}")
        elif path in _SECTIONS:
            if isinstance(value_node, yaml.MappingNode):
                _take_section(path, value_node, name, raw)
            elif not _is_null(value_node):
                keys = ", ".join(_SECTIONS[path].model_fields)
                raw.errors.append(f"{place}: {path}: {_kind(value_node)}; allowed: a section with {keys}")
        elif path in _SECRETS:
            raw.places[path] = place
            if not _is_null(value_node):
                raw.refuse(
                    path,
                    "a secret in the file, readable by whoever reads the file",
                    f"null; name a file in {path}_file or set the variable {_variable(path)}",
                )
        else:
            raw.places[path] = place
            raw.values[path] = _scalar(value_node)


def _unknown(section: str, key: str) -> str:
    """'path: not known ...', with the nearest known key."""
    here = [f"{section}.{name}" if section else name for name in _SECTIONS[section].model_fields]
    path = f"{section}.{key}" if section else key
    elsewhere = [p for p in (*_FIELDS, *_SECTIONS) if p and p.rpartition(".")[2] == key]
    near = (
        difflib.get_close_matches(path[:200], here, 1, 0.6)
        or elsewhere[:1]
        or difflib.get_close_matches(path[:200], _FIELDS, 1, 0.8)
    )
    hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(_SECTIONS[section].model_fields)}"
    return f"{_clip(path)}: not known; {hint}"


def _read_environment(environ: Mapping[str, str], raw: _Raw) -> None:
    for variable in sorted(environ):
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        text = environ[variable]
        path = _BY_VARIABLE.get(variable)
        if path is None:
            near = difflib.get_close_matches(variable[:200], _BY_VARIABLE, 1, 0.8)
            hint = f"did you mean {near[0]}?" if near else "allowed: DETECTOR__SECTION__KEY of a setting in config.yaml"
            raw.errors.append(f"environment: {_clip(variable)}: not known; {hint}")
            continue
        place = f"environment {variable}"
        if path in _SECRETS:
            raw.places[path] = place
            if text:
                raw.values[path] = SecretStr(text)
            else:
                raw.refuse(path, "an empty secret", f"the secret itself, or a file named in {path}_file")
            continue
        try:
            node = _compose(text, place)
        except ConfigError as e:
            raw.places[path] = place
            raw.errors.append(f"{path}: {e}")
            raw.faulty.add(path)
            raw.values.pop(path, None)
            continue
        raw.places[path] = place
        value = None if node is None else _scalar(node)
        kinds = _SECTIONS[path.rpartition(".")[0]].model_json_schema()["properties"][path.rpartition(".")[2]]
        is_list = any(option.get("type") == "array" for option in kinds.get("anyOf", [kinds]))
        if is_list and isinstance(value, str) and path != "bus.kafka.bootstrap_servers":
            value = [value]
        raw.values[path] = value


def _resolve(raw: _Raw) -> None:
    """Make relative paths absolute."""
    for path, value in raw.values.items():
        if path in _PATHS and isinstance(value, str) and value.strip() and "\0" not in value:
            raw.values[path] = _absolute(value, raw)
        elif path == "model.name" and isinstance(value, str) and "/" in value and "\0" not in value:
            raw.values[path] = str(_absolute(value, raw))
    for path in _PATHS - raw.values.keys():
        default = _FIELDS[path].default
        if isinstance(default, Path):
            raw.values[path] = raw.base / default


def _absolute(text: str, raw: _Raw) -> Path:
    try:
        return raw.base / Path(text).expanduser()
    except RuntimeError:  # ~someone who does not exist
        return raw.base / text


def _validate(raw: _Raw) -> Settings | None:
    """Validate what was read; what is faulty is left out and the rest validated again, so that all errors are found."""
    try:
        return Settings.model_validate(raw.tree())
    except ValidationError as e:
        contradictions = _take_errors(e, raw)
    if contradictions is None:
        try:
            return Settings.model_validate(raw.tree())
        except ValidationError as e:
            contradictions = _take_errors(e, raw) or ()
    for paths, message in contradictions:
        if raw.faulty.isdisjoint(paths):
            where = raw.places.get(paths[0])
            also = f" ({', '.join(paths[1:])})" if len(paths) > 1 else ""
            raw.errors.append(f"{f'{where}: ' if where else ''}{paths[0]}{also}: {message}")
    return None


def _take_errors(error: ValidationError, raw: _Raw) -> tuple[tuple[tuple[str, ...], str], ...] | None:
    """Note each faulty value, and drop it; or return the contradictions, if it is those."""
    for one in error.errors(include_url=False):
        cause = one.get("ctx", {}).get("error")
        if isinstance(cause, Contradictions):
            return cause.items
        path = next(".".join(map(str, one["loc"][:n])) for n in (2, 3) if ".".join(map(str, one["loc"][:n])) in _FIELDS)
        if path in raw.faulty:
            continue  # another item of the same list, or the other half of "X or null"
        found = "a secret that can't be used" if path in _SECRETS else _shown(raw.values.get(path))
        if path == "bus.kafka.bootstrap_servers":
            found = re.sub(r'[^",]*@', f"{MASK}@", found)  # user:password@host, which no broker address takes
        detail = f" ({cause})" if cause is not None and str(cause) not in _allowed(path) else ""
        raw.refuse(path, found, _allowed(path) + detail)
    return None


def _with_files(settings: Settings, raw: _Raw) -> Settings:
    """Check the files that are named, and read the secrets out of theirs."""
    if settings.bus.kind != "kafka":
        return settings
    kafka, secrets = settings.bus.kafka, {}
    for name in ("ssl_key_password", "sasl_password"):
        path, file = f"bus.kafka.{name}", getattr(kafka, f"{name}_file")
        if file is None:
            continue
        if getattr(kafka, name) is not None:
            raw.refuse(path, f"set, and {path}_file too", "one of the two")
            continue
        secret = _read_secret(file, f"{path}_file", raw)
        if secret is not None:
            secrets[name] = SecretStr(secret)
    for name in ("ssl_ca_file", "ssl_certificate_file", "ssl_key_file", "oauth_token_file"):
        file = getattr(kafka, name)
        if file is not None and not os.access(file, os.R_OK):
            raw.refuse(
                f"bus.kafka.{name}", f"{_shown(str(file))}, which is not there or not readable", "a readable file"
            )
    if raw.errors or not secrets:
        return settings
    bus = settings.bus.model_copy(update={"kafka": kafka.model_copy(update=secrets)})
    return settings.model_copy(update={"bus": bus})


def _read_secret(file: Path, path: str, raw: _Raw) -> str | None:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_SECRET_BYTES + 1)
        text = data.decode().rstrip("\r\n")
    except OSError as e:
        raw.refuse(path, f"{_shown(str(file))}, which can't be read: {e.strerror}", "a readable file with the secret")
        return None
    except ValueError:
        raw.refuse(path, f"{_shown(str(file))}, which is no UTF-8 text", "a file that holds the secret alone")
        return None
    if not text or len(data) > MAX_SECRET_BYTES or "\n" in text or "\0" in text:
        raw.refuse(path, f"{_shown(str(file))}, which does not hold one line", "a file that holds the secret alone")
        return None
    return text


def _shown(value: object) -> str:
    """A value for an error message, one line and not long."""
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f".{value}" if math.isnan(value) or value > 0 else "-.inf"
    try:
        return _clip(json.dumps(value, ensure_ascii=True, default=str))
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"


def _clip(text: str) -> str:
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 120 else f"{text[:117]}..."


# --- writing ---------------------------------------------------------------------------------------------------------


def effective_yaml(settings: Settings) -> str:
    """All settings as YAML, secrets masked. Safe to log; without the masked lines it can be used as a config.yaml."""
    tree = settings.model_dump(mode="json")
    for path in _SECRETS:
        *sections, name = path.split(".")
        node = tree
        for section in sections:
            node = node[section]
        if node[name] is not None:
            node[name] = MASK
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=4096)


def check_report(path: Path | None, environ: Mapping[str, str]) -> str:
    """What ``detector check`` prints: the effective settings, secrets masked. Raises ConfigError like load_settings."""
    settings = load_settings(path, environ)
    source = f"{str(path)!r}" if path is not None else "defaults"
    overrides = sorted(v for v in environ if v in _BY_VARIABLE)
    by = f", overridden by {', '.join(overrides)}" if overrides else ""
    return f"# Effective settings: {source}{by}. Secrets are masked.\n{effective_yaml(settings)}"


def schema_text() -> str:
    """The content of schemas/config.schema.json."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema_text())
