"""Fold: W → W + ΔW, in float64, rounded once; the original classes and keys are left with better weights.

All or nothing: every factor, every result and the schedule are checked before the first weight is written.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora2fx.adapter import Adapter
from lora2fx.errors import AdapterError, Lora2fxWarning, ScheduleError
from lora2fx.passes.entries import adapter_entry, totals
from lora2fx.passes.rounding import round_once
from lora2fx.passes.unload import detach_adapters
from lora2fx.program import Program
from lora2fx.reports import Report
from lora2fx.training.driver import schedule_status


@dataclass(frozen=True)
class Merge:
    """One weight and every adapter that adds to it: three for a fused QKV."""

    weight: nn.Parameter
    adapters: dict[str, Adapter]

    @property
    def names(self) -> str:
        """The weight and its roles, for messages."""
        return ", ".join(f"{adapter.site.weight} ({adapter.site.role})" for adapter in self.adapters.values())


def is_foldable(weight: Tensor) -> bool:
    """Whether ΔW can be added in place: a plain dense floating-point tensor with storage."""
    plain = type(weight.data) is Tensor and weight.layout == torch.strided
    return plain and weight.is_floating_point() and not weight.is_meta


def merges(program: Program) -> list[Merge]:
    """The program's adapters, grouped by the weight that they add to."""
    groups: dict[nn.Parameter, dict[str, Adapter]] = defaultdict(dict)
    for name, adapter in program.adapters.items():
        groups[site_weight(program, adapter)][name] = adapter
    return [Merge(weight, adapters) for weight, adapters in groups.items()]


def site_weight(program: Program, adapter: Adapter) -> nn.Parameter:
    """The Parameter itself, W without ΔW even where reading the attribute gives W + ΔW."""
    weight = program.root.get_submodule(adapter.site.owner)._parameters[adapter.site.parameter]
    assert weight is not None
    return weight


def _largest(adapter: Adapter) -> Tensor:
    """An upper bound of |ΔW|'s entries, O(k(in + out)): the longest row of left · gate times right's longest column."""
    exact = adapter.exact()
    rows = (exact.left() * exact.gate().unsqueeze(-2)).norm(dim=-1)
    largest: Tensor = rows.amax() * exact.right().norm(dim=-2).amax()
    return largest


def merged_weight(merge: Merge) -> Tensor:
    """W + ΣΔW in float64, a new tensor."""
    total = merge.weight.detach().to(torch.float64, copy=True)
    for adapter in merge.adapters.values():
        total += adapter.exact().weight_delta().to(total.device)
    return total


def _check_merge(merge: Merge) -> None:
    weight = merge.weight.detach()
    if not is_foldable(weight):
        kind = type(weight.data).__name__ if weight.is_floating_point() else str(weight.dtype)
        raise AdapterError(
            f"fold: {merge.names} is a {kind} on {weight.device}, to which nothing can be added in place. Gather or"
            " dequantise the weight first; the model is as it was."
        )
    for name, adapter in merge.adapters.items():
        bad = [path for path, value in adapter.named_parameters() if not value.detach().isfinite().all()]
        if bad:
            raise AdapterError(
                f"fold: {', '.join(bad)} of the adapter {name} on {adapter.site.weight} holds NaN or infinity. Go back"
                " to a checkpoint before the run diverged, or lora2fx.unload(model); the model is as it was."
            )
    largest = torch.stack(torch.aminmax(weight if weight.element_size() > 1 else weight.float())).abs().amax().double()
    bound = largest + sum(_largest(adapter).to(largest.device) for adapter in merge.adapters.values())
    if bound <= torch.finfo(weight.dtype).max:
        return
    if not round_once(merged_weight(merge), weight.dtype).isfinite().all():
        cause = "the base weight holds NaN or infinity" if not largest.isfinite() else f"W + ΔW leaves {weight.dtype}"
        raise AdapterError(
            f"fold: {merge.names}: {cause}. Convert the model to a wider dtype, or lora2fx.unload(model);"
            " the model is as it was."
        )


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


def _own_columns(adapter: Adapter, whole: Tensor) -> Tensor:
    matrix = adapter.site.to_matrix(whole)
    return matrix if adapter.columns is None else matrix.index_select(-1, adapter.columns.to(matrix.device))


def _write(merge: Merge) -> dict[str, dict[str, float]]:
    """Write round(W + ΣΔW) into the weight's own storage; by adapter ‖ΔW‖_F and how much of it rounding took."""
    total = merge.weight.detach().to(torch.float64, copy=True)
    norms = {}
    for name, adapter in merge.adapters.items():
        delta = adapter.exact().weight_delta().to(total.device)
        norms[name] = float(delta.norm())
        total += delta
    merge.weight.copy_(round_once(total, merge.weight.dtype))
    total -= merge.weight
    lost = {name: float(_own_columns(adapter, total).norm()) for name, adapter in merge.adapters.items()}
    return {
        name: {"delta_norm": norm, "rounding_error": lost[name] / norm if norm else 0.0} for name, norm in norms.items()
    }


@torch.no_grad()
def check_merges(found: list[Merge]) -> None:
    """Raise `AdapterError`, naming the site, where a weight can't take its ΔW."""
    for merge in found:
        _check_merge(merge)


@torch.no_grad()
def write_merges(found: list[Merge]) -> dict[str, dict[str, float]]:
    """Write every merge, checked before; by adapter its `delta_norm` and `rounding_error`."""
    written: dict[str, dict[str, float]] = {}
    for merge in found:
        written |= _write(merge)
    return written


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
