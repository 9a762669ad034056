"""Promises of Kafka's security: who may connect is decided by certificates, passwords and tokens; who may do what by
ACLs; what is refused says why and what to do; and no secret is ever written anywhere."""

from __future__ import annotations

import base64
import contextlib
import io
import logging
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from kafka import codec

from detector.bus.base import Commit, TopicPartition
from detector.bus.kafka import KafkaBus
from detector.config import load_settings
from detector.errors import BusUnavailable, ConfigError
from detector.topics import topic_settings
from tests.kafka_broker import broker_module, security_module

pytestmark = pytest.mark.kafka

CHUNKS, ALERTS, GROUP = "audio.chunks", "gunfire.alerts", "gunfire-detector"
DEADLINE_SECONDS = 60.0
DETECTOR = Path(sys.executable).with_name("detector")


class Secured:
    """One secured broker with a listener for each way to connect, and settings to do so."""

    def __init__(self, data: Path, module: ModuleType) -> None:
        security = self.security = security_module(module)
        self.data = data
        security.make_passwords(data)
        security.make_certificates(data)
        elsewhere = security.make_certificate(data, "elsewhere", ["broker.example.org"])
        server = {"ssl.client.auth": "none"}
        more = [
            module.Listener("ONEWAY", "SSL", server),
            module.Listener("ELSEWHERE", "SSL", server | {"ssl.keystore.location": str(elsewhere)}),
            module.Listener("PLAINONLY", "SASL_PLAINTEXT", security.sasl_settings(data, ["PLAIN"])),
        ]
        self.cluster = module.Cluster(data, secure=True, oauth=True, listeners=more, heap_mb=256)

    def password(self, user: str) -> str:
        return str(self.security.password_file(self.data, user).read_text()).strip()

    def kafka(self, listener: str, user: str | None = None, **changes: Any) -> dict[str, Any]:
        """Section bus.kafka: by certificate at CERTIFIED, by SCRAM-SHA-512 where a user name fits, else nothing."""
        certificates = self.data / "certificates"
        section: dict[str, Any] = {
            "bootstrap_servers": list(self.cluster.addresses_of(listener)),
            "security_protocol": "SSL",
            "ssl_ca_file": str(certificates / "ca.pem"),
            "request_timeout_seconds": 2.0,
        }
        if listener == "CERTIFIED" and user is not None:
            section["ssl_certificate_file"] = str(certificates / f"{user}.pem")
            section["ssl_key_file"] = str(certificates / f"{user}.key")
        if listener == "CLIENTS":
            section["security_protocol"] = "SASL_SSL"
            section["sasl_mechanism"] = "SCRAM-SHA-512"
            section["sasl_username"] = user
            section["sasl_password_file"] = str(self.security.password_file(self.data, user))
            section["request_timeout_seconds"] = 10.0
        if listener == "TOKENS":
            section["security_protocol"] = "SASL_SSL"
            section["sasl_mechanism"] = "OAUTHBEARER"
        return {key: value for key, value in (section | changes).items() if value is not None}

    def config_file(self, folder: Path, kafka: dict[str, Any], **sections: Any) -> Path:
        path = folder / f"{uuid.uuid4().hex}.yaml"
        path.write_text(yaml.safe_dump({"bus": {"kind": "kafka", "kafka": kafka}, **sections}))
        return path


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    secured = Secured(tmp_path_factory.mktemp("secured"), broker_module())
    try:
        secured.cluster.start()
        with contextlib.closing(open_bus(secured, "CLIENTS", "operator")) as bus:
            settings = load_settings(None, {})
            bus.create_topics(topic_settings(settings.topics))
        yield secured
    finally:
        secured.cluster.stop()


def open_bus(secured: Secured, listener: str, user: str | None = None, **changes: Any) -> KafkaBus:
    path = secured.config_file(secured.data, secured.kafka(listener, user, **changes))
    return KafkaBus(load_settings(path, {}).bus.kafka)


