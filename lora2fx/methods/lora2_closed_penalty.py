"""LoRA2's regulariser and its gradient in closed form, for many adapters at once, from K x K Gram matrices alone.

With S = uᵀu or V Vᵀ and M = v vᵀ or UᵀU: a Gram matrix X's deviation t = ‖X - I‖² gives its factor the gradient
4 (X - I); P's or Q's t = ‖M½ S M½ - I‖² gives u or V 4 (M S M - M) and v or U 4 (S M S - S). `lora2_penalty` is the
reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora2fx.methods.lora2_penalty import PLANES, TERMS
from lora2fx.training.folded import Stacks, Use
from lora2fx.training.penalty import Form, is_apart, product_deviation


@dataclass(frozen=True)
class ClosedPenalty:
    """`weight` times the deviations, as `lora2_penalty`; `regularises_V` where V has its two terms."""

    weight: float
    planes: tuple[str, ...]
    form: Form
    regularises_V: bool

    def __call__(self, use: Use, gradients: Stacks, matrices: int) -> Tensor:
        """Adds the penalty's gradient to the stacks, in place; its value over these adapters of `matrices` in all."""
        u, (v,), (U,) = use.stacked("u"), use.stacked("v"), use.stacked("U")
        V = use.stacked("V") if self.regularises_V else ()
        inner = [v.bmm(v.mT), U.mT.bmm(U)]
        own = torch.cat([stack.mT.bmm(stack) for stack in u])[use.to_core]
        grams = torch.cat([*inner, own, *(stack.bmm(stack.mT) for stack in V)])
        M, S = grams.split([2 * len(v), len(grams) - 2 * len(v)])
        M = M[: len(S)]
        eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
        off, turned = grams - eye, S.bmm(M)
        slope, value = self._slopes(
            [off.square().sum((-2, -1)), self._products(S, turned - eye, v, U)], len(v), matrices
        )
        of_gram, of_product = (4 * slope).view(-1, 1, 1).split([len(grams), len(S)])
        off.mul_(of_gram)
        on_M, on_S = off[: 2 * len(v)], off[2 * len(v) :]
        on_S.addcmul_(torch.baddbmm(M, M, turned, beta=-1), of_product)
        on_M[: len(S)].addcmul_(torch.baddbmm(S, turned, S, beta=-1), of_product)
        n = len(v)
        gradients["v"][0].baddbmm_(on_M[:n], v)
        gradients["U"][0].baddbmm_(U, on_M[n:])
        for grad, stack, on in zip(gradients["u"], u, _cut(on_S[:n][use.from_core], u), strict=True):
            grad.baddbmm_(stack, on)
        for grad, stack, on in zip(gradients.get("V", ()), V, _cut(on_S[n:], V), strict=False):
            grad.baddbmm_(on, stack)
        return value

    def _products(self, S: Tensor, off: Tensor, v: Tensor, U: Tensor) -> Tensor:
        """Deviations of P and Q, given S M - I: what `product_deviation` finds for r ≥ K as well."""
        k, r = v.shape[-2:]
        if r >= k:
            return (off * off.mT).sum((-2, -1)) + (r - k)
        return product_deviation(S, torch.cat([v, U.mT]) if self.regularises_V else v)

    def _slopes(self, found: list[Tensor], n: int, matrices: int) -> tuple[Tensor, Tensor]:
        """d value / d t of each deviation, and the value."""
        t = torch.cat(found)
        if self.form == "squared_sum":
            slope, size = torch.full_like(t, self.weight), t * self.weight
        else:
            weight = self.weight / (TERMS * matrices)
            inverse = t.rsqrt().masked_fill_(~is_apart(t), 0.0)
            slope, size = inverse * (0.5 * weight), (inverse * t).mul_(weight)
        if set(self.planes) != set(PLANES):
            outer = ["uv", "UV"] if self.regularises_V else ["uv"]
            blocks = ["uv", "UV", *outer, *(["PQ"] * len(outer))]
            chosen = torch.tensor([plane in self.planes for plane in blocks], device=t.device).repeat_interleave(n)
            slope, size = slope * chosen, size * chosen
        return slope, size.sum()


def _cut(stack: Tensor, like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.split(stack, [len(own) for own in like])
