"""A model package on disk, and the model it gives: manifest + weights, verified before use, served in batches.

A package is a folder: ``manifest.json`` (``Manifest``), ``*.safetensors`` and a model card. Nothing in it is code.
The pipeline asks a ``Model`` for embeddings of PCM and for scores of windows; the trainer writes packages with
``save_package``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from detector import classifiers, embedders
from detector.checkpoint import read_safetensors, write_safetensors
from detector.embedders.params import EMBEDDING_SIZE, EXAMPLE_SAMPLES, FRONT_END
from detector.embedders.postprocess import dequantise, read_pca
from detector.errors import ModelError
from detector.store import check_sha256, default_store, locked_file, sha256_of_file

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 4 << 20
DEFAULT_MAX_BATCH = 64
# Below these sizes matrix products become matrix-vector products, which sum in another order. From them on, TensorFlow
# with oneDNN gives an example the same bits in every batch, so that an alert can be replayed bit for bit.
_MIN_EMBED_BATCH = 2
_MIN_CLASSIFY_BATCH = 4
# Processors without AVX-512 sum otherwise for every number of rows: there all goes in blocks of this size.
_BLOCK = 16
_SHIPPED = Path(__file__).parent / "models"
_EMBEDDER_FILE = "embedder.safetensors"
_CLASSIFIER_FILE = "classifier.safetensors"
_REMEDY = "Get or make the package again."

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Probability = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Label = Annotated[str, Field(min_length=1, max_length=200)]
Int16Array = npt.NDArray[np.int16]
Float32Array = npt.NDArray[np.float32]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class EmbedderSection(_Section):
    """Which network makes embeddings, and from which weights: a file of the package or (``from_store``) a fetched one.

    A fetched file may go without ``sha256``; then the store's lock says what it must hash to.
    """

    kind: str
    file: FileName
    sha256: Sha256 | None = None
    from_store: bool = False
    params: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _own_files_are_pinned(self) -> EmbedderSection:
        if self.sha256 is None and not self.from_store:
            raise ValueError("sha256 is needed for a file of the package")
        return self


class PostprocessSection(_Section):
    """What follows the network: ``none``, or ``pca_quantise`` with the parameters AudioSet published."""

    kind: Literal["none", "pca_quantise"] = "none"
    file: FileName | None = None
    sha256: Sha256 | None = None
    from_store: bool = False

    @model_validator(mode="after")
    def _file_where_needed(self) -> PostprocessSection:
        if (self.kind == "pca_quantise") != (self.file is not None):
            raise ValueError("file is needed with kind pca_quantise, and only then")
        if self.file is not None and self.sha256 is None and not self.from_store:
            raise ValueError("sha256 is needed for a file of the package")
        return self


class ClassifierSection(_Section):
    """Which classifier scores windows, its weights and its shape."""

    kind: str
    file: FileName
    sha256: Sha256
    params: dict[str, Any] = Field(default_factory=dict)


class WindowSection(_Section):
    """What the classifier was trained to see: the last ``examples`` embeddings, ``hop_seconds`` apart."""

    examples: Annotated[int, Field(ge=1, le=300)] = 10
    hop_seconds: Annotated[float, Field(gt=0, le=10)] = 0.96


class DecisionSection(_Section):
    """Thresholds on the family score at the operating point the model's makers chose."""

    open_threshold: Probability
    close_threshold: Probability

    @model_validator(mode="after")
    def _close_below_open(self) -> DecisionSection:
        if self.close_threshold > self.open_threshold:
            raise ValueError("close_threshold must not be above open_threshold")
        return self


class OperatingPoint(_Section):
    """What one threshold gave on the evaluation named in the model card.

    Attributes:
        false_positive_rate: share of clips without gunfire at or above the threshold, where clips were evaluated.
        false_alarms_per_hour: of continuous audio; or of such clips, one after the other. From `trainer compact` the
            upper end of the 95 % interval.
    """

    threshold: Probability
    recall: Probability
    false_alarms_per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    false_positive_rate: Probability | None = None


