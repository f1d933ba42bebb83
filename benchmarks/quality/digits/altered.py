"""LoRA² as a contestant that its own hyperparameters can't describe: paced, scored, placed or cut otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.quality.contestants import Evaluate, Ours, Setting, Trainee
from lora2fx import LoRA2
from lora2fx.adapter import Axis
from lora2fx.methods.lora2_factors import LoRA2Adapter
from lora2fx.program import program_of
from lora2fx.site import Site
from lora2fx.training.allocator import BudgetAllocator

SCORED = {
    "inner": (("v", -2), ("U", -1)),
    "both": (("u", -1), ("V", -2), ("v", -2), ("U", -1)),
}


@dataclass(frozen=True)
class Paced:
    """LoRA² whose factors learn at multiples of the rate, by the factor's name."""

    name: str
    method: LoRA2
    paces: Mapping[str, float]

    def begin(self, model: nn.Module, setting: Setting, evaluate: Evaluate) -> Trainee:
        """As `Ours`, with a group for each pace."""
        trainee = Ours(self.name, self.method).begin(model, setting, evaluate)
        for adapter in program_of(model, "pace").adapters.values():
            for name, pace in self.paces.items():
                _pace(trainee.optimizer, adapter.get_parameter(name), pace)
        return trainee


def _pace(optimizer: Optimizer, parameter: nn.Parameter, pace: float) -> None:
    """Move the parameter into a group of its own."""
    for group in list(optimizer.param_groups):
        if any(member is parameter for member in group["params"]):
            group["params"] = [member for member in group["params"] if member is not parameter]
            own = {key: value for key, value in group.items() if key != "params"}
            optimizer.add_param_group({**own, "params": [parameter], "lr": pace * group["lr"]})


class ScoredAdapter(LoRA2Adapter):
    """Columns count with other factors than the outer ones."""

    scored: tuple[tuple[str, int], ...]

    def axes(self) -> dict[str, Axis]:
        """The same axes, the columns scored otherwise."""
        found = super().axes()
        return found | {"columns": found["columns"]._replace(scored=self.scored)}


@dataclass(frozen=True)
class Scored(LoRA2):
    """LoRA² with `scored` as the importance of a column."""

    scored: tuple[tuple[str, int], ...] = field(default=SCORED["both"])

    def adapter(self, site: Site) -> LoRA2Adapter:
        """A fresh one."""
        found = ScoredAdapter(site, self.r, self.columns, self.lora_alpha / self.r, self.init, self.lora_dropout)
        found.scored = self.scored
        found.track(*(name for name, _ in self.scored))
        return found

    def _budgets(self) -> tuple[BudgetAllocator, ...]:
        return tuple(replace(own, tracked=tuple(name for name, _ in self.scored)) for own in super()._budgets())


@dataclass(frozen=True)
class Placed:
    """LoRA² on the first weight alone, with all of the budget's columns from the start and none pruned."""

    name: str
    method: LoRA2

    def begin(self, model: nn.Module, setting: Setting, evaluate: Evaluate) -> Trainee:
        """As `Ours`, on fewer targets."""
        return Ours(self.name, self.method).begin(model, replace(setting, targets=setting.targets[:1]), evaluate)


@dataclass(frozen=True)
class Truncated:
    """LoRA² whose columns are not scored: before the last phase the largest singular values of all ΔW are kept."""

    name: str
    method: LoRA2
    columns: int

    def begin(self, model: nn.Module, setting: Setting, evaluate: Evaluate) -> Trainee:
        """As `Ours`, cut once, four tenths of the steps before the end."""
        trainee = Ours(self.name, self.method).begin(model, setting, evaluate)
        adapters = [
            adapter for adapter in program_of(model, "cut").adapters.values() if isinstance(adapter, LoRA2Adapter)
        ]

        def cut(step: int) -> None:
            if step == setting.steps - int(0.4 * setting.steps):
                truncate(adapters, self.columns * len(adapters))

        return replace(trainee, after_step=cut)


@torch.no_grad()
def truncate(adapters: Sequence[LoRA2Adapter], budget: int) -> None:
    """Rewrite each ΔW as its singular directions, u orthonormal and the core the identity, and keep the largest."""
    parts = [torch.linalg.svd(adapter.delta(), full_matrices=False) for adapter in adapters]
    kept = [values[: adapter.u.shape[-1]] for adapter, (_, values, _) in zip(adapters, parts, strict=True)]
    least = torch.cat(kept).sort(descending=True).values[budget - 1]
    for adapter, (left, values, right) in zip(adapters, parts, strict=True):
        k = adapter.u.shape[-1]
        basis = torch.linalg.qr(adapter.v.mT).Q.mT
        adapter.u.copy_(left[:, :k])
        adapter.v.copy_(basis)
        adapter.lam.fill_(1)
        adapter.U.copy_(basis.mT)
        adapter.V.copy_(values[:k, None] * right[:k] / adapter.scale)
        for mask in (adapter.column_mask, adapter.column_keep):
            mask.copy_(values[:k] >= least)
