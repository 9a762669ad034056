"""Promises of the settings: strict, every error at once, secrets never shown, one door."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from detector import config
from detector.config import Settings, check_report, effective_yaml, load_settings, setting_paths
from detector.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "config.yaml"
SECRETS = {"bus.kafka.sasl_password", "bus.kafka.ssl_key_password"}


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def load(folder: Path, text: str | bytes, **environ: str) -> Settings:
    return load_settings(write(folder, text), environ)


def refused(folder: Path, text: str | bytes, **environ: str) -> list[str]:
    """The error lines, without the heading."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, **environ)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def broken(folder: Path, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    return str(caught.value)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


# --- the shipped file and the schema --------------------------------------------------------------------------------


def test_the_shipped_file_states_every_setting_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert load_settings(SHIPPED, {}) == load_settings(None, {})
    stated = flat(yaml.safe_load(SHIPPED.read_text()))
    assert set(stated) == set(setting_paths()) - SECRETS
    defaults = flat(Settings().model_dump(mode="json"))
    assert stated == {path: defaults[path] for path in stated}


def test_the_shipped_file_explains_every_setting_where_it_stands() -> None:
    lines = SHIPPED.read_text().splitlines()
    section_starts = [n for n, line in enumerate(lines) if line and not line.startswith((" ", "#"))]
    for n in section_starts:
        assert "#" in "".join(lines[n : n + 4]), f"nothing explains {lines[n]}"
    for path in setting_paths():
        section, _, key = path.rpartition(".")
        description = config._SECTIONS[section].model_fields[key].description
        assert description, path
        assert len(description) > 15, path


def test_the_schema_file_is_the_one_the_command_prints() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "detector.config"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert (ROOT / "detector/schemas/config.schema.json").read_text() == printed, "run: make schemas"


def test_the_schema_takes_the_shipped_file_and_refuses_what_load_refuses(tmp_path: Path) -> None:
    schema = config.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(yaml.safe_load(SHIPPED.read_text()))
    assert validator.is_valid({"bus": None})
    refused_by_both: tuple[dict[str, Any], ...] = (
        {"buss": {}},
        {"bus": {"kind": "rabbit"}},
        {"batch": {"hop_seconds": 0.5}},
        {"bus": {"kafka": {"sasl_password": "x"}}},
        {"bus": {"kafka": {"bootstrap_servers": ["no-port"]}}},
        {"decision": {"open_threshold": 1.1}},
        {"console": {"port": 70000}},
    )
    for bad in refused_by_both:
        assert not validator.is_valid(bad), bad
        broken(tmp_path, json.dumps(bad))


def test_importing_the_settings_imports_no_heavy_library() -> None:
    code = (
        "import sys, detector.config; print([m for m in ('tensorflow', 'numpy', 'kafka', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Settings().console.port = 1


def test_what_listens_binds_to_loopback_unless_told_otherwise() -> None:
    assert Settings().console.host == "127.0.0.1"
    assert Settings().bus.kafka.bootstrap_servers == ("127.0.0.1:9092",)


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "---\n", "# only a comment\n", "bus:\n", "bus:\n  kafka:\ndecision:\n", "\ufeffbus:\n"]
)
def test_what_is_left_out_keeps_its_default(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text).decision == Settings().decision


def test_values_are_read_with_their_types(tmp_path: Path) -> None:
    s = load(
        tmp_path,
        "decision: {open_threshold: 5e-1, hold_seconds: 2, family: ['Gunshot, gunfire'], look_alikes: []}\n"
        "bus: {kafka: {bootstrap_servers: [a:1, '[::1]:2'], ssl_check_hostname: false}}\n",
    )
    assert s.decision.open_threshold == 0.5
    assert s.decision.hold_seconds == 2.0
    assert s.decision.family == ("Gunshot, gunfire",)
    assert s.decision.look_alikes == ()
    assert s.bus.kafka.bootstrap_servers == ("a:1", "[::1]:2")
    assert s.bus.kafka.ssl_check_hostname is False


