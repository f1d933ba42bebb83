"""Two forms of an adapted layer, and in this file which is used when.

The *functional* form is the graph that `passes.insertion` writes: every factor, gate and mask a visible node, each site
on its own. It is the reference, and what runs under torch.compile, torch.export and tracing, in eval mode and under
no_grad, and wherever adapters are not attached to an optimizer, or are sharded or stacked.

The *eager* form is for training op by op. While an `Attachment` drives the adapters, all of them are folded in a
handful of operations once a step (see `training.bank`), ΔW = Aᵀ B with A (k, in) and B (k, out), so that a site costs
two small products more than the frozen layer. Plain float tensors go through `training.products`, under autocast in its
dtype: where x is small by torch's own derivatives, else by one function that makes x again in the backward, rather
than keep it, where it can (`training.rebuilding`); sites that were seen to read the same x when the model was
transformed are computed together (`training.sharing`), as are those of one fused weight (`training.columns`). Whatever
else comes along (other matmuls, dropout of a small x, weights that train, quantised ones) takes the folded factors as
they are.

The regulariser's gradient is added in closed form to stacks of gradients, where they are plain tensors without a loss
scale, by autograd else (`training.driver`). Tests hold each against its reference in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lora2fx.adapter import Adapter

SLOT = "_folded"
"""The attribute of an adapter that holds its place in a source of folded factors."""


class Source(Protocol):
    """What folds many adapters at once."""

    def product(
        self, index: int, x: Tensor, weight: Tensor, bias: Tensor | None, dropout: nn.Dropout | None = None
    ) -> Tensor | None:
        """The layer's output with what the adapter with this index adds; None where `factors` must do."""

    def product_of_columns(
        self,
        indices: tuple[int, ...],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dropouts: Sequence[nn.Dropout] = (),
    ) -> Tensor | None:
        """The same of adapters of some of its columns each."""

    def factors(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """A (k, in) and B (k, out) of the adapter with this index, as its parameters are now; cast as x is."""


class _Slot:
    """An adapter's place in a source. A copy of the adapter has none."""

    def __init__(self, adapter: Adapter, source: Source, index: int) -> None:
        self.owner, self.source, self.index = id(adapter), source, index

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _no_slot, ()


def _no_slot() -> None:
    return None


def connect(adapters: Sequence[Adapter], source: Source) -> None:
    """Have the adapters' sites take their factors from `source`, by their order here."""
    for index, adapter in enumerate(adapters):
        vars(adapter)[SLOT] = _Slot(adapter, source, index)


def disconnect(adapters: Sequence[Adapter]) -> None:
    """Back to the functional form."""
    for adapter in adapters:
        vars(adapter).pop(SLOT, None)


def _slot(adapter: nn.Module | None) -> _Slot | None:
    slot: _Slot | None = vars(adapter).get(SLOT)
    return slot if slot is not None and slot.owner == id(adapter) else None


def two_forms(
    functional: Callable[..., Any], eager: Callable[..., Any], children: tuple[str, ...]
) -> Callable[..., Any]:
    """The forward of an owner whose adapters are `children`: the eager form where all of them are connected."""

    @functools.wraps(functional)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not (self.training and torch.is_grad_enabled()) or _is_traced():
            return functional(self, *args, **kwargs)
        for child in children:
            if _slot(self._modules[child]) is None:
                return functional(self, *args, **kwargs)
        return eager(self, *args, **kwargs)

    return forward


def _is_traced() -> bool:
    return fx._symbolic_trace.is_fx_symbolic_tracing() or torch._C._get_tracing_state() is not None


def _is_transformed(x: Tensor) -> bool:
    """Whether x is no plain tensor, or torch.func or a forward-mode derivative is at work on it."""
    return (
        type(x) is not Tensor
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *adapters: Adapter) -> Tensor:
    """x Wᵀ + b + what the adapters add, to their own columns where they are some; x (..., in) → (..., out)."""
    slots = [slot for slot in map(_slot, adapters) if slot is not None]
    if len(slots) == len(adapters) and not _is_transformed(x):
        dropouts = [a.dropout for a in adapters if a.dropout is not None and a.dropout.training]
        if adapters[0].columns is None:
            found = slots[0].source.product(slots[0].index, x, weight, bias, *dropouts)
        else:
            indices = tuple([slot.index for slot in slots])
            found = slots[0].source.product_of_columns(indices, x, weight, bias, dropouts)
        if found is not None:
            return found
    y = F.linear(x, weight, bias)
    for adapter in reversed(adapters):  # as the functional form has them, so that dropouts draw the same
        y = adapted_output(y, x, adapter)
    return y


def adapted_output(y: Tensor, x: Tensor, adapter: Adapter) -> Tensor:
    """y (..., out) of any matmul of x (..., in), and what the adapter adds, to its own columns where they are some."""
    slot = _slot(adapter)
    if slot is None or _is_transformed(x):
        update: Tensor = adapter(x)
    else:
        a, b = slot.source.factors(slot.index, x)
        own = x if adapter.dropout is None else adapter.dropout(x)
        update = (own.type_as(a) @ a.t()) @ b
    update = update.type_as(y)
    return y + update if adapter.columns is None else y.index_add(-1, adapter.columns, update)
