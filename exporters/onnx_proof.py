"""The output gate: an exported file computes what the adapted model does, measured against the adapters' own effect.

An absolute tolerance proves nothing, since a dropped layer may move the outputs by less than any usual one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lora2fx.errors import ExportError
from lora2fx.exporters.copies import double_copy
from lora2fx.exporters.shapes import Case, Tensors
from lora2fx.inputs import flatten_outputs

Array = NDArray[Any]
MARGIN_SHARE = 1e-3
NOISE_FACTOR = 8.0
VACUOUS_BELOW = 100.0


@dataclass
class _Measure:
    """One output over all cases: the file's error, the adapters' effect and float rounding, as largest differences."""

    name: str
    errors: dict[str, float] = field(default_factory=dict)
    margin: float = 0.0
    noise: float = 0.0

    @property
    def tolerance(self) -> float:
        return max(MARGIN_SHARE * self.margin, NOISE_FACTOR * self.noise)

    def to_dict(self) -> dict[str, Any]:
        error = max(self.errors.values())
        return {"name": self.name, "error": error, "margin": self.margin, "noise": self.noise, "max": self.tolerance}


@dataclass(frozen=True)
class Proof:
    """What the output gate measured; it has passed."""

    max_error: float
    margin: float
    noise: float
    vacuous: bool
    shapes: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]
    noise_source: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}


def prove_outputs(
    run: Callable[[Tensors], Sequence[Array]],
    reference: nn.Module,
    base: nn.Module,
    cases: Sequence[Case],
    names: Sequence[str],
) -> Proof:
    """Hold the file's outputs (`run`) against the reference's, for every case and output.

    error ≤ max(10⁻³ · margin, 8 · noise) with margin = max|reference − base| and noise = max|reference in its own
    dtype − in float64|, each over all cases. `vacuous` where margin < 100 · noise for every output: then only the
    weights prove that the adaptation is there. Raises `ExportError` naming output and case.
    """
    measures = [_Measure(name) for name in names]
    exact, source = _double(reference, cases[0])
    for case in cases:
        expected = outputs_of(reference, case.tensors)
        plain = expected if base is reference else outputs_of(base, case.tensors)
        precise = None if exact is None else outputs_of(exact, _doubled(case.tensors))
        _measure(measures, case.name, run(case.tensors), expected, plain, precise)
    _check(measures)
    errors = {case.name: max(measure.errors[case.name] for measure in measures) for case in cases}
    shapes = [
        {"case": case.name, "error": errors[case.name], "inputs": {k: list(t.shape) for k, t in case.tensors.items()}}
        for case in cases
    ]
    ratio = max(measures, key=lambda measure: measure.margin / measure.noise if measure.noise else 0.0)
    return Proof(
        max_error=max(errors.values()),
        margin=ratio.margin,
        noise=ratio.noise,
        vacuous=ratio.margin < VACUOUS_BELOW * ratio.noise or ratio.margin == 0.0,
        shapes=tuple(shapes),
        outputs=tuple(measure.to_dict() for measure in measures),
        noise_source=source,
    )


def outputs_of(model: nn.Module, tensors: Tensors) -> list[Array]:
    """The model's outputs as arrays, in eval mode's order of its containers."""
    with torch.no_grad():
        return [tensor.detach().cpu().numpy() for tensor in flatten_outputs(model(**tensors))]


def _double(reference: nn.Module, case: Case) -> tuple[nn.Module | None, str]:
    """The reference in float64, or None where it can't run so: then noise is what its dtype rounds at least."""
    try:
        exact = double_copy(reference)
        outputs_of(exact, _doubled(case.tensors))
    except (RuntimeError, TypeError, ValueError, ExportError) as error:
        return None, f"the dtype's own rounding; the model doesn't run in float64 ({type(error).__name__})"
    return exact, "float64"


def _doubled(tensors: Tensors) -> Tensors:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _measure(
    measures: Sequence[_Measure],
    case: str,
    found: Sequence[Array],
    expected: Sequence[Array],
    plain: Sequence[Array],
    precise: Sequence[Array] | None,
) -> None:
    if len(found) != len(expected) or len(measures) != len(expected):
        raise ExportError(f"the exported file gives {len(found)} outputs where the model gives {len(expected)}.")
    for index, measure in enumerate(measures):
        if found[index].shape != expected[index].shape:
            raise ExportError(
                f"the exported file's output {measure.name} is {found[index].shape} at {case}, the model's is"
                f" {expected[index].shape}. Keep that dimension fixed with dynamic_axes=, or export with dynamic=False."
            )
        measure.errors[case] = largest_difference(found[index], expected[index])
        measure.margin = max(measure.margin, largest_difference(plain[index], expected[index]))
        measure.noise = max(measure.noise, _least_noise(expected[index]))
        if precise is not None:
            measure.noise = max(measure.noise, largest_difference(precise[index], expected[index]))


def largest_difference(own: Array, other: Array) -> float:
    """max|own − other| in float64; equal infinities and two NaNs differ by 0, a NaN or infinity on one side by inf."""
    own, other = own.astype(np.float64), other.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.abs(own - other)
    same = (own == other) | (np.isnan(own) & np.isnan(other))
    return float(np.nan_to_num(np.where(same, 0.0, difference), nan=np.inf, posinf=np.inf).max(initial=0.0))


def _least_noise(expected: Array) -> float:
    """One rounding of the output's largest finite entry; 0 for integers."""
    if not np.issubdtype(expected.dtype, np.floating):
        return 0.0
    finite = np.abs(expected[np.isfinite(expected)].astype(np.float64))
    return float(np.finfo(expected.dtype).eps * finite.max(initial=0.0))


def _check(measures: Sequence[_Measure]) -> None:
    for measure in measures:
        for case, error in measure.errors.items():
            if not error <= measure.tolerance:
                raise ExportError(
                    f"the exported file does not compute what the model does: at {case}, output {measure.name} is"
                    f" off by {error:.3g}, and {measure.tolerance:.3g} is allowed (adapters' effect"
                    f" {measure.margin:.3g}, rounding {measure.noise:.3g}). Nothing was written."
                )
