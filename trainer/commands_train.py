"""``trainer train``: options in two spellings, what they come to, and what is said while it trains.

The YouTube-8M starter code's flags keep their names (``--train_data_pattern``, ``--base_learning_rate``), beside ours
(``--train-data``, ``--base-learning-rate``). Flags that mean nothing here are refused with what to do instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from detector.cli import quiet_tensorflow, stop_signals
from detector.errors import ConfigError, DataError, ModelError
from trainer.commands_labels import family_option, labels_option, look_alikes_option, ontology_option
from trainer.recipes import RECIPES, Recipe, recipe_named

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from trainer.labels import LabelSet, Ontology
    from trainer.records import ClipSet, FeatureSpec, Level
    from trainer.run import Run, RunConfig
    from trainer.train import Outcome, Progress, Weights

logger = logging.getLogger(__name__)

DEFAULT_CLASSES = 527
_PLAIN_LINE_SECONDS = 10.0
_SHOWN = 5
_INTERRUPTED = 130

_OPTIMIZERS = {"AdamOptimizer": "Adam", "AdamW": "AdamW", "Adam": "Adam"}
_MODEL_PARAMS = {
    "moe_num_mixtures": "mixtures",
    "video_level_classifier_model": "final",
    "lstm_cells": "cells",
    "lstm_layers": "layers",
    "iterations": "iterations",
    "sample_random_frames": "random_frames",
    "dbof_cluster_size": "clusters",
    "dbof_hidden_size": "hidden",
    "dbof_add_batch_norm": "batch_norm",
    "dbof_pooling_method": "pooling",
    "dbof_activation": "activation",
}
_FINALS = {"MoeModel": "moe", "LogisticModel": "logistic", "moe": "moe", "logistic": "logistic"}
_OF_KIND = {
    "logistic": (),
    "frame_logistic": (),
    "moe": ("moe_num_mixtures",),
    "lstm": ("lstm_cells", "lstm_layers", "video_level_classifier_model", "moe_num_mixtures"),
    "dbof": (
        "iterations",
        "sample_random_frames",
        "dbof_cluster_size",
        "dbof_hidden_size",
        "dbof_add_batch_norm",
        "dbof_pooling_method",
        "dbof_activation",
        "video_level_classifier_model",
        "moe_num_mixtures",
    ),
}
_REFUSED = {
    "num_readers": "Records are read once, into memory, by as many threads as help. Leave it out.",
    "segment_labels": "Clips are labelled as wholes. Cut segments into clips first: trainer embed with start and end.",
    "num_gpu": "Give --gpus.",
    "is_training": "trainer train trains; trainer evaluate evaluates. Leave it out.",
    "cloud_config": "Training runs where it is started. Leave it out.",
}

_FLAG = click.BOOL
_PATH = click.Path(path_type=Path)


def _option(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """An option of which the last name is the parameter's; ``a-b`` is spelled ``a_b`` too."""
    *spelled, parameter = names
    every = dict.fromkeys(each for name in spelled for each in (name, "--" + name[2:].replace("-", "_")))
    return click.option(*every, parameter, **settings)


def _switch(*names: str, help: str) -> Callable[[Any], Any]:
    """True or false: bare, or with a value as the starter code's flags take one (``--frame_features=False``)."""
    return _option(*names, type=_FLAG, is_flag=False, flag_value="true", default=None, help=help)


