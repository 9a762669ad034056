"""How a Kafka client proves who it is and to whom it speaks: TLS, SASL, tokens; and why a connection failed.

``connection`` makes of the settings what every client of the library takes. The library itself says of a failed TLS
handshake only that it could not connect in time; ``why_not_connected`` finds the reason by connecting once by hand.
Secrets stay out of every text here, and out of what the library writes to its log at DEBUG.
"""

from __future__ import annotations

import logging
import select
import socket
import ssl
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kafka import errors
from kafka.net.compat import KafkaNetClient
from kafka.net.inet import KafkaNetSocket
from kafka.net.manager import KafkaConnectionManager
from kafka.net.sasl.oauth import AbstractTokenProvider
from kafka.net.selector import NetworkSelector
from kafka.net.transport import KafkaSSLTransport, KafkaTCPTransport

from detector.errors import BusUnavailable, ConfigError

if TYPE_CHECKING:
    from detector.config import KafkaSettings

METADATA_AGE_SECONDS = 10.0  # how soon a new topic or partition is noticed

_BOOTSTRAP_SECONDS = 10.0
_FIRST_ANSWER_MS = 4_000.0
_PROBE_SECONDS = 3.0
_TOKEN_SECONDS = 5.0  # the client waits for it, heartbeats too: well below a session timeout
_MAX_TOKEN_BYTES = 1 << 20
_REFUSED = (errors.SaslAuthenticationFailedError, errors.UnsupportedSaslMechanismError)
_DENIED = (errors.AuthorizationError, *_REFUSED)
_REMEDY_ACL = "Grant it (the table of ACLs in docs/kafka.md), or name another user in bus.kafka.sasl_username."


class _NoToken(errors.SaslAuthenticationFailedError):
    """There is no token to show; ``text`` says why. The library treats it as a refused login."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class _TokenProvider(AbstractTokenProvider):
    """The OAUTHBEARER token as a file or a command gives it, asked anew at each connection."""

    def __init__(self, token_file: Path | None, command: Sequence[str] | None) -> None:
        super().__init__()
        self._token_file = token_file
        self._command = command

    def token(self) -> str:
        return self._read() if self._token_file is not None else self._ask()

    def _read(self) -> str:
        assert self._token_file is not None
        try:
            with self._token_file.open(encoding="utf-8") as file:
                token = file.read(_MAX_TOKEN_BYTES)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no UTF-8"
            raise _NoToken(
                f"bus.kafka.oauth_token_file: {self._token_file} can't be read: {reason}. Write the current token "
                "there, alone."
            ) from None
        return _checked(token, f"bus.kafka.oauth_token_file: {self._token_file}")

    def _ask(self) -> str:
        assert self._command is not None
        # Of the command only the program: neither arguments nor output, as either may hold a secret.
        name = f"bus.kafka.oauth_token_command: {self._command[0]}"
        try:
            result = subprocess.run(
                self._command, capture_output=True, timeout=_TOKEN_SECONDS, check=False, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            raise _NoToken(f"{name} printed no token within {_TOKEN_SECONDS:g} s.") from None
        except (OSError, ValueError) as error:
            raise _NoToken(
                f"{name} can't be run: {getattr(error, 'strerror', None) or type(error).__name__}. Name the program by "
                "its full path."
            ) from None
        if result.returncode:
            raise _NoToken(
                f"{name} failed with exit code {result.returncode}. Run it by hand as this user; what it printed is "
                "not shown here, since it may hold a secret."
            )
        return _checked(result.stdout.decode("utf-8", "replace"), name)


def _checked(text: str, name: str) -> str:
    """The token in ``text``. Raises _NoToken for what can be none (RFC 6750: printable ASCII without spaces)."""
    token = text.strip()
    if not token:
        raise _NoToken(f"{name} gave no token: it is empty.")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise _NoToken(f"{name} gave no token: a token is one word of printable ASCII. It is to hold nothing else.")
    return token


class _HideSecrets(logging.Filter):
    """Keeps secrets out of what the library logs at DEBUG: SASL requests, raw bytes, whole configurations."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, Mapping):
            record.args = {key: _MASK if _is_secret(str(key)) else value for key, value in record.args.items()}
        elif record.args:
            record.args = tuple(map(_harmless, record.args))
        return True


_MASK = "**********"
_LOGGERS = ("kafka.net.connection", "kafka.protocol.parser", "kafka.admin.client", "kafka.client_async")
_FILTER = _HideSecrets()


def _is_secret(key: str) -> bool:
    return key.endswith("password") or key.startswith("sasl_plain")


