"""SaLoRA's budget (Mathematics 2023, 11, 4317; eqs. 11, 12): a target density that a Lagrangian multiplier enforces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from lora2fx.adapter import Adapter
from lora2fx.errors import ScheduleError
from lora2fx.sharding import whole
from lora2fx.training.hard_concrete import HardConcrete
from lora2fx.training.schedule import CubicSchedule, Phases
from lora2fx.training.slots import Step

Lagrangian = Literal["quadratic", "linear_quadratic"]
LAGRANGIANS = ("quadratic", "linear_quadratic")
EDGE = 1e-6


class GatedAdapter(Protocol):
    """What an adapter with Hard-Concrete gates offers: their logits, multipliers, and the noise of the next step."""

    log_theta: Tensor
    multipliers: Tensor
    mask: Tensor
    keep: Tensor

    def set_noise(self, noise: Tensor | None) -> None:
        """Train with this noise; None trains with the evaluation gate."""


def gated(adapter: Adapter) -> GatedAdapter:
    """The adapter, whose gates these are."""
    return cast(GatedAdapter, adapter)


@dataclass(frozen=True)
class DensityTarget:
    """The density to reach: `final`, or from 1 down to it in equal parts over `warmup` steps after the window opens."""

    final: float
    schedule: CubicSchedule
    warmup: int = 0

    def now(self, adapters: Sequence[Adapter]) -> float:
        """The target at the step that the adapters are at."""
        if not self.warmup:
            return self.final
        done, total = adapters[0].progress.tolist()[:2]
        since = done - self.schedule.phases(total).initial if total else 0
        return 1 + (self.final - 1) * min(max(since / self.warmup, 0.0), 1.0)


def density(adapters: Sequence[Adapter], gates: HardConcrete) -> Tensor:
    """The share of factor entries whose gate is expected to be open, over all adapters, in [0, 1]; a scalar."""
    open_entries, entries = [], 0
    device = adapters[0].progress.device
    for adapter in adapters:
        cost = adapter.site.in_features + adapter.site.out_features
        probability = gates.probability(whole(gated(adapter).log_theta))
        open_entries.append(probability.sum().to(device) * cost)
        entries += probability.numel() * cost
    return torch.stack(open_entries).sum() / entries


@dataclass(frozen=True)
class DensityPenalty:
    """μ·(C - b)², or μ₁·(C - b) + μ₂·(C - b)², of the density C and its target b; the multipliers are buffers."""

    target: DensityTarget
    gates: HardConcrete
    form: Lagrangian

    def __call__(self, adapters: Sequence[Adapter]) -> Tensor:
        """A scalar."""
        gap = density(adapters, self.gates) - self.target.now(adapters)
        linear, quadratic = gated(adapters[0]).multipliers.clone().unbind()
        return (linear * gap if self.form == "linear_quadratic" else 0.0) + quadratic * gap.square()


@dataclass(frozen=True)
class DensityWindow:
    """Sample gates until the final phase, move them and the multipliers after `tinit` steps, then fix them.

    Outside the window the gates' gradients are dropped. The multipliers ascend at `multiplier_lr`; the quadratic
    one stays at 0 or above. Noise comes from a generator seeded with (seed, step), the same on every worker.
    """

    target: DensityTarget
    gates: HardConcrete
    form: Lagrangian
    multiplier_lr: float
    seed: int

    def check(self, adapters: Sequence[Adapter], total_steps: int) -> None:
        """Raise `ScheduleError` where the window has no step, or ends before the target's warm-up."""
        phases = self._phases(total_steps)
        if self.target.warmup > phases.final - phases.initial:
            raise ScheduleError(
                f"density_warmup={self.target.warmup} steps are more than the {phases.final - phases.initial} in which"
                f" gates move, of total_steps={total_steps}. Lower it, or train longer."
            )

    def begin(self, adapters: Sequence[Adapter], total_steps: int) -> None:
        """The first step's noise."""
        self._draw(adapters, 0, self._phases(total_steps))

    def before_step(self, adapters: Sequence[Adapter], step: Step) -> None:
        """Outside the window the gates stand still."""
        phases = self._phases(step.total)
        if not phases.initial <= step.index < phases.final:
            for adapter in adapters:
                gated(adapter).log_theta.grad = None

    @torch.no_grad()
    def after_step(self, adapters: Sequence[Adapter], step: Step) -> None:
        """Ascend, draw the next step's noise; where the window ends, what is shut stays shut."""
        phases = self._phases(step.total)
        if phases.initial <= step.index < phases.final:
            self._ascend(adapters)
        if step.index + 1 == phases.final:
            self.finish(adapters)
        self._draw(adapters, step.index + 1, phases)

    def budgets(self, adapters: Sequence[Adapter], step: int, total_steps: int) -> dict[str, int]:
        """None: the density is a soft constraint."""
        return {}

    def finished(self, step: int, total_steps: int) -> bool:
        """Whether the gates were fixed."""
        return step >= self._phases(total_steps).final

    @torch.no_grad()
    def finish(self, adapters: Sequence[Adapter]) -> None:
        """What is shut in evaluation is pruned, and what was pruned stays so."""
        for adapter in map(gated, adapters):
            opened = self.gates.evaluation_gate(whole(adapter.log_theta)) != 0
            adapter.keep.copy_(adapter.mask & (opened if opened.dim() == 1 else opened.any(0)))
            adapter.mask.copy_(adapter.keep)

    def _phases(self, total_steps: int) -> Phases:
        return self.target.schedule.phases(total_steps)

    def _ascend(self, adapters: Sequence[Adapter]) -> None:
        gap = density(adapters, self.gates) - self.target.now(adapters)
        linear = gap if self.form == "linear_quadratic" else torch.zeros_like(gap)
        rise = self.multiplier_lr * torch.stack([linear, gap.square()])
        for adapter in adapters:
            multipliers = gated(adapter).multipliers
            multipliers.add_(rise.to(multipliers))
            multipliers[1].clamp_(min=0)

    def _draw(self, adapters: Sequence[Adapter], step: int, phases: Phases) -> None:
        if step >= phases.final:
            for adapter in adapters:
                gated(adapter).set_noise(None)
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        sizes = [gated(adapter).log_theta.numel() for adapter in adapters]
        noise = torch.rand(sum(sizes), generator=generator, dtype=torch.float64).clamp(EDGE, 1 - EDGE)
        for adapter, own in zip(adapters, torch.split(noise, sizes), strict=True):
            gated(adapter).set_noise(own.view(gated(adapter).log_theta.shape))
