"""ΔW tile by tile, in the weight's own shape and memory order, so that a fold needs no second weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

import torch
from torch import Tensor

from lora2fx.adapter import Adapter
from lora2fx.site import Site

Tile = tuple[slice, ...]
TILE = 2**17
"""Elements of a tile: a megabyte in float64, which stays in a core's cache."""


def tiles(shape: Sequence[int], limit: int = TILE) -> Iterator[Tile]:
    """Slices that cover a tensor of this shape once, in row-major order, of at most `limit` elements where they can."""
    if not prod(shape):
        return
    inner = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    cut = next(dim for dim, size in enumerate(inner) if size <= limit)
    step = limit // inner[cut]
    whole = tuple(slice(0, size) for size in shape[cut + 1 :])
    for outer in product(*map(range, shape[:cut])):
        for start in range(0, shape[cut], step):
            yield (*(slice(i, i + 1) for i in outer), slice(start, min(start + step, shape[cut])), *whole)


def positions(shape: Sequence[int], dims: Sequence[int], tile: Tile) -> Tensor:
    """Where the tile lies in the flattened dimensions `dims`."""
    grid = torch.arange(prod(shape[dim] for dim in dims)).reshape([shape[dim] for dim in dims])
    return grid[tuple(tile[dim] for dim in dims)].flatten()


def _picked(matrix: Tensor, dim: int, found: Tensor) -> Tensor:
    """These rows or columns; a view where they are one run."""
    first, length = int(found[0]), found.numel()
    if int(found[-1]) - first + 1 == length:
        return matrix.narrow(dim, first, length)
    return matrix.index_select(dim, found.to(matrix.device))


class Factors:
    """left · diag(gate) (*batch, in, k) and right (*batch, k, all output columns) of one adapter in float64."""

    def __init__(self, adapter: Adapter, device: torch.device) -> None:
        exact = adapter.exact().to(device)
        self.site: Site = adapter.site
        self.left = exact.rows()
        self.right = exact.right()
        if exact.columns is not None:
            whole = self.right.new_zeros(*self.right.shape[:-1], self.site.weight_out_features)
            self.right = whole.index_add(-1, exact.columns, self.right)

    def largest(self) -> Tensor:
        """A bound of |ΔW|'s entries in O(k(in + out)): left's longest row times right's longest column."""
        bound: Tensor = self.left.norm(dim=-1).amax() * self.right.norm(dim=-2).amax()
        return bound

    def tile(self, tile: Tile) -> Tensor:
        """ΔW there, in the weight's own order of dimensions."""
        shape, layout = self.site.shape, self.site.layout
        left = _picked(self.left, -2, positions(shape, layout.contracted, tile))
        right = _picked(self.right, -1, positions(shape, layout.free, tile))
        if layout.batch:
            items = positions(shape, layout.batch, tile)
            left, right = _picked(left, 0, items), _picked(right, 0, items)
        sizes = [part.stop - part.start for part in tile]
        if min(layout.free) < min(layout.contracted):
            order, product = (*layout.batch, *layout.free, *layout.contracted), right.mT @ left.mT
        else:
            order, product = layout.order, left @ right
        inverse = [order.index(dim) for dim in range(len(order))]
        return product.reshape([sizes[dim] for dim in order]).permute(inverse)