class FalseAlertsSection(_Section):
    """The loudest false alerts in audio without gunfire: what rates of false alerts rest on.

    Attributes:
        audio_hours: how much continuous audio was listened to.
        hop_seconds: between its examples.
        peaks: largest family score of each false alert that a low threshold gives, descending; the loudest ones.
    """

    audio_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    hop_seconds: Annotated[float, Field(gt=0, le=10)] = 0.96
    peaks: Annotated[tuple[Probability, ...], Field(max_length=1000)]

    @model_validator(mode="after")
    def _descending(self) -> FalseAlertsSection:
        if list(self.peaks) != sorted(self.peaks, reverse=True):
            raise ValueError("peaks must descend")
        return self


class SelfTestSection(_Section):
    """A known input and the scores it must give, within ``tolerance``.

    ``pcm``: ``self_test_pcm(seed, window.examples)`` through the whole model. ``embeddings``:
    ``self_test_embeddings(seed, window.examples)`` through the classifier alone, for a package that was written where
    its embedder's weights were not to be had; these have a test of their own when they are fetched.
    """

    input: Literal["pcm", "embeddings"] = "pcm"
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    expected_scores: tuple[Probability, ...]
    tolerance: Annotated[float, Field(gt=0, le=0.1)] = 2e-3


class TrainingSection(_Section):
    """How to make this model again.

    Attributes:
        recipe: the settings it was trained with, by name.
    """

    command: str
    data: tuple[str, ...]
    date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    recipe: dict[str, Any] = Field(default_factory=dict)


class EvaluationSection(_Section):
    """What was measured before the package was written.

    Attributes:
        data: which clips.
        clips: how many.
        metrics: name -> figure, as ``trainer evaluate`` names them.
    """

    data: tuple[str, ...]
    clips: Annotated[int, Field(ge=1)]
    metrics: dict[str, Annotated[float, Field(allow_inf_nan=False)]]


class Manifest(_Section):
    """``manifest.json``, format version 1."""

    format_version: Literal[1] = 1
    name: Name
    version: Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z.+-]{0,63}$")]
    description: str = ""
    license: Annotated[str, Field(min_length=1)]
    labels: Annotated[tuple[Label, ...], Field(min_length=1)]
    family: Annotated[tuple[Label, ...], Field(min_length=1)]
    look_alikes: tuple[Label, ...] = ()
    embedder: EmbedderSection
    postprocess: PostprocessSection = PostprocessSection()
    classifier: ClassifierSection
    window: WindowSection = WindowSection()
    decision: DecisionSection
    operating_curve: tuple[OperatingPoint, ...] = ()
    false_alerts: tuple[FalseAlertsSection, ...] = ()
    evaluation: EvaluationSection | None = None
    self_test: SelfTestSection
    training: TrainingSection

    @model_validator(mode="after")
    def _labels_agree(self) -> Manifest:
        for field in ("labels", "family", "look_alikes"):
            values = getattr(self, field)
            if len(set(values)) != len(values):
                raise ValueError(f"{field} names a label twice")
        for field in ("family", "look_alikes"):
            unknown = [label for label in getattr(self, field) if label not in self.labels]
            if unknown:
                raise ValueError(f"{field} holds {unknown}, which labels does not")
        both = sorted(set(self.family) & set(self.look_alikes))
        if both:
            raise ValueError(f"{both} are in family and in look_alikes")
        if len(self.self_test.expected_scores) != len(self.labels):
            raise ValueError(
                f"self_test.expected_scores has {len(self.self_test.expected_scores)} values for "
                f"{len(self.labels)} labels"
            )
        return self


