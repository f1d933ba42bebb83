"""Drive a method's penalty, scores and masks from the optimizer's step hooks: once per real step, nothing forgotten."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from lora2fx.adapter import Adapter
from lora2fx.errors import AdapterError
from lora2fx.training.acceptance import check_length, refuse_partitioned, refuse_uncovered, stepping_optimizer
from lora2fx.training.agreement import check_ranks
from lora2fx.training.bank import Bank
from lora2fx.training.folded import Use, gradients_of
from lora2fx.training.gradients import add_gradients, copy_gradients, is_any_bad, is_initialisation, loss_scale
from lora2fx.training.overflow import count_overflows
from lora2fx.training.progress import (
    Adapters,
    Clock,
    Progress,
    adapter_list,
    check_total,
    new_counter,
    read_counters,
    schedule_status,
    set_total,
)
from lora2fx.training.sharing import Shared
from lora2fx.training.slots import Step, Training
from lora2fx.training.state import load_buffers, save_buffers

__all__ = ["Attachment", "schedule_status"]

_LOG = logging.getLogger(__name__)
_ATTACHED: WeakKeyDictionary[Adapter, ref[Attachment]] = WeakKeyDictionary()


def _is_attached(adapter: Adapter) -> bool:
    found = _ATTACHED.get(adapter)
    return found is not None and found() is not None


def _refuse_attached(adapters: tuple[Adapter, ...]) -> None:
    if any(_is_attached(adapter) for adapter in adapters):
        gc.collect()  # an optimizer that nobody holds any more, as after running a notebook's cell again
    for adapter in adapters:
        if _is_attached(adapter):
            raise AdapterError(
                f"the adapter of {adapter.site.weight} is attached already; a second attachment would prune twice a"
                " step. Call .detach() on the first."
            )


class Attachment:
    """Adapters attached to an optimizer: every real step of it, and nothing else, drives `training`.

    Before the step the penalty's gradient is added to the task's (after clipping, and not in the loss that is
    logged), after it masks are written. A step with a non-finite gradient changes nothing and is counted in
    `skipped`. All state is in the adapters' buffers (`progress`, masks, averages), so that a checkpoint of the
    model resumes by attaching again with the same `total_steps`.

    Raises `AdapterError` (attached already, parameters the optimizer doesn't hold) and `ScheduleError` (a schedule
    that doesn't fit, another run's length, LBFGS); then nothing is attached.

    A baseline has no adapters: its steps are counted, and kept from non-finite gradients, and that is all; the count
    is then the attachment's own, and starts anew in a resumed run.

    `scaler` is the loop's `GradScaler`, if it has one: an unfused optimizer isn't called on overflow, and such steps
    must be counted too. `evaluate` is for methods that score on a validation batch (ALoRA): set it to a function that
    returns -loss. `shared` are layers that read one input, to be computed together. `stepped` counts how often this
    process' optimizer was called.
    """

    def __init__(
        self,
        adapters: Adapters,
        training: Training,
        optimizer: Optimizer,
        total_steps: int,
        scaler: GradScaler | None = None,
        shared: Shared = (),
    ) -> None:
        self.adapters = adapter_list(adapters)
        self.training = training
        self.total_steps = total_steps
        if not self.adapters and training != Training(groups=training.groups):
            raise AdapterError("there are no adapters to attach: call lora2fx.transform(model, ...) first.")
        self._own_counter, self._clock = new_counter(), Clock()
        self.optimizer = stepping_optimizer(optimizer)
        check_length(total_steps)
        _refuse_attached(self.adapters)
        for adapter in self.adapters:
            refuse_partitioned(adapter)
        refuse_uncovered(self.adapters, self.optimizer)
        progress = read_counters(self._counters)
        if progress.done or progress.skipped:
            check_total(progress, total_steps)
        for allocator in training.allocators:
            allocator.check(self.adapters, total_steps)
        self.evaluate: Callable[[], float] | None = None
        self.stepped = 0
        self._current: Step | None = None
        self._withheld: list[tuple[Tensor, Tensor | None]] = []
        self._idle = False
        self._penalty: Tensor | None = None
        self._attach(scaler, shared)

    def _attach(self, scaler: GradScaler | None, shared: Shared) -> None:
        if self.step == 0:
            for allocator in self.training.allocators:
                allocator.begin(self.adapters, self.total_steps)
        set_total(self._counters, self.total_steps)
        for adapter in self.adapters:
            _ATTACHED[adapter] = ref(self)
        self._bank = Bank(self.adapters, self.training.folding, shared)
        self._undo = [
            self.optimizer.register_step_pre_hook(self._before).remove,
            self.optimizer.register_step_post_hook(self._after).remove,
        ]
        if scaler is not None:
            self._undo.append(count_overflows(scaler, self))

    def __repr__(self) -> str:
        """The step, what is kept of each shortened axis, and skipped steps."""
        kept = {axis: self._kept(axis) for axis in self.budgets}
        budgets = "".join(f", {axis} {count} (budget {self.budgets[axis]})" for axis, count in kept.items())
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return f"Attachment({len(self.adapters)} adapters, step {self.step} of {self.total_steps}{budgets}{skipped})"

    def detach(self) -> None:
        """Stop driving; the adapters keep their masks, averages and progress."""
        for undo in self._undo:
            undo()
        self._bank.close()
        for adapter in self.adapters:
            _ATTACHED.pop(adapter, None)

    @property
    def _counters(self) -> list[Tensor]:
        """The `progress` of every adapter, looked up each time: a checkpoint or a device may replace them."""
        return [cast(Tensor, adapter._buffers["progress"]) for adapter in self.adapters] or [self._own_counter]

    @property
    def step(self) -> int:
        """Optimiser steps done, skipped ones not counted."""
        return read_counters(self._counters).done

    @property
    def skipped(self) -> int:
        """Steps that a non-finite gradient turned into nothing."""
        return read_counters(self._counters).skipped

    @property
    def penalty(self) -> float | None:
        """The penalty that the last step descended; None without a penalty or before a step."""
        return None if self._penalty is None else float(self._penalty)

    @property
    def budgets(self) -> dict[str, int]:
        """Entries that each shortened axis may keep, over all adapters, as of the last step done."""
        last = max(0, self.step - 1)
        found = [allocator.budgets(self.adapters, last, self.total_steps) for allocator in self.training.allocators]
        return {axis: budget for budgets in found for axis, budget in budgets.items()}

    @property
    def budget(self) -> int | None:
        """The budget of the first shortened axis; None where nothing is pruned."""
        return next(iter(self.budgets.values()), None)

    @property
    def active(self) -> int:
        """Entries that the last allocation kept on the first shortened axis (the ranks where none is)."""
        if not self.adapters:
            return 0
        name = next(iter(self.budgets), None) or next(iter(self.adapters[0].axes()))
        return self._kept(name)

    def _kept(self, name: str) -> int:
        axes = [adapter.axes()[name] for adapter in self.adapters]
        return sum(int((axis.mask & axis.keep).sum()) for axis in axes)

    def skip(self, steps: int = 1) -> None:
        """Count steps that never came to the optimizer, where `scaler` was not given."""
        self._clock.count(self._counters, skipped=steps)

    def check_ranks(self, group: ProcessGroup | None = None) -> None:
        """Raise `AdapterError` where the processes' masks differ; every one of them must call it."""
        check_ranks(self.adapters, group)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the parameters, where the model's own buffers are not saved."""
        return {"total_steps": self.total_steps, "adapters": save_buffers(self.adapters)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict`; on another run's or model's `ScheduleError` or `AdapterError`, nothing changed."""
        check_total(Progress(0, state["total_steps"], 0), self.total_steps)
        load_buffers(self.adapters, state["adapters"])

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Prepare the step; where a closure computes the gradients, right after it has."""
        if len(args) > 1 and args[1] is not None:
            return (args[0], self._closure(args[1]), *args[2:]), kwargs
        if kwargs.get("closure") is not None:
            return args, kwargs | {"closure": self._closure(kwargs["closure"])}
        self._prepare()
        return None

    def _closure(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            loss = closure()
            self._prepare()
            return loss

        return evaluate

    def _prepare(self) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._idle = is_initialisation(parameters, self.optimizer)
        if self._idle:
            return
        uses = None if loss_scale(self.optimizer) is not None else self._bank.uses()
        progress = self._clock.read(self.adapters[0].progress if self.adapters else self._own_counter)
        check_total(progress, self.total_steps)
        if is_any_bad(gradients_of(parameters, uses or ()), self.optimizer):
            self._withhold(parameters)
            return
        task = self._copied() if self.training.sensitivity == "task" else None
        self._penalise(uses)
        if task is None:
            task = {} if loss_scale(self.optimizer) is None else self._copied()
        self._current = Step(progress.done, self.total_steps, task, self.optimizer, self.evaluate, progress.skipped)
        for allocator in self.training.allocators:
            allocator.before_step(self.adapters, self._current)

    def _trained(self) -> list[Tensor]:
        return [p for adapter in self.adapters for p in adapter.parameters() if p.requires_grad]

    def _copied(self) -> dict[int, Tensor]:
        return copy_gradients(self._trained(), self.optimizer)

    def _withhold(self, parameters: list[Tensor]) -> None:
        """Hide the gradients, so that the optimizer passes over every parameter and its state."""
        self._withheld = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            parameter.grad = None

    def _penalise(self, uses: list[Use] | None) -> None:
        """Add the penalty's gradient: to stacks in closed form, or by autograd, the reference, to any adapters."""
        if self.training.penalty is None:
            return
        if self._penalise_stacks(uses):
            return
        with torch.enable_grad():
            value = self.training.penalty(self.adapters)
        if value.requires_grad:
            trained = self._trained()
            add_gradients(trained, torch.autograd.grad(value, trained, allow_unused=True), self.optimizer)
        self._penalty = value.detach()

    def _penalise_stacks(self, uses: list[Use] | None) -> bool:
        folding = self.training.folding
        if folding is None or folding.penalise is None or loss_scale(self.optimizer) is not None:
            return False
        stacked = self._bank.gathered(folding.penalised) if uses is None else uses
        if stacked is None:
            return False
        with torch.no_grad():
            values = [folding.penalise(use, use.gradients, len(self.adapters)) for use in stacked]
            for use in stacked if uses is None else ():
                use.spread()
            self._penalty = values[0] if len(values) == 1 else torch.stack([v.to(values[0]) for v in values]).sum()
        return True

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.stepped += 1
        self._bank.expire()
        if self._idle:
            return
        step, self._current = self._current, None
        withheld, self._withheld = self._withheld, []
        for parameter, gradient in withheld:
            parameter.grad = gradient
        if step is None:
            self._clock.count(self._counters, skipped=1)
            _LOG.info("a step with a gradient that is not finite was skipped (after %d steps)", self.step)
            return
        for allocator in self.training.allocators:
            allocator.after_step(self.adapters, step)
        self._clock.count(self._counters, done=1)
