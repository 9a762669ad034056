"""A trained classifier + an embedder -> a model package that the detector serves, with its measured operating curve.

Thresholds are measured on clips the way they are served: a clip longer than the window is heard window by window, one
example at a time, and scores as its loudest window.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from detector.checkpoint import read_safetensors
from detector.classifiers import weights
from detector.embedders import tensor_shapes
from detector.embedders.params import EMBEDDING_SIZE, FRONT_END
from detector.embedders.postprocess import read_pca
from detector.errors import ConfigError, DataError, ModelError
from detector.fetch import PCA_NAME, WEIGHTS_NAME
from detector.model import MANIFEST_NAME, Manifest, Name, load_classifier, write_package
from detector.store import check_sha256, sha256_of_file
from trainer.classes import Classes
from trainer.evaluate import Evaluation
from trainer.metrics import Curve, family_scores
from trainer.records import ClipSet, video_matrix
from trainer.trained import Trained, is_numbered

logger = logging.getLogger(__name__)

MAX_WINDOW_EXAMPLES = 300
DEFAULT_WINDOW_EXAMPLES = 10
DEFAULT_FALSE_POSITIVE_RATE = 0.01
CURVE_POINTS = 20
HOP_SECONDS = FRONT_END.example_hop_seconds

_LOOSEST_RATE = 0.2
_BATCH_CLIPS = 64
_CLOSE_ODDS = 0.5  # an open alert stays open down to this share of the open threshold's odds

Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


# --- the embedder -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class EmbedderParts:
    """What a package says of its embedder, and the files that go into the package with it.

    Attributes:
        embedder, postprocess: sections of the manifest.
        weights: weight name -> value; None where they are fetched.
        pca: file to copy into the package; None where there is none, or it is fetched.
        quantised: whether embeddings pass PCA and quantisation, as those in records did.
    """

    embedder: Mapping[str, Any]
    postprocess: Mapping[str, Any]
    weights: Mapping[str, Float32Array] | None
    pca: Path | None

    @property
    def quantised(self) -> bool:
        return bool(self.postprocess["kind"] == "pca_quantise")


def embedder_parts(embedder: str, pca_params: Path | None = None) -> EmbedderParts:
    """``vggish`` (its weights are fetched by whoever serves), or the embedder of a package (name or folder).

    Args:
        pca_params: ``vggish_pca_params.npz`` to put into the package, instead of the fetched one.

    Raises ModelError for packages and files that can't be used; ConfigError for ``pca_params`` where another embedder
    brings its own.
    """
    if embedder == "vggish":
        postprocess: dict[str, Any] = {"kind": "pca_quantise", "file": PCA_NAME}
        if pca_params is None:
            postprocess["from_store"] = True
        else:
            read_pca(pca_params)
            postprocess["sha256"] = sha256_of_file(pca_params)
        return EmbedderParts(
            {"kind": "vggish", "file": WEIGHTS_NAME, "from_store": True}, postprocess, None, pca_params
        )
    if pca_params is not None:
        raise ConfigError(f"--pca-params are VGGish's; --embedder {embedder} brings its own.")
    packaged = load_classifier(Path(embedder) if Path(embedder).is_dir() else embedder)
    section, post = packaged.manifest.embedder, packaged.manifest.postprocess
    fixed: Mapping[str, Float32Array] | None = None
    if not section.from_store:
        path = packaged.folder / section.file
        check_sha256(path, str(section.sha256))
        fixed = read_safetensors(path, tensor_shapes(section.kind))
    pca: Path | None = None
    if post.file is not None and not post.from_store:
        pca = packaged.folder / post.file
        check_sha256(pca, str(post.sha256))
    mine = section.model_dump(mode="json", exclude_none=True)
    if fixed is not None:
        mine = {"kind": section.kind}
    return EmbedderParts(mine, post.model_dump(mode="json", exclude_none=True), fixed, pca)


# --- what a threshold gives ---------------------------------------------------------------------------------------


def served_scores(trained: Trained, clips: ClipSet, family: Sequence[int], window_examples: int) -> Float32Array:
    """``(N,)`` family score of every clip as the detector would hear it: of its loudest window.

    Video-level clips are one vector each and score as they are.
    """
    import tensorflow as tf

    classifier = trained.classifier
    size, video = clips.spec.size, clips.spec.level == "video"
    shape = [None, size] if video else [None, window_examples, size]
    signature = [tf.TensorSpec(shape, tf.float32), tf.TensorSpec([None], tf.int32)]
    function = tf.function(lambda x, n: classifier(x, n), input_signature=signature)
    out = np.empty(len(clips), np.float32)
    for start in range(0, len(clips), _BATCH_CLIPS):
        chosen = np.arange(start, min(start + _BATCH_CLIPS, len(clips)))
        if video:
            batch = clips.gather(chosen)
            out[chosen] = family_scores(function(batch.values, batch.num_frames).numpy(), family)
            continue
        rows = max(int(clips.num_frames[chosen].max()), window_examples)
        batch = clips.gather(chosen, frames=rows)
        values = video_matrix(np.asarray(batch.features, np.uint8), batch.num_frames)
        loudest = np.full(len(chosen), -np.inf, np.float32)
        for first in range(rows - window_examples + 1):
            inside = (batch.num_frames >= first + window_examples) | (first == 0)
            counts = np.minimum(batch.num_frames, window_examples).astype(np.int32)
            scores = family_scores(function(values[:, first : first + window_examples], counts).numpy(), family)
            loudest = np.where(inside, np.fmax(loudest, scores), loudest).astype(np.float32)
        out[chosen] = loudest
    return out


@dataclass(frozen=True, slots=True)
class Operation:
    """Thresholds and the curve they were chosen from.

    Attributes:
        open_threshold, close_threshold: of the family score.
        curve: rows of the manifest's ``operating_curve``, from loose to strict.
        recall: share of gunfire clips at or above the open threshold; None where it was not measured.
    """

    open_threshold: float
    close_threshold: float
    curve: tuple[dict[str, float], ...] = ()
    recall: float | None = None


def operation_at(
    scores: Float32Array,
    positive: BoolArray,
    false_positive_rate: float,
    window_examples: int,
    *,
    open_threshold: float | None = None,
) -> Operation:
    """The threshold that hears most of what can be heard with no more than this share of clips without gunfire let
    through (of several the highest), or the one given; and the curve.

    False alarms an hour are those of such clips one after the other, each as long as a window.

    Raises DataError where clips are of one kind only, no score keeps the promise, or what keeps it hears no gunfire.
    """
    curve = Curve.of(scores, positive)
    if not curve.positives or not curve.negatives:
        what = "carries" if not curve.positives else "lacks"
        raise DataError(f"None of {len(scores)} clips {what} a class of the family: no threshold can be chosen.")
    clips_per_hour = 3600.0 / (window_examples * HOP_SECONDS)
    rows: dict[float, dict[str, float]] = {}
    for rate in np.geomspace(_LOOSEST_RATE, 1.0 / curve.negatives, CURVE_POINTS).tolist():
        at = curve.at_false_positive_rate(min(rate, 1.0))
        if math.isfinite(at.threshold):
            threshold = _just_below(at.threshold)
            rows[threshold] = {
                "threshold": threshold,
                "recall": round(at.recall, 6),
                "false_alarms_per_hour": round(at.false_positive_rate * clips_per_hour, 4),
                "false_positive_rate": round(at.false_positive_rate, 8),
            }
    if open_threshold is None:
        chosen = curve.at_false_positive_rate(false_positive_rate)
        if math.isinf(chosen.threshold):
            raise DataError(
                f"No threshold lets only {100 * false_positive_rate:g} % of {curve.negatives} clips without gunfire "
                "through: the highest score is a false positive. Allow more, or evaluate on more clips."
            )
        open_threshold = _just_below(chosen.threshold)
        recall, _ = curve.at_threshold(open_threshold)
        if not recall or not open_threshold:
            what = "opens an alert on silence" if recall else f"hears none of {curve.positives} gunfire clips"
            raise DataError(
                f"The threshold that the data give, {open_threshold:g}, {what}: such a package is of no use. Train "
                "longer, allow another --false-positive-rate, or set --open-threshold by hand."
            )
    recall, _ = curve.at_threshold(open_threshold)
    if not recall:
        logger.warning("At %g none of %d gunfire clips is heard: the package is deaf.", open_threshold, curve.positives)
    ascending = tuple(rows[threshold] for threshold in sorted(rows))
    return Operation(open_threshold, close_threshold(open_threshold), ascending, float(recall))


def close_threshold(open_threshold: float) -> float:
    """Where an open alert falls silent: half the odds."""
    odds = open_threshold / max(1.0 - open_threshold, 1e-9) * _CLOSE_ODDS
    return min(open_threshold, round(odds / (1.0 + odds), 6))


def _just_below(threshold: float) -> float:
    """So that the score it was taken from stays above it when another batch or machine changes its last digits."""
    return min(1.0, max(0.0, float(f"{threshold * (1.0 - 2e-6):.6g}")))


# --- the package --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PackageText:
    """What a package says of itself that no file tells.

    Attributes:
        data: what it was trained on; empty = as the run says.
    """

    name: str
    version: str = "0.1.0"
    description: str = ""
    license: str = "not stated"
    command: str = ""
    data: tuple[str, ...] = ()
    date: str = "1970-01-01"


def check_fit(trained: Trained, classes: Classes, window_examples: int) -> None:
    """ConfigError naming why a classifier can't be served: its input, its window or its classes."""
    size = trained.classifier.input_size
    if size != EMBEDDING_SIZE:
        raise ConfigError(
            f"Model {trained.name} takes {size} values an example; embedders of the detector give {EMBEDDING_SIZE}."
        )
    if len(trained.features.names) > 1:
        raise ConfigError(
            f"Model {trained.name} takes {len(trained.features.names)} features side by side "
            f"({', '.join(trained.features.names)}); the detector hears audio only."
        )
    longest = min(MAX_WINDOW_EXAMPLES, trained.features.max_frames)
    if not 1 <= window_examples <= longest:
        raise ConfigError(f"A window of {window_examples} examples can't be: 1 to {longest} fit model {trained.name}.")
    if is_numbered(classes.labels):
        raise ConfigError(f"Model {trained.name} does not name its classes; give --labels class_labels_indices.csv.")


