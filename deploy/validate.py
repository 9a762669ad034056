"""Checks the configuration and everything under deploy/ without Docker, systemd or Prometheus running.

``make check`` calls it: ``python deploy/validate.py``. Exit code 1 and one line for each thing that is wrong.
"""

from __future__ import annotations

import configparser
import contextlib
import fnmatch
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import yaml
from prometheus_client import CollectorRegistry

from detector.config import ENVIRONMENT_PREFIX, Settings, load_settings, schema_text
from detector.errors import ConfigError
from detector.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent

REQUIRED_IN_UNITS = {
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "LockPersonality": "yes",
    "SystemCallArchitectures": "native",
    "ProtectKernelModules": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectKernelLogs": "yes",
    "ProtectControlGroups": "yes",
    "Restart": "on-failure",
    "RestartPreventExitStatus": str(ConfigError.exit_code),
    "StateDirectory": "gunfire",
    "User": "gunfire",
}
MAX_EXPOSURE = 2.0  # of systemd-analyze security, 0 (none) to 10
_SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|CREDENTIAL|API_?KEY", re.IGNORECASE)


def problems(root: Path) -> list[str]:
    """Everything wrong in the checkout at ``root``: ``file: what``, sorted by file."""
    project = _Project.read(root)
    found = [
        *config_problems(root),
        *(p for path in sorted((root / "deploy").glob("Dockerfile*")) for p in dockerfile_problems(path, project)),
        *(p for path in sorted((root / "deploy/systemd").glob("*.service")) for p in unit_problems(path, project)),
        *(p for path in sorted((root / "deploy/systemd").glob("*.conf")) for p in drop_in_problems(path)),
        *prometheus_problems(root / "deploy/prometheus"),
    ]
    return [p.replace(f"{root}/", "") for p in found]


@dataclass(frozen=True, slots=True)
class _Project:
    root: Path
    extras: frozenset[str]
    programs: frozenset[str]
    drain_seconds: float

    @staticmethod
    def read(root: Path) -> _Project:
        setup = configparser.ConfigParser()
        setup.read(root / "setup.cfg")
        scripts = setup["options.entry_points"]["console_scripts"].split("\n")
        return _Project(
            root=root,
            extras=frozenset(setup["options.extras_require"]),
            programs=frozenset(line.partition("=")[0].strip() for line in scripts if line.strip()),
            drain_seconds=Settings().daemon.drain_seconds,
        )


# --- configuration ---------------------------------------------------------------------------------------------------


def config_problems(root: Path) -> Iterator[str]:
    """config.yaml loads, and its schema is current."""
    try:
        load_settings(root / "config.yaml", {})
    except ConfigError as e:
        yield str(e)
    schema = root / "detector/schemas/config.schema.json"
    if not schema.exists() or schema.read_text(encoding="utf-8") != schema_text():
        yield f"{schema}: is not what the settings say; run: make schemas"


def _variable_problems(where: str, variables: Mapping[str, str]) -> Iterator[str]:
    """Settings overridden by an image or a unit are ones there are; no value is a secret."""
    for name, value in variables.items():
        if name.startswith(ENVIRONMENT_PREFIX):
            try:
                load_settings(None, {name: value.replace("%d", "/run/credentials/unit")})
            except ConfigError as e:
                yield f"{where}: {str(e).splitlines()[-1].strip()}"
        if _SECRET_NAME.search(name) and not name.endswith("_FILE"):
            yield f"{where}: {name} looks like a secret; name a file instead ({name}_FILE)"


# --- images ----------------------------------------------------------------------------------------------------------


