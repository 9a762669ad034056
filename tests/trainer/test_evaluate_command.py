"""``trainer evaluate`` gives the starter code's figures and right ones of its own, as strict JSON, text and a page."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests.trainer.small_models import LABELS, NAMES, make_run, make_starter_folder, write_labels, write_records
from trainer.__main__ import main
from trainer.classes import Classes
from trainer.evaluate import Evaluation, evaluate
from trainer.metrics import calibration
from trainer.records import ClipSet, RecordWriter, encode_clip
from trainer.report import as_dict, as_json
from trainer.report_page import as_html
from trainer.trained import open_trained, read_data

FAMILY, ALIKE = (1, 2), (3, 4)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refuse_constant(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")


def brute_force_ap(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Mean over positives of the precision at their own score: every score a threshold, straight from the words."""
    found = []
    for score, good in zip(scores, positive, strict=True):
        if good:
            above = [p for s, p in zip(scores, positive, strict=True) if s >= score]
            found.append(sum(above) / len(above))
    return sum(found) / len(found)


def brute_force_auc(higher: Sequence[float], lower: Sequence[float]) -> float:
    wins = sum((a > b) + 0.5 * (a == b) for a in higher for b in lower)
    return wins / (len(higher) * len(lower))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, 60 clips in two files and the list of classes."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_run(folder / "run", "frame_logistic")
    write_records(folder / "a.tfrecord", 40, seed=1)
    write_records(folder / "b.tfrecord", 20, seed=2)
    write_labels(folder / "labels.csv")
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    found = run("evaluate", "--model", folder / "run", "--data", folder, "--format", "json", "--batch-size", 7)
    assert found.exit_code == 0, found.output
    content: dict[str, Any] = json.loads(found.stdout, parse_constant=refuse_constant)
    return content


@pytest.fixture(scope="module")
def scored(folder: Path) -> tuple[np.ndarray, np.ndarray, ClipSet]:
    """``(60, 7)`` scores and labels, computed without any of what is tested."""
    trained = open_trained(folder / "run")
    clips = read_data(trained, str(folder), LABELS)
    batch = clips.gather(np.arange(len(clips)))
    return trained.classifier(batch.values, batch.num_frames).numpy(), batch.labels, clips


def test_every_class_has_the_figures_that_the_words_define(
    result: dict[str, Any], scored: tuple[np.ndarray, np.ndarray, ClipSet]
) -> None:
    scores, labels, _ = scored
    aps = []
    for entry in result["per_class"][:6]:
        i = entry["index"]
        positive = labels[:, i]
        assert (entry["name"], entry["mid"], entry["positives"]) == (NAMES[i], f"/m/{i:03d}", positive.sum())
        aps.append(brute_force_ap(scores[:, i].tolist(), positive.tolist()))
        assert entry["ap"] == pytest.approx(aps[-1], rel=1e-6)
        auc = brute_force_auc(scores[positive, i].tolist(), scores[~positive, i].tolist())
        assert entry["auc"] == pytest.approx(auc, rel=1e-6)
    assert result["map"] == pytest.approx(float(np.mean(aps)), rel=1e-6)


def test_a_class_that_never_occurs_has_no_figures_and_says_why(result: dict[str, Any]) -> None:
    last = result["per_class"][6]
    assert (last["ap"], last["auc"], last["d_prime"]) == (None, None, None)
    assert last["reason"] == "no clip is labelled with it"
    assert [entry["name"] for entry in result["classes_without_clips"]] == ["Theremin"]
    assert (result["classes"], result["classes_measured"]) == (7, 6)


