"""Hugging Face `Trainer`: one line before `train()`; total steps, optimizer, logging and resuming are the Trainer's."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import warn

from torch import nn
from torch.optim import Optimizer

from lora2fx.attachment import attach as attach_optimizer
from lora2fx.errors import AdapterError, Lora2fxWarning
from lora2fx.integrations.accelerate import refuse_deepspeed, warn_of_replicas
from lora2fx.integrations.pages import adapters_page, write_text
from lora2fx.integrations.position import check_position
from lora2fx.program import program_of
from lora2fx.training.ablation import Evaluate
from lora2fx.training.driver import Attachment
from lora2fx.training.logs import log_values

if TYPE_CHECKING:
    from transformers import Trainer


class TrainerAttachment:
    """What the callback does: attaches when training begins, logs with the Trainer, detaches when training ends.

    `attachment` is None before training begins.
    """

    def __init__(self, trainer: Trainer, evaluate: Evaluate | None, page: str | None) -> None:
        self.trainer = trainer
        self.evaluate = evaluate
        self.page = page
        self.attachment: Attachment | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Optimizer, **_: Any) -> None:
        """The optimizer and the checkpoint are there: attach."""
        self._detach()
        accelerator = self.trainer.accelerator
        refuse_deepspeed(accelerator)
        warn_of_replicas(accelerator, bool(args.fsdp))
        attached = attach_optimizer(self.trainer.model, optimizer, state.max_steps, accelerator.scaler)
        attached.evaluate = self.evaluate
        check_position(attached, "the Trainer", state.global_step, "train(resume_from_checkpoint=...)")
        self.attachment = attached
        _warn_of_scaled_loss(self.trainer)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Add to the training log; this callback comes first, so that every reporter gets it."""
        if self.attachment is not None and "loss" in logs:
            values = log_values(self.attachment)
            logs.update(values)
            state.log_history[-1].update(values)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Compare the masks of all processes."""
        if self.attachment is not None:
            self.attachment.check_ranks()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Compare the masks of all processes, let go of the optimizer, and leave the page."""
        if self.attachment is not None:
            self.attachment.check_ranks()
        self._detach()
        if self.page is not None:
            self._write_page(Path(args.output_dir) / self.page, state)

    def _write_page(self, path: Path, state: Any) -> None:
        text = adapters_page(self.trainer.model, state.log_history)  # of a sharded model all processes gather
        if state.is_world_process_zero:
            try:
                write_text(path, text)
            except OSError as error:
                warn(f"{path} could not be written: {error}. Training is done.", Lora2fxWarning, stacklevel=2)

    def _detach(self) -> None:
        if self.attachment is not None:
            self.attachment.detach()


def attach(trainer: Trainer, evaluate: Evaluate | None = None, page: str | None = "lora2fx.html") -> TrainerAttachment:
    """Have the Trainer drive its model's adapters: call it once, before `trainer.train()`; returns the callback.

    The schedule runs over the Trainer's own optimizer steps (`max_steps`, or epochs and gradient accumulation).
    Budgets, active entries, importance, penalty and skipped steps go into the Trainer's log. All state is in the
    model's checkpoints: `train(resume_from_checkpoint=...)` goes on where they are. `evaluate` is ALoRA's. In the end
    `page`, in the Trainer's output folder, shows the ranks as a heat map, and the log as charts; None writes none.
    Under fp16 and bf16 the factors stay float32; steps that fp16 skips are counted.

    Raises `AdapterError` (no adapters, attached already); what `lora2fx.attach` raises comes when training begins.
    Warns where the model ignores the Trainer's loss scaling under gradient accumulation, and where FSDP was asked for
    and isn't what runs.

    Examples:
        >>> import torch
        >>> import lora2fx
        >>> from lora2fx.integrations.transformers import attach
        >>> from torch import nn
        >>> from transformers import Trainer, TrainingArguments
        >>> class Regression(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = nn.Linear(8, 1)
        ...
        ...     def forward(self, x, labels):
        ...         return {"loss": (self.linear(x) - labels).square().mean()}
        >>> model = lora2fx.transform(Regression(), "linear", lora2fx.LoRA(r=2))
        >>> rows = [{"x": torch.ones(8), "labels": torch.ones(1)}] * 8
        >>> arguments = TrainingArguments("run", max_steps=4, use_cpu=True, report_to="none", save_strategy="no")
        >>> trainer = Trainer(model, arguments, train_dataset=rows)
        >>> callback = attach(trainer)
        >>> result = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        >>> callback.attachment.step
        4
    """
    from transformers import TrainerCallback

    program_of(trainer.model, "attach")
    callbacks = trainer.callback_handler.callbacks
    if any(isinstance(callback, TrainerAttachment) for callback in callbacks):
        raise AdapterError("this Trainer is attached already; a second attachment would prune twice a step.")
    kind = type("Lora2fxCallback", (TrainerAttachment, TrainerCallback), {})
    callback: TrainerAttachment = kind(trainer, evaluate, page)
    callbacks.insert(0, callback)
    return callback


def ignores_loss_scaling(model: nn.Module) -> bool:
    """Whether the model takes `num_items_in_batch` in its **kwargs and computes its loss without it."""
    forward = inspect.unwrap(type(model).forward)
    loss = getattr(model, "loss_function", None)
    if loss is None or "loss_function" not in forward.__code__.co_names:
        return "num_items_in_batch" not in inspect.signature(forward).parameters
    return "num_items_in_batch" not in inspect.signature(loss).parameters


def _warn_of_scaled_loss(trainer: Trainer) -> None:
    parts = trainer.args.gradient_accumulation_steps * trainer.args.world_size
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    own = trainer.compute_loss_func is not None or type(trainer).compute_loss is not _base_compute_loss()
    if parts == 1 or own or not trainer.model_accepts_loss_kwargs or not ignores_loss_scaling(model):
        return
    warn(
        f"{type(model).__name__}.forward takes **kwargs, from which the Trainer concludes that it divides its loss by"
        f" num_items_in_batch; it doesn't, so that loss and gradient are up to {parts} times too large"
        " (gradient_accumulation_steps x processes). Set trainer.model_accepts_loss_kwargs = False before train().",
        Lora2fxWarning,
        stacklevel=2,
    )


def _base_compute_loss() -> Any:
    from transformers import Trainer

    return Trainer.compute_loss