def _refused(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value is not None:
        name = str(parameter.name)
        raise ConfigError(f"--{name} has no meaning here. {_REFUSED[name]}")


def _all(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_data_options = _all(
    _option("--train-dir", "train_dir", type=_PATH, required=True, help="Folder of this run."),
    _option(
        "--train-data",
        "--train-data-pattern",
        "train_data",
        required=True,
        help="TFRecords: a folder, or patterns with commas between.",
    ),
    _option("--eval-data", "--eval-data-pattern", "eval_data", help="Likewise, to evaluate on."),
    _option(
        "--eval-fraction",
        "eval_fraction",
        type=click.FloatRange(0, 0.9),
        default=0.0,
        help="Instead: this share of the training clips, chosen by their ids.",
    ),
    _option("--feature-names", "feature_names", default="", help="Default: AudioSet's or YouTube-8M's audio key."),
    _option("--feature-sizes", "feature_sizes", default="128", show_default=True),
    _switch("--frame-features", "frame_features", help="Frame-level records (default) or, false, video-level."),
    _option("--max-frames", "max_frames", type=click.IntRange(1), default=300, show_default=True),
    labels_option,
    ontology_option,
    family_option,
    look_alikes_option,
    _option(
        "--num-classes", "num_classes", type=click.IntRange(1), help=f"Without --labels. Default: {DEFAULT_CLASSES}."
    ),
    _switch("--stop-on-damage", "stop_on_damage", help="Stop at a damaged record instead of counting it."),
)
_recipe_options = _all(
    _option("--recipe", "recipe", type=click.Choice(list(RECIPES)), default="recommended", show_default=True),
    _option("--model", "model", help="lstm, moe, logistic, frame_logistic, dbof, ..., or LstmModel and so on."),
    _option("--batch-size", "batch_size", type=int, help="Clips a step, of all replicas together."),
    _option("--num-epochs", "num_epochs", type=float),
    _option("--max-steps", "max_steps", type=int),
    _option("--label-loss", "label_loss", help="CrossEntropyLoss, HingeLoss or SoftmaxLoss."),
    _option("--regularization-penalty", "regularization_penalty", type=float),
    _option("--base-learning-rate", "base_learning_rate", type=float),
    _option("--learning-rate-decay", "learning_rate_decay", type=float),
    _option("--learning-rate-decay-examples", "learning_rate_decay_examples", type=float),
    _option("--learning-rate-schedule", "learning_rate_schedule", type=click.Choice(["stairs", "cosine"])),
    _option("--warm-up-steps", "warm_up_steps", type=int),
    _option("--optimizer", "optimizer", help="Adam (AdamOptimizer) or AdamW."),
    _option("--weight-decay", "weight_decay", type=float),
    _option("--average-decay", "average_decay", type=float, help="Of a moving average of the weights, then served."),
    _option("--clip-gradient-norm", "clip_gradient_norm", type=float),
    _switch("--mixed-precision", "mixed_precision", help="Large products in bfloat16."),
    _option("--label-smoothing", "label_smoothing", type=float),
    _option("--mixup", "mixup_alpha", type=float, help="Beta parameter; 0 = none."),
    _option("--class-weighting", "class_weight_power", type=float, help="Classes by frequency to the minus this."),
    _option("--balanced-sampling", "balanced_sampling_power", type=float, help="Clips, likewise by rarest label."),
    _option("--label-quality", "label_quality", help="CSV class,quality; or 'audioset': the shipped estimates."),
    _option("--hard-negatives", "hard_negative_weight", type=float, help="Weight of look-alikes as not gunfire."),
    _option("--best-by", "best_by", help="gunfire_family_ap, map, gap, hit_at_one, perr or loss."),
    _option("--patience", "patience", type=int, help="Evaluations without a better one before it stops."),
    _option("--evaluate-every-steps", "evaluate_every_steps", type=int),
    _option("--evaluate-every-epochs", "evaluate_every_epochs", type=float),
    _option("--checkpoint-every-steps", "--export-model-steps", "checkpoint_every_steps", type=int),
    _option("--keep-checkpoints", "keep_checkpoints", type=int),
    click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other value of the recipe."),
)
_model_options = _all(
    _option("--moe-num-mixtures", "moe_num_mixtures", type=int),
    _option("--video-level-classifier-model", "video_level_classifier_model", help="MoeModel or LogisticModel."),
    _option("--lstm-cells", "lstm_cells", type=int),
    _option("--lstm-layers", "lstm_layers", type=int),
    _option("--iterations", "iterations", type=int, help="DBoF: rows sampled of each clip."),
    _switch("--sample-random-frames", "sample_random_frames", help="DBoF: rows one by one, or in sequence."),
    _option("--dbof-cluster-size", "dbof_cluster_size", type=int),
    _option("--dbof-hidden-size", "dbof_hidden_size", type=int),
    _switch("--dbof-add-batch-norm", "dbof_add_batch_norm", help="DBoF."),
    _option("--dbof-pooling-method", "dbof_pooling_method", help="max or average."),
    _option("--dbof-activation", "dbof_activation", help="sigmoid, relu6, relu or tanh."),
)
_machine_options = _all(
    _switch(
        "--start-new-model",
        "start_new_model",
        help="Forget what was trained in this folder; given again, it starts over again.",
    ),
    _option(
        "--start-from",
        "start_from",
        help="First weights of a new run: a run, a starter-code folder, a package or a shipped model's name.",
    ),
    _option("--seed", "seed", type=click.IntRange(0, 2**31 - 1), default=1, show_default=True),
    _option("--gpus", "gpus", type=click.IntRange(0), help="GPUs of this machine to train on. Default: all there are."),
    _option("--cpu-replicas", "cpu_replicas", type=click.IntRange(1, 64), default=1, help="To try replicas out."),
    _option("--threads", "threads", type=click.IntRange(0), default=0, help="Of TensorFlow. Default: one a core."),
    _switch("--deterministic", "deterministic", help="The same bits on a GPU each time; slower there."),
    _switch("--log-device-placement", "log_device_placement", help="Say which device runs what."),
    _switch("--tensorboard", "tensorboard", help="Write event files (default)."),
    click.option("--quiet", is_flag=True, help="Say nothing but warnings and errors."),
    *(
        click.option(
            f"--{name}", name, hidden=True, is_flag=False, flag_value="true", callback=_refused, expose_value=False
        )
        for name in _REFUSED
    ),
)


@click.command("train")
@_data_options
@_recipe_options
@_model_options
@_machine_options
def train_command(**given: Any) -> None:
    """Train a classifier on clips of embeddings; the same command again goes on where it stopped.

    --recipe reference is the YouTube-8M starter code's: its models, defaults and flags, by its names. The folder can be
    evaluated and exported at any time. Ctrl-C or SIGTERM saves a checkpoint first.
    """
    quiet_tensorflow()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    options = _Options(given)
    recipe = _recipe(options)
    train_dir: Path = given["train_dir"]
    _refuse_foreign_folder(train_dir)

    def say(text: str) -> None:
        if not given["quiet"]:
            click.echo(text, err=True)

    machine = _machine(options)
    labels, ontology = _labels(options)
    spec = _spec(options)
    if given["eval_data"] and given["eval_fraction"]:
        raise ConfigError("--eval-data and --eval-fraction are both given; one of them is enough.")
    _refuse_unfit_model(recipe, spec, len(labels))
    training, evaluation, config = _data(options, recipe, spec, labels, ontology, say)
    goes_on = _goes_on(train_dir, config, bool(given["start_new_model"]))
    start = None if goes_on or given["start_from"] is None else _first_weights(given["start_from"], config)
    from trainer.train import Trainer, step_settings, steps_in_all

    step_settings(recipe, steps_in_all(len(training), recipe), given["seed"])  # what can't be, before a folder is made
    with _locked(train_dir, machine.chief):
        run = _folder(train_dir, config, goes_on, machine.chief)
        stop = _Stop()
        with _listener(given["quiet"] or not machine.chief) as listener, stop.signals():
            trainer = Trainer(
                run,
                training,
                evaluation,
                listener=listener,
                stop=lambda: stop.asked,
                strategy=machine.strategy,
                workers=machine.workers,
                chief=machine.chief,
                start=start,
                resume=goes_on,
                events=given["tensorboard"] is not False,
            )
            if trainer.step:
                say(f"Going on from step {trainer.step} of {trainer.total_steps}.")
            outcome = trainer.train()
    say(_ending(run, outcome, trainer.total_steps))
    if outcome.reason == "stopped" and stop.number == signal.SIGINT:
        raise SystemExit(_INTERRUPTED)


# --- options -> recipe, data, machine -----------------------------------------------------------------------------


class _Options:
    """What was given on the command line."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given

    def __getitem__(self, name: str) -> Any:
        return self._given[name]

    def given(self, names: Any) -> dict[str, Any]:
        return {name: self._given[name] for name in names if self._given.get(name) is not None}


def _recipe(options: _Options) -> Recipe:
    from trainer.starter_checkpoint import KIND_BY_MODEL

    recipe = recipe_named(options["recipe"])
    changes = options.given(name for name in Recipe.model_fields if name not in ("name", "kind", "params"))
    if "optimizer" in changes:
        if changes["optimizer"] not in _OPTIMIZERS:
            raise ConfigError(f"--optimizer {changes['optimizer']} is not there; give Adam or AdamW.")
        changes["optimizer"] = _OPTIMIZERS[changes["optimizer"]]
    if options["evaluate_every_steps"] is not None and options["evaluate_every_epochs"] is None:
        changes["evaluate_every_epochs"] = None
    model = options["model"]
    if model is not None:
        from detector.classifiers import KINDS

        kind = KIND_BY_MODEL.get(model, model)
        if kind not in KINDS:
            raise ConfigError(f"--model {model} is unknown; there are {', '.join((*KINDS, *KIND_BY_MODEL))}.")
        changes["kind"] = kind
    recipe = recipe.with_changes(changes)
    given = options.given(_MODEL_PARAMS)
    known = _OF_KIND.get(recipe.kind, ("moe_num_mixtures", "video_level_classifier_model"))
    foreign = sorted(set(given) - set(known))
    if foreign:
        raise ConfigError(
            f"{_spelled(foreign)}: models of kind {recipe.kind} have no such thing. "
            f"{'They take ' + _spelled(known) if known else 'Leave it out'}."
        )
    if "video_level_classifier_model" in given:
        final = given["video_level_classifier_model"]
        if final not in _FINALS:
            raise ConfigError(f"--video-level-classifier-model {final} is unknown; give MoeModel or LogisticModel.")
        given["video_level_classifier_model"] = _FINALS[final]
    recipe = recipe.with_changes({"params": {_MODEL_PARAMS[name]: value for name, value in given.items()}})
    settings = {}
    for text in options["settings"]:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: KEY=VALUE is needed, for example --set params.cells=256.")
        settings[key.strip()] = value.strip()
    return recipe.with_texts(settings) if settings else recipe


def _spelled(names: Sequence[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


def _labels(options: _Options) -> tuple[LabelSet, Ontology | None]:
    from trainer.labels import LabelSet, Ontology

    ontology = None if options["ontology_path"] is None else Ontology.read(options["ontology_path"])
    if options["labels_path"] is None:
        count = options["num_classes"] or DEFAULT_CLASSES
        logger.warning("Without --labels classes are called by their index, and gunfire is told by --family alone.")
        return LabelSet.of_names([f"class {i}" for i in range(count)], f"the {count} classes"), ontology
    labels = LabelSet.read(options["labels_path"])
    if options["num_classes"] not in (None, len(labels)):
        raise ConfigError(f"--num-classes is {options['num_classes']}; {options['labels_path']} holds {len(labels)}.")
    return labels, ontology


def _spec(options: _Options) -> FeatureSpec:
    from trainer.records import FeatureSpec

    names = tuple(name.strip() for name in options["feature_names"].split(",") if name.strip())
    try:
        sizes = tuple(int(size) for size in options["feature_sizes"].split(","))
    except ValueError:
        raise ConfigError(
            f"--feature-sizes {options['feature_sizes']!r}: whole numbers with commas between are needed."
        ) from None
    level: Level = "video" if options["frame_features"] is False else "frame"
    return FeatureSpec(names, sizes, level, options["max_frames"])


def _refuse_unfit_model(recipe: Recipe, spec: FeatureSpec, classes: int) -> None:
    """ModelError for parameters that can't be, ConfigError for a model that needs frames where there are none."""
    from detector.classifiers import build_classifier

    classifier = build_classifier(recipe.kind, _params(recipe, spec, classes))
    if spec.level == "video" and not classifier.video_level:
        raise ConfigError(
            f"--frame-features=false: video-level records hold one vector each; models of kind {recipe.kind} need "
            "frames. Give --model logistic or moe, or frame-level records."
        )


def _params(recipe: Recipe, spec: FeatureSpec, classes: int) -> dict[str, Any]:
    return {**recipe.params, "input_size": spec.size, "classes": classes}


def _data(
    options: _Options,
    recipe: Recipe,
    spec: FeatureSpec,
    labels: LabelSet,
    ontology: Ontology | None,
    say: Callable[[str], None],
) -> tuple[ClipSet, ClipSet | None, RunConfig]:
    from trainer.labels import general_class, gunfire_classes, look_alike_classes
    from trainer.run import ClassName, RunConfig

    family, look_alikes = (
        default(labels, ontology) if options[name] is None else labels.resolve(options[name], ontology)
        for name, default in (("family", gunfire_classes), ("look_alikes", look_alike_classes))
    )
    training = _read(options["train_data"], spec, labels, bool(options["stop_on_damage"]))
    say(f"Training data: {training.report}.")
    evaluation = None
    if options["eval_data"]:
        evaluation = _read(options["eval_data"], spec, labels, bool(options["stop_on_damage"]))
        say(f"Evaluation data: {evaluation.report}.")
        _warn_of_overlap(training, evaluation)
    elif options["eval_fraction"]:
        training, evaluation = _divided(training, options["eval_fraction"])
        say(f"{len(evaluation)} of these clips are kept for evaluation.")
    _warn_of_absent_classes(training, labels)
    general = general_class(labels, family, ontology)
    if recipe.imply_family and general is None and len(family) > 1:
        logger.warning(
            "imply_family has no effect: no class of the family (%s) is known to hold the others. Give --ontology, or "
            "call the general one 'Gunshot, gunfire'.",
            ", ".join(labels[i].name for i in family[:_SHOWN]) + (", ..." if len(family) > _SHOWN else ""),
        )
    if evaluation is None and (
        recipe.patience is not None or recipe.best_by != recipe_named(options["recipe"]).best_by
    ):
        logger.warning(
            "Without --eval-data or --eval-fraction nothing is evaluated: no patience, no best but the latest."
        )
    config = RunConfig(
        recipe=recipe,
        kind=recipe.kind,
        params=_params(recipe, spec, len(labels)),
        feature_names=spec.names,
        feature_sizes=spec.sizes,
        level=spec.level,
        max_frames=spec.max_frames,
        labels=tuple(ClassName(mid=label.mid, name=label.name) for label in labels),
        family=tuple(family),
        look_alikes=tuple(index for index in look_alikes if index not in family),
        general=general,
        training=_source(options["train_data"], training),
        evaluation=None if evaluation is None else _source(options["eval_data"] or options["train_data"], evaluation),
        evaluation_fraction=options["eval_fraction"],
        seed=options["seed"],
        started_from=options["start_from"] or "",
        label_quality_fingerprint=_fingerprint_of_qualities(recipe),
        command=shlex.join(["trainer", *sys.argv[1:]]),
    )
    return training, evaluation, config


def _read(pattern: str, spec: FeatureSpec, labels: LabelSet, stop_on_damage: bool) -> ClipSet:
    from trainer.records import find_files, read_clips

    files = find_files(pattern)
    clips = read_clips(files, classes=len(labels), spec=spec, labels=labels, stop_on_damage=stop_on_damage)
    hollow = np.flatnonzero(clips.num_frames == 0).tolist()
    if not hollow:
        return clips
    named = ", ".join(clips.video_id(i) for i in hollow[:_SHOWN]) + (", ..." if len(hollow) > _SHOWN else "")
    if len(hollow) == len(clips):
        raise DataError(f"None of the {len(clips)} clips of {pattern} has a frame ({named}).")
    logger.warning("%d of %d clips have no frames and are left out: %s.", len(hollow), len(clips), named)
    return clips.subset(np.flatnonzero(clips.num_frames > 0))


def _source(pattern: str, clips: ClipSet) -> Any:
    from trainer.run import DataSource

    return DataSource(pattern=pattern, files=clips.report.files, clips=len(clips), fingerprint=clips.fingerprint)


def _fingerprint_of_qualities(recipe: Recipe) -> str:
    from trainer.augment import AUDIOSET_QUALITY

    if recipe.label_quality in (None, AUDIOSET_QUALITY):
        return ""
    try:
        content = Path(str(recipe.label_quality)).read_bytes()
    except OSError as error:
        raise DataError(
            f"Table of label qualities {recipe.label_quality} can't be read: {error.strerror or error}."
        ) from error
    return hashlib.sha256(content).hexdigest()[:32]


def _divided(clips: ClipSet, share: float) -> tuple[ClipSet, ClipSet]:
    """(the rest, this share of them), by a hash of the id, so that a clip never changes sides; all parts of a recording
    are on one.
    """
    marks = [hashlib.sha256(clips.recording_id(i).encode()).digest()[:8] for i in range(len(clips))]
    kept = np.array([int.from_bytes(mark, "big") < share * 2.0**64 for mark in marks])
    if kept.all() or not kept.any():
        raise DataError(
            f"--eval-fraction {share:g} of {len(clips)} clips leaves none on one side (parts of a recording stay "
            "together). Give --eval-data, or more recordings."
        )
    return clips.subset(np.flatnonzero(~kept)), clips.subset(np.flatnonzero(kept))


def _warn_of_overlap(training: ClipSet, evaluation: ClipSet) -> None:
    seen = {training.video_id(i) for i in range(len(training))}
    both = [name for i in range(len(evaluation)) if (name := evaluation.video_id(i)) in seen]
    if both:
        logger.warning(
            "%d of %d evaluation clips are training clips too (%s%s): the evaluation flatters the model.",
            len(both),
            len(evaluation),
            ", ".join(both[:_SHOWN]),
            ", ..." if len(both) > _SHOWN else "",
        )


def _warn_of_absent_classes(training: ClipSet, labels: LabelSet) -> None:
    absent = [labels[i] for i in np.flatnonzero(training.label_counts() == 0).tolist()]
    if absent:
        named = ", ".join(f"{label.index} {label.name}" for label in absent[:_SHOWN])
        logger.warning(
            "%d of %d classes never occur in the training data and won't be learnt: %s%s.",
            len(absent),
            len(labels),
            named,
            ", ..." if len(absent) > _SHOWN else "",
        )


@dataclass(frozen=True, slots=True)
class _Machine:
    """What it trains on."""

    strategy: Any
    workers: int = 1
    chief: bool = True


def _machine(options: _Options) -> _Machine:
    """Set TensorFlow up; before anything else of it. ConfigError where a GPU is asked for that isn't there."""
    import tensorflow as tf

    if options["threads"]:
        tf.config.threading.set_intra_op_parallelism_threads(options["threads"])
    if options["deterministic"]:
        tf.config.experimental.enable_op_determinism()
    if options["log_device_placement"]:
        tf.debugging.set_log_device_placement(True)
    devices = tf.config.list_physical_devices("GPU")
    asked = options["gpus"]
    if asked is not None and asked > len(devices):
        raise ConfigError(
            f"--gpus {asked}: TensorFlow finds {len(devices) or 'no'} GPU{'' if len(devices) == 1 else 's'}. Install "
            "gunfire-detector[detector-gpu] and a driver that fits it, or leave --gpus out."
        )
    used = devices if asked is None else devices[:asked]
    tf.config.set_visible_devices(used, "GPU")
    for device in used:
        tf.config.experimental.set_memory_growth(device, True)
    replicas = options["cpu_replicas"]
    if replicas > 1:
        if used:
            raise ConfigError("--cpu-replicas is for machines without a GPU; give --gpus 0 with it.")
        parts = [tf.config.LogicalDeviceConfiguration()] * replicas
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], parts)
    cluster = _cluster()
    if cluster is not None:
        if replicas > 1:
            raise ConfigError("--cpu-replicas and TF_CONFIG are both given; several workers are enough.")
        return _Machine(tf.distribute.MultiWorkerMirroredStrategy(), *cluster)
    if len(used) > 1:
        return _Machine(tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(len(used))]))
    if replicas > 1:
        return _Machine(tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)]))
    return _Machine(None)