def dockerfile_problems(path: Path, project: _Project) -> Iterator[str]:
    """The rules an image is built by: pinned base, known parts, an own user, signals that arrive, a health check."""
    instructions = list(_instructions(path.read_text(encoding="utf-8")))
    stages: set[str] = set()
    last: dict[str, str] = {}
    ignored = _docker_ignored(project.root)
    for line, word, rest in instructions:
        where = f"{path}:{line}"
        if word == "FROM":
            image, _, stage = rest.partition(" AS ")
            if image not in stages and not re.fullmatch(r"\S+:(?!latest$)\S+", image):
                yield f"{where}: the base {image!r} has no fixed tag"
            stages.add(stage.strip())
            last = {}
        elif word == "COPY" and not rest.startswith("--from="):
            *sources, _ = rest.split()
            for source in sources:
                if not (project.root / source).exists():
                    yield f"{where}: {source!r} is not in the repository"
                elif ignored(source):
                    yield f"{where}: {source!r} is left out by .dockerignore"
        elif word == "ADD":
            yield f"{where}: ADD fetches and unpacks unasked; use COPY"
        elif word in ("ENV", "ARG"):
            pairs = dict(part.partition("=")[::2] for part in shlex.split(rest))
            yield from _variable_problems(where, pairs)
        elif word == "RUN":
            for extras in re.findall(r"\.\[([a-z,-]+)\]", rest):
                for extra in set(extras.split(",")) - project.extras:
                    yield f"{where}: setup.cfg has no extra {extra!r}"
        last[word] = rest
    user = last.get("USER", "root")
    if user.split(":")[0] in ("root", "0"):
        yield f"{path}: the image runs as root; end with USER"
    entry, command = _exec_form(last.get("ENTRYPOINT", "")), _exec_form(last.get("CMD", ""))
    if entry is None or command is None:
        yield f"{path}: ENTRYPOINT and CMD are not in exec form, so that signals would reach a shell"
    elif entry[0] not in project.programs:
        yield f"{path}: setup.cfg has no program {entry[0]!r}"
    elif entry[0] == "detector":
        health = last.get("HEALTHCHECK", "")
        if "/readyz" not in health or _exec_form(health.partition("CMD ")[2]) is None:
            yield f"{path}: no HEALTHCHECK of /readyz in exec form"


def _instructions(text: str) -> Iterator[tuple[int, str, str]]:
    """``(line, WORD, rest)``, continued lines joined, comments dropped."""
    start = 0
    parts: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or (not line.strip() and not parts):
            continue
        start = start if parts else number
        parts.append(line.rstrip().removesuffix("\\").strip())
        if not line.rstrip().endswith("\\"):
            word, _, rest = " ".join(parts).partition(" ")
            yield start, word.upper(), rest.strip()
            parts = []


def _exec_form(text: str) -> list[str] | None:
    with contextlib.suppress(ValueError):
        words = json.loads(text)
        if isinstance(words, list) and words and all(isinstance(word, str) for word in words):
            return words
    return None


def _docker_ignored(root: Path) -> Any:
    path = root / ".dockerignore"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]

    def ignored(source: str) -> bool:
        out = False
        for pattern in patterns:
            if fnmatch.fnmatch(source, pattern.removeprefix("!")):
                out = not pattern.startswith("!")
        return out

    return ignored


# --- systemd ---------------------------------------------------------------------------------------------------------


def _unit(path: Path) -> dict[str, list[tuple[str, str]]]:
    """Section -> its ``(key, value)`` in order; keys may repeat. Raises ValueError on what is no unit file."""
    sections: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith(("#", ";")):
            continue
        if line.startswith("[") and line.endswith("]"):
            current = sections.setdefault(line[1:-1], [])
            continue
        key, equals, value = line.partition("=")
        if current is None or not equals or not re.fullmatch(r"[A-Za-z]+", key):
            raise ValueError(f"{path}:{number}: {line!r} is no KEY=VALUE in a section")
        current.append((key, value))
    return sections


def _environment(service: list[tuple[str, str]]) -> dict[str, str]:
    return dict(
        part.partition("=")[::2] for key, value in service if key == "Environment" for part in shlex.split(value)
    )


