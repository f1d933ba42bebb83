"""The cubic budget schedule of AdaLoRA and LoRA2: when masks are written, and how many entries they keep."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor

from lora2fx.errors import ScheduleError

# The published GLUE runs spend 9–17 % of their steps before the first mask and 43–58 % after the last.
INITIAL_FRACTION = 0.1
FINAL_FRACTION = 0.4
EVENTS = 1000


@dataclass(frozen=True)
class Phases:
    """A schedule with its run: budgets fall from step `initial` to step `final`, masks are written every `interval`.

    Steps count from 0. `forced` writes a mask at `final` whatever the interval.
    """

    initial: int
    final: int
    interval: int
    forced: bool = True

    def budget(self, step: int, start: int, target: int) -> int:
        """Entries to keep at a step: `start` up to `initial`, a cubic fall, `target` from `final` on."""
        if step <= self.initial:
            return start
        if step > self.final:
            return target
        left = 1 - (step - self.initial) / (self.final - self.initial)
        return floor(target + (start - target) * left**3)

    def is_event(self, step: int) -> bool:
        """Whether a mask is written after this step."""
        if step <= self.initial:
            return False
        return step > self.final or step % self.interval == 0 or (self.forced and step == self.final)

    def is_scored(self, step: int) -> bool:
        """Whether importance still moves at this step."""
        return step < self.final

    def is_final(self, step: int) -> bool:
        """Whether a mask written after this step is the last allocation."""
        return step >= self.final


@dataclass(frozen=True)
class CubicSchedule:
    """`tinit` steps without a mask, a cubic fall of the budget, `tfinal` steps with the final one.

    None takes a tenth, four tenths and a thousandth (at least 1) of the run's steps for `tinit`, `tfinal` and
    `deltaT`. `force_final_mask` writes the last allocation exactly `tfinal` steps before the end; without it that
    waits for the next multiple of `deltaT`, or for the step after, as the published code does.
    """

    tinit: int | None = None
    tfinal: int | None = None
    deltaT: int | None = None
    force_final_mask: bool = True

    def phases(self, total_steps: int) -> Phases:
        """The schedule over `total_steps`. Raises `ScheduleError` where it leaves no step for the budget to fall."""
        initial = int(INITIAL_FRACTION * total_steps) if self.tinit is None else self.tinit
        last = max(1, int(FINAL_FRACTION * total_steps)) if self.tfinal is None else self.tfinal
        interval = max(1, total_steps // EVENTS) if self.deltaT is None else self.deltaT
        if total_steps <= initial + last:
            raise ScheduleError(
                f"total_steps={total_steps} is too short for tinit={initial} and tfinal={last}: the budget falls in"
                f" the steps between them, so total_steps must be more than {initial + last}. Train longer, or pass a"
                " smaller tinit= or tfinal= to the method."
            )
        return Phases(initial, total_steps - last, interval, self.force_final_mask)
