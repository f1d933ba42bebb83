"""What report.json says of a run, at any time: what was asked, how it went, what became of each weight."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from lora2fx.finetuning.prepare import Prepared
from lora2fx.inspection import describe_method, report_model
from lora2fx.program import program_of
from lora2fx.training.logs import site_importances


def first_record(run: Prepared) -> dict[str, Any]:
    """The record of a run that was adapted and not trained yet.

    `status` goes from running to trained (the exports are missing), then finished; interrupted is running, stopped.
    """
    return {
        "kind": "train",
        "status": "running",
        "settings": run.settings.to_dict() | {"lr": run.args.learning_rate},
        "model": model_entry(run.settings.model, run.model),
        "data": run.data_entry(),
        "metric": run.task.metric,
        "steps": None,
        "step": 0,
        "seconds": 0.0,
        "history": {"training": [], "validation": []},
        **adapted_entries(run.model),
        "exports": {},
        "sizes": {},
        "environment": environment(),
    }


def environment() -> dict[str, Any]:
    """Versions, and what it ran on."""
    import transformers

    on_gpu = torch.cuda.is_available()
    return {
        "lora2fx": version("lora2fx"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def model_entry(name: str, model: nn.Module) -> dict[str, Any]:
    """Which model was trained, and by which method."""
    program = program_of(model, "report")
    return {
        "name": name,
        "class": next(
            base.__name__ for base in type(program.root).__mro__ if base.__module__.startswith("transformers")
        ),
        "method": describe_method(program.method),
        "trained_whole": list(program.record.modules_to_save),
    }


def adapted_entries(model: nn.Module) -> dict[str, Any]:
    """Sites, totals and verification as they are now, and where only some of repeated blocks were matched.

    Sites have one key more than a report's: `importances` by axis.
    """
    found = report_model(model).to_dict()
    adapters = program_of(model, "report").adapters
    importances = dict(zip(adapters, site_importances(list(adapters.values())), strict=True))
    for site in found["sites"]:
        site["importances"] = importances.get(site.get("adapter"), {})
    return {key: found[key] for key in ("sites", "totals", "verify", "coverage")}


def history_entries(
    log: Sequence[Mapping[str, Any]], summarise: Callable[[float], dict[str, float]]
) -> dict[str, list[dict[str, Any]]]:
    """The Trainer's log as `training` (loss, rate, `lora2fx/…`) and `validation` entries, each with its step."""
    training = [dict(entry) for entry in log if "loss" in entry]
    validation = [_plain(entry) | summarise(entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    return {"training": training, "validation": validation}


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    timing = ("runtime", "samples_per_second", "steps_per_second")
    return {key.removeprefix("eval_"): value for key, value in entry.items() if not key.endswith(timing)}
