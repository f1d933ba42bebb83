"""Rounding that keeps what an update does to its own inputs: min ‖E‖² subject to Uᵀ E = 0, lane by lane.

W is on the grid of its dtype already, so that an update below half a step rounds back to W (bf16 loses half of one
of ‖ΔW‖ = 10⁻³ ‖W‖). For a fixed multiplier c the nearest values to W + ΔW − U c minimise the Lagrangian
‖E‖² + 2 cᵀ Uᵀ E, E = Q − (W + ΔW); c grows by the residual Uᵀ E (dual ascent). What the grid's jumps leave is taken
away by moving single elements to their second nearest value, the one that helps most first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora2fx.passes.rounding import neighbour

TOLERANCE = 0.01
"""The share of the update that a lane may lose before it is left as it is."""
ASCENTS = 6
MOVES = 48


def _to_grid(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest values of `dtype`, the finite ones, as float32."""
    most = torch.finfo(dtype).max
    return values.clamp(-most, most).to(dtype).float()


def _residual(rounded: Tensor, total: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Uᵀ E (k, lanes), and its norms (lanes,)."""
    left = basis.mT @ (rounded - total)
    return left, left.norm(dim=0)


def _ascend(total: Tensor, basis: Tensor, allowed: Tensor, dtype: torch.dtype) -> Tensor:
    best = _to_grid(total, dtype)
    residual, least = _residual(best, total, basis)
    multiplier = torch.zeros_like(residual)
    for _ in range(ASCENTS):
        if (least <= allowed).all():
            break
        multiplier += residual
        found = _to_grid(total - basis @ multiplier, dtype)
        residual, norms = _residual(found, total, basis)
        better = norms < least
        best, least = torch.where(better, found, best), torch.where(better, norms, least)
    return best


def _steps(rounded: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
    """What moving each element to the value on the other side of the total would add to it; 0 where it can't move."""
    steps = neighbour(rounded.to(dtype), total).float() - rounded
    return torch.where(steps.isfinite() & (rounded != total), steps, 0.0)


def _move(rounded: Tensor, total: Tensor, basis: Tensor, allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """At most `MOVES` elements of each lane moved, in place."""
    steps = _steps(rounded, total, dtype)
    residual, norms = _residual(rounded, total, basis)
    lengths = basis.square().sum(1, keepdim=True)
    lanes = torch.arange(total.shape[1], device=total.device)
    for _ in range(MOVES):
        if (norms <= allowed).all():
            break
        gains = -steps * (2 * (basis @ residual) + steps * lengths)
        gain, row = gains.max(0)
        step = torch.where((gain > 0) & (norms > allowed), steps[row, lanes], 0.0)
        if not step.any():
            break
        rounded[row, lanes] += step
        steps[row, lanes] = torch.where(step == 0, steps[row, lanes], -step)
        residual += basis[row].mT * step
        norms = residual.norm(dim=0)
    return rounded


def round_keeping(total: Tensor, basis: Tensor, sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """W + ΔW (n, lanes) rounded to `dtype`, each lane's error as good as orthogonal to the columns of `basis`.

    `total` and `basis` (n, k), orthonormal columns, are float32; `sizes` (lanes,) are the updates' norms. An element
    is one of the values of `dtype` about its total, or further off only where those are much finer than the update.
    """
    allowed = TOLERANCE * sizes
    rounded = _ascend(total, basis, allowed, dtype)
    left = (_residual(rounded, total, basis)[1] > allowed).nonzero().flatten()
    if left.numel():
        rounded[:, left] = _move(rounded[:, left], total[:, left], basis, allowed[left], dtype)
    return rounded.to(dtype)
