"""Importance of an axis' entries: AdaLoRA's smoothed sensitivity times uncertainty (its eqs. 8 to 11)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lora2fx.adapter import Adapter
from lora2fx.sharding import all_whole
from lora2fx.training.slots import Step

SMALL = 2**10
"""Elements up to which copying a parameter there and back costs less than a handful of operations of its own."""
Tracked = tuple[Tensor, Tensor, Tensor]
"""A parameter and its two averages."""


def averages(adapter: Adapter, name: str) -> tuple[Tensor, Tensor]:
    """The two moving averages of a tracked parameter: sensitivity and uncertainty."""
    return _averages([adapter], name, "sensitivity")[0], _averages([adapter], name, "uncertainty")[0]


def _averages(adapters: Iterable[Adapter], name: str, kind: str) -> list[Tensor]:
    key = f"{name}_{kind}"  # out of the dicts: getattr finds them in four times the time
    return [adapter._buffers[key] for adapter in adapters]  # type: ignore[misc]


def _alike(adapters: Sequence[Adapter], names: Sequence[str]) -> Iterable[list[Adapter]]:
    """Adapters whose averages of these parameters can be stacked."""
    groups: dict[tuple[object, ...], list[Adapter]] = defaultdict(list)
    shapes = zip(*([own.shape for own in _averages(adapters, name, "sensitivity")] for name in names), strict=True)
    for adapter, first, key in zip(adapters, _averages(adapters, names[0], "sensitivity"), shapes, strict=True):
        groups[(first.device, first.dtype, *key)].append(adapter)
    return groups.values()


@torch.no_grad()
def update_averages(adapters: Sequence[Adapter], names: Sequence[str], step: Step, beta1: float, beta2: float) -> None:
    """Move the averages of the named parameters by one step: I = |w·∂L/∂w|, Ī = β₁Ī + (1-β₁)I, Ū likewise of |I - Ī|.

    The average starts at 0 and is not corrected for it; Ū is taken against the Ī just moved.
    """
    groups: dict[tuple[Any, ...], list[Tracked]] = defaultdict(list)
    for name in names:
        first, second = (_averages(adapters, name, kind) for kind in ("sensitivity", "uncertainty"))
        parameters: list[Tensor] = [adapter._parameters[name] for adapter in adapters]  # type: ignore[misc]
        for tracked in zip(parameters, first, second, strict=True):
            own = tracked[1]
            groups[own.device, own.dtype, own.shape].append(tracked)
    for (*_, shape), group in groups.items():
        move = _move_stacked if len(shape) and shape.numel() <= SMALL else _move_each
        move(group, step, beta1, beta2)


def _move_stacked(group: Sequence[Tracked], step: Step, beta1: float, beta2: float) -> None:
    """Many small ones as one."""
    parameters, first, second = map(list, zip(*group, strict=True))
    sensitivity, uncertainty = torch.stack(first), torch.stack(second)
    products = torch.stack(all_whole(parameters)).mul_(torch.stack(all_whole(step.gradients(parameters))))
    sensitivity.lerp_(products.abs_(), 1 - beta1)
    uncertainty.lerp_(products.sub_(sensitivity).abs_(), 1 - beta2)
    for stack, own in ((sensitivity, first), (uncertainty, second)):
        torch.split_with_sizes_copy(stack.flatten(0, 1), [stack.shape[1]] * len(own), out=own)


def _move_each(group: Sequence[Tracked], step: Step, beta1: float, beta2: float) -> None:
    parameters, first, second = map(list, zip(*group, strict=True))
    products = torch._foreach_mul(all_whole(parameters), all_whole(step.gradients(parameters)))
    torch._foreach_abs_(products)
    torch._foreach_lerp_(first, products, 1 - beta1)
    torch._foreach_sub_(products, first)
    torch._foreach_abs_(products)
    torch._foreach_lerp_(second, products, 1 - beta2)


def _reduced(stack: Tensor, dim: int, mean: bool) -> Tensor:
    """(n, entries): the mean or sum over every dimension but the first and `dim`, which is negative."""
    others = [axis for axis in range(1, stack.dim()) if axis != stack.dim() + dim]
    if not others:
        return stack
    return stack.mean(others) if mean else stack.sum(others)


def _product(adapters: Sequence[Adapter], name: str) -> Tensor:
    """Ī·Ū of a parameter, stacked over adapters that are alike."""
    first, second = (torch.stack(_averages(adapters, name, kind)) for kind in ("sensitivity", "uncertainty"))
    return first.mul_(second)


def _entries(adapters: Sequence[Adapter], axis: str, mean: bool) -> list[Tensor]:
    """Adapters whose factors have the same shapes are scored together."""
    scored = adapters[0].axes()[axis].scored
    found = dict[Adapter, Tensor]()
    for group in _alike(adapters, [name for name, _ in scored]):
        parts = [_reduced(_product(group, name), dim, mean) for name, dim in scored]
        found.update(zip(group, reduce(torch.add, parts).unbind(), strict=True))
    return [found[adapter] for adapter in adapters]


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
