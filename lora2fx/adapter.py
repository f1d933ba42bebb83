"""An adapter: the trainable low-rank update ΔW = left · diag(gate) · right of one site, written once.

The rewritten forward, the merged weight, pruning, folding and every export derive from these three.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from lora2fx.sharding import whole
from lora2fx.site import Site


def _doubled(tensor: Tensor | None) -> Tensor | None:
    """A whole, detached copy; float64 where it is a floating-point tensor."""
    if tensor is None:
        return None
    found = whole(tensor.detach())
    return found.to(torch.float64 if found.is_floating_point() else found.dtype, copy=True)


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


class Axis(NamedTuple):
    """One axis of an adapter that a budget may shorten, entry by entry.

    `mask` multiplies the forward; `keep` is the last allocation (both bool, one element an entry).
    `scored` names the parameters whose importance is an entry's importance, each with the dimension that
    runs along the axis. A mask event zeroes `value` in place, so that an entry may grow back before
    the final phase; where it is None, the event writes `mask` at once and what is pruned stays pruned.
    `along` names every parameter that has the axis, each with its dimension: what compaction slices.
    """

    mask: Tensor
    keep: Tensor
    scored: tuple[tuple[str, int], ...] = ()
    value: Tensor | None = None
    along: tuple[tuple[str, int], ...] = ()


class Adapter(nn.Module):
    """ΔW = left · diag(gate) · right for one site; the gate holds the scale s.

    Buffers: `progress` int64 (3,) = (optimiser steps done, total steps, skipped steps), so that a
    checkpoint of the model knows how far its pruning schedule came; `padding` int64 (1,) = the row of an
    embedding that stays as it is, None where there is none.
    """

    progress: Tensor
    columns: Tensor | None
    padding: Tensor | None

    def __init__(self, site: Site, dropout: float = 0.0) -> None:
        super().__init__()
        self.site = site
        self.rewrite: str | None = None
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.register_buffer("progress", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("columns", site.column_index(), persistent=False)
        self.register_buffer("padding", None, persistent=False)

    @abstractmethod
    def left(self) -> Tensor:
        """(*batch, in, k)"""

    @abstractmethod
    def gate(self) -> Tensor:
        """(k,) or (*batch, k), the scale s included"""

    @abstractmethod
    def right(self) -> Tensor:
        """(*batch, k, out)"""

    @property
    @abstractmethod
    def lambdas(self) -> Tensor:
        """(r,) what a report prints as λ: zero where a rank is pruned."""

    def axes(self) -> dict[str, Axis]:
        """The axes that a budget may shorten, by name, the ranks first; one at least, if only to be counted."""
        return {}

    def extra_repr(self) -> str:
        """Role, rewrite, the matrix's size, and what is left of each axis; not the values of fake or meta tensors."""
        site = self.site
        shown = [site.role, self.rewrite or "not installed", f"{site.in_features}→{site.out_features}"]
        for name, axis in self.axes().items():
            real = type(axis.mask) is Tensor and not axis.mask.is_meta
            active = f"{int((axis.mask & axis.keep).sum())} of " if real else ""
            shown.append(f"{name} {active}{axis.mask.numel()}")
        return ", ".join(shown)

    def compact(self) -> None:
        """Drop pruned entries physically; ΔW stays what it is."""

    def training_state(self) -> set[str]:
        """Buffers that only training reads: moving averages, and how far the run came. A file doesn't hold them."""
        averages = {f"{name}_{kind}" for name, _ in self.named_parameters() for kind in ("sensitivity", "uncertainty")}
        return {"progress"} | averages

    def track(self, *names: str) -> None:
        """Give each named parameter the two moving averages that importance is made of."""
        for name in names:
            value = self.get_parameter(name).detach()
            self.register_buffer(f"{name}_sensitivity", torch.zeros_like(value))
            self.register_buffer(f"{name}_uncertainty", torch.zeros_like(value))

    def forward(self, x: Tensor) -> Tensor:
        """What the site adds to its output: x (..., in) → (..., out of this site), in the adapter's dtype."""
        left = self.left()
        x = x if self.dropout is None else self.dropout(x)
        gate = self.gate()
        # A stack's own gates (batch, k) meet its tokens (batch, tokens, k).
        gate = gate.unsqueeze(-2) if self.site.batch_shape else gate
        update: Tensor = ((x.type_as(left) @ left) * gate) @ self.right()
        return update

    def lookup(self, ids: Tensor) -> Tensor:
        """What an embedding's site adds to its output: ids (...) → (..., out), 0 for the padding."""
        rows = nn.functional.embedding(ids, self.left())
        if self.padding is not None:
            rows = rows.masked_fill((ids == self.padding).unsqueeze(-1), 0)
        update: Tensor = (rows * self.gate()) @ self.right()
        return update

    def rows(self) -> Tensor:
        """left · diag(gate) (*batch, in, k), the padding row 0: ΔW = rows · right."""
        rows = self.left() * self.gate().unsqueeze(-2)
        return rows if self.padding is None else rows.index_fill(-2, self.padding, 0)

    def delta(self) -> Tensor:
        """ΔW as the matrix (*batch, in, out of this site)."""
        return self.rows() @ self.right()

    def weight_delta(self) -> Tensor:
        """ΔW in the weight's own shape, zero outside the site's columns."""
        return self.site.from_matrix(self.among_all_columns(self.delta()))

    def among_all_columns(self, own: Tensor) -> Tensor:
        """(..., out of this site) → (..., out of the whole weight), zero outside the site's columns."""
        if self.columns is None:
            return own
        shape = own.shape[:-1] + (self.site.weight_out_features,)  # noqa: RUF005 a traced shape can't be unpacked
        return own.new_zeros(shape).index_add(-1, self.columns, own)

    def exact(self) -> Self:
        """A detached float64 copy in eval mode on the same device: what folding and exporting compute with.

        Where the factors are sharded, they are gathered: every worker must then ask.
        """
        twin = object.__new__(type(self))
        vars(twin).update(vars(self), _modules=copy.deepcopy(self._modules))
        vars(twin)["_parameters"] = {name: _frozen(_doubled(value)) for name, value in self._parameters.items()}
        vars(twin)["_buffers"] = {name: _doubled(value) for name, value in self._buffers.items()}
        return twin.eval()

    @torch.no_grad()
    def singular_values(self) -> Tensor:
        """ΔW's singular values, float64, largest first, (*batch, min(in, k, out)); O(k²(in + out))."""
        exact = self.exact()
        left = torch.linalg.qr(exact.rows()).R
        right = torch.linalg.qr(exact.right().mT).R
        values: Tensor = torch.linalg.svdvals(left @ right.mT)
        return values

    def rank(self, tolerance: float = 1e-9) -> int:
        """ΔW's numeric rank: singular values above `tolerance` times the largest (a stack's maximum)."""
        return max(self.ranks(tolerance), default=0)

    def ranks(self, tolerance: float = 1e-9) -> list[int]:
        """The numeric rank of each matrix of a stack, as `rank` counts; one where there is no stack."""
        values = self.singular_values()
        if values.numel() == 0 or not (top := values.amax()) > 0:
            return [0]
        return [int(rank) for rank in (values > tolerance * top).sum(-1).reshape(-1)]
