"""Everything that a run needs, read, made and checked, with nothing written yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lora2fx.compiler import transform
from lora2fx.errors import RunError
from lora2fx.finetuning.choices import TASKS
from lora2fx.finetuning.methods import TARGETS, default_rate, make_method
from lora2fx.finetuning.models import load_model, load_tokenizer, longest
from lora2fx.finetuning.reading import Tables, quiet_datasets, read_tables
from lora2fx.finetuning.settings import Settings
from lora2fx.finetuning.tasks import Columns, Task, cut_share
from lora2fx.finetuning.trainer import training_arguments
from lora2fx.inspection import describe_method
from lora2fx.program import Baseline, Method

if TYPE_CHECKING:
    from datasets import Dataset

Say = Callable[[str], None]
CUT = 0.01
"""The share of rows cut to the length from which on it is worth saying."""


@dataclass(frozen=True)
class Prepared:
    """A plain model with its task and data; `fresh` are the modules that its checkpoint didn't hold."""

    settings: Settings
    task: Task
    columns: Columns
    tables: Tables
    train: Dataset
    validation: Dataset
    tokenizer: Any
    model: nn.Module
    fresh: tuple[str, ...]
    method: Method | Baseline
    args: Any

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return bool(self.args.process_index == 0)

    def adapt(self) -> None:
        """Give the model its adapters. Raises what `transform` raises."""
        settings = self.settings
        transform(
            self.model,
            list(settings.targets) or (None if isinstance(self.method, Baseline) else list(TARGETS)),
            self.method,
            exclude=list(settings.exclude),
            modules_to_save=[path for path in self.fresh if path],
            seed=settings.seed,
        )

    def data_entry(self) -> dict[str, Any]:
        """The data as a record holds it."""
        return {
            "train_rows": len(self.tables.train),
            "validation_rows": len(self.tables.validation),
            "validation": self.tables.source,
            "text": list(self.columns.text),
            "label": self.columns.label,
            "classes": list(self.columns.names),
            "digest": self.tables.digest,
        }


def prepare(settings: Settings, out: Path, say: Say) -> Prepared:
    """Read the tables, load tokenizer and model, encode. Raises `DataError`, `RunError` and `MethodError`."""
    task = TASKS[settings.task]()
    method = make_method(settings.method, settings.hyperparameters)
    rate = settings.lr or default_rate(settings.method, settings.task == "causal-lm")
    _check_loggers(settings)
    args = training_arguments(settings, out, task, rate)
    if args.fsdp or args.deepspeed:
        raise RunError("lora2fx train runs on one process or under DDP. Start it without FSDP or DeepSpeed.")
    with args.main_process_first(local=False), quiet_datasets(bars=not args.disable_tqdm):
        tables = read_tables(settings)
        columns = task.columns(tables, settings)
        tokenizer = load_tokenizer(settings, task.words)
        model, fresh = load_model(settings, task, columns, tokenizer)
        settings = dataclasses.replace(settings, length=longest(settings, model, tokenizer))
        train, validation = (
            task.encode(table, columns, tokenizer, settings) for table in (tables.train, tables.validation)
        )
    found = Prepared(settings, task, columns, tables, train, validation, tokenizer, model, fresh, method, args)
    if found.first:
        _describe(found, say)
    return found


def _check_loggers(settings: Settings) -> None:
    known = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
    for name in settings.log_to:
        if not any(find_spec(package) for package in known[name]):
            raise RunError(f"--log-to {name} needs {known[name][0]}: pip install {known[name][0]}")


def _describe(run: Prepared, say: Say) -> None:
    columns, settings = run.columns, run.settings
    label = f", label {columns.label}" if columns.label else ""
    kinds = f" ({len(columns.names)} classes: {_list(columns.names)})" if columns.names else ""
    rows = f"{len(run.tables.train):,} rows to train on, {len(run.tables.validation):,} to validate"
    say(f"data        {rows} ({run.tables.source})")
    say(f"columns     text {' and '.join(columns.text)}{label}{kinds}")
    total = sum(parameter.numel() for parameter in run.model.parameters())
    fresh = f"; new and trained whole: {', '.join(run.fresh)}" if run.fresh else ""
    say(f"model       {type(run.model).__name__}, {total:,} parameters{fresh}")
    rates = f"learning rate {run.args.learning_rate:g}"
    say(f"method      {describe_method(run.method)}, {rates}, batches of {settings.batch * settings.accumulate}")
    share = cut_share(run.train, settings.length)
    if share >= CUT and not settings.pack:
        say(f"note        {share:.0%} of the rows fill the {settings.length} tokens allowed and may be cut: --length")


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