def _cluster() -> tuple[int, bool] | None:
    """(workers, is the chief) of ``TF_CONFIG``; None where there is one worker or none named."""
    text = os.environ.get("TF_CONFIG", "")
    if not text:
        return None
    try:
        content = json.loads(text)
        cluster, task = content["cluster"], content["task"]
        unknown = sorted(set(cluster) - {"chief", "worker"})
        workers = len(cluster.get("chief", ())) + len(cluster.get("worker", ()))
        kind, index = task["type"], int(task["index"])
        if unknown or kind not in cluster or not 0 <= index < len(cluster[kind]):
            raise ValueError(f"task {task} of cluster {cluster}")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"TF_CONFIG can't be used ({error}): a cluster of chief and worker addresses and this process' task are "
            "needed."
        ) from None
    if workers < 2:
        return None
    return workers, kind == "chief" or ("chief" not in cluster and index == 0)


def _first_weights(name: str, config: RunConfig) -> Weights:
    from detector.classifiers import build_classifier, shapes, weights
    from trainer.trained import open_trained

    trained = open_trained(name)
    if trained.kind != config.kind:
        raise ConfigError(f"--start-from {name}: its model is {trained.kind}, this run's {config.kind}.")
    if shapes(trained.classifier) != shapes(build_classifier(config.kind, config.params)):
        keys = [key for key in {**trained.params, **config.params} if trained.params.get(key) != config.params.get(key)]
        unlike = ", ".join(
            f"{key} {trained.params.get(key, 'left out')} there, {config.params.get(key, 'left out')} here"
            for key in keys
        )
        raise ConfigError(
            f"--start-from {name}: its model has other sizes ({unlike}). Give its own: --set params.KEY=VALUE (or the "
            "option, such as --lstm-cells), --labels of as many classes, --feature-sizes."
        )
    return weights(trained.classifier)


