"""Promises of deploy/validate.py: the shipped files are sound, and each rule finds what breaks it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deploy_validate", ROOT / "deploy/validate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


validate = _load()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What validate looks at, to be broken."""
    for name in ("setup.cfg", "pyproject.toml", "config.yaml", ".dockerignore", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("deploy/systemd", "deploy/prometheus", "detector/schemas"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in (ROOT / "deploy").glob("Dockerfile*"):
        shutil.copy(path, tmp_path / "deploy" / path.name)
    for name in ("producers", "trainer"):
        (tmp_path / name).mkdir()
    (tmp_path / "README.md").touch()
    return tmp_path


def test_the_shipped_files_are_sound(checkout: Path) -> None:
    assert validate.problems(checkout) == []


IMAGE, UNIT = "deploy/Dockerfile", "deploy/systemd/gunfire-detector.service"
PRODUCER, MICROPHONE = "deploy/systemd/gunfire-producer@.service", "deploy/systemd/gunfire-microphone@.service"
SCRAPE, RULES = "deploy/prometheus/prometheus.yml", "deploy/prometheus/gunfire-rules.yml"


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("config.yaml", "port: 9464", "port: x", "console.port"),
        ("detector/schemas/config.schema.json", "9464", "9465", "make schemas"),
        (IMAGE, "python:3.12-slim-bookworm\n", "python\n", "no fixed tag"),
        (IMAGE, "python:3.12-slim-bookworm\n", "python:latest\n", "no fixed tag"),
        (IMAGE, "[detector]", "[detektor]", "no extra 'detektor'"),
        (IMAGE, "COPY detector ", "COPY detektor ", "'detektor' is not in the repository"),
        (IMAGE, "COPY config.yaml", "COPY deploy/systemd config.yaml", "left out by .dockerignore"),
        (IMAGE, "COPY config.yaml", "ADD config.yaml", "ADD"),
        (IMAGE, "USER 10001:10001", "USER 0:0", "runs as root"),
        (IMAGE, "USER 10001:10001", "", "runs as root"),
        (IMAGE, 'ENTRYPOINT ["detector"]', "ENTRYPOINT detector", "exec form"),
        (IMAGE, 'ENTRYPOINT ["detector"]', 'ENTRYPOINT ["detect"]', "no program 'detect'"),
        (IMAGE, "/readyz", "/", "no HEALTHCHECK"),
        (IMAGE, "DETECTOR__LOG__FORMAT=json", "DETECTOR__LOG__FORMAT=jsn", "log.format"),
        (IMAGE, "DETECTOR__LOG__FORMAT=json", "DETECTOR__LOG__FORMATS=json", "DETECTOR__LOG__FORMATS"),
        (IMAGE, "DETECTOR__LOG__FORMAT=json", "KAFKA_PASSWORD=x", "looks like a secret"),
        ("deploy/Dockerfile.gpu", "[detector-gpu]", "[gpu]", "no extra 'gpu'"),
        ("deploy/Dockerfile.producers", 'ENTRYPOINT ["producers"]', "", "exec form"),
        (UNIT, "NoNewPrivileges=yes\n", "", "no NoNewPrivileges"),
        (UNIT, "ProtectSystem=strict", "ProtectSystem=full", "ProtectSystem=full"),
        (UNIT, "CapabilityBoundingSet=\n", "CapabilityBoundingSet=CAP_SYS_ADMIN\n", "CapabilityBoundingSet"),
        (UNIT, "/opt/gunfire/bin/detector run", "/opt/gunfire/bin/detect run", "ExecStart"),
        (UNIT, "TimeoutStopSec=30", "TimeoutStopSec=10", "TimeoutStopSec=10 is not over"),
        (UNIT, "User=gunfire", "User=root", "User=root"),
        (UNIT, "DETECTOR__MODEL__STORE", "DETECTOR__MODEL__SHOP", "DETECTOR__MODEL__SHOP"),
        (UNIT, "[Install]", "[Instal]", "no section [Install]"),
        (UNIT, "UMask=0077", "UMask 0077", "no KEY=VALUE"),
        (PRODUCER, "PrivateDevices=yes", "", "PrivateDevices"),
        (MICROPHONE, "DevicePolicy=closed", "", "DevicePolicy"),
        ("deploy/systemd/kafka-password.conf", "SASL_PASSWORD_FILE=", "SASL_PASSWORD=", "looks like a secret"),
        ("deploy/systemd/gpu.conf", "[Service]", "[Unit]", "[Service] alone"),
        ("deploy/systemd/gunfire.sysusers.conf", "u gunfire", "u gunfires", "does not make the user gunfire"),
        ("deploy/systemd/gunfire.sysusers.conf", "u gunfire", "user gunfire", "no line of sysusers.d"),
        (SCRAPE, "scrape_configs", "scrape_config", "scrape_config"),
        (SCRAPE, "127.0.0.1:9464", "127.0.0.1", "no HOST:PORT"),
        (SCRAPE, "127.0.0.1:9464", "127.0.0.1:9000", "default console"),
        (SCRAPE, "gunfire-rules.yml", "rules.yml", "'rules.yml' is not there"),
        (SCRAPE, "scrape_configs:", "scrape_configs: [", "can't be read"),
        (RULES, "gunfire_chunks_accepted_total", "gunfire_chunks_total", "no series gunfire_chunks_total"),
        (RULES, 'up{job="gunfire-detector"} == 0', 'up{job="gunfire-detector" == 0', "no PromQL"),
        (RULES, 'job="gunfire-detector"', 'job="gunfire"', "no job 'gunfire'"),
        (RULES, "for: 1m", "for: 1 minute", "no duration"),
        (RULES, "severity: page", "level: page", "needs labels.severity"),
        (RULES, "GunfireNoAudio", "GunfireDetectorDown", "stands twice"),
    ],
)
def test_each_rule_finds_what_breaks_it(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str, said: str
) -> None:
    monkeypatch.setattr(validate, "_systemd_problems", lambda path: ())  # asked below
    path = checkout / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    found = validate.problems(checkout)
    assert any(said in problem for problem in found), found
    assert str(checkout) not in "".join(found)


def test_systemd_itself_is_asked(checkout: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is missing: apt-get install systemd")
    path = checkout / UNIT
    path.write_text(path.read_text().replace("PrivateTmp=yes", "PrivateTmp=yes\nNoSuchKey=yes"))
    (found,) = validate.problems(checkout)
    assert "systemd-analyze verify" in found
    assert "NoSuchKey" in found


def test_systemd_rates_what_the_rules_do_not_name(checkout: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is missing: apt-get install systemd")
    path = checkout / UNIT
    weak = path.read_text().replace(
        "SystemCallFilter=~@privileged @resources", "SystemCallFilter=@privileged @resources @raw-io"
    )
    for key in ("ProtectClock", "ProtectHostname", "ProtectProc", "RestrictRealtime", "PrivateUsers"):
        weak = weak.replace(f"{key}=", f"#{key}=")
    path.write_text(weak)
    (found,) = validate.problems(checkout)
    assert "systemd-analyze security" in found


def test_the_command_says_what_is_wrong_by_its_exit_code() -> None:
    done = subprocess.run([sys.executable, "deploy/validate.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == ("are sound" in done.stdout), done.stdout + done.stderr
