"""Copies of an adapted model to export: as it is, without its adapters, and merged; the model stays untouched.

Parameters that a copy doesn't change are shared with the model, so that a copy costs little more than its adapters.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora2fx.adapter import Adapter
from lora2fx.dataflow.preserve import set_training
from lora2fx.errors import AdapterError, ExportError
from lora2fx.passes.fold import fold_adapters
from lora2fx.passes.install import restore_owners
from lora2fx.passes.tiles import Factors
from lora2fx.passes.unload import unload_adapters
from lora2fx.program import RECORD, Program, program_of
from lora2fx.reports import Report
from lora2fx.sharding import refuse_sharded


@dataclass(frozen=True)
class Change:
    """What the merge does to one weight: ΔW, and its rounding in units of the eps of the dtype, float64, when asked."""

    weight: str
    before: Tensor
    delta: Callable[[], Tensor]
    rounding: Callable[[], Tensor]


@dataclass(frozen=True)
class Copies:
    """One model three times, on the CPU, in eval mode: adapted, base (no adapters) and merged (ΔW folded in)."""

    adapted: nn.Module
    base: nn.Module
    merged: nn.Module
    changes: tuple[Change, ...]
    folded: Report | None


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's module inside DDP or torch.compile's shell; `AdapterError` for one that FSDP shards."""
    refuse_sharded(model, "export")
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def has_adapters(model: nn.Module) -> bool:
    """Whether `transform` was here and neither `fold` nor `unload` after it."""
    return any(RECORD in vars(module) for module in model.modules())


def copies_of(model: nn.Module, asked: str) -> Copies:
    """Copies of an adapted model, or of a plain one (then all three are the same module, and nothing changes).

    Raises what `fold_adapters(strict=True)` raises, `AdapterError` for factors that aren't finite and `ExportError`
    for a model that can't be copied.
    """
    model = unwrapped(model)
    adapted = _shallow(model, ()) if _on_cpu(model) else _full(model)
    set_training(adapted, False)
    if not has_adapters(model):
        return Copies(adapted, adapted, adapted, (), None)
    program = program_of(adapted, asked)
    check_finite(program)
    changes = changes_of(program)
    merged, folded = merged_copy(adapted, asked)
    base = _shallow(adapted, ())
    restore_owners(base)
    return Copies(adapted, base, merged, changes, folded)


def merged_copy(model: nn.Module, asked: str) -> tuple[nn.Module, Report]:
    """A copy of an adapted model with its adapters folded in, and the fold's report."""
    weights = {id(weight) for weight in _site_weights(program_of(model, asked)).values()}
    merged = _shallow(model, weights)
    return merged, fold_adapters(program_of(merged, asked), strict=True, undo=False)


def unloaded_copy(model: nn.Module, asked: str) -> nn.Module:
    """A copy with its adapters taken off, and the modules that were trained whole as they were before."""
    program = program_of(model, asked)
    heads = {id(p) for path in program.record.modules_to_save for p in _saved(model, path)}
    heads |= {id(program.root.get_parameter(name)) for name in program.record.trained}
    copied = _shallow(model, heads)
    unload_adapters(program_of(copied, asked))
    return copied


def copy_of(model: nn.Module) -> nn.Module:
    """A copy on the CPU that shares nothing with the model."""
    return _full(model)


def double_copy(model: nn.Module) -> nn.Module:
    """A float64 copy that shares nothing with the model."""
    return _full(model).double()


def changes_of(program: Program) -> tuple[Change, ...]:
    """One change a weight, the adapters of a fused weight's slices added up."""
    weights = _site_weights(program)
    adapters: dict[str, list[Adapter]] = {}
    for adapter in program.adapters.values():
        adapters.setdefault(adapter.site.weight, []).append(adapter)
    return tuple(
        Change(name, weights[name], functools.partial(_delta, own), functools.partial(_rounding, weights[name], own))
        for name, own in adapters.items()
    )


def check_finite(program: Program) -> None:
    """Raise `AdapterError` where an adapter holds a NaN or an infinity."""
    for path, adapter in program.adapters.items():
        for name, value in adapter.named_parameters():
            if not torch.isfinite(value).all():
                raise AdapterError(
                    f"{path}.{name} holds values that are not finite: the training run diverged. Go back to a"
                    " checkpoint from before; nothing was written."
                )


def bind_constants(model: nn.Module, constants: Mapping[str, Any]) -> None:
    """Fix the arguments of the copy's forward that are no tensors, since a graph can only have tensors as inputs."""
    if constants:
        model.forward = functools.partial(model.forward, **constants)


def _delta(adapters: list[Adapter]) -> Tensor:
    with torch.no_grad():
        return sum((adapter.exact().weight_delta() for adapter in adapters[1:]), adapters[0].exact().weight_delta())


@torch.no_grad()
def _rounding(weight: Tensor, adapters: list[Adapter]) -> Tensor:
    """The classical bound of a sum of k products and W, whatever its order: (k + 2)/2 · (|W| + |left·gate|·|right|)."""
    factors = Factors([adapter.exact() for adapter in adapters], torch.float64)
    factors.left.abs_()
    factors.right.abs_()
    reach = factors.tile(tuple(slice(0, size) for size in weight.shape)) + weight.detach().double().abs()
    return reach.mul_((factors.left.shape[-1] + 2) / 2)


def _saved(model: nn.Module, path: str) -> list[nn.Parameter]:
    return list(program_of(model, path).root.get_submodule(path).parameters())


def _site_weights(program: Program) -> dict[str, Tensor]:
    """Each site's weight as its owner holds it, whatever reading the attribute would give."""
    weights: dict[str, Tensor] = {}
    for site in program.sites:
        weight = program.root.get_submodule(site.owner)._parameters[site.parameter]
        assert weight is not None
        weights[site.weight] = weight
    return weights


def _on_cpu(model: nn.Module) -> bool:
    return all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))


def _full(model: nn.Module) -> nn.Module:
    return _deepcopy(model, {}).cpu()


def _shallow(model: nn.Module, own: Collection[int]) -> nn.Module:
    """A copy whose parameters share their storage with the model's, all but those whose id is in `own`.

    They are new `Parameter` objects all the same: folding sets `requires_grad`.
    """
    plain = [p for p in model.parameters() if type(p) is nn.Parameter and id(p) not in own]
    return _deepcopy(model, {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in plain})


def _deepcopy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} can't be copied ({type(error).__name__}: {error}). An export works on a copy: take"
            " off what can't be copied (locks, open files, closures) and export again."
        ) from error
