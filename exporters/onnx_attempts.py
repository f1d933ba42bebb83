"""Export base and merged model alike, as dynamic and on the model's own kernels as far as torch.export follows."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lora2fx.errors import ExportError, Lora2fxWarning
from lora2fx.exporters.copies import Copies
from lora2fx.exporters.onnx_options import NamedAxes
from lora2fx.exporters.onnx_program import name_outputs, with_plain_kernels
from lora2fx.exporters.onnx_proof import outputs_of
from lora2fx.exporters.onnx_twin import export_pair
from lora2fx.exporters.shapes import Case, Shapes, Tensors, as_dtype, cases, find_axes, given_axes


@dataclass(frozen=True)
class Plan:
    """What is asked of an export: its dynamic dimensions, the inputs to check it with, its outputs' names.

    `fixed` are the dimensions that the model could vary and this plan doesn't.
    """

    shapes: Shapes
    cases: tuple[Case, ...]
    not_checked: tuple[str, ...]
    names: tuple[str, ...]
    fixed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Exported:
    """The two graphs (onnxscript IR; one and the same for a plain model), their plan, and what was switched for it."""

    base: Any
    merged: Any
    plan: Plan
    switched: tuple[str, ...]


def plans_for(
    model: nn.Module, tensors: Tensors, axes: NamedAxes | None, output_names: Sequence[str] | None
) -> Iterator[Plan]:
    """What to try, best first: `axes` None finds the dimensions that may vary, then fixes the sequences; {} fixes all.

    Axes that were given are never given up.
    """
    found = _shapes(model, tensors, axes)
    yield plan_of(model, cases(tensors, found), found, output_names)
    fixed = set(found.traced) - {"batch"}
    if fixed and axes is None:
        shapes = found.without(fixed)
        plan = plan_of(model, cases(tensors, shapes), shapes, output_names)
        yield replace(plan, fixed=frozenset(fixed))


def export_both(copies: Copies, plans: Iterable[Plan], opset: int, dtype: torch.dtype | None = None) -> Exported:
    """The base's and the merged model's graphs by the first plan that torch.export follows.

    Where it refuses, transformers models go to plainer kernels before the next plan is tried, which fixes dimensions
    with a `Lora2fxWarning`. `dtype` is that of the inputs, where it isn't the cases' own. Raises the first
    `ExportError` if nothing helps.
    """
    switched: list[str] = []
    errors: list[ExportError] = []
    for plan in plans:
        for plainer in (False, True):
            now = with_plain_kernels([copies.base, copies.merged]) if plainer else []
            if plainer and not now:
                break
            switched += now
            try:
                base, merged = _graphs(copies, plan, opset, dtype)
            except ExportError as error:
                errors.append(error)
                continue
            if plan.fixed:
                _warn_fixed(plan.fixed, errors[0])
            return Exported(base, merged, plan, tuple(switched))
    raise errors[0]


def _graphs(copies: Copies, plan: Plan, opset: int, dtype: torch.dtype | None) -> tuple[Any, Any]:
    tensors, axes = as_dtype(plan.cases[0].tensors, dtype), plan.shapes.axes
    return export_pair(copies.base, copies.merged, tensors, axes, plan.names, opset)


def _warn_fixed(fixed: frozenset[str], error: ExportError) -> None:
    warnings.warn(
        f"{', '.join(sorted(fixed))} can vary in the model and is fixed in the exported graph, at the size of the"
        f" example inputs: {error}",
        Lora2fxWarning,
        stacklevel=6,
    )


def _runs(model: nn.Module, tensors: Tensors) -> bool:
    try:
        outputs_of(model, tensors)
    except Exception:  # whatever a model's own forward raises at a size that it doesn't take
        return False
    return True


def _shapes(model: nn.Module, tensors: Tensors, axes: NamedAxes | None) -> Shapes:
    if not tensors:
        raise ExportError(f"{type(model).__name__} was given no tensor input: an ONNX graph needs one.")
    outputs_of(model, tensors)  # the user's own inputs: the model's own error is the best message
    if axes is None:
        return find_axes(tensors, lambda inputs: _runs(model, inputs))
    return given_axes(tensors, axes, lambda inputs: _runs(model, inputs))


def plan_of(model: nn.Module, every: Sequence[Case], shapes: Shapes, output_names: Sequence[str] | None) -> Plan:
    """The cases that the model runs at; raises `ExportError` where the first, which is traced, is none of them."""
    can = tuple(case for case in every if _runs(model, case.tensors))
    if not can or can[0] is not every[0]:
        raise ExportError(
            f"{type(model).__name__} runs on the example inputs and not at the sizes to trace,"
            f" {dict(shapes.traced)}. Name the dimensions that may vary with dynamic_axes=."
        )
    skipped = tuple(case.name for case in every if case not in can)
    return Plan(shapes, can, skipped, _output_names(model, can[0].tensors, output_names))


def _output_names(model: nn.Module, tensors: Tensors, given: Sequence[str] | None) -> tuple[str, ...]:
    with torch.no_grad():
        found = name_outputs(model(**tensors), list(tensors))
    if given is None:
        return tuple(found)
    if len(given) != len(found):
        raise ExportError(f"output_names has {len(given)} names, and the outputs are {', '.join(found)}.")
    return tuple(given)