class Model:
    """A verified model, ready to be warmed up. Safe to call from several threads.

    Attributes:
        manifest: what the package says.
        sha256: identity of manifest and all weights, hex.
        batch_invariant: whether an example gives the same bits in every batch; None before ``warm_up``.
    """

    def __init__(
        self, manifest: Manifest, embedder: Callable[..., Any], classifier: classifiers.Classifier, sha256: str
    ) -> None:
        self.manifest = manifest
        self.sha256 = sha256
        self._embedder = embedder
        self._classifier = classifier
        self._lock = threading.Lock()
        self._embed_by_size: dict[int, Callable[..., Any]] = {}
        self._classify_by_size: dict[int, Callable[..., Any]] = {}
        self._max_batch = DEFAULT_MAX_BATCH
        self._block = _BLOCK if _rows_show_in_products() else None
        self.batch_invariant: bool | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """Meaning of each score column."""
        return self.manifest.labels

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def window_examples(self) -> int:
        """Embeddings in a window, T."""
        return self.manifest.window.examples

    def embed(self, pcm: Int16Array) -> Float32Array:
        """``(n, 15600)`` int16 at 16 kHz -> ``(n, 128)`` float32, as the classifier is to see them; any n."""
        if pcm.dtype != np.int16 or pcm.ndim != 2 or pcm.shape[1] != EXAMPLE_SAMPLES:
            raise ModelError(f"PCM is {pcm.dtype} {pcm.shape}; int16 (n, {EXAMPLE_SAMPLES}) is expected.")
        out = np.empty((len(pcm), EMBEDDING_SIZE), np.float32)
        for part, size in self._parts(len(pcm), _MIN_EMBED_BATCH):
            out[part] = self._embed_function(size)(_padded(pcm[part], size)).numpy()[: part.stop - part.start]
        return out

    def classify(self, windows: Float32Array, num_frames: npt.NDArray[np.int32]) -> Float32Array:
        """``(n, T, 128)`` float32 embeddings, oldest first, and ``(n,)`` int32 valid rows -> ``(n, V)`` float32.

        T may be below the model's window; rows from ``num_frames`` on have no effect.
        """
        longest = self.window_examples
        if windows.dtype != np.float32 or windows.ndim != 3 or windows.shape[2] != EMBEDDING_SIZE:
            raise ModelError(
                f"Windows are {windows.dtype} {windows.shape}; float32 (n, T, {EMBEDDING_SIZE}) is expected."
            )
        count, given = windows.shape[:2]
        if given > longest:
            raise ModelError(f"Windows hold {given} embeddings; model {self.name} takes {longest} at most.")
        if num_frames.shape != (count,) or (count and not 0 <= num_frames.min() <= num_frames.max() <= given):
            raise ModelError(f"num_frames must be {count} numbers from 0 to {given}.")
        if given < longest:
            windows = np.pad(windows, ((0, 0), (0, longest - given), (0, 0)))
        frames = num_frames.astype(np.int32, copy=False)
        out = np.empty((count, len(self.labels)), np.float32)
        for part, size in self._parts(count, _MIN_CLASSIFY_BATCH):
            scores = self._classify_function(size)(_padded(windows[part], size), _padded(frames[part], size))
            out[part] = scores.numpy()[: part.stop - part.start]
        return out

    def _parts(self, count: int, min_batch: int) -> Iterator[tuple[slice, int]]:
        """Which of ``count`` rows go together, and the batch size that serves them."""
        most, least = self._block or self._max_batch, self._block or min_batch
        for start in range(0, count, most):
            stop = min(start + most, count)
            yield slice(start, stop), _bucket(stop - start, most, least)

    def warm_up(self, max_batch: int = DEFAULT_MAX_BATCH) -> None:
        """Trace and run every batch size up to ``max_batch``, which larger inputs are then split by.

        Says so in the log where the batch size shows in an example's bits: then a replay may differ in the last digits.
        """
        if max_batch < 1:
            raise ModelError(f"max_batch is {max_batch}; it must be at least 1.")
        self._max_batch = max_batch
        pcm = self_test_pcm(self.manifest.self_test.seed, 2)[1:]  # (1, 15600)
        seen: set[bytes] = set()
        for size in _bucket_sizes(max_batch):
            embeddings = self.embed(np.repeat(pcm, size, axis=0))  # (size, 128)
            windows = np.repeat(embeddings[:, None], self.window_examples, axis=1)
            scores = self.classify(windows, np.full(size, self.window_examples, np.int32))
            seen |= {embedding.tobytes() + score.tobytes() for embedding, score in zip(embeddings, scores, strict=True)}
        self.batch_invariant = len(seen) == 1
        if not self.batch_invariant:
            logger.warning(
                "On this machine an example's scores depend on its batch in the last digits, so a replay may differ "
                "there from the first run. On x86 leave TF_ENABLE_ONEDNN_OPTS on to avoid this."
            )

    def self_test(self) -> None:
        """The manifest's known input through the model; ModelError where a score is off."""
        expected = np.asarray(self.manifest.self_test.expected_scores)
        scores = self._self_test_scores()
        worst = int(np.argmax(np.abs(scores - expected)))
        if not np.all(np.abs(scores - expected) <= self.manifest.self_test.tolerance):  # NaN fails too
            raise ModelError(
                f"Self-test of model {self.name} {self.version} failed: label {self.labels[worst]!r} scored "
                f"{scores[worst]:.6f}, expected {expected[worst]:.6f} within {self.manifest.self_test.tolerance:g}. "
                f"The weights don't belong to this manifest, or this machine's TensorFlow computes wrongly. {_REMEDY}"
            )

    def _self_test_scores(self) -> Float32Array:
        test = self.manifest.self_test
        if test.input == "embeddings":
            window = self_test_embeddings(test.seed, self.window_examples)[None]  # (1, T, 128)
        else:
            window = self.embed(self_test_pcm(test.seed, self.window_examples))[None]
        return np.asarray(self.classify(window, np.array([self.window_examples], np.int32))[0])

    def _embed_function(self, size: int) -> Callable[..., Any]:
        with self._lock:
            if size not in self._embed_by_size:
                import tensorflow as tf

                spec = tf.TensorSpec([size, EXAMPLE_SAMPLES], tf.int16)
                self._embed_by_size[size] = tf.function(lambda pcm: self._embedder(pcm)).get_concrete_function(spec)
            return self._embed_by_size[size]

    def _classify_function(self, size: int) -> Callable[..., Any]:
        with self._lock:
            if size not in self._classify_by_size:
                import tensorflow as tf

                from detector.classifiers.features import without_padding

                windows = tf.TensorSpec([size, self.window_examples, EMBEDDING_SIZE], tf.float32)
                frames = tf.TensorSpec([size], tf.int32)
                # Not every kind leaves padding out by itself.
                function = tf.function(lambda x, n: self._classifier(without_padding(x, n), n))
                self._classify_by_size[size] = function.get_concrete_function(windows, frames)
            return self._classify_by_size[size]


