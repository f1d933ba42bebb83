"""`export_onnx`: an adapted model as a plain ONNX file with its updates merged, proven before it is there."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora2fx.errors import ExportError
from lora2fx.exporters.copies import Copies, bind_constants, copies_of
from lora2fx.exporters.onnx_files import note_metadata, publish_onnx, save_onnx
from lora2fx.exporters.onnx_graph import op_counts, paired_constants
from lora2fx.exporters.onnx_program import (
    export_program,
    name_outputs,
    plain_attention,
    with_eager_attention,
    without_cache,
)
from lora2fx.exporters.onnx_proof import Proof, outputs_of, prove_outputs
from lora2fx.exporters.onnx_weights import check_weights
from lora2fx.exporters.runtime import Provider, open_session, require_onnx_packages, run_session
from lora2fx.exporters.shapes import Shapes, Tensors, cases, find_axes, given_axes, named_inputs
from lora2fx.exporters.writing import check_file, staging
from lora2fx.inputs import ExampleInputs, as_inputs
from lora2fx.reports import Report


@dataclass(frozen=True)
class Options:
    """How to export: names, dynamic dimensions, opset, and where ONNX Runtime runs the proof."""

    output_names: Sequence[str] | None = None
    dynamic: bool = True
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None
    opset: int = 20
    providers: Sequence[Provider] = ("CPUExecutionProvider",)
    external_data: bool | None = None
    metadata: bool = True


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: ExampleInputs = None,
    *,
    output_names: Sequence[str] | None = None,
    dynamic: bool = True,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    opset: int = 20,
    providers: Sequence[Provider] = ("CPUExecutionProvider",),
    external_data: bool | None = None,
    metadata: bool = True,
) -> Report:
    """Write the model with its adapters merged as ONNX, with a JSON report `<path>.report.json` beside it.

    The model stays adapted and untouched: copies of it are folded and exported. A plain model is exported as it is.
    Dynamic dimensions are found by trying ("batch", "sequence", "decoder_sequence"); `dynamic_axes`, such as
    `{"input_ids": {0: "batch"}}`, names them instead, and `dynamic=False` fixes them all. `external_data` keeps weights
    in a file of their own (None: above 1.5 GB), named by their content.

    The file counts as written once it has passed: the ONNX checker; ONNX Runtime on `providers[0]` against the adapted
    model at several shapes (`prove_outputs`); and the base model's export, from which it may differ in each site's ΔW
    alone (`check_weights`). Raises `ExportError` otherwise, or what folding raises (an unfinished pruning schedule, a
    factor that isn't finite); nothing is left behind then, and an older file of that name stays.
    """
    require_onnx_packages()
    options = Options(output_names, dynamic, dynamic_axes, opset, tuple(providers), external_data, metadata)
    return export_copies(copies_of(model, "export_onnx"), path, example_inputs, options)


def export_copies(
    copies: Copies, path: str | os.PathLike[str], example_inputs: ExampleInputs, options: Options
) -> Report:
    """`export_onnx` from the three copies on; the copies' configs may be switched."""
    place = Path(path)
    check_file(place)
    _refuse_bfloat16(copies.adapted)
    models = list({id(m): m for m in (copies.adapted, copies.base, copies.merged)}.values())
    prepared = ["eval mode", "fused encoder path off", *without_cache(models)]
    with plain_attention():
        tensors, constants = named_inputs(copies.adapted, as_inputs(copies.adapted, example_inputs))
        for module in models:
            bind_constants(module, constants)
        shapes = _shapes(copies.adapted, tensors, options)
        checked, skipped = _runnable(copies.adapted, tensors, shapes)
        names = _output_names(copies.adapted, checked[0].tensors, options)
        base, merged = _export(copies, checked[0].tensors, shapes, names, options, prepared)
        weights = check_weights(paired_constants(base, merged), copies.changes)
        with staging(place.parent) as aside:
            staged = save_onnx(merged, aside / place.name, options.external_data)
            session = open_session(staged[0], options.providers)
            proof = prove_outputs(functools.partial(run_session, session), copies.adapted, copies.base, checked, names)
            details = _details(session, merged, shapes, proof, weights, prepared, skipped, constants, options)
            del session  # it may hold the file open
            report = _report(copies, details, proof)
            if options.metadata:
                note_metadata(staged[0], copies, proof)
            publish_onnx(staged, place, report)
    return report


def _refuse_bfloat16(model: nn.Module) -> None:
    if any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
        raise ExportError(
            f"{type(model).__name__} is in bfloat16, which ONNX Runtime can't be given from Python, so that the file"
            " can't be proven. Export model.float() or model.half()."
        )


def _runs(model: nn.Module, tensors: Tensors) -> bool:
    try:
        outputs_of(model, tensors)
    except Exception:  # whatever a model's own forward raises at a size that it doesn't take
        return False
    return True


def _shapes(model: nn.Module, tensors: Tensors, options: Options) -> Shapes:
    if not tensors:
        raise ExportError(f"{type(model).__name__} was given no tensor input: an ONNX graph needs one.")
    outputs_of(model, tensors)  # the user's own inputs: their error is the best message
    if not options.dynamic:
        return Shapes({}, {}, {})
    if options.dynamic_axes is not None:
        return given_axes(tensors, options.dynamic_axes, lambda inputs: _runs(model, inputs))
    return find_axes(tensors, lambda inputs: _runs(model, inputs))


def _runnable(model: nn.Module, tensors: Tensors, shapes: Shapes) -> tuple[list[Any], list[str]]:
    """The cases that the model itself can run, and the names of those that it can't."""
    every = cases(tensors, shapes)
    can = [case for case in every if _runs(model, case.tensors)]
    if not can or can[0] is not every[0]:
        raise ExportError(
            f"{type(model).__name__} runs on the example inputs and not at the sizes to trace,"
            f" {dict(shapes.traced)}. Name the dimensions that may vary with dynamic_axes=."
        )
    return can, [case.name for case in every if case not in can]


def _output_names(model: nn.Module, tensors: Tensors, options: Options) -> list[str]:
    with torch.no_grad():
        found = name_outputs(model(**tensors), list(tensors))
    if options.output_names is None:
        return found
    if len(options.output_names) != len(found):
        raise ExportError(f"output_names has {len(options.output_names)} names; the outputs are {', '.join(found)}.")
    return list(options.output_names)


def _export(
    copies: Copies, tensors: Tensors, shapes: Shapes, names: Sequence[str], options: Options, prepared: list[str]
) -> tuple[Any, Any]:
    """The base's and the merged model's graphs; on eager attention where the model's own can't be exported."""

    def both() -> tuple[Any, Any]:
        merged = export_program(copies.merged, tensors, shapes.axes, names, options.opset)
        if copies.base is copies.merged:
            return merged, merged
        return export_program(copies.base, tensors, shapes.axes, names, options.opset), merged

    try:
        return both()
    except ExportError as error:
        if not with_eager_attention([copies.base, copies.merged]):
            raise
        prepared.append(f"eager attention, since: {error}")
    return both()


def _details(
    session: Any,
    model: Any,
    shapes: Shapes,
    proof: Proof,
    weights: Mapping[str, int],
    prepared: Sequence[str],
    skipped: Sequence[str],
    constants: Mapping[str, Any],
    options: Options,
) -> dict[str, Any]:
    return proof.to_dict() | {
        "weights": dict(weights),
        "provider": session.get_providers()[0],
        "opset": options.opset,
        "op_counts": op_counts(model),
        "dynamic_axes": shapes.axes,
        "traced": dict(shapes.traced),
        "inputs": [value.name for value in session.get_inputs()],
        "output_names": [value.name for value in session.get_outputs()],
        "constants": dict(constants),
        "preparation": list(prepared),
        "not_checked": list(skipped),
    }


def _report(copies: Copies, details: Mapping[str, Any], proof: Proof) -> Report:
    adapted = copies.folded is not None
    title = "export_onnx: merged model" if adapted else "export_onnx: base model (it holds no adapters)"
    checks = ["ONNX checker", "outputs", *(["graph", "weights"] if adapted else [])]
    return Report(
        title,
        sites=copies.folded.sites if copies.folded else (),
        totals=copies.folded.totals if copies.folded else {},
        verify={"status": "passed", "max_error": proof.max_error, "checks": checks},
        details=details,
    )
