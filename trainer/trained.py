"""Whatever holds a trained classifier -> the classifier, its classes, and clips as it wants to see them.

Four forms count: a run of ``trainer train``, a train directory of the YouTube-8M starter code (or one of its
checkpoints), a model package, and a shipped model's name. Of a package only the classifier is opened: embeddings are
the input, so weights of an embedder are not needed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from detector.classifiers import Classifier, weights
from detector.errors import ConfigError, ModelError
from detector.model import MANIFEST_NAME, Manifest, load_classifier, shipped_models
from trainer.labels import LabelSet
from trainer.records import (
    FRAME_KEYS,
    VIDEO_KEYS,
    ClipSet,
    Damage,
    FeatureSpec,
    Level,
    find_files,
    read_clips,
    read_records,
)
from trainer.run import RUN_NAME, Run, Which
from trainer.starter_checkpoint import FLAGS_NAME, is_starter_folder, load_starter_model

logger = logging.getLogger(__name__)

Form = Literal["run", "starter", "package", "shipped"]

ACCEPTED = (
    f"a run of `trainer train` (its folder holds {RUN_NAME}), a train directory of the YouTube-8M starter code "
    f"({FLAGS_NAME}) or one of its checkpoints, a model package ({MANIFEST_NAME}), or a shipped model's name"
)
DEFAULT_LOSS = "CrossEntropyLoss"


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """A trained classifier and what is known of it.

    Attributes:
        name: as given.
        form: what it was opened from.
        source: the folder, or the checkpoint's prefix.
        classifier: with its weights.
        kind, params: as a package's manifest names them.
        labels: its classes; None where the source names none: a starter-code checkpoint, a run trained without
            ``--labels``.
        family, look_alikes: class indices by the source's word; empty where it says nothing.
        features: what records must hold.
        label_loss: what it was trained to make small, by the starter code's name.
        steps: trained; None where the source does not say.
        sha256: of the weights, hex; the same in every form.
        run: the opened run, of form ``run``.
        manifest: of a package.
    """

    name: str
    form: Form
    source: Path
    classifier: Classifier
    kind: str
    params: dict[str, Any]
    labels: LabelSet | None
    family: tuple[int, ...]
    look_alikes: tuple[int, ...]
    features: FeatureSpec
    label_loss: str = DEFAULT_LOSS
    steps: int | None = None
    sha256: str = field(default="")
    run: Run | None = None
    manifest: Manifest | None = None

    @property
    def classes(self) -> int:
        """V."""
        return int(self.params["classes"])


def open_trained(
    name_or_path: str | Path,
    which: Which = "best",
    *,
    params: Mapping[str, Any] | None = None,
) -> Trained:
    """Open any of the four forms; a text that is a shipped model's name means that one.

    Args:
        which: weights of a run: its ``best``, or the ``latest``.
        params: of a starter-code checkpoint, those that its shapes don't tell (DBoF's pooling, activation, sampling).

    Raises ModelError for anything else, naming what was found, and for what is damaged.
    """
    text, path = str(name_or_path), Path(name_or_path)
    if isinstance(name_or_path, str) and any(manifest.name == text for manifest in shipped_models()):
        return _packaged(text, text, "shipped")
    if path.is_dir():
        if Run.is_run(path):
            return _of_run(text, Run.open(path), which)
        if (path / MANIFEST_NAME).is_file():
            return _packaged(text, path, "package")
        if is_starter_folder(path):
            return _of_starter(text, path, None, params)
        names = sorted(entry.name for entry in path.iterdir())
        holds = f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" if names else "nothing"
        raise ModelError(f"{path} is no trained model: it holds {holds}. Give {ACCEPTED}.")
    prefix = path.with_suffix("") if path.suffix == ".index" else path
    if prefix.with_name(prefix.name + ".index").is_file():
        return _of_starter(text, prefix.parent, prefix, params)
    what = "is a file, no trained model" if path.is_file() else "is neither a folder nor a shipped model's name"
    shipped = ", ".join(manifest.name for manifest in shipped_models()) or "none"
    raise ModelError(f"{text} {what}. Give {ACCEPTED} (shipped: {shipped}).")


def _of_run(name: str, run: Run, which: Which) -> Trained:
    config = run.config
    _, steps = run.weights(which)
    classifier = run.classifier(which)
    return Trained(
        name=name,
        form="run",
        source=run.folder,
        classifier=classifier,
        kind=config.kind,
        params=dict(config.params),
        labels=None if is_numbered(config.label_set) else config.label_set,
        family=config.family,
        look_alikes=config.look_alikes,
        features=config.feature_spec,
        label_loss=config.recipe.label_loss,
        steps=steps,
        sha256=weights_sha256(classifier),
        run=run,
    )


def numbered_labels(classes: int, source: str) -> LabelSet:
    """``class 0``, ``class 1``, ...: of a model that names none."""
    return LabelSet.of_names([f"class {i}" for i in range(classes)], source)


def is_numbered(labels: LabelSet) -> bool:
    """Whether these are ``numbered_labels``, as a run trained without ``--labels`` has them: no names."""
    return all(not label.mid and label.name == f"class {label.index}" for label in labels)


def _of_starter(name: str, folder: Path, checkpoint: Path | None, params: Mapping[str, Any] | None) -> Trained:
    model = load_starter_model(folder, params=params, checkpoint=checkpoint)
    # One audio feature goes by two names; whichever a record holds is meant.
    renamed = len(model.feature_names) == 1 and model.feature_names[0] in (*FRAME_KEYS, *VIDEO_KEYS)
    return Trained(
        name=name,
        form="starter",
        source=model.checkpoint,
        classifier=model.classifier,
        kind=model.kind,
        params=dict(model.params),
        labels=None,
        family=(),
        look_alikes=(),
        features=FeatureSpec(
            () if renamed else model.feature_names, model.feature_sizes, "frame" if model.frame_features else "video"
        ),
        label_loss=model.label_loss,
        steps=model.global_step,
        sha256=weights_sha256(model.classifier),
    )


def _packaged(name: str, name_or_path: str | Path, form: Form) -> Trained:
    packaged = load_classifier(name_or_path)
    manifest = packaged.manifest
    if manifest.postprocess.kind != "pca_quantise":
        logger.warning(
            "Model %s was trained on its own embedder's embeddings, which are not quantised: figures on records made "
            "by another embedder mean nothing.",
            manifest.name,
        )
    labels = LabelSet.of_names(manifest.labels, f"model {manifest.name}")
    size = packaged.classifier.input_size
    return Trained(
        name=name,
        form=form,
        source=packaged.folder,
        classifier=packaged.classifier,
        kind=manifest.classifier.kind,
        params={**manifest.classifier.params, "classes": len(manifest.labels), "input_size": size},
        labels=labels,
        family=tuple(sorted(labels.index(label) for label in manifest.family)),
        look_alikes=tuple(sorted(labels.index(label) for label in manifest.look_alikes)),
        features=FeatureSpec(sizes=(size,)),
        sha256=weights_sha256(packaged.classifier),
        manifest=manifest,
    )


def weights_sha256(classifier: Classifier) -> str:
    """Hex digest of names, shapes and float32 values, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(weights(classifier).items()):
        digest.update(f"{name} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value, "<f4").tobytes())
    return digest.hexdigest()


def read_data(
    trained: Trained,
    pattern: str,
    labels: LabelSet,
    *,
    feature_names: str | None = None,
    feature_sizes: str | None = None,
    stop_on_damage: bool = False,
    on_file: Callable[[int, int], None] | None = None,
) -> ClipSet:
    """Clips of ``pattern`` in the form that the model takes; a model of one vector a clip takes either level.

    Args:
        labels: names of its classes, for records that carry names or MIDs.
        feature_names, feature_sizes: with commas between, where records call them otherwise than in training.
        on_file: told how many files are done, of how many.

    Raises ConfigError for features that are not the model's size, DataError as ``read_clips`` does.
    """
    spec = _features_of(trained, feature_names, feature_sizes)
    if spec.size != trained.classifier.input_size:
        raise ConfigError(
            f"Features of {' + '.join(map(str, spec.sizes))} values are asked for; model {trained.name} takes "
            f"{trained.classifier.input_size}."
        )
    files = find_files(pattern)
    if trained.classifier.video_level:
        spec = replace(spec, level=_level_of(files) or spec.level)
    return read_clips(
        files,
        classes=trained.classes,
        spec=spec,
        labels=labels,
        stop_on_damage=stop_on_damage,
        on_file=None if on_file is None else lambda done: on_file(done, len(files)),
    )


def _features_of(trained: Trained, names: str | None, sizes: str | None) -> FeatureSpec:
    spec = trained.features
    if names is None and sizes is None:
        return spec
    given = spec.names if names is None else tuple(name.strip() for name in names.split(",") if name.strip())
    try:
        numbers = spec.sizes if sizes is None else tuple(int(size) for size in sizes.split(","))
    except ValueError:
        raise ConfigError(f"Feature sizes {sizes!r} are no whole numbers with commas between.") from None
    return FeatureSpec(given, numbers, spec.level, spec.max_frames)


def _level_of(files: Sequence[Path]) -> Level | None:
    """Of the first record that can be read, which tells by its form alone; None where there is none.

    What is damaged is told of when all is read.
    """
    import tensorflow as tf
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    for path in files:
        with suppress(OSError), path.open("rb") as stream:
            for item in read_records(stream, path):
                if isinstance(item, Damage):
                    continue
                try:
                    parsed = tf.train.SequenceExample.FromString(item[1])
                except DecodeError:
                    continue
                return "frame" if parsed.feature_lists.feature_list else "video"
    return None
