"""A weight with its low-rank update beside it: views of the two, and products with both that make no W + ΔW."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from lora2fx.adapter import Adapter
from lora2fx.training.grouped import Multiply, added_grouped_products
from lora2fx.training.products import Layer, added_products, fits, is_cast, is_frozen, product_dtype


@dataclass(frozen=True)
class Update:
    """M = W + aᵀ b: W (*batch, m, n), a (*batch, k, m), b (*batch, k, n); `name` is the weight's."""

    name: str
    weight: Tensor
    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, weight: Tensor, adapters: Sequence[Adapter]) -> Update:
        """Of W and what the adapters add to it, their ranks one behind the other."""
        with torch.autocast(weight.device.type, enabled=False):
            a, b = zip(*map(_sides, adapters), strict=True)
        return cls(adapters[0].site.weight, weight, _joined(a), _joined(b))

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What M is made of, and what its gradient goes to."""
        return self.weight, self.a, self.b

    @property
    def update(self) -> Update:
        """Itself."""
        return self

    def whole(self) -> Tensor:
        """M (*batch, m, n) in W's dtype."""
        same = self.a.dtype == self.b.dtype == self.weight.dtype and self.weight.dim() == 2
        if same and not torch.is_autocast_enabled(self.weight.device.type):
            return torch.addmm(self.weight, self.a.mT, self.b)
        return self.weight + (self.a.mT @ self.b).type_as(self.weight)

    def transposed(self) -> Update:
        """Mᵀ (*batch, n, m)"""
        return Update(self.name, self.weight.mT, self.b, self.a)

    def rows(self, sizes: Sequence[int]) -> tuple[Update, ...]:
        """M (m, n) cut into so many rows each."""
        parts = zip(self.weight.split(list(sizes)), self.a.split(list(sizes), -1), strict=True)
        return tuple(Update(self.name, weight, a, self.b) for weight, a in parts)

    @cached_property
    def _factors(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return self.a.unbind(), self.b.unbind()

    def matrix(self, index: int | Tensor) -> Update:
        """One matrix of a stack."""
        number, (a, b) = int(index), self._factors
        return Update(self.name, self.weight[number], a[number], b[number])

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x M + bias: x (..., m) → (..., n) with one matrix, (batch, tokens, m) → (batch, tokens, n) with a stack."""
        if self.weight.dim() == 2 and is_frozen(self.weight, bias, x) and fits(self.a.dtype, x):
            dtype = product_dtype(x)
            a, b = (self.a.to(dtype), self.b.to(dtype)) if is_cast(x) else (self.a, self.b)
            return added_products(x.to(dtype), (Layer(0, self.weight.mT, bias),), a, (b,), rebuild=True)[0]
        y = x @ self.weight if self.weight.dim() > 2 else F.linear(x, self.weight.mT, bias)
        return y + ((x.type_as(self.a) @ self.a.mT) @ self.b).type_as(y)

    def grouped_product(self, x: Tensor, offs: Tensor, multiply: Multiply) -> Tensor:
        """x M, of x (tokens, m) each expert's tokens with its own matrix, in x's dtype."""
        return added_grouped_products(x, offs, self.weight, self.a, self.b, multiply)


def _joined(factors: Iterable[Tensor]) -> Tensor:
    own = list(factors)
    return (own[0] if len(own) == 1 else torch.cat(own, -2)).contiguous()


def _sides(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """ΔW's two factors, along the first and along the last of the weight's own two dimensions."""
    left, right = adapter.rows().mT, adapter.among_all_columns(adapter.right())
    layout = adapter.site.layout
    return (left, right) if layout.contracted < layout.free else (right, left)