def test_the_gunfire_report_follows_from_the_highest_score_of_the_family(
    result: dict[str, Any], scored: tuple[np.ndarray, np.ndarray, ClipSet]
) -> None:
    scores, labels, clips = scored
    family, gunfire = scores[:, FAMILY].max(axis=1), labels[:, FAMILY].any(axis=1)
    report = result["gunfire"]
    ap = brute_force_ap(family.tolist(), gunfire.tolist())
    assert result["gunfire_family_ap"] == report["family_ap"] == pytest.approx(ap, rel=1e-6)
    low, high = report["family_ap_95"]
    assert low < ap < high
    assert [entry["name"] for entry in report["family"]] == ["Gunshot, gunfire", "Machine gun"]
    points = report["recall_at_false_positive_rate"]
    assert [point["max_false_positive_rate"] for point in points] == [0.001, 0.005, 0.01, 0.02, 0.05, 0.1]
    for point in points:
        rate = point["max_false_positive_rate"]
        recalls = [
            (family[gunfire] >= t).mean() for t in family if (family[~gunfire] >= t).mean() <= rate
        ]  # every threshold that keeps the promise
        assert point["recall"] == pytest.approx(max(recalls, default=0.0), rel=1e-6)
        if point["threshold"] is not None:
            assert (family[~gunfire] >= point["threshold"] - 1e-8).mean() <= rate
            chosen = family >= point["threshold"] - 1e-8
            assert point["precision"] == pytest.approx(gunfire[chosen].mean(), rel=1e-6)
        else:
            assert "false positive" in point["reason"]
    for entry in report["look_alikes"]:
        theirs = labels[:, entry["index"]] & ~gunfire
        assert entry["clips"] == theirs.sum()
        auc = brute_force_auc(family[gunfire].tolist(), family[theirs].tolist())
        assert entry["auc"] == pytest.approx(auc, rel=1e-6)
        for confusion in entry["confusions"]:
            if confusion["threshold"] is not None:
                above = (family[theirs] >= confusion["threshold"] - 1e-8).mean()
                assert confusion["above"] == pytest.approx(above, rel=1e-6)
    expected = calibration(family, gunfire)
    assert report["calibration"]["expected_error"] == pytest.approx(expected.expected_error, rel=1e-6)
    assert report["calibration"]["brier"] == pytest.approx(float(((family - gunfire) ** 2).mean()), rel=1e-5)
    assert sum(entry["clips"] for entry in report["calibration"]["bins"]) == 60
    hardest = report["highest_without_gunfire"][0]
    worst = int(np.flatnonzero(~gunfire)[family[~gunfire].argmax()])
    assert hardest["video_id"] == clips.video_id(worst)
    assert hardest["family_score"] == pytest.approx(family[worst], rel=1e-6)
    missed = int(np.flatnonzero(gunfire)[family[gunfire].argmin()])
    assert report["lowest_with_gunfire"][0]["video_id"] == clips.video_id(missed)


def test_the_starter_codes_figures_are_beside_them(
    result: dict[str, Any], scored: tuple[np.ndarray, np.ndarray, ClipSet]
) -> None:
    scores, labels, _ = scored
    assert result["hit_at_one"] == pytest.approx(labels[np.arange(60), scores.argmax(1)].mean())
    order = np.argsort(-scores, axis=1)
    precisions = [
        labels[i, order[i, : labels[i].sum()]].mean() if labels[i].any() else 0.0 for i in range(60)
    ]  # clips without labels count as 0, as in the original
    assert result["perr"] == pytest.approx(np.mean(precisions))
    assert result["gap"] == pytest.approx(brute_force_ap(scores.ravel().tolist(), labels.ravel().tolist()), rel=1e-5)
    loss = -(labels * np.log(scores + 1e-5) + ~labels * np.log(1 - scores + 1e-5)).sum(1).mean()
    assert result["avg_loss"] == pytest.approx(loss, rel=1e-4)
    # with no more classes than top_k the starter code sees all, and its mAP is the same number
    assert result["map_top_k"] == pytest.approx(result["map"], rel=1e-6)


def test_data_and_model_are_named(result: dict[str, Any], folder: Path) -> None:
    assert result["data"] == {
        "pattern": str(folder),
        "files": 2,
        "clips": 60,
        "damaged": 0,
        "damages": [],
        "unscored": 0,
        "unscored_clips": [],
    }
    assert result["model"]["kind"] == "frame_logistic"
    assert result["model"]["form"] == "run"
    assert re.fullmatch("[0-9a-f]{64}", result["model"]["sha256"])