def load_model(name_or_path: str | Path, *, store: Path | None = None, threads: int = 0) -> Model:
    """Read, verify and build a model; not yet warmed up or self-tested.

    Args:
        name_or_path: a shipped model's name, or a package folder (a Path, or text with a slash).
        store: folder of fetched weights; None = ``default_store()``.
        threads: CPU threads of one operation; 0 = all cores. Counts only before TensorFlow's first use in the process.

    Raises ModelError naming file, what was found, what was expected and the remedy.
    """
    folder = _package_folder(name_or_path)
    manifest, text = _read_manifest(folder / MANIFEST_NAME)
    configure_tensorflow(threads)
    files: list[tuple[str, str]] = [(MANIFEST_NAME, hashlib.sha256(text).hexdigest())]

    def verified(file: str, sha256: str | None, from_store: bool) -> Path:
        if from_store:
            path, found = locked_file(store if store is not None else default_store(), file)
            if sha256 not in (None, found):
                raise ModelError(f"{path} has SHA-256 {found}; {folder / MANIFEST_NAME} expects {sha256}. {_REMEDY}")
        else:
            path, found = folder / file, str(sha256)
            check_sha256(path, found)
        files.append((file, found))
        return path

    e, p, c = manifest.embedder, manifest.postprocess, manifest.classifier
    with _naming(folder / MANIFEST_NAME):
        if e.params:
            raise ModelError(f"Embedder kind {e.kind!r} takes no params, found {sorted(e.params)}.")
        if manifest.window.hop_seconds != FRONT_END.example_hop_seconds:
            raise ModelError(
                f"window.hop_seconds is {manifest.window.hop_seconds:g}; this version serves classifiers that were "
                f"trained on examples {FRONT_END.example_hop_seconds:g} s apart."
            )
        shapes = embedders.tensor_shapes(e.kind)
        classifier = _fitting_classifier(manifest)
    tensors = read_safetensors(verified(e.file, e.sha256, e.from_store), shapes)
    pca = None if p.file is None else read_pca(verified(p.file, p.sha256, p.from_store))
    embedder = embedders.build_embedder(e.kind, tensors, pca=pca)
    classifiers.assign(classifier, read_safetensors(verified(c.file, c.sha256, False), classifiers.shapes(classifier)))
    identity = hashlib.sha256("".join(f"{sha256}  {name}\n" for name, sha256 in files).encode()).hexdigest()
    return Model(manifest, embedder, classifier, identity)


