"""How far a run came, kept in every adapter's `progress` buffer so that a checkpoint of the model knows it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora2fx.adapter import Adapter
from lora2fx.errors import AdapterError, ScheduleError
from lora2fx.training.slots import Training

Adapters = Mapping[str, Adapter] | Iterable[Adapter]


class Progress(NamedTuple):
    """Optimiser steps done, the run's length (0: never attached), steps skipped."""

    done: int
    total: int
    skipped: int


def adapter_list(adapters: Adapters) -> tuple[Adapter, ...]:
    """The adapters in registration order, with or without their names."""
    return tuple(adapters.values() if isinstance(adapters, Mapping) else adapters)


def new_counter() -> Tensor:
    """A `progress` of its own, for a run that has no adapters."""
    return torch.zeros(3, dtype=torch.int64)


def read_progress(adapters: Sequence[Adapter]) -> Progress:
    """The adapters' progress. Raises `AdapterError` where they disagree, as after loading half a checkpoint."""
    return read_counters([adapter.progress for adapter in adapters])


def read_counters(counters: Sequence[Tensor]) -> Progress:
    """The same of the `progress` buffers themselves."""
    found = {Progress(*counter.tolist()) for counter in counters}
    if len(found) != 1:
        steps = ", ".join(str(progress.done) for progress in sorted(found))
        raise AdapterError(
            f"the adapters disagree on the steps they were trained for ({steps}): some of them come from another"
            " checkpoint. Load one checkpoint into all of them."
        )
    return found.pop()


def check_total(progress: Progress, total_steps: int) -> None:
    """Raise `ScheduleError` where the adapters were driven over a run of another length."""
    if progress.total not in (0, total_steps):
        raise ScheduleError(
            f"these adapters are at step {progress.done} of a run of {progress.total} steps; their schedule can't go"
            f" on over total_steps={total_steps}. Attach with total_steps={progress.total}."
        )


class Clock:
    """What a `progress` buffer says, read again only where something else has written it, as a checkpoint's loading."""

    def __init__(self) -> None:
        self._counter: Tensor | None = None
        self._version = -1
        self._progress = Progress(0, 0, 0)

    def read(self, counter: Tensor) -> Progress:
        """The progress now."""
        if counter is not self._counter or counter._version != self._version:
            self._note(counter, Progress(*counter.tolist()))
        return self._progress

    def count(self, counters: Sequence[Tensor], done: int = 0, skipped: int = 0) -> None:
        """Add to every counter; the first is the one that is read."""
        before = self.read(counters[0])
        count(counters, done, skipped)
        self._note(counters[0], Progress(before.done + done, before.total, before.skipped + skipped))

    def _note(self, counter: Tensor, progress: Progress) -> None:
        self._counter, self._version, self._progress = counter, counter._version, progress


@torch.no_grad()
def count(counters: Sequence[Tensor], done: int = 0, skipped: int = 0) -> None:
    """Add to every counter."""
    steps = {device: torch.tensor([done, 0, skipped], device=device) for device in {own.device for own in counters}}
    torch._foreach_add_(list(counters), [steps[own.device] for own in counters])


def set_total(counters: Sequence[Tensor], total_steps: int) -> None:
    """Write the run's length into every counter."""
    for counter in counters:
        counter[1] = total_steps


def schedule_status(adapters: Adapters, training: Training) -> str | None:
    """Why the adapters' schedule is not at its end; None where it is, or where the method has none."""
    listed = adapter_list(adapters)
    if not training.allocators or not listed:
        return None
    done, total, skipped = read_progress(listed)
    if total == 0:
        return (
            "its pruning schedule was never driven: call lora2fx.attach(model, optimizer, total_steps=...) before"
            " training."
        )
    if done + skipped < total:
        missed = f", {skipped} of them skipped for a non-finite gradient" if skipped else ""
        mend = (
            "Train to the end, or attach with the number of steps that are really taken (pass a GradScaler as scaler=:"
            " the steps that it passes over count too)."
            if done + skipped
            else "Attach to the optimizer that the loop steps, and train."
        )
        return (
            f"its pruning schedule ended early: {done + skipped} of {total} optimizer steps were taken{missed}. {mend}"
        )
    if not all(allocator.finished(done, total) for allocator in training.allocators):
        return (
            f"its pruning schedule never reached its last allocation: {skipped} of {total} steps were skipped for a"
            " non-finite gradient, and skipped steps don't count."
        )
    return None
