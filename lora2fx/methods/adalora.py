"""AdaLoRA (arXiv 2303.10512): ΔW = s · Aᵀ diag(λ) Bᵀ, orthogonality of A and B, λ pruned by importance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch import Tensor, nn

from lora2fx.adapter import Axis
from lora2fx.methods.hyperparameters import (
    check_choice,
    check_factorisation,
    check_local,
    check_number,
    check_schedule,
    check_target,
    rank_of,
)
from lora2fx.methods.initial import constant, gaussian
from lora2fx.methods.two_factor_folding import two_factor_folding
from lora2fx.methods.two_factors import FACTORS, TwoFactorAdapter, mean_over_stack
from lora2fx.site import Site
from lora2fx.training.allocator import SCOPES, TIMINGS, BudgetAllocator, Scope, ScoreTiming
from lora2fx.training.penalty import FORMS, Form, Orthogonality, deviation
from lora2fx.training.schedule import CubicSchedule
from lora2fx.training.slots import SENSITIVITIES, Groups, Sensitivity, Training

SCORED = (("lam", -1), *FACTORS)


class AdaLoRAAdapter(TwoFactorAdapter):
    """c = lam (*batch, r), the trained singular values, 0 at the start."""

    def __init__(self, site: Site, A: nn.Parameter, B: nn.Parameter, scale: float, dropout: float) -> None:
        super().__init__(site, A, B, scale, dropout)
        self.lam = constant(0.0, *site.batch_shape, A.shape[-2])

    def gate(self) -> Tensor:
        """s · λ · mask (*batch, r)"""
        return self.lam * self.mask * self.scale

    @property
    def lambdas(self) -> Tensor:
        """λ (r,), 0 where pruned; of a stack of matrices the mean"""
        return mean_over_stack(self.lam.detach() * (self.mask & self.keep))

    def axes(self) -> dict[str, Axis]:
        """The singular values, scored with their row of A and column of B (eq. 7)."""
        return {"lambda": Axis(self.mask, self.keep, SCORED, value=self.lam, along=SCORED)}


def adalora_deviations(factors: tuple[Tensor, ...]) -> list[Tensor]:
    """‖A Aᵀ - I‖² and ‖Bᵀ B - I‖² (eq. 4)."""
    A, B = factors
    return [deviation(A @ A.mT), deviation(B.mT @ B)]


@dataclass(frozen=True)
class AdaLoRA:
    """AdaLoRA from rank `r` to `target_r` a site on average over all sites; scale lora_alpha / (r + scale_eps).

    `target_r=None` prunes nothing. A pruned singular value may grow back until the final phase. `tinit`, `tfinal`,
    `deltaT`: see `CubicSchedule`. `orth_reg_weight` weighs the orthogonality of A and B, as the code's `mean` of
    norms or the paper's `squared_sum`. `budget_scope="local"` keeps `target_r` in every site. `reset_moments_on_mask`
    clears the optimizer's moments of a λ that is pruned, which else carry it on; `wd_on_lambda` has
    `lora2fx.param_groups` decay λ too. Parity with the published code: `AdaLoRA.paper()`.

    A weight of `in` inputs and `out` outputs gets A (r, in), λ (r,) as `lam` and B (out, r), float32 or, on a float64
    weight, float64; a stack of matrices gets a stack of them, and one mask.

    Raises `MethodError` for hyperparameters that can't work.

    Examples:
        >>> import lora2fx
        >>> from torch import nn
        >>> model = lora2fx.transform(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), "0", lora2fx.AdaLoRA(r=4, target_r=2))
        >>> {name.split(".")[-1]: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        {'A': (4, 8), 'B': (16, 4), 'lam': (4,)}
        >>> lora2fx.AdaLoRA(r=4, target_r=8)
        Traceback (most recent call last):
        lora2fx.errors.MethodError: target_r=8 is more than r=4, but a budget only falls. Raise r.
    """

    r: int = 8
    target_r: float | None = None
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    tinit: int | None = None
    tfinal: int | None = None
    deltaT: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.1
    orth_form: Form = "mean"
    scale_eps: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    score_timing: ScoreTiming = "post_step"
    sensitivity: Sensitivity = "total"
    force_final_mask: bool = True
    budget_scope: Scope = "global"
    reset_moments_on_mask: bool = False
    wd_on_lambda: bool = False

    def __post_init__(self) -> None:
        check_factorisation(self.r, self.lora_alpha, self.lora_dropout, self.rank_pattern)
        check_schedule(self.tinit, self.tfinal, self.deltaT, self.beta1, self.beta2)
        check_target("target_r", self.target_r, "r", max(self.r, *self.rank_pattern.values(), 0))
        check_number("orth_reg_weight", self.orth_reg_weight, 0)
        check_number("scale_eps", self.scale_eps, 0)
        check_choice("orth_form", self.orth_form, FORMS)
        check_choice("score_timing", self.score_timing, TIMINGS)
        check_choice("sensitivity", self.sensitivity, SENSITIVITIES)
        check_choice("budget_scope", self.budget_scope, SCOPES)
        check_local("target_r", self.target_r, self.budget_scope)

    @classmethod
    def paper(cls, **overrides: Any) -> Self:
        """The published code's settings: a scale of alpha / (r + 1e-5), no forced mask, λ decayed; `overrides` win."""
        return replace(cls(scale_eps=1e-5, force_final_mask=False, wd_on_lambda=True), **overrides)

    def adapter(self, site: Site) -> AdaLoRAAdapter:
        """A fresh adapter, ΔW = 0, A and B N(0, 0.02²) as in the code."""
        r = rank_of(site, self.r, self.rank_pattern)
        A = gaussian(0.02, *site.batch_shape, r, site.in_features)
        B = gaussian(0.02, *site.batch_shape, site.out_features, r)
        adapter = AdaLoRAAdapter(site, A, B, self.lora_alpha / (r + self.scale_eps), self.lora_dropout)
        adapter.track(*(name for budget in self._budgets() for name in budget.tracked))
        return adapter

    def training(self) -> Training:
        """The orthogonality penalty and the budget."""
        penalty = Orthogonality(self.orth_reg_weight, ("A", "B"), adalora_deviations, 2, self.orth_form)
        groups, folding = Groups(gate_decay=self.wd_on_lambda), two_factor_folding(AdaLoRAAdapter, "lam")
        penalised = penalty if self.orth_reg_weight else None
        return Training(penalised, self._budgets(), self.sensitivity, groups, folding)

    def _budgets(self) -> tuple[BudgetAllocator, ...]:
        if self.target_r is None:
            return ()
        schedule = CubicSchedule(self.tinit, self.tfinal, self.deltaT, self.force_final_mask)
        budget = BudgetAllocator(
            "lambda",
            self.target_r,
            schedule,
            ("A", "lam", "B"),
            beta1=self.beta1,
            beta2=self.beta2,
            score_timing=self.score_timing,
            scope=self.budget_scope,
            reset_moments=self.reset_moments_on_mask,
        )
        return (budget,)
