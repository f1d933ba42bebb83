"""Fold: W → W + ΔW, in float64, rounded once; the original classes and keys are left with better weights.

All or nothing: every factor, every result and the schedule are checked before the first weight is written.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lora2fx.errors import Lora2fxWarning, ScheduleError
from lora2fx.passes.entries import adapter_entry, totals
from lora2fx.passes.merging import check_merges, merges, write_merges
from lora2fx.passes.unload import detach_adapters
from lora2fx.program import Program
from lora2fx.reports import Report
from lora2fx.training.driver import schedule_status


def _check_schedule(program: Program, strict: bool) -> str | None:
    """Why the schedule is not at its end, None where it is; `ScheduleError` where it must be."""
    status = schedule_status(list(program.adapters.values()), program.method.training())
    if status is not None and strict:
        raise ScheduleError(
            f"fold: {status} Finish the run (lora2fx.attach(model, optimizer, total_steps=...) drives it), or fold"
            " what is there with strict=False; the model is as it was."
        )
    return status


def _finished(program: Program) -> Program:
    """The program with copies of its adapters in which the last allocation took effect."""
    allocators = program.method.training().allocators
    if not allocators or not program.adapters:
        return program
    copied = {name: copy.deepcopy(adapter) for name, adapter in program.adapters.items()}
    for allocator in allocators:
        allocator.finish(list(copied.values()))
    return replace(program, adapters=copied)


def _warn_unfinished(status: str, counts: Mapping[str, Any]) -> None:
    """Say what is folded: what the last allocation keeps, and what the whole schedule would have kept."""
    budgets = counts["budgets"]
    kept = ", ".join(
        f"{number} on the axis {axis!r}" + (f" (of a final budget of {budgets[axis]})" if axis in budgets else "")
        for axis, number in counts["kept"].items()
    )
    warnings.warn(
        f"folding an unfinished schedule: {status} The last allocation took effect first; it keeps {kept}.",
        Lora2fxWarning,
        stacklevel=4,
    )


def fold_adapters(program: Program, strict: bool = True) -> Report:
    """Add every ΔW to its weight, in place, and take the adapters away; trained heads stay as they are.

    Each site's entry also holds `delta_norm` = ‖ΔW‖_F and `rounding_error` = ‖round(W+ΔW) − (W+ΔW)‖_F / ‖ΔW‖_F on
    the site's own columns. Weights keep their Parameter objects, storage and requires_grad of before `transform`.
    Raises `ScheduleError` (a schedule that was not driven to its end; with `strict=False` its last allocation takes
    effect, and a warning says what that keeps) and
    `AdapterError` (a non-finite factor or result, a weight that can't be written), the model then as it was.
    """
    status = _check_schedule(program, strict)
    finished = _finished(program)
    found = merges(finished)
    check_merges(found)
    entries = {name: adapter_entry(name, adapter) for name, adapter in finished.adapters.items()}
    counts = totals(finished)
    if status is not None:
        _warn_unfinished(status, counts)
    written = write_merges(found)
    detach_adapters(program)
    details: dict[str, Any] = {
        "max_rounding_error": max((site["rounding_error"] for site in written.values()), default=0.0),
        "modules_to_save": list(program.record.modules_to_save),
    }
    sites = tuple(entry | written[name] for name, entry in entries.items())
    return Report(f"fold {type(program.root).__name__}", sites, counts, program.record.verify, details)
