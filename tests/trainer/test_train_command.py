"""`trainer train`: both spellings, what it refuses, what it says, and that it never leaves a folder worse off."""

from __future__ import annotations

import csv
import os
import re
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tensorboard.compat.proto.event_pb2 import Event

from detector.classifiers import build_classifier, weights
from tests.trainer.made_clips import SIZE, write_clips, write_labels
from trainer.__main__ import main
from trainer.commands_train import _divided, _Lines
from trainer.records import FeatureSpec, RecordWriter, encode_clip, read_clips
from trainer.run import Run
from trainer.starter_checkpoint import load_starter_model
from trainer.summaries import _whole_records
from trainer.train import Trainer


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Options that every command here needs."""
    train = write_clips(tmp_path / "train.tfrecord", 48)
    labels = write_labels(tmp_path / "labels.csv")
    return [f"--train-data={train}", f"--labels={labels}", f"--feature-sizes={SIZE}", "--batch-size=16"]


def run(*options: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["train", *map(str, options)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def small(*more: Any) -> list[Any]:
    return ["--recipe", "reference", "--model", "FrameLevelLogisticModel", "--num-epochs", 1, *more]


def events(folder: Path) -> list[tuple[int, str]]:
    (path,) = (folder / "events").glob("*tfevents*")
    found = (Event.FromString(record) for record in _whole_records(path))
    return [(event.step, value.tag) for event in found for value in event.summary.value]


def log_rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "log.csv").read_text().splitlines()))


def test_a_run_learns_logs_and_can_be_served(tmp_path: Path, data: list[str]) -> None:
    evaluation = write_clips(tmp_path / "eval.tfrecord", 30, seed=1, prefix="e")
    folder = tmp_path / "run"
    result = run(
        *data,
        *("--train-dir", folder, "--eval-data", evaluation, "--recipe", "reference", "--model", "frame_logistic"),
        *("--num-epochs", 30, "--base-learning-rate", 0.1, "--set", "log_every_steps=5"),
    )
    opened = Run.open(folder)
    best = opened.best()
    assert best is not None
    assert best.metric == "gunfire_family_ap"
    assert opened.config.family == (1, 2)
    value = best.metrics["gunfire_family_ap"]
    assert value is not None
    assert value > 0.9
    rows = log_rows(folder)
    trained = [float(row["train_loss"]) for row in rows if row["train_loss"]]
    evaluated = [row for row in rows if row["evaluation_map"]]
    assert len(trained) == 18
    assert trained[-1] < 0.5 * trained[0]
    assert [int(row["step"]) for row in evaluated] == list(range(3, 91, 3))
    assert max(float(row["evaluation_gunfire_family_ap"]) for row in evaluated) == pytest.approx(value, rel=1e-8)
    tags = {tag for _, tag in events(folder)}
    assert {"train/loss", "train/learning_rate", "train/examples_per_second", "evaluation/map"} <= tags
    assert {f"evaluation/{name}/pr_curves" for name in ("gunfire family", "Gunshot, gunfire", "Machine gun")} <= tags
    assert "best gunfire_family_ap" in result.output
    assert "examples/s  ETA" in result.output
    assert "Step 90: done." in result.output
    served = weights(opened.classifier())
    assert all(np.array_equal(value, opened.weights("best")[0][name]) for name, value in served.items())


def test_both_spellings_are_one_option(tmp_path: Path, data: list[str]) -> None:
    new = ["--model", "lstm", "--lstm-cells", 8, "--lstm-layers", 1, "--base-learning-rate", 0.002, "--max-steps", 2]
    old = ["--model=LstmModel", "--lstm_cells=8", "--lstm_layers=1", "--base_learning_rate=0.002", "--max_steps=2"]
    old += ["--optimizer=AdamOptimizer", "--label_loss=CrossEntropyLoss", "--frame_features=True"]
    old += ["--video_level_classifier_model=MoeModel", "--moe_num_mixtures=2", "--clip_gradient_norm=1.0"]
    run(*data, "--train-dir", tmp_path / "new", "--recipe", "reference", *new, "--set=params.final=moe")
    given = [each.replace("--train-data=", "--train_data_pattern=") for each in data]
    run(*given, f"--train_dir={tmp_path / 'old'}", "--recipe=reference", *old)
    one, two = Run.open(tmp_path / "new"), Run.open(tmp_path / "old")
    assert one.config.kind == two.config.kind == "lstm"
    for name, value in one.weights()[0].items():
        assert np.array_equal(value, two.weights()[0][name])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num_readers=8"], "--num_readers has no meaning here. Records are read once"),
        (["--segment_labels"], "--segment_labels has no meaning"),
        (["--num_gpu=1"], "Give --gpus"),
        (["--optimizer=RMSPropOptimizer"], "give Adam or AdamW"),
        (["--model=NetVLAD"], "--model NetVLAD is unknown; there are lstm"),
        (["--model=MoeModel", "--lstm_cells=3"], "--lstm-cells: models of kind moe have no such thing. They take"),
        (["--gpus=7"], "--gpus 7: TensorFlow finds no GPU"),
        (["--set", "batch_siz=3"], "batch_siz is unknown, did you mean batch_size"),
        (["--set", "nothing"], "KEY=VALUE is needed"),
        (["--batch-size=0"], "batch_size 0"),
        (["--eval-data=x", "--eval-fraction=0.1"], "one of them is enough"),
        (["--num-classes=5"], "--num-classes is 5; .* holds 6"),
        (["--eval-fraction=0.2", "--best-by=beauty"], "best_by 'beauty'"),
        (["--set=learning_rate_schedule=cosine", "--set=warm_up_steps=100"], "of 15 in all. .* fewer --warm-up-steps"),
        (["--model=lstm", "--frame-features=false"], "models of kind lstm need frames"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_is_written(
    tmp_path: Path, data: list[str], options: list[str], words: str
) -> None:
    result = run(*data, f"--train-dir={tmp_path / 'run'}", "--recipe=reference", *options, code=78)
    assert re.search(words, result.output), result.output
    assert not (tmp_path / "run").exists()


def test_a_refused_beginning_does_not_stand_in_the_way(tmp_path: Path, data: list[str]) -> None:
    folder = f"--train-dir={tmp_path / 'run'}"
    run(folder, *data, *small("--hard-negatives=2", "--family=Dog", "--look-alikes=Thunder", "--best-by=map"))
    late = ["--recipe=reference", "--model=frame_logistic", "--num-epochs=1", "--set=params.cells=3"]
    other = f"--train-dir={tmp_path / 'other'}"
    run(other, *data, *late, code=1)
    assert not (tmp_path / "other").exists()
    run(other, *data, *small())


def test_bad_data_is_told_with_its_place(tmp_path: Path, data: list[str]) -> None:
    folder = f"--train-dir={tmp_path / 'run'}"
    empty = run(folder, f"--train-data={tmp_path}/none*.tfrecord", *data[1:], *small(), code=1)
    assert "matches no file" in empty.output
    sizes = run(folder, *data, *small("--feature-sizes=128"), code=1)
    assert "train.tfrecord, byte 0" in sizes.output
    damaged = tmp_path / "train.tfrecord"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    stopped = run(folder, *data, *small("--stop-on-damage"), code=1)
    assert "cut off" in stopped.output
    went_on = run(folder, *data, *small())
    assert "1 damaged records skipped, the first: " in went_on.output
    with RecordWriter(tmp_path / "high.tfrecord") as writer:
        writer.write(encode_clip("x", np.zeros((1, SIZE), np.uint8), [6]))
    high = run(folder, f"--train-data={tmp_path / 'high.tfrecord'}", *data[1:], *small(), code=1)
    assert "high.tfrecord, byte 0" in high.output


def test_absent_classes_and_evaluation_on_training_clips_are_told(
    tmp_path: Path, data: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    labels = write_labels(tmp_path / "labels.csv", ("Speech", "Gunshot, gunfire", "C", "D", "E", "F", "Never", "Nor"))
    train = tmp_path / "train.tfrecord"
    run(f"--train-dir={tmp_path / 'run'}", *data, f"--labels={labels}", f"--eval-data={train}", *small())
    assert "48 of 48 evaluation clips are training clips too (clip0, clip1" in caplog.text
    assert "2 of 8 classes never occur in the training data and won't be learnt: 6 Never, 7 Nor." in caplog.text


def test_the_same_command_goes_on_and_another_one_is_refused(tmp_path: Path, data: list[str]) -> None:
    folder = f"--train-dir={tmp_path / 'run'}"
    run(folder, *data, *small())
    longer = run(folder, *data, *small("--num-epochs=2"))
    assert "Going on from step 3 of 6" in longer.output
    refused = run(folder, *data, *small("--base-learning-rate=0.5"), code=78)
    assert "told otherwise: base_learning_rate is 0.5, it was 0.01" in refused.output
    assert Run.open(tmp_path / "run").load_checkpoint().step == 6  # type: ignore[union-attr]
    run(folder, *data, *small("--base-learning-rate=0.5", "--start-new-model"))
    assert [step for step, _ in Run.open(tmp_path / "run").checkpoint_paths()] == [0, 3]
    rows = log_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == ["3"]


def test_a_kill_while_a_run_is_forgotten_never_mixes_it_with_the_new_one(
    tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = f"--train-dir={tmp_path / 'run'}"
    run(folder, *data, *small())
    other = small("--base-learning-rate=1e-12", "--num-epochs=2")
    with monkeypatch.context() as patched:
        patched.setattr(Run, "update", killed)
        CliRunner().invoke(main, list(map(str, ["train", folder, *data, *other, "--start-new-model"])))
    assert Run.open(tmp_path / "run").checkpoint_paths() == []
    again = run(folder, *data, *other)
    assert "Going on" not in again.output
    # unlike those of the first run these weights have hardly moved from where they began
    begun = weights(build_classifier("frame_logistic", {"input_size": SIZE, "classes": 6}, seed=1))
    for name, value in Run.open(tmp_path / "run").weights()[0].items():
        np.testing.assert_allclose(value, begun[name], rtol=0, atol=1e-9)


def killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_forgetting_takes_checkpoints_first(tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run(f"--train-dir={tmp_path / 'run'}", *data, *small())
    gone: list[str] = []
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: gone.append(path.name))
    Run.open(tmp_path / "run").clear()
    assert gone[:2] == ["step-000000003.safetensors", "step-000000000.safetensors"]


def test_another_programs_run_json_is_left_alone(tmp_path: Path, data: list[str]) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "run.json").write_text('{"name": "theirs"}')
    for more in ([], ["--start-new-model"]):
        refused = run(f"--train-dir={theirs}", *data, *small(*more), code=78)
        assert "run.json is damaged or of another version" in refused.output
        assert "give another --train-dir" in refused.output
    assert [path.name for path in theirs.iterdir()] == ["run.json"]
    assert (theirs / "run.json").read_text() == '{"name": "theirs"}'


def test_a_run_that_took_no_step_does_not_stand_in_the_way(
    tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = f"--train-dir={tmp_path / 'run'}"
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_train", killed)
        CliRunner().invoke(main, list(map(str, ["train", folder, *data, *small()])))
    assert [step for step, _ in Run.open(tmp_path / "run").checkpoint_paths()] == [0]
    run(folder, *data, *small("--base-learning-rate=0.5"))
    assert Run.open(tmp_path / "run").config.recipe.base_learning_rate == 0.5


def test_a_schedule_changed_on_the_way_is_refused_by_name(tmp_path: Path, data: list[str]) -> None:
    folder = f"--train-dir={tmp_path / 'run'}"
    run(folder, *data, *small("--learning-rate-schedule=cosine"))
    refused = run(folder, *data, *small("--learning-rate-schedule=stairs"), code=78)
    assert 'learning_rate_schedule is "stairs", it was "cosine"' in refused.output


@pytest.mark.parametrize("loss", ["HingeLoss", "SoftmaxLoss"])
def test_every_loss_takes_weights(tmp_path: Path, data: list[str], loss: str) -> None:
    options = small(f"--label-loss={loss}", "--class-weighting=0.5", "--hard-negatives=2", "--quiet")
    run(f"--train-dir={tmp_path / 'run'}", *data, *options, "--max-steps=1")
    assert Run.open(tmp_path / "run").weights()[1] == 1


def test_the_starter_codes_folder_is_left_alone_and_can_be_started_from(tmp_path: Path, data: list[str]) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "model_flags.json").write_text("{}")
    refused = run(f"--train-dir={theirs}", *data, *small(), code=78)
    assert f"--start-from {theirs}" in refused.output
    assert [path.name for path in theirs.iterdir()] == ["model_flags.json"]


@pytest.mark.golden
def test_the_starter_codes_weights_are_where_a_run_begins(tmp_path: Path, golden_dir: Path) -> None:
    theirs = golden_dir / "e2e_lstm16"
    run(
        *(f"--train-dir={tmp_path / 'run'}", f"--train-data={golden_dir / 'yt8m_style.tfrecord'}"),
        *("--recipe=reference", "--model=LstmModel", "--lstm_cells=16", "--frame_features", f"--start-from={theirs}"),
        *("--base_learning_rate=1e-12", "--max_steps=1", "--num_epochs=1"),
    )
    expected = weights(load_starter_model(theirs).classifier)
    for name, value in Run.open(tmp_path / "run").weights()[0].items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-9)


def test_a_run_starts_from_another_runs_weights(tmp_path: Path, data: list[str]) -> None:
    run(f"--train-dir={tmp_path / 'one'}", *data, *small())
    given = small(f"--start-from={tmp_path / 'one'}", "--base-learning-rate=1e-12")
    run(f"--train-dir={tmp_path / 'two'}", *data, *given)
    one, two = (Run.open(tmp_path / name).weights()[0] for name in ("one", "two"))
    assert all(np.allclose(two[name], value, atol=1e-9) for name, value in one.items())
    other = ["--recipe=reference", "--model=moe", f"--start-from={tmp_path / 'one'}"]
    assert "its model is frame_logistic" in run(f"--train-dir={tmp_path / 'x'}", *data, *other, code=78).output
    smaller = [f"--train-dir={tmp_path / 'x'}", *data[:1], "--num-classes=7", *data[2:], *given]
    refused = run(*smaller, code=78)
    assert re.search("other sizes .classes 6 there, 7 here.*--labels of as many classes", refused.output)
    another = small("--start-from=elsewhere", "--base-learning-rate=1e-12")
    refused = run(f"--train-dir={tmp_path / 'two'}", *data, *another, code=78)
    assert 'started_from is "elsewhere", it was ' in refused.output
    shutil.rmtree(tmp_path / "one")  # needed at the beginning alone
    longer = run(f"--train-dir={tmp_path / 'two'}", *data, *given, "--num-epochs=2")
    assert "Going on from step 3 of 6" in longer.output


def test_a_share_kept_for_evaluation_is_not_trained_on(tmp_path: Path, data: list[str]) -> None:
    run(f"--train-dir={tmp_path / 'run'}", *data, *small("--eval-fraction=0.3"))
    config = Run.open(tmp_path / "run").config
    assert config.evaluation is not None
    assert 5 < config.evaluation.clips < 25
    assert config.training.clips + config.evaluation.clips == 48


def test_all_parts_of_a_recording_are_on_one_side(tmp_path: Path) -> None:
    path = tmp_path / "parts.tfrecord"
    with RecordWriter(path) as writer:
        for i in range(60):
            name, start = f"rec{i // 6}", 10.0 * (i % 6)
            features = np.zeros((1, SIZE), np.uint8)
            writer.write(encode_clip(f"{name}_{round(1000 * start)}", features, [0], start_seconds=start))
    clips = read_clips([path], classes=1, spec=FeatureSpec(sizes=(SIZE,)))
    sides = [{part.recording_id(i) for i in range(len(part))} for part in _divided(clips, 0.4)]
    assert len(sides[0] | sides[1]) == 10
    assert not sides[0] & sides[1]


def test_without_evaluation_data_what_needs_it_is_told(
    tmp_path: Path, data: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for i, option in enumerate(("--patience=3", "--best-by=map")):
        caplog.clear()
        run(f"--train-dir={tmp_path / f'run{i}'}", *data, *small(option, "--max-steps=1"))
        assert "Without --eval-data or --eval-fraction nothing is evaluated" in caplog.text


def test_a_table_of_qualities_that_changed_is_another_run(tmp_path: Path, data: list[str]) -> None:
    table = tmp_path / "quality.csv"
    table.write_text("class,quality\nSpeech,0.5\n")
    options = [f"--train-dir={tmp_path / 'run'}", *data, *small(f"--label-quality={table}", "--max-steps=1")]
    run(*options)
    table.write_text("class,quality\nSpeech,0.6\n")
    assert "label_quality_fingerprint is " in run(*options, code=78).output
    table.unlink()
    assert "quality.csv can't be read" in run(*options, code=1).output


def test_clips_without_frames_are_left_out_by_name(
    tmp_path: Path, data: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    good = write_clips(tmp_path / "a" / "good.tfrecord", 40)
    with RecordWriter(tmp_path / "a" / "broken.tfrecord") as writer:
        writer.write(encode_clip("hollow", np.zeros((0, SIZE), np.uint8), [1]))
    both = [f"--train-data={good.parent}", *data[1:], f"--eval-data={good.parent}"]
    run(f"--train-dir={tmp_path / 'run'}", *both, *small())
    assert caplog.text.count("1 of 41 clips have no frames and are left out: hollow.") == 2
    config = Run.open(tmp_path / "run").config
    assert config.evaluation is not None
    assert config.training.clips == config.evaluation.clips == 40
    alone = run(f"--train-dir={tmp_path / 'x'}", f"--train-data={good.parent}/b*", *data[1:], *small(), code=1)
    assert "None of the 1 clips" in alone.output


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path, data: list[str]) -> None:
    folder = f"--train-dir={tmp_path / 'run'}"
    result = run(folder, *data, *small("--num-epochs=3", "--base-learning-rate=3e38"), code=1)
    assert "Step 2 (epoch 1, batch 2): the regularisation loss is inf; the step was not taken" in result.output
    assert "Clips of the batch: clip" in result.output
    assert "--base-learning-rate" in result.output
    kept, _ = Run.open(tmp_path / "run").weights()
    assert all(np.isfinite(value).all() for value in kept.values())


@contextmanager
def files_up_to(size_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_at_a_checkpoint_leaves_the_older_ones(
    tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = f"--train-dir={tmp_path / 'run'}"
    lstm = ["--recipe=reference", "--model=lstm", "--lstm-cells=48", "--quiet"]  # a checkpoint of 340 kB
    run(folder, *data, *lstm, "--num-epochs=1")
    before = {path: path.read_bytes() for _, path in Run.open(tmp_path / "run").checkpoint_paths()}
    with files_up_to(200_000):
        result = run(folder, *data, *lstm, "--num-epochs=2", code=1)
    assert "can't be written: File too large" in result.output
    assert {path: path.read_bytes() for _, path in Run.open(tmp_path / "run").checkpoint_paths()} == before
    assert not list((tmp_path / "run" / "checkpoints").glob("*.part"))
    run(folder, *data, *lstm, "--num-epochs=2")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint(
    tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    told = _Lines.progress

    def progress(self: _Lines, value: Any) -> None:
        told(self, value)
        if value.step == 4:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(_Lines, "progress", progress)
    folder = f"--train-dir={tmp_path / 'run'}"
    result = run(folder, *data, *small("--num-epochs=9", "--set=log_every_steps=2"), code=code)
    assert "Stopped at step 4 of 27; the checkpoint is saved. Give the same command again" in result.output
    assert Run.open(tmp_path / "run").weights()[1] == 4


def test_training_ends_where_nothing_gets_better(tmp_path: Path, data: list[str]) -> None:
    evaluation = write_clips(tmp_path / "eval.tfrecord", 30, seed=1, prefix="e")
    options = small(f"--eval-data={evaluation}", "--num-epochs=50", "--patience=2", "--base-learning-rate=1e-12")
    result = run(f"--train-dir={tmp_path / 'run'}", *data, *options)
    assert "no better evaluation" in result.output
    assert Run.open(tmp_path / "run").load_checkpoint().step < 20  # type: ignore[union-attr]
    best = Run.open(tmp_path / "run").best()
    assert best is not None
    assert best.step == 3
    again = run(f"--train-dir={tmp_path / 'run'}", *data, *options)
    assert "no better evaluation" in again.output


def test_a_folder_in_use_is_refused(tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = f"--train-dir={tmp_path / 'run'}"
    inner: list[Result] = []
    train = Trainer.train

    def nested(self: Trainer) -> Any:
        monkeypatch.setattr(Trainer, "train", train)
        inner.append(run(folder, *data, *small(), code=78))
        return train(self)

    monkeypatch.setattr(Trainer, "train", nested)
    run(folder, *data, *small())
    assert "Another process is training in" in inner[0].output
