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
from lora2fx.exporters.onnx_attempts import Exported, NamedAxes, export_both
from lora2fx.exporters.onnx_files import note_metadata, publish_onnx, save_onnx
from lora2fx.exporters.onnx_graph import op_counts, paired_constants
from lora2fx.exporters.onnx_program import plain_attention, without_cache
from lora2fx.exporters.onnx_proof import Proof, prove_outputs
from lora2fx.exporters.onnx_weights import check_weights
from lora2fx.exporters.runtime import Provider, open_session, require_onnx_packages, run_session
from lora2fx.exporters.shapes import named_inputs
from lora2fx.exporters.writing import check_file, staging
from lora2fx.inputs import ExampleInputs, as_inputs
from lora2fx.reports import Report


@dataclass(frozen=True)
class Options:
    """How to export: names, dynamic dimensions, opset, and where ONNX Runtime runs the proof."""

    output_names: Sequence[str] | None = None
    dynamic: bool = True
    dynamic_axes: NamedAxes | None = None
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
    dynamic_axes: NamedAxes | None = None,
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
        axes = options.dynamic_axes if options.dynamic else {}
        exported = export_both(copies, tensors, axes, options.output_names, options.opset)
        weights = check_weights(paired_constants(exported.base, exported.merged), copies.changes)
        with staging(place.parent) as aside:
            staged = save_onnx(exported.merged, aside / place.name, options.external_data)
            session = open_session(staged[0], options.providers)
            run, plan = functools.partial(run_session, session), exported.plan
            proof = prove_outputs(run, copies, plan.cases, plan.names)
            details = _details(session, exported, proof, weights, options.opset)
            details |= {"constants": constants, "preparation": [*prepared, *exported.switched]}
            del run, session  # it may hold the file open
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


def _details(session: Any, exported: Exported, proof: Proof, weights: Mapping[str, int], opset: int) -> dict[str, Any]:
    plan = exported.plan
    return proof.to_dict() | {
        "weights": dict(weights),
        "provider": session.get_providers()[0],
        "opset": opset,
        "op_counts": op_counts(exported.merged),
        "dynamic_axes": plan.shapes.axes,
        "traced": dict(plan.shapes.traced),
        "inputs": [value.name for value in session.get_inputs()],
        "output_names": list(plan.names),
        "not_checked": list(plan.not_checked),
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
