"""The slots that a method may fill beside its factorisation: penalty and allocators (score and schedule)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lora2fx.adapter import Adapter
from lora2fx.errors import ScheduleError
from lora2fx.training.bank import Folding

Sensitivity = Literal["total", "task"]
SENSITIVITIES = ("total", "task")


@dataclass(frozen=True)
class Step:
    """One real optimiser step: its index t, the run's length T, and the final gradients.

    Final means accumulated, reduced, unscaled and clipped. `snapshot` holds, by the parameter's id, the gradients
    that are not what `.grad` holds. `evaluate` returns the model's -loss on the user's validation batch. `skipped`
    counts the steps before this one that a non-finite gradient turned into nothing; `index` doesn't.
    """

    index: int
    total: int
    snapshot: Mapping[int, Tensor] = field(default_factory=dict)
    optimizer: Optimizer | None = None
    evaluate: Callable[[], float] | None = None
    skipped: int = 0

    @property
    def last(self) -> bool:
        """Whether the run has no step after this one."""
        return self.index + self.skipped + 1 >= self.total

    def gradient(self, parameter: Tensor) -> Tensor:
        """The gradient that scores read, like the parameter; a missing one is zero."""
        return self.gradients([parameter])[0]

    def gradients(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """That of each parameter."""
        if self.snapshot:
            found = [self.snapshot.get(id(parameter), parameter.grad) for parameter in parameters]
        else:
            found = [parameter.grad for parameter in parameters]
        return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, found, strict=True)]

    def group(self, parameter: Tensor) -> Mapping[str, Any]:
        """The optimizer's group that holds the parameter: its learning rate, weight decay, ... in this step."""
        groups = () if self.optimizer is None else self.optimizer.param_groups
        for group in groups:
            if any(member is parameter for member in group["params"]):
                return group
        raise ScheduleError("a parameter that is thresholded is in none of the optimizer's groups.")


class Penalty(Protocol):
    """A regulariser over all adapters; its gradient is added to the task's in every optimiser step."""

    def __call__(self, adapters: Sequence[Adapter]) -> Tensor:
        """A scalar."""


class Allocator(Protocol):
    """What changes adapters outside the optimiser: masks, thresholds, gates."""

    def check(self, adapters: Sequence[Adapter], total_steps: int) -> None:
        """Raise `ScheduleError` where the schedule doesn't fit the run."""

    def begin(self, adapters: Sequence[Adapter], total_steps: int) -> None:
        """A run starts, at its first step; not where a checkpoint is taken up."""

    def before_step(self, adapters: Sequence[Adapter], step: Step) -> None:
        """Gradients are final; parameters are still the old ones."""

    def after_step(self, adapters: Sequence[Adapter], step: Step) -> None:
        """Parameters are stepped; gradients are still there."""

    def budgets(self, adapters: Sequence[Adapter], step: int, total_steps: int) -> dict[str, int]:
        """How many entries each axis that this allocator shortens may keep at a step."""

    def finished(self, step: int, total_steps: int) -> bool:
        """Whether nothing is left to allocate once `step` steps are done."""

    def finish(self, adapters: Sequence[Adapter]) -> None:
        """Make the last allocation take effect, wherever the run ended; twice is once."""


@dataclass(frozen=True)
class Groups:
    """What a method asks of the optimizer, beside the learning rate that the user gives it.

    `weight_decay` is the factors' where the user names none. Gates and singular values step at `gate_lr` times the
    factors' learning rate, with Adam's `gate_eps` (None: the optimizer's own), and decay only where `gate_decay`.
    """

    weight_decay: float = 0.0
    gate_lr: float = 1.0
    gate_decay: bool = False
    gate_eps: float | None = None


@dataclass(frozen=True)
class Training:
    """What drives a method's adapters from step to step; empty for a method that only trains.

    `sensitivity` says which gradient scores read: the task's alone, or the total with the penalty's. `folding` folds
    many adapters at once, for the eager form of their sites.
    """

    penalty: Penalty | None = None
    allocators: tuple[Allocator, ...] = ()
    sensitivity: Sensitivity = "total"
    groups: Groups = Groups()
    folding: Folding | None = None
