"""`fold` and `unload`: the two ways back to a plain model, with the adaptation and without it."""

from __future__ import annotations

from torch import nn

from lora2fx.passes.fold import fold_adapters
from lora2fx.passes.unload import unload_adapters
from lora2fx.program import program_of
from lora2fx.reports import Report


def fold(model: nn.Module, strict: bool = True) -> Report:
    """Add every ΔW to its weight, in place, and give the model its own classes and keys back.

    ΔW and the sum are computed in float64 and rounded once to the weight's dtype. With `strict` an unfinished
    pruning schedule is a `ScheduleError`; without, a warning. A non-finite factor or result is an `AdapterError`.
    On any error the model is as it was.
    """
    return fold_adapters(program_of(model, "fold"), strict=strict)


def unload(model: nn.Module) -> None:
    """Take the adapters off: the base model back, bit for bit, trained heads included."""
    unload_adapters(program_of(model, "unload"))
