"""``trainer compact`` keeps settings apart, and refuses before the work what would fail after it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result

from trainer.__main__ import main
from trainer.compact import commands, evaluation, packaging, training
from trainer.compact.dataset import save_arrays
from trainer.compact.training import Trained

Compact = Callable[..., Result]
SHIPPED = Path(__file__).parents[2] / "detector" / "models" / "compact-gunfire"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with one recording to train on."""
    audio = tmp_path / "data" / "audio"
    (audio / "shotspotter").mkdir(parents=True)
    (audio / "shotspotter" / "onsets.csv").write_text("file,num_rounds,onset_seconds\n")
    (audio / "index.csv").write_text("path,label,split,licence,group\nmine/a.wav,rain,train,CC0,g\n")
    (audio / "mine").mkdir()
    soundfile.write(audio / "mine" / "a.wav", np.full(16_000, 0.1), 16_000)
    return audio.parent


@pytest.fixture
def compact(tmp_path: Path, data: Path) -> Compact:
    def run(*arguments: object) -> Result:
        options = ["compact", "--work", tmp_path / "work", "--data-dir", data, *arguments]
        return CliRunner().invoke(main, [str(option) for option in options])

    return run


def test_a_step_with_other_settings_is_refused_with_what_differs(compact: Compact, tmp_path: Path) -> None:
    options = ("--scenes", 20, "--close-scenes", 0, "--steps", 50)
    assert compact(*options, "prepare").exit_code == 0
    again = compact(*options, "prepare")
    assert (again.exit_code, "prepared already" in again.output) == (0, True)
    for step in ("prepare", "synthesise", "train", "all"):
        found = compact("--scenes", 30, "--steps", 50, step)
        assert found.exit_code == 78
        assert "--scenes is 30, it was 20; --close-scenes is 4000, it was 0. Give another --work" in found.output
        assert "--seed 1 --scenes 20 --close-scenes 0 --steps 50 --rounds 2." in found.output
    assert not (tmp_path / "work" / "data").exists()


def test_other_recordings_are_other_settings(compact: Compact, data: Path) -> None:
    assert compact("prepare").exit_code == 0
    index = data / "audio" / "index.csv"
    index.write_text(index.read_text() + "mine/b.wav,rain,dev,CC0,g\n")
    assert compact("prepare").exit_code == 0
    index.write_text(index.read_text() + "mine/c.wav,rain,train,CC0,g\n")
    found = compact("prepare")
    assert found.exit_code == 78
    assert "index.csv lists other recordings" in found.output


def test_a_folder_that_says_nothing_takes_on_the_settings(compact: Compact, tmp_path: Path) -> None:
    """What an earlier version made."""
    assert compact("prepare").exit_code == 0
    path = tmp_path / "work" / "run.json"
    path.unlink()
    assert compact("--seed", 3, "prepare").exit_code == 0
    assert json.loads(path.read_text())["seed"] == 3
    path.write_text(path.read_text()[:20])
    found = compact("--seed", 3, "prepare")
    assert found.exit_code == 78
    assert "run.json is damaged" in found.output


def test_training_again_may_take_other_steps_and_nothing_else(compact: Compact, tmp_path: Path) -> None:
    trained = tmp_path / "work" / "trained.npz"
    assert compact("prepare").exit_code == 0
    save_arrays(trained, {"head:k": np.zeros(3)})
    assert "trained already" in compact("train").output
    refused = compact("--steps", 50, "--seed", 2, "train", "--again")
    assert "--seed is 2, it was 1. Give" in refused.output
    assert trained.is_file()
    found = compact("--steps", 50, "train", "--again")
    assert "trainer compact synthesise" in found.output
    assert trained.is_file()  # nothing goes before what is needed in its place is there
    assert json.loads((tmp_path / "work" / "run.json").read_text())["steps"] == 4000


def test_a_step_without_its_input_leaves_the_folder_free(compact: Compact, tmp_path: Path) -> None:
    for step in ("synthesise", "teach", "train"):
        assert compact(step).exit_code == 78
    assert not (tmp_path / "work" / "run.json").exists()
    assert compact("--scenes", 7, "prepare").exit_code == 0
    assert compact("--scenes", 7, "--steps", 20, "prepare").exit_code == 0
    assert json.loads((tmp_path / "work" / "run.json").read_text())["steps"] == 4000


def test_recordings_that_allow_no_judgement_are_named_before_the_work(compact: Compact, data: Path) -> None:
    with (data / "audio" / "index.csv").open("a") as file:
        file.write("mine/b.wav,gunshot,dev,CC0,h\n")
    found = compact("all")
    assert found.exit_code == 1
    assert "lists no recording without gunfire, no continuous audio (folder ambient): add some" in found.output