def test_the_starter_codes_flags_do_the_same(folder: Path, result: dict[str, Any]) -> None:
    found = run(
        "evaluate", f"--train_dir={folder / 'run'}", f"--eval_data_pattern={folder}/*.tfrecord", "--run_once=True",
        "--top_k=20", "--batch_size=7", "--label_loss=CrossEntropyLoss", "--format", "json",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    again = json.loads(found.stdout)
    assert {**again, "data": 0} == {**result, "data": 0}
    assert run("evaluate", "--train_dir", folder / "run", "--data", folder, "--run_once").exit_code == 0
    refused = run("evaluate", "--train_dir", folder / "run", "--data", folder, "--run_once=False")
    assert refused.exit_code == 78
    assert "evaluates once" in refused.stderr


def test_a_smaller_top_k_and_another_loss_change_what_they_should(folder: Path, result: dict[str, Any]) -> None:
    found = run(
        "evaluate", "--model", folder / "run", "--data", folder, "--top-k", 1, "--label-loss", "HingeLoss",
        "--format", "json",
    )  # fmt: skip
    other = json.loads(found.stdout)
    assert other["map_top_k"] < result["map_top_k"]
    assert other["map"] == result["map"]
    assert other["label_loss"] == "HingeLoss"
    assert other["avg_loss"] != result["avg_loss"]


def test_text_names_what_matters(folder: Path) -> None:
    found = run("evaluate", "--model", folder / "run", "--data", folder)
    assert found.exit_code == 0, found.output
    for words in ("60 clips of 2 files", "family AP", "Machine gun", "1 % false positives", "Fireworks", "Theremin"):
        assert words in " ".join(found.stdout.split())  # a long folder wraps the line
    assert max(len(line) for line in found.stdout.splitlines()) <= 100


def test_several_outputs_go_by_their_endings_and_each_clip_gets_a_row(folder: Path, tmp_path: Path) -> None:
    found = run(
        "evaluate", "--model", folder / "run", "--data", folder, "--output", tmp_path / "e.json", "--output",
        tmp_path / "e.html", "--output", tmp_path / "e.txt", "--by-clip", tmp_path / "clips.csv",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert found.stdout == ""
    assert json.loads((tmp_path / "e.json").read_text())["data"]["clips"] == 60
    assert (tmp_path / "e.html").read_text().startswith("<!doctype html>")
    assert "family AP" in (tmp_path / "e.txt").read_text()
    with (tmp_path / "clips.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60
    assert {row["gunfire"] for row in rows} == {"0", "1"}
    for row in rows:
        assert (row["gunfire"] == "1") == bool({"Gunshot, gunfire", "Machine gun"} & set(row["labels"].split("; ")))
    absent = run("evaluate", "--model", folder / "run", "--data", folder, "--output", tmp_path / "no" / "e.json")
    assert absent.exit_code == 78
    assert "there is no folder" in absent.stderr


def test_other_families_may_be_named(folder: Path) -> None:
    found = run(
        "evaluate", "--model", folder / "run", "--data", folder, "--labels", folder / "labels.csv", "--family", "Dog",
        "--look-alikes", "/m/000", "--format", "json",
    )  # fmt: skip
    report = json.loads(found.stdout)["gunfire"]
    assert [entry["name"] for entry in report["family"]] == ["Dog"]
    assert [entry["name"] for entry in report["look_alikes"]] == ["Speech"]


def test_damaged_records_are_counted_and_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.tfrecord").write_bytes((folder / "a.tfrecord").read_bytes()[:-40])
    found = run("evaluate", "--model", folder / "run", "--data", tmp_path, "--format", "json")
    assert found.exit_code == 0
    data = json.loads(found.stdout)["data"]
    assert (data["clips"], data["damaged"]) == (39, 1)
    assert "cut.tfrecord, byte" in data["damages"][0]
    assert "1 damaged records skipped" in found.stderr
    stopped = run("evaluate", "--model", folder / "run", "--data", tmp_path, "--stop-on-damage")
    assert stopped.exit_code == 1
    assert "cut off" in stopped.stderr


def test_clips_the_model_has_no_number_for_are_left_out_and_named(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.tfrecord"
    with RecordWriter(path) as writer:
        writer.write(encode_clip("nothing", np.zeros((0, 128), np.uint8), [1]))
    write_records(tmp_path / "good.tfrecord", 9, seed=5)
    found = run("evaluate", "--model", folder / "run", "--data", tmp_path, "--format", "json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["data"]["unscored_clips"] == ["nothing"]
    assert "For 1 clips the model gives no number; they are left out: nothing (0 frames)." in found.stderr
    alone = run("evaluate", "--model", folder / "run", "--data", path)
    assert alone.exit_code == 1
    assert "gives no number for any of 1 clips" in alone.stderr


def evaluation_of(folder: Path, tmp_path: Path, labels: Sequence[Sequence[int]], ids: Sequence[str] = ()) -> Evaluation:
    random = np.random.default_rng(1)
    with RecordWriter(tmp_path / "made.tfrecord") as writer:
        for i, each in enumerate(labels):
            frames = random.integers(0, 256, (4, 128), np.uint8)
            name = ids[i] if ids else f"clip{i}"
            writer.write(encode_clip(name, frames, list(each), start_seconds=75.0, end_seconds=85.0))
    trained = open_trained(folder / "run")
    clips = read_data(trained, str(tmp_path / "made.tfrecord"), LABELS)
    return evaluate(trained, clips, Classes(LABELS, FAMILY, ALIKE))


@pytest.mark.parametrize("labels", [[[0], [3], [5]], [[1], [2, 3], [1, 2]], [[]], [[1]]])
def test_data_of_one_kind_gives_nulls_with_reasons_and_still_a_page(
    folder: Path, tmp_path: Path, labels: list[list[int]]
) -> None:
    evaluation = evaluation_of(folder, tmp_path, labels)
    found = json.loads(as_json(evaluation), parse_constant=refuse_constant)
    gunfire = sum(bool(set(each) & set(FAMILY)) for each in labels)
    assert found["gunfire"]["auc"] is None
    assert "with gunfire" in found["gunfire"]["reason"]
    assert (found["gunfire_family_ap"] is None) == (gunfire == 0)
    assert "</html>" in as_html(evaluation)


class Page(HTMLParser):
    """What a page holds and would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.labels: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {name: value or "" for name, value in attrs}
        self.loads += [values[name] for name in ("src", "srcset", "data", "poster", "xlink:href") if name in values]
        if tag in ("link", "image", "use"):
            self.loads.append(values.get("href", ""))
        if tag == "a":
            self.links.append(values["href"])
        if "id" in values:
            self.ids.append(values["id"])
        if values.get("role") == "img":
            self.labels.append(values["aria-label"])


def test_the_page_stands_alone_and_escapes_what_it_was_given(folder: Path, tmp_path: Path) -> None:
    ids = ["<script>x</script>", "aBcD_-12345", *(f"clip{i}" for i in range(18))]
    evaluation = evaluation_of(folder, tmp_path, [[i % 6] for i in range(20)], ids)
    text = as_html(evaluation)
    assert as_html(evaluation) == text  # the same every time
    page = Page()
    page.feed(text)
    assert not [address for address in page.loads if not address.startswith("#")]
    assert not re.search(r"@import|url\((?!#)", text)
    assert "<script>x" not in text
    assert "&lt;script&gt;x" in text
    assert page.tags.count("script") == 1
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == len(page.labels) == 6
    assert all(len(label) > 30 for label in page.labels)
    assert [link for link in page.links if not link.startswith("#")] == ["https://youtu.be/aBcD_-12345?t=75"]
    for i, name in enumerate(NAMES):
        assert f'data-index="{i}"' in text
        assert name in text
    assert "#0102" not in text  # every stand-in colour became one of the page's
    assert {f"--{name}" for name in ("gunfire", "alike", "other", "ink")} <= set(re.findall(r"var\((--\w+)\)", text))


@pytest.mark.golden
def test_the_starter_codes_eval_prints_the_same(golden_dir: Path) -> None:
    checked = 0
    for folder in sorted(golden_dir.glob("e2e_*")):
        line = (folder / "eval_summary_line.txt").read_text()
        wanted = dict(re.findall(r"([A-Za-z_@1]+): ([\d.]+)", line.split("|", 1)[1]))
        hit = re.search(r"Avg_Hit@1: ([\d.]+)", line)
        assert hit is not None
        found = run(
            "evaluate", "--train_dir", folder, "--eval_data_pattern", golden_dir / "yt8m_style.tfrecord", "--family",
            "427-430", "--format", "json",
        )  # fmt: skip
        assert found.exit_code == 0, found.output
        ours = json.loads(found.stdout)
        assert ours["hit_at_one"] == pytest.approx(float(hit[1]), abs=5.1e-4)
        for theirs, key in (("Avg_PERR", "perr"), ("MAP", "map_top_k"), ("GAP", "gap")):
            assert ours[key] == pytest.approx(float(wanted[theirs]), abs=5.1e-4), f"{folder.name} {key}"
        assert ours["avg_loss"] == pytest.approx(float(wanted["Avg_Loss"]), rel=1e-5)
        checked += 1
    assert checked


def test_audioset_with_its_ontology(data_dir: Path, tmp_path: Path) -> None:
    audioset = data_dir / "audioset"
    folder = make_starter_folder(tmp_path / "starter", "MoeModel", classes=527)
    some = sorted((audioset / "features" / "audioset_v1_embeddings" / "eval_dev").glob("[0-4]*.tfrecord"))
    pattern = ",".join(map(str, some))
    found = run(
        "evaluate", "--model", folder, "--data", pattern, "--labels", audioset / "class_labels_indices.csv",
        "--ontology", audioset / "ontology.json", "--format", "json",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout, parse_constant=refuse_constant)
    assert [entry["index"] for entry in result["gunfire"]["family"]] == [427, 428, 429, 430]
    alike = {entry["name"] for entry in result["gunfire"]["look_alikes"]}
    assert {"Fireworks", "Firecracker", "Explosion", "Thunder", "Burst, pop", "Boom"} <= alike
    assert result["data"]["clips"] > 300
    assert math.isfinite(result["map"])


def test_as_dict_holds_what_the_issue_asks_for(result: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    keys = {"hit_at_one", "perr", "gap", "map", "gunfire_family_ap", "avg_loss", "auc", "d_prime", "per_class"}
    assert keys <= set(as_dict(evaluation_of(folder, tmp_path, [[1], [0]]))) & set(result)
