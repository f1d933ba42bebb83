"""ALoRA's allocator (arXiv 2403.16187, Algorithm 1): in cycles, ranks move to where they count; the best stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, sqrt

import torch

from lora2fx.adapter import Adapter, Axis
from lora2fx.errors import ScheduleError
from lora2fx.sharding import like, whole
from lora2fx.training.ablation import Evaluate, ablation_scores, plan_shift
from lora2fx.training.moments import clear_moments
from lora2fx.training.remembering import (
    as_remembered,
    best_score,
    present,
    put_back,
    recall,
    remember,
    remembering,
)
from lora2fx.training.slots import Step


@dataclass(frozen=True)
class AblationAllocator:
    """After `first` steps and then every `every`, `cycles` times: drop the lowest entries, grow as many elsewhere.

    New ranks go to the adapters that lost none, into the spare entries of their factors; where every adapter lost
    one, the total shrinks. A new entry starts with a fresh row of A and a zero column of B, and no optimizer
    moments, so that ΔW doesn't change. `harmless` drops only entries whose loss costs no more than that (D ≤
    harmless); None drops unconditionally, as published.

    `keep_best` scores the model at each of these steps and on until the end, and ends with the best state. `rollback`
    undoes a cycle after which the model, `every` steps later, is worse than before it, and moves no rank after that.
    """

    axis: str
    drop: int | None
    cycles: int
    first: int | None
    every: int | None
    harmless: float | None
    seed: int
    keep_best: bool = True
    rollback: bool = False

    def check(self, adapters: Sequence[Adapter], total_steps: int) -> None:
        """Raise `ScheduleError` where the last cycle lies behind the run's end."""
        last = self._step_of(self.cycles - 1, total_steps)
        if last >= total_steps:
            raise ScheduleError(
                f"total_steps={total_steps} is too short for {self.cycles} cycles: the last one comes after step"
                f" {last}. Train longer, or lower cycles=, tinit= or deltaT=."
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

    @torch.no_grad()
    def after_step(self, adapters: Sequence[Adapter], step: Step) -> None:
        """Score the model where that is due, remember or undo, and run a cycle where one is due."""
        boundary = self._boundary(step)
        if step.evaluate is None or not self._is_due(adapters, boundary, step.last):
            return
        score = step.evaluate()
        if self.keep_best or self.rollback:
            self._judge(adapters, step, boundary, as_remembered(adapters, score))
        if boundary is not None and boundary < self.cycles and not self._is_settled(adapters):
            self._move(adapters, step, boundary, score)
        if step.last and self.keep_best:
            self._settle_for_best(adapters, step.evaluate)

    def budgets(self, adapters: Sequence[Adapter], step: int, total_steps: int) -> dict[str, int]:
        """None: the total is what was started from, or less."""
        return {}

    def finished(self, step: int, total_steps: int) -> bool:
        """Whether the last cycle was run."""
        return step >= self._step_of(self.cycles - 1, total_steps)

    def finish(self, adapters: Sequence[Adapter]) -> None:
        """The best state, where one is remembered that the run didn't end to choose."""
        if self.keep_best and best_score(adapters) is not None:
            recall(adapters)

    def _step_of(self, cycle: int, total_steps: int) -> int:
        first = max(1, total_steps // 10) if self.first is None else self.first
        return first + cycle * self._interval(total_steps)

    def _interval(self, total_steps: int) -> int:
        return max(1, total_steps // 40) if self.every is None else self.every

    def _boundary(self, step: Step) -> int | None:
        """How many boundaries lie before this one, if one is due after this step."""
        since = step.index + 1 - self._step_of(0, step.total)
        interval = self._interval(step.total)
        return since // interval if since >= 0 and since % interval == 0 else None

    def _is_settled(self, adapters: Sequence[Adapter]) -> bool:
        return bool(remembering(adapters[0]).settled)

    def _is_due(self, adapters: Sequence[Adapter], boundary: int | None, last: bool) -> bool:
        """Whether the model is to be scored: for its memory, for a cycle, or for the verdict on the last one."""
        if self.keep_best and (last or boundary is not None):
            return True
        return boundary is not None and boundary < self.cycles + self.rollback and not self._is_settled(adapters)

    def _judge(self, adapters: Sequence[Adapter], step: Step, boundary: int | None, score: float) -> None:
        """Remember the state if it is the best; undo the last cycle, and all further ones, if it made things worse."""
        best = best_score(adapters)
        after_cycle = boundary is not None and 1 <= boundary <= self.cycles and not self._is_settled(adapters)
        if best is not None and self.rollback and after_cycle and not score >= best:
            recall(adapters)
            for adapter in map(remembering, adapters):
                adapter.settled.fill_(True)
        elif isfinite(score) and (best is None or score > best or (self.rollback and after_cycle)):
            remember(adapters, step.index + 1, score)

    def _settle_for_best(self, adapters: Sequence[Adapter], evaluate: Evaluate) -> None:
        """End with the best state, unless what was trained beside the adapters has moved away from it."""
        if best_score(adapters) is None:
            return
        now, before = evaluate(), present(adapters)
        recall(adapters)
        if evaluate() < now:
            put_back(adapters, before)
        for adapter in map(remembering, adapters):
            adapter.best_step.zero_()

    def _move(self, adapters: Sequence[Adapter], step: Step, cycle: int, score: float) -> None:
        assert step.evaluate is not None
        axes = [adapter.axes()[self.axis] for adapter in adapters]
        shift = plan_shift(axes, ablation_scores(axes, step.evaluate, score), self.drop, self.harmless)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + cycle)
        for adapter, axis, kept, grown in zip(adapters, axes, shift.kept, shift.grown, strict=True):
            axis.mask.logical_and_(kept.to(axis.mask.device))
            _grow(adapter, axis, grown, step, generator)
            axis.keep.copy_(axis.mask)


def _grow(adapter: Adapter, axis: Axis, count: int, step: Step, generator: torch.Generator) -> None:
    """Switch on `count` spare entries: A's rows U(-1/√in, 1/√in), B's columns 0, no moments."""
    slots = (~axis.mask).nonzero().flatten()[:count]
    old = torch.ones_like(axis.mask).index_fill_(0, slots, False)
    for name, dim in axis.along:
        parameter = adapter.get_parameter(name)
        clear_moments(step.optimizer, parameter, dim, old)
        value = whole(parameter.detach())
        fresh = torch.zeros_like(value.index_select(dim, slots), device="cpu")
        if name == "A":
            bound = 1 / sqrt(adapter.site.in_features)
            fresh.uniform_(-bound, bound, generator=generator)
        grown = value.index_copy(value.dim() + dim, slots, fresh.to(value))
        parameter.copy_(like(grown, parameter))
    axis.mask.index_fill_(0, slots, True)