@dataclass(frozen=True, slots=True, eq=False)
class PackagedClassifier:
    """The classifier of a package without its embedder: what scores embeddings that are there already.

    Attributes:
        folder: of the package.
    """

    manifest: Manifest
    classifier: classifiers.Classifier
    folder: Path


def load_manifest(name_or_path: str | Path) -> Manifest:
    """What ``load_model`` would read first: quick, and needs neither weights nor TensorFlow."""
    return _read_manifest(_package_folder(name_or_path) / MANIFEST_NAME)[0]


def load_classifier(name_or_path: str | Path) -> PackagedClassifier:
    """As ``load_model``, but the classifier alone: needs no weights of the embedder."""
    folder = _package_folder(name_or_path)
    manifest, _ = _read_manifest(folder / MANIFEST_NAME)
    with _naming(folder / MANIFEST_NAME):
        classifier = _fitting_classifier(manifest)
    path = folder / manifest.classifier.file
    check_sha256(path, manifest.classifier.sha256)
    classifiers.assign(classifier, read_safetensors(path, classifiers.shapes(classifier)), str(path))
    return PackagedClassifier(manifest, classifier, folder)


def shipped_models() -> list[Manifest]:
    """Manifests of the models that come with the project, by name."""
    return [_read_manifest(path)[0] for path in sorted(_SHIPPED.glob(f"*/{MANIFEST_NAME}"))]


def save_package(
    folder: Path,
    draft: Mapping[str, Any],
    *,
    classifier_weights: Mapping[str, Float32Array],
    embedder_weights: Mapping[str, Float32Array] | None = None,
    store: Path | None = None,
) -> Model:
    """``write_package``, then load and self-test what was written.

    Raises ModelError where draft and weights don't fit together or the disk refuses.
    """
    write_package(folder, draft, classifier_weights=classifier_weights, embedder_weights=embedder_weights, store=store)
    model = load_model(folder.absolute(), store=store)
    model.self_test()
    return model


