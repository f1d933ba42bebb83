"""Take the adapters off: an adapted model → the base model, bit for bit."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from lora2fx.errors import AdapterError
from lora2fx.passes.install import restore_owners
from lora2fx.passes.state import kept_on_error
from lora2fx.program import RECORD, TIED, Program, drop_attribute


def _restore_flags(program: Program) -> None:
    """By any of a Parameter's names; a weight that was untied also has those of the one that it was tied to."""
    names: dict[nn.Parameter, set[str]] = defaultdict(set)
    for name, parameter in program.root.named_parameters(remove_duplicate=False):
        names[parameter].add(name)
    for weight, shared in program.record.untied.items():
        for known in names.values():
            if weight in known:
                known |= names.get(shared, set())
    for parameter, known in names.items():
        parameter.requires_grad_(not known.isdisjoint(program.record.trainable_before))


def detach_adapters(program: Program) -> None:
    """Give the model its classes and requires_grad flags back, and take adapters and record away; values stay."""
    restore_owners(program.root)
    drop_attribute(program.root, RECORD)
    _restore_flags(program)


def _tie_again(program: Program) -> None:
    for weight, shared in program.record.untied.items():
        owner, _, parameter = weight.rpartition(".")
        program.root.get_submodule(owner)._parameters[parameter] = shared
    if program.record.tied_config is not None:
        setattr(program.root.config, TIED, program.record.tied_config)


def _targets(program: Program) -> dict[str, tuple[Tensor, Tensor]]:
    """(live tensor, original) of everything that was trained beside the adapters."""
    live = program.root.state_dict(keep_vars=True)
    pairs = {}
    for name, original in program.record.originals.items():
        found = live.get(name)
        if not isinstance(found, Tensor) or found.shape != original.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else "missing"
            raise AdapterError(
                f"unload: {name}, trained beside the adapters, had shape {tuple(original.shape)} and is now {shape}."
                " Put a tensor of the old shape back, or load the base model anew; nothing was changed."
            )
        pairs[name] = (found, original)
    return pairs


@torch.no_grad()
def unload_adapters(program: Program) -> None:
    """The base model back, in place: classes, keys, ties, requires_grad flags, values of `modules_to_save`.

    Raises `AdapterError` where a module that was trained whole changed its shape; on any error, an interrupt too, the
    model is as it was.
    """
    pairs = _targets(program)
    with kept_on_error(live for live, _ in pairs.values()):
        for live, original in pairs.values():
            live.copy_(original)
    _tie_again(program)
    detach_adapters(program)
