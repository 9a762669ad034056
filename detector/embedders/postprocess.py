"""Raw VGGish embedding -> PCA -> clip -> uint8 -> float32: the form in which AudioSet's features were released.

Third stage of the embedder. A classifier trained on those features must be served values that went the same way,
quantisation included. Source: tensorflow/models, research/audioset/vggish/vggish_postprocess.py; the way back from
bytes is google/youtube-8m, utils.py, ``Dequantize``.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from detector.embedders.params import EMBEDDING_SIZE
from detector.errors import ModelError

if TYPE_CHECKING:
    import tensorflow as tf

QUANTISE_MIN = -2.0
QUANTISE_MAX = 2.0
_RANGE = QUANTISE_MAX - QUANTISE_MIN
_QUANTISE_SCALE = np.float32(255.0 / _RANGE)
_DEQUANTISE_SCALE = np.float32(_RANGE / 255.0)
_DEQUANTISE_BIAS = np.float32(_RANGE / 512.0 + QUANTISE_MIN)

_EIGEN_VECTORS = "pca_eigen_vectors"
_MEANS = "pca_means"

FloatArray = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True, eq=False)
class Pca:
    """``eigen_vectors`` (128, 128) float32, a row an output; ``means`` (128,) float32."""

    eigen_vectors: npt.NDArray[np.float32]
    means: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.eigen_vectors.shape != (EMBEDDING_SIZE, EMBEDDING_SIZE) or self.means.shape != (EMBEDDING_SIZE,):
            raise ModelError(
                f"PCA parameters have shapes {self.eigen_vectors.shape} and {self.means.shape}; expected are "
                f"({EMBEDDING_SIZE}, {EMBEDDING_SIZE}) and ({EMBEDDING_SIZE},). Fetch them again."
            )
        if not (np.isfinite(self.eigen_vectors).all() and np.isfinite(self.means).all()):
            raise ModelError("PCA parameters hold NaN or infinite values; the file is damaged. Fetch it again.")


def read_pca(path: Path) -> Pca:
    """From the published ``vggish_pca_params.npz``; means of shape (128,) and (128, 1) both count.

    Raises ModelError for a missing or damaged file, pickled contents, missing keys or other shapes.
    """
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ModelError(f"PCA file {path} is a single array, not an npz archive.")
            missing = [key for key in (_EIGEN_VECTORS, _MEANS) if key not in archive.files]
            if missing:
                raise ModelError(f"PCA file {path} lacks {', '.join(missing)}; it holds {archive.files}.")
            arrays = {key: archive[key] for key in (_EIGEN_VECTORS, _MEANS)}
    except FileNotFoundError:
        raise ModelError(f"PCA file {path} does not exist.") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ModelError(f"PCA file {path} can't be read as npz without pickles: {error}. Get it again.") from error
    for key, value in arrays.items():
        if value.dtype.kind != "f":
            raise ModelError(f"{key} of PCA file {path} is {value.dtype}; floating point is expected.")
    means = arrays[_MEANS]
    if means.shape == (EMBEDDING_SIZE, 1):
        means = means[:, 0]
    try:
        return Pca(np.asarray(arrays[_EIGEN_VECTORS], np.float32), np.asarray(means, np.float32))
    except ModelError as error:
        raise ModelError(f"PCA file {path}: {error}") from None


# --- NumPy --------------------------------------------------------------------------------------------------------


def prequantise(embeddings: FloatArray, pca: Pca) -> npt.NDArray[np.float64]:
    """``(n, 128)`` raw embeddings -> ``(n, 128)`` in [0, 255], before truncation; float64 settles ties best."""
    centred = np.asarray(embeddings, np.float64) - pca.means
    projected = centred @ pca.eigen_vectors.T.astype(np.float64)
    return np.asarray((np.clip(projected, QUANTISE_MIN, QUANTISE_MAX) - QUANTISE_MIN) * (255.0 / _RANGE))


def quantise(embeddings: FloatArray, pca: Pca) -> npt.NDArray[np.uint8]:
    """``(n, 128)`` raw embeddings -> ``(n, 128)`` uint8 as released by AudioSet: truncated, not rounded."""
    return prequantise(embeddings, pca).astype(np.uint8)


def dequantise(quantised: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """uint8 of any shape -> float32 in [-2, 2], near the middle of what each byte stands for."""
    return np.asarray(quantised.astype(np.float32) * _DEQUANTISE_SCALE + _DEQUANTISE_BIAS)


# --- in the graph -------------------------------------------------------------------------------------------------


def postprocess(embeddings: tf.Tensor, pca: Pca) -> tf.Tensor:
    """``(B, 128)`` float32 raw embeddings -> ``(B, 128)`` float32: quantised and back, all on the device."""
    import tensorflow as tf

    projected = tf.matmul(embeddings - pca.means, pca.eigen_vectors, transpose_b=True)
    clipped = tf.clip_by_value(projected, QUANTISE_MIN, QUANTISE_MAX)
    levels = tf.floor((clipped - QUANTISE_MIN) * _QUANTISE_SCALE)
    return levels * _DEQUANTISE_SCALE + _DEQUANTISE_BIAS
