"""A method's hyperparameters ↔ JSON: the dataclass by its own name, every value checked against its annotation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lora2fx.errors import FormatError, Lora2fxError
from lora2fx.methods.adalora import AdaLoRA
from lora2fx.methods.alora import ALoRA
from lora2fx.methods.lora import LoRA
from lora2fx.methods.lora2 import LoRA2
from lora2fx.methods.salora import SaLoRA
from lora2fx.methods.sora import SoRA
from lora2fx.program import Baseline, Method

METHODS: tuple[type[Method], ...] = (LoRA2, LoRA, AdaLoRA, SoRA, SaLoRA, ALoRA)


ADDED: Mapping[str, frozenset[str]] = {}
"""By method, hyperparameters younger than the first release: an older file lacks them and means their defaults."""


def encode_method(method: Method | Baseline) -> dict[str, Any]:
    """The method's class name and hyperparameters as plain JSON.

    Raises `FormatError` where it is no dataclass or a hyperparameter is nothing that JSON holds.
    """
    if not dataclasses.is_dataclass(method):
        raise FormatError(f"{type(method).__name__} is no dataclass, so that its hyperparameters can't be saved.")
    values = {entry.name: getattr(method, entry.name) for entry in dataclasses.fields(method)}
    return {"name": type(method).__name__, "hyperparameters": {name: _plain(name, v) for name, v in values.items()}}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(name, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(name, item) for item in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and isfinite(value)):
        return value
    raise FormatError(f"the hyperparameter {name}={value!r} is nothing that JSON holds, so that it can't be saved.")


def decode_method(found: Any, known: Sequence[type[Method]]) -> Method:
    """The method that a manifest names, one of `known`. Raises `FormatError`."""
    name, given = found["name"], found["hyperparameters"]
    types = {cls.__name__: cls for cls in known}
    cls: Any = types.get(name) if isinstance(name, str) else None
    if cls is None:
        raise FormatError(
            f"the adapter's method is {name!r}; known are {', '.join(types)}. Pass its class: methods=[...]."
        )
    names = {entry.name for entry in dataclasses.fields(cls) if entry.init}
    later = ADDED.get(name, frozenset())
    if not isinstance(given, dict) or not names - later <= set(given) <= names:
        odd = sorted((names ^ set(given)) - later) if isinstance(given, dict) else [repr(given)]
        raise FormatError(f"{name} takes other hyperparameters than were saved: {', '.join(odd)}.")
    hints = get_type_hints(cls)
    values = {key: _typed(f"{name}.{key}", value, hints[key]) for key, value in given.items()}
    try:
        method: Method = cls(**values)
    except Lora2fxError as error:
        raise FormatError(f"{name} refuses the saved hyperparameters: {error}") from error
    return method


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The JSON value as the annotated type."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for option in inner:
            try:
                return _typed(name, value, option)
            except FormatError:
                continue
    elif origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in inner):
            return value
    elif origin is tuple and len(inner) == 2 and inner[1] is Ellipsis and isinstance(value, list):
        return tuple(_typed(name, item, inner[0]) for item in value)
    elif isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {key: _typed(f"{name}[{key!r}]", item, inner[1]) for key, item in value.items()}
    elif (hint is float and _is_number(value)) or (hint in (bool, int, str, NoneType) and type(value) is hint):
        return value
    raise FormatError(f"{name} is {value!r}, which is not of the type {hint}.")


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and isfinite(value)
    except OverflowError:
        return False
