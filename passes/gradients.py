"""The gradient of every adapter, against the one that the folded weight's gradient implies by the chain rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, isfinite

import torch
from torch import Tensor, nn

from lora2fx.adapter import Adapter
from lora2fx.inputs import Inputs
from lora2fx.passes.copying import Folded
from lora2fx.passes.outputs import Mode, Outputs, call, running
from lora2fx.passes.probe import pull_back, wobbled
from lora2fx.passes.state import OUT_OF_MEMORY
from lora2fx.program import Program

_LEAST = 1e-30
"""A gradient of a smaller norm has lost its digits to underflow, and shows nothing; nor does one that is smaller than a
rounding of the largest among the adapters', as of a query whose keys are all alike."""


@dataclass(frozen=True)
class GradientErrors:
    """By adapter ‖g − expected‖ / ‖expected‖ of the worst parameter; `unreached` get none either way, or rounding.

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
    reached = {name: gradient for name, gradient in zip(folded.weights, found, strict=True) if gradient is not None}
    pulled = _pulled({name: (program.adapters[name], gradient) for name, gradient in reached.items()})
    nothing: Gradients = {name: [None for _ in _trained(program.adapters[name])] for name in folded.weights}
    return outputs, {**nothing, **pulled}


def _matrix(adapter: Adapter, gradient: Tensor) -> Tensor:
    """∂L/∂W as the matrix (*batch, in, out of the adapter's site)."""
    dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
    matrix = adapter.site.to_matrix(dense.to(next(adapter.parameters())))
    return matrix if adapter.columns is None else matrix.index_select(-1, adapter.columns)


@torch.enable_grad()
def _pulled(of_weights: dict[str, tuple[Adapter, Tensor]]) -> Gradients:
    """With ΔW = L R and G = ∂L/∂W, by adapter what G Rᵀ and Lᵀ G give the parameters that L and R are made of."""
    made: list[tuple[Tensor, Tensor]] = []
    for adapter, gradient in of_weights.values():
        rows, right, matrix = adapter.rows(), adapter.right(), _matrix(adapter, gradient)
        # few rows, many columns: a BLAS is several times faster so
        made += [(rows, (right.detach() @ matrix.mT).mT), (right, rows.detach().mT @ matrix)]
    trained = [(tensor, gradient) for tensor, gradient in made if tensor.requires_grad]
    leaves = {name: _trained(adapter) for name, (adapter, _) in of_weights.items()}
    flat = [leaf for own in leaves.values() for leaf in own]
    roots, gradients = zip(*trained, strict=True) if trained else ((), ())
    found = iter(torch.autograd.grad(roots, flat, gradients, allow_unused=True) if flat else ())
    return {name: [next(found) for _ in own] for name, own in leaves.items()}


def _norms(gradients: Gradients) -> dict[str, list[float]]:
    """By adapter each gradient's norm in float64, 0 where there is none."""
    given = [gradient for own in gradients.values() for gradient in own if gradient is not None]
    norms = map(float, torch._foreach_norm(given, 2, dtype=torch.float64) if given else ())
    return {name: [0.0 if one is None else next(norms) for one in own] for name, own in gradients.items()}


def _gaps(found: Gradients, expected: Gradients) -> dict[str, list[float]]:
    """By adapter each ‖g − e‖; where one of them is missing, the other's norm."""
    pairs = {name: list(zip(found[name], wanted, strict=True)) for name, wanted in expected.items()}
    both = [(one, other) for own in pairs.values() for one, other in own if one is not None and other is not None]
    apart = iter(torch._foreach_sub([one for one, _ in both], [other for _, other in both]) if both else ())
    return _norms({name: [_or_next(*pair, apart) for pair in own] for name, own in pairs.items()})


def _or_next(one: Tensor | None, other: Tensor | None, apart: Iterator[Tensor]) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return next(apart)


def _error(gaps: list[float], sizes: list[float]) -> float:
    """The worst parameter's ‖g − e‖ / ‖e‖; where e is 0, ‖g‖ relative to the other parameters' gradients."""
    errors = [gap / (size or max(sizes)) for gap, size in zip(gaps, sizes, strict=True)]
    return max((error if isfinite(error) else inf for error in errors), default=0.0)


def backward_error(inputs: Inputs, folded: Folded, mode: Mode) -> str | None:
    """What the folded copy itself raises when it is differentiated, None where it can be."""
    try:
        _of_weights(inputs, folded, mode)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def compare_gradients(program: Program, inputs: Inputs, folded: Folded, mode: Mode) -> GradientErrors:
    """Compare with the factors as they are, in a mode with gradients; no `.grad` is touched.

    An adapter that gets no gradient though its folded weight does has error 1, a non-finite one has error inf.
    """
    outputs, found = _through_adapters(program, inputs, mode)
    implied, expected = _through_weights(program, inputs, folded, mode)
    gaps, wanted = _gaps(found, expected), _norms(expected)
    errors, unreached, least = {}, [], _least(program, wanted)
    for name, sizes in wanted.items():
        shown = [max(pair) > least[name] for pair in zip(sizes, gaps[name], strict=True)]
        if not all(map(isfinite, sizes)) or not any(shown):
            unreached.append(name)
        else:
            errors[name] = _error(gaps[name], sizes) if any(sizes) else inf
    return GradientErrors(errors, tuple(unreached), mode, outputs, implied)


def _least(program: Program, norms: dict[str, list[float]]) -> dict[str, float]:
    """By adapter the norm below which a gradient is rounding, of what the largest of them is made of."""
    largest = max((size for sizes in norms.values() for size in sizes if isfinite(size)), default=0.0)
    dtypes = {name: next(adapter.parameters()).dtype for name, adapter in program.adapters.items()}
    return {name: max(_LEAST, torch.finfo(dtype).eps * largest) for name, dtype in dtypes.items()}


def gradient_noise(program: Program, inputs: Inputs, folded: Folded, mode: Mode) -> dict[str, float]:
    """By adapter how much its gradient moves, likewise, when every adapted weight moves by its last bit."""
    _, expected = _through_weights(program, inputs, folded, mode)
    with wobbled(list(folded.weights.values())):
        _, moved = _through_weights(program, inputs, folded, mode)
    gaps = _gaps(moved, expected)
    return {name: _error(gaps[name], sizes) if any(sizes) else 0.0 for name, sizes in _norms(expected).items()}
