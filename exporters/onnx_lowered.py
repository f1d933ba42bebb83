"""An adapted model in float16: its copies to export, merged before they are rounded, and what float16 alone does."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from lora2fx.errors import ExportError
from lora2fx.exporters.copies import Change, Copies, copy_of
from lora2fx.exporters.onnx_proof import Lowering, largest_difference, outputs_of
from lora2fx.exporters.runtime import first_line
from lora2fx.exporters.shapes import Tensors, as_dtype


def half_copies(copies: Copies) -> Copies:
    """Float16 copies of all three; raises `ExportError` where a weight is beyond float16's range (±65504)."""
    made = {id(model): copy_of(model).half() for model in (copies.adapted, copies.base, copies.merged)}
    for name, value in made[id(copies.merged)].named_parameters():
        if not torch.isfinite(value).all():
            raise ExportError(f"dtype='float16': {name} holds values beyond ±65504. Export it in float32.")
    changes = tuple(_half_change(change) for change in copies.changes)
    adapted, base, merged = (made[id(model)] for model in (copies.adapted, copies.base, copies.merged))
    return Copies(adapted, base, merged, changes, copies.folded)


def _half_change(change: Change) -> Change:
    return replace(change, before=change.before.detach().half())


def float_model(model: nn.Module) -> nn.Module:
    """A float32 copy on the CPU of a model in 16 bits; a float32 model itself."""
    low = (torch.float16, torch.bfloat16)
    return copy_of(model).float() if any(p.dtype in low for p in model.parameters()) else model


def half_lowering(copies: Copies, lowered: Copies) -> Lowering:
    """How far the adapted model's float16 copy, run by PyTorch, is from the model itself."""

    def measure(tensors: Tensors) -> list[float]:
        try:
            found = outputs_of(lowered.adapted, as_dtype(tensors, torch.float16))
        except (RuntimeError, TypeError, ValueError) as error:
            raise ExportError(
                f"dtype='float16': {type(copies.adapted).__name__} doesn't run in float16, so that nothing says what"
                f" rounding may do: {first_line(error)}. Export it in float32."
            ) from error
        exact = outputs_of(copies.adapted, tensors)
        return [largest_difference(own, other) for own, other in zip(found, exact, strict=True)]

    return measure
