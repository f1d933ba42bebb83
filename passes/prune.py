"""Prune: masked entries → smaller factors, with the optimizer's moments sliced along; outputs stay what they were."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora2fx.adapter import Adapter
from lora2fx.errors import AdapterError
from lora2fx.passes.entries import adapter_entry, totals
from lora2fx.program import Program
from lora2fx.reports import Report

Slices = tuple[tuple[int, Tensor], ...]


def _slices(adapter: Adapter) -> dict[str, Slices]:
    """By parameter the (dimension, indices) that compaction will keep, of axes that lose an entry."""
    found: dict[str, Slices] = {}
    for axis in adapter.axes().values():
        if not axis.mask.all():
            kept = axis.mask.nonzero().flatten()
            for name, dim in axis.along:
                found[name] = (*found.get(name, ()), (dim, kept))
    return found


def _sliced(tensor: Tensor, slices: Slices) -> Tensor:
    for dim, kept in slices:
        tensor = tensor.index_select(dim, kept.to(tensor.device))
    return tensor


def _check_state(program: Program, planned: dict[str, dict[str, Slices]], optimizer: Optimizer) -> None:
    for path, slices in planned.items():
        for name in slices:
            parameter = program.adapters[path].get_parameter(name)
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.numel() != 1 and value.shape != parameter.shape:
                    raise AdapterError(
                        f"prune: {type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for"
                        f" {path}.{name} of shape {tuple(parameter.shape)}, which can't be sliced along. Prune without"
                        " optimizer= and make a new optimizer; nothing was changed."
                    )


def _sliced_state(state: dict[str, Any], old: nn.Parameter, slices: Slices) -> dict[str, Any]:
    return {
        key: _sliced(value, slices) if isinstance(value, Tensor) and value.shape == old.shape else value
        for key, value in state.items()
    }


def _hand_over(optimizer: Optimizer, replaced: dict[nn.Parameter, tuple[nn.Parameter, Slices]]) -> None:
    """Put the new parameters where the old ones stood in the optimizer's groups and state."""
    held = [(old, new, slices) for old, (new, slices) in replaced.items() if old in optimizer.state]
    states = [(old, new, _sliced_state(optimizer.state[old], old, slices)) for old, new, slices in held]
    for group in optimizer.param_groups:
        group["params"] = [replaced[p][0] if p in replaced else p for p in group["params"]]
    for old, new, state in states:
        del optimizer.state[old]
        optimizer.state[new] = state


@contextmanager
def _all_or_nothing(adapters: Collection[Adapter]) -> Iterator[None]:
    """On any error, an interrupt too, the adapters have their parameters and buffers back."""
    before = [(adapter, dict(adapter._parameters), dict(adapter._buffers)) for adapter in adapters]
    try:
        yield
    except BaseException:
        for adapter, parameters, buffers in before:
            adapter._parameters.update(parameters)
            adapter._buffers.update(buffers)
        raise


@torch.no_grad()
def prune_ranks(program: Program, optimizer: Optimizer | None = None) -> Report:
    """Drop what the masks switch off, physically, in place; ΔW and the model's outputs stay as they were.

    Parameters that shrink become new objects. Pass the `optimizer` that holds the old ones: its groups then hold the
    new ones, and every state tensor of a parameter's shape is sliced along. Without it, make a new optimizer.
    `details`: `adapter_parameters_before`, and `dropped` entries by axis.
    Raises `AdapterError` where the optimizer keeps state that can't be sliced; on any error nothing was changed.
    """
    planned = {path: _slices(adapter) for path, adapter in program.adapters.items()}
    if optimizer is not None:
        _check_state(program, planned, optimizer)
    before = totals(program)
    entries_before = {name: _lengths(adapter) for name, adapter in program.adapters.items()}
    replaced: dict[nn.Parameter, tuple[nn.Parameter, Slices]] = {}
    with _all_or_nothing(program.adapters.values()):
        for path, adapter in program.adapters.items():
            old = {name: adapter.get_parameter(name) for name in planned[path]}
            adapter.compact()
            replaced |= {old[name]: (adapter.get_parameter(name), slices) for name, slices in planned[path].items()}
        dropped: dict[str, int] = {}
        for name, adapter in program.adapters.items():
            for axis, length in _lengths(adapter).items():
                dropped[axis] = dropped.get(axis, 0) + entries_before[name][axis] - length
        details = {"adapter_parameters_before": before["adapter_parameters"], "dropped": dropped}
        entries = tuple(adapter_entry(name, adapter) for name, adapter in program.adapters.items())
        after = totals(program)
        if optimizer is not None:
            _hand_over(optimizer, replaced)
    return Report(f"prune {type(program.root).__name__}", entries, after, program.record.verify, details)


def _lengths(adapter: Adapter) -> dict[str, int]:
    return {name: axis.mask.numel() for name, axis in adapter.axes().items()}
