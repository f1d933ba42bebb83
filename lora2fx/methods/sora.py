"""SoRA (arXiv 2311.11696): ΔW = s · Aᵀ diag(g) Bᵀ, gates g drawn to exact zeros by a proximal step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora2fx.adapter import Adapter, Axis
from lora2fx.errors import MethodError
from lora2fx.methods.hyperparameters import check_choice, check_factorisation, check_number, rank_of
from lora2fx.methods.initial import constant, gaussian, kaiming
from lora2fx.methods.two_factor_folding import two_factor_folding
from lora2fx.methods.two_factors import FACTORS, TwoFactorAdapter, mean_over_stack
from lora2fx.site import Site
from lora2fx.training.proximal import XI_MODES, SoftThreshold, XiMode
from lora2fx.training.slots import Groups, Training


class SoRAAdapter(TwoFactorAdapter):
    """c = g (*batch, r), trained, N(0, 1) at the start."""

    def __init__(self, site: Site, A: nn.Parameter, B: nn.Parameter, scale: float, dropout: float) -> None:
        super().__init__(site, A, B, scale, dropout)
        self.g = gaussian(1.0, *site.batch_shape, A.shape[-2])

    def gate(self) -> Tensor:
        """s · g · mask (*batch, r)"""
        return self.g * self.mask * self.scale

    @property
    def lambdas(self) -> Tensor:
        """g (r,), 0 where pruned; of a stack of matrices the mean"""
        return mean_over_stack(self.g.detach() * (self.mask & self.keep))

    def axes(self) -> dict[str, Axis]:
        """The gates."""
        return {"gate": Axis(self.mask, self.keep, (("g", -1),), value=self.g, along=(("g", -1), *FACTORS))}


@dataclass(frozen=True)
class GateL1:
    """coefficient · Σ|g| / (number of gates): the code's extra term, not in the paper's eq. (10)."""

    coefficient: float

    def __call__(self, adapters: Sequence[Adapter]) -> Tensor:
        """A scalar."""
        gates = [adapter.get_parameter("g") for adapter in adapters]
        device = gates[0].device
        total = torch.stack([gate.abs().sum().to(device) for gate in gates]).sum()
        return self.coefficient * total / sum(gate.numel() for gate in gates)


@dataclass(frozen=True)
class SoRA:
    """SoRA from rank `r`; scale lora_alpha / r.

    `xi` is the threshold of every step, by default a fraction of the gates' learning rate (eq. 10; the published
    settings come to 0.375), or as it is (`xi_mode="absolute"`). Several values sparsify in rounds: the first for
    `first_share` of the run. `l1_coef` is the code's extra term. `weight_decay` of A and B is part of the method:
    without it they grow as the gates shrink. `gate_lr`, times the factors' learning rate, and Adam's `gate_eps` are
    the gates'. `lora2fx.param_groups` hands these three to the optimizer.

    A weight of `in` inputs and `out` outputs gets A (r, in), gates g (r,) and B (out, r), float32 or, on a float64
    weight, float64; a stack of matrices gets a stack of them, and one mask.

    Raises `MethodError` for hyperparameters that can't work.

    Examples:
        >>> import lora2fx
        >>> from torch import nn
        >>> model = lora2fx.transform(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), "0", lora2fx.SoRA(r=4))
        >>> {name.split(".")[-1]: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        {'A': (4, 8), 'B': (16, 4), 'g': (4,)}
        >>> [(group["name"], group["weight_decay"]) for group in lora2fx.param_groups(model, lr=1e-3)]
        [('factors', 0.1), ('gates', 0.0)]
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    xi: float | tuple[float, ...] = 0.375
    xi_mode: XiMode = "lr"
    first_share: float = 0.5
    l1_coef: float = 0.0
    weight_decay: float = 0.1
    gate_lr: float = 1.0
    gate_eps: float = 1e-6
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_factorisation(self.r, self.lora_alpha, self.lora_dropout, self.rank_pattern)
        check_choice("xi_mode", self.xi_mode, XI_MODES)
        check_number("first_share", self.first_share, 0, 1)
        check_number("l1_coef", self.l1_coef, 0)
        check_number("weight_decay", self.weight_decay, 0)
        check_number("gate_lr", self.gate_lr, 0, closed=False)
        check_number("gate_eps", self.gate_eps, 0, closed=False)
        if not self._thresholds():
            raise MethodError("xi=(): pass a threshold, or several that rise.")
        for value in self._thresholds():
            check_number("xi", value, 0)
        if list(self._thresholds()) != sorted(self._thresholds()):
            raise MethodError(f"xi={self.xi}: a sparsifying schedule's thresholds rise.")

    def adapter(self, site: Site) -> SoRAAdapter:
        """A fresh adapter, ΔW = 0."""
        r = rank_of(site, self.r, self.rank_pattern)
        A = kaiming(*site.batch_shape, r, site.in_features)
        B = constant(0.0, *site.batch_shape, site.out_features, r)
        return SoRAAdapter(site, A, B, self.lora_alpha / r, self.lora_dropout)

    def training(self) -> Training:
        """The proximal step, and the ℓ1 term where it was asked for."""
        threshold = SoftThreshold("gate", self._thresholds(), self.xi_mode, self.first_share)
        groups = Groups(self.weight_decay, self.gate_lr, gate_eps=self.gate_eps)
        folding = two_factor_folding(SoRAAdapter, "g")
        return Training(GateL1(self.l1_coef) if self.l1_coef else None, (threshold,), groups=groups, folding=folding)

    def _thresholds(self) -> tuple[float, ...]:
        return tuple(self.xi) if isinstance(self.xi, Sequence) else (self.xi,)
