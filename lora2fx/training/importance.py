"""Importance of an axis' entries: AdaLoRA's smoothed sensitivity times uncertainty (its eqs. 8 to 11)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lora2fx.adapter import Adapter
from lora2fx.sharding import whole
from lora2fx.training.slots import Step


def averages(adapter: Adapter, name: str) -> tuple[Tensor, Tensor]:
    """The two moving averages of a tracked parameter: sensitivity and uncertainty."""
    return getattr(adapter, f"{name}_sensitivity"), getattr(adapter, f"{name}_uncertainty")


def _alike(tensors: Sequence[Tensor]) -> Iterable[list[int]]:
    """Indices of tensors that can be stacked."""
    groups: dict[tuple[torch.Size, torch.device, torch.dtype], list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        groups[tensor.shape, tensor.device, tensor.dtype].append(index)
    return groups.values()


@torch.no_grad()
def update_averages(adapters: Sequence[Adapter], names: Sequence[str], step: Step, beta1: float, beta2: float) -> None:
    """Move the averages of the named parameters by one step: I = |w·∂L/∂w|, Ī = β₁Ī + (1-β₁)I, Ū likewise of |I - Ī|.

    The average starts at 0 and is not corrected for it; Ū is taken against the Ī just moved.
    """
    parameters: list[Tensor] = [getattr(adapter, name) for adapter in adapters for name in names]
    if not parameters:
        return
    pairs = [averages(adapter, name) for adapter in adapters for name in names]
    sensitivity, uncertainty = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    products = torch._foreach_mul([whole(p) for p in parameters], [whole(step.gradient(p)) for p in parameters])
    torch._foreach_abs_(products)
    torch._foreach_mul_(sensitivity, beta1)
    torch._foreach_add_(sensitivity, products, alpha=1 - beta1)
    torch._foreach_sub_(products, sensitivity)
    torch._foreach_abs_(products)
    torch._foreach_mul_(uncertainty, beta2)
    torch._foreach_add_(uncertainty, products, alpha=1 - beta2)


def _reduced(scores: Sequence[Tensor], dim: int, mean: bool) -> list[Tensor]:
    """Each tensor's mean or sum over every dimension but `dim`, which is negative; tensors of one shape together."""
    means: list[Tensor] = [scores[0]] * len(scores)
    for group in _alike(scores):
        stack = torch.stack([scores[index] for index in group])
        others = [axis for axis in range(1, stack.dim()) if axis != stack.dim() + dim]
        rows = (stack.mean(others) if mean else stack.sum(others)) if others else stack
        for index, row in zip(group, rows.unbind(), strict=True):
            means[index] = row
    return means


def _entries(adapters: Sequence[Adapter], axis: str, mean: bool) -> list[Tensor]:
    total: list[Tensor] = []
    for name, dim in adapters[0].axes()[axis].scored:
        pairs = [averages(adapter, name) for adapter in adapters]
        products = torch._foreach_mul([pair[0] for pair in pairs], [pair[1] for pair in pairs])
        reduced = _reduced(products, dim, mean)
        total = [a + b for a, b in zip(total, reduced, strict=True)] if total else reduced
    return total


@torch.no_grad()
def axis_importance(adapters: Sequence[Adapter], axis: str) -> list[Tensor]:
    """Each adapter's importance of each entry of the axis: Σ over the scored parameters of mean(Ī·Ū).

    The product is taken element by element, then the mean; over all matrices where a stack shares the axis.
    """
    return _entries(adapters, axis, mean=True)


@torch.no_grad()
def axis_total(adapters: Sequence[Adapter], axis: str) -> list[Tensor]:
    """The same with sums in the place of means."""
    return _entries(adapters, axis, mean=False)
