"""The B of adapters that have some columns each of one fused weight, as one B of all its columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora2fx.adapter import Adapter

Columns = slice | Tensor
"""One range, or int64 indices."""


def columns_of(adapter: Adapter) -> Columns:
    """The columns of the adapter's site, as few indices as it takes."""
    ranges = adapter.site.columns
    assert ranges is not None
    if len(ranges) == 1:
        return slice(*ranges[0])
    columns = adapter.columns
    assert columns is not None
    return columns


class _Scattered(torch.autograd.Function):
    """B (k, columns of one) each → (Σ k, width), one below the other, 0 in the others' columns."""

    @staticmethod
    def forward(ctx: Any, width: int, columns: Sequence[Columns], *b: Tensor) -> Tensor:
        # Not as saved tensors: several micro-batches go back through one folding.
        ctx.columns, ctx.sizes = columns, [len(own) for own in b]
        total = b[0].new_zeros(sum(ctx.sizes), width)
        for rows, own, place in zip(total.split(ctx.sizes), b, columns, strict=True):
            if isinstance(place, slice):
                rows[:, place] = own
            else:
                rows.index_copy_(1, place, own)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        parts = zip(grad.split(ctx.sizes), ctx.columns, strict=True)
        own = [rows[:, place] if isinstance(place, slice) else rows.index_select(1, place) for rows, place in parts]
        return None, None, *own


def scattered(adapters: Sequence[Adapter], b: Sequence[Tensor]) -> Tensor:
    """The adapters' B, one below the other, each in its own columns of the whole weight."""
    width, columns = adapters[0].site.weight_out_features, [columns_of(adapter) for adapter in adapters]
    total: Tensor = _Scattered.apply(width, columns, *b)  # type: ignore[no-untyped-call]
    return total
