"""Who reads a weight: its owner's own forward, or code outside of it that a rewritten forward would not reach."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import CodeType, FrameType
from typing import Any

from torch import nn

Read = tuple[str, CodeType, int]
"""A weight's name, and the code and line that read it."""


def _codes(function: Any) -> Iterator[CodeType]:
    """The code of a function and of what it is decorated around, bound or partial."""
    while function is not None:
        function = getattr(function, "func", function)
        function = getattr(function, "__func__", function)
        if inspect.isfunction(function):
            yield function.__code__
        function = getattr(function, "__wrapped__", None)


def forward_codes(owner: nn.Module) -> frozenset[CodeType]:
    """The code that runs as `owner`'s forward: of its class, of the classes above, and of its own override."""
    forwards = [vars(owner).get("forward"), *(vars(cls).get("forward") for cls in type(owner).__mro__)]
    return frozenset(code for forward in forwards for code in _codes(forward))


def _first_argument(frame: FrameType) -> Any:
    names = frame.f_code.co_varnames
    if not names:
        return None
    first = frame.f_locals.get(names[0])
    return first[0] if isinstance(first, tuple) and first else first


class Readers:
    """Tells which of a model's modules runs its forward at the moment of a read."""

    def __init__(self, model: nn.Module) -> None:
        self._codes = {id(module): forward_codes(module) for module in model.modules() if module._parameters}

    def _runs(self, frame: FrameType, owner: nn.Module) -> bool:
        return frame.f_code in self._codes[id(owner)] and _first_argument(frame) is owner

    def running(self, owners: Sequence[nn.Module]) -> nn.Module | None:
        """The innermost of `owners` whose own forward is on the stack, if any."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            for owner in owners:
                if self._runs(frame, owner):
                    return owner
            frame = frame.f_back
        return None


def _spy(
    base: type[nn.Module], attributes: tuple[str, ...], paths: dict[int, str], readers: Readers, reads: set[Read]
) -> type[nn.Module]:
    """A subclass of `base` whose weights note who reads them from outside their owner's forward."""

    def weight(attribute: str) -> property:
        def read(self: nn.Module) -> Any:
            if readers.running([self]) is None:
                frame = sys._getframe(1)
                reads.add((f"{paths[id(self)]}.{attribute}".lstrip("."), frame.f_code, frame.f_lineno))
            return self._parameters[attribute]

        return property(read)

    weights = {name: weight(name) for name in attributes}
    return type(base.__name__, (base,), {"__module__": base.__module__, **weights})


def _give_class_back(owner: nn.Module, cls: type[nn.Module]) -> Callable[[], None]:
    def give_back() -> None:
        owner.__class__ = cls

    return give_back


@contextmanager
def spied(model: nn.Module, readers: Readers) -> Iterator[set[Read]]:
    """The reads from outside made meanwhile, of every weight of two or more dimensions.

    Neither hooks nor modes: they switch the fused fast path off, which is what reads from outside.
    """
    reads, paths, spies = set[Read](), dict[int, str](), dict[Any, type[nn.Module]]()
    with ExitStack() as stack:
        for path, owner in model.named_modules():
            own = tuple(name for name, value in owner._parameters.items() if value is not None and value.dim() >= 2)
            if not own or isinstance(owner, nn.ParameterList | nn.ParameterDict):
                continue
            cls = type(owner)
            paths[id(owner)] = path
            try:
                if (cls, own) not in spies:
                    spies[cls, own] = _spy(cls, own, paths, readers, reads)
                owner.__class__ = spies[cls, own]
            except TypeError:  # a class that can't be derived from, such as a scripted module's
                continue
            stack.callback(_give_class_back(owner, cls))
        yield reads
