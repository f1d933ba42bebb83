"""A budget over one axis of all adapters: score every entry, keep exactly as many as the schedule allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lora2fx.adapter import Adapter, Axis
from lora2fx.errors import ScheduleError
from lora2fx.sharding import all_like
from lora2fx.training.importance import axis_importance, update_averages
from lora2fx.training.moments import clear_moments
from lora2fx.training.schedule import CubicSchedule
from lora2fx.training.slots import Step

Score = Callable[[Sequence[Adapter], str], list[Tensor]]
ScoreTiming = Literal["post_step", "pre_step"]
TIMINGS = ("post_step", "pre_step")
Scope = Literal["global", "local"]
SCOPES = ("global", "local")


def keep_highest(scores: Sequence[Tensor], budget: int, living: Sequence[Tensor] | None = None) -> list[Tensor]:
    """A bool mask for each score tensor; together they keep exactly `budget` entries, the highest.

    Of equal scores the later one is kept (a stable sort, tensors in order). A budget above the number of entries
    keeps all of them, one below 0 none. What is not `living`, as the forward masks it, comes last: it can't earn
    importance any more, and must not take a living entry's place.
    """
    device = scores[0].device
    flat = torch.cat([score.to(device, scores[0].dtype) for score in scores])
    if living is not None:
        flat = flat.masked_fill(~torch.cat([mask.to(device) for mask in living]), -torch.inf)
    dropped = flat.argsort(stable=True)[: max(0, flat.numel() - max(0, budget))]
    keep = torch.ones_like(flat, dtype=torch.bool).index_fill_(0, dropped, False)
    parts = torch.split(keep, [score.numel() for score in scores])
    return [part.to(score.device) for part, score in zip(parts, scores, strict=True)]


def _as(model: Tensor, keeps: Sequence[Tensor]) -> list[Tensor]:
    """The masks as numbers of the model's dtype, in one conversion where they are on one device."""
    if len({keep.device for keep in keeps}) > 1:
        return [keep.to(model.dtype) for keep in keeps]
    return list(torch.cat(list(keeps)).to(model.dtype).split([keep.numel() for keep in keeps]))


@torch.no_grad()
def write_allocations(axes: Sequence[Axis], keeps: Sequence[Tensor], final: bool) -> None:
    """Record the allocation of each axis, and make it take effect.

    Where an axis has a value, the pruned entries of that value become 0 and may grow back; only the `final`
    allocation goes into the mask. Where it has none, every allocation does.
    """
    kept = list(keeps)
    torch._foreach_copy_([axis.keep for axis in axes], kept)
    pairs = [(axis.value, keep) for axis, keep in zip(axes, kept, strict=True) if axis.value is not None]
    if pairs:
        values = [value for value, _ in pairs]
        own = _as(values[0], [keep for _, keep in pairs])
        torch._foreach_mul_(values, all_like(own, values))
    masks = [(axis.mask, keep) for axis, keep in zip(axes, kept, strict=True) if final or axis.value is None]
    if masks:
        torch._foreach_copy_([mask for mask, _ in masks], [keep for _, keep in masks])


