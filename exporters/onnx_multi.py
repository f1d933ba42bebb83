"""`mode="multi"`: one base file, and an `.onnx_adapter` file for each adapter, of whatever ranks, swapped per run."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lora2fx.errors import ExportError
from lora2fx.exporters.copies import Copies, bind_constants, copies_of, has_adapters, unwrapped
from lora2fx.exporters.onnx_adapters import version_of, write_adapter
from lora2fx.exporters.onnx_attempts import Exported, plans_for
from lora2fx.exporters.onnx_files import (
    append_metadata,
    goes_beside,
    publish_onnx,
    save_onnx,
    tool_versions,
    weights_digest,
)
from lora2fx.exporters.onnx_graph import op_counts
from lora2fx.exporters.onnx_multi_proof import prove_factors, prove_wiring
from lora2fx.exporters.onnx_options import Options
from lora2fx.exporters.onnx_program import optimised, plain_attention, trace_program, with_plain_kernels, without_cache
from lora2fx.exporters.onnx_proof import Array, Proof, prove_outputs
from lora2fx.exporters.onnx_session import FACTORS, MODEL_VERSION, OnnxModel
from lora2fx.exporters.onnx_swap import (
    Slot,
    Swappable,
    base_of,
    factor_axes,
    factors_of,
    probe,
    swappable,
)
from lora2fx.exporters.shapes import Tensors, named_inputs
from lora2fx.exporters.writing import check_file, staging
from lora2fx.inputs import ExampleInputs, as_inputs
from lora2fx.reports import Report

SUFFIX = ".onnx_adapter"


def export_multi(
    models: Mapping[str, nn.Module], path: str | os.PathLike[str], example_inputs: ExampleInputs, options: Options
) -> Report:
    """One base graph at `path` whose factors are optional inputs, and `<stem>.<name>.onnx_adapter` beside it for each.

    Proven are: the base without adapters against the base model; each adapter against its own adapted model by the
    output gate; each file's factors, read back, against the site's ΔW; and the wiring, by random factors on all sites
    at once. Raises `ExportError` where one fails, and for models of different bases; nothing is left behind then.
    """
    place = Path(path)
    check_file(place)
    _check_names(models)
    members = {name: copies_of(unwrapped(model), "export_onnx") for name, model in models.items()}
    with plain_attention():
        base = base_of(members)
        shell, slots = swappable(base, members)
        switched = [base, shell, *(module for m in members.values() for module in (m.adapted, m.merged))]
        prepared = ["eval mode", "fused encoder path off", *without_cache(switched)]
        tensors, constants = named_inputs(base, as_inputs(base, example_inputs))
        for module in (base, shell.lora2fx_inner, *switched[2:]):
            bind_constants(module, constants)
        exported = _trace(shell, slots, base, tensors, options)
        with staging(place.parent) as aside:
            files, details = _write(exported, shell, slots, base, members, aside / place.name, options)
            details |= {"constants": constants, "preparation": [*prepared, *exported.switched], "opset": options.opset}
            report = _report(members, details)
            publish_onnx(files, place, report)
    return report


def multi_members(model: nn.Module, adapters: Mapping[str, nn.Module] | None) -> dict[str, nn.Module]:
    """The adapted models by name; the model itself is "default" where no others are named, and must be one of them."""
    if adapters is None:
        return {"default": model}
    if not adapters:
        raise ExportError("adapters={} names none; leave it out to export the model's own as 'default'.")
    if has_adapters(unwrapped(model)) and all(model is not other for other in adapters.values()):
        raise ExportError("the model has adapters of its own, which adapters= doesn't name: give them a name in it.")
    return dict(adapters)


def _check_names(models: Mapping[str, nn.Module]) -> None:
    for name, model in models.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
            raise ExportError(
                f"adapters={{{name!r}: ...}}: a name of letters, digits, - and _ becomes part of a file's."
            )
        if not has_adapters(unwrapped(model)):
            raise ExportError(
                f"mode='multi': {name!r} is a {type(model).__name__} without adapters. Transform it first."
            )


def _trace(
    shell: Swappable, slots: Mapping[str, Slot], base: nn.Module, tensors: Tensors, options: Options
) -> Exported:
    """The base graph with its slots as optional inputs, by the first plan that torch.export follows."""
    errors: list[ExportError] = []
    switched: list[str] = []
    axes = options.dynamic_axes if options.dynamic else {}
    factors = probe(slots, base)
    for plan in plans_for(base, tensors, axes, options.output_names):
        for plainer in (False, True):
            now = with_plain_kernels([shell]) if plainer else []
            if plainer and not now:
                break
            switched += now
            given, dims = plan.cases[0].tensors | factors, plan.shapes.axes | factor_axes(slots)
            try:
                program = trace_program(shell, given, dims, plan.names, options.opset)
            except ExportError as error:
                errors.append(error)
                continue
            graph = optimised(program, program.model)
            _make_optional(graph, slots)
            return Exported(graph, graph, plan, tuple(switched))
    raise errors[0]


def _make_optional(graph: Any, slots: Mapping[str, Slot]) -> None:
    """Give every slot's input its default: no rank, or the base's own parameter."""
    from onnxscript import ir

    inputs = {value.name: value for value in graph.graph.inputs}
    missing = slots.keys() - inputs.keys()
    if missing:
        raise ExportError(f"mode='multi': the exported graph lost the input {sorted(missing)[0]}.")
    for name, slot in slots.items():
        value = inputs[name]
        value.shape = ir.Shape([f"{slot.site}.rank" if size is None else size for size in slot.shape])
        value.const_value = ir.tensor(slot.default.numpy(), name=name)
        graph.graph.register_initializer(value)


@dataclass(frozen=True)
class _Run:
    """The staged base, as users run it, with one adapter or none."""

    model: OnnxModel
    adapter: str | None

    def __call__(self, tensors: Tensors) -> list[Array]:
        known = {name: tensor for name, tensor in tensors.items() if name in self.model.inputs}
        return list(self.model.run(known, self.adapter).values())


def _write(
    exported: Exported,
    shell: Swappable,
    slots: Mapping[str, Slot],
    base: nn.Module,
    members: Mapping[str, Copies],
    file: Path,
    options: Options,
) -> tuple[list[Path], dict[str, Any]]:
    graph, plan = exported.merged, exported.plan
    files = save_onnx(graph, file, goes_beside(graph, options.external_data))
    digest = weights_digest(graph)
    version = version_of(hashlib.sha256(json.dumps([digest, *plan.names, *slots]).encode()).hexdigest())
    append_metadata(file, _notes(slots, version, digest))
    model = OnnxModel(file, options.providers, exact=True)
    none = prove_outputs(_Run(model, None), Copies(base, base, base, (), None), plan.cases, plan.names)
    wiring = prove_wiring(model, shell, slots, base, plan)
    entries: dict[str, Any] = {}
    for name, copies in members.items():
        adapter = file.with_name(f"{file.stem}.{name}{SUFFIX}")
        factors = factors_of(copies, slots)
        if not factors:
            raise ExportError(f"mode='multi': every rank of {name!r} is 0, so that there is nothing to swap in.")
        write_adapter(adapter, factors, version)
        prove_factors(adapter, copies, slots)
        model.load_adapter(name, adapter)
        full = Copies(copies.adapted, base, copies.merged, copies.changes, copies.folded)
        proof = prove_outputs(_Run(model, name), full, plan.cases, plan.names)
        entries[name] = _entry(adapter, copies, proof)
        files.append(adapter)
    details = none.to_dict() | {
        "adapters": entries,
        "wiring": wiring,
        "model_version": version,
        "weights_sha256": digest,
        "provider": model.provider,
        "op_counts": op_counts(graph),
        "dynamic_axes": {n: {str(d): s for d, s in dims.items()} for n, dims in plan.shapes.axes.items()},
        "traced": dict(plan.shapes.traced),
        "inputs": list(model.inputs),
        "output_names": list(plan.names),
        "not_checked": list(plan.not_checked),
    }
    return files, details


def _notes(slots: Mapping[str, Slot], version: int, digest: str) -> dict[str, str]:
    factors = {
        name: [slot.site, list(slot.shape), str(slot.default.dtype).removeprefix("torch.")]
        for name, slot in slots.items()
    }
    return {
        "lora2fx.versions": json.dumps(tool_versions()),
        "lora2fx.weights_sha256": digest,
        FACTORS: json.dumps(factors),
        MODEL_VERSION: str(version),
    }


def _entry(file: Path, copies: Copies, proof: Proof) -> dict[str, Any]:
    assert copies.folded is not None
    return proof.to_dict() | {
        "file": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "bytes": file.stat().st_size,
        "ranks": {site["weight"]: site["rank"] for site in copies.folded.sites},
    }


def _report(members: Mapping[str, Copies], details: Mapping[str, Any]) -> Report:
    sites = [
        {**site, "adapter": name} for name, copies in members.items() if copies.folded for site in copies.folded.sites
    ]
    error = max(details["max_error"], *(entry["max_error"] for entry in details["adapters"].values()))
    checks = ["ONNX checker", "base outputs", "wiring", "factors", "outputs of each adapter"]
    return Report(
        f"export_onnx: one base, {len(members)} swappable adapters",
        sites=tuple(sites),
        totals={"adapters": len(members)},
        verify={"status": "passed", "max_error": error, "checks": checks},
        details=details,
    )