@pytest.fixture
def opened(secured: Secured) -> Iterator[Callable[..., KafkaBus]]:
    buses: list[KafkaBus] = []

    def make(listener: str, user: str | None = None, **changes: Any) -> KafkaBus:
        buses.append(open_bus(secured, listener, user, **changes))
        return buses[-1]

    yield make
    for bus in buses:
        with contextlib.suppress(BusUnavailable):  # what was refused is still not stored
            bus.close()


Opened = Callable[..., KafkaBus]


# --- TLS


def test_a_client_certificate_is_a_user(opened: Opened) -> None:
    assert opened("CERTIFIED", "detector").partitions(CHUNKS) == 8


def test_a_broker_of_another_authority_is_refused(secured: Secured, opened: Opened) -> None:
    other = str(secured.data / "certificates" / "detector.pem")  # a certificate, but not of who signed the broker's
    with pytest.raises(BusUnavailable, match=r"not signed by an authority that bus\.kafka\.ssl_ca_file names"):
        opened("ONEWAY", ssl_ca_file=other).partitions(CHUNKS)


def test_a_broker_of_another_name_is_refused_unless_names_are_not_checked(opened: Opened) -> None:
    with pytest.raises(BusUnavailable, match=r"for another name .*127\.0\.0\.1.*ssl_check_hostname"):
        opened("ELSEWHERE").partitions(CHUNKS)
    with pytest.raises(BusUnavailable, match="refused this user"):  # it got as far as the ACLs
        opened("ELSEWHERE", ssl_check_hostname=False).partitions(CHUNKS)


def test_a_client_certificate_that_is_demanded_and_missing(opened: Opened) -> None:
    with pytest.raises(BusUnavailable, match=r"demands a client certificate.*ssl_certificate_file"):
        opened("CERTIFIED").partitions(CHUNKS)


def test_tls_and_no_tls_that_meet_are_told_apart(secured: Secured, opened: Opened) -> None:
    with pytest.raises(BusUnavailable, match=r"speaks TLS; set bus\.kafka\.security_protocol"):
        opened("ONEWAY", security_protocol="PLAINTEXT", ssl_ca_file=None).partitions(CHUNKS)
    with pytest.raises(BusUnavailable, match=r"does not speak TLS .*security_protocol to PLAINTEXT"):
        opened("PLAINONLY").partitions(CHUNKS)


def test_a_broker_that_is_not_there_and_a_name_without_address(opened: Opened) -> None:
    with pytest.raises(BusUnavailable, match=r"127\.0\.0\.1:1 .* can't be reached \(Connection refused\)"):
        opened("ONEWAY", bootstrap_servers=["127.0.0.1:1"]).partitions(CHUNKS)
    with pytest.raises(BusUnavailable, match=r"nowhere\.invalid .* has no address"):
        opened("ONEWAY", bootstrap_servers=["nowhere.invalid:9092"]).partitions(CHUNKS)


def test_tls_files_that_cant_be_used_name_the_setting(secured: Secured, opened: Opened, tmp_path: Path) -> None:
    key = secured.data / "certificates" / "producer.key"  # of another certificate
    with pytest.raises(ConfigError, match=r"bus\.kafka\.ssl_certificate_file .*detector\.pem"):
        opened("CERTIFIED", "detector", ssl_key_file=str(key))
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"bus\.kafka\.ssl_ca_file .*ca\.pem"):
        opened("ONEWAY", ssl_ca_file=str(tmp_path / "ca.pem"))


def test_a_refused_connection_leaves_no_thread_behind(opened: Opened) -> None:
    bus = opened("ONEWAY", bootstrap_servers=["127.0.0.1:1"], request_timeout_seconds=1.0)
    before = threading.active_count()
    for make in (bus.producer, lambda: bus.consumer([CHUNKS], None), lambda: bus.partitions(CHUNKS)):
        with pytest.raises(BusUnavailable):
            make()
    assert threading.active_count() <= before


