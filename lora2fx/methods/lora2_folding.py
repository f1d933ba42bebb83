"""LoRA2's adapters folded together: ΔW = Aᵀ B with A = uᵀ and B = s · diag(c) v diag(λ m) U diag(c) V, c and m masks.

All factors of all adapters of one size in some 30 operations, forward and backward, whatever their number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import is_
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lora2fx.adapter import Adapter
from lora2fx.methods.lora2_closed_penalty import ClosedPenalty
from lora2fx.methods.lora2_factors import LoRA2Adapter
from lora2fx.training.bank import Folding
from lora2fx.training.folded import Folded, Stacks, Use
from lora2fx.training.products import without_autocast

NAMES = ("u", "v", "lam", "U", "V")
MASKS = ("mask", "column_mask")


@dataclass(frozen=True)
class _Order:
    """n adapters of one core size, by their output width: equal ones from start to stop.

    `inputs` lists those of one input width, `places` says in which list an adapter is, and where; `to_core` and
    `from_core` are those places as indices, and back. `factors` are the adapters' in the order of `NAMES`, and
    `grouped` by name as they are stacked: u by input width, V by output width.
    """

    adapters: tuple[LoRA2Adapter, ...]
    outputs: tuple[tuple[int, int], ...]
    inputs: tuple[tuple[int, ...], ...]
    places: tuple[tuple[int, int], ...]
    to_core: Tensor
    from_core: Tensor
    factors: tuple[Tensor, ...]
    grouped: Mapping[str, list[list[Tensor]]]

    @classmethod
    def of(cls, adapters: Sequence[LoRA2Adapter], numbers: Sequence[int]) -> _Order:
        """`numbers` are their places in the model: sites that read the same x shall lie side by side."""
        widths = [adapter.site.out_features for adapter in adapters]
        cuts = [0, *(i for i in range(1, len(widths)) if widths[i] != widths[i - 1]), len(widths)]
        outputs, inputs = tuple(pairwise(cuts)), defaultdict[int, list[int]](list)
        for index in sorted(range(len(adapters)), key=numbers.__getitem__):
            inputs[adapters[index].site.in_features].append(index)
        places = {i: (stack, place) for stack, group in enumerate(inputs.values()) for place, i in enumerate(group)}
        from_core = torch.tensor([i for group in inputs.values() for i in group], device=adapters[0].v.device)
        own = {name: [cast(Tensor, adapter._parameters[name]) for adapter in adapters] for name in NAMES}
        grouped = {name: [own[name]] for name in ("v", "lam", "U")}
        grouped["u"] = [[own["u"][index] for index in group] for group in inputs.values()]
        grouped["V"] = [own["V"][start:stop] for start, stop in outputs]
        return cls(
            tuple(adapters),
            outputs,
            tuple(map(tuple, inputs.values())),
            tuple(places[i] for i in range(len(adapters))),
            from_core.argsort(),
            from_core,
            tuple(factor for name in NAMES for factor in own[name]),
            grouped,
        )

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
        u, (v, lam, U), V = _split(stacks, len(order.inputs))
        core = _Core.of(order, v, lam, U)
        product = core.left.bmm(core.right)
        b = [product[start:stop].bmm(stack) for (start, stop), stack in zip(order.outputs, V, strict=True)]
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
        # DDP waits for every gradient.
        if len(ctx.use.read) < len(order.adapters) and not (dist.is_available() and dist.is_initialized()):
            _leave_out(order, ctx.use.read, stacks)
        return None, None, *(stack for name in NAMES for stack in stacks[name])


def _split(stacks: Sequence[Tensor], inputs: int) -> tuple[Sequence[Tensor], Sequence[Tensor], tuple[Tensor, ...]]:
    return stacks[:inputs], stacks[inputs : inputs + 3], tuple(stacks[inputs + 3 :])


def _leave_out(order: _Order, read: Collection[int], stacks: Stacks) -> None:
    """Adapters that no site read have no gradient: zeros, as hooks on them see, are taken away after the backward."""
    unread = [adapter for index, adapter in enumerate(order.adapters) if index not in read]
    without = [p for adapter in unread for name in NAMES if (p := cast(Tensor, adapter._parameters[name])).grad is None]
    places = {stack.untyped_storage().data_ptr() for own in stacks.values() for stack in own}
    torch.autograd.Variable._execution_engine.queue_callback(partial(_clear, without, places))


def _clear(parameters: Sequence[Tensor], places: Collection[int]) -> None:
    """Take gradients away that lie at these places; what another folding has added to, doesn't."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.untyped_storage().data_ptr() in places:
            parameter.grad = None


