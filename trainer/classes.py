"""Which classes a command is about: what its options, the model or the defaults say, resolved against the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from detector.errors import ConfigError
from detector.model import shipped_models
from trainer.labels import LabelSet, Ontology, gunfire_classes, look_alike_classes
from trainer.trained import Trained, numbered_labels

# AudioSet's places of the default sets, for a model of 527 classes that names none.
_AUDIOSET_CLASSES = 527
_AUDIOSET_FAMILY = "427-430"
_AUDIOSET_LOOK_ALIKES = "287, 426, 432-434, 436"


@dataclass(frozen=True, slots=True, eq=False)
class Classes:
    """Of a command: all classes, and which of them it is about.

    Attributes:
        family, look_alikes: indices, ascending, of which no index is in both.
        ontology: None where none was given.
    """

    labels: LabelSet
    family: tuple[int, ...]
    look_alikes: tuple[int, ...]
    ontology: Ontology | None = None


def classes_of(
    trained: Trained,
    labels_path: Path | None,
    ontology_path: Path | None,
    family: str | None,
    look_alikes: str | None,
) -> Classes:
    """The options' word, else the model's, else the defaults.

    Raises ConfigError for a list of classes that is not the model's, a set that names no class, overlapping sets, and
    where nothing says which classes are gunfire; DataError for unknown classes and files that can't be read.
    """
    ontology = Ontology.read(ontology_path) if ontology_path is not None else None
    labels = labels_of(trained, labels_path)
    members: tuple[int, ...]
    if family is not None:
        members = labels.resolve(family, ontology)
    elif trained.family:
        members = trained.family
    else:
        members = gunfire_classes(labels, ontology)
        if not members and _is_unnamed_audioset(trained, labels_path):
            members = labels.resolve(_AUDIOSET_FAMILY)
    if not members:
        raise ConfigError(
            f"None of the {len(labels)} classes of {labels.source} is gunfire by its name. Say which are with --family "
            "(indices or names), or give their names with --labels."
        )
    if look_alikes is not None:
        similar = labels.resolve(look_alikes, ontology)
        both = sorted(set(members) & set(similar))
        if both:
            raise ConfigError(f"{', '.join(labels[i].name for i in both)}: in --family and in --look-alikes.")
    elif trained.look_alikes:
        similar = trained.look_alikes
    else:
        similar = look_alike_classes(labels, ontology)
        if not similar and _is_unnamed_audioset(trained, labels_path):
            similar = labels.resolve(_AUDIOSET_LOOK_ALIKES)
    return Classes(labels, members, tuple(i for i in similar if i not in members), ontology)


def _is_unnamed_audioset(trained: Trained, labels_path: Path | None) -> bool:
    return trained.labels is None and labels_path is None and trained.classes == _AUDIOSET_CLASSES


def labels_of(trained: Trained, path: Path | None) -> LabelSet:
    """The classes of ``path``, else the model's own, else AudioSet's of a shipped model, else numbered ones.

    Raises ConfigError for a list that is not the model's; DataError where it can't be read.
    """
    if path is None:
        if trained.labels is not None:
            return trained.labels
        return shipped_labels(trained.classes) or numbered_labels(trained.classes, f"model {trained.name}")
    given = LabelSet.read(path)
    if len(given) != trained.classes:
        raise ConfigError(f"{path} holds {len(given)} classes; model {trained.name} has {trained.classes}.")
    if trained.labels is not None:
        for mine, theirs in zip(trained.labels, given, strict=True):
            if mine.name != theirs.name:
                raise ConfigError(
                    f"{path} calls class {mine.index} {theirs.name!r}; model {trained.name} calls it {mine.name!r}."
                )
    return given


def shipped_labels(classes: int = _AUDIOSET_CLASSES) -> LabelSet | None:
    """AudioSet's, from a shipped model that names as many; None where there is none."""
    if classes != _AUDIOSET_CLASSES:
        return None
    for manifest in shipped_models():
        if len(manifest.labels) == classes:
            return LabelSet.of_names(manifest.labels, f"model {manifest.name}")
    return None
