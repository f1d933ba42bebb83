"""The optimizer's gradients in its step hook: one check for all of them, the penalty's added, a loss scale undone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from lora2fx.sharding import is_spread, whole


def loss_scale(optimizer: Optimizer) -> Tensor | None:
    """What a `GradScaler` left the gradients multiplied by: a fused optimizer divides by it inside its step."""
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    return scale


def _grouped(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """Those with values, by device, dtype and layout."""
    groups: dict[tuple[object, ...], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        values = gradient.coalesce().values() if gradient.is_sparse else gradient
        if values.numel():
            groups[values.device, values.dtype, is_spread(values)].append(values)
    return list(groups.values())


def _is_bad(group: list[Tensor]) -> Tensor:
    """Not 0 where any is NaN or infinite; in one pass without a copy, where no other process holds a part."""
    if is_spread(group[0]):
        return ~_largest(group).isfinite()
    found, one = (torch.full((), value, dtype=torch.float32, device=group[0].device) for value in (0.0, 1.0))
    torch._amp_foreach_non_finite_check_and_unscale_(group, found, one)  # times 1: nothing is written
    return found


def _largest(group: list[Tensor]) -> Tensor:
    """The largest magnitude, NaN where one is."""
    return torch.stack([whole(norm) for norm in torch._foreach_norm(group, float("inf"))]).amax()


@torch.no_grad()
def is_any_bad(gradients: Sequence[Tensor], optimizer: Optimizer) -> bool:
    """Whether any gradient is NaN or infinite, or a `GradScaler` found one; in one read of the device."""
    flags = [_is_bad(group) for group in _grouped(gradients)]
    overflow: Tensor | None = getattr(optimizer, "found_inf", None)
    if overflow is not None:
        flags.append(overflow.reshape(()))
    if len(flags) > 1:
        flags = [torch.stack([flag.to(flags[0].device, torch.bool) for flag in flags]).any()]
    return bool(flags and flags[0])


@torch.no_grad()
def is_initialisation(parameters: Iterable[Tensor], optimizer: Optimizer) -> bool:
    """Whether this is no step but how torch.distributed.checkpoint makes an optimizer's state: rates and gradients 0.

    A real step of a warm-up from 0 has gradients.
    """
    if any(float(group.get("lr", 1.0)) != 0 for group in optimizer.param_groups):
        return False
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return all(float(_largest(group)) == 0 for group in _grouped(gradients))


@torch.no_grad()
def add_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], optimizer: Optimizer) -> None:
    """Add to each parameter's `.grad`, under the loss scale that is on it; None adds nothing."""
    scale = loss_scale(optimizer)
    held: list[Tensor] = []
    added: list[Tensor] = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        scaled = gradient if scale is None else gradient * scale.to(gradient.device)
        if parameter.grad is None:
            parameter.grad = scaled
        else:
            held.append(parameter.grad)
            added.append(scaled)
    if held:
        torch._foreach_add_(held, added)


@torch.no_grad()
def copy_gradients(parameters: Sequence[Tensor], optimizer: Optimizer) -> dict[int, Tensor]:
    """The gradients as they are now, the loss scale undone, by the parameter's id."""
    scale = loss_scale(optimizer)
    found = {id(parameter): parameter.grad for parameter in parameters if parameter.grad is not None}
    if scale is None:
        return {key: gradient.clone() for key, gradient in found.items()}
    return {key: gradient / scale.to(gradient.device) for key, gradient in found.items()}
