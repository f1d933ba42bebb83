"""LoRA2's adapters folded together: ΔW = Aᵀ B with A = uᵀ and B = s · diag(c) v diag(λ m) U diag(c) V, c and m masks.

One differentiable function of all factors of all adapters of one size, in some 30 operations whatever their number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lora2fx.adapter import Adapter
from lora2fx.methods.lora2_factors import LoRA2Adapter
from lora2fx.training.bank import Folding

READS = ("u", "v", "lam", "U", "V", "mask", "column_mask")
_Run = tuple[int, int]


def _runs(sizes: Sequence[int]) -> tuple[_Run, ...]:
    """Where equal neighbours start and stop."""
    cuts = [0, *(i for i in range(1, len(sizes)) if sizes[i] != sizes[i - 1]), len(sizes)]
    return tuple(pairwise(cuts))


@dataclass(frozen=True)
class _Core:
    """v diag(λ m), scaled and masked, and U masked, of n adapters; their product is the k x k core."""

    v: Tensor
    lam: Tensor
    mask: Tensor
    rows: Tensor
    columns: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, factors: Sequence[Sequence[Tensor]], masks: Sequence[Sequence[Tensor]], scale: float) -> _Core:
        v, lam, U = (torch.stack(tuple(column)) for column in factors)
        mask, column_mask = (torch.stack(tuple(column)).to(v.dtype) for column in masks)
        lam = (lam * mask).unsqueeze(-2)
        rows, columns = (column_mask * scale).unsqueeze(-1), column_mask.unsqueeze(-2)
        return cls(v, lam, mask, rows, columns, v * (rows * lam), U * columns)


def _products(core: Tensor, V: Sequence[Tensor], runs: Sequence[_Run]) -> tuple[list[Tensor], list[Tensor]]:
    """B of every adapter, and the stacks of V by output width."""
    stacks = [torch.stack(tuple(V[start:stop])) for start, stop in runs]
    found = [core[start:stop].bmm(stack) for (start, stop), stack in zip(runs, stacks, strict=True)]
    return [row for product in found for row in product.unbind()], stacks


def _transposed(matrices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Each matrix transposed and contiguous, those of one shape together."""
    groups: dict[torch.Size, list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        if matrix is not None:
            groups[matrix.shape].append(index)
    found: list[Tensor | None] = [None] * len(matrices)
    for group in groups.values():
        stack = torch.stack([cast(Tensor, matrices[index]).mT for index in group])
        for index, row in zip(group, stack.unbind(), strict=True):
            found[index] = row
    return found


class _Fold(torch.autograd.Function):
    """(u…, v…, λ…, U…, V…) of n adapters → (A…, B…). An adapter that a forward left out gets no gradient."""

    @staticmethod
    def forward(ctx: Any, adapters: tuple[LoRA2Adapter, ...], *factors: Tensor) -> tuple[Tensor, ...]:
        n = len(adapters)
        u, v, lam, U, V = (factors[i * n : i * n + n] for i in range(5))
        masks = [a.mask for a in adapters], [a.column_mask for a in adapters]
        core = _Core.of((v, lam, U), masks, adapters[0].scale)
        product, runs = core.left.bmm(core.right), _runs([factor.shape[-1] for factor in V])
        outputs, stacks = _products(product, V, runs)
        ctx.adapters, ctx.inputs, ctx.core, ctx.product, ctx.runs, ctx.stacks = (
            adapters,
            factors,
            core,
            product,
            runs,
            stacks,
        )
        ctx.set_materialize_grads(dist.is_available() and dist.is_initialized())  # DDP waits for every gradient
        return (*cast(list[Tensor], _transposed(u)), *outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        n = len(ctx.adapters)
        if torch.is_grad_enabled():
            return None, *_again(ctx.adapters, ctx.inputs, grads)
        core, grad_B = ctx.core, grads[n:]
        known = next((i for i, grad in enumerate(grad_B) if grad is not None), None)
        if known is None:
            return None, *_transposed(grads[:n]), *[None] * (4 * n)
        grad_V: list[Tensor] = []
        of_core = []
        for (start, stop), stack in zip(ctx.runs, ctx.stacks, strict=True):
            grad = torch.stack(
                [
                    g if g is not None else torch.zeros_like(V)
                    for g, V in zip(grad_B[start:stop], stack.unbind(), strict=True)
                ]
            )
            grad_V += ctx.product[start:stop].mT.bmm(grad).unbind()
            of_core.append(grad.bmm(stack.mT))
        grad_core = of_core[0] if len(of_core) == 1 else torch.cat(of_core)
        grad_U = core.left.mT.bmm(grad_core).mul_(core.columns)
        scaled = grad_core.bmm(core.right.mT).mul_(core.rows)
        grad_lam = (scaled * core.v).sum(-2).mul_(core.mask)
        grad_v = scaled.mul_(core.lam)
        found = [grad_v.unbind(), grad_lam.unbind(), grad_U.unbind(), grad_V]
        rows = [
            [row if grad is not None else None for row, grad in zip(column, grad_B, strict=True)] for column in found
        ]
        return None, *_transposed(grads[:n]), *(row for column in rows for row in column)


def _again(
    adapters: tuple[LoRA2Adapter, ...], factors: tuple[Tensor, ...], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients by torch's own derivatives, so that they have derivatives themselves."""
    n = len(adapters)
    own = list(zip(*(factors[i * n : i * n + n] for i in range(5)), strict=True))
    outputs = [u.mT for u, *_ in own]
    for adapter, (_, v, lam, U, V) in zip(adapters, own, strict=True):
        core = (v * (lam * adapter.mask)) @ (U * adapter.column_mask)
        outputs.append(core @ V * adapter.gate().unsqueeze(-1))
    pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    return torch.autograd.grad(
        [output for output, _ in pairs], factors, [grad for _, grad in pairs], create_graph=True, allow_unused=True
    )


def fold_adapters_together(adapters: Sequence[Adapter]) -> list[tuple[Tensor, Tensor]]:
    """A (k, in) and B (k, out) of each LoRA2 adapter."""
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    typed = cast(Sequence[LoRA2Adapter], adapters)
    for index, adapter in enumerate(typed):
        groups[(adapter.v.shape, adapter.scale, adapter.v.dtype, adapter.v.device)].append(index)
    found: list[Any] = [None] * len(typed)
    for group in groups.values():
        group.sort(key=lambda index: typed[index].V.shape[-1])
        own = tuple(typed[index] for index in group)
        factors = [adapter._parameters[name] for name in ("u", "v", "lam", "U", "V") for adapter in own]
        outputs = _Fold.apply(own, *factors)  # type: ignore[no-untyped-call]
        for place, index in enumerate(group):
            found[index] = outputs[place], outputs[len(own) + place]
    return found


FOLDING = Folding(READS, fold_adapters_together)