def test_null_means_the_models_own_threshold(tmp_path: Path) -> None:
    assert load(tmp_path, "decision: {open_threshold: null}").decision.open_threshold is None


def test_relative_paths_start_at_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    s = load(tmp_path, "model: {store: weights, name: ./mine}", DETECTOR__BUS__EMBEDDED__PATH="b.sqlite3")
    assert s.model.store == tmp_path / "weights"
    assert Path(s.model.name) == tmp_path / "mine"
    assert s.bus.embedded.path == tmp_path / "b.sqlite3"
    assert load(tmp_path, "").bus.embedded.path == tmp_path / "var/bus.sqlite3"
    assert load_settings(None, {}).bus.embedded.path == other / "var/bus.sqlite3"
    assert load(tmp_path, "model: {store: /abs}").model.store == Path("/abs")


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    s = load(
        tmp_path,
        "bus: {kind: embedded}\nconsole: {port: 1}\ndecision: {open_threshold: 0.5}",
        DETECTOR__BUS__KIND="kafka",
        DETECTOR__BUS__KAFKA__BOOTSTRAP_SERVERS="a:1, b:2",
        DETECTOR__BUS__KAFKA__OAUTH_TOKEN_COMMAND="",
        DETECTOR__CONSOLE__PORT="8080",
        DETECTOR__DECISION__OPEN_THRESHOLD="null",
        DETECTOR__DECISION__FAMILY="Gunshot, gunfire",
        DETECTOR__DECISION__LOOK_ALIKES="[Fireworks, Thunder]",
        DETECTOR="not ours",
        PATH="/bin",
    )
    assert s.bus.kind == "kafka"
    assert s.bus.kafka.bootstrap_servers == ("a:1", "b:2")
    assert s.console.port == 8080
    assert s.decision.open_threshold is None
    assert s.decision.family == ("Gunshot, gunfire",)
    assert s.decision.look_alikes == ("Fireworks", "Thunder")


def test_the_environment_can_mend_a_faulty_value(tmp_path: Path) -> None:
    assert load(tmp_path, "console: {port: x}", DETECTOR__CONSOLE__PORT="1").console.port == 1


