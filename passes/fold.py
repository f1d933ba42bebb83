"""Fold: W → W + ΔW, rounded once to W's dtype; the original classes and keys are left with better weights.

All or nothing: every factor, every result and the schedule are checked before the first weight is written.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import hypot
from typing import Any

import torch
from torch import Tensor

from lora2fx.errors import AdapterError, Lora2fxWarning, ScheduleError
from lora2fx.passes.adding import write_measured
from lora2fx.passes.entries import adapter_entry, totals
from lora2fx.passes.merging import Merge, check_merges, merges
from lora2fx.passes.rounding import Rounding, check_rounding
from lora2fx.passes.unload import detach_adapters
from lora2fx.program import Program
from lora2fx.reports import Report
from lora2fx.training.driver import schedule_status

LOST = 0.05
"""The share of an adaptation that may be lost to rounding without a warning."""
CALLER = 4
"""The frames from a warning to who called `lora2fx.fold`."""
UNDO = 2**28
"""Bytes of weights that a fold keeps a second time, unless it is told."""


def _refuse_inserts(program: Program) -> None:
    if program.inserts:
        raise AdapterError(
            f"fold: {type(program.method).__name__} put {len(program.inserts)} modules into the model"
            f" ({next(iter(program.inserts))}, ...) that are no linear maps: no weights equal them. Use the model as it"
            " is, save its state_dict, or take them off with lora2fx.unload(model)."
        )


def check_schedule(program: Program, strict: bool) -> str | None:
    """Why the schedule is not at its end, None where it is; `ScheduleError` where it must be."""
    status = schedule_status(list(program.adapters.values()), program.method.training())
    if status is not None and strict:
        raise ScheduleError(
            f"fold: {status} Finish the run (lora2fx.attach(model, optimizer, total_steps=...) drives it), or fold"
            " what is there with strict=False; the model is as it was."
        )
    return status


def finished(program: Program) -> Program:
    """The program with copies of its adapters in which the last allocation took effect."""
    allocators = program.method.training().allocators
    if not allocators or not program.adapters:
        return program
    copied = {name: copy.deepcopy(adapter) for name, adapter in program.adapters.items()}
    for allocator in allocators:
        allocator.finish(list(copied.values()))
    return replace(program, adapters=copied)


def warn_unfinished(status: str, counts: Mapping[str, Any], stacklevel: int) -> None:
    """Say what is folded: what the last allocation keeps, and what the whole schedule would have kept.

    `stacklevel` as for `warnings.warn`, seen from here.
    """
    budgets = counts["budgets"]
    kept = ", ".join(
        f"{number} on the axis {axis!r}" + (f" (of a final budget of {budgets[axis]})" if axis in budgets else "")
        for axis, number in counts["kept"].items()
    )
    warnings.warn(
        f"folding an unfinished schedule: {status} The last allocation took effect first; it keeps {kept}.",
        Lora2fxWarning,
        stacklevel=stacklevel,
    )


def lost_adaptation(sites: Iterable[Mapping[str, Any]]) -> float:
    """The share of all sites' ΔW together that rounding took away in the inputs that they act on."""
    known = [(site["lost_adaptation"], site["delta_norm"]) for site in sites]
    size = hypot(*(norm for _, norm in known))
    return hypot(*(lost * norm for lost, norm in known)) / size if size else 0.0


def warn_lost(lost: float, stacklevel: int) -> None:
    """A `Lora2fxWarning` where rounding took more than `LOST` of the adaptation; `stacklevel` as above."""
    if lost > LOST:
        warnings.warn(
            f"fold: rounding to the weights' dtype took {lost:.0%} of the adaptation, ΔW being small beside the dtype's"
            " steps. rounding='adapter' keeps it; so does a base model in float32.",
            Lora2fxWarning,
            stacklevel=stacklevel,
        )


def _fits(found: Sequence[Merge]) -> bool:
    """Whether the weights that are written to are few enough to be kept twice."""
    return sum(merge.weight.nbytes for merge in found) <= UNDO


@torch.no_grad()
def _write(found: Sequence[Merge], rounding: Rounding, seed: int, undo: bool) -> dict[str, dict[str, Any]]:
    """Every merge; on any error the weights are as they were, where `undo` keeps them on the CPU until then."""
    written: dict[str, dict[str, Any]] = {}
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for merge in found:
            if undo:
                before.append((merge.weight, merge.weight.detach().to("cpu", copy=True)))
            written |= write_measured(merge, rounding, seed)
    except BaseException as error:
        for weight, value in before:
            weight.copy_(value)
        error.add_note(
            "fold stopped while it was writing; every weight was put back, and the model is as it was."
            if undo
            else "fold stopped half way, and kept nothing to put back (see undo=): some weights hold W + ΔW. Load base"
            " model and adapter anew."
        )
        raise
    return written


def fold_adapters(
    program: Program, strict: bool = True, rounding: Rounding = "nearest", seed: int = 0, undo: bool | None = None
) -> Report:
    """Add every ΔW to its weight, in place, and take the adapters away; trained heads stay as they are.

    float32 and float64 weights are added to in their own dtype: off by at most half a step of the result plus
    (k + 4) · 2⁻²⁴ · |left| |right| in float32. Weights of fewer bits are summed in float64 and rounded once, by
    `rounding`: "nearest"; "adapter", which keeps ΔW's effect on its own inputs where ΔW is small beside the dtype's
    steps, for a larger error elsewhere (see `adaptive_rounding`); or "stochastic", unbiased, from `seed`.

    Each site's entry also holds `rounding`, `delta_norm` = ‖ΔW‖_F, `rounding_error` = ‖E‖_F / ‖ΔW‖_F with E = what
    was written − (W + ΔW), and `lost_adaptation` = ‖UᵀE‖_F / ‖ΔW‖_F, U an orthonormal basis of the inputs that ΔW
    acts on (an embedding's: of its outputs): the last two on evenly spread columns of a weight that has more than
    2¹⁶ elements. Weights keep their Parameter objects, storage and requires_grad of before `transform`.

    Raises `ScheduleError` (a schedule that was not driven to its end; with `strict=False` its last allocation takes
    effect, and a warning says what that keeps), `MethodError` (a rounding of another name) and `AdapterError` (a
    non-finite factor or result, a weight that can't be written), the model then as it was. Warns where rounding
    takes more than 5 % of the adaptation of all sites together.

    `undo` keeps a copy of the adapted weights in the CPU's memory until the last is written, so that an interrupt or
    memory running out, too, leaves the model as it was; without it they would leave it half folded, and the error
    says so. None keeps one of up to `UNDO` bytes (256 MiB).
    """
    check_rounding(rounding)
    _refuse_inserts(program)
    status = check_schedule(program, strict)
    ended = finished(program)
    found = merges(ended)
    check_merges(found)
    entries = {name: adapter_entry(name, adapter) for name, adapter in ended.adapters.items()}
    counts = totals(ended)
    if status is not None:
        warn_unfinished(status, counts, CALLER)
    written = _write(found, rounding, seed, _fits(found) if undo is None else undo)
    detach_adapters(program)
    details: dict[str, Any] = {
        "max_rounding_error": max((site["rounding_error"] for site in written.values()), default=0.0),
        "lost_adaptation": lost_adaptation(written.values()),
        "modules_to_save": list(program.record.modules_to_save),
    }
    sites = tuple(entry | written[name] for name, entry in entries.items())
    warn_lost(details["lost_adaptation"], CALLER)
    return Report(f"fold {type(program.root).__name__}", sites, counts, program.record.verify, details)