@dataclass(frozen=True)
class BudgetAllocator:
    """Keep `target` entries of the axis in an adapter: on average, over all adapters together, or in each (`local`).

    `tracked` are the parameters whose moving averages `score` reads. Scores move until the final phase, after the
    optimiser's step with that step's gradient (`post_step`, the published order) or before it (`pre_step`). With
    `reset_moments` a zeroed value starts again without the optimizer's moments, which else carry it on. A local
    target above what an adapter holds keeps all of that.
    """

    axis: str
    target: float
    schedule: CubicSchedule
    tracked: tuple[str, ...]
    score: Score = axis_importance
    beta1: float = 0.85
    beta2: float = 0.85
    score_timing: ScoreTiming = "post_step"
    scope: Scope = "global"
    reset_moments: bool = False

    def check(self, adapters: Sequence[Adapter], total_steps: int) -> None:
        """Raise `ScheduleError` where an adapter lacks what is read, the run is too short, or the target too high."""
        for adapter in adapters:
            self._check_adapter(adapter)
        self.schedule.phases(total_steps)
        start, target = self._ends(self._axes(adapters))
        if target > start and self.scope == "global":
            raise ScheduleError(
                f"the budget of axis {self.axis!r} is {self.target:g} entries in each of {len(adapters)} adapters,"
                f" {target} in all, but they hold only {start}. Lower the target or start from more entries."
            )

    def _check_adapter(self, adapter: Adapter) -> None:
        name, axes = type(adapter).__name__, adapter.axes()
        if self.axis not in axes:
            raise ScheduleError(
                f"{name}.axes() has no axis {self.axis!r}, which is to be shortened; it has {list(axes)}."
            )
        if self.score is axis_importance and not axes[self.axis].scored:
            raise ScheduleError(
                f"the axis {self.axis!r} of {name} names no parameter whose importance is an entry's: pass it, as in"
                ' Axis(mask, keep, scored=(("d", -1),)), where -1 is the dimension that runs along the axis.'
            )
        buffers = {buffer for buffer, _ in adapter.named_buffers()}
        missing = [each for each in self.tracked if f"{each}_sensitivity" not in buffers]
        if missing:
            raise ScheduleError(
                f"{name} keeps no averages of {missing[0]!r}: call self.track({missing[0]!r}) in __init__."
            )

    def begin(self, adapters: Sequence[Adapter], total_steps: int) -> None:
        """Nothing: masks and averages start as they are."""

    def before_step(self, adapters: Sequence[Adapter], step: Step) -> None:
        """Move the scores, where they are taken before the step."""
        if self.score_timing == "pre_step":
            self._score(adapters, step)

    def after_step(self, adapters: Sequence[Adapter], step: Step) -> None:
        """Move the scores, where they are taken after the step, then write a mask if one is due."""
        if self.score_timing == "post_step":
            self._score(adapters, step)
        phases = self.schedule.phases(step.total)
        if phases.is_event(step.index):
            final = phases.is_final(step.index)
            for pool in self._pools(adapters):
                axes = self._axes(pool)
                budget = phases.budget(step.index, *self._ends(axes))
                self._allocate(pool, axes, budget, final, step.optimizer)

    def budgets(self, adapters: Sequence[Adapter], step: int, total_steps: int) -> dict[str, int]:
        """The axis' budget at a step."""
        phases = self.schedule.phases(total_steps)
        return {self.axis: sum(phases.budget(step, *self._ends(self._axes(pool))) for pool in self._pools(adapters))}

    def finished(self, step: int, total_steps: int) -> bool:
        """Whether the last allocation was written."""
        phases = self.schedule.phases(total_steps)
        return any(phases.is_event(t) for t in range(phases.final, step))

    def finish(self, adapters: Sequence[Adapter]) -> None:
        """The last allocation, for good: what may have grown back since is 0 again."""
        axes = self._axes(adapters)
        write_allocations(axes, [axis.keep.clone() for axis in axes], final=True)

    def _pools(self, adapters: Sequence[Adapter]) -> list[Sequence[Adapter]]:
        """The adapters that share a budget."""
        return [adapters] if self.scope == "global" else [[adapter] for adapter in adapters]

    def _axes(self, pool: Sequence[Adapter]) -> list[Axis]:
        return [adapter.axes()[self.axis] for adapter in pool]

    def _ends(self, axes: Sequence[Axis]) -> tuple[int, int]:
        start = sum(axis.mask.numel() for axis in axes)
        target = round(self.target * len(axes))
        return start, target if self.scope == "global" else min(target, start)

    def _score(self, adapters: Sequence[Adapter], step: Step) -> None:
        if self.schedule.phases(step.total).is_scored(step.index):
            update_averages(adapters, self.tracked, step, self.beta1, self.beta2)

    def _allocate(
        self, pool: Sequence[Adapter], axes: Sequence[Axis], budget: int, final: bool, optimizer: Optimizer | None
    ) -> None:
        keeps = keep_highest(self.score(pool, self.axis), budget, [axis.mask for axis in axes])
        write_allocations(axes, keeps, final)
        for axis, keep in zip(axes, keeps, strict=True) if self.reset_moments else ():
            if axis.value is not None:
                clear_moments(optimizer, axis.value, -1, keep)
