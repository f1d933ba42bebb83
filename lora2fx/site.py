"""A site: one use of one weight in a contraction, and the matrix that the weight is there."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

ROLES = (
    "query",
    "key",
    "value",
    "output",
    "ffn.up",
    "ffn.gate",
    "ffn.down",
    "lm_head",
    "embedding",
    "router",
    "conv",
    "unknown",
)


@dataclass(frozen=True)
class Layout:
    """Which dimensions of a weight are batched, contracted with the activation, and free (the output).

    `nn.Linear.weight` (out, in) is `Layout(contracted=(1,), free=(0,))`; a stack of experts
    (expert, in, out) is `Layout(batch=(0,), contracted=(1,), free=(2,))`.
    """

    contracted: tuple[int, ...]
    free: tuple[int, ...]
    batch: tuple[int, ...] = ()

    @property
    def order(self) -> tuple[int, ...]:
        """The weight's dimensions, batched ones first, then contracted, then free."""
        return (*self.batch, *self.contracted, *self.free)


@dataclass(frozen=True)
class Site:
    """One use of one weight: where it is, which matrix it is there, and what it does in the dataflow.

    `columns` are the half-open ranges of output columns that belong to this site when the weight is a
    fused one (QKV, gate and up); None means all of them.
    """

    weight: str
    owner: str
    parameter: str
    shape: tuple[int, ...]
    layout: Layout
    role: str = "unknown"
    evidence: str = ""
    columns: tuple[tuple[int, int], ...] | None = None

    def _sizes(self, dims: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.shape[dim] for dim in dims)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """`()` for a plain matrix, `(n,)` for a stack of n matrices."""
        return (prod(self._sizes(self.layout.batch)),) if self.layout.batch else ()

    @property
    def in_features(self) -> int:
        """Rows of the matrix: the contracted dimensions together."""
        return prod(self._sizes(self.layout.contracted))

    @property
    def weight_out_features(self) -> int:
        """Output columns of the whole weight, the other sites' columns of a fused weight included."""
        return prod(self._sizes(self.layout.free))

    @property
    def out_features(self) -> int:
        """Output columns of this site."""
        if self.columns is None:
            return self.weight_out_features
        return sum(stop - start for start, stop in self.columns)

    def column_index(self) -> Tensor | None:
        """The output columns of this site as int64 indices, or None for all of them."""
        if self.columns is None:
            return None
        return torch.cat([torch.arange(start, stop) for start, stop in self.columns])

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The weight, in its own shape, as the matrix (*batch, in, out) with all output columns."""
        matrix = weight.permute(self.layout.order)
        return matrix.reshape(*self.batch_shape, self.in_features, self.weight_out_features)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of `to_matrix`: a (*batch, in, out) matrix in the weight's own shape."""
        order = self.layout.order
        inverse = tuple(order.index(dim) for dim in range(len(order)))
        return matrix.reshape(self._sizes(order)).permute(inverse)
