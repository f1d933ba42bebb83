"""Copies of an adapted model that share with it every parameter that they don't change."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora2fx.errors import VerifyError
from lora2fx.passes.adding import write_merge
from lora2fx.passes.install import restore_module, restore_owners, rewritten_path
from lora2fx.passes.merging import is_foldable, merges
from lora2fx.passes.state import OUT_OF_MEMORY
from lora2fx.program import Program, program_of


def _empty_containers(model: nn.Module) -> dict[int, Any]:
    """By id the copy of every module's empty dicts: ten of hooks and more, which else are most of a copy's time."""
    held = (value for module in model.modules() for value in vars(module).values())
    return {id(value): type(value)() for value in held if type(value) in (dict, OrderedDict) and not value}


def _sharing_copy(model: nn.Module, own: Iterable[nn.Parameter], shared: Iterable[nn.Module] = ()) -> nn.Module:
    """A deep copy but for the `shared` modules and the parameters, of which only `own` are copied."""
    copied = {id(parameter) for parameter in own}
    known: dict[int, Any] = {id(module): module for module in shared}
    known |= {id(parameter): parameter for parameter in model.parameters() if id(parameter) not in copied}
    known |= _empty_containers(model)
    try:
        return copy.deepcopy(model, known)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        raise VerifyError(
            f"{type(model).__name__} can't be copied ({type(error).__name__}: {error}), and verification compares with"
            " a folded copy. Take off what can't be copied (locks, open files, tensors kept from a forward), or pass"
            " verify=False."
        ) from error


def partial_copy(program: Program, names: Collection[str]) -> Program:
    """A copy in which only the modules that the named adapters needed rewritten still are."""
    model = _sharing_copy(program.model, [p for adapter in program.adapters.values() for p in adapter.parameters()])
    copied = program_of(model, "verify")
    places = {name: rewritten_path(copied.root, adapter) for name, adapter in copied.adapters.items()}
    kept = {places[name] for name in names}
    for name, adapter in copied.adapters.items():
        for path in {places[name], adapter.site.owner} - kept:
            if places[name] not in kept:
                restore_module(copied.root.get_submodule(path))
    return program_of(model, "verify")


@contextmanager
def base_copy(program: Program) -> Iterator[nn.Module]:
    """A copy with its original classes and nothing merged, whose parameters meanwhile require gradients as they did
    before `transform`."""
    model = _sharing_copy(program.model, [], (*program.adapters.values(), *program.inserts.values()))
    root = program_of(model, "verify").root
    restore_owners(root)
    flags = {parameter: parameter.requires_grad for parameter in root.parameters()}
    try:
        for name, parameter in root.named_parameters():
            parameter.requires_grad_(name in program.record.trainable_before)
        yield model
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@dataclass(frozen=True)
class Folded:
    """A folded copy, and by adapter the weight W + ΔW in it."""

    model: nn.Module
    weights: dict[str, nn.Parameter]


@torch.no_grad()
def folded_copy(program: Program) -> Folded:
    """A copy folded where it can be, with its original classes."""
    model = _sharing_copy(program.model, [merge.weight for merge in merges(program)], program.adapters.values())
    copied = program_of(model, "verify")
    found = [merge for merge in merges(copied) if is_foldable(merge.weight)]
    for merge in found:
        write_merge(merge)
    restore_owners(copied.root)
    return Folded(model, {name: merge.weight for merge in found for name in merge.adapters})
