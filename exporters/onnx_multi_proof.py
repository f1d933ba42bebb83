"""What `mode="multi"` proves beside outputs: the wiring of every site, and the factors in each adapter's file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lora2fx.adapter import Adapter
from lora2fx.errors import ExportError
from lora2fx.exporters.copies import Copies, double_copy
from lora2fx.exporters.onnx_adapters import read_adapter
from lora2fx.exporters.onnx_attempts import Plan
from lora2fx.exporters.onnx_proof import NOISE_FACTOR, Array, largest_difference, outputs_of
from lora2fx.exporters.onnx_session import OnnxModel
from lora2fx.exporters.onnx_swap import Slot, Swappable, factor_name, probe, without
from lora2fx.exporters.shapes import Tensors
from lora2fx.program import program_of

SEEN = 10.0
"""A probed site counts as proven where it moves an output by this many times what the gate lets pass."""


def prove_wiring(
    model: OnnxModel, shell: Swappable, slots: Mapping[str, Slot], base: nn.Module, plan: Plan
) -> dict[str, Any]:
    """Random factors on every site at once: outputs as PyTorch's, each site seen to matter.

    error ≤ 8 · noise, with noise = max|float32 − float64|; a site whose factors move no output by 10 times that
    (`unseen`) is one that the outputs hardly depend on in PyTorch either.
    """
    factors = probe(slots, base)
    given = plan.cases[0].tensors | factors
    own = {name: value for name, value in plan.cases[0].tensors.items() if name in model.inputs}
    feed = {name: value.numpy() for name, value in (own | factors).items()}
    found = [np.asarray(value) for value in model.session.run(None, feed)]
    expected = outputs_of(shell, given)
    allowed = [
        max(NOISE_FACTOR * noise, NOISE_FACTOR * _rounding(e))
        for noise, e in zip(_noise(shell, given, expected), expected, strict=True)
    ]
    errors = [largest_difference(a, b) for a, b in zip(found, expected, strict=True)]
    for name, error, limit in zip(plan.names, errors, allowed, strict=True):
        if not error <= limit:
            raise ExportError(
                f"mode='multi': with random factors on every site output {name} is off by {error:.3g}, and {limit:.3g}"
                " is allowed: a factor isn't used where its site is. Nothing was written."
            )
    unseen = []
    for site in dict.fromkeys(slot.site for slot in slots.values() if slot.rank_dim is not None):
        moved = outputs_of(shell, without(given, slots, site))
        if not any(
            largest_difference(a, b) > SEEN * limit for a, b, limit in zip(moved, expected, allowed, strict=True)
        ):
            unseen.append(site)
    return {"max_error": max(errors), "allowed": max(allowed), "unseen": unseen}


def _noise(shell: Swappable, given: Tensors, expected: list[Array]) -> list[float]:
    try:
        exact = outputs_of(
            double_copy(shell), {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
        )
    except (RuntimeError, TypeError, ValueError):
        return [0.0] * len(expected)
    return [largest_difference(a, b) for a, b in zip(exact, expected, strict=True)]


def _rounding(expected: Array) -> float:
    return (
        0.0 if expected.dtype.kind != "f" else float(np.finfo(expected.dtype).eps * np.abs(expected).max(initial=0.0))
    )


def prove_factors(file: Path, copies: Copies, slots: Mapping[str, Slot]) -> None:
    """Each site's ΔW out of the file, as the product of its factors, within the rounding of the factors."""
    found = read_adapter(file).parameters
    for adapter in _adapters(copies):
        name = factor_name(adapter.site)
        delta = adapter.exact().delta()
        a, b = found.get(f"{name}.A"), found.get(f"{name}.B")
        made = torch.zeros_like(delta) if a is None or b is None else _double(a) @ _double(b)
        bound = torch.zeros_like(delta) if a is None or b is None else _double(a).abs() @ _double(b).abs()
        eps = torch.finfo(slots[f"{name}.A"].default.dtype).eps
        if not bool(((made - delta).abs() <= eps * bound + 1e-9 * delta.abs().max()).all()):
            raise ExportError(f"mode='multi': the factors of {name} in {file.name} don't make its ΔW.")


def _double(array: Array) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float64))


def _adapters(copies: Copies) -> list[Adapter]:
    return list(program_of(copies.adapted, "export_onnx").adapters.values())
