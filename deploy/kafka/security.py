"""What a secured trial cluster consists of: certificates, users with passwords, listeners, and least-privilege ACLs.

``broker.py`` calls this. Certificates are made with ``openssl``; users and ACLs are set through the admin API with the
administrator's certificate (needs the project's environment, for kafka-python). Nothing secret stands on a command
line; every file made here is readable by its owner alone.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
USERS = ("producer", "detector", "subscriber", "operator")

_CA_DAYS = 3650
_LEAF_DAYS = 825
_SCRAM_ITERATIONS = 4096
_NAMES = ("localhost", "127.0.0.1")
_JAAS = "org.apache.kafka.common.security"
_CHUNKS, _ALERTS, _DEADLETTER, _GROUP = "audio.chunks", "gunfire.alerts", "audio.deadletter", "gunfire-detector"

# user -> (kind, name, "literal" or "prefixed", operations). READ and WRITE include DESCRIBE. docs/kafka.md says why.
ACLS: dict[str, tuple[tuple[str, str, str, tuple[str, ...]], ...]] = {
    "producer": (("TOPIC", _CHUNKS, "literal", ("WRITE",)),),
    "detector": (
        ("TOPIC", _CHUNKS, "literal", ("READ", "DESCRIBE_CONFIGS")),
        (
            "TOPIC",
            _ALERTS,
            "literal",
            ("READ", "WRITE", "DESCRIBE_CONFIGS"),
        ),  # READ: to close what another model opened
        ("TOPIC", _DEADLETTER, "literal", ("WRITE", "DESCRIBE_CONFIGS")),
        ("GROUP", _GROUP, "literal", ("READ",)),
        ("TRANSACTIONAL_ID", f"{_GROUP}.", "prefixed", ("WRITE",)),
    ),
    "subscriber": (
        ("TOPIC", _ALERTS, "literal", ("READ",)),
        ("GROUP", "subscriber", "prefixed", ("READ",)),
    ),
    "operator": (
        ("TOPIC", _CHUNKS, "literal", ("CREATE", "READ", "WRITE", "ALTER", "ALTER_CONFIGS", "DESCRIBE_CONFIGS")),
        ("TOPIC", _ALERTS, "literal", ("CREATE", "READ", "ALTER", "ALTER_CONFIGS", "DESCRIBE_CONFIGS")),
        ("TOPIC", _DEADLETTER, "literal", ("CREATE", "READ", "WRITE", "ALTER", "ALTER_CONFIGS", "DESCRIBE_CONFIGS")),
        ("TRANSACTIONAL_ID", f"{_GROUP}.deadletters", "literal", ("WRITE",)),
    ),
}


class SecurityError(Exception):
    """What failed and what to do about it."""


def certificate(data: Path, name: str) -> Path:
    """Certificate of ``ca``, ``broker``, ``admin`` or a user; its key lies beside it, ``.key``."""
    return data / "certificates" / f"{name}.pem"


def password_file(data: Path, user: str) -> Path:
    return data / "secrets" / f"{user}.password"


def missing_tools() -> list[str]:
    return [] if shutil.which("openssl") else ["openssl"]


# --- certificates ----------------------------------------------------------------------------------------------------


def make_certificates(data: Path, names: Sequence[str] = _NAMES) -> None:
    """An authority, a certificate for the brokers under ``names``, one for the administrator and for each user.

    What is there already stays. Raises SecurityError with openssl's words.
    """
    folder = data / "certificates"
    _private_folder(folder)
    if not certificate(data, "ca").exists():
        request = ["req", "-x509", "-days", str(_CA_DAYS), "-subj", "/CN=Gunfire detector trial authority"]
        extensions = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign"]
        key = ["-keyout", str(folder / "ca.key"), "-out", str(folder / "ca.part")]
        _openssl([*request, *_NEW_KEY, *extensions, *key])
        (folder / "ca.part").rename(certificate(data, "ca"))
    make_certificate(data, "broker", names)
    for user in ("admin", *USERS):
        make_certificate(data, user, ())


def make_certificate(data: Path, subject: str, names: Sequence[str]) -> Path:
    """Sign one for ``CN=subject``, valid for ``names`` (hosts, addresses); the brokers' file also holds the key."""
    path = certificate(data, subject)
    if path.exists():
        return path
    folder, key, part = path.parent, path.with_suffix(".key"), path.with_suffix(".part")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        request, extensions = Path(temporary) / "request", Path(temporary) / "extensions"
        _openssl(["req", *_NEW_KEY, "-keyout", str(key), "-out", str(request), "-subj", f"/CN={subject}"])
        alternatives = ",".join(f"{'IP' if name.replace('.', '').isdigit() else 'DNS'}:{name}" for name in names)
        extensions.write_text(
            "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n"
            + (f"subjectAltName={alternatives}\n" if names else "")
        )
        sign = ["x509", "-req", "-in", str(request), "-days", str(_LEAF_DAYS), "-extfile", str(extensions)]
        authority = ["-CA", str(folder / "ca.pem"), "-CAkey", str(folder / "ca.key"), "-set_serial"]
        _openssl([*sign, *authority, str(secrets.randbits(126) + 1), "-out", str(part)])
    if names:  # Kafka reads key and certificate from one file
        _private_file(part, part.read_text() + key.read_text())
    part.rename(path)
    return path


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def _openssl(arguments: Sequence[str]) -> None:
    try:
        result = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False, umask=0o077)
    except FileNotFoundError:
        raise SecurityError("openssl is not installed. Debian: apt install openssl") from None
    if result.returncode:
        raise SecurityError(f"openssl {arguments[0]} failed:\n{result.stderr[-2000:]}")


