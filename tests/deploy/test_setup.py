"""Promises of the set-up: it names what is missing with the remedy, leaves out only that, and is quick to repeat."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/sh
# The real Python, but that making an environment and installing are only said.
case "$*" in
    *"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && echo "VENV" ;;
    *"-m pip install"*) echo "INSTALL $*"; exit ${{PIP_FAILS:-0}} ;;
    *ensurepip*) exit {no_venv} ;;
    *"(3, 10)"*) exit {too_old} ;;
    *) exec {real} "$@" ;;
esac
"""


class Machine:
    """A machine that has only what is put on it."""

    def __init__(self, folder: Path) -> None:
        self.checkout, self.bin = folder / "checkout", folder / "bin"
        (self.checkout / "deploy").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("setup.cfg", "pyproject.toml", "deploy/setup.sh"):
            shutil.copy(ROOT / name, self.checkout / name)
        for name in ("sh", "cat", "cksum", "cp", "dirname", "mkdir", "rm"):
            found = shutil.which(name)
            assert found is not None
            (self.bin / name).symlink_to(found)
        for name in ("cc", "java", "mvn"):
            self.put(name, "#!/bin/sh\nexit 0\n")
        self.python()

    def put(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def python(self, *, too_old: bool = False, no_venv: bool = False) -> None:
        self.put("python3", PYTHON.format(real=sys.executable, too_old=int(too_old), no_venv=int(no_venv)))

    def lacks(self, *names: str) -> None:
        for name in names:
            (self.bin / name).unlink()

    def set_up(self, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/sh", "deploy/setup.sh"],
            cwd=self.checkout,
            env={"PATH": str(self.bin), **environ},
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
            check=False,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_everything_is_installed_on_a_machine_that_has_everything(machine: Machine) -> None:
    done = machine.set_up(CI="true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ".[producers,detector,trainer,peers,dev,microphone]" in done.stdout
    assert "MISSING" not in done.stdout


def test_a_repeat_installs_nothing_until_something_changed(machine: Machine) -> None:
    machine.set_up()
    again = machine.set_up()
    assert again.returncode == 0
    assert "up to date" in again.stdout
    assert "INSTALL" not in again.stdout
    with (machine.checkout / "setup.cfg").open("a") as file:
        file.write("# changed\n")
    changed = machine.set_up()
    assert "INSTALL" in changed.stdout
    assert "VENV" not in changed.stdout, "the environment itself is kept"


def test_a_set_up_that_broke_off_is_done_again(machine: Machine) -> None:
    assert machine.set_up(PIP_FAILS="1").returncode == 1
    done = machine.set_up()
    assert done.returncode == 0
    assert "INSTALL" in done.stdout


def test_without_portaudio_only_the_microphone_is_left_out(machine: Machine) -> None:
    machine.put("cc", "#!/bin/sh\nexit 1\n")
    done = machine.set_up()
    assert done.returncode == 0
    assert "MISSING: the PortAudio headers" in done.stdout
    assert "sudo apt-get install portaudio19-dev" in done.stdout
    assert ".[producers,detector,trainer,peers,dev]" in done.stdout


@pytest.mark.parametrize("name", ["java", "mvn"])
def test_without_java_or_maven_only_the_broker_tests_are_left_out(machine: Machine, name: str) -> None:
    machine.lacks(name)
    done = machine.set_up()
    assert done.returncode == 0
    assert "MISSING: Java (17 or later) or Maven" in done.stdout
    assert "sudo apt-get install default-jre-headless maven" in done.stdout
    assert "INSTALL" in done.stdout


@pytest.mark.parametrize("name", ["cc", "java", "mvn"])
def test_in_ci_nothing_is_left_out(machine: Machine, name: str) -> None:
    machine.lacks(name)
    done = machine.set_up(CI="true")
    assert done.returncode == 1
    assert "install:" in done.stdout
    assert "INSTALL" not in done.stdout


def test_a_missing_or_unfitting_python_is_named_with_the_remedy(machine: Machine) -> None:
    machine.python(too_old=True)
    done = machine.set_up()
    assert done.returncode == 1
    assert "MISSING: Python 3.10 to 3.13" in done.stdout
    named = machine.set_up(PYTHON="python3")
    assert named.returncode == 1
    assert "it takes Python 3.10 to 3.13" in named.stdout
    assert machine.set_up(PYTHON="python9").returncode == 1


def test_a_missing_venv_module_is_named_with_the_remedy(machine: Machine) -> None:
    machine.python(no_venv=True)
    done = machine.set_up()
    assert done.returncode == 1
    assert f"sudo apt-get install python3.{sys.version_info[1]}-venv" in done.stdout


def test_the_parts_can_be_chosen(machine: Machine) -> None:
    done = machine.set_up(EXTRAS="producers,detector-gpu")
    assert ".[producers,detector-gpu]" in done.stdout


TESTS = """
import pytest

def test_tool(): pytest.skip("no broker here")
def test_data(): pytest.skip("GOLDEN_DIR is not there")
@pytest.mark.xfail(strict=True)
def test_known(): assert False
"""


@pytest.mark.parametrize(("arguments", "failed"), [(["-p", "tests.no_missing_tool"], True), ([], False)])
def test_in_ci_a_test_skipped_for_a_missing_tool_fails(tmp_path: Path, arguments: list[str], failed: bool) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_such_tool')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--continue-on-collection-errors",
            *arguments,
            str(tmp_path),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode != 0) == failed, done.stdout
    if failed:
        assert "test_tool was: Skipped: no broker here" in done.stdout
        assert "no_such_tool" in done.stdout
        assert "GOLDEN_DIR" not in done.stdout


def test_every_target_that_is_promised_is_there() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("setup", "demo", "test", "golden", "check", "bench"):
        assert f"make {target} " in done.stdout


def test_ci_calls_check_and_test_and_needs_no_one(tmp_path: Path) -> None:
    text = (ROOT / ".ci/run").read_text()
    assert "make check test" in text
    assert os.access(ROOT / ".ci/run", os.X_OK)
    subprocess.run(["bash", "-n", ".ci/run"], cwd=ROOT, check=True)
