"""The gradient of every adapter, against the one that the folded weight's gradient implies by the chain rule."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite

import torch
from torch import Tensor, nn

from lora2fx.adapter import Adapter
from lora2fx.inputs import Inputs
from lora2fx.passes.copying import Folded
from lora2fx.passes.outputs import EVAL_GRAD, call, running
from lora2fx.passes.probe import pull_back, wobbled
from lora2fx.program import Program


@dataclass(frozen=True)
class GradientErrors:
    """By adapter ‖g − expected‖ / ‖expected‖ of the worst parameter; `unreached` get none either way."""

    errors: dict[str, float]
    unreached: tuple[str, ...]


def _trained(adapter: Adapter) -> list[nn.Parameter]:
    return [parameter for parameter in adapter.parameters() if parameter.requires_grad]


def _through_adapters(program: Program, inputs: Inputs) -> dict[str, list[Tensor | None]]:
    leaves = {name: _trained(adapter) for name, adapter in program.adapters.items()}
    with running(program.model, EVAL_GRAD):
        flat = iter(pull_back(call(program.model, inputs), [leaf for own in leaves.values() for leaf in own]))
        return {name: [next(flat) for _ in own] for name, own in leaves.items()}


def _through_weights(program: Program, inputs: Inputs, folded: Folded) -> dict[str, list[Tensor | None]]:
    """∂L/∂W of the folded copy, pulled back through ΔW to each adapter's parameters."""
    if not folded.weights:
        return {}
    for weight in folded.weights.values():
        weight.requires_grad_(True)
    with running(folded.model, EVAL_GRAD):
        found = pull_back(call(folded.model, inputs), list(folded.weights.values()))
    expected: dict[str, list[Tensor | None]] = {}
    for name, gradient in zip(folded.weights, found, strict=True):
        adapter = program.adapters[name]
        expected[name] = [None for _ in _trained(adapter)] if gradient is None else _pulled(adapter, gradient)
    return expected


@torch.enable_grad()
def _pulled(adapter: Adapter, gradient: Tensor) -> list[Tensor | None]:
    delta = adapter.weight_delta()
    dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
    return list(torch.autograd.grad(delta, _trained(adapter), dense.to(delta), allow_unused=True))


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


def compare_gradients(program: Program, inputs: Inputs, folded: Folded) -> GradientErrors:
    """Compare with the factors as they are, in eval mode; no `.grad` is touched.

    An adapter that gets no gradient though its folded weight does has error 1, a non-finite one has error inf.
    """
    found, expected = _through_adapters(program, inputs), _through_weights(program, inputs, folded)
    errors, unreached = {}, []
    for name, wanted in expected.items():
        sizes = [_size(gradient) for gradient in wanted]
        if not all(map(isfinite, sizes)) or (not any(sizes) and not any(map(_size, found[name]))):
            unreached.append(name)
        else:
            errors[name] = _error(found[name], wanted) if any(sizes) else inf
    return GradientErrors(errors, tuple(unreached))


def gradient_noise(program: Program, inputs: Inputs, folded: Folded) -> dict[str, float]:
    """By adapter how much its gradient moves, likewise, when every adapted weight moves by its last bit."""
    expected = _through_weights(program, inputs, folded)
    with wobbled(list(folded.weights.values())):
        moved = _through_weights(program, inputs, folded)
    return {name: _error(moved[name], wanted) if any(map(_size, wanted)) else 0.0 for name, wanted in expected.items()}
