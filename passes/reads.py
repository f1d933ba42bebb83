"""Reading a matrix, or a stack of them, with W + ΔW without making it: products go by W and by ΔW's factors.

A stack of experts is read in three ways. A loop takes one expert's matrix and multiplies with it; a grouped product
multiplies each expert's tokens with its matrix, all in one call; a batched one all experts' tokens with the stack. A
`LazyWeight` stands for W + ΔW, for one matrix of it and for its transpose, and gives what these products would: x W
and (x left) right. Anything else makes W + ΔW, of what it was asked of, once, under the modes of the read, and goes on
with it. What is computed of the factors for one read serves all reads within one call of the module's forward.

It is only made op by op on plain tensors: under torch.compile, torch.export, tracing, torch.func, a forward-mode
derivative or a function or dispatch mode the read gives W + ΔW itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lora2fx.adapter import Adapter
from lora2fx.passes import lazy_functions as lazy_functions  # registers them
from lora2fx.passes.lazy import LazyWeight, Modes, is_eager, is_plain
from lora2fx.passes.update import Update

_BATCH: dict[int, tuple[int, ...]] = {2: (), 3: (0,)}
"""By a weight's dimensions those that say which matrix."""


def can_be_lazy(weight: Tensor, adapters: Sequence[Adapter]) -> bool:
    """Whether weight and factors are plain tensors on one device, the weight a matrix or a stack of them."""
    if weight.dim() not in (2, 3) or any(adapter.site.layout.batch != _BATCH[weight.dim()] for adapter in adapters):
        return False
    factors = [factor for adapter in adapters for factor in adapter._parameters.values() if factor is not None]
    plain = all(map(is_plain, (weight, *factors)))
    return plain and not weight.is_meta and all(adapter.padding is None for adapter in adapters)


def merged(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """W + ΔW, in the weight's dtype."""
    total = weight
    for adapter in adapters:
        total = total + adapter.weight_delta().type_as(weight)
    return total


def read_merged(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """W + ΔW for a read of the weight; a `LazyWeight`, where that can't be told from it.

    Of one matrix only where it needs a gradient: without one, torch's attention has a fast path for plain tensors.
    """
    if not is_eager() or not can_be_lazy(weight, adapters):
        return merged(weight, adapters)
    if weight.dim() == 2 and not (torch.is_grad_enabled() and _trains(weight, adapters)):
        return merged(weight, adapters)
    modes, reads = Modes.now(weight.device.type), _READS.get()
    if reads is None:
        return LazyWeight.of(_Whole(weight, tuple(adapters)), modes)
    known, versions = reads.get((id(weight), modes)), _all_versions(adapters)
    if known is None or known.versions != versions or not known.lazy.is_open():
        lazy = cast(LazyWeight, LazyWeight.of(_Whole(weight, tuple(adapters)), modes))
        known = reads[id(weight), modes] = _Known(lazy, versions)
    return known.lazy


def _trains(weight: Tensor, adapters: Sequence[Adapter]) -> bool:
    factors = [factor for adapter in adapters for factor in adapter._parameters.values()]
    return weight.requires_grad or any(factor is not None and factor.requires_grad for factor in factors)


def _all_versions(adapters: Sequence[Adapter]) -> list[int]:
    state = [own for adapter in adapters for own in (adapter._parameters, adapter._buffers)]
    return [tensor._version for own in state for tensor in own.values() if tensor is not None]


@dataclass(frozen=True)
class _Whole:
    """A read of a whole weight, whose factors are computed where something asks for them, once."""

    weight: Tensor
    adapters: tuple[Adapter, ...]

    @property
    def name(self) -> str:
        return self.adapters[0].site.weight

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        factors = (factor for adapter in self.adapters for factor in adapter._parameters.values())
        return (self.weight, *(factor for factor in factors if factor is not None))

    @functools.cached_property
    def update(self) -> Update:
        return Update.of(self.weight, self.adapters)

    def whole(self) -> Tensor:
        return merged(self.weight, self.adapters)


class _Known(NamedTuple):
    """What a read gave, and the versions of what it is made of."""

    lazy: LazyWeight
    versions: list[int]


_READS: ContextVar[dict[tuple[int, Modes], _Known] | None] = ContextVar("reads", default=None)
"""What the forward that is running has read, by the weight's identity."""


def reading_once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A module's forward, in which reads of one weight are one read, as long as nothing needs W + ΔW itself."""

    @functools.wraps(forward)
    def shared(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not is_eager():
            return forward(self, *args, **kwargs)
        token = _READS.set({})
        try:
            return forward(self, *args, **kwargs)
        finally:
            _READS.reset(token)

    return shared