def unit_problems(path: Path, project: _Project) -> Iterator[str]:
    """The rules every service keeps: hardened, an own user, restarted, time enough to drain."""
    try:
        sections = _unit(path)
    except ValueError as e:
        yield str(e)
        return
    for name in ("Unit", "Service", "Install"):
        if name not in sections:
            yield f"{path}: no section [{name}]"
    service = sections.get("Service", [])
    values = dict(service)
    for key, wanted in REQUIRED_IN_UNITS.items():
        if values.get(key) != wanted:
            found = f"{key}={values[key]}" if key in values else f"no {key}"
            yield f"{path}: {found}; every service has {key}={wanted}"
    if not any(key == "SystemCallFilter" for key, _ in service):
        yield f"{path}: no SystemCallFilter"
    if values.get("PrivateDevices") != "yes" and values.get("DevicePolicy") != "closed":
        yield f"{path}: neither PrivateDevices=yes nor DevicePolicy=closed"
    for key, command in service:
        if key.startswith("Exec"):
            program = Path(shlex.split(command)[0])
            if not program.is_absolute() or program.name not in project.programs:
                yield f"{path}: {key}={program} is no absolute path of {', '.join(sorted(project.programs))}"
    stop = values.get("TimeoutStopSec", "")
    if not stop.isdigit() or int(stop) <= project.drain_seconds:
        yield f"{path}: TimeoutStopSec={stop} is not over daemon.drain_seconds ({project.drain_seconds:g})"
    yield from _variable_problems(str(path), _environment(service))
    yield from _systemd_problems(path)


def drop_in_problems(path: Path) -> Iterator[str]:
    """A drop-in is a unit's part; its settings are ones there are."""
    if path.name.endswith(".sysusers.conf"):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        for line in lines:
            if not re.fullmatch(r'[ugmr] \S+ \S+( "[^"]*")?( \S+){0,2}', line):
                yield f"{path}: {line!r} is no line of sysusers.d"
        if not any(line.split()[:2] == ["u", REQUIRED_IN_UNITS["User"]] for line in lines):
            yield f"{path}: does not make the user {REQUIRED_IN_UNITS['User']}"
        return
    try:
        sections = _unit(path)
    except ValueError as e:
        yield str(e)
        return
    if set(sections) != {"Service"}:
        yield f"{path}: sections {sorted(sections)}; a drop-in here has [Service] alone"
    yield from _variable_problems(str(path), _environment(sections.get("Service", [])))


def _systemd_problems(path: Path) -> Iterator[str]:
    """What systemd itself says, where its program is there; it needs no running systemd."""
    systemd = shutil.which("systemd-analyze")
    if systemd is None:
        if os.environ.get("CI") == "true":
            yield f"{path}: systemd-analyze is missing, and in CI nothing is left out; apt-get install systemd"
        return
    with tempfile.TemporaryDirectory() as folder:
        # The programs and the manual are not installed here; everything else is as it will be.
        program = Path(folder, "program")
        program.write_text("#!/bin/sh\n", encoding="utf-8")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        text = re.sub(r"/opt/gunfire/bin/[a-z]+", str(program), path.read_text(encoding="utf-8"))
        unit = Path(folder, path.name.replace("@.", "@instance."))
        unit.write_text(text, encoding="utf-8")
        for arguments in (
            ("verify", "--man=no"),
            ("security", "--offline=yes", f"--threshold={MAX_EXPOSURE * 10:.0f}"),
        ):
            done = subprocess.run(
                [systemd, *arguments, str(unit)],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                env={**os.environ, "SYSTEMD_PAGER": "", "SYSTEMD_LOG_LEVEL": "warning"},
            )
            output = done.stderr if arguments[0] == "verify" else done.stdout
            mentions = [line for line in output.splitlines() if unit.name in line]
            if done.returncode != 0 or (arguments[0] == "verify" and mentions):
                said = " ".join(mentions[-1:] or output.splitlines()[-1:]) or f"exit code {done.returncode}"
                yield f"{path}: systemd-analyze {arguments[0]}: {said.replace(folder, '').strip()}"


# --- Prometheus ------------------------------------------------------------------------------------------------------


