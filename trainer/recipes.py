"""A recipe: every choice of a training run that isn't the data. ``reference`` is the YouTube-8M starter code's.

Values only; what they mean in the step is in ``trainer.train_step``, on the data side in ``trainer.augment``. A recipe
is kept in the run's ``run.json`` and read from there again, so a field's name is a promise.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from detector.errors import ConfigError

BestBy = Literal["gunfire_family_ap", "map", "gap", "hit_at_one", "perr", "loss"]
LossName = Literal["CrossEntropyLoss", "HingeLoss", "SoftmaxLoss"]


class Recipe(BaseModel):
    """How to train. Defaults are the starter code's flags; names too, where it has one.

    Attributes:
        name: ``reference``, ``recommended`` or the like; for people.
        kind, params: classifier, and its parameters besides ``input_size`` and ``classes``; those left out have the
            classifier's own defaults.
        batch_size: clips a step, of all replicas together.
        num_epochs, max_steps: whichever ends first; one may be None.
        label_loss: by the starter code's class name.
        regularization_penalty, l2_penalty: factor of the regularisation loss, and the factor within it.
        optimizer: ``AdamW`` adds decay of the weights by ``weight_decay`` times the rate, of matrices alone.
        base_learning_rate, learning_rate_decay, learning_rate_decay_examples: in stairs, with schedule ``stairs``.
        learning_rate_schedule: ``cosine`` falls from the base rate to ``final_learning_rate_share`` of it at the end.
        warm_up_steps: the rate rises in a straight line before; with either schedule.
        clip_gradient_norm: 0 = never; ``clip_gradients`` says of what: each variable's gradient, or all together.
        average_decay: 0, or the decay of a moving average of the weights, which is then evaluated and served.
        mixed_precision: large products in bfloat16.
        imply_family: a clip with any label of the family carries the class too that all of them are kinds of (gunfire:
            a machine gun is a gunshot, though those who labelled ticked one alone); without effect where none of the
            family is known to be that (``trainer.labels.general_class``).
        label_smoothing: labels become ``y (1 - s) + s / 2``.
        mixup_alpha, mixup_share: Beta parameter (0 = off), and the share of batches or clips that it is done to.
        class_weight_power: classes weigh by their frequency to the minus this (0 = all the same).
        balanced_sampling_power: clips are drawn by their rarest label's frequency to the minus this (0 = each once).
        frame_dropout: share of a clip's frames taken out by chance; one always stays.
        label_quality: CSV ``class,quality`` of how many labels are right, ``audioset`` for the published estimates that
            come with the project, or None.
        label_quality_power: a positive label's weight is its quality to this power.
        hard_negative_weight: factor of gunfire's terms where a clip carries a look-alike and no gunfire.
        hard_negative_sampling: how often a clip with a look-alike is drawn, a plain one being 1.
        evaluate_every_steps, evaluate_every_epochs: whichever is given; the end is always evaluated.
        best_by: the metric of ``best.safetensors``; None = ``gunfire_family_ap`` where the classes hold gunfire, else
            ``map``.
        patience: evaluations without a better one before it stops; None = never.
        checkpoint_every_steps, checkpoint_every_seconds: whichever comes first.
        keep_checkpoints: the newest of them.
        log_every_steps: rows of ``log.csv``, means over these steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = "reference"
    kind: str = "logistic"
    params: dict[str, Any] = Field(default_factory=dict)

    batch_size: int = Field(default=1024, ge=1, le=1 << 20)
    num_epochs: float | None = Field(default=5.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)

    label_loss: LossName = "CrossEntropyLoss"
    regularization_penalty: float = Field(default=1.0, ge=0)
    l2_penalty: float = Field(default=1e-8, ge=0)

    optimizer: Literal["Adam", "AdamW"] = "Adam"
    weight_decay: float = Field(default=0.0, ge=0)
    base_learning_rate: float = Field(default=0.01, gt=0)
    learning_rate_schedule: Literal["stairs", "cosine"] = "stairs"
    learning_rate_decay: float = Field(default=0.95, gt=0)
    learning_rate_decay_examples: float = Field(default=4_000_000, gt=0)
    warm_up_steps: int = Field(default=0, ge=0)
    final_learning_rate_share: float = Field(default=0.0, ge=0, le=1)
    clip_gradient_norm: float = Field(default=1.0, ge=0)
    clip_gradients: Literal["each", "together"] = "each"
    average_decay: float = Field(default=0.0, ge=0, lt=1)
    mixed_precision: bool = False

    imply_family: bool = False
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    mixup_alpha: float = Field(default=0.0, ge=0)
    mixup_share: float = Field(default=1.0, ge=0, le=1)
    frame_dropout: float = Field(default=0.0, ge=0, lt=1)
    class_weight_power: float = Field(default=0.0, ge=0, le=2)
    balanced_sampling_power: float = Field(default=0.0, ge=0, le=2)
    label_quality: str | None = None
    label_quality_power: float = Field(default=1.0, ge=0)
    hard_negative_weight: float = Field(default=1.0, ge=0)
    hard_negative_sampling: float = Field(default=1.0, ge=0)

    evaluate_every_steps: int | None = Field(default=None, ge=1)
    evaluate_every_epochs: float | None = Field(default=1.0, gt=0)
    best_by: BestBy | None = None
    patience: int | None = Field(default=None, ge=1)
    checkpoint_every_steps: int = Field(default=1000, ge=1)
    checkpoint_every_seconds: float = Field(default=600.0, gt=0)
    keep_checkpoints: int = Field(default=2, ge=1)
    log_every_steps: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.num_epochs is None and self.max_steps is None:
            raise ValueError("num_epochs and max_steps are both left out: training would never end")
        if self.weight_decay > 0 and self.optimizer != "AdamW":
            raise ValueError("weight_decay needs optimizer AdamW")
        return self

    def with_changes(self, changes: Mapping[str, Any]) -> Recipe:
        """A recipe with other values; ``params`` are merged. ConfigError for an unknown name or a value that can't be.

        A ``kind`` other than this recipe's drops its ``params``: they are another model's.
        """
        values = self.model_dump()
        given = dict(changes)
        params = given.pop("params", {})
        if not isinstance(params, Mapping):
            raise ConfigError(f"params {params!r}: names and values are needed, for example --set params.cells=256.")
        kept = values["params"] if given.get("kind", self.kind) == self.kind else {}
        return _checked({**values, **given, "params": {**kept, **params}})

    def with_texts(self, settings: Mapping[str, str]) -> Recipe:
        """``with_changes`` of values in JSON or plain text; ``params.cells`` reaches into ``params``. ConfigError."""
        changes: dict[str, Any] = {}
        params: dict[str, Any] = {}
        for key, text in settings.items():
            try:
                value = json.loads(text)
            except ValueError:
                value = text
            if key.startswith("params."):
                params[key.removeprefix("params.")] = value
            else:
                changes[key] = value
        changed = self.with_changes(changes)
        return changed.with_changes({"params": params}) if params else changed