def test_a_folder_with_values_that_are_no_numbers_is_damaged(compact: Compact, tmp_path: Path) -> None:
    assert compact("prepare").exit_code == 0
    path = tmp_path / "work" / "run.json"
    path.write_text(path.read_text().replace("5000", '"x"'))
    assert "run.json is damaged" in compact("prepare").output


@pytest.fixture
def exported(compact: Compact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ``packaging.export`` is told, from a folder where something was trained in 50 steps."""
    assert compact("--steps", 50, "prepare").exit_code == 0
    Trained({}, {}, {}).save(tmp_path / "work" / "trained.npz")
    told: list[dict[str, Any]] = []

    def export(trained: Trained, folder: Path, **options: Any) -> SimpleNamespace:
        told.append({"folder": folder, **options})
        return SimpleNamespace(manifest=SimpleNamespace(decision=SimpleNamespace(open_threshold=0.5)))

    recording = evaluation.Recording("ambient/a", "ambient", "rain", False, np.zeros(16_000, np.int16))
    scored = evaluation.Scored(recording, np.array([0.1], np.float32), 15_360)
    monkeypatch.setattr(evaluation, "check_recordings", lambda *args: None)
    monkeypatch.setattr(evaluation, "load_recordings", lambda *args: [recording])
    monkeypatch.setattr(evaluation, "score_recordings", lambda *args, **options: [scored])
    monkeypatch.setattr(packaging, "operating_curve", lambda *args: [])
    monkeypatch.setattr(training, "scorer_of", lambda *args: None)
    monkeypatch.setattr(packaging, "export", export)
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    return told


def test_export_says_what_made_the_weights_and_is_named_by_whoever_exports(
    compact: Compact, exported: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = compact("export", "--name", "mine", "--version", "2.0", "--date", "2026-01-02")
    assert found.exit_code == 0, found.output
    told = exported[-1]
    assert told["command"] == "trainer compact --seed 1 --scenes 5000 --close-scenes 4000 --steps 50 --rounds 2 all"
    assert (told["name"], told["version"], told["date"]) == ("mine", "2.0", "2026-01-02")
    assert told["data"][0] == "mine"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert compact("--steps", 50, "export").exit_code == 0
    assert (exported[-1]["name"], exported[-1]["date"]) == ("compact-gunfire", "1970-01-02")
    assert "--steps is 60, it was 50" in compact("--steps", 60, "export").output
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "soon")
    assert "SOURCE_DATE_EPOCH is 'soon', not a number" in compact("export").output
    assert len(exported) == 2


def test_export_says_from_which_package_training_went_on(
    compact: Compact, exported: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "work" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"begun": "mine 1.0, embedder abc", "inherited": ["b"]}))
    assert compact("export").exit_code == 0
    assert exported[-1]["command"].endswith("--steps 50 --rounds 2 train --from mine (there 1.0, embedder abc)")
    assert exported[-1]["data"][-1] == "b"
    same = compact("export", "--name", "mine", "--version", "1.0")
    assert (same.exit_code, "give it another --name or --version" in same.output) == (78, True)
    assert len(exported) == 1
    assert compact("--steps", 50, "prepare").exit_code == 0  # and what decides no training leaves it as it is
    assert json.loads(path.read_text())["begun"] == "mine 1.0, embedder abc"
    assert json.loads(path.read_text())["inherited"] == ["b"]
    found = compact("--steps", 50, "train")
    assert found.exit_code == 78
    assert "--from is not given, it was mine 1.0, embedder abc (`train --again` may change it" in found.output


def test_scenes_of_an_earlier_version_are_not_mixed_with_new_ones(compact: Compact, tmp_path: Path) -> None:
    assert compact("prepare").exit_code == 0
    path = tmp_path / "work" / "run.json"
    content = json.loads(path.read_text())
    for key in ("rounds", "begun", "inherited", "scenes_version"):  # as version 0.6.0 of the model wrote it
        del content[key]
    path.write_text(json.dumps(content))
    for step in ("synthesise", "teach", "train"):
        found = compact(step)
        assert (found.exit_code, "scenes are those of another version" in found.output) == (78, True)
    assert "trainer compact train" in compact("export").output  # what is made of them may still be exported


def test_what_an_earlier_version_trained_is_not_gone_on_with(compact: Compact, tmp_path: Path) -> None:
    assert compact("prepare").exit_code == 0
    path = tmp_path / "work" / "run.json"
    content = json.loads(path.read_text())
    del content["training_version"]  # as version 0.10.0 of the model wrote it
    path.write_text(json.dumps(content))
    assert "trainer compact synthesise" in compact("train").output  # nothing is trained yet
    (tmp_path / "work" / "onward.checkpoint.npz").touch()
    found = compact("train")
    assert (found.exit_code, "trained in it is of another version" in found.output) == (78, True)
    assert compact("prepare").exit_code == 0  # and what decides no training leaves it as it is
    assert json.loads(path.read_text()) == content
    assert "trainer compact synthesise" in compact("train", "--again").output


def test_training_goes_on_from_a_folder_wherever_it_lies(
    compact: Compact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shipped name is the shipped one, also where a folder of that name lies about."""
    assert compact("prepare").exit_code == 0
    (tmp_path / "compact-gunfire").mkdir()
    monkeypatch.chdir(tmp_path)
    begun: list[str] = []
    monkeypatch.setattr(commands, "_train", lambda run, again, weights: begun.append(run.begun))
    assert compact("train", "--from", "compact-gunfire").exit_code == 0
    shutil.copytree(SHIPPED, tmp_path / "mine")
    assert compact("train", "--from", "./mine").exit_code == 0
    assert begun[0] == begun[1]
    assert begun[0].startswith("compact-gunfire ")


def test_training_goes_on_from_a_package_of_this_kind_alone(compact: Compact, tmp_path: Path) -> None:
    assert compact("prepare").exit_code == 0
    found = compact("train", "--from", "vggish-audioset")
    assert found.exit_code == 78
    assert "its embedder is 'vggish'; only a compact one can go on here" in found.output
    assert "trainer compact synthesise" in compact("train", "--from", "compact-gunfire").output
    assert json.loads((tmp_path / "work" / "run.json").read_text())["begun"] == ""  # nothing was begun


def test_a_round_is_half_of_the_scenes(tmp_path: Path) -> None:
    run = commands._Run(tmp_path, tmp_path, 1, 40, 20, 10, 1, frozenset())
    twice = replace(run, rounds=2)
    assert [len(plan) for plan in run.plans()] == [60, 45]
    assert twice.plans()[:2] == run.plans()
    assert len({plan.seed for plan in twice.plans()}) == 4


def test_a_bad_date_of_the_environment_is_named_before_libraries_stumble_over_it(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer", "compact", "--work", str(tmp_path / "w"), "--data-dir", str(data)]
    environ = os.environ | {"SOURCE_DATE_EPOCH": "x"}
    found = subprocess.run([*command, "export"], env=environ, capture_output=True, text=True, timeout=120)
    assert found.stderr == "Error: SOURCE_DATE_EPOCH is 'x', not a number of seconds since 1970.\n"


@pytest.mark.parametrize("command", ["export", "all"])
@pytest.mark.parametrize("bad", [("--name", "My model"), ("--version", "two words"), ("--date", "today")])
def test_names_that_no_package_can_have_are_refused_first(
    compact: Compact, tmp_path: Path, command: str, bad: tuple[str, str]
) -> None:
    found = compact(command, *bad)
    assert found.exit_code in (2, 78)
    assert bad[0] in found.output
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("failures", "out.jpeg"), "must end in .png or .svg"),
        (("failures", "file/out.png"), "folder of .*out.png can't be made"),
        (("evaluate", "--json", "file/out.json"), "folder of .*out.json can't be made"),
        (("evaluate", "--json", "."), "is a directory"),
    ],
)
def test_an_output_that_can_not_be_written_is_refused_first(
    compact: Compact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(commands, "_scorer", lambda *args: pytest.fail("the work began"))
    found = compact(*arguments)
    assert found.exit_code in (2, 78)
    assert re.search(said, found.output), found.output


def test_the_folder_of_an_output_is_made(tmp_path: Path) -> None:
    commands._make_room(tmp_path / "a" / "b" / "out.png")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_teacher_that_is_no_network_is_named(compact: Compact, data: Path) -> None:
    for package in ("ai_edge_litert", "onnxruntime"):
        pytest.importorskip(package, reason=f"The teachers need {package}: install the extra `peers`.")
    (data / "yamnet").mkdir()
    (data / "yamnet" / "yamnet.tflite").write_bytes(b"junk")
    found = compact("teach")
    assert found.exit_code == 78
    assert "yamnet.tflite or" in found.output


def test_tensorflow_writes_no_lines_of_its_own(data: Path, tmp_path: Path) -> None:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TF_")}
    command = [sys.executable, "-m", "trainer", "compact", "--work", str(tmp_path / "w"), "--data-dir", str(data)]
    found = subprocess.run([*command, "evaluate"], env=environ, capture_output=True, text=True, timeout=120)
    assert found.stderr.splitlines() == [
        f"Error: {tmp_path / 'w' / 'trained.npz'} is missing: run `trainer compact train` first."
    ]
