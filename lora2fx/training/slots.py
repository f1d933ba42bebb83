"""The slots that a method may fill beside its factorisation: penalty and budgets (score and schedule)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lora2fx.adapter import Adapter


class Penalty(Protocol):
    """A regulariser over all adapters; its gradient is added to the task's in every optimiser step."""

    def __call__(self, adapters: Sequence[Adapter]) -> Tensor:
        """A scalar."""


class Allocator(Protocol):
    """What changes adapters outside the optimiser: masks, thresholds, gates."""

    def check(self, adapters: Sequence[Adapter], total_steps: int) -> None:
        """Raise `ScheduleError` where the schedule doesn't fit the run."""

    def before_step(self, adapters: Sequence[Adapter], step: int, total_steps: int) -> None:
        """Gradients are final (accumulated, reduced, unscaled, clipped); parameters are still the old ones."""

    def after_step(self, adapters: Sequence[Adapter], step: int, total_steps: int) -> None:
        """Parameters are stepped; gradients are still there."""


@dataclass(frozen=True)
class Training:
    """What drives a method's adapters from step to step; empty for a method that only trains."""

    penalty: Penalty | None = None
    allocators: tuple[Allocator, ...] = ()