# --- the folder ---------------------------------------------------------------------------------------------------


def _refuse_foreign_folder(folder: Path) -> None:
    from trainer.run import Run
    from trainer.starter_checkpoint import is_starter_folder

    if not folder.is_dir():
        return
    if Run.is_run(folder):
        try:
            Run.open(folder)
        except ModelError as error:
            raise ConfigError(
                f"{error} It is left as it is: give another --train-dir, or remove that file if the folder may be "
                "trained in."
            ) from None
        return
    if is_starter_folder(folder) or any(folder.glob("model.ckpt-*.index")) or (folder / "checkpoint").is_file():
        raise ConfigError(
            f"{folder} holds the training of other code (TensorFlow checkpoints). It is left as it is: give another "
            f"--train-dir, and --start-from {folder} to go on from its weights."
        )


@contextlib.contextmanager
def _locked(folder: Path, chief: bool) -> Iterator[None]:
    """One process at a time writes a folder."""
    if not chief:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise DataError(f"{folder} can't be written: {error.strerror or error}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"Another process is training in {folder}. Wait for it, or give another folder."
            ) from None
        yield


def _goes_on(folder: Path, config: RunConfig, start_new: bool) -> bool:
    """Whether there is a run to go on with. ConfigError where the folder holds one that was told otherwise.

    One that took no step may be told anything: nothing is lost with it.
    """
    from trainer.run import Run

    if start_new or not Run.is_run(folder):
        return False
    run = Run.open(folder)
    steps = [step for step, _ in run.checkpoint_paths()]
    if not steps:
        return False
    differences = run.config.differences(config)
    if config.started_from and not _same_source(config.started_from, run.config.started_from):
        differences.append(
            f"started_from is {json.dumps(config.started_from)}, it was {json.dumps(run.config.started_from)}"
        )
    if not differences:
        return True
    if max(steps) == 0:
        return False
    shown = "; ".join(differences[:_SHOWN]) + ("; and more" if len(differences) > _SHOWN else "")
    raise ConfigError(
        f"{folder} holds a run that was told otherwise: {shown}. Give the options it was begun with (they are in "
        f"{folder / 'run.json'}), another --train-dir, or --start-new-model to forget it."
    )


