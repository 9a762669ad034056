"""VGGish gives the original's activations and embeddings, from log-mel examples and from PCM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from detector.embedders import build_embedder
from detector.embedders.postprocess import dequantise, prequantise, quantise, read_pca
from detector.embedders.vggish import VGGISH_SHAPES, Vggish
from detector.errors import ModelError


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> dict[str, np.ndarray]:
    return dict(np.load(golden_dir / "vggish_net.npz"))


@pytest.fixture(scope="module")
def front_end(golden_dir: Path) -> dict[str, np.ndarray]:
    return dict(np.load(golden_dir / "vggish_frontend.npz"))


@pytest.fixture(scope="module")
def network(vggish_tensors: dict[str, np.ndarray]) -> Vggish:
    return Vggish(vggish_tensors)


@pytest.fixture(scope="module")
def embed(network: Vggish) -> Callable[[np.ndarray], np.ndarray]:
    function = tf.function(network.__call__, input_signature=[tf.TensorSpec([None, 96, 64], tf.float32)])
    return lambda x: function(tf.constant(x)).numpy()


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4, what: str = "") -> None:
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance, err_msg=what)


def test_parameter_count_is_the_originals() -> None:
    assert sum(int(np.prod(shape)) for shape in VGGISH_SHAPES.values()) == 72_141_184


@pytest.mark.golden
def test_embeddings_of_every_signal(
    golden: dict[str, np.ndarray], front_end: dict[str, np.ndarray], embed: Callable[[np.ndarray], np.ndarray]
) -> None:
    inputs = {k.removeprefix("logmel_"): v for k, v in front_end.items() if k.startswith("logmel_") and v.ndim == 3}
    inputs |= {"rand_input": golden["rand_input"], "long_rows": front_end["long_logmel_rows"]}
    names = [k.removeprefix("emb_") for k in golden if k.startswith("emb_") and k.removeprefix("emb_") in inputs]
    assert len(names) >= 2
    for name in names:
        assert_close(embed(inputs[name].astype(np.float32)), golden[f"emb_{name}"], what=name)


@pytest.mark.golden
def test_activations_of_every_layer(golden: dict[str, np.ndarray], network: Vggish) -> None:
    by_name = {name.replace("/", "_"): value for name, value in network.activations(golden["rand_input"]).items()}
    layers = [k.removeprefix("act_").removesuffix("_meanstd") for k in golden if k.endswith("_meanstd")]
    assert layers
    for layer in layers:
        value = by_name[layer].numpy()
        assert value.shape == tuple(golden[f"act_{layer}_shape"])
        found = [value.mean(dtype=np.float64), value.std(dtype=np.float64)]
        np.testing.assert_allclose(found, golden[f"act_{layer}_meanstd"], rtol=1e-4)
        part = golden[f"act_{layer}_slice"]
        assert_close(value[1, 1, 1, : len(part)] if value.ndim == 4 else value[1, : len(part)], part, what=layer)


@pytest.mark.golden
def test_pcm_to_bytes_in_the_graph(
    golden_dir: Path,
    golden: dict[str, np.ndarray],
    front_end: dict[str, np.ndarray],
    vggish_tensors: dict[str, np.ndarray],
) -> None:
    pca = read_pca(golden_dir / "vggish_pca_params.npz")
    raw, served = build_embedder("vggish", vggish_tensors), build_embedder("vggish", vggish_tensors, pca=pca)
    streaming = np.load(golden_dir / "vggish_streaming.npz")
    pcm = np.concatenate([np.zeros(240, np.int16), streaming["pcm"]])
    pcm = np.stack([pcm[15_360 * j : 15_360 * j + 15_600] for j in range(len(streaming["emb_prepend240"]))])
    embeddings = raw(tf.constant(pcm)).numpy()
    assert_close(embeddings, streaming["emb_prepend240"], 1e-3)
    levels = np.rint((served(tf.constant(pcm)).numpy() + 2.0 - 4.0 / 512.0) * 63.75)
    expected = quantise(streaming["emb_prepend240"], pca)
    assert np.abs(levels - expected).max() <= 1
    assert np.mean(levels != expected) <= 0.01


@pytest.mark.golden
def test_postprocessor_on_every_stored_embedding(golden_dir: Path, golden: dict[str, np.ndarray]) -> None:
    pca = read_pca(golden_dir / "vggish_pca_params.npz")
    names = [k.removeprefix("emb_") for k in golden if k.startswith("emb_")]
    for name in names:
        levels = prequantise(golden[f"emb_{name}"], pca)
        np.testing.assert_allclose(levels, golden[f"prequant_{name}"], rtol=0, atol=1e-3)
        found, expected = quantise(golden[f"emb_{name}"], pca), golden[f"post_{name}"]
        near = np.abs(levels - np.rint(levels)) < 1e-3
        assert np.all((found == expected) | near), name
        assert np.abs(found.astype(int) - expected).max() <= 1
        np.testing.assert_allclose(dequantise(found), found * (4 / 255) + (4 / 512 - 2), atol=1e-6)


def test_other_weights_are_refused(vggish_tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(ModelError, match=r"vggish/fc2/weights has shape \(4096, 2\), expected \(4096, 128\)"):
        Vggish(vggish_tensors | {"vggish/fc2/weights": np.zeros((4096, 2), np.float32)})
    with pytest.raises(ModelError, match="vggish/fc2/biases is missing"):
        Vggish({k: v for k, v in vggish_tensors.items() if k != "vggish/fc2/biases"})
    with pytest.raises(ModelError, match=r"vggish/fc2/biases .* NaN"):
        Vggish(vggish_tensors | {"vggish/fc2/biases": np.full(128, np.nan, np.float32)})
