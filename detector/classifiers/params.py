"""A classifier's parameters as a manifest holds them -> its frozen, checked configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from detector.errors import ModelError

MAX_SIZE = 65_536

Config = TypeVar("Config")


def config_from(config_type: type[Config], params: Mapping[str, Any], what: str) -> Config:
    """``params`` as a ``config_type``; ModelError for an unknown name or a value that can't be.

    Args:
        what: the classifier's name in messages, such as ``LSTM``.
    """
    known = [field.name for field in fields(config_type)]  # type: ignore[arg-type]
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise ModelError(f"{what} parameters {unknown} are unknown; allowed: {', '.join(known)}.")
    return config_type(**params)


def check_sizes(config: object, names: tuple[str, ...], what: str) -> None:
    """ModelError unless each of these attributes is a whole number from 1 to ``MAX_SIZE``."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or not 1 <= value <= MAX_SIZE:
            raise ModelError(f"{what} parameter {name} is {value!r}; a whole number from 1 to {MAX_SIZE} is needed.")


def check_choice(config: object, name: str, allowed: tuple[str, ...], what: str) -> None:
    """ModelError unless this attribute is one of ``allowed``."""
    value = getattr(config, name)
    if value not in allowed:
        raise ModelError(f"{what} parameter {name} is {value!r}; allowed: {', '.join(allowed)}.")


def check_flags(config: object, names: tuple[str, ...], what: str) -> None:
    """ModelError unless each of these attributes is true or false."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not bool:
            raise ModelError(f"{what} parameter {name} is {value!r}; true or false is needed.")


def check_shares(config: object, names: tuple[str, ...], what: str) -> None:
    """ModelError unless each of these attributes is a number from 0 to below 1."""
    for name in names:
        value = getattr(config, name)
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise ModelError(f"{what} parameter {name} is {value!r}; a number from 0 to below 1 is needed.")
