"""LoRA2's adapters folded together: ΔW = Aᵀ B with A = uᵀ and B = s · diag(c) v diag(λ m) U diag(c) V, c and m masks.

All factors of all adapters of one size in some 30 operations, forward and backward, whatever their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from lora2fx.adapter import Adapter
from lora2fx.methods.lora2_closed_penalty import ClosedPenalty
from lora2fx.methods.lora2_factors import LoRA2Adapter
from lora2fx.training.bank import Folding
from lora2fx.training.folded import Folded, Stacks, Use
from lora2fx.training.products import without_autocast
from lora2fx.training.together import Arrangement, Planned, leave_out

NAMES = ("u", "v", "lam", "U", "V")
MASKS = ("mask", "column_mask")


@dataclass(frozen=True)
class _Order:
    """n adapters of one core size as they are arranged.

    `to_core` and `from_core` are the places among those of one input width as indices, and back. `factors` are the
    adapters' in the order of `NAMES`, and `grouped` by name as they are stacked: u by input width, V by output width.
    """

    adapters: tuple[LoRA2Adapter, ...]
    arranged: Arrangement
    to_core: Tensor
    from_core: Tensor
    factors: tuple[Tensor, ...]
    grouped: Mapping[str, list[list[Tensor]]]

    @classmethod
    def of(cls, adapters: Sequence[Adapter], numbers: Sequence[int]) -> _Order:
        """`numbers` are the adapters' places in the model."""
        own = {name: [cast(Tensor, adapter._parameters[name]) for adapter in adapters] for name in NAMES}
        arranged = Arrangement.of(adapters, numbers)
        from_core = torch.tensor([i for group in arranged.inputs for i in group], device=own["v"][0].device)
        grouped = {name: [own[name]] for name in ("v", "lam", "U")}
        grouped["u"] = [[own["u"][index] for index in group] for group in arranged.inputs]
        grouped["V"] = [own["V"][start:stop] for start, stop in arranged.outputs]
        factors = tuple(factor for name in NAMES for factor in own[name])
        kin = cast(Sequence[LoRA2Adapter], adapters)
        return cls(tuple(kin), arranged, from_core.argsort(), from_core, factors, grouped)

    def fold(self) -> Folded:
        """All of them, in stacks."""
        use = self.use()
        stacks = [torch.stack(own) for name in NAMES for own in self.grouped[name]]
        found = _Fold.apply(self, use, *stacks)  # type: ignore[no-untyped-call]
        count = len(self.arranged.inputs)
        return Folded(found[:count], self.arranged.places, found[count:], use)

    def use(self) -> Use:
        """Of these adapters' factors, before anything is folded."""
        return Use(self.grouped, self.to_core, self.from_core)

    def buffers(self, name: str) -> Tensor:
        """One mask of every adapter, stacked."""
        return torch.stack([adapter._buffers[name] for adapter in self.adapters])  # type: ignore[misc]


@dataclass(frozen=True)
class _Core:
    """v diag(λ m), scaled and masked, and U masked, of n adapters; their product is the k x k core."""

    v: Tensor
    U: Tensor
    lam: Tensor
    mask: Tensor
    rows: Tensor
    columns: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, order: _Order, v: Tensor, lam: Tensor, U: Tensor) -> _Core:
        mask, column_mask = (order.buffers(name).to(v.dtype) for name in ("mask", "column_mask"))
        lam = (lam * mask).unsqueeze(-2)
        rows, columns = (column_mask * order.adapters[0].scale).unsqueeze(-1), column_mask.unsqueeze(-2)
        return cls(v, U, lam, mask, rows, columns, v * (rows * lam), U * columns)


