"""`param_groups` and `attach`: what a method asks of the optimizer, and what drives it from the optimizer's steps."""

from __future__ import annotations

from typing import Any

from torch import nn, optim
from torch.amp import GradScaler

from lora2fx.program import program_of
from lora2fx.training.acceptance import refuse_partitioned
from lora2fx.training.driver import Attachment
from lora2fx.training.groups import parameter_groups


def param_groups(
    model: nn.Module, lr: float, weight_decay: float | None = None, head_lr: float | None = None
) -> list[dict[str, Any]]:
    """What is trained in `model` as groups for the optimizer: `torch.optim.AdamW(lora2fx.param_groups(model, 1e-3))`.

    `factors` get `lr` and `weight_decay`, by default the method's (SoRA: 0.1, others 0). `gates` (λ, SoRA's g,
    SaLoRA's θ) get no decay, and the learning rate and eps that the method states. `heads` are the modules trained
    whole (`modules_to_save`), with `head_lr`, by default `lr`; their biases, and those of whatever else is trained
    (`others`), don't decay.
    Raises `AdapterError` where the model was not transformed.
    """
    program = program_of(model, "param_groups")
    saved = [program.root.get_submodule(path) for path in program.record.modules_to_save]
    heads = {parameter for module in saved for parameter in module.parameters()}
    return parameter_groups(model, lr, weight_decay, program.method.training().groups, heads, head_lr)


def attach(
    model: nn.Module, optimizer: optim.Optimizer, total_steps: int, scaler: GradScaler | None = None
) -> Attachment:
    """Drive the adapters of `model` from `optimizer`'s steps; nothing else in the training loop changes.

    `total_steps` counts optimizer steps, not batches. `scaler` is the loop's `GradScaler`, so that steps it passes
    over on overflow are counted. A resumed run attaches with the same number and goes on where the checkpoint's
    adapters are.
    Raises `AdapterError` (no adapters, attached already, adapter parameters missing from the optimizer or held in
    parts that can't be scored) and `ScheduleError` (a schedule that doesn't fit `total_steps`, an optimizer that
    can't be driven).
    """
    program = program_of(model, "attach")
    refuse_partitioned(model)
    return Attachment(program.adapters, program.method.training(), optimizer, total_steps, scaler)