def _harmless(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{len(value)} bytes"
    if type(value).__name__.startswith(("SaslAuthenticate", "SaslBytes")):
        return type(value).__name__
    if isinstance(value, Mapping):
        return {key: _MASK if _is_secret(str(key)) else each for key, each in value.items()}
    return value


class _Manager(KafkaConnectionManager):
    """The library's connections, mended: a login refused at the first connection ends the attempt and is the error.
    As it is, the library loses a broker's last answer when the broker hangs up right after it, takes the hanging up for
    the error, tries on until its time is up, and says no more than that. Once there was a connection it tries again as
    ever, with a token asked for anew."""

    _is_first = True

    async def _build_transport(self, node: Any, timeout_at: float | None = None) -> Any:
        """As the library's, but that a socket which comes to nothing is closed at once."""
        plain = await self._connect_socket(node, timeout_at)
        try:
            if self.ssl_enabled:
                settings = {key: value for key, value in self.config.items() if key.startswith("ssl_")}
                transport = KafkaSSLTransport(self._net, plain, host=node.host, **settings)
            else:
                transport = KafkaTCPTransport(self._net, plain, host=node.host)
        except BaseException:
            plain.close()
            raise
        try:
            await transport.handshake()
        except Exception as error:
            transport._sock.close()
            raise errors.KafkaConnectionError(f"Handshake failed: {error}") from error
        receive = transport._sock_recv

        def receive_all() -> tuple[bytes, BaseException | None]:
            data, error = receive()
            return (data, None) if data else (data, error)  # the error comes again with the next look

        transport._sock_recv = receive_all
        return transport

    async def _connect_socket(self, node: Any, timeout_at: float | None) -> Any:
        maker = KafkaNetSocket()
        last = errors.KafkaConnectionError("DNS Resolution failure")
        for family, kind, protocol, _, address in maker.dns_lookup(node.host, node.port):
            try:
                attempt = maker.socket(family, kind, protocol)
            except OSError as error:
                last = errors.KafkaConnectionError(f"unable to connect: {error}")
                continue
            try:
                attempt.setblocking(False)
                for option in self.config["socket_options"]:
                    attempt.setsockopt(*option)
                return await maker.sock_connect(self._net, attempt, address, timeout_at=timeout_at)
            except errors.KafkaTimeoutError:
                attempt.close()
                raise errors.KafkaConnectionError("Connection timed out") from None
            except (OSError, errors.KafkaConnectionError) as error:
                attempt.close()
                last = errors.KafkaConnectionError(f"unable to connect: {error}")
            except BaseException:
                attempt.close()
                raise
        raise last

    def get_connection(self, node_id: Any, **options: Any) -> Any:
        if self.cluster.is_bootstrap(node_id) and len(self.config["bootstrap_servers"]) > 1:
            # Else one broker that hangs takes all the time there is to find another.
            options["timeout_ms"] = min(options.get("timeout_ms") or _FIRST_ANSWER_MS, _FIRST_ANSWER_MS)
        connection = super().get_connection(node_id, **options)
        if not self.cluster.is_bootstrap(node_id):
            self._is_first = False
        elif self._is_first and "close" not in vars(connection):
            close = connection.close

            def remember_and_close(error: BaseException | None = None) -> None:
                if isinstance(error, _REFUSED):
                    self._auth_failures[node_id] = error  # what ``get_connection`` raises from now on
                close(error)

            connection.close = remember_and_close
        return connection


class _Client(KafkaNetClient):
    """The library's network client with ``_Manager``; see also ``closing_on_failure``."""

    def __init__(self, **configs: Any) -> None:
        # Else busy cores make it warn, on each console, of a loop in the library's own code.
        net = NetworkSelector(**{**configs, "slow_task_threshold_secs": None})
        super().__init__(net=net, manager=_Manager(net, **configs))
        begun = _begun.get()
        if begun is not None:
            begun.append(self)


_begun: ContextVar[list[_Client] | None] = ContextVar("_begun", default=None)


@contextmanager
def closing_on_failure() -> Iterator[None]:
    """Where a client's making raises inside, end its thread and sockets: the library leaves them behind, and a daemon
    that tries again for hours would gather them."""
    begun: list[_Client] = []
    token = _begun.set(begun)
    try:
        yield
    except BaseException:
        for client in begun:
            client.close()
        raise
    finally:
        _begun.reset(token)


def connection(settings: KafkaSettings) -> dict[str, Any]:
    """What every client of the library takes. Raises ConfigError for certificates that can't be used."""
    for logger in _LOGGERS:
        logging.getLogger(logger).addFilter(_FILTER)
    config: dict[str, Any] = {
        "bootstrap_servers": list(settings.bootstrap_servers),
        "client_id": settings.client_id,
        "security_protocol": settings.security_protocol,
        "request_timeout_ms": int(settings.request_timeout_seconds * 1000),
        "bootstrap_timeout_ms": int(min(settings.request_timeout_seconds, _BOOTSTRAP_SECONDS) * 1000),
        "reconnect_backoff_max_ms": 1000,
        "metadata_max_age_ms": int(METADATA_AGE_SECONDS * 1000),
        "kafka_client": _Client,
    }
    if settings.security_protocol in ("SSL", "SASL_SSL"):
        config["ssl_context"] = _ssl_context(settings)
        config["ssl_check_hostname"] = settings.ssl_check_hostname
    if settings.security_protocol in ("SASL_PLAINTEXT", "SASL_SSL"):
        config["sasl_mechanism"] = settings.sasl_mechanism
        if settings.sasl_mechanism == "OAUTHBEARER":
            config["sasl_oauth_token_provider"] = _TokenProvider(
                settings.oauth_token_file, settings.oauth_token_command
            )
        else:
            name = settings.sasl_username
            if name is not None and settings.sasl_mechanism != "PLAIN":
                name = name.replace("=", "=3D").replace(",", "=2C")  # RFC 5802, left out by the library
            config["sasl_plain_username"] = name
            password = settings.sasl_password
            config["sasl_plain_password"] = None if password is None else password.get_secret_value()
    return config


def _ssl_context(settings: KafkaSettings) -> ssl.SSLContext:
    name, place = "ssl_ca_file", settings.ssl_ca_file
    # An empty password rather than none: OpenSSL would ask for it on the terminal.
    password = "" if settings.ssl_key_password is None else settings.ssl_key_password.get_secret_value()
    try:
        context = ssl.create_default_context(cafile=place)
        context.check_hostname = settings.ssl_check_hostname
        name, place = "ssl_certificate_file", settings.ssl_certificate_file
        if place is not None:
            context.load_cert_chain(place, settings.ssl_key_file, password)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
        with_key = "" if name == "ssl_ca_file" else " with its key in bus.kafka.ssl_key_file"
        raise ConfigError(
            f"bus.kafka.{name}{with_key} can't be used: {place}: {reason}. TLS files must be PEM, belong together and "
            "open with ssl_key_password."
        ) from error
    return context


def denied(error: BaseException, doing: str, needs: str = "") -> BusUnavailable | None:
    """The refusal of this user in this project's words; None for any other error.

    Args:
        error: what the library raised.
        doing: what was tried, to go after "While".
        needs: the rights that it takes, such as "WRITE on topic audio.chunks".
    """
    if not isinstance(error, _DENIED):
        return None
    if isinstance(error, _NoToken):
        return BusUnavailable(f"While {doing}: {error.text}")
    name = type(error).__name__
    if isinstance(error, errors.UnsupportedSaslMechanismError):
        return BusUnavailable(
            f"While {doing}: the broker does not offer the mechanism of bus.kafka.sasl_mechanism ({name}). Set one "
            "that is among sasl.enabled.mechanisms of the broker's listener."
        )
    if isinstance(error, errors.SaslAuthenticationFailedError):
        return BusUnavailable(
            f"While {doing}: Kafka did not believe who connects ({name}). Check bus.kafka.sasl_username and the "
            "password in sasl_password_file; with OAUTHBEARER that the token is current and for this cluster."
        )
    what = f" It needs {needs}." if needs else _named(error)
    return BusUnavailable(f"While {doing}, Kafka refused this user for want of a right ({name}).{what} {_REMEDY_ACL}")


def _named(error: BaseException) -> str:
    """What the library's error tells of the topic or group."""
    kinds = {
        errors.TopicAuthorizationFailedError: "a right on the topic",
        errors.GroupAuthorizationFailedError: "READ on the consumer group",
        errors.ClusterAuthorizationFailedError: "a right on the cluster",
        errors.TransactionalIdAuthorizationFailedError: "WRITE and DESCRIBE on the transactional id",
    }
    right = next((text for kind, text in kinds.items() if isinstance(error, kind)), None)
    names = error.args[0] if error.args else ""
    if isinstance(names, (set, frozenset, list, tuple)):
        names = ", ".join(sorted(map(str, names)))
    return f" It needs {right}{f' {names}' if names else ''}." if right else ""


def why_not_connected(connection: Mapping[str, Any]) -> str | None:
    """One sentence and a remedy for each broker that can't be spoken to; None where nothing is found wrong.

    Connects to each bootstrap server once, with TLS where that is set, at most 3 s each. Takes what ``connection``
    returned.
    """
    found = [text for server in connection["bootstrap_servers"] if (text := _probe(server, connection))]
    return " ".join(dict.fromkeys(found)) or None


def _probe(server: str, connection: Mapping[str, Any]) -> str | None:
    host, _, port = server.rpartition(":")
    host = host.strip("[]")
    context: ssl.SSLContext | None = connection.get("ssl_context")
    try:
        plain = socket.create_connection((host, int(port)), timeout=_PROBE_SECONDS)
    except socket.gaierror:
        return f"The name {host} of bus.kafka.bootstrap_servers has no address; check its spelling and DNS."
    except OSError as error:
        reason = error.strerror or "no answer"
        return f"{server} of bus.kafka.bootstrap_servers can't be reached ({reason}); start it or mend the address."
    with plain:
        if context is None:
            return _probe_without_tls(server, plain)
        try:
            with context.wrap_socket(plain, server_hostname=host) as secured:
                secured.settimeout(0.5)
                # With TLS 1.3 the broker looks at the client's certificate after the handshake; it says so only here.
                secured.recv(1)
        except TimeoutError:
            return None  # it waits for a request: all is well
        except ssl.SSLCertVerificationError as error:
            return _certificate_text(server, error)
        except ssl.SSLError as error:
            return _tls_text(server, error, connection)
        except OSError as error:
            return (
                f"{server} ended the TLS handshake ({error.strerror or type(error).__name__}). Is its listener one for "
                "TLS? Check bus.kafka.security_protocol and, where it demands one, ssl_certificate_file."
            )
    return None


def _probe_without_tls(server: str, plain: socket.socket) -> str | None:
    """A listener with TLS answers what is no TLS by an alert (0x15) or by hanging up."""
    try:
        plain.sendall(bytes(16))  # no request of Kafka either: a plain listener hangs up without a word
        ready, _, _ = select.select([plain], [], [], _PROBE_SECONDS)
        answer = plain.recv(1) if ready else b""
    except OSError:
        return None
    if answer == b"\x15":
        return f"{server} speaks TLS; set bus.kafka.security_protocol to SSL or SASL_SSL."
    return None


def _certificate_text(server: str, error: ssl.SSLCertVerificationError) -> str:
    reason = error.verify_message or error.reason or "it can't be verified"
    if "ostname" in reason or "IP address" in reason:
        return (
            f"The certificate of {server} is for another name ({reason.rstrip('.')}). Put the name of the certificate "
            "into bus.kafka.bootstrap_servers, or have the certificate made for this name too; only on a network of "
            "your own set ssl_check_hostname to false."
        )
    if "expired" in reason or "not yet valid" in reason:
        return f"The certificate of {server} is out of date ({reason}). Renew it, or set this machine's clock right."
    return (
        f"The certificate of {server} is not signed by an authority that bus.kafka.ssl_ca_file names ({reason}). Name "
        "the file with the certificate of the authority that signed it; null means the system's authorities."
    )


def _tls_text(server: str, error: ssl.SSLError, connection: Mapping[str, Any]) -> str:
    reason = error.reason or type(error).__name__
    if "CERTIFICATE_REQUIRED" in reason or "HANDSHAKE_FAILURE" in reason or "BAD_CERTIFICATE" in reason:
        return (
            f"{server} demands a client certificate, or does not accept this one ({reason}). Set "
            "bus.kafka.ssl_certificate_file and ssl_key_file to one that the broker's authority signed."
        )
    if "UNKNOWN_CA" in reason or "CERTIFICATE_UNKNOWN" in reason or "CERTIFICATE_EXPIRED" in reason:
        return (
            f"{server} does not accept this client's certificate ({reason}). Set bus.kafka.ssl_certificate_file to a "
            "current one that an authority of the broker's truststore signed."
        )
    if "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER" in reason or "EOF" in reason:
        plain = "SASL_PLAINTEXT" if connection["security_protocol"] == "SASL_SSL" else "PLAINTEXT"
        return (
            f"{server} does not speak TLS ({reason}). Name its port for TLS in bus.kafka.bootstrap_servers, or, on a "
            f"network of your own, set security_protocol to {plain}."
        )
    return f"The TLS handshake with {server} failed ({reason}). Check bus.kafka.security_protocol and ssl_*."