def _checked(values: Mapping[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"The recipe can't be used: {_faults(error)}") from None


def _faults(error: ValidationError) -> str:
    faults = []
    for fault in error.errors():
        key = ".".join(map(str, fault["loc"]))
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, Recipe.model_fields, n=1)
            faults.append(f"{key} is unknown{f', did you mean {near[0]}?' if near else '.'}")
        else:
            what = f"{key} {fault['input']!r}: " if key else ""
            faults.append(f"{what}{fault['msg'].removeprefix('Value error, ')}.")
    return " ".join(faults)


REFERENCE = Recipe()
# Chosen on AudioSet's balanced set; what each choice is worth is on the card of the model vggish-audioset.
RECOMMENDED = Recipe(
    name="recommended",
    kind="attention_lstm",
    params={
        "dense": 512,
        "dense_layers": 2,
        "cells": 192,
        "input_dropout": 0.1,
        "dropout": 0.4,
        "pooled_dropout": 0.3,
        "final": "logistic",
    },
    batch_size=256,
    num_epochs=30,
    regularization_penalty=0.0,
    base_learning_rate=0.002,
    learning_rate_schedule="cosine",
    warm_up_steps=100,
    final_learning_rate_share=0.01,
    clip_gradients="together",
    average_decay=0.999,
    mixup_alpha=1.0,
    imply_family=True,
    evaluate_every_epochs=5,
    best_by="map",
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (REFERENCE, RECOMMENDED)}


def recipe_named(name: str) -> Recipe:
    """ConfigError for an unknown name."""
    if name not in RECIPES:
        raise ConfigError(f"Recipe {name!r} is unknown; there are {', '.join(RECIPES)}.")
    return RECIPES[name]
