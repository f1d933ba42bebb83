"""What can be attached to which optimizer: refusals, before anything is changed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from lora2fx.adapter import Adapter
from lora2fx.errors import AdapterError, ScheduleError


def _in_deepspeed(optimizer: object) -> bool:
    return type(optimizer).__module__.startswith("deepspeed.runtime.")


def stepping_optimizer(optimizer: object) -> Optimizer:
    """The optimizer that steps: accelerate's fires no hooks of its own. Raises `ScheduleError` where it can't serve."""
    inner = getattr(optimizer, "optimizer", None)
    if not _in_deepspeed(optimizer) and (isinstance(inner, Optimizer) or _in_deepspeed(inner)):
        return stepping_optimizer(inner)
    if _in_deepspeed(optimizer):
        raise ScheduleError(
            f"{type(optimizer).__name__} is stepped inside DeepSpeed's engine on flat copies of the parameters, where"
            " no adapter can be scored. Use torch's own fully_shard (FSDP2) or DistributedDataParallel."
        )
    if not isinstance(optimizer, Optimizer):
        raise ScheduleError(f"attach needs a torch.optim.Optimizer; {type(optimizer).__name__} is none.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ScheduleError(
            "LBFGS evaluates its closure several times a step, so that a step has no one gradient to score."
            " Use a first-order optimizer, such as torch.optim.AdamW."
        )
    return optimizer


def refuse_uncovered(adapters: Sequence[Adapter], optimizer: Optimizer) -> None:
    """Raise `AdapterError`, naming them, where adapter parameters are not in the optimizer, or none is trainable."""
    covered = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = [
        (f"{adapter.site.weight}: {name}", parameter)
        for adapter in adapters
        for name, parameter in adapter.named_parameters()
        if parameter.requires_grad
    ]
    if adapters and not trained:
        raise AdapterError(
            "no parameter of any adapter requires a gradient: they were frozen after transform, so that nothing would"
            " be trained and nothing could be scored. Call .requires_grad_(True) on them."
        )
    missing = [name for name, parameter in trained if id(parameter) not in covered]
    if missing:
        shown = "; ".join(missing[:5]) + (f"; and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise AdapterError(
            f"{len(missing)} of {len(trained)} adapter parameters are not in the {type(optimizer).__name__} ({shown})."
            " Build the optimizer after transform, from every parameter that requires a gradient."
        )


def refuse_partitioned(model: nn.Module) -> None:
    """Raise `AdapterError` where DeepSpeed ZeRO-3 or FSDP's first version holds parameters as flat parts.

    Those parts have neither the factors' shapes nor, on every process, an element of each: nothing could be scored.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise AdapterError(
                f"{name} is held in parts by DeepSpeed ZeRO-3, which can't be scored. Use torch's own fully_shard"
                " (FSDP2), or DistributedDataParallel where the model fits on one device."
            )
    flat = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    if flat is not None and any(isinstance(module, flat) for module in model.modules()):
        raise AdapterError(
            "FullyShardedDataParallel (FSDP's first version) holds the adapters as parts of flat vectors, which can't"
            " be scored. Use torch.distributed.fsdp.fully_shard (FSDP2; fsdp_version: 2 in accelerate's config)."
        )


def check_length(total_steps: int) -> None:
    """Raise `ScheduleError` for a run that has no steps."""
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ScheduleError(
            f"total_steps={total_steps!r}: pass the number of optimizer steps of the whole run, at least 1"
            " (batches divided by gradient accumulation, times epochs)."
        )
