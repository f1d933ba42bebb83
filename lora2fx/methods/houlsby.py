"""Houlsby's adapters (arXiv 1902.00751), a baseline: h → h + W_up σ(W_down h + b_d) + b_u behind attention and FFN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from lora2fx.errors import MethodError
from lora2fx.insert import Insert
from lora2fx.methods.hyperparameters import check_choice, check_count
from lora2fx.methods.initial import constant
from lora2fx.site import Site
from lora2fx.training.slots import Training

Init = Literal["near_identity", "identity"]
INITS = ("near_identity", "identity")
STD = 1e-2
ROLES = ("output", "ffn.down")
"""Where an adapter goes; and behind a site of unknown role, which only its name can have targeted."""


class Bottleneck(Insert):
    """down (m, d), down_bias (m,), up (d, m), up_bias (d,): 2dm + d + m numbers; σ = GELU."""

    def __init__(self, site: Site, m: int, init: Init) -> None:
        super().__init__(site)
        width = site.out_features
        self.down, self.down_bias = constant(0.0, m, width), constant(0.0, m)
        self.up, self.up_bias = constant(0.0, width, m), constant(0.0, width)
        nn.init.trunc_normal_(self.down, std=STD, a=-2 * STD, b=2 * STD)
        if init == "near_identity":
            nn.init.trunc_normal_(self.up, std=STD, a=-2 * STD, b=2 * STD)

    def forward(self, y: Tensor) -> Tensor:
        """y (..., d) → (..., d)"""
        hidden = F.gelu(F.linear(y.type_as(self.down), self.down, self.down_bias))
        return F.linear(hidden, self.up, self.up_bias)


def norm_parameters(model: nn.Module) -> tuple[str, ...]:
    """Full names of the parameters of norms: modules that hold a vector `weight`, other vectors, and nothing else."""
    found = []
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if "weight" in own and all(p.dim() == 1 for p in own.values()) and not isinstance(module, nn.PReLU):
            found += [f"{path}.{name}".lstrip(".") for name, p in own.items() if p.is_floating_point()]
    return tuple(found)


def _gets_one(site: Site) -> bool:
    return site.role in (*ROLES, "unknown")


@dataclass(frozen=True)
class Houlsby:
    """Bottlenecks of width `m` behind each attention's output projection and each FFN's last, before the residual.

    Of the targets those with these roles get one (or of unknown role, named by the user). `norms` trains the model's
    norms too, as published. `init`: `near_identity` is the published one, both matrices N(0, 0.01²) cut off at 2σ;
    `identity` starts with `up` at 0, so that the model computes at first what it did. An adapter is not linear: it
    can't be folded or exported as LoRA.

    Raises `MethodError` for hyperparameters that can't work.
    """

    m: int = 16
    norms: bool = True
    init: Init = "near_identity"

    def __post_init__(self) -> None:
        check_count("m", self.m)
        check_choice("init", self.init, INITS)

    @property
    def default_targets(self) -> tuple[str, ...]:
        """Attention's output projections and the FFNs' last."""
        return ROLES

    def trained(self, model: nn.Module, sites: Sequence[Site]) -> tuple[str, ...]:
        """The norms, where they are to be trained. Raises `MethodError` where no site gets an adapter."""
        if not any(map(_gets_one, sites)):
            roles = ", ".join(sorted({site.role for site in sites}))
            raise MethodError(
                f"Houlsby's adapters go behind {' and '.join(ROLES)}, and the targeted weights have other roles"
                f" ({roles}). Pass targets={list(ROLES)}, or leave targets= out."
            )
        return norm_parameters(model) if self.norms else ()

    def insert(self, site: Site) -> Bottleneck | None:
        """A fresh bottleneck."""
        return Bottleneck(site, self.m, self.init) if _gets_one(site) else None

    def training(self) -> Training:
        """Nothing to drive."""
        return Training()