# --- refusing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("busses: {}", ["config.yaml:1: busses: not known", "did you mean bus?"]),
        (
            "decision:\n  open_treshold: 0.5",
            ["config.yaml:2: decision.open_treshold", "did you mean decision.open_threshold?"],
        ),
        ("port: 5", ["port: not known", "did you mean console.port?"]),
        ("log: {zzzzqqqq: 5}", ["log.zzzzqqqq: not known", "allowed: level, format"]),
        ("1: 5", ["1: not known"]),
        ("[a, b]: 5", ["a list: not known"]),
        ("console: {port: '1'}", ['console.port: "1"', "a whole number from 0 to 65535"]),
        ("console: {port: true}", ["console.port: true"]),
        ("console: {port: 1.0}", ["console.port: 1.0"]),
        ("console: {port: 65536}", ["console.port: 65536"]),
        ("console: {port: null}", ["console.port: null"]),
        ("console: {port: [1]}", ["console.port: [1]"]),
        ("console: 5", ["console: 5", "a section with host, port"]),
        ("console: [host]", ["console: a list", "a section with"]),
        ("console: {host: ''}", ['console.host: ""']),
        ("log: {level: info}", ['log.level: "info"', "DEBUG, INFO, WARNING or ERROR"]),
        ("batch: {hop_seconds: 0.5}", ["batch.hop_seconds: 0.5", "0.96 or 0.48"]),
        ("batch: {max_batch: 48}", ["batch.max_batch: 48", "a power of two"]),
        ("decision: {open_threshold: .nan}", ["decision.open_threshold: .nan", "from 0 to 1 or null"]),
        ("decision: {false_alerts_per_day: -1}", ["a number, over 0 and at most 10000 or null"]),
        ("bus: {embedded: {retention_seconds: .inf}}", ["bus.embedded.retention_seconds: .inf", "at least 1"]),
        ("decision: {hold_seconds: .inf}", ["decision.hold_seconds: .inf"]),
        ("decision: {hold_seconds: -.inf}", ["decision.hold_seconds: -.inf"]),
        ("decision: {family: []}", ["decision.family: []"]),
        ("decision: {family: Gunshot}", ['decision.family: "Gunshot"', "a list of texts or null"]),
        ("decision: {family: [a, 1]}", ['decision.family: ["a", 1]']),
        ("topics: {chunks: a b}", ['topics.chunks: "a b"', "A-Z a-z 0-9 . _ -"]),
        ("topics: {chunks: ..}", ['topics.chunks: ".."']),
        ("bus: {kafka: {bootstrap_servers: [a]}}", ["bus.kafka.bootstrap_servers", "HOST:PORT"]),
        ("bus: {kafka: {bootstrap_servers: ['user:pw@a:1']}}", ["bus.kafka.bootstrap_servers", "HOST:PORT"]),
        ("bus: {kafka: {bootstrap_servers: []}}", ["bus.kafka.bootstrap_servers: []"]),
        ("bus: {embedded: {path: 5}}", ["bus.embedded.path: 5", "a path"]),
        ('bus: {embedded: {path: "a\\0b"}}', ["bus.embedded.path"]),
        ("log: {level: INFO}\nlog: {level: INFO}", ["config.yaml:2: log: stands twice, first at config.yaml:1"]),
        ("log: {level: INFO,\n  level: INFO}", ["config.yaml:2: log.level: stands twice"]),
    ],
)
def test_each_refusal_names_the_key_the_value_and_what_is_allowed(tmp_path: Path, text: str, parts: list[str]) -> None:
    lines = refused(tmp_path, text)
    assert len(lines) == 1, lines
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "decision: {open_threshold: 0.3, close_threshold: 0.5}",
            ["decision.close_threshold", "decision.open_threshold", "0.5 is over 0.3"],
        ),
        ("decision: {min_support: 4, support_window_examples: 3}", ["decision.min_support", "4 is over 3"]),
        ("decision: {hold_seconds: 61}", ["decision.hold_seconds", "61.0 is over 60.0"]),
        ("decision: {family: [a, b], look_alikes: [b]}", ["decision.family", 'both hold ["b"]']),
        ("daemon: {rebuild_max_seconds: 10}", ["daemon.rebuild_max_seconds", "10.0 is under 69.6"]),
        ("topics: {chunks_retention_seconds: 100}", ["topics.chunks_retention_seconds", "100.0 is under 120.0"]),
        ("topics: {alerts: audio.chunks}", ["topics.chunks", "topics.alerts", "a name of its own"]),
        (
            "daemon: {delivery: exactly_once, commit_interval_seconds: 31}",
            ["daemon.commit_interval_seconds", "exactly_once"],
        ),
        (
            "bus: {embedded: {session_timeout_seconds: 1, poll_interval_seconds: 0.9}}",
            ["bus.embedded.poll_interval_seconds"],
        ),
        ("bus: {kind: kafka, kafka: {max_poll_interval_seconds: 5}}", ["daemon.drain_seconds", "10.0 is over 5.0"]),
        (
            "bus: {kind: kafka, kafka: {security_protocol: SASL_SSL}}",
            ["bus.kafka.sasl_mechanism", "null with SASL_SSL"],
        ),
        ("bus: {kind: kafka, kafka: {ssl_ca_file: /x}}", ["bus.kafka.ssl_ca_file", "security_protocol is PLAINTEXT"]),
        (
            "bus: {kind: kafka, kafka: {security_protocol: SASL_SSL, sasl_mechanism: OAUTHBEARER}}",
            ["bus.kafka.oauth_token_file", "bus.kafka.oauth_token_command", "both null"],
        ),
        (
            "bus: {kind: kafka, kafka: {security_protocol: SASL_SSL, sasl_mechanism: OAUTHBEARER,\n"
            "  oauth_token_file: a, oauth_token_command: [b]}}",
            ["bus.kafka.oauth_token_file", "both set"],
        ),
        ("bus: {kind: kafka, kafka: {oauth_token_file: a}}", ["bus.kafka.oauth_token_file", "sasl_mechanism is null"]),
        (
            "bus: {kind: kafka, kafka: {security_protocol: SSL, ssl_key_file: a}}",
            ["bus.kafka.ssl_certificate_file", "a key needs its certificate"],
        ),
    ],
)
def test_values_that_contradict_each_other_are_both_named(tmp_path: Path, text: str, parts: list[str]) -> None:
    lines = refused(tmp_path, text)
    assert len(lines) == 1, lines
    for part in parts:
        assert part in lines[0]