# --- users -----------------------------------------------------------------------------------------------------------


def make_passwords(data: Path) -> None:
    """A random password for each user; those there are stay."""
    for user in USERS:
        path = password_file(data, user)
        if not path.exists():
            _private_folder(path.parent)
            _private_file(path, secrets.token_urlsafe(24) + "\n")


def _passwords(data: Path) -> dict[str, str]:
    return {user: password_file(data, user).read_text().strip() for user in USERS}


def _private_folder(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True, mode=0o700)


def _private_file(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def unsecured_token(user: str, seconds: float = 3600.0) -> str:
    """A token that Kafka's unsecured validator believes: no signature. Anybody can write one; for trials alone."""

    def part(values: Mapping[str, object]) -> str:
        return base64.urlsafe_b64encode(json.dumps(values).encode()).rstrip(b"=").decode()

    now = int(time.time())
    # Kafka refuses a token without any validity; one of a negative validity was issued, and ended, in the past.
    issued = now + min(0, int(2 * seconds))
    return f"{part({'alg': 'none'})}.{part({'sub': user, 'iat': issued, 'exp': now + int(seconds)})}."


# --- what goes into server.properties --------------------------------------------------------------------------------


def listeners(data: Path, *, oauth: bool) -> list[tuple[str, str, dict[str, str]]]:
    """Name, protocol, settings. The clients' first; ``CERTIFIED`` takes client certificates, the brokers' own too."""
    required = {"ssl.client.auth": "required"}
    found = [
        ("CLIENTS", "SASL_SSL", sasl_settings(data)),
        ("CERTIFIED", "SSL", required),
        ("CONTROLLER", "SSL", required),
    ]
    return [*found, ("TOKENS", "SASL_SSL", oauth_settings())] if oauth else found


def sasl_settings(data: Path, mechanisms: Sequence[str] = MECHANISMS) -> dict[str, str]:
    """Of a listener for user names and passwords."""
    users = " ".join(f'user_{user}="{password}"' for user, password in _passwords(data).items())
    settings = {"sasl.enabled.mechanisms": ",".join(mechanisms), "ssl.client.auth": "none"}
    for mechanism in mechanisms:
        module = "plain.PlainLoginModule" if mechanism == "PLAIN" else "scram.ScramLoginModule"
        entry = f"{_JAAS}.{module} required{' ' + users if mechanism == 'PLAIN' else ''};"
        settings[f"{mechanism.lower()}.sasl.jaas.config"] = entry
    return settings


def oauth_settings() -> dict[str, str]:
    """Of a listener for tokens without a signature (trials on loopback alone); who connects proves itself anew as the
    token ends."""
    handler = f"{_JAAS}.oauthbearer.internals.unsecured.OAuthBearerUnsecuredValidatorCallbackHandler"
    return {
        "sasl.enabled.mechanisms": "OAUTHBEARER",
        "ssl.client.auth": "none",
        "oauthbearer.sasl.jaas.config": f"{_JAAS}.oauthbearer.OAuthBearerLoginModule required;",
        "oauthbearer.sasl.server.callback.handler.class": handler,
        "oauthbearer.connections.max.reauth.ms": "3600000",
    }


def properties(data: Path) -> dict[str, str]:
    """For every node: who is who, and that nobody may do what no ACL allows."""
    return {
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(certificate(data, "broker")),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(certificate(data, "ca")),
        "ssl.principal.mapping.rules": "RULE:^CN=([^,]+).*$/$1/,DEFAULT",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:broker;User:admin",
        "allow.everyone.if.no.acl.found": "false",
        "inter.broker.listener.name": "CERTIFIED",
    }


# --- users and ACLs in the cluster -----------------------------------------------------------------------------------


@contextlib.contextmanager
def administrator(data: Path, address: str) -> Iterator[object]:
    """kafka-python's admin client as ``admin``, at a ``CERTIFIED`` listener."""
    try:
        import kafka
    except ModuleNotFoundError:
        raise SecurityError(
            "A secured cluster is set up with kafka-python: run this with the project's .venv/bin/python."
        ) from None
    path = certificate(data, "admin")
    client = kafka.KafkaAdminClient(
        bootstrap_servers=[address],
        security_protocol="SSL",
        ssl_cafile=str(certificate(data, "ca")),
        ssl_certfile=str(path),
        ssl_keyfile=str(path.with_suffix(".key")),
        bootstrap_timeout_ms=20_000,
    )
    try:
        yield client
    finally:
        client.close()


def set_up_users(data: Path, address: str) -> None:
    """SCRAM credentials and ACLs of every user; once for a data folder. Raises SecurityError."""
    done = data / "secrets" / "set-up.json"
    state = json.dumps(ACLS)
    if done.exists() and done.read_text() == state:
        return
    with administrator(data, address) as admin:
        from kafka.admin import (
            ACL,
            ACLOperation,
            ACLPermissionType,
            ACLResourcePatternType,
            ResourcePattern,
            ResourceType,
            ScramMechanism,
            UserScramCredentialUpsertion,
        )

        failed: dict[str, str] = {}
        for mechanism in (ScramMechanism.SCRAM_SHA_256, ScramMechanism.SCRAM_SHA_512):  # one of a user in a request
            outcome = admin.alter_user_scram_credentials(  # type: ignore[attr-defined]
                [
                    UserScramCredentialUpsertion(user, mechanism, password, iterations=_SCRAM_ITERATIONS)
                    for user, password in _passwords(data).items()
                ]
            )
            failed |= {user: text for user, text in outcome.items() if text}
        acls = [
            ACL(
                principal=f"User:{user}",
                host="*",
                operation=ACLOperation[operation],
                permission_type=ACLPermissionType.ALLOW,
                resource_pattern=ResourcePattern(ResourceType[kind], name, ACLResourcePatternType[pattern.upper()]),
            )
            for user, rights in ACLS.items()
            for kind, name, pattern, operations in rights
            for operation in operations
        ]
        refused = admin.create_acls(acls)["failed"]  # type: ignore[attr-defined]
    if failed or refused:
        raise SecurityError(f"The cluster did not take all users and ACLs: {failed or refused}.")
    _private_file(done, state)


def client_settings(data: Path, user: str, addresses: Sequence[str]) -> str:
    """The section ``bus`` of a config.yaml for ``user``."""
    return (
        "bus:\n  kind: kafka\n  kafka:\n"
        f"    bootstrap_servers: [{', '.join(addresses)}]\n"
        "    security_protocol: SASL_SSL\n"
        f"    ssl_ca_file: {certificate(data, 'ca').resolve()}\n"
        "    sasl_mechanism: SCRAM-SHA-512\n"
        f"    sasl_username: {user}\n"
        f"    sasl_password_file: {password_file(data, user).resolve()}\n"
    )
