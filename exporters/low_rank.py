"""A weight's update as plain LoRA factors of its true rank: ΔW = B A, nothing to scale, nothing to gate.

All adapters on one weight become one LoRA of the whole weight; QR of both planes and an SVD of the small core
leave as many ranks as ΔW has, sorted by singular value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora2fx.adapter import Adapter

TOLERANCE = 1e-9
"""Singular values below this share of the largest are rounding, in float64."""


@dataclass(frozen=True)
class LowRank:
    """ΔW as the matrix (in, out) = (b a)ᵀ with a (k, in) and b (out, k), float64; a's and b's norms are balanced."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """k"""
        return self.a.shape[0]

    def padded(self, rank: int) -> LowRank:
        """The same ΔW with `rank` rows and columns, the added ones zero."""
        extra = rank - self.rank
        return LowRank(torch.cat([self.a, self.a.new_zeros(extra, self.a.shape[1])]), _widened(self.b, extra))


def _widened(b: Tensor, extra: int) -> Tensor:
    return torch.cat([b, b.new_zeros(b.shape[0], extra)], 1)


@torch.no_grad()
def low_rank(adapters: Sequence[Adapter]) -> LowRank:
    """The adapters of one 2-D weight (or one flattened to 2-D), added up and compressed."""
    planes = [_planes(adapter) for adapter in adapters]
    left = torch.cat([plane[0] for plane in planes], 1)
    right = torch.cat([plane[1] for plane in planes])
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    u, values, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    top = values[0] if values.numel() else values.new_zeros(())
    kept = int((values > TOLERANCE * top).sum())
    root = values[:kept].sqrt()
    a = ((q_left @ u[:, :kept]) * root).mT.contiguous()
    if adapters[0].padding is not None:
        a[:, adapters[0].padding.cpu()] = 0  # what the two decompositions leave there is rounding
    return LowRank(a, (q_right @ vh[:kept].mT) * root)


def _planes(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """left · gate (in, k) and right (k, out of the whole weight), float64, on the CPU."""
    exact = adapter.exact().cpu()
    left, right = exact.rows(), exact.right()
    if exact.columns is not None:
        whole = right.new_zeros(right.shape[0], exact.site.weight_out_features)
        right = whole.index_add(-1, exact.columns, right)
    return left, right
