"""The factorisation of LoRA and its gated kin: ΔW = s · Aᵀ diag(c) Bᵀ, whatever the gate c is made of."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lora2fx.adapter import Adapter
from lora2fx.methods.compaction import compact_axes
from lora2fx.site import Site

FACTORS = (("A", -2), ("B", -1))
"""The factors, each with the dimension of the ranks."""


class TwoFactorAdapter(Adapter):
    """A (*batch, r, in), B (*batch, out, r), and the ranks' `mask` and `keep` (r,), which a stack shares.

    `gated_by` are the buffers that `gate()` reads, vectors of the ranks or scalars: what makes it another one.
    """

    gated_by: ClassVar[tuple[str, ...]] = ("mask",)

    mask: Tensor
    keep: Tensor

    def __init__(self, site: Site, A: nn.Parameter, B: nn.Parameter, scale: float, dropout: float) -> None:
        super().__init__(site, dropout)
        self.scale = scale
        self.A = A
        self.B = B
        for name in ("mask", "keep"):
            self.register_buffer(name, torch.ones(A.shape[-2], dtype=torch.bool))

    def left(self) -> Tensor:
        """Aᵀ (*batch, in, r)"""
        return self.A.mT

    def right(self) -> Tensor:
        """Bᵀ (*batch, r, out)"""
        return self.B.mT

    def compact(self) -> None:
        """Drop masked ranks physically."""
        compact_axes(self)


def mean_over_stack(vectors: Tensor) -> Tensor:
    """(r,) of (r,) or of a stack's (batch, r)."""
    return vectors if vectors.dim() == 1 else vectors.mean(0)
