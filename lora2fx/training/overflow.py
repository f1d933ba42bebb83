"""Steps that a `GradScaler` passes over: on overflow it doesn't call an unfused optimizer, so that no hook fires."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol
from weakref import ref

from torch.amp import GradScaler
from torch.optim import Optimizer


class Counted(Protocol):
    """What is told of skipped steps: `stepped` moves with every call of `optimizer`."""

    optimizer: Optimizer
    stepped: int

    def skip(self, steps: int = 1) -> None:
        """Steps that never came to the optimizer."""


def count_overflows(scaler: GradScaler, counted: Counted) -> Callable[[], None]:
    """Have `scaler.step(optimizer)` call `skip` where the optimizer was not called; returns what undoes it.

    The scaler has no hooks of its own: its step is replaced on this one object, as learning-rate schedulers do with
    an optimizer's.
    """
    step, found = scaler.step, ref(counted)

    def watched(optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        own = found()
        before = 0 if own is None else own.stepped
        result = step(optimizer, *args, **kwargs)
        if own is not None and own.optimizer is optimizer and own.stepped == before:
            own.skip()
        return result

    vars(scaler)["step"] = watched

    def undo() -> None:
        if vars(scaler).get("step") is watched:
            del vars(scaler)["step"]

    return undo