def write_package(
    folder: Path,
    draft: Mapping[str, Any],
    *,
    classifier_weights: Mapping[str, Float32Array],
    embedder_weights: Mapping[str, Float32Array] | None = None,
    store: Path | None = None,
) -> Manifest:
    """Write a package; what was written is read again and gives the self-test its scores.

    Args:
        folder: made where absent; other files in it (the model card) stay.
        draft: the manifest without what is filled in here: file and sha256 of classifier and (with
            ``embedder_weights``) embedder, and ``self_test.expected_scores``. ``self_test`` may be left out; its
            ``input`` ``embeddings`` makes do without the embedder's weights.
        classifier_weights: variable name -> value.
        embedder_weights: weight name -> value; None where the draft's embedder is ``from_store``.
        store: folder of fetched weights, where the draft names some.

    Raises ModelError where draft and weights don't fit together or the disk refuses.
    """
    content: dict[str, Any] = json.loads(json.dumps(dict(draft)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"Package folder {folder} can't be made: {error.strerror or error}.") from error
    written = [("classifier", _CLASSIFIER_FILE, classifier_weights)]
    if embedder_weights is not None:
        written.append(("embedder", _EMBEDDER_FILE, embedder_weights))
    for section, file, weights in written:
        write_safetensors(folder / file, weights)
        content.setdefault(section, {}).update(file=file, sha256=sha256_of_file(folder / file))
    labels = content.get("labels", [])
    content["self_test"] = {"seed": 20_180_501, **content.get("self_test", {}), "expected_scores": [0.0] * len(labels)}
    _write_manifest(folder / MANIFEST_NAME, content)
    manifest, _ = _read_manifest(folder / MANIFEST_NAME)
    if manifest.self_test.input == "embeddings":
        scores = _classifier_scores(load_classifier(folder.absolute()))
    else:
        scores = load_model(folder.absolute(), store=store)._self_test_scores()
    content["self_test"]["expected_scores"] = [round(float(score), 6) for score in scores]
    _write_manifest(folder / MANIFEST_NAME, content)
    return _read_manifest(folder / MANIFEST_NAME)[0]


def _classifier_scores(packaged: PackagedClassifier) -> Float32Array:
    """``(V,)`` of the self-test's embeddings."""
    manifest = packaged.manifest
    window = self_test_embeddings(manifest.self_test.seed, manifest.window.examples)[None]
    scores = packaged.classifier(window, np.array([manifest.window.examples], np.int32))
    return np.asarray(scores.numpy()[0], np.float32)


def self_test_pcm(seed: int, examples: int) -> Int16Array:
    """``(examples, 15600)`` int16: noise of growing level, a decaying burst in every second example."""
    random = np.random.RandomState(seed)  # its stream is frozen for all NumPy versions
    pcm = np.empty((examples, EXAMPLE_SAMPLES), np.int16)
    time_samples = np.arange(EXAMPLE_SAMPLES)
    for k in range(examples):
        x = random.standard_normal(EXAMPLE_SAMPLES) * 40.0 * 2.0 ** (k % 6)
        if k % 2:
            onset_samples = 2_000 + 900 * k % 12_000
            decay = np.exp(-np.maximum(time_samples - onset_samples, 0) / 400.0) * (time_samples >= onset_samples)
            x += random.standard_normal(EXAMPLE_SAMPLES) * 9_000.0 * decay
        pcm[k] = np.clip(np.rint(x), -32768, 32767)
    return pcm


def self_test_embeddings(seed: int, examples: int) -> Float32Array:
    """``(examples, 128)`` float32, about -2 to 2: random bytes, dequantised as AudioSet's are."""
    random = np.random.RandomState(seed)
    return dequantise(random.randint(0, 256, (examples, EMBEDDING_SIZE), np.uint8))


def _package_folder(name_or_path: str | Path) -> Path:
    if isinstance(name_or_path, Path) or "/" in name_or_path:
        folder = Path(name_or_path)
        if not folder.is_dir():
            raise ModelError(f"Model package {folder} is no folder; give the folder that holds {MANIFEST_NAME}.")
        return folder
    folder = _SHIPPED / name_or_path
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name_or_path) or not folder.is_dir():
        shipped = sorted(path.parent.name for path in _SHIPPED.glob(f"*/{MANIFEST_NAME}"))
        raise ModelError(
            f"Model {name_or_path!r} is not among the shipped ones ({', '.join(shipped) or 'none'}); to use a package "
            "folder of your own, write its path with a slash."
        )
    return folder