def _same_source(one: str, other: str) -> bool:
    return one == other or Path(one).absolute() == Path(other).absolute()


def _folder(folder: Path, config: RunConfig, goes_on: bool, chief: bool) -> Run:
    """The run, made anew unless it ``goes_on``."""
    from trainer.run import Run

    if not chief:
        return Run(folder, config)
    if not goes_on:
        if Run.is_run(folder):
            Run(folder, config).clear()  # before anything says that it is another run
        return Run.create(folder, config)
    run = Run.open(folder)
    run.update(config.model_copy(update={"started_from": run.config.started_from}))
    return run


# --- telling ------------------------------------------------------------------------------------------------------


class _Stop:
    """Asked for by a signal."""

    def __init__(self) -> None:
        self.asked = False
        self.number: int | None = None

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        def ask() -> None:
            self.asked = True

        with stop_signals(ask):
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._noting(signal.getsignal(number)))
            yield

    def _noting(self, handler: Any) -> Any:
        def on_signal(number: int, frame: Any) -> None:
            self.number = number
            handler(number, frame)

        return on_signal


class _Silent:
    def progress(self, progress: Progress) -> None:
        pass

    def evaluated(self, step: int, metrics: dict[str, float], is_best: bool) -> None:
        pass

    def saved(self, step: int) -> None:
        pass