# --- SASL


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_the_right_password_connects_and_a_wrong_one_names_the_setting(
    opened: Opened, tmp_path: Path, mechanism: str
) -> None:
    assert opened("CLIENTS", "detector", sasl_mechanism=mechanism).partitions(CHUNKS) == 8
    wrong = tmp_path / "password"
    wrong.write_text("wrong-secret-password")
    with pytest.raises(BusUnavailable, match=r"did not believe who connects.*bus\.kafka\.sasl_username") as caught:
        opened("CLIENTS", "detector", sasl_mechanism=mechanism, sasl_password_file=str(wrong)).partitions(CHUNKS)
    assert "wrong-secret" not in "".join(map(str, (caught.value, caught.value.__cause__)))


def test_a_mechanism_that_the_broker_does_not_offer(opened: Opened) -> None:
    listener = {"bootstrap_servers": list(opened("PLAINONLY")._settings.bootstrap_servers)}
    changes = listener | {"security_protocol": "SASL_PLAINTEXT", "ssl_ca_file": None}
    with pytest.raises(BusUnavailable, match=r"does not offer the mechanism of bus\.kafka\.sasl_mechanism"):
        opened("CLIENTS", "detector", **changes).partitions(CHUNKS)


# --- OAUTHBEARER


def test_a_token_of_a_file_and_of_a_command(secured: Secured, opened: Opened, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(secured.security.unsecured_token("detector") + "\n")
    assert opened("TOKENS", oauth_token_file=str(token)).partitions(CHUNKS) == 8
    assert opened("TOKENS", oauth_token_command=["cat", str(token)]).partitions(CHUNKS) == 8


def test_a_token_that_has_ended_is_refused_and_a_renewed_one_picked_up_by_the_same_client(
    secured: Secured, opened: Opened, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text(secured.security.unsecured_token("detector", -3600))
    bus = opened("TOKENS", oauth_token_file=str(token))
    with pytest.raises(BusUnavailable, match="that the token is current"):
        bus.partitions(CHUNKS)
    token.write_text(secured.security.unsecured_token("detector", 4))
    consumer = bus.consumer([CHUNKS], None)
    token.write_text(secured.security.unsecured_token("detector"))
    end = time.monotonic() + 6  # past the first token's end: the client must have proved itself anew
    while time.monotonic() < end:
        consumer.poll(0.2)
    assert bus.partitions(CHUNKS) == 8


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["sh", "-c", "echo s3cret-out; echo s3cret-err >&2; exit 7", "s3cret-arg"], "failed with exit code 7"),
        (["true", "s3cret-arg"], "gave no token: it is empty"),
        (["echo", "two words s3cret-out"], "one word"),
        (["/nowhere/token-program", "s3cret-arg"], "can't be run: No such file or directory"),
    ],
)
def test_a_token_command_that_fails_says_so_without_a_secret(
    opened: Opened, command: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(BusUnavailable, match=message) as caught:
        opened("TOKENS", oauth_token_command=command, request_timeout_seconds=1.0).partitions(CHUNKS)
    assert f"bus.kafka.oauth_token_command: {command[0]}" in str(caught.value)
    assert "s3cret" not in str(caught.value) + caplog.text


def test_a_token_file_that_is_gone_when_it_is_needed(opened: Opened, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a token")
    bus = opened("TOKENS", oauth_token_file=str(token))
    token.unlink()
    with pytest.raises(BusUnavailable, match=r"oauth_token_file: .*token can't be read: No such file"):
        bus.partitions(CHUNKS)


# --- ACLs


def test_every_role_can_do_its_work(opened: Opened) -> None:
    producer = opened("CLIENTS", "producer").producer()
    producer.send(CHUNKS, b"roof-1", b"audio", partition=0)
    producer.flush()
    detector = opened("CLIENTS", "detector")
    consumer = detector.consumer([CHUNKS], GROUP)
    records = poll_some(consumer)
    outputs = detector.producer(transactional_id=f"{GROUP}.one")
    outputs.send(ALERTS, b"roof-1", b"an alert")
    outputs.commit(consumer, {TopicPartition(CHUNKS, 0): Commit(records[-1].offset + 1)})
    assert detector.topic_facts([CHUNKS, ALERTS, "audio.deadletter"])[ALERTS].configs is not None  # type: ignore[union-attr]
    alerts = poll_some(opened("CLIENTS", "subscriber").consumer([ALERTS], None))
    assert [record.value for record in alerts] == [b"an alert"]


def poll_some(consumer: Any) -> list[Any]:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (records := consumer.poll(0.5)):
        assert time.monotonic() < deadline
    return list(records)


def read(bus: KafkaBus) -> None:
    consumer = bus.consumer([CHUNKS], None)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        consumer.poll(0.5)


def join_another_group(bus: KafkaBus) -> None:
    consumer = bus.consumer([CHUNKS], "another-group")
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        consumer.poll(0.5)


def write(bus: KafkaBus) -> None:
    producer = bus.producer()
    producer.send(CHUNKS, None, b"forged")
    producer.flush()


@pytest.mark.parametrize(
    ("user", "act", "needed"),
    [
        ("producer", read, "READ on topic audio.chunks"),
        ("detector", join_another_group, "READ on topic audio.chunks and on group another-group"),
        ("detector", write, "WRITE on topic audio.chunks"),
        (
            "detector",
            lambda bus: bus.producer(transactional_id="another.one"),
            "WRITE and DESCRIBE on transactional id another.one",
        ),
        ("detector", lambda bus: bus.change_topic(CHUNKS, 9, {}), "ALTER and ALTER_CONFIGS on topic audio.chunks"),
        ("subscriber", lambda bus: bus.partitions(CHUNKS), "DESCRIBE on topic audio.chunks"),
        ("detector", lambda bus: bus.create_topics({"new": TOPIC}), "on topic new"),
    ],
)
def test_a_missing_right_is_named_with_the_topic_or_group_and_the_remedy(
    opened: Opened, user: str, act: Callable[[KafkaBus], object], needed: str
) -> None:
    with pytest.raises(BusUnavailable, match="want of a right") as caught:
        act(opened("CLIENTS", user))
    assert needed in str(caught.value)
    assert "docs/kafka.md" in str(caught.value)


TOPIC = topic_settings(load_settings(None, {}).topics)[CHUNKS]


# --- compression


@pytest.mark.parametrize("compression", ["none", "gzip", "lz4", "zstd", "snappy"])
def test_records_come_back_as_they_were_under_every_compression(opened: Opened, compression: str) -> None:
    value = compression.encode() * 5_000
    producer = opened("CLIENTS", "producer", compression=compression).producer()
    consumer = opened("CLIENTS", "operator").consumer([CHUNKS], None, start="latest")
    producer.send(CHUNKS, b"roof-1", value, partition=1)
    producer.flush()
    assert [record.value for record in poll_some(consumer)] == [value]


@pytest.mark.parametrize(
    ("compression", "package"), [("lz4", "lz4"), ("zstd", "zstandard"), ("snappy", "python-snappy")]
)
def test_a_compression_without_its_library_names_the_package(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, compression: str, package: str
) -> None:
    producer = opened("CLIENTS", "producer", compression=compression).producer()
    consumer = opened("CLIENTS", "operator").consumer([CHUNKS], None, start="latest")
    producer.send(CHUNKS, b"roof-1", b"x" * 5_000, partition=2)
    producer.flush()
    for name in {"lz4": ("lz4", "lz4f", "lz4framed"), "zstd": ("zstd",), "snappy": ("snappy",)}[compression]:
        monkeypatch.setattr(codec, name, None)
    with pytest.raises(ConfigError, match=f"pip install {package} "):
        poll_some(consumer)
    monkeypatch.setattr(
        "kafka.KafkaProducer._COMPRESSORS", {compression: (lambda: False, 0)} | {"none": (lambda: True, 0)}
    )
    with pytest.raises(ConfigError, match=rf"bus\.kafka\.compression is {compression}, .*pip install {package} "):
        opened("CLIENTS", "producer", compression=compression).producer()


# --- secrets


def traces(secret: str) -> tuple[bytes, ...]:
    """The forms in which it might slip out."""
    raw = secret.encode()
    return (raw, base64.b64encode(raw)[:-3], raw.hex().encode(), repr(raw)[2:-1].encode())


def test_what_is_made_for_the_brokers_is_readable_by_its_owner_alone(secured: Secured) -> None:
    private = [*secured.data.glob("secrets/*"), *secured.data.glob("certificates/*.key")]
    private.append(secured.data / "node-1" / "server.properties")
    assert len(private) > 9
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-512", "OAUTHBEARER"])
def test_no_secret_is_in_the_log_at_debug_nor_in_errors(
    secured: Secured, opened: Opened, tmp_path: Path, mechanism: str
) -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    logger = logging.getLogger("kafka")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    token = tmp_path / "token"
    token.write_text(secured.security.unsecured_token("detector"))
    try:
        if mechanism == "OAUTHBEARER":
            secret = token.read_text()
            bus = opened("TOKENS", oauth_token_file=str(token))
        else:
            secret = secured.password("detector")
            bus = opened("CLIENTS", "detector", sasl_mechanism=mechanism)
        bus.partitions(CHUNKS)
        bus.consumer([CHUNKS], None).poll(0.2)
        bus.producer(transactional_id=f"{GROUP}.{uuid.uuid4().hex}").close()
        with pytest.raises(BusUnavailable) as caught:
            bus.partitions("not-allowed")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    text = (written.getvalue() + str(caught.value) + repr(caught.value.__cause__)).encode()
    assert b"SaslAuthenticateRequest" in text  # it was at DEBUG
    assert not [trace for trace in traces(secret) if trace in text]


def test_no_secret_is_in_output_command_lines_or_metrics_of_the_programs(secured: Secured, tmp_path: Path) -> None:
    port = broker_module().free_port()
    config = secured.config_file(
        tmp_path,
        secured.kafka("CLIENTS", "detector"),
        log={"level": "DEBUG"},
        console={"port": port},
        batch={"max_batch": 4},
    )
    secrets = [secured.password(user) for user in secured.security.USERS]
    seen = b""
    with subprocess.Popen(
        [DETECTOR, "run", "--config", config], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as daemon:
        try:
            for command in (["check"], ["topics", "check"], ["topics", "create"]):
                result = subprocess.run([DETECTOR, *command, "--config", config], capture_output=True, check=False)
                assert result.returncode == 0, result.stderr
                seen += result.stdout + result.stderr
            seen += metrics_when_ready(port, daemon)
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    seen += (process / "cmdline").read_bytes() + b"\n"
        finally:
            daemon.terminate()
            output, _ = daemon.communicate(timeout=DEADLINE_SECONDS)
    assert daemon.returncode == 0, output.decode()
    seen += output
    assert b"Ready: kafka bus" in seen
    assert b"**********" in seen  # of `detector check`
    assert b"kafka.Kafka" in seen  # of the broker's command line
    assert not [secret for secret in secrets for trace in traces(secret) if trace in seen]


def metrics_when_ready(port: int, daemon: subprocess.Popen[bytes]) -> bytes:
    import requests

    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        assert daemon.poll() is None
        assert time.monotonic() < deadline
        with contextlib.suppress(requests.ConnectionError):
            if requests.get(f"http://127.0.0.1:{port}/readyz", timeout=5).ok:
                return requests.get(f"http://127.0.0.1:{port}/metrics", timeout=5).content
        daemon_wait(daemon)


def daemon_wait(daemon: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        daemon.wait(0.1)
