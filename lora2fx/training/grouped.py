"""y = x W + (x Aᵀ) B where each token meets its own expert's W, A and B, as grouped products; W is frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora2fx.training.products import without_autocast
from lora2fx.training.rebuilding import Origin, origin_of

ALIGNED = 8
"""Ranks come in multiples of this: a grouped product's kernels read rows of a multiple of 16 bytes."""

Multiply = Callable[..., Tensor]
"""torch's grouped product: of (tokens, m) and (expert, m, n) one by one, `offs` saying where each expert's tokens end;
of (m, tokens) and (tokens, n) each expert's, (expert, m, n)."""


def aligned(factor: Tensor) -> Tensor:
    """(expert, k, n) with zeros behind, where k isn't a multiple of what kernels read."""
    missing = -factor.shape[-2] % ALIGNED
    return F.pad(factor, (0, 0, 0, missing)) if missing else factor


class AddedGroupedProducts(torch.autograd.Function):
    """Of x (tokens, in), W (expert, in, out), A (expert, k, in) and B (expert, k, out), all in one dtype.

    Where `origin` says how x was made of what autograd keeps anyway, that is kept in the place of x.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        multiply: Multiply,
        origin: Origin | None,
        x: Tensor,
        offs: Tensor,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
    ) -> Tensor:
        inner = multiply(x, a.mT, offs=offs)
        y = multiply(x, weight, offs=offs).add_(multiply(inner, b, offs=offs))
        ctx.multiply, ctx.origin = multiply, origin
        ctx.save_for_backward(inner, offs, weight, a, b, *((x,) if origin is None else origin.tensors))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # noqa: D102
        with without_autocast(grad.device):
            return AddedGroupedProducts._gradients(ctx, grad.contiguous())

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> Any:
        inner, offs, weight, a, b, *kept = ctx.saved_tensors
        x = kept[0] if ctx.origin is None else ctx.origin.rebuild(kept)
        if torch.is_grad_enabled():  # a second derivative follows, which must see what `inner` is made of
            inner = ctx.multiply(x, a.mT, offs=offs)
        back, grad_x = ctx.multiply(grad, b.mT, offs=offs), None
        if ctx.needs_input_grad[2]:
            grad_x = ctx.multiply(grad, weight.mT, offs=offs) + ctx.multiply(back, a, offs=offs)
        grad_a, grad_b = ctx.multiply(back.mT, x, offs=offs), ctx.multiply(inner.mT, grad, offs=offs)
        return None, None, grad_x, None, None, grad_a, grad_b


def added_grouped_products(x: Tensor, offs: Tensor, weight: Tensor, a: Tensor, b: Tensor, multiply: Multiply) -> Tensor:
    """The same in x's dtype, which the weight has, too; by torch's own derivatives where the weight trains."""
    a, b = aligned(a).to(x.dtype), aligned(b).to(x.dtype)
    if weight.requires_grad:
        return multiply(x, weight, offs=offs) + multiply(multiply(x, a.mT, offs=offs), b, offs=offs)
    y: Tensor = AddedGroupedProducts.apply(multiply, origin_of(x), x, offs, weight, a, b)  # type: ignore[no-untyped-call]
    return y