class _Lines(_Silent):
    """Lines for a log, not more than one in ten seconds."""

    def __init__(self) -> None:
        self._last = -_PLAIN_LINE_SECONDS

    def progress(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last >= _PLAIN_LINE_SECONDS or progress.step == progress.total_steps:
            self._last = now
            click.echo(_line(progress), err=True)

    def evaluated(self, step: int, metrics: dict[str, float], is_best: bool) -> None:
        click.echo(_evaluation_line(step, metrics, is_best), err=True)


class _BarAndLines(_Silent):
    """A bar at the foot, evaluations above it."""

    def __init__(self, bar: Bar, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def progress(self, progress: Progress) -> None:
        note = _line(progress)
        self._bar.update(self._task, total=progress.total_steps, completed=progress.step, note=note)

    def evaluated(self, step: int, metrics: dict[str, float], is_best: bool) -> None:
        self._bar.console.print(_evaluation_line(step, metrics, is_best), highlight=False)


@contextlib.contextmanager
def _listener(quiet: bool) -> Iterator[_Silent]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(file=sys.stderr)
    if quiet or not console.is_terminal:
        yield _Silent() if quiet else _Lines()
        return
    columns = (BarColumn(bar_width=20), TextColumn("{task.fields[note]}"))
    with Bar(*columns, console=console, refresh_per_second=2) as bar:
        yield _BarAndLines(bar, bar.add_task("", total=None, note="the first step takes a while"))


def _line(progress: Progress) -> str:
    parts = [
        f"epoch {progress.epoch:.2f}/{progress.epochs:g}",
        f"step {progress.step}/{progress.total_steps}",
        f"loss {progress.loss:.4f}",
        f"{progress.examples_per_second:.0f} examples/s",
        f"ETA {_clock(progress.remaining_seconds)}",
    ]
    if progress.best is not None:
        value = progress.best.metrics[progress.best.metric]
        parts.append(f"best {progress.best.metric} {value:.4f} (step {progress.best.step})")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    if np.isnan(seconds):
        return "-"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _evaluation_line(step: int, metrics: dict[str, float], is_best: bool) -> str:
    told = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if not np.isnan(value))
    return f"step {step} evaluated: {told}{'  (best so far)' if is_best else ''}"


def _ending(run: Run, outcome: Outcome, total_steps: int) -> str:
    folder = shlex.quote(str(run.folder))
    if outcome.reason == "stopped":
        return (
            f"Stopped at step {outcome.step} of {total_steps}; the checkpoint is saved. Give the same command again to "
            "go on."
        )
    why = "no better evaluation for as long as --patience says" if outcome.reason == "patience" else "done"
    lines = [f"Step {outcome.step}: {why}."]
    if outcome.best is not None:
        value = outcome.best.metrics[outcome.best.metric]
        lines.append(f"Best {outcome.best.metric}: {value:.4f} at step {outcome.best.step}.")
    lines.append(f"Next: trainer evaluate --model {folder} ...; tensorboard --logdir {folder}")
    return "\n".join(lines)
