"""Watch what state of a module a forward reads while it is traced: plain values stay reads, the rest is a reason."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import fx, nn

PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
"""What source code can say, and what is read anew in each call."""
_METHODS = (types.MethodType, types.FunctionType, types.BuiltinFunctionType, fx.Proxy)
_MODULE_INTERNALS = frozenset(dir(nn.Module())) - {"training"}


def _attribute_spy(base: type[nn.Module], tracer: fx.Tracer, reasons: list[str]) -> type[nn.Module]:
    """A subclass whose plain values are graph nodes, read anew in each call, and whose other state is refused."""
    constants = frozenset(getattr(base, "__constants__", ()))

    def read(self: nn.Module, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name in _MODULE_INTERNALS or name in constants:
            return value
        if type(value) in PLAIN:
            return tracer.create_proxy("get_attr", name, (), {})
        if name in object.__getattribute__(self, "__dict__") or not isinstance(value, _METHODS):
            reasons.append(f"reads self.{name}, a {type(value).__name__}")
        return value

    return type(base.__name__, (base,), {"__getattribute__": read})


def _child_spy(base: type[nn.Module], reasons: list[str]) -> type[nn.Module]:
    """A subclass whose own state its parents may not read: a graph would hold what they read for ever."""

    def read(self: nn.Module, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name == "training" or (name not in _MODULE_INTERNALS and not isinstance(value, _METHODS)):
            reasons.append(f"reads .{name} of a {base.__name__} in it")
        return value

    return type(base.__name__, (base,), {"__getattribute__": read})


@contextmanager
def spied(owner: nn.Module, tracer: fx.Tracer, reasons: list[str]) -> Iterator[None]:
    """Reads of the owner's and its descendants' state are seen meanwhile."""
    classes = {module: type(module) for module in owner.modules()}
    spies = {cls: _child_spy(cls, reasons) for cls in {classes[module] for module in classes if module is not owner}}
    swapped: Any
    try:
        for swapped, cls in classes.items():
            spy = _attribute_spy(cls, tracer, reasons) if swapped is owner else spies[cls]
            with suppress(TypeError):  # a class that can't be derived from, such as a scripted module's
                swapped.__class__ = spy
        yield
    finally:
        for swapped, cls in classes.items():
            if type(swapped) is not cls:
                swapped.__class__ = cls
