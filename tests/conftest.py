"""What tests of several folders share: where the vectors and the data lie, and VGGish's seeded weights."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
_ROOT = Path(__file__).parents[1]


def _folder(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable) or _ROOT / ".." / "shared" / default).resolve()
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set {variable}")
    return folder


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of the golden vectors: ``GOLDEN_DIR``, else ``../shared/golden``."""
    return _folder("GOLDEN_DIR", "golden")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of recordings: ``DATA_DIR``, else ``../shared/data``."""
    return _folder("DATA_DIR", "data")


@pytest.fixture(scope="session")
def vggish_tensors(golden_dir: Path) -> dict[str, np.ndarray]:
    """VGGish's 18 variables (288 MB) by the recipe of the golden vectors, checked against their sums."""
    from detector.embedders.vggish import VGGISH_SHAPES

    golden = np.load(golden_dir / "vggish_net.npz")
    seed, gain_out, bias_sd = int(golden["weights_seed"]), float(golden["gain_out"]), float(golden["bias_sd"])
    names = list(VGGISH_SHAPES)
    tensors: dict[str, np.ndarray] = {}
    for i, (weights, biases) in enumerate(zip(names[::2], names[1::2], strict=True)):
        shape = VGGISH_SHAPES[weights]
        fan_in = int(np.prod(shape[:-1]))
        gain = gain_out * np.sqrt(1 / fan_in) if weights == "vggish/fc2/weights" else np.sqrt(2 / fan_in)
        values = np.random.RandomState(seed + i).standard_normal(shape)
        tensors[weights] = np.multiply(gain, values, out=values).astype(np.float32)
        tensors[biases] = (bias_sd * np.random.RandomState(seed + 100 + i).standard_normal(shape[-1])).astype(
            np.float32
        )
    for name, check in zip(golden["weights_names"], golden["weights_check_sum_abssum_first_last"], strict=True):
        value = tensors[str(name)].astype(np.float64)
        found = [value.sum(), np.abs(value).sum(), value.flat[0], value.flat[-1]]
        np.testing.assert_allclose(found, check, rtol=1e-9, err_msg=f"recipe gives another {name}")
    return tensors
