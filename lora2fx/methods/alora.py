"""ALoRA (arXiv 2403.16187): LoRA whose ranks are scored by ablation and moved to the sites that need them.

Not to be confused with Activated LoRA, which PEFT calls aLoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora2fx.errors import MethodError
from lora2fx.methods.hyperparameters import check_count, check_factorisation, check_number, check_schedule, rank_of
from lora2fx.methods.initial import constant, kaiming
from lora2fx.methods.lora import LoRAAdapter
from lora2fx.methods.two_factor_folding import two_factor_folding
from lora2fx.site import Site
from lora2fx.training.reallocation import AblationAllocator
from lora2fx.training.slots import Training


class ALoRAAdapter(LoRAAdapter):
    """LoRA with spare ranks, and a memory of the best state: see `RememberingAdapter`."""

    best_A: Tensor
    best_B: Tensor
    best_mask: Tensor
    best_score: Tensor
    best_step: Tensor
    settled: Tensor

    def __init__(self, site: Site, A: nn.Parameter, B: nn.Parameter, scale: float, dropout: float) -> None:
        super().__init__(site, A, B, scale, dropout)
        self.register_buffer("best_score", A.detach().new_zeros(()))
        self.register_buffer("best_step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("settled", torch.zeros((), dtype=torch.bool))
        self._forget()

    def remembered(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Factors and mask, with their best values."""
        return ((self.A, self.best_A), (self.B, self.best_B), (self.mask, self.best_mask))

    def training_state(self) -> set[str]:
        """The memory too."""
        return super().training_state() | {"best_A", "best_B", "best_mask", "best_score", "best_step", "settled"}

    def compact(self) -> None:
        """Drop masked ranks physically, and the memory, which may hold them."""
        super().compact()
        self.best_step.zero_()
        self._forget()

    def _forget(self) -> None:
        for name in ("A", "B", "mask"):
            self.register_buffer(f"best_{name}", torch.zeros_like(getattr(self, name).detach()))


@dataclass(frozen=True)
class ALoRA:
    """ALoRA of rank `r` a site on average; scale lora_alpha / r, 1 by default.

    After `tinit` steps (a tenth of the run), `cycles` times with `deltaT` steps between them (a fortieth), the
    `n_prune` least important ranks of all sites (an eighth) move to sites that lost none, up to `max_r` (2 r) in a
    site: factors have that many ranks, the spare ones masked, so that no graph changes. Set `attachment.evaluate` to
    a function that returns -loss of a fixed validation batch; a cycle calls it twice for every active rank.

    `keep_best` ends the run with the adapters' best state on that batch, looked at every `deltaT` steps: without it
    the method, which has no stopping rule, may end on the worse side of an exchange. `rollback` undoes a cycle that
    left the model worse after `deltaT` steps, and moves no rank after it. `only_harmless` moves only ranks without
    which the batch scores no worse, or by no more than `harmless_tol`.

    A weight of `in` inputs and `out` outputs gets A (max_r, in) and B (out, max_r), float32 or, on a float64 weight,
    float64, and a bool mask (max_r,) of which r are set; a stack of matrices gets a stack of them, and one mask.

    Raises `MethodError` for hyperparameters that can't work.

    Examples:
        >>> import lora2fx
        >>> from torch import nn
        >>> model = lora2fx.transform(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), "0", lora2fx.ALoRA(r=2))
        >>> {name.split(".")[-1]: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        {'A': (4, 8), 'B': (16, 4)}
        >>> lora2fx.report(model).sites[0]["active"]
        2
    """

    r: int = 8
    max_r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    n_prune: int | None = None
    cycles: int = 8
    tinit: int | None = None
    deltaT: int | None = None
    keep_best: bool = True
    rollback: bool = False
    only_harmless: bool = False
    harmless_tol: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    growth_seed: int = 0

    def __post_init__(self) -> None:
        check_factorisation(
            self.r, self.r if self.lora_alpha is None else self.lora_alpha, self.lora_dropout, self.rank_pattern
        )
        check_count("max_r", self.max_r, optional=True)
        check_count("n_prune", self.n_prune, optional=True)
        check_count("cycles", self.cycles)
        check_schedule(None, None, self.deltaT, 0.0, 0.0)
        check_count("tinit", self.tinit, optional=True)
        check_count("growth_seed", self.growth_seed, least=0)
        check_number("harmless_tol", self.harmless_tol, float("-inf"))
        most = max(self.r, *self.rank_pattern.values(), 0)
        if self.max_r is not None and self.max_r < most:
            raise MethodError(f"max_r={self.max_r} is less than the r={most} that a site starts with.")

    def adapter(self, site: Site) -> ALoRAAdapter:
        """A fresh adapter, ΔW = 0, its ranks from `r` up to `max_r` spare."""
        r = rank_of(site, self.r, self.rank_pattern)
        most = 2 * r if self.max_r is None else self.max_r
        A = kaiming(*site.batch_shape, most, site.in_features)
        B = constant(0.0, *site.batch_shape, site.out_features, most)
        adapter = ALoRAAdapter(site, A, B, 1.0 if self.lora_alpha is None else self.lora_alpha / r, self.lora_dropout)
        adapter.mask[r:] = adapter.keep[r:] = False
        return adapter

    def training(self) -> Training:
        """The cycles."""
        allocator = AblationAllocator(
            "rank",
            self.n_prune,
            self.cycles,
            self.tinit,
            self.deltaT,
            self.harmless_tol if self.only_harmless else None,
            self.growth_seed,
            self.keep_best,
            self.rollback,
        )
        return Training(None, (allocator,), folding=two_factor_folding(ALoRAAdapter))
