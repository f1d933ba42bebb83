"""transformers' Trainer, set up for one run: it does the loop, the log, the checkpoints and the validation."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora2fx.attachment import param_groups
from lora2fx.finetuning.folder import CHECKPOINTS, seal_checkpoint
from lora2fx.finetuning.methods import HEAD_RATE
from lora2fx.finetuning.settings import Settings
from lora2fx.finetuning.showing import progress_callback
from lora2fx.finetuning.tasks import Task
from lora2fx.finetuning.weights import write_trained
from lora2fx.integrations.transformers import attach, ignores_loss_scaling

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

WEIGHTS = "model.safetensors"
"""As the Trainer names it, which loads it over a model made anew."""
LOGS, VALIDATIONS, SAVES = 0.01, 0.2, 0.1
"""Shares of the run between two of them."""


def training_arguments(settings: Settings, out: Path, task: Task, rate: float) -> TrainingArguments:
    """What the Trainer is told. In a run of several processes this is where they find each other."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(out / CHECKPOINTS),
        run_name=out.name,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup,
        max_grad_norm=settings.clip,
        logging_steps=LOGS,
        eval_strategy="steps",
        eval_steps=VALIDATIONS,
        save_strategy="steps",
        save_steps=SAVES,
        save_total_limit=2,
        prediction_loss_only=not task.scores,
        seed=settings.seed,
        bf16=settings.bf16,
        **{_recomputing(): settings.checkpointing},
        use_cpu=settings.cpu,
        dataloader_pin_memory=torch.cuda.is_available() and not settings.cpu,
        report_to=list(settings.log_to) or "none",
        disable_tqdm=not sys.stderr.isatty(),
        label_names=["labels"],
    )


def _recomputing() -> str:
    """What the installed transformers calls gradient checkpointing."""
    from transformers import TrainingArguments

    names = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    return next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in names)


class SmallCheckpoints:
    """A Trainer whose checkpoints hold what is trained, and not the frozen base."""

    model: nn.Module
    args: Any
    accelerator: Any

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained tensors into the folder, in the first process alone."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_trained(self.accelerator.unwrap_model(self.model), folder / WEIGHTS)


class Sealing:
    """Marks each checkpoint as whole, and tells `watch`."""

    def __init__(self, watch: Callable[[Any], None]) -> None:
        self.watch = watch

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After all files are there."""
        if state.is_world_process_zero:
            seal_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            self.watch(state)


def make_trainer(
    model: nn.Module,
    args: TrainingArguments,
    tables: tuple[Dataset, Dataset],
    task: Task,
    tokenizer: Any,
    settings: Settings,
    watch: Callable[[Any], None],
) -> Trainer:
    """The Trainer with everything attached; `watch` is called with its state after each checkpoint."""
    from transformers import Trainer
    from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

    head_rate = settings.head_lr or HEAD_RATE
    groups = param_groups(model, args.learning_rate, settings.weight_decay, head_rate)
    kind = type("RunTrainer", (SmallCheckpoints, Trainer), {})
    trainer: Trainer = kind(
        model,
        args,
        data_collator=task.collator(tokenizer),
        train_dataset=tables[0],
        eval_dataset=tables[1],
        compute_metrics=(lambda found: task.measure(found.predictions, found.label_ids)) if task.scores else None,
        optimizers=(torch.optim.AdamW(groups), None),
    )
    trainer.model_accepts_loss_kwargs = trainer.model_accepts_loss_kwargs and not ignores_loss_scaling(model)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(progress_callback(not args.disable_tqdm))
    trainer.add_callback(type("Saved", (Sealing, TrainerCallback), {})(watch))
    attach(trainer, evaluate=validation_score(trainer, tables[1]), page=None)
    return trainer


def validation_score(trainer: Trainer, table: Dataset) -> Callable[[], float]:
    """-loss of the first validation rows, in eval mode: what ALoRA scores its ranks by."""
    rows = [table[index] for index in range(min(len(table), trainer.args.per_device_eval_batch_size))]

    @torch.no_grad()
    def score() -> float:
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        batch = trainer.data_collator(rows).to(trainer.args.device)
        was = model.training
        model.eval()
        loss = model(**batch).loss
        model.train(was)
        return -float(loss)

    return score
