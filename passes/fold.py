"""Fold: W → W + ΔW, in float64, rounded once; the original classes and keys are left with better weights.

All or nothing: every factor, every result and the schedule are checked before the first weight is written.
"""

from __future__ import annotations

import warnings
from typing import Any

from lora2fx.errors import Lora2fxWarning, ScheduleError
from lora2fx.passes.entries import adapter_entry, totals
from lora2fx.passes.merging import check_merges, merges, write_merges
from lora2fx.passes.unload import detach_adapters
from lora2fx.program import Program
from lora2fx.reports import Report
from lora2fx.training.driver import schedule_status


def _check_schedule(program: Program, strict: bool) -> None:
    status = schedule_status(list(program.adapters.values()), program.method.training())
    if status is None:
        return
    if strict:
        raise ScheduleError(
            f"fold: {status} Finish the run (lora2fx.attach(model, optimizer, total_steps=...) drives it), or fold"
            " what is there with strict=False; the model is as it was."
        )
    warnings.warn(f"folding an unfinished schedule: {status}", Lora2fxWarning, stacklevel=4)


def fold_adapters(program: Program, strict: bool = True) -> Report:
    """Add every ΔW to its weight, in place, and take the adapters away; trained heads stay as they are.

    Each site's entry also holds `delta_norm` = ‖ΔW‖_F and `rounding_error` = ‖round(W+ΔW) − (W+ΔW)‖_F / ‖ΔW‖_F on
    the site's own columns. Weights keep their Parameter objects, storage and requires_grad of before `transform`.
    Raises `ScheduleError` (a schedule that was not driven to its end; a warning with `strict=False`) and
    `AdapterError` (a non-finite factor or result, a weight that can't be written), the model then as it was.
    """
    _check_schedule(program, strict)
    found = merges(program)
    check_merges(found)
    entries = {name: adapter_entry(name, adapter) for name, adapter in program.adapters.items()}
    counts = totals(program)
    written = write_merges(found)
    detach_adapters(program)
    details: dict[str, Any] = {
        "max_rounding_error": max((site["rounding_error"] for site in written.values()), default=0.0),
        "modules_to_save": list(program.record.modules_to_save),
    }
    sites = tuple(entry | written[name] for name, entry in entries.items())
    return Report(f"fold {type(program.root).__name__}", sites, counts, program.record.verify, details)
