"""Take the adapters off: an adapted model → the base model, bit for bit."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from lora2fx.errors import AdapterError
from lora2fx.passes.install import restore_owners
from lora2fx.program import RECORD, Program


def _restore_flags(root: nn.Module, trainable: frozenset[str]) -> None:
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    for parameter, known in names.items():
        parameter.requires_grad_(any(name in trainable for name in known))


def detach_adapters(program: Program) -> None:
    """Give the model its classes and requires_grad flags back, and take adapters and record away; values stay."""
    restore_owners(program.root)
    del vars(program.root)[RECORD]
    _restore_flags(program.root, program.record.trainable_before)


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
    """The base model back, in place: classes, keys, requires_grad flags, and the values of `modules_to_save`.

    Raises `AdapterError`, with the model as it was, where a module that was trained whole changed its shape.
    """
    pairs = _targets(program)
    for live, original in pairs.values():
        live.copy_(original)
    detach_adapters(program)
