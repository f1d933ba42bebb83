"""LoRA and its gated kin folded together: ΔW = Aᵀ B' with B' = diag(c) Bᵀ, c = s · gate · mask.

The A of all adapters of one input width are one stack, the B' of one output width another, in a handful of operations
whatever their number. All gates are computed at once by the method's own `gate()`, on an adapter whose tensors are
stacks of all the others'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from lora2fx.adapter import Adapter
from lora2fx.methods.two_factors import TwoFactorAdapter
from lora2fx.training.bank import Folding
from lora2fx.training.folded import Folded, Use
from lora2fx.training.products import without_autocast
from lora2fx.training.together import Arrangement, Planned, leave_out

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Order:
    """n adapters of one class, rank and scale; `grouped` are their parameters by name as they are stacked."""

    adapters: tuple[TwoFactorAdapter, ...]
    arranged: Arrangement
    grouped: Mapping[str, list[list[Tensor]]]

    @classmethod
    def of(cls, names: Sequence[str], adapters: Sequence[Adapter], numbers: Sequence[int]) -> _Order:
        """`names` are the parameters, `numbers` the adapters' places in the model."""
        kin, arranged = cast(tuple[TwoFactorAdapter, ...], tuple(adapters)), Arrangement.of(adapters, numbers)
        own: dict[str, list[Tensor]] = {name: [adapter.get_parameter(name) for adapter in kin] for name in names}
        grouped = {name: [parameters] for name, parameters in own.items()}
        grouped["A"] = [[own["A"][index] for index in group] for group in arranged.inputs]
        grouped["B"] = [own["B"][start:stop] for start, stop in arranged.outputs]
        return cls(kin, arranged, grouped)

    def use(self) -> Use:
        """Of these adapters' factors, before anything is folded."""
        return Use(self.grouped)

    def fold(self) -> Folded:
        """All of them, in stacks."""
        use = self.use()
        a = [torch.cat(own) for own in self.grouped["A"]]
        b = [torch.stack(own) for own in self.grouped["B"]]
        gates = [torch.stack(own) for name, (own, *_) in self.grouped.items() if name not in ("A", "B")]
        for stack in (*a, *b, *gates):
            if stack.requires_grad:
                stack.register_hook(partial(self._leave_out, use))
        right = _Scaled.apply(self.arranged.outputs, self._gates(), *gates, *b)  # type: ignore[no-untyped-call]
        return Folded(tuple(a), self.arranged.places, right, use)

    def _leave_out(self, use: Use, gradient: Tensor) -> None:
        leave_out(self.adapters, tuple(self.grouped), use.read, [gradient])

    def _gates(self) -> _Gates:
        first = self.adapters[0]
        stacked = object.__new__(type(first))
        rows = {name: _rows([cast(Tensor, a._buffers[name]) for a in self.adapters]) for name in first.gated_by}
        vars(stacked).update(vars(first), _buffers=first._buffers | rows)
        return _Gates(stacked, tuple(name for name in self.grouped if name not in ("A", "B")))


def _rows(buffers: Sequence[Tensor]) -> Tensor:
    """(n, r) of n vectors, (n, 1) of n scalars."""
    found = torch.stack(list(buffers))
    return found if found.dim() > 1 else found.unsqueeze(-1)


@dataclass(frozen=True)
class _Gates:
    """The gates of n adapters, by an adapter whose buffers are stacks of theirs; `names` are the parameters read."""

    stacked: TwoFactorAdapter
    names: tuple[str, ...]

    def __call__(self, parameters: Sequence[Tensor]) -> Tensor:
        """(n, r, 1), the scale and masks included, of stacks (n, r) of the parameters."""
        given = self.stacked._parameters | dict(zip(self.names, parameters, strict=True))
        vars(self.stacked)["_parameters"] = given
        return self.stacked.gate().unsqueeze(-1)


class _Scaled(torch.autograd.Function):
    """Stacks of what the gates are made of (n, r), and of B (n, out, r) → stacks of B' (n, r, out)."""

    @staticmethod
    def forward(ctx: Any, spans: Spans, gates: _Gates, *stacks: Tensor) -> tuple[Tensor, ...]:
        parameters, b = stacks[: len(gates.names)], stacks[len(gates.names) :]
        values = gates(parameters)
        # Not as saved tensors: several micro-batches go back through one folding, in and out of checkpointed blocks.
        ctx.spans, ctx.gates, ctx.parameters, ctx.b, ctx.values = spans, gates, parameters, b, values
        return tuple((own.mT * values[start:stop]).contiguous() for (start, stop), own in zip(spans, b, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with without_autocast(ctx.values.device):
            return None, None, *_gradients(ctx, grads)


def _gradients(ctx: Any, grads: Sequence[Tensor]) -> list[Tensor]:
    """Of the stacks; with derivatives of their own where gradients are recorded."""
    recorded, parameters, values = torch.is_grad_enabled(), ctx.parameters, ctx.values
    if parameters:
        parameters = parameters if recorded else [own.detach().requires_grad_() for own in parameters]
        with torch.enable_grad():
            values = ctx.gates(parameters)
    # As the factors lie in memory: autograd copies, one by one, gradients that don't.
    of_b = [(grad * values[start:stop]).mT.contiguous() for (start, stop), grad in zip(ctx.spans, grads, strict=True)]
    if not parameters:
        return of_b
    of_gates = torch.cat([(grad * own.mT).sum(-1, keepdim=True) for own, grad in zip(ctx.b, grads, strict=True)])
    return [*torch.autograd.grad(values, parameters, of_gates, create_graph=recorded), *of_b]


def _kind(adapter: Adapter) -> object:
    """Adapters of one rank and scale are folded together."""
    assert isinstance(adapter, TwoFactorAdapter)
    return adapter.A.shape[-2], adapter.scale


def two_factor_folding(kind: type[TwoFactorAdapter], *gates: str) -> Folding:
    """How adapters of this class are folded all at once; `gates` are the parameters that `gate()` reads.

    Vectors of the ranks, as `kind.gated_by` says of buffers: `gate()` must work element by element, so that it takes
    stacks (n, r) of them.
    """
    names = ("A", "B", *gates)
    return Folding(names, kind.gated_by, partial(Planned, names, _kind, partial(_Order.of, names)))
