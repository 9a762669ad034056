"""Every error this project raises on purpose.

GunfireError
├── ConfigError          config.yaml, environment, command line; exit code 78
├── ChunkError           a record that is no chunk; carries a machine-readable ``reason``
├── AlertError           a record that is no alert, or an alert that contradicts itself
├── AudioError           a file or sound that can't be read
├── SourceError          a device or address that can't be opened, or went away (producers)
├── ModelError           a checkpoint or package that is damaged, foreign or does not fit
│   └── WeightsMissing   its weights have to be fetched first; exit code 78
├── DataError            features, labels or lists to train or evaluate on that can't be used (trainer)
├── TrainingError        training that can't go on: no numbers, no memory, no other workers (trainer)
└── BusError
    ├── BusUnavailable   for now; trying again may help
    │   └── BusMissing   there is no bus file yet, and reading makes none
    ├── BusDamaged       the stored data is broken; trying again won't help
    │   └── BusReplaced  the bus file was removed or replaced while in use
    └── CommitFenced     the partition belongs to another member now; its outputs were not committed
"""

from __future__ import annotations


class GunfireError(Exception):
    """Base of all. ``str()`` is one or more whole sentences: what, where, remedy."""


class ConfigError(GunfireError):
    """The configuration can't be used."""

    exit_code = 78  # EX_CONFIG of sysexits.h


class ChunkError(GunfireError):
    """A record is no chunk.

    Attributes:
        reason: short machine-readable word, a metric label and dead-letter header (``bad_size``, ...).
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class AlertError(GunfireError):
    """A record is no alert, or an alert contradicts itself."""


class AudioError(GunfireError):
    """A file or a sound can't be read."""


class SourceError(GunfireError):
    """A source of sound can't be opened or went away."""


class ModelError(GunfireError):
    """A checkpoint or a model package can't be used."""


class WeightsMissing(ModelError):
    """A package builds on weights that are not in the store: a person has to fetch them, trying again won't help."""

    exit_code = 78


class DataError(GunfireError):
    """Features, labels or lists to train or evaluate on can't be used."""


class TrainingError(GunfireError):
    """Training can't go on: its loss is no number, memory runs out, or another worker went away."""


class BusError(GunfireError):
    """The bus refused or failed."""


class BusUnavailable(BusError):
    """The bus can't be reached or is busy; a later try may succeed."""


class CommitDelayed(BusUnavailable):
    """The group is sharing out its partitions anew; nothing is committed until that is done, which takes polling."""


class BusMissing(BusUnavailable):
    """There is no bus file where one was to be read."""


class BusDamaged(BusError):
    """What the bus stores is broken; a later try won't help."""


class BusReplaced(BusDamaged):
    """The bus file was removed or replaced while in use: what is open leads nowhere, opening it again may."""


class CommitFenced(BusError):
    """Another member owns the partition now; nothing of this commit took effect."""