def _rows(stack: Tensor, product: Tensor) -> Tensor:
    """(n·k, in) → (n, in, k)"""
    return stack.detach().view(-1, product.shape[-1], stack.shape[-1]).mT


def _gradients(
    order: _Order, core: _Core, product: Tensor, stacks: Sequence[Tensor], grads: Sequence[Tensor]
) -> Stacks:
    """Of all factors, in stacks as the factors' own."""
    count = len(order.inputs)
    u = tuple(_rows(grad, product).contiguous() for grad in grads[:count])
    V, of_core = [], []
    for (start, stop), stack, grad in zip(order.outputs, stacks, grads[count:], strict=True):
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
    outputs = [torch.cat([u[index].mT for index in group]) for group in order.inputs]
    outputs += [torch.stack(b[start:stop]) for start, stop in order.outputs]
    found = torch.autograd.grad(outputs, factors, grads, create_graph=True)
    by_factor = dict(zip(map(id, factors), found, strict=True))
    return [torch.stack([by_factor[id(factor)] for factor in own]) for name in NAMES for own in order.grouped[name]]


def _fold(order: _Order) -> Folded:
    use = order.use()
    stacks = [torch.stack(own) for name in NAMES for own in order.grouped[name]]
    found = _Fold.apply(order, use, *stacks)  # type: ignore[no-untyped-call]
    count = len(order.inputs)
    return Folded(found[:count], order.places, found[count:], use)


def _plan(adapters: Sequence[LoRA2Adapter]) -> list[tuple[list[int], _Order]]:
    """Those of one core size together, and which they are, in the order in which they are folded."""
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, adapter in enumerate(adapters):
        groups[(adapter.v.shape, adapter.scale, adapter.v.dtype, adapter.v.device)].append(index)
    numbers = [sorted(group, key=lambda index: adapters[index].site.out_features) for group in groups.values()]
    return [(group, _Order.of([adapters[index] for index in group], group)) for group in numbers]


class _Together:
    """Adapters that are folded again and again: in what order, as long as their parameters stay the same objects."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._adapters = cast(Sequence[LoRA2Adapter], adapters)
        self._known: list[Tensor] = []
        self._plan: list[tuple[list[int], _Order]] = []

    def __call__(self) -> list[tuple[list[int], Folded]]:
        return [(indices, _fold(order)) for indices, order in self._planned()]

    def uses(self) -> list[Use]:
        return [order.use() for _, order in self._planned()]

    def _planned(self) -> list[tuple[list[int], _Order]]:
        now: list[Tensor] = []
        for adapter in self._adapters:
            now += map(adapter._parameters.__getitem__, NAMES)  # type: ignore[arg-type]
        moved = not self._plan or self._plan[0][1].to_core.device != now[0].device
        if moved or not all(map(is_, now, self._known)):
            self._known, self._plan = now, _plan(self._adapters)
        return self._plan


def lora2_folding(penalty: ClosedPenalty | None) -> Folding:
    """How LoRA2's adapters are folded, and regularised, all at once."""
    names = () if penalty is None else ("u", "v", "U", *(("V",) if penalty.regularises_V else ()))
    return Folding(NAMES, MASKS, _Together, penalty, names)