def test_a_mechanism_needs_its_protocol_and_its_user_and_password(tmp_path: Path) -> None:
    lines = refused(tmp_path, "bus: {kind: kafka, kafka: {security_protocol: SASL_SSL, sasl_mechanism: SCRAM-SHA-512}}")
    assert len(lines) == 2
    assert "bus.kafka.sasl_username" in lines[0]
    assert "DETECTOR__BUS__KAFKA__SASL_PASSWORD" in lines[1]
    (line,) = refused(tmp_path, "bus: {kind: kafka, kafka: {sasl_mechanism: PLAIN, sasl_username: u}}")
    assert "PLAIN with PLAINTEXT" in line


def test_all_errors_come_at_once_and_contradictions_beside_faulty_values(tmp_path: Path) -> None:
    lines = refused(
        tmp_path,
        "buss: 1\nconsole: {port: x, host: 5}\nlog: 3\n"
        "decision: {open_threshold: 0.2, close_threshold: 0.4, min_support: 0}\n"
        "topics: {chunks: same, alerts: same}\n",
        DETECTOR__LOG__LEVEL="LOUD",
        DETECTOR__NO__SUCH="1",
        DETECTOR__LOG__FORMAT="[",
    )
    for part in (
        "buss", "console.port", "console.host", "log: 3", "decision.close_threshold", "decision.min_support",
        "topics.chunks", "environment DETECTOR__LOG__LEVEL: log.level", "DETECTOR__NO__SUCH", "log.format",
    ):  # fmt: skip
        assert any(part in line for line in lines), part
    assert len(lines) == 10


def test_a_contradiction_with_a_faulty_value_is_not_invented(tmp_path: Path) -> None:
    (line,) = refused(tmp_path, "decision: {min_support: 9, support_window_examples: 0}")
    assert "decision.support_window_examples: 0" in line


def test_an_unknown_variable_is_refused_with_the_nearest(tmp_path: Path) -> None:
    (line,) = refused(tmp_path, "", DETECTOR__CONSOLE__PROT="1")
    assert line == "environment: DETECTOR__CONSOLE__PROT: not known; did you mean DETECTOR__CONSOLE__PORT?"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("bus:\n  kind: [a\n", ["config.yaml:3:1", "no valid YAML"]),
        ("bus:\n\tkind: a\n", ["config.yaml:2:1", "no valid YAML"]),
        ("a: 1\n---\nb: 2\n", ["config.yaml:2:1", "no valid YAML"]),
        ("a: &x 1\nb: *x\n", ["config.yaml:1:4", "anchors"]),
        (b"bus:\n  kind: \xff\n", ["config.yaml:2", "0xff", "UTF-8"]),
        (b"bus:\n  kind: \x07\n", ["config.yaml:2", "no valid YAML"]),
        ("- a\n", ["config.yaml:1", "a list", "allowed: sections, bus, topics"]),
        ("text", ['"text"', "sections"]),
        ("[" * 20_000, ["nested too deeply"]),
        ("a" * (1 << 20) + "b", ["1048576 bytes"]),
    ],
)
def test_what_is_no_yaml_is_refused_with_its_place(tmp_path: Path, text: str | bytes, parts: list[str]) -> None:
    message = broken(tmp_path, text)
    for part in parts:
        assert part in message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path, Path("a\0b")):
        with pytest.raises(ConfigError, match="can't be read"):
            load_settings(path, {})


