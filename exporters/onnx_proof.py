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
from lora2fx.exporters.copies import Copies, double_copy
from lora2fx.exporters.shapes import Case, Tensors
from lora2fx.inputs import flatten_outputs

Array = NDArray[Any]
MARGIN_SHARE = 1e-3
NOISE_FACTOR = 8.0
MERGE_FACTOR = 64.0
VACUOUS_BELOW = 100.0


@dataclass
class _Measure:
    """One output over all cases, as largest differences from the adapted model's: what was exported, by case (errors),
    the base's (margin), the adapted model's own in float64 (noise), and the merged copy's (merge).

    `lowering` is what fewer bits alone do to the model; `agreed` counts rows of the last dimension whose largest
    entry stayed in its place.
    """

    name: str
    errors: dict[str, float] = field(default_factory=dict)
    margin: float = 0.0
    noise: float = 0.0
    lowering: float = 0.0
    merge: float = 0.0
    largest: float = 0.0
    agreed: int = 0
    rows: int = 0

    @property
    def rounding(self) -> float:
        return max(self.noise, self.lowering)

    @property
    def tolerance(self) -> float:
        return max(MARGIN_SHARE * self.margin, NOISE_FACTOR * self.rounding)

    @property
    def contrast(self) -> float:
        return self.margin / self.rounding if self.rounding else 0.0

    def compare(self, own: Array, other: Array) -> None:
        """Note the scale of what was expected, and where largest entries are."""
        finite = np.abs(other[np.isfinite(other)].astype(np.float64))
        self.largest = max(self.largest, float(finite.max(initial=0.0)))
        if own.ndim > 1 and own.shape[-1] > 1 and own.size:
            same = own.argmax(-1) == other.argmax(-1)
            self.agreed, self.rows = self.agreed + int(same.sum()), self.rows + same.size

    def to_dict(self) -> dict[str, Any]:
        error = max(self.errors.values())
        return {
            "name": self.name,
            "error": error,
            "allowed": self.tolerance,
            "margin": self.margin,
            "noise": self.noise,
            "lowering": self.lowering,
            "merge_error": self.merge,
            "relative_error": error / self.largest if self.largest else 0.0,
            "same_argmax": self.agreed / self.rows if self.rows else None,
        }


@dataclass(frozen=True)
class Proof:
    """What the output gate measured; it has passed. Margin and noise are those of the output that tells most."""

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


Run = Callable[[Tensors], Sequence[Array]]
Lowering = Callable[[Tensors], Sequence[float]]
"""For one case's inputs, how far fewer bits alone move each output of the model."""


def prove_outputs(
    run: Run, copies: Copies, cases: Sequence[Case], names: Sequence[str], lowering: Lowering | None = None
) -> Proof:
    """Hold what was exported (`run`) against the adapted model, for every case and output.

    error ≤ max(10⁻³ · margin, 8 · noise) with margin = max|adapted − base| and noise = max|adapted in its own dtype −
    in float64|, each over all cases; and the merged copy stays within 64 · noise of the adapted model, which no small
    part of the adaptation escapes. A file of fewer bits than the model has (float16, int8) may be off by 8 times what
    those bits do by themselves (`lowering`) too. `vacuous` where margin < 100 · that rounding for every output: then
    only the weights prove that the adaptation is there. Raises `ExportError` naming output and case.
    """
    measures = [_Measure(name) for name in names]
    exact, source = _double(copies.adapted, cases[0])
    for case in cases:
        _measure(measures, case, run(case.tensors), copies, exact)
        for measure, moved in zip(measures, lowering(case.tensors) if lowering else (), strict=False):
            measure.lowering = max(measure.lowering, moved)
    for measure in measures:
        _check(measure)
    best = max(measures, key=lambda measure: measure.contrast)
    errors = {case.name: max(measure.errors[case.name] for measure in measures) for case in cases}
    return Proof(
        max_error=max(errors.values()),
        margin=best.margin,
        noise=best.rounding,
        vacuous=best.contrast < VACUOUS_BELOW,
        shapes=tuple(_shape_entry(case, errors[case.name]) for case in cases),
        outputs=tuple(measure.to_dict() for measure in measures),
        noise_source=source,
    )


def _shape_entry(case: Case, error: float) -> dict[str, Any]:
    return {"case": case.name, "error": error, "inputs": {k: list(t.shape) for k, t in case.tensors.items()}}


def outputs_of(model: nn.Module, tensors: Tensors) -> list[Array]:
    """The outputs as arrays, in eval mode's order of the containers; bfloat16, unknown to numpy, as float32."""
    with torch.no_grad():
        found = [tensor.detach().cpu() for tensor in flatten_outputs(model(**tensors))]
    return [(tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy() for tensor in found]


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
    measures: Sequence[_Measure], case: Case, found: Sequence[Array], copies: Copies, exact: nn.Module | None
) -> None:
    expected = outputs_of(copies.adapted, case.tensors)
    _check_shapes(measures, case, found, expected)
    plain = expected if copies.base is copies.adapted else outputs_of(copies.base, case.tensors)
    merged = expected if copies.merged is copies.adapted else outputs_of(copies.merged, case.tensors)
    precise = expected if exact is None else outputs_of(exact, _doubled(case.tensors))
    for measure, *values, reference in zip(measures, found, plain, merged, precise, expected, strict=True):
        error, margin, merge, noise = (largest_difference(value, reference) for value in values)
        measure.errors[case.name] = error
        measure.compare(values[0], reference)
        measure.margin = max(measure.margin, margin)
        measure.merge = max(measure.merge, merge)
        measure.noise = max(measure.noise, noise, _least_noise(reference))


def _check_shapes(measures: Sequence[_Measure], case: Case, found: Sequence[Array], expected: Sequence[Array]) -> None:
    if not len(found) == len(expected) == len(measures):
        raise ExportError(f"what was exported gives {len(found)} outputs where the model gives {len(expected)}.")
    for measure, own, other in zip(measures, found, expected, strict=True):
        if own.shape != other.shape:
            raise ExportError(
                f"what was exported gives {measure.name} as {own.shape} at {case.name}, the model as {other.shape}."
                " Keep that dimension fixed with dynamic_axes=, or export with dynamic=False."
            )


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


def _check(measure: _Measure) -> None:
    for case, error in measure.errors.items():
        if not error <= measure.tolerance:
            raise ExportError(
                f"what was exported does not compute what the model does: at {case}, output {measure.name} is off by"
                f" {error:.3g}, and {measure.tolerance:.3g} is allowed (adapters' effect {measure.margin:.3g}, rounding"
                f" {measure.rounding:.3g}). Nothing was written."
            )
    if not measure.merge <= MERGE_FACTOR * measure.noise:
        raise ExportError(
            f"the merged weights do not compute what the adapted model does: output {measure.name} is off by"
            f" {measure.merge:.3g}, where rounding is {measure.noise:.3g}. An adapter isn't used where its weight is;"
            " transform the model with verify=True, which names it. Nothing was written."
        )
