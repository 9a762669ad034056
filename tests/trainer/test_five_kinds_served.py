"""A model of each of the five kinds, trained by a user on own recordings, is served by ``detector run``.

It scores there what ``trainer predict`` says of the same sound: what is trained is what is served.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from detector.alert import Alert
from detector.alert import decode as decode_alert
from detector.audio import float_to_int16
from detector.bus.embedded import EmbeddedBus
from detector.chunk import CHUNK_SAMPLES, RATE_HZ, Chunk, encode
from tests.test_detector_commands import DEADLINE_SECONDS, Daemon

LABELS = ("Speech", "Gunshot, gunfire", "Thunder")
GUNFIRE = 1
CHUNKS = 10  # a whole window
LEAD_SAMPLES = 240  # the zeros that stand before a stream's first chunk
STREAM = "user"

KINDS = {
    "LogisticModel": (),
    "MoeModel": ("--moe_num_mixtures=2",),
    "FrameLevelLogisticModel": (),
    "DbofModel": ("--dbof_cluster_size=16", "--dbof_hidden_size=8", "--iterations=10"),
    "LstmModel": ("--lstm_cells=8", "--lstm_layers=1"),
}
ON_VGGISH = "LstmModel"  # the others on a network that takes less time, with the same PCA and bytes behind it


def trainer(*arguments: object) -> str:
    from trainer.__main__ import main

    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, f"{arguments}\n{result.output}\n{result.exception!r}"
    return result.output


def loud(seed: int, seconds: float) -> np.ndarray:
    """Noise whose level and colour change all the time, so that every example is another."""
    random = np.random.default_rng(seed)
    x = random.normal(0, 1, round(seconds * RATE_HZ))
    level = np.exp(np.interp(np.arange(len(x)), np.linspace(0, len(x), 25), random.uniform(-5, -1, 25)))
    return np.asarray(np.clip(level * (x + np.roll(x, int(random.integers(1, 40)))), -1, 1))


def write_store(store: Path) -> None:
    """Random weights in VGGish's published shape, and PCA parameters, as `detector models fetch vggish` leaves them."""
    from detector.checkpoint import write_safetensors
    from detector.embedders.vggish import VGGISH_SHAPES
    from detector.fetch import PCA_NAME, WEIGHTS_NAME
    from detector.store import Lock, sha256_of_file

    random = np.random.default_rng(1)
    store.mkdir()
    tensors = {}
    for name, shape in VGGISH_SHAPES.items():
        values = random.standard_normal(shape, np.float32)
        values *= np.float32(np.sqrt(2 / np.prod(shape[:-1])) if name.endswith("weights") else 0.1)
        tensors[name] = values
    write_safetensors(store / WEIGHTS_NAME, tensors)
    write_pca(store / PCA_NAME)
    lock = Lock(store)
    for name in (WEIGHTS_NAME, PCA_NAME):
        lock.pin(name, sha256_of_file(store / name), origin="a test")
    lock.save()


def write_pca(path: Path) -> None:
    turned, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(128, 128)))
    np.savez(path, pca_eigen_vectors=turned.astype(np.float32), pca_means=np.zeros(128, np.float32))


def write_small_package(folder: Path) -> None:
    """The built-in network with PCA and bytes behind it; its classifier is of no account."""
    from detector.checkpoint import read_safetensors
    from detector.classifiers import build_classifier, weights
    from detector.embedders import tensor_shapes
    from detector.model import save_package
    from detector.store import sha256_of_file

    shipped = Path(__file__).parents[2] / "detector" / "models" / "compact-gunfire" / "embedder.safetensors"
    folder.mkdir()
    write_pca(folder / "pca.npz")
    draft: dict[str, Any] = {
        "name": "small",
        "version": "1",
        "license": "Apache-2.0",
        "labels": ["anything"],
        "family": ["anything"],
        "embedder": {"kind": "compact"},
        "postprocess": {"kind": "pca_quantise", "file": "pca.npz", "sha256": sha256_of_file(folder / "pca.npz")},
        "classifier": {"kind": "logistic", "params": {"classes": 1, "input_size": 128}},
        "decision": {"open_threshold": 0.5, "close_threshold": 0.4},
        "training": {"command": "none", "data": [], "date": "2026-01-01"},
    }
    classifier = weights(build_classifier("logistic", {"classes": 1}))
    embedder = read_safetensors(shipped, tensor_shapes("compact"))
    save_package(folder, draft, classifier_weights=classifier, embedder_weights=embedder)


