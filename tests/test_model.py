"""A package loads only if all of it is what it says; a model gives an example the same answer in every batch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from detector.classifiers import build_classifier, weights
from detector.embedders import tensor_shapes
from detector.embedders.compact import CompactNetwork
from detector.errors import ModelError, WeightsMissing
from detector.model import (
    MANIFEST_NAME,
    Model,
    load_classifier,
    load_model,
    save_package,
    self_test_embeddings,
    self_test_pcm,
    write_package,
)

DRAFT: dict[str, Any] = {
    "format_version": 1,
    "name": "trial",
    "version": "0.1",
    "license": "Apache-2.0",
    "labels": ["Gunshot, gunfire", "Fireworks", "Other"],
    "family": ["Gunshot, gunfire"],
    "look_alikes": ["Fireworks"],
    "embedder": {"kind": "compact"},
    "classifier": {"kind": "lstm", "params": {"cells": 24, "layers": 1}},
    "decision": {"open_threshold": 0.5, "close_threshold": 0.3},
    "training": {"command": "none", "data": ["none"], "date": "2026-01-31"},
}


def save(folder: Path, draft: dict[str, Any] | None = None) -> Model:
    draft = draft or DRAFT
    params = {**draft["classifier"]["params"], "classes": len(draft["labels"]), "input_size": 128}
    return save_package(
        folder,
        draft,
        classifier_weights=weights(build_classifier("lstm", params, seed=5)),
        embedder_weights=CompactNetwork(folded=True, seed=5).weights(),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    save(folder)
    return folder


@pytest.fixture(scope="module")
def model(saved: Path) -> Model:
    model = load_model(saved)
    model.warm_up(16)
    return model


@pytest.fixture
def package(saved: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edit(package: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((package / MANIFEST_NAME).read_text())
    change(content)
    (package / MANIFEST_NAME).write_text(json.dumps(content))


def pcm_of(count: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    levels = 10 ** random.uniform(0.5, 4, (count, 1))
    return np.clip(random.standard_normal((count, 15_600)) * levels, -32768, 32767).astype(np.int16)


def test_written_package_loads_tests_itself_and_keeps_its_identity(saved: Path, model: Model) -> None:
    model.self_test()
    again = load_model(f"{saved}/")
    assert again.sha256 == model.sha256
    assert again.labels == tuple(DRAFT["labels"])
    assert again.manifest.family == ("Gunshot, gunfire",)
    scores = again.classify(again.embed(pcm_of(10))[None], np.array([10], np.int32))
    assert scores.shape == (1, 3)
    assert np.all((scores >= 0) & (scores <= 1))


def test_identity_changes_with_manifest_and_with_weights(package: Path, model: Model) -> None:
    edit(package, lambda m: m.update(version="0.2"))
    assert load_model(package).sha256 != model.sha256


def test_an_example_has_the_same_bits_in_every_batch(model: Model) -> None:
    if not model.batch_invariant:
        assert os.environ.get("TF_ENABLE_ONEDNN_OPTS") == "0", "oneDNN is on, yet the batch shows in the result"
        return
    pcm = pcm_of(37)  # more than max_batch: split
    together = model.embed(pcm)
    for count in (1, 2, 3, 5, 16):
        parts = [model.embed(pcm[i : i + count]) for i in range(0, len(pcm), count)]
        np.testing.assert_array_equal(np.concatenate(parts), together)
    windows = np.stack([np.roll(together, i, axis=0)[:10] for i in range(len(pcm))])
    frames = np.arange(37, dtype=np.int32) % 11
    scores = model.classify(windows, frames)
    for count in (1, 2, 3, 5, 16):
        parts = [model.classify(windows[i : i + count], frames[i : i + count]) for i in range(0, len(pcm), count)]
        np.testing.assert_array_equal(np.concatenate(parts), scores)


def test_where_the_number_of_rows_shows_in_products_all_goes_in_blocks(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detector.model._rows_show_in_products", lambda: True)
    model = load_model(saved)
    pcm = pcm_of(19)
    together = model.embed(pcm)  # also before warm_up: a replay does not warm up
    np.testing.assert_array_equal(np.concatenate([model.embed(pcm[:1]), model.embed(pcm[1:])]), together)
    monkeypatch.setattr("detector.model._rows_show_in_products", lambda: False)
    np.testing.assert_allclose(load_model(saved).embed(pcm), together, rtol=0, atol=1e-4)
    model.warm_up(5)
    assert set(model._embed_by_size) == set(model._classify_by_size) == {16}


def test_batch_sizes_without_a_power_of_two(saved: Path) -> None:
    model = load_model(saved)
    model.warm_up(5)
    pcm = pcm_of(11)
    np.testing.assert_allclose(model.embed(pcm), load_model(saved).embed(pcm), rtol=0, atol=1e-5)
    with pytest.raises(ModelError, match="max_batch is 0"):
        model.warm_up(0)


def test_nothing_and_short_windows(model: Model) -> None:
    assert model.embed(np.zeros((0, 15_600), np.int16)).shape == (0, 128)
    assert model.classify(np.zeros((0, 10, 128), np.float32), np.zeros(0, np.int32)).shape == (0, 3)
    windows = np.random.default_rng(1).standard_normal((3, 4, 128)).astype(np.float32)
    frames = np.array([4, 2, 0], np.int32)
    padded = np.concatenate([windows, np.full((3, 6, 128), np.nan, np.float32)], axis=1)
    np.testing.assert_array_equal(model.classify(windows, frames), model.classify(padded, frames))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.embed(np.zeros((2, 15_360), np.int16)), "15600"),
        (lambda m: m.embed(np.zeros((2, 15_600), np.float32)), "float32"),
        (lambda m: m.classify(np.zeros((2, 11, 128), np.float32), np.zeros(2, np.int32)), "10 at most"),
        (lambda m: m.classify(np.zeros((2, 10, 64), np.float32), np.zeros(2, np.int32)), "128"),
        (lambda m: m.classify(np.zeros((2, 10, 128), np.float32), np.array([1, 11], np.int32)), "from 0 to 10"),
        (lambda m: m.classify(np.zeros((2, 10, 128), np.float32), np.array([1], np.int32)), "must be 2 numbers"),
    ],
)
def test_unfit_input(model: Model, call: Callable[[Model], object], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        call(model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format_version=2), "format_version"),
        (lambda m: m.update(colour="red"), "colour"),
        (lambda m: m.pop("labels"), "labels: Field required"),
        (lambda m: m.update(name="../x"), "name"),
        (lambda m: m.update(family=["Cannon"]), "Cannon"),
        (lambda m: m.update(look_alikes=["Gunshot, gunfire"]), "in family and in look_alikes"),
        (lambda m: m.update(labels=["a", "a", "b"]), "twice"),
        (lambda m: m["embedder"].update(kind="resnet"), "'resnet' is unknown; this version knows: compact, vggish"),
        (lambda m: m["embedder"].update(params={"x": 1}), r"takes no params, found \['x'\]"),
        (lambda m: m["embedder"].update(file="../../etc/passwd"), "embedder.file"),
        (lambda m: m["embedder"].pop("sha256"), "sha256 is needed"),
        (lambda m: m["classifier"].update(kind="gru"), "'gru' is unknown"),
        (lambda m: m["classifier"]["params"].update(cells="24"), "cells is '24'"),
        (lambda m: m["classifier"]["params"].update(cells=32), r"has shape \(152, 96\), expected \(160, 128\)"),
        (lambda m: m["classifier"]["params"].update(classes=9), "classes is 9; labels and embedder need 3"),
        (lambda m: m["classifier"].update(sha256="0" * 64), "expected 0000"),
        (lambda m: m["decision"].update(open_threshold=1.5), "decision.open_threshold"),
        (lambda m: m["decision"].update(close_threshold=0.9), "must not be above"),
        (lambda m: m["decision"].update(open_threshold="0.5"), "valid number"),
        (lambda m: m["self_test"].update(expected_scores=[0.1]), "1 values for 3 labels"),
        (lambda m: m.update(window={"hop_seconds": 0.48}), r"window\.hop_seconds is 0\.48; .* 0\.96 s apart"),
        (
            lambda m: m["window"].update(examples=0) if "window" in m else m.update(window={"examples": 0}),
            "window.examples",
        ),
    ],
)
def test_manifest_faults_are_named(package: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    edit(package, change)
    with pytest.raises(ModelError, match=words) as caught:
        load_model(package)
    assert str(package) in str(caught.value)
    assert re.search(r"(Get|Give) .*\.$", str(caught.value)), "no remedy"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b" " * (5 << 20)])
def test_broken_manifest(package: Path, content: bytes) -> None:
    (package / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(ModelError, match=r"manifest\.json.*Get or make the package again"):
        load_model(package)


def test_missing_and_changed_files(package: Path) -> None:
    weights_file = package / "embedder.safetensors"
    whole = weights_file.read_bytes()
    weights_file.write_bytes(whole[:-4] + b"\0\0\0\x01")
    with pytest.raises(ModelError, match=r"embedder\.safetensors has SHA-256 .*expected .*damaged or was replaced"):
        load_model(package)
    weights_file.unlink()
    with pytest.raises(ModelError, match=r"embedder\.safetensors does not exist\. Get it again"):
        load_model(package)
    (package / MANIFEST_NAME).unlink()
    with pytest.raises(ModelError, match=r"manifest\.json can't be read"):
        load_model(package)


def test_self_test_notices_other_scores(package: Path) -> None:
    edit(package, lambda m: m["self_test"].update(expected_scores=[0.9, 0.9, 0.9]))
    with pytest.raises(ModelError, match=r"Self-test of model trial 0\.1 failed: label .* expected 0\.9"):
        load_model(package).self_test()


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'no-such-model' is not among the shipped ones"):
        load_model("no-such-model")
    with pytest.raises(ModelError, match="not among the shipped ones"):
        load_model("..")
    with pytest.raises(ModelError, match="is no folder"):
        load_model(tmp_path / "none")


def test_vggish_of_the_store_needs_a_fetch_first(tmp_path: Path, package: Path) -> None:
    edit(package, lambda m: m.update(embedder={"kind": "vggish", "file": "vggish.safetensors", "from_store": True}))
    with pytest.raises(WeightsMissing, match=r"vggish\.safetensors is not there. Run `detector models fetch vggish`"):
        load_model(package, store=tmp_path / "store")


def test_self_test_sound_is_the_same_everywhere() -> None:
    pcm = self_test_pcm(7, 4)
    assert pcm.shape == (4, 15_600)
    assert np.array_equal(pcm[:2], self_test_pcm(7, 2))
    assert pcm[0, :4].tolist() == [68, -19, 1, 16]


def test_draft_that_does_not_fit_its_weights(tmp_path: Path) -> None:
    assert set(tensor_shapes("compact"))
    with pytest.raises(ModelError, match="holds another model"):
        save_package(
            tmp_path,
            DRAFT,
            classifier_weights=weights(build_classifier("lstm", {"classes": 3, "cells": 24, "layers": 1})),
            embedder_weights={"x": np.zeros(2, np.float32)},
        )


def test_memory_stays_flat_over_many_calls(model: Model) -> None:
    pcm, windows, frames = pcm_of(4), np.zeros((4, 10, 128), np.float32), np.full(4, 10, np.int32)

    def work(rounds: int) -> int:
        for i in range(rounds):
            model.classify(windows[: 1 + i % 4], frames[: 1 + i % 4])
            if i % 10 == 0:
                model.embed(pcm[: 1 + i % 4])
        return psutil.Process().memory_info().rss

    work(300)
    functions = (len(model._embed_by_size), len(model._classify_by_size))
    before = work(300)
    after = work(1_500)
    assert after - before < 12 << 20
    assert (len(model._embed_by_size), len(model._classify_by_size)) == functions


def test_a_package_is_written_and_checked_without_its_embedders_weights(tmp_path: Path) -> None:
    draft = {
        **DRAFT,
        "embedder": {"kind": "vggish", "file": "vggish.safetensors", "from_store": True},
        "postprocess": {"kind": "pca_quantise", "file": "vggish_pca_params.npz", "from_store": True},
        "self_test": {"input": "embeddings"},
    }
    params = {**DRAFT["classifier"]["params"], "classes": 3, "input_size": 128}
    classifier = build_classifier("lstm", params, seed=5)
    manifest = write_package(tmp_path, draft, classifier_weights=weights(classifier), store=tmp_path / "empty")
    packaged = load_classifier(tmp_path)
    window = self_test_embeddings(manifest.self_test.seed, manifest.window.examples)
    assert window.dtype == np.float32
    assert np.abs(window).max() < 2.01
    scores = packaged.classifier(window[None], np.array([10], np.int32)).numpy()[0]
    np.testing.assert_allclose(manifest.self_test.expected_scores, scores, rtol=0, atol=1e-6)
    served = Model(manifest, lambda pcm: pcm, packaged.classifier, "0" * 64)
    served.self_test()
    other = Model(manifest, lambda pcm: pcm, build_classifier("lstm", params, seed=6), "0" * 64)
    with pytest.raises(ModelError, match="Self-test of model trial"):
        other.self_test()
    with pytest.raises(ModelError, match="models fetch vggish"):
        load_model(tmp_path, store=tmp_path / "empty")


def test_a_classifier_that_does_not_fit_its_manifest_is_refused_without_the_embedder_too(package: Path) -> None:
    load_classifier(package)
    edit(package, lambda m: m["classifier"]["params"].update(cells=25))
    with pytest.raises(ModelError, match="shape"):
        load_classifier(package)
    (package / "classifier.safetensors").write_bytes(b"other")
    with pytest.raises(ModelError, match="SHA-256"):
        load_classifier(package)
