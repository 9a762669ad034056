"""Fresh weights as the starter code's initialisers make them, from a seed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def glorot_uniform(shape: tuple[int, int], random: np.random.Generator) -> npt.NDArray[np.float32]:
    """Uniform within ``sqrt(6 / (fan_in + fan_out))``: the default of TF1 variables and of slim's layers."""
    limit = np.sqrt(6.0 / (shape[0] + shape[1]))
    return random.uniform(-limit, limit, shape).astype(np.float32)


def normal(shape: tuple[int, ...], deviation: float, random: np.random.Generator) -> npt.NDArray[np.float32]:
    """Normal around 0, as ``tf.random_normal_initializer``."""
    return (random.standard_normal(shape) * deviation).astype(np.float32)
