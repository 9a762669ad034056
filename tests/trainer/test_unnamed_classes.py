"""A run of the starter code's own command, which names no class, goes on to every next step, as README says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from detector.errors import ConfigError
from detector.model import load_classifier
from trainer.__main__ import main
from trainer.classes import labels_of
from trainer.records import RecordWriter, encode_clip
from trainer.trained import open_trained

GUNSHOT = 427


def run(*arguments: object) -> Result:
    found = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert found.exit_code == 0, found.output
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of AudioSet's classes, its list of them, and a run of train.py's flags on them, shortened."""
    folder = tmp_path_factory.mktemp("seed")
    random = np.random.default_rng(0)
    with RecordWriter(folder / "clips.tfrecord") as writer:
        for i in range(40):
            writer.write(
                encode_clip(f"c{i:02d}", random.integers(0, 256, (4, 128), np.uint8), [GUNSHOT if i % 4 else 0])
            )
    names = load_classifier("vggish-audioset").manifest.labels
    rows = [f'{i},/m/{i:03d},"{name}"' for i, name in enumerate(names)]
    (folder / "labels.csv").write_text("\n".join(["index,mid,display_name", *rows]) + "\n")
    run(
        "train", "--recipe", "reference", f"--train_data_pattern={folder}/*.tfrecord", "--frame_features",
        "--model=LstmModel", "--feature_names=audio_embedding", "--feature_sizes=128", f"--train_dir={folder / 'run'}",
        "--lstm_cells=4", "--lstm_layers=1", "--max_steps=1", "--batch_size=8", "--quiet",
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("named", [False, True])
def test_evaluate_predict_and_export_take_it_with_and_without_a_list_of_classes(
    folder: Path, tmp_path: Path, named: bool
) -> None:
    given = ("--model", folder / "run", "--data", folder, *(("--labels", folder / "labels.csv") if named else ()))
    evaluated = json.loads(run("evaluate", *given, "--format", "json").stdout)
    assert [entry["index"] for entry in evaluated["gunfire"]["family"]] == [427, 428, 429, 430]
    assert "Gunshot, gunfire" in run("predict", *given, "--output", "-", "--label-names", "--top-k", 527).stdout
    run("export", *given, "--name", "mine", "--output", tmp_path / "package", "--open-threshold", "0.3")
    manifest = load_classifier(tmp_path / "package").manifest
    assert manifest.family[0] == "Gunshot, gunfire"
    assert "Fireworks" in manifest.look_alikes


def test_training_goes_on_from_it_under_names(folder: Path) -> None:
    run(
        "train", "--recipe", "reference", "--train-data", folder, "--model=LstmModel", "--start-from", folder / "run",
        "--labels", folder / "labels.csv", f"--train_dir={folder / 'more'}", "--lstm_cells=4", "--lstm_layers=1",
        "--max_steps=1", "--batch_size=8", "--quiet",
    )  # fmt: skip
    named = open_trained(folder / "more")
    assert named.labels is not None
    assert named.labels.names[GUNSHOT] == "Gunshot, gunfire"
    other = folder / "other.csv"
    other.write_text((folder / "labels.csv").read_text().replace("Fireworks", "Rockets"))
    assert "Rockets" in labels_of(open_trained(folder / "run"), other).names
    with pytest.raises(ConfigError, match="Rockets"):
        labels_of(named, other)
