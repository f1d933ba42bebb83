"""Hugging Face accelerate: `attach` after `accelerator.prepare`, the loop as it is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from warnings import warn

from torch import nn, optim

from lora2fx.attachment import attach as attach_optimizer
from lora2fx.errors import AdapterError, Lora2fxWarning
from lora2fx.training.ablation import Evaluate
from lora2fx.training.driver import Attachment

if TYPE_CHECKING:
    from accelerate import Accelerator


def attach(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: optim.Optimizer,
    total_steps: int,
    evaluate: Evaluate | None = None,
) -> Attachment:
    """Drive the adapters of a prepared model from the prepared optimizer's real steps; see `lora2fx.attach`.

    `total_steps` counts optimizer steps of one process: batches of one process divided by the accumulation steps.
    Log with `accelerator.log(log_values(attachment), step)` (`lora2fx.training.logs`). `accelerator.save_state` and
    `load_state` hold all that a resumed run needs. `evaluate` is ALoRA's (see `Attachment`).
    Under mixed fp16 and bf16 the factors stay float32; steps that fp16 skips are counted.

    Raises what `lora2fx.attach` raises (`AdapterError`, `ScheduleError`), and `AdapterError` under DeepSpeed.
    Warns where FSDP was asked for and isn't what runs.

    Examples:
        >>> import torch
        >>> import lora2fx
        >>> from accelerate import Accelerator
        >>> from lora2fx.integrations.accelerate import attach
        >>> from torch import nn
        >>> model = lora2fx.transform(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), "0", lora2fx.LoRA(r=2))
        >>> accelerator = Accelerator(cpu=True)
        >>> model, optimizer = accelerator.prepare(model, torch.optim.AdamW(lora2fx.param_groups(model, lr=1e-3)))
        >>> attachment = attach(accelerator, model, optimizer, total_steps=4)
        >>> for _ in range(4):
        ...     accelerator.backward(model(torch.ones(4, 8)).square().mean())
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> attachment.step
        4
    """
    refuse_deepspeed(accelerator)
    warn_of_replicas(accelerator, os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true")
    attachment = attach_optimizer(model, optimizer, total_steps, accelerator.scaler)
    attachment.evaluate = evaluate
    return attachment


def refuse_deepspeed(accelerator: Accelerator) -> None:
    """Raise `AdapterError` where DeepSpeed's engine, which no hook reaches, steps the optimizer."""
    if accelerator.distributed_type == "DEEPSPEED":
        raise AdapterError(
            "accelerate was started with DeepSpeed, whose engine steps flat copies of the parameters: no adapter can be"
            " scored there. Start it with FSDP2 (fsdp_version: 2) or plain multi-GPU."
        )


def warn_of_replicas(accelerator: Accelerator, asked: bool) -> None:
    """Warn where FSDP was `asked` for and accelerate runs plain DDP instead, as it does on CPUs without a word."""
    if asked and accelerator.distributed_type != "FSDP":
        warn(
            f"FSDP was asked for, and accelerate runs {accelerator.distributed_type.value} here, without a word: every"
            " process holds the whole model. On CPUs shard it yourself with fully_shard (docs/training.md).",
            Lora2fxWarning,
            stacklevel=3,
        )
