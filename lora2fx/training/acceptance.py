"""What can be attached to which optimizer: refusals, before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from lora2fx.adapter import Adapter
from lora2fx.errors import AdapterError, ScheduleError


def stepping_optimizer(optimizer: object) -> Optimizer:
    """The optimizer that steps: accelerate's fires no hooks of its own. Raises `ScheduleError` where it can't serve."""
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer):
        return stepping_optimizer(inner)
    if not isinstance(optimizer, Optimizer):
        raise ScheduleError(f"attach needs a torch.optim.Optimizer; {type(optimizer).__name__} is none.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ScheduleError(
            "LBFGS evaluates its closure several times a step, so that a step has no one gradient to score."
            " Use a first-order optimizer, such as torch.optim.AdamW."
        )
    return optimizer


def refuse_uncovered(adapters: Sequence[Adapter], optimizer: Optimizer) -> None:
    """Raise `AdapterError`, naming them, where trainable adapter parameters are not in the optimizer."""
    covered = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = [
        (f"{adapter.site.weight}: {name}", parameter)
        for adapter in adapters
        for name, parameter in adapter.named_parameters()
        if parameter.requires_grad
    ]
    missing = [name for name, parameter in trained if id(parameter) not in covered]
    if missing:
        shown = "; ".join(missing[:5]) + (f"; and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise AdapterError(
            f"{len(missing)} of {len(trained)} adapter parameters are not in the {type(optimizer).__name__} ({shown})."
            " Build the optimizer after transform, from every parameter that requires a gradient."
        )
    if any(hasattr(parameter, "ds_id") for _, parameter in trained):
        raise AdapterError(
            "DeepSpeed ZeRO-3 holds these adapters in parts that can't be scored; use ZeRO-1 or -2, FSDP2 or DDP."
        )


def check_length(total_steps: int) -> None:
    """Raise `ScheduleError` for a run that has no steps."""
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ScheduleError(
            f"total_steps={total_steps!r}: pass the number of optimizer steps of the whole run, at least 1"
            " (batches divided by gradient accumulation, times epochs)."
        )
