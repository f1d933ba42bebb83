"""SaLoRA (Mathematics 2023, 11(20), 4317): ΔW = s · Aᵀ diag(g) Bᵀ, Hard-Concrete gates g under a density constraint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lora2fx.methods.adalora import adalora_deviations
from lora2fx.methods.hyperparameters import (
    check_choice,
    check_count,
    check_factorisation,
    check_number,
    check_schedule,
    rank_of,
)
from lora2fx.methods.initial import constant, gaussian, kaiming
from lora2fx.methods.salora_factors import SaLoRAAdapter
from lora2fx.methods.two_factor_folding import two_factor_folding
from lora2fx.site import Site
from lora2fx.training.density import LAGRANGIANS, DensityPenalty, DensityTarget, DensityWindow, Lagrangian
from lora2fx.training.hard_concrete import HardConcrete
from lora2fx.training.penalty import Orthogonality, PenaltySum, deviation
from lora2fx.training.schedule import CubicSchedule
from lora2fx.training.slots import Groups, Training

OrthForm = Literal["squared_sum", "cosine"]
ORTH_FORMS = ("squared_sum", "cosine")


def cosine_deviations(factors: tuple[Tensor, ...]) -> list[Tensor]:
    """Squared cosines between different rows of A, and columns of B: orthogonality that leaves their length alone."""
    grams = []
    for rows in (factors[0], factors[1].mT):
        unit = nn.functional.normalize(rows, dim=-1)
        gram = unit @ unit.mT
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        grams.append(deviation(gram * (1 - identity) + identity))
    return grams


@dataclass(frozen=True)
class SaLoRA:
    """SaLoRA from rank `r` to a pooled density of `target_density` of the factors' entries, softly enforced.

    Gates move from step `tinit` on and are fixed `tfinal` steps before the end (see `CubicSchedule`; T_start and
    T_end of the paper); `lora2fx.param_groups` gives them `gate_lr` times the factors' learning rate and no weight
    decay. `density_warmup` lowers the target from 1 over so many steps. `lora_alpha=None` is the paper's scale of 1,
    else lora_alpha / r. `orth_reg_weight` is small, since orthonormal factors with gates below 1 fix ‖ΔW‖;
    `orth_form="cosine"` leaves lengths alone. `lagrangian="linear_quadratic"` meets the target more tightly. `gamma`,
    `zeta`, `tau` and `log_theta` are the gates' stretch, temperature and logit at the start.

    A weight of `in` inputs and `out` outputs gets A (r, in), the gates' logits `log_theta` (r,) and B (out, r), float32
    or, on a float64 weight, float64; a stack of matrices gets a stack of them, and one mask.

    Raises `MethodError` for hyperparameters that can't work.

    Examples:
        >>> import lora2fx
        >>> from torch import nn
        >>> model = lora2fx.transform(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), "0", lora2fx.SaLoRA(r=4))
        >>> {name.split(".")[-1]: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        {'A': (4, 8), 'B': (16, 4), 'log_theta': (4,)}
        >>> [(group["name"], group["lr"]) for group in lora2fx.param_groups(model, lr=1e-3)]
        [('factors', 0.001), ('gates', 0.003)]
    """

    r: int = 8
    target_density: float = 0.5
    density_warmup: int = 0
    lora_alpha: float | None = None
    tinit: int | None = None
    tfinal: int | None = None
    orth_reg_weight: float = 1e-3
    orth_form: OrthForm = "squared_sum"
    lagrangian: Lagrangian = "quadratic"
    multiplier_lr: float = 0.3
    gate_lr: float = 3.0
    log_theta: float = 2.0
    tau: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    noise_seed: int = 0

    def __post_init__(self) -> None:
        check_factorisation(self.r, 1.0 if self.lora_alpha is None else self.lora_alpha, 0.0, self.rank_pattern)
        check_schedule(self.tinit, self.tfinal, None, 0.0, 0.0)
        check_number("target_density", self.target_density, 0, 1, closed=False)
        check_number("orth_reg_weight", self.orth_reg_weight, 0)
        check_number("multiplier_lr", self.multiplier_lr, 0, closed=False)
        check_number("gate_lr", self.gate_lr, 0, closed=False)
        check_count("density_warmup", self.density_warmup, least=0)
        check_number("tau", self.tau, 0, closed=False)
        check_number("-gamma", -self.gamma, 0, closed=False)
        check_number("zeta", self.zeta, 1, closed=False)
        check_choice("orth_form", self.orth_form, ORTH_FORMS)
        check_choice("lagrangian", self.lagrangian, LAGRANGIANS)
        check_count("noise_seed", self.noise_seed, least=0)

    def adapter(self, site: Site) -> SaLoRAAdapter:
        """A fresh adapter, ΔW = 0, its gates at their evaluation value until it is attached."""
        r = rank_of(site, self.r, self.rank_pattern)
        A = kaiming(*site.batch_shape, r, site.in_features)
        B = constant(0.0, *site.batch_shape, site.out_features, r)
        log_theta = gaussian(0.01, *site.batch_shape, r)
        with torch.no_grad():
            log_theta.add_(self.log_theta)
        scale = 1.0 if self.lora_alpha is None else self.lora_alpha / r
        return SaLoRAAdapter(site, A, B, log_theta, self._gates(), scale)

    def training(self) -> Training:
        """Orthogonality, the Lagrangian, and the window in which gates move."""
        target = DensityTarget(self.target_density, CubicSchedule(self.tinit, self.tfinal), self.density_warmup)
        density = DensityPenalty(target, self._gates(), self.lagrangian)
        deviations = adalora_deviations if self.orth_form == "squared_sum" else cosine_deviations
        orthogonality = Orthogonality(self.orth_reg_weight, ("A", "B"), deviations, 2, "squared_sum")
        window = DensityWindow(target, self._gates(), self.lagrangian, self.multiplier_lr, self.noise_seed)
        penalty = PenaltySum((orthogonality, density) if self.orth_reg_weight else (density,))
        folding = two_factor_folding(SaLoRAAdapter, "log_theta")
        return Training(penalty, (window,), groups=Groups(gate_lr=self.gate_lr), folding=folding)

    def _gates(self) -> HardConcrete:
        return HardConcrete(self.tau, self.gamma, self.zeta)
