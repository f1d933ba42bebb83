"""The gradient of every adapter, against the one that the folded weight's gradient implies by the chain rule."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite

import torch
from torch import Tensor, nn

from lora2fx.adapter import Adapter
from lora2fx.inputs import Inputs
from lora2fx.passes.copying import Folded
from lora2fx.passes.outputs import Mode, Outputs, call, running
from lora2fx.passes.probe import pull_back, wobbled
from lora2fx.program import Program

_LEAST = 1e-30
"""A gradient of a smaller norm has lost its digits to underflow, and shows nothing."""


@dataclass(frozen=True)
class GradientErrors:
    """By adapter ‖g − expected‖ / ‖expected‖ of the worst parameter; `unreached` get none either way, or underflow.

    `found` and `expected` are the outputs, in `mode`, that these are gradients of.
    """

    errors: dict[str, float]
    unreached: tuple[str, ...]
    mode: Mode
    found: Outputs
    expected: Outputs


Gradients = dict[str, list[Tensor | None]]


def _trained(adapter: Adapter) -> list[nn.Parameter]:
    return [parameter for parameter in adapter.parameters() if parameter.requires_grad]


def _pulled_back(
    model: nn.Module, inputs: Inputs, mode: Mode, leaves: list[nn.Parameter]
) -> tuple[Outputs, list[Tensor | None]]:
    with running(model, mode):
        outputs = call(model, inputs)
        kept = tuple(output.detach().clone() for output in outputs)
        return kept, pull_back(outputs, leaves)


def _through_adapters(program: Program, inputs: Inputs, mode: Mode) -> tuple[Outputs, Gradients]:
    leaves = {name: _trained(adapter) for name, adapter in program.adapters.items()}
    outputs, gradients = _pulled_back(program.model, inputs, mode, [leaf for own in leaves.values() for leaf in own])
    flat = iter(gradients)
    return outputs, {name: [next(flat) for _ in own] for name, own in leaves.items()}


def _of_weights(inputs: Inputs, folded: Folded, mode: Mode) -> tuple[Outputs, list[Tensor | None]]:
    for weight in folded.weights.values():
        weight.requires_grad_(True)
    return _pulled_back(folded.model, inputs, mode, list(folded.weights.values()))


def _through_weights(program: Program, inputs: Inputs, folded: Folded, mode: Mode) -> tuple[Outputs, Gradients]:
    """∂L/∂W of the folded copy, pulled back through ΔW to each adapter's parameters."""
    outputs, found = _of_weights(inputs, folded, mode)
    expected: Gradients = {}
    for name, gradient in zip(folded.weights, found, strict=True):
        adapter = program.adapters[name]
        expected[name] = [None for _ in _trained(adapter)] if gradient is None else _pulled(adapter, gradient)
    return outputs, expected


@torch.enable_grad()
def _pulled(adapter: Adapter, gradient: Tensor) -> list[Tensor | None]:
    """The gradient of ⟨∂L/∂W, ΔW⟩ = ⟨right · ∂L/∂Wᵀ, (left · gate)ᵀ⟩, which needs no ΔW."""
    rows, right = adapter.rows(), adapter.right()
    dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
    matrix = adapter.site.to_matrix(dense.to(rows))
    matrix = matrix if adapter.columns is None else matrix.index_select(-1, adapter.columns)
    total = ((right @ matrix.mT) * rows.mT).sum()  # few rows, many columns: a BLAS is several times faster so
    return list(torch.autograd.grad(total, _trained(adapter), allow_unused=True))


def _size(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else float(gradient.double().norm())


def _error(found: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """The worst parameter's ‖g − e‖ / ‖e‖; where e is 0, ‖g‖ relative to the other parameters' gradients."""
    whole = max(map(_size, expected))
    worst = 0.0
    for one, wanted in zip(found, expected, strict=True):
        gap = _size(one) if wanted is None else _size(wanted if one is None else one.double() - wanted.double())
        error = gap / (_size(wanted) or whole)
        worst = max(worst, error if isfinite(error) else inf)
    return worst


def backward_error(inputs: Inputs, folded: Folded, mode: Mode) -> str | None:
    """What the folded copy itself raises when it is differentiated, None where it can be."""
    try:
        _of_weights(inputs, folded, mode)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def compare_gradients(program: Program, inputs: Inputs, folded: Folded, mode: Mode) -> GradientErrors:
    """Compare with the factors as they are, in a mode with gradients; no `.grad` is touched.

    An adapter that gets no gradient though its folded weight does has error 1, a non-finite one has error inf.
    """
    outputs, found = _through_adapters(program, inputs, mode)
    implied, expected = _through_weights(program, inputs, folded, mode)
    errors, unreached = {}, []
    for name, wanted in expected.items():
        sizes = [_size(gradient) for gradient in wanted]
        if not all(map(isfinite, sizes)) or not any(size > _LEAST for size in (*sizes, *map(_size, found[name]))):
            unreached.append(name)
        else:
            errors[name] = _error(found[name], wanted) if any(sizes) else inf
    return GradientErrors(errors, tuple(unreached), mode, outputs, implied)


def gradient_noise(program: Program, inputs: Inputs, folded: Folded, mode: Mode) -> dict[str, float]:
    """By adapter how much its gradient moves, likewise, when every adapted weight moves by its last bit."""
    _, expected = _through_weights(program, inputs, folded, mode)
    with wobbled(list(folded.weights.values())):
        _, moved = _through_weights(program, inputs, folded, mode)
    return {name: _error(moved[name], wanted) if any(map(_size, wanted)) else 0.0 for name, wanted in expected.items()}