def _read_manifest(path: Path) -> tuple[Manifest, bytes]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise ModelError(f"Manifest {path} can't be read: {error.strerror or error}. {_REMEDY}") from error
    if len(text) > MAX_MANIFEST_BYTES:
        raise ModelError(f"Manifest {path} is larger than {MAX_MANIFEST_BYTES} bytes; it is no manifest. {_REMEDY}")
    try:
        return Manifest.model_validate_json(text, strict=True), text
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc']) or 'file'}: {fault['msg']}"
            + (f", found {str(fault['input'])[:80]!r}" if fault["loc"] and fault["type"] != "missing" else "")
            for fault in error.errors(include_url=False)[:8]
        )
        raise ModelError(f"Manifest {path} can't be used: {faults}. {_REMEDY}") from None


def _write_manifest(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(path.name + ".part")
    try:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        partial.replace(path)
    except OSError as error:
        raise ModelError(f"Manifest {path} can't be written: {error.strerror or error}.") from error


def _fitting_classifier(manifest: Manifest) -> classifiers.Classifier:
    section = manifest.classifier
    for name, needed in (("classes", len(manifest.labels)), ("input_size", EMBEDDING_SIZE)):
        if section.params.get(name, needed) != needed:
            raise ModelError(
                f"classifier.params.{name} is {section.params[name]!r}; labels and embedder need {needed}."
            )
    params = {**section.params, "classes": len(manifest.labels), "input_size": EMBEDDING_SIZE}
    return classifiers.build_classifier(section.kind, params)


def configure_tensorflow(threads: int = 0) -> None:
    """Float32 stays float32 (no TF32), GPU memory is taken as needed, and ``threads`` counts where it still can."""
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)
        if threads and tf.config.threading.get_intra_op_parallelism_threads() != threads:
            tf.config.threading.set_intra_op_parallelism_threads(threads)
    except (RuntimeError, ValueError) as error:
        logger.warning("TensorFlow runs already; threads=%d has no effect in this process (%s).", threads, error)


@lru_cache(maxsize=1)
def _rows_show_in_products() -> bool:
    """Whether on this processor a row of a matrix product depends on how many there are; not asked of a GPU."""
    import tensorflow as tf

    if tf.config.list_physical_devices("GPU"):
        return False
    random = np.random.default_rng(0)
    for deep, wide in ((1152, 128), (224, 384)):
        row = random.standard_normal((1, deep)).astype(np.float32)
        weights = tf.constant(random.standard_normal((deep, wide)).astype(np.float32))
        products = [tf.matmul(np.repeat(row, rows, axis=0), weights).numpy() for rows in (4, 8, 16, 32, 64)]
        if len({one.tobytes() for product in products for one in product}) > 1:
            return True
    return False


def _bucket(count: int, max_batch: int, min_batch: int) -> int:
    """The batch size that serves ``count``: the next power of two within these limits; ``min_batch`` wins."""
    return max(min(1 << (count - 1).bit_length(), max_batch), min_batch)


def _bucket_sizes(max_batch: int) -> list[int]:
    """1, 2, 4, ... and ``max_batch`` itself."""
    return sorted({min(1 << i, max_batch) for i in range(max_batch.bit_length() + 1)})


def _padded(values: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """Zeros appended to reach ``size`` rows."""
    if len(values) == size:
        return np.ascontiguousarray(values)
    padded = np.zeros((size, *values.shape[1:]), values.dtype)
    padded[: len(values)] = values
    return padded


class _naming:
    """Puts the manifest's path in front of what a section's builder says."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, ModelError):
            raise ModelError(f"Manifest {self._path}: {error} {_REMEDY}") from error