def test_a_tag_never_makes_an_object(tmp_path: Path) -> None:
    (line,) = refused(tmp_path, "console: {host: !!python/object/apply:os.getcwd []}")
    assert "console.host: []" in line


def test_exit_code_is_that_of_sysexits() -> None:
    assert ConfigError.exit_code == 78


# --- secrets --------------------------------------------------------------------------------------------------------

SASL = "bus: {{kind: kafka, kafka: {{security_protocol: SASL_SSL, sasl_mechanism: PLAIN, sasl_username: u{0}}}}}"


@pytest.mark.parametrize("key", sorted(SECRETS))
def test_a_secret_in_the_file_is_refused_with_the_remedy_and_not_shown(tmp_path: Path, key: str) -> None:
    name = key.rpartition(".")[2]
    (line,) = refused(tmp_path, f"bus: {{kafka: {{{name}: hunter2}}}}")
    assert f"{key}_file" in line
    assert f"DETECTOR__BUS__KAFKA__{name.upper()}" in line
    assert "hunter2" not in line


def test_a_secret_comes_from_the_environment_as_it_is(tmp_path: Path) -> None:
    s = load(tmp_path, SASL.format(""), DETECTOR__BUS__KAFKA__SASL_PASSWORD=" [x: 'y ")
    assert s.bus.kafka.sasl_password == SecretStr(" [x: 'y ")


def test_a_secret_comes_from_a_file_without_its_line_end(tmp_path: Path) -> None:
    (tmp_path / "password").write_bytes("hünter2 \r\n".encode())
    s = load(tmp_path, SASL.format(", sasl_password_file: password"))
    assert s.bus.kafka.sasl_password == SecretStr("hünter2 ")


@pytest.mark.parametrize("content", [b"", b"\n", b"two\nlines", b"\xff\xfe", b"x" * 20_000, None])
def test_a_secret_file_that_holds_no_secret_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "password").write_bytes(content)
    (line,) = refused(tmp_path, SASL.format(", sasl_password_file: password"))
    assert "bus.kafka.sasl_password_file" in line
    assert "two" not in line


def test_two_sources_of_one_secret_are_a_contradiction(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("hunter2")
    (line,) = refused(
        tmp_path, SASL.format(", sasl_password_file: password"), DETECTOR__BUS__KAFKA__SASL_PASSWORD="hunter3"
    )
    assert "one of the two" in line
    assert "hunter" not in line


def test_an_empty_secret_is_refused(tmp_path: Path) -> None:
    lines = refused(tmp_path, SASL.format(""), DETECTOR__BUS__KAFKA__SASL_PASSWORD="")
    assert "an empty secret" in lines[0]


def test_a_login_in_a_broker_address_is_refused_and_not_shown(tmp_path: Path) -> None:
    for text in ("['user:hunter2@a:1', 'b:2']", "'user:hunter2@a:1,b:2'"):
        (line,) = refused(tmp_path, f"bus: {{kafka: {{bootstrap_servers: {text}}}}}")
        assert "b:2" in line
        assert "hunter2" not in line


def test_no_output_ever_holds_a_secret(tmp_path: Path) -> None:
    environ = {"DETECTOR__BUS__KAFKA__SASL_PASSWORD": "hunter2", "DETECTOR__BUS__KAFKA__SSL_KEY_PASSWORD": "swordfish"}
    (tmp_path / "cert").write_text("x")
    path = write(tmp_path, SASL.format(", ssl_certificate_file: cert"))
    s = load_settings(path, environ)
    outputs = [check_report(path, environ), effective_yaml(s), repr(s), str(s), s.model_dump_json()]
    with pytest.raises(ConfigError) as caught:
        load_settings(write(tmp_path, SASL.format("") + "\nconsole: {port: x}\nx: 1"), environ)
    outputs.append(str(caught.value))
    for output in outputs:
        assert "hunter2" not in output
        assert "swordfish" not in output
    assert f"sasl_password: '{config.MASK}'" in outputs[0]
    assert "overridden by DETECTOR__BUS__KAFKA__SASL_PASSWORD" in outputs[0]


def test_files_that_kafka_needs_must_be_there(tmp_path: Path) -> None:
    text = "bus: {kind: kafka, kafka: {security_protocol: SSL, ssl_ca_file: ca.pem, ssl_certificate_file: c.pem}}"
    lines = refused(tmp_path, text)
    assert len(lines) == 2
    assert all("not there or not readable" in line for line in lines)
    for name in ("ca.pem", "c.pem"):
        (tmp_path / name).write_text("")
    assert load(tmp_path, text).bus.kafka.ssl_ca_file == tmp_path / "ca.pem"


# --- round trip and fuzz --------------------------------------------------------------------------------------------


def test_the_effective_settings_are_a_config_that_gives_the_same(tmp_path: Path) -> None:
    s = load(tmp_path, "console: {port: 1}\ndecision: {family: ['Gunshot, gunfire', 'null', '1']}")
    assert load(tmp_path, effective_yaml(s)) == s


_FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["a:1", "kafka"])
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def only_config_errors(folder: Path, data: bytes) -> None:
    path = folder / "fuzz.yaml"
    path.write_bytes(data)
    with contextlib.suppress(ConfigError):
        effective_yaml(load_settings(path, {}))


