"""PCA, clipping and bytes: exactly AudioSet's; files that are no PCA parameters are refused with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from detector.embedders.postprocess import Pca, dequantise, postprocess, quantise, read_pca
from detector.errors import ModelError

IDENTITY = Pca(np.eye(128, dtype=np.float32), np.zeros(128, np.float32))


@pytest.mark.golden
def test_golden_rows_in_numpy_and_in_the_graph(golden_dir: Path) -> None:
    golden = np.load(golden_dir / "vggish_net.npz")
    pca = read_pca(golden_dir / "vggish_pca_params.npz")
    prequant = golden["pp_prequant"]
    settled = np.abs(prequant - np.rint(prequant)) > 1e-3
    settled |= (prequant == 0) | (prequant == 255)
    np.testing.assert_array_equal(quantise(golden["pp_in"], pca)[settled], golden["pp_out"][settled])
    in_graph = postprocess(tf.constant(golden["pp_in"]), pca).numpy()
    np.testing.assert_array_equal(in_graph[settled], dequantise(golden["pp_out"])[settled])
    np.testing.assert_array_equal(quantise(golden["quant_in"], IDENTITY), golden["quant_out"])
    in_graph = postprocess(tf.constant(golden["quant_in"]), IDENTITY).numpy()
    np.testing.assert_array_equal(in_graph, dequantise(golden["quant_out"]))


@pytest.mark.golden
def test_published_pca_file_reads(data_dir: Path) -> None:
    path = data_dir / "vggish" / "vggish_pca_params.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    assert read_pca(path).means.shape == (128,)


@pytest.mark.golden
def test_dequantise_is_the_starter_codes(golden_dir: Path) -> None:
    table = np.load(golden_dir / "yt8m_readers.npz")["dequant_table"].ravel()
    np.testing.assert_allclose(dequantise(np.arange(256, dtype=np.uint8)), table, rtol=0, atol=1e-6)


def test_bytes_are_truncated_and_clipped() -> None:
    row = np.zeros((1, 128), np.float32)
    row[0, :6] = [-9e9, -2.0, -2.0 + 1.999 / 63.75, 0.0, 2.0, 9e9]
    assert quantise(row, IDENTITY)[0, :6].tolist() == [0, 0, 1, 127, 255, 255]


def test_means_of_both_shapes_count(tmp_path: Path) -> None:
    means = np.arange(128, dtype=np.float32)
    for shape in [(128,), (128, 1)]:
        np.savez(tmp_path / "pca.npz", pca_eigen_vectors=np.eye(128, dtype=np.float32), pca_means=means.reshape(shape))
        np.testing.assert_array_equal(read_pca(tmp_path / "pca.npz").means, means)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pca_means": np.zeros(128)}, "lacks pca_eigen_vectors"),
        ({"pca_eigen_vectors": np.eye(64), "pca_means": np.zeros(128)}, r"\(64, 64\)"),
        ({"pca_eigen_vectors": np.eye(128), "pca_means": np.zeros((1, 128))}, r"\(1, 128\)"),
        ({"pca_eigen_vectors": np.eye(128), "pca_means": np.full(128, np.nan)}, "NaN"),
        ({"pca_eigen_vectors": np.eye(128).astype(int), "pca_means": np.zeros(128)}, "floating point"),
        ({"pca_eigen_vectors": np.array({}, object), "pca_means": np.zeros(128)}, "without pickles"),
    ],
)
def test_unfit_parameters(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    path = tmp_path / "pca.npz"
    np.savez(path, **arrays)
    with pytest.raises(ModelError, match=words) as caught:
        read_pca(path)
    assert str(path) in str(caught.value)


def test_damaged_foreign_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "pca.npz"
    np.savez(path, pca_eigen_vectors=np.eye(128, dtype=np.float32), pca_means=np.zeros(128, np.float32))
    whole = path.read_bytes()
    for content in (b"", b"<html>", whole[:1000], whole[:-30], whole[:3000] + b"\xff" * 50 + whole[3050:]):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"pca\.npz"):
            read_pca(path)
    path.unlink()
    with pytest.raises(ModelError, match="does not exist"):
        read_pca(path)
