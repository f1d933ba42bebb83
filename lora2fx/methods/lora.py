"""LoRA (arXiv 2106.09685): ΔW = s · (B A), B = 0 at the start, nothing pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Literal

from torch import Tensor

from lora2fx.adapter import Axis
from lora2fx.methods.hyperparameters import check_choice, check_factorisation, check_number, rank_of, value_of
from lora2fx.methods.initial import constant, gaussian, kaiming
from lora2fx.methods.two_factor_folding import two_factor_folding
from lora2fx.methods.two_factors import FACTORS, TwoFactorAdapter
from lora2fx.site import Site
from lora2fx.training.slots import Training

Init = Literal["kaiming", "gaussian"]
INITS = ("kaiming", "gaussian")


class LoRAAdapter(TwoFactorAdapter):
    """c = 1: the mask is there to switch ranks off, no schedule writes it."""

    def gate(self) -> Tensor:
        """s · mask (r,)"""
        return self.mask.type_as(self.A) * self.scale

    @property
    def lambdas(self) -> Tensor:
        """(r,) 1 where a rank is kept"""
        return (self.mask & self.keep).type_as(self.A)

    def axes(self) -> dict[str, Axis]:
        """The ranks."""
        return {"rank": Axis(self.mask, self.keep, FACTORS, along=FACTORS)}


@dataclass(frozen=True)
class LoRA:
    """LoRA of rank `r` with the scale lora_alpha/r, or lora_alpha/√r with `use_rslora`.

    `init` draws A: `kaiming` U(-1/√in, 1/√in) as the authors' code, `gaussian` N(0, 1/r²). `rank_pattern` gives
    single sites another rank, by module or weight name, dotted suffix, glob, or `role:<role>`; `alpha_pattern` another
    lora_alpha.

    A weight of `in` inputs and `out` outputs gets A (r, in) and B (out, r), float32 or, on a float64 weight, float64;
    a stack of matrices gets a stack of them.

    Raises `MethodError` for hyperparameters that can't work.

    Examples:
        >>> import lora2fx
        >>> from torch import nn
        >>> model = lora2fx.transform(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), "0", lora2fx.LoRA(r=2))
        >>> {name.split(".")[-1]: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        {'A': (2, 8), 'B': (16, 2)}
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init: Init = "kaiming"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_factorisation(self.r, self.lora_alpha, self.lora_dropout, self.rank_pattern)
        for name, alpha in self.alpha_pattern.items():
            check_number(f"alpha_pattern[{name!r}]", alpha, 0, closed=False)
        check_choice("init", self.init, INITS)

    def adapter(self, site: Site) -> LoRAAdapter:
        """A fresh adapter, ΔW = 0."""
        r = rank_of(site, self.r, self.rank_pattern)
        shape = (*site.batch_shape, r, site.in_features)
        A = kaiming(*shape) if self.init == "kaiming" else gaussian(1 / r, *shape)
        B = constant(0.0, *site.batch_shape, site.out_features, r)
        alpha = value_of(site, self.lora_alpha, self.alpha_pattern, "alpha_pattern")
        return LoRAAdapter(site, A, B, alpha / (sqrt(r) if self.use_rslora else r), self.lora_dropout)

    def training(self) -> Training:
        """Nothing to drive."""
        return Training(folding=two_factor_folding(LoRAAdapter))