def export(
    trained: Trained,
    folder: Path,
    text: PackageText,
    *,
    classes: Classes,
    embedder: EmbedderParts,
    operation: Operation,
    window_examples: int = DEFAULT_WINDOW_EXAMPLES,
    evaluation: Evaluation | None = None,
    store: Path | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write the package, whole or not at all; it is loaded and self-tested before it is put in place.

    Args:
        folder: new, empty, or (with ``overwrite``) of a package; a model card in it stays.
        evaluation: its figures go into the manifest.
        store: of fetched weights, where the embedder comes from there and has PCM to be tested with.

    Raises ConfigError for what does not fit and for a folder that holds something else; ModelError where the package
    can't be loaded or written.
    """
    check_fit(trained, classes, window_examples)
    check_folder(folder, overwrite)
    draft = _draft(trained, text, classes, embedder, operation, window_examples, evaluation)
    fetched = embedder.weights is None
    if fetched:
        draft["self_test"] = {"input": "embeddings"}
    if not embedder.quantised:
        logger.warning(
            "Embeddings of this embedder are not quantised, those of records are. Serve it only if the model was "
            "trained on this embedder's own embeddings."
        )
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=parent) as scratch:
            part = Path(scratch)
            if embedder.pca is not None:
                shutil.copyfile(embedder.pca, part / str(embedder.postprocess["file"]))
            manifest = write_package(
                part,
                draft,
                classifier_weights=weights(trained.classifier),
                embedder_weights=embedder.weights,
                store=store,
            )
            folder.mkdir(exist_ok=True)
            for path in sorted(part.iterdir(), key=lambda path: path.name == MANIFEST_NAME):  # the manifest last
                path.replace(folder / path.name)
    except OSError as error:
        raise ModelError(f"Package {folder} can't be written: {error.strerror or error}.") from error
    return manifest


def check_name(name: str, version: str) -> None:
    """ConfigError where a package can't be called so."""
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise ConfigError(
            f"--name {name!r} can't be: small letters, digits, '.', '_' and '-', 64 at most, a letter or digit first."
        ) from None
    if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,63}", version):
        raise ConfigError(f"--version {version!r} can't be: letters, digits, '.', '+' and '-', 64 at most.")


