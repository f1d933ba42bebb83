"""LoRA (arXiv 2106.09685): ΔW = s · (B A), B = 0 at the start, nothing pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from lora2fx.adapter import Adapter, Axis
from lora2fx.methods.compaction import compact_axes
from lora2fx.methods.hyperparameters import check_choice, check_factorisation, rank_of
from lora2fx.methods.initial import constant, gaussian, kaiming
from lora2fx.site import Site
from lora2fx.training.slots import Training

Init = Literal["kaiming", "gaussian"]
INITS = ("kaiming", "gaussian")


class LoRAAdapter(Adapter):
    """A (*batch, r, in), B (*batch, out, r); the mask is there to switch ranks off, no schedule writes it."""

    mask: Tensor
    keep: Tensor

    def __init__(self, site: Site, r: int, scale: float, init: Init, dropout: float) -> None:
        super().__init__(site, dropout)
        self.scale = scale
        shape = (*site.batch_shape, r, site.in_features)
        self.A = kaiming(*shape) if init == "kaiming" else gaussian(1 / r, *shape)
        self.B = constant(0.0, *site.batch_shape, site.out_features, r)
        self.register_buffer("mask", torch.ones(r, dtype=torch.bool))
        self.register_buffer("keep", torch.ones(r, dtype=torch.bool))

    def left(self) -> Tensor:
        """Aᵀ (*batch, in, r)"""
        return self.A.mT

    def gate(self) -> Tensor:
        """s · mask (r,)"""
        return self.mask.type_as(self.A) * self.scale

    def right(self) -> Tensor:
        """Bᵀ (*batch, r, out)"""
        return self.B.mT

    @property
    def lambdas(self) -> Tensor:
        """(r,) 1 where a rank is kept"""
        return (self.mask & self.keep).type_as(self.A)

    def axes(self) -> dict[str, Axis]:
        """The ranks."""
        factors = (("A", -2), ("B", -1))
        return {"rank": Axis(self.mask, self.keep, factors, along=factors)}

    def compact(self) -> None:
        """Drop masked ranks physically."""
        compact_axes(self)


@dataclass(frozen=True)
class LoRA:
    """LoRA of rank `r` with the scale lora_alpha/r, or lora_alpha/√r with `use_rslora`.

    `init` draws A: `kaiming` U(-1/√in, 1/√in) as the authors' code, `gaussian` N(0, 1/r²). `rank_pattern` gives
    single sites another rank, by module or weight name, dotted suffix, glob, or `role:<role>`.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init: Init = "kaiming"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_factorisation(self.r, self.lora_alpha, self.lora_dropout, self.rank_pattern)
        check_choice("init", self.init, INITS)

    def adapter(self, site: Site) -> LoRAAdapter:
        """A fresh adapter, ΔW = 0."""
        r = rank_of(site, self.r, self.rank_pattern)
        scale = self.lora_alpha / (sqrt(r) if self.use_rslora else r)
        return LoRAAdapter(site, r, scale, self.init, self.lora_dropout)

    def training(self) -> Training:
        """Nothing to drive."""
        return Training()