def prometheus_problems(folder: Path) -> Iterator[str]:
    """prometheus.yml and its rules: their form, and that each series they name is one that the detector has."""
    path = folder / "prometheus.yml"
    scrape = _yaml(path)
    if isinstance(scrape, str):
        yield scrape
        return
    yield from _keys(path, scrape, {"global", "rule_files", "scrape_configs"}, {"scrape_configs"})
    jobs = set()
    for job in scrape.get("scrape_configs") or []:
        yield from _keys(path, job, {"job_name", "static_configs", "scrape_interval", "metrics_path"}, {"job_name"})
        jobs.add(job.get("job_name"))
        for target in (t for c in job.get("static_configs") or [] for t in c.get("targets") or []):
            if not re.fullmatch(r"[A-Za-z0-9.-]+:[0-9]+", str(target)):
                yield f"{path}: target {target!r} is no HOST:PORT"
    console = Settings().console
    if f"{console.host}:{console.port}" not in path.read_text(encoding="utf-8"):
        yield f"{path}: does not scrape the default console, {console.host}:{console.port}"
    for name in scrape.get("rule_files") or []:
        if not (folder / name).exists():
            yield f"{path}: rule file {name!r} is not there"
        else:
            yield from _rule_problems(folder / name, jobs)


def _rule_problems(path: Path, jobs: set[Any]) -> Iterator[str]:
    rules = _yaml(path)
    if isinstance(rules, str):
        yield rules
        return
    yield from _keys(path, rules, {"groups"}, {"groups"})
    series = _series()
    names: set[str] = set()
    for group in rules.get("groups") or []:
        yield from _keys(path, group, {"name", "rules", "interval"}, {"name", "rules"})
        for rule in group.get("rules") or []:
            yield from _keys(path, rule, {"alert", "expr", "for", "labels", "annotations"}, {"alert", "expr"})
            name, expression = str(rule.get("alert")), str(rule.get("expr"))
            if name in names:
                yield f"{path}: alert {name} stands twice"
            names.add(name)
            if "for" in rule and not re.fullmatch(r"([0-9]+(ms|[smhdwy]))+", str(rule["for"])):
                yield f"{path}: {name}: for: {rule['for']!r} is no duration"
            if not (rule.get("annotations") or {}).get("summary") or not (rule.get("labels") or {}).get("severity"):
                yield f"{path}: {name}: needs labels.severity and annotations.summary"
            try:
                promql_parser.parse(expression)
            except ValueError as e:
                yield f"{path}: {name}: {expression!r} is no PromQL: {e}"
            for used in re.findall(r"\bgunfire_\w+", expression):
                if used not in series:
                    yield f"{path}: {name}: the detector has no series {used}"
            for job in re.findall(r'job="([^"]*)"', expression):
                if job not in jobs:
                    yield f"{path}: {name}: no job {job!r} is scraped"


def _series() -> set[str]:
    """Names of the detector's series, as Prometheus stores them."""
    registry = CollectorRegistry()
    Metrics(registry)
    names: set[str] = set()
    for family in registry.collect():
        suffixes = {
            "counter": ("_total",),
            "histogram": ("_bucket", "_count", "_sum"),
            "summary": ("_count", "_sum"),
            "info": ("_info",),
        }.get(family.type, ("",))
        names.update(f"{family.name}{suffix}" for suffix in suffixes)
    return names


def _yaml(path: Path) -> dict[str, Any] | str:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as e:
        return f"{path}: can't be read: {e}"
    return data if isinstance(data, dict) else f"{path}: holds no mapping"


def _keys(path: Path, mapping: Any, known: set[str], needed: set[str]) -> Iterator[str]:
    if not isinstance(mapping, dict):
        yield f"{path}: {mapping!r} is no mapping"
        return
    for key in sorted(mapping.keys() - known):
        yield f"{path}: unknown key {key!r}; known: {', '.join(sorted(known))}"
    for key in sorted(needed - mapping.keys()):
        yield f"{path}: key {key!r} is missing"


def main() -> int:
    found = problems(ROOT)
    for problem in found:
        print(problem)
    if not found:
        print("Configuration and deployment files are sound.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
