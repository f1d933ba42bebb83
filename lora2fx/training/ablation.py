"""ALoRA's AB-LoRA (arXiv 2403.16187, eq. 6, Algorithm 1): ranks are scored by ablation and move to where they count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor
from torch.optim import Optimizer

from lora2fx.adapter import Adapter, Axis
from lora2fx.errors import ScheduleError
from lora2fx.training.allocator import keep_highest
from lora2fx.training.slots import Step

Evaluate = Callable[[], float]


@torch.no_grad()
def ablation_scores(axes: Sequence[Axis], evaluate: Evaluate) -> list[tuple[Tensor, Tensor]]:
    """By axis, over its entries: IS(ρ) = S(M) - S(M without ρ) + S(M with ρ alone), and D = S(M) - S(M without ρ).

    S is what `evaluate` returns. Entries that are off get +inf. Costs two evaluations an entry, and one.
    """
    masks = [axis.mask.clone() for axis in axes]
    whole = evaluate()
    scores = [(torch.full(mask.shape, torch.inf), torch.full(mask.shape, torch.inf)) for mask in masks]
    try:
        for axis, mask, (importance, damage) in zip(axes, masks, scores, strict=True):
            for entry in mask.nonzero().flatten().tolist():
                axis.mask[entry] = False
                damage[entry] = whole - evaluate()
                for other in axes:
                    other.mask.fill_(False)
                axis.mask[entry] = True
                importance[entry] = damage[entry] + evaluate()
                _restore(axes, masks)
    finally:
        _restore(axes, masks)
    return scores


def _restore(axes: Sequence[Axis], masks: Sequence[Tensor]) -> None:
    for axis, mask in zip(axes, masks, strict=True):
        axis.mask.copy_(mask)


def shares(count: int, averages: Sequence[float], room: Sequence[int]) -> list[int]:
    """`count` new entries over modules as evenly as their room allows, the remainder to the highest averages."""
    given = [0] * len(room)
    order = sorted(range(len(room)), key=lambda i: -averages[i])
    while count and any(given[i] < room[i] for i in order):
        for i in order:
            if count and given[i] < room[i]:
                given[i] += 1
                count -= 1
    return given


@dataclass(frozen=True)
class AblationAllocator:
    """After `first` steps and then every `every`, `cycles` times: drop the lowest entries, grow as many elsewhere.

    New ranks go to the adapters that lost none, into the spare entries of their factors; where every adapter lost
    one, the total shrinks. A new entry starts with a fresh row of A and a zero column of B, and no optimizer
    moments, so that ΔW doesn't change. `harmless` drops only entries whose loss costs no more than that (D ≤
    harmless); None drops unconditionally, as published.
    """

    axis: str
    drop: int | None
    cycles: int
    first: int | None
    every: int | None
    harmless: float | None
    seed: int

    def check(self, adapters: Sequence[Adapter], total_steps: int) -> None:
        """Raise `ScheduleError` where the last cycle lies behind the run's end."""
        if self._steps(total_steps)[-1] >= total_steps:
            raise ScheduleError(
                f"total_steps={total_steps} is too short for {self.cycles} cycles: the last one comes after step"
                f" {self._steps(total_steps)[-1]}. Train longer, or lower cycles=, tinit= or deltaT=."
            )

    def begin(self, adapters: Sequence[Adapter], total_steps: int) -> None:
        """Nothing: the budget is met from the start."""

    def before_step(self, adapters: Sequence[Adapter], step: Step) -> None:
        """Raise `ScheduleError`, before anything moves, where there is nothing to evaluate with."""
        if step.evaluate is None:
            raise ScheduleError(
                "ALoRA scores ranks on a validation batch: after attach, set attachment.evaluate to a function that"
                " returns -loss of one fixed batch in eval mode."
            )

    def after_step(self, adapters: Sequence[Adapter], step: Step) -> None:
        """Run a cycle where one is due."""
        steps = self._steps(step.total)
        if step.index + 1 in steps and step.evaluate is not None:
            self._cycle(adapters, step, steps.index(step.index + 1))

    def budgets(self, adapters: Sequence[Adapter], step: int, total_steps: int) -> dict[str, int]:
        """None: the total is what was started from, or less."""
        return {}

    def finished(self, step: int, total_steps: int) -> bool:
        """Whether the last cycle was run."""
        return step >= self._steps(total_steps)[-1]

    def _steps(self, total_steps: int) -> list[int]:
        first = max(1, total_steps // 10) if self.first is None else self.first
        every = max(1, total_steps // 40) if self.every is None else self.every
        return [first + cycle * every for cycle in range(self.cycles)]

    @torch.no_grad()
    def _cycle(self, adapters: Sequence[Adapter], step: Step, cycle: int) -> None:
        assert step.evaluate is not None
        axes = [adapter.axes()[self.axis] for adapter in adapters]
        scores = ablation_scores(axes, step.evaluate)
        before = [int(axis.mask.sum()) for axis in axes]
        dropped = self._drop(axes, scores, sum(before))
        spared = [i for i, count in enumerate(dropped) if count == 0]
        averages = [float(scores[i][0][axes[i].mask.cpu()].mean()) if before[i] else -torch.inf for i in spared]
        room = [axes[i].mask.numel() - before[i] for i in spared]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + cycle)
        for i, count in zip(spared, shares(sum(dropped), averages, room), strict=True):
            _grow(adapters[i], axes[i], count, step.optimizer, generator)
        for axis in axes:
            axis.keep.copy_(axis.mask)

    def _drop(self, axes: Sequence[Axis], scores: Sequence[tuple[Tensor, Tensor]], active: int) -> list[int]:
        count = max(1, active // 8) if self.drop is None else self.drop
        candidates = [
            importance if self.harmless is None else importance.masked_fill(damage > self.harmless, torch.inf)
            for importance, damage in scores
        ]
        open_to_drop = sum(int(candidate.isfinite().sum()) for candidate in candidates)
        entries = sum(axis.mask.numel() for axis in axes)
        dropped = []
        for axis, keep in zip(axes, keep_highest(candidates, entries - min(count, open_to_drop)), strict=True):
            dropped.append(int((~keep).sum()))
            axis.mask.logical_and_(keep.to(axis.mask.device))
        return dropped


def _grow(adapter: Adapter, axis: Axis, count: int, optimizer: Optimizer | None, generator: torch.Generator) -> None:
    """Switch on `count` spare entries: A's rows U(-1/√in, 1/√in), B's columns 0."""
    slots = (~axis.mask).nonzero().flatten()[:count]
    for name, dim in axis.along:
        parameter = adapter.get_parameter(name)
        state = {} if optimizer is None else optimizer.state.get(parameter, {})
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.index_fill_(dim, slots, 0)
        fresh = torch.zeros_like(parameter.index_select(dim, slots), device="cpu")
        if name == "A":
            bound = 1 / sqrt(adapter.site.in_features)
            fresh.uniform_(-bound, bound, generator=generator)
        parameter.index_copy_(parameter.dim() + dim, slots, fresh.to(parameter))
    axis.mask.index_fill_(0, slots, True)