@dataclass(frozen=True)
class Made:
    """One kind, trained, predicted and exported."""

    package: Path
    store: Path
    predicted: float


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Made, Future[list[float]]]]]:
    """Every kind goes from recordings to a package by the trainer's commands; while the next is made, it is served."""
    folder = tmp_path_factory.mktemp("five")
    write_store(folder / "store")
    write_small_package(folder / "small")
    with (folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("index", "mid", "display_name"))
        rows.writerows((i, f"/m/{i}", name) for i, name in enumerate(LABELS))
    with (folder / "own.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        for i in range(6):
            soundfile.write(folder / f"{i}.wav", float_to_int16(loud(i, 4)), RATE_HZ)
            rows.writerow((f"{i}.wav", LABELS[i % 3]))
    heard = float_to_int16(loud(99, CHUNKS * CHUNK_SAMPLES / RATE_HZ))
    soundfile.write(folder / "heard.wav", np.concatenate([np.zeros(LEAD_SAMPLES, np.int16), heard]), RATE_HZ)
    networks = {"vggish": ("--store", folder / "store"), "small": ("--embedder", f"{folder / 'small'}")}
    for name, options in networks.items():
        trainer("embed", folder / "own.csv", "--labels", folder / "labels.csv", "--output", folder / name, *options)
        trainer("embed", "--wav-file", folder / "heard.wav", "--output", folder / f"{name}-heard.tfrecord", *options)
    found = {}
    with ThreadPoolExecutor(2) as pool:
        for kind, flags in KINDS.items():
            made = _made(folder, kind, flags, "vggish" if kind == ON_VGGISH else "small")
            found[kind] = made, pool.submit(_serve, folder / f"{kind}-served", made, heard)
        yield found


def _made(folder: Path, kind: str, flags: tuple[str, ...], network: str) -> Made:
    run, package, predictions = folder / kind, folder / f"{kind}-package", folder / f"{kind}.csv"
    embedder = "vggish" if network == "vggish" else str(folder / "small")
    trainer(
        "train", "--recipe=reference", f"--model={kind}", *flags, f"--train_dir={run}",
        f"--train_data_pattern={folder / network}/*.tfrecord", "--labels", folder / "labels.csv",
        "--family", LABELS[GUNFIRE], "--look-alikes", LABELS[2],
        "--batch_size=3", "--max_steps=4", "--tensorboard=false",
    )  # fmt: skip
    trainer(
        "predict", f"--train_dir={run}", f"--input_data_pattern={folder / network}-heard.tfrecord",
        f"--output_file={predictions}",
    )  # fmt: skip
    trainer(
        "export", "--model", run, "--output", package, "--name", kind.lower(), "--embedder", embedder,
        "--open-threshold", "0.000001",
    )  # fmt: skip
    with predictions.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["VideoId"] == "heard"
    pairs = row["LabelConfidencePairs"].split()
    scores = {int(label): float(score) for label, score in zip(pairs[::2], pairs[1::2], strict=True)}
    return Made(package, folder / "store", scores[GUNFIRE])


def _publish(bus: EmbeddedBus, pcm: np.ndarray) -> None:
    """The sound, then one chunk of another session, which ends the first one's alert."""
    producer = bus.producer()
    for session, seq in [("one", seq) for seq in range(CHUNKS)] + [("two", 0)]:
        part = pcm[seq * CHUNK_SAMPLES : (seq + 1) * CHUNK_SAMPLES]
        at_ns = 1_790_000_000_000_000_000 + (seq + (session == "two") * CHUNKS) * 960_000_000
        producer.send("audio.chunks", *encode(Chunk(STREAM, session, seq, at_ns, part)))
    producer.flush()
    producer.close()


def _serve(folder: Path, model: Made, heard: np.ndarray) -> list[float]:
    """Family score of every example of the sound, as a ``detector run`` of its own tells in its alert."""
    folder.mkdir()
    environ = {
        "DETECTOR__MODEL__NAME": str(model.package),
        "DETECTOR__MODEL__STORE": str(model.store),
        "DETECTOR__BATCH__MAX_BATCH": "8",
        "DETECTOR__BATCH__HOP_SECONDS": "0.96",  # as far apart as the trainer's examples
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    daemon = Daemon(folder, environ)
    try:
        bus = EmbeddedBus(folder / "bus.sqlite3")
        _publish(bus, heard)
        closed = _closed_alert(bus)
        bus.close()
    finally:
        code = daemon.end(15)
    assert code == 0
    return [point.score for point in closed.timeline]


def _closed_alert(bus: EmbeddedBus) -> Alert:
    consumer, deadline = bus.consumer(["gunfire.alerts"], None), time.monotonic() + DEADLINE_SECONDS
    try:
        while time.monotonic() < deadline:
            for record in consumer.poll(1.0):
                alert = decode_alert(record.key, record.value, record.headers)
                if (alert.stream, alert.session, alert.state) == (STREAM, "one", "closed"):
                    return alert
    finally:
        consumer.close()
    raise AssertionError(f"no alert closed within {DEADLINE_SECONDS} s")


@pytest.mark.parametrize("kind", KINDS)
def test_a_user_trained_model_is_served_with_the_scores_that_the_trainer_predicts(
    kind: str, served: dict[str, tuple[Made, Future[list[float]]]]
) -> None:
    made, serving = served[kind]
    scores = serving.result(2 * DEADLINE_SECONDS)
    assert len(scores) == CHUNKS  # one for each example, over windows that grow to the whole sound
    assert len(set(scores)) > 1
    # Bytes differ by 1 here and there between the float64 front end and the one that serves.
    assert scores[-1] == pytest.approx(made.predicted, abs=2e-3 if kind == ON_VGGISH else 2e-5)
