"""Hears gunfire in audio streams.

The walk that audio takes, one module a step:

    bus (chunks) -> chunk -> examples -> batcher -> embedders (log_mel, network, postprocess)
        -> stream (window) -> classifiers -> decision -> alert -> bus (alerts)

``pipeline`` is the walk without bus, clock or threads; ``daemon`` puts it between two topics;
``metrics`` and ``console`` show it from outside. This module imports nothing.
"""

__version__ = "0.1.0"