class _Fold(torch.autograd.Function):
    """Stacks of u, v, λ, U and V of n adapters → stacks of A (n·k, in) and of B (n, k, out), one a width."""

    @staticmethod
    def forward(ctx: Any, order: _Order, use: Use, *stacks: Tensor) -> tuple[Tensor, ...]:
        u, (v, lam, U), V = _split(stacks, len(order.arranged.inputs))
        core = _Core.of(order, v, lam, U)
        product = core.left.bmm(core.right)
        b = [product[start:stop].bmm(stack) for (start, stop), stack in zip(order.arranged.outputs, V, strict=True)]
        a = [stack.mT.contiguous().flatten(0, 1) for stack in u]
        use.stacks = {"u": tuple(_rows(own, product) for own in a), "v": (v,), "U": (U,), "V": V}
        # Not as saved tensors: several micro-batches go back through one folding, in and out of checkpointed blocks.
        ctx.order, ctx.use, ctx.core, ctx.product, ctx.stacks = order, use, core, product, V
        return *a, *b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        order: _Order = ctx.order
        with without_autocast(ctx.product.device):
            if torch.is_grad_enabled():
                return None, None, *_again(order, grads)
            stacks = _gradients(order, ctx.core, ctx.product, ctx.stacks, grads)
        ctx.use.keep(stacks)
        leave_out(order.adapters, NAMES, ctx.use.read, [stack for own in stacks.values() for stack in own])
        return None, None, *(stack for name in NAMES for stack in stacks[name])


def _split(stacks: Sequence[Tensor], inputs: int) -> tuple[Sequence[Tensor], Sequence[Tensor], tuple[Tensor, ...]]:
    return stacks[:inputs], stacks[inputs : inputs + 3], tuple(stacks[inputs + 3 :])


def _rows(stack: Tensor, product: Tensor) -> Tensor:
    """(n·k, in) → (n, in, k)"""
    return stack.detach().view(-1, product.shape[-1], stack.shape[-1]).mT


def _gradients(
    order: _Order, core: _Core, product: Tensor, stacks: Sequence[Tensor], grads: Sequence[Tensor]
) -> Stacks:
    """Of all factors, in stacks as the factors' own."""
    count = len(order.arranged.inputs)
    u = tuple(_rows(grad, product).contiguous() for grad in grads[:count])
    V, of_core = [], []
    for (start, stop), stack, grad in zip(order.arranged.outputs, stacks, grads[count:], strict=True):
        V.append(product[start:stop].mT.bmm(grad))
        of_core.append(grad.bmm(stack.mT))
    grad_core = of_core[0] if len(of_core) == 1 else torch.cat(of_core)
    U = core.left.mT.bmm(grad_core).mul_(core.columns)
    scaled = grad_core.bmm(core.right.mT).mul_(core.rows)
    lam = (scaled * core.v).sum(-2).mul_(core.mask)
    return {"u": u, "v": (scaled.mul_(core.lam),), "lam": (lam,), "U": (U,), "V": tuple(V)}


def _again(order: _Order, grads: Sequence[Tensor]) -> list[Tensor]:
    """The gradients by torch's own derivatives, so that they have derivatives themselves; stacked."""
    n, factors = len(order.adapters), order.factors
    u, v, lam, U, V = (factors[start : start + n] for start in range(0, len(factors), n))
    b = []
    for adapter, *own in zip(order.adapters, v, lam, U, V, strict=True):
        core = (own[0] * (own[1] * adapter.mask)) @ (own[2] * adapter.column_mask)
        b.append(core @ own[3] * adapter.gate().unsqueeze(-1))
    outputs = [torch.cat([u[index].mT for index in group]) for group in order.arranged.inputs]
    outputs += [torch.stack(b[start:stop]) for start, stop in order.arranged.outputs]
    found = torch.autograd.grad(outputs, factors, grads, create_graph=True)
    by_factor = dict(zip(map(id, factors), found, strict=True))
    return [torch.stack([by_factor[id(factor)] for factor in own]) for name in NAMES for own in order.grouped[name]]


def _kind(adapter: Adapter) -> object:
    """Adapters of one core size and scale are folded together."""
    assert isinstance(adapter, LoRA2Adapter)
    return adapter.v.shape, adapter.scale


def lora2_folding(penalty: ClosedPenalty | None) -> Folding:
    """How LoRA2's adapters are folded, and regularised, all at once."""
    names = () if penalty is None else ("u", "v", "U", *(("V",) if penalty.regularises_V else ()))
    return Folding(NAMES, MASKS, partial(Planned, NAMES, _kind, _Order.of), penalty, names)
