"""Weights of a tensor subclass (quantised ones) multiply in code of their own: record the call as what it means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lora2fx.dataflow.recorder import Recorder

_MEANT = {F.linear: torch.ops.aten.linear.default, F.embedding: torch.ops.aten.embedding.default}
"""By torch function: the aten call that it stands for."""


def is_subclass(tensor: Tensor) -> bool:
    """Whether a tensor's class isn't torch's own, so that its arithmetic need not be what aten's is."""
    return type(tensor) is not Tensor and not issubclass(type(tensor), nn.Parameter)


class _Calls(TorchFunctionMode):
    """Notes a linear or a lookup with such a weight as one call, whatever its own code does inside."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, recorded as what it means."""
        named = dict(kwargs or {})
        given = {**dict(zip(("input", "weight"), args, strict=False)), **named}
        weight = given.get("weight")
        if func not in _MEANT or not isinstance(weight, Tensor) or not is_subclass(weight):
            return func(*args, **named)
        operands = (given["input"], weight) if func is F.linear else (weight, given["input"])
        return self._recorder.record_as(_MEANT[func], operands, lambda: func(*args, **named))


@contextmanager
def subclass_calls(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Record what weights of a subclass are multiplied with; nothing is switched where `model` has none."""
    with _Calls(recorder) if any(map(is_subclass, model.parameters())) else nullcontext():
        yield
