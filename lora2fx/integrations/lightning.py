"""Lightning: one line before `fit()`, or a callback; total steps, optimizer, logging and resuming are the Trainer's."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lora2fx.attachment import attach as attach_optimizer
from lora2fx.errors import AdapterError, ScheduleError
from lora2fx.integrations.position import check_position
from lora2fx.program import program_of
from lora2fx.training.ablation import Evaluate
from lora2fx.training.driver import Attachment
from lora2fx.training.logs import log_values

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class LightningAttachment:
    """What the callback does: attaches when training starts, logs with the module, detaches when training ends.

    `attachment` is None before training starts.
    """

    def __init__(self, total_steps: int | None, evaluate: Evaluate | None) -> None:
        self.total_steps = total_steps
        self.evaluate = evaluate
        self.attachment: Attachment | None = None
        self._logged = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Optimizers and checkpoint are there: attach."""
        self._detach()
        total = _total_steps(trainer) if self.total_steps is None else self.total_steps
        attached = attach_optimizer(pl_module, _optimizer(trainer, pl_module), total, _scaler(trainer))
        attached.evaluate = self.evaluate
        if len(trainer.optimizers) == 1:
            check_position(attached, "the Trainer", trainer.global_step, "fit(ckpt_path=...)")
        self.attachment = attached

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log every `log_every_n_steps` optimizer steps."""
        step, every = trainer.global_step, trainer.log_every_n_steps
        if self.attachment is not None and every and step != self._logged and step % every == 0:
            self._logged, values = step, log_values(self.attachment)
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the masks of all processes, and let go of the optimizer."""
        if self.attachment is not None:
            self.attachment.check_ranks()
        self._detach()

    def _detach(self) -> None:
        if self.attachment is not None:
            self.attachment.detach()


def callback(total_steps: int | None = None, evaluate: Evaluate | None = None) -> LightningAttachment:
    """A callback for `Trainer(callbacks=[...])` that drives the adapters of the fitted module.

    The schedule runs over the Trainer's own optimizer steps (`estimated_stepping_batches`); where several optimizers
    step, `total_steps` says how often the adapters' does. Budgets, active entries,
    importance, penalty and skipped steps go to the Trainer's loggers. Checkpoints hold all state: `fit(ckpt_path=...)`
    goes on where they are. `evaluate` is ALoRA's. `fit` raises what `lora2fx.attach` raises.
    """
    if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
        from pytorch_lightning import Callback
    else:
        from lightning.pytorch import Callback
    kind = type("Lora2fxCallback", (LightningAttachment, Callback), {})
    made: LightningAttachment = kind(total_steps, evaluate)
    return made


def attach(trainer: Trainer, total_steps: int | None = None, evaluate: Evaluate | None = None) -> LightningAttachment:
    """Give the Trainer that `callback`.

    What it does is said there. Under `16-mixed` and `bf16-mixed` the factors stay float32; steps that fp16 skips are
    counted.

    Raises `AdapterError` where the Trainer is attached already; `fit` raises what `lora2fx.attach` raises.

    Examples:
        >>> import lightning.pytorch as pl
        >>> import torch
        >>> import lora2fx
        >>> from lora2fx.integrations.lightning import attach
        >>> from torch import nn
        >>> class Regression(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = nn.Linear(8, 1)
        ...
        ...     def training_step(self, batch, index):
        ...         return (self.linear(batch) - 1).square().mean()
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.AdamW(lora2fx.param_groups(self, lr=1e-3))
        >>> module = lora2fx.transform(Regression(), "linear", lora2fx.LoRA(r=2))
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> trainer = pl.Trainer(max_steps=4, accelerator="cpu", enable_model_summary=False, **quiet)
        >>> callback = attach(trainer)
        >>> trainer.fit(module, torch.utils.data.DataLoader(torch.ones(16, 8), batch_size=4))
        >>> callback.attachment.step
        4
    """
    callbacks: list[Any] = trainer.callbacks
    if any(isinstance(known, LightningAttachment) for known in callbacks):
        raise AdapterError("this Trainer is attached already; a second attachment would prune twice a step.")
    made = callback(total_steps, evaluate)
    callbacks.insert(0, made)
    return made


def _optimizer(trainer: Trainer, module: LightningModule) -> Any:
    """The first optimizer that holds an adapter's parameter; of several, those of the others are none of ours."""
    if not trainer.optimizers:
        raise AdapterError(f"{type(module).__name__}.configure_optimizers returns no optimizer to attach to.")
    adapted = {id(p) for adapter in program_of(module, "attach").adapters.values() for p in adapter.parameters()}
    held = [
        optimizer
        for optimizer in trainer.optimizers
        if any(id(p) in adapted for group in optimizer.param_groups for p in group["params"])
    ]
    return (held or trainer.optimizers)[0]


def _total_steps(trainer: Trainer) -> int:
    if len(trainer.optimizers) > 1:
        raise ScheduleError(
            f"the Trainer counts the steps of all {len(trainer.optimizers)} optimizers together. Pass total_steps=, the"
            " number of steps of the one that holds the adapters."
        )
    total = trainer.estimated_stepping_batches
    if not 0 < total < float("inf"):
        raise ScheduleError(
            "the Trainer can't say how many optimizer steps it will take, and the schedule needs to know. Set"
            " Trainer(max_steps=...), or max_epochs= with a dataloader that has a length."
        )
    return int(total)


def _scaler(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)
