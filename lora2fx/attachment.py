"""`attach`: one line that drives a method's penalty, scores and masks from the optimizer's own steps."""

from __future__ import annotations

from torch import nn, optim
from torch.amp import GradScaler

from lora2fx.program import program_of
from lora2fx.training.acceptance import refuse_partitioned
from lora2fx.training.driver import Attachment


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