def check_folder(folder: Path, overwrite: bool) -> None:
    """ConfigError where a package can't go there: a file, another package without ``overwrite``, anything else."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder for the package.")
    holds = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not holds or (overwrite and MANIFEST_NAME in holds):
        return
    if MANIFEST_NAME in holds:
        raise ConfigError(f"{folder} holds a package already; --overwrite puts the new one in its place.")
    raise ConfigError(f"{folder} holds {', '.join(holds[:3])} and no package; name a new folder.")


def _draft(
    trained: Trained,
    text: PackageText,
    classes: Classes,
    embedder: EmbedderParts,
    operation: Operation,
    window_examples: int,
    evaluation: Evaluation | None,
) -> dict[str, Any]:
    names = classes.labels.names
    draft: dict[str, Any] = {
        "name": text.name,
        "version": text.version,
        "description": text.description,
        "license": text.license,
        "labels": list(names),
        "family": [names[i] for i in classes.family],
        "look_alikes": [names[i] for i in classes.look_alikes],
        "embedder": dict(embedder.embedder),
        "postprocess": dict(embedder.postprocess),
        "classifier": {"kind": trained.kind, "params": dict(trained.params)},
        "window": {"examples": window_examples, "hop_seconds": HOP_SECONDS},
        "decision": {"open_threshold": operation.open_threshold, "close_threshold": operation.close_threshold},
        "operating_curve": [dict(row) for row in operation.curve],
        "training": {**_training(trained, text), "date": text.date},
    }
    if evaluation is not None:
        draft["evaluation"] = {
            "data": [evaluation.pattern],
            "clips": len(evaluation.clips) - len(evaluation.unscored),
            "metrics": _metrics(evaluation),
        }
    return draft


def _training(trained: Trained, text: PackageText) -> dict[str, Any]:
    """Command, data and recipe: what ``text`` says, else what the source knows."""
    recipe: dict[str, Any] = {}
    command, data = text.command, list(text.data)
    if trained.run is not None:
        config = trained.run.config
        recipe = {**config.recipe.model_dump(mode="json"), "seed": config.seed, "steps": trained.steps}
        command = command or config.command
        data = data or [f"{config.training.pattern} ({config.training.clips} clips)"]
    elif trained.manifest is not None:
        recipe = dict(trained.manifest.training.recipe)
        command = command or trained.manifest.training.command
        data = data or list(trained.manifest.training.data)
    else:
        recipe = {"label_loss": trained.label_loss, "steps": trained.steps}
        command = command or f"the YouTube-8M starter code's train.py, checkpoint {trained.source.name}"
    return {"command": command, "data": data, "recipe": recipe}


def _metrics(evaluation: Evaluation) -> dict[str, float]:
    """The headline figures that exist, as ``trainer evaluate`` names them."""
    g = evaluation.gunfire
    found = {
        "gunfire_family_ap": g.family.ap,
        "gunfire_family_auc": g.family.auc,
        "map": evaluation.map,
        "auc": evaluation.auc,
        "d_prime": evaluation.d_prime,
        **{
            name: value
            for name, value in dataclasses.asdict(evaluation.epoch).items()
            if name in ("hit_at_one", "perr", "gap")
        },
    }
    return {name: round(float(value), 6) for name, value in found.items() if math.isfinite(value)}