@_FUZZ
@given(data=st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_config_error(tmp_path: Path, data: bytes) -> None:
    only_config_errors(tmp_path, data)


@_FUZZ
@given(text=st.text(alphabet=st.sampled_from("busdeci:kn ,{}[]'\"\n#-&*!|>%@`0.9e_~?<=\t\\x"), max_size=60))
@example("<<: {bus: 1}")
@example("? [a]\n: b")
@example("!!int 'x': !!float y")
@example("console: {port: !!int x, host: !!binary aGk=}")
@example("console: {port: " + "9" * 5000 + "}")
@example("decision: {open_threshold: 1e999}")
@example("decision: {family: !!set {a, b}, look_alikes: !!timestamp 2001-01-01}")
@example("model: {name: ~no-such-user/x, store: ~no-such-user/x}")
@example('model: {name: "a/\\ud800", store: "\\ud800"}')
@example("bus: {embedded: {path: '" + "x" * 5000 + "'}}")
def test_no_yaml_raises_anything_but_a_config_error(tmp_path: Path, text: str) -> None:
    only_config_errors(tmp_path, text.encode())


@_FUZZ
@given(path=st.sampled_from(setting_paths()), value=_VALUES)
def test_no_value_of_any_setting_raises_anything_but_a_config_error(tmp_path: Path, path: str, value: Any) -> None:
    tree: Any = value
    for key in reversed(path.split(".")):
        tree = {key: tree}
    only_config_errors(tmp_path, json.dumps(tree).encode())


@_FUZZ
@given(path=st.sampled_from(setting_paths()), text=st.text(max_size=30))
def test_no_variable_raises_anything_but_a_config_error(path: str, text: str) -> None:
    variable = "DETECTOR__" + path.upper().replace(".", "__")
    with contextlib.suppress(ConfigError):
        effective_yaml(load_settings(None, {variable: text}))


@settings(deadline=None, max_examples=100)
@given(
    port=st.integers(0, 65535),
    threshold=st.none() | st.floats(0, 1),
    family=st.none() | st.lists(st.text("abé, 1'", min_size=1), min_size=1),
)
def test_every_valid_value_survives_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory, port: int, threshold: float | None, family: list[str] | None
) -> None:
    folder = tmp_path_factory.getbasetemp()
    family = None if family is None else [label for label in family if label.strip()] or None
    tree = {"console": {"port": port}, "decision": {"open_threshold": threshold, "family": family}}
    s = load(folder, yaml.safe_dump(tree))
    assert (s.console.port, s.decision.open_threshold) == (port, threshold)
    assert s.decision.family == (None if family is None else tuple(family))
    assert load(folder, effective_yaml(s)) == s
