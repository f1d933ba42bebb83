"""A method by the name that the command line gives it, with settings that suit short runs on small data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from lora2fx.errors import FormatError, MethodError
from lora2fx.methods.adalora import AdaLoRA
from lora2fx.methods.alora import ALoRA
from lora2fx.methods.baselines import BitFit, FullFineTuning
from lora2fx.methods.houlsby import Houlsby
from lora2fx.methods.lora import LoRA
from lora2fx.methods.lora2 import LoRA2
from lora2fx.methods.salora import SaLoRA
from lora2fx.methods.sora import SoRA
from lora2fx.program import Baseline, Method
from lora2fx.storage_method import decode_method, encode_method

CAUSAL_SHARE = 0.2
"""Of a rate, for causal language models: larger models, every token a target."""


@dataclass(frozen=True)
class Recipe:
    """A method's class, hyperparameters that differ from its defaults, and AdamW's learning rate for it."""

    kind: type[Any]
    rate: float
    changes: Mapping[str, Any] = field(default_factory=dict)
    folds: bool = True


RECIPES = {
    "lora2": Recipe(LoRA2, 2e-3, {"k": 3, "target_k": 1}),
    "lora": Recipe(LoRA, 1e-3),
    "adalora": Recipe(AdaLoRA, 1e-2, {"r": 4, "target_r": 2, "lora_alpha": 8}),
    "sora": Recipe(SoRA, 1e-3),
    "salora": Recipe(SaLoRA, 2e-3),
    "alora": Recipe(ALoRA, 1e-3),
    "full": Recipe(FullFineTuning, 1e-4),
    "bitfit": Recipe(BitFit, 3e-3),
    "houlsby": Recipe(Houlsby, 1e-3, folds=False),
}
"""The first three as the text benchmark (docs/which-method.md) ran them, at the rates that it chose on held-back rows;
the others' rates were tried on GLUE tasks with a MiniLM of 23 M parameters, without a benchmark that was kept."""
HEAD_RATE = 3e-3
TARGETS = ("attention", "ffn")
"""What an adapter is put on where nothing is said: output projections too."""


def read_values(given: list[str]) -> dict[str, Any]:
    """`name=value` words as hyperparameters, values as JSON where they are JSON, else as they stand."""
    found: dict[str, Any] = {}
    for word in given:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise MethodError(f"--set {word}: write it as NAME=VALUE, such as --set target_k=1.")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def make_method(name: str, hyperparameters: Mapping[str, Any]) -> Method | Baseline:
    """The method with its recipe's settings under the given ones.

    Raises `MethodError` for a name or value that it doesn't take.
    """
    recipe = RECIPES[name]
    stored = encode_method(recipe.kind())
    usual = stored["hyperparameters"]
    for key in hyperparameters:
        if key not in usual:
            near = get_close_matches(key, usual, n=3) or sorted(usual)
            raise MethodError(f"--set {key}: {stored['name']} has no such hyperparameter. It has {', '.join(near)}.")
    asked = {**stored, "hyperparameters": {**usual, **recipe.changes, **hyperparameters}}
    try:
        return decode_method(asked, [recipe.kind])
    except FormatError as error:
        raise MethodError(f"--set: {error}") from error


def default_rate(name: str, causal: bool) -> float:
    """The learning rate where none was given."""
    return RECIPES[name].rate * (CAUSAL_SHARE if causal else 1.0)
