"""Modules that are trained whole beside the adapters: the user's, or the fresh head of a classifier."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lora2fx.errors import TargetError
from lora2fx.synthesis import is_pretrained

_HEADED = ("Classification", "QuestionAnswering", "MultipleChoice")


def classification_head(model: nn.Module) -> tuple[str, ...]:
    """The modules outside the backbone of a transformers model for classification, with parameters; else none."""
    if not is_pretrained(model) or not any(task in type(model).__name__ for task in _HEADED):
        return ()
    backbone = getattr(model, "base_model_prefix", "")
    if not hasattr(model, backbone):
        return ()
    return tuple(name for name, child in model.named_children() if name != backbone and list(child.parameters()))


def saved_modules(model: nn.Module, asked: Sequence[str]) -> tuple[str, ...]:
    """Paths of the modules to train whole: those whose path is or ends in a name asked for, and a classifier's head.

    Raises `TargetError` where a name asked for is no module with parameters.
    """
    paths = [path for path, module in model.named_modules() if path and any(True for _ in module.parameters())]
    found = list(classification_head(model))
    for name in (asked,) if isinstance(asked, str) else asked:
        matched = [path for path in paths if path == name or path.endswith("." + name)]
        if not matched:
            leaves = ", ".join(sorted({path.rpartition(".")[2] for path in paths})[:20])
            raise TargetError(f"modules_to_save={name!r} names no module with parameters. There are: {leaves}.")
        found += matched
    return tuple(dict.fromkeys(found))
