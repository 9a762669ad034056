"""``trainer predict`` writes the original's CSV, ``check-segments`` reads it, ``ontology`` shows what may be named."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from detector.errors import DataError
from tests.trainer.small_models import (
    LABELS,
    NAMES,
    make_run,
    make_starter_folder,
    write_labels,
    write_ontology,
    write_records,
)
from trainer.__main__ import main
from trainer.check_segments import check_segments
from trainer.predict import read_predictions, write_predictions
from trainer.segments import Segment
from trainer.trained import open_trained, read_data


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    make_run(folder / "run")
    write_records(folder / "clips.tfrecord", 30)
    write_labels(folder / "labels.csv")
    write_ontology(folder / "ontology.json")
    return folder


def test_the_csv_holds_each_clips_best_classes(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    found = run(
        "predict", f"--train_dir={folder / 'run'}", f"--input_data_pattern={folder}/*.tfrecord",
        f"--output_file={path}", "--top_k=3", "--batch_size=8",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "30 clips from 1 files" in found.stderr
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["VideoId", "LabelConfidencePairs"]
    trained = open_trained(folder / "run")
    clips = read_data(trained, str(folder), LABELS)
    batch = clips.gather(np.arange(len(clips)))
    scores = trained.classifier(batch.values, batch.num_frames).numpy()
    for (video, pairs), row, name in zip(rows, scores, batch.video_ids, strict=True):
        assert video == name
        tokens = pairs.split()
        assert [int(index) for index in tokens[::2]] == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose([float(score) for score in tokens[1::2]], np.sort(row)[::-1][:3], rtol=1e-5)


def test_flags_of_the_starter_code_are_taken_or_refused_with_what_to_do(folder: Path) -> None:
    given = (f"--train_dir={folder / 'run'}", f"--input_data_pattern={folder}/*.tfrecord", "--output_file=-")
    found = run("predict", "--frame_features", "--num_readers=8", "--input_model_tgz=", *given)
    assert found.exit_code == 0, found.output
    assert found.stderr.count("--frame_features has no effect") == found.stderr.count("--num_readers has no") == 1
    refused = run("predict", "--input_model_tgz=model.tgz", *given)
    assert refused.exit_code == 78
    assert "Unpack it and give its folder as --train_dir" in refused.stderr
    measured = (f"--train_dir={folder / 'run'}", f"--eval_data_pattern={folder}/*.tfrecord")
    assert run("evaluate", *measured, "--noframe_features", "--run_once").exit_code == 0
    assert "evaluates once" in run("evaluate", *measured, "--norun_once").stderr


def test_names_and_standard_output(folder: Path) -> None:
    found = run("predict", "--model", folder / "run", "--data", folder, "--output", "-", "--top-k", 2, "--label-names")
    assert found.exit_code == 0, found.output
    _, first, *_ = csv.reader(found.stdout.splitlines())
    assert all(part.rpartition(" ")[0] in NAMES for part in first[1].split("; "))


def test_names_need_a_list_where_the_model_has_none(folder: Path, tmp_path: Path) -> None:
    starter = make_starter_folder(tmp_path / "starter")
    arguments = ("predict", "--model", starter, "--data", folder, "--output", "-", "--label-names")
    assert "give --labels with --label-names" in run(*arguments).stderr
    assert run(*arguments, "--labels", folder / "labels.csv").exit_code == 0


def test_a_failed_prediction_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    found = run("predict", "--model", folder / "run", "--data", tmp_path / "*.tfrecord", "--output", tmp_path / "p.csv")
    assert found.exit_code == 1
    assert "matches no file" in found.stderr
    absent = run("predict", "--model", folder / "run", "--data", folder, "--output", tmp_path / "no" / "p.csv")
    assert "can't be written" in absent.stderr
    for command, option in (("evaluate", "--output"), ("evaluate", "--by-clip"), ("predict", "--output")):
        early = run(command, "--model", tmp_path / "none", "--data", folder, option, tmp_path / "no" / "p.csv")
        assert "there is no folder" in early.stderr  # said before the model is missed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.golden
def test_the_starter_codes_inference_writes_the_same_file(golden_dir: Path, tmp_path: Path) -> None:
    for folder in sorted(golden_dir.glob("e2e_*")):
        found = run(
            "predict", "--train_dir", folder, "--input_data_pattern", golden_dir / "yt8m_style.tfrecord",
            "--output_file", tmp_path / "p.csv",
        )  # fmt: skip
        assert found.exit_code == 0, found.output
        with (folder / "inference.csv").open() as theirs, (tmp_path / "p.csv").open() as ours:
            for their_row, our_row in zip(csv.reader(theirs), csv.reader(ours), strict=True):
                assert our_row[0] == their_row[0]
                mine, original = our_row[1].split()[1::2], their_row[1].split()[1::2]
                np.testing.assert_allclose(np.array(mine, float), np.array(original, float), rtol=2e-5, atol=1e-6)


scores_of_clips = st.dictionaries(
    st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=12),
    st.lists(st.floats(0, 1, width=32), min_size=len(NAMES), max_size=len(NAMES)),
    min_size=1,
    max_size=5,
)


@given(scores_of_clips, st.booleans(), st.integers(1, len(NAMES)))
def test_what_is_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, clips: dict[str, list[float]], names: bool, top_k: int
) -> None:
    path = tmp_path_factory.mktemp("again") / "p.csv"
    matrix = np.array(list(clips.values()), np.float32)
    write_predictions(path, [(list(clips), matrix)], top_k=top_k, names=NAMES if names else None)
    found = read_predictions(path, LABELS)
    assert list(found) == list(clips)
    for row, pairs in zip(matrix, found.values(), strict=True):
        assert len(pairs) == top_k
        np.testing.assert_allclose(list(pairs.values()), np.sort(row)[::-1][:top_k], rtol=1e-5, atol=1e-30)
        np.testing.assert_allclose([row[i] for i in pairs], list(pairs.values()), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n", "does not begin with the line VideoId"),
        ("VideoId,LabelConfidencePairs\n", "holds no prediction"),
        ("VideoId,LabelConfidencePairs\nx,1 0.5 2\n", "line 2: 3 values are no pairs"),
        ("VideoId,LabelConfidencePairs\nx,1 high\n", "line 2: 'high' is no confidence"),
        ("VideoId,LabelConfidencePairs\nx,1 nan\n", "line 2: 'nan' is no confidence"),
        ("VideoId,LabelConfidencePairs\nx,1 0.5 2 inf\n", "line 2: 'inf' is no confidence"),
        ("VideoId,LabelConfidencePairs\nx,99 0.5\n", "line 2: There is no class 99"),
        ("VideoId,LabelConfidencePairs\nx,Barking 0.5\n", "line 2: 'Barking' is no class"),
        ("VideoId,LabelConfidencePairs\nx\n", "line 2: an id and pairs are expected, found 1"),
    ],
)
def test_other_files_are_no_predictions(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        read_predictions(tmp_path / "p.csv", LABELS)


def segment(video: str, *labels: int) -> Segment:
    return Segment(video, 10.0, 20.0, labels)


def test_agreement_is_counted_per_label_and_family_and_disagreements_are_ranked() -> None:
    predictions = {
        "heard": {1: 0.9, 0: 0.1},
        "second": {0: 0.6, 2: 0.2},
        "missed": {0: 0.8, 5: 0.1},
        "alarm": {2: 0.7, 5: 0.3},
        "weak": {5: 0.5, 1: 0.1},
        "quiet": {0: 0.9},
        "own": {1: 0.5},
    }
    segments = [
        segment("heard", 1),
        segment("second", 1, 2),
        segment("missed", 2, 0),
        segment("alarm", 3),
        segment("weak", 5),
        segment("quiet", 0),
        segment("other", 1),
    ]
    check = check_segments(predictions, segments, LABELS, [1, 2])
    assert check.compared == 6
    assert (check.only_predicted, check.only_listed) == (("own",), ("other",))
    assert (check.family.labelled, check.family.found, check.family.first, check.family.first_right) == (3, 2, 2, 1)
    by_name = {each.label.name: each for each in check.per_class}
    gunshot = by_name["Gunshot, gunfire"]
    assert (gunshot.labelled, gunshot.found, gunshot.recall, gunshot.agreement_at_one) == (2, 1, 0.5, 1.0)
    assert (by_name["Machine gun"].labelled, by_name["Machine gun"].found) == (2, 1)
    assert (by_name["Speech"].first, by_name["Speech"].first_right) == (3, 2)
    assert "Theremin" not in by_name
    assert check.hit_at_one == pytest.approx(4 / 6)  # heard, missed, weak, quiet
    assert [each.video_id for each in check.lowest_with_gunfire] == ["missed", "second", "heard"]
    assert check.lowest_with_gunfire[0].score == 0
    assert [(each.video_id, each.score) for each in check.highest_without_gunfire] == [("alarm", 0.7), ("weak", 0.1)]
    assert check.highest_without_gunfire[0].labels == ("Fireworks",)


def test_the_command_compares_with_a_list_as_audioset_publishes_it(folder: Path, tmp_path: Path) -> None:
    predictions = tmp_path / "p.csv"
    run("predict", "--model", folder / "run", "--data", folder, "--output", predictions)
    clips = read_data(open_trained(folder / "run"), str(folder), LABELS)
    lines = ["# Segments csv", "# num_ytids=3", "# YTID, start_seconds, end_seconds, positive_labels"]
    for clip in range(1, len(clips)):
        mids = ",".join(LABELS[int(i)].mid for i in clips.labels_of(clip)) or "/m/006"
        lines.append(f'{clips.video_id(clip)}, 30.000, 40.000, "{mids}"')
    (tmp_path / "segments.csv").write_text("\n".join([*lines, 'elsewhere, 0.000, 10.000, "/m/001"']) + "\n")
    arguments = (
        "check-segments", "--predictions", predictions, "--segments", tmp_path / "segments.csv",
    )  # fmt: skip
    found = run(*arguments, "--labels", folder / "labels.csv", "--format", "json")
    assert found.exit_code == 0, found.output
    check = json.loads(found.stdout)
    assert check["compared"] == 29
    assert check["only_predicted"] == {"count": 1, "ids": [clips.video_id(0)]}
    assert check["only_listed"] == {"count": 1, "ids": ["elsewhere"]}
    gunfire = clips.label_matrix()[1:][:, [1, 2]].any(axis=1).sum()
    assert check["family"]["labelled"] == check["family"]["found"] == gunfire  # all 7 classes are predicted
    text = run(*arguments, "--labels", folder / "labels.csv", "--ontology", folder / "ontology.json")
    assert text.exit_code == 0
    assert "29 clips compared" in text.stdout
    assert "Gunfire by the segments: the lowest scores" in text.stdout  # all are found: none is missed
    assert "1 ids are in the segments only: elsewhere." in text.stdout
    assert "give --labels" in run(*arguments).stderr
    (tmp_path / "segments.csv").write_text('elsewhere, 0.000, 10.000, "/m/001"\n')
    foreign = run(*arguments, "--labels", folder / "labels.csv")
    assert foreign.exit_code == 1
    assert "they are of other clips" in foreign.stderr


def test_families_are_shown_by_name_and_mid(folder: Path) -> None:
    given = ("--ontology", folder / "ontology.json", "--labels", folder / "labels.csv")
    tree = run("ontology", "bangs", *given)
    assert tree.exit_code == 0, tree.output
    lines = [line.strip(" │├└─") for line in tree.stdout.splitlines()]
    assert lines == [
        "Bangs /m/boom (groups others)",
        "Gunshot, gunfire /m/001 1",
        "Machine gun /m/002 2",
        "Fireworks /m/003 3",
    ]
    entries = json.loads(run("ontology", "/m/001", *given, "--format", "json").stdout)
    assert [(entry["name"], entry["depth"], entry["index"]) for entry in entries] == [
        ("Gunshot, gunfire", 0, 1),
        ("Machine gun", 1, 2),
    ]
    listed = run("ontology", "Bangs", "Machine gun", "--list", "--ontology", folder / "ontology.json")
    assert listed.stdout.count("Machine gun") == 1
    assert len(run("ontology", "--depth", "0", *given).stdout.splitlines()) == 5  # the roots
    without = run("ontology", "Bangs, -Gunshot, gunfire", *given, "--list").stdout
    assert [line.split()[0] for line in without.splitlines()] == ["Bangs", "Fireworks"]
    unknown = run("ontology", "Gunshots", *given)
    assert unknown.exit_code == 1
    assert "Nearest: Gunshot, gunfire" in unknown.stderr


def test_a_family_may_be_given_by_its_name_in_the_ontology(folder: Path) -> None:
    given = ("evaluate", "--model", folder / "run", "--data", folder, "--format", "json")
    found = run(*given, "--ontology", folder / "ontology.json", "--family", "Bangs, -Machine gun", "--look-alikes", "5")
    assert found.exit_code == 0, found.output
    assert [entry["index"] for entry in json.loads(found.stdout)["gunfire"]["family"]] == [1, 3]


def test_a_clip_without_a_number_is_left_out_and_named(tmp_path, caplog):
    matrix = np.full((2, len(NAMES)), 0.5, np.float32)
    matrix[0] = np.nan
    write_predictions(tmp_path / "p.csv", [(["empty", "full"], matrix)], top_k=2)
    rows = (tmp_path / "p.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["full"]
    assert "1 clips left out" in caplog.text
    assert "empty" in caplog.text
