"""From copies of a model to a staged ONNX file that was proven: float32, float16 or int8, with or without a cache."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora2fx.exporters.copies import Copies, bind_constants
from lora2fx.exporters.onnx_attempts import Exported, Plan, export_both, plan_of, plans_for
from lora2fx.exporters.onnx_cache import cached_cases, cached_copies
from lora2fx.exporters.onnx_files import goes_beside, save_onnx, weights_digest
from lora2fx.exporters.onnx_int8 import check_int8, int8_lowering, quantise
from lora2fx.exporters.onnx_lowered import half_copies, half_lowering
from lora2fx.exporters.onnx_options import Options
from lora2fx.exporters.onnx_program import without_cache
from lora2fx.exporters.onnx_proof import Array, Lowering, Proof, outputs_of, prove_outputs
from lora2fx.exporters.runtime import open_session, run_session
from lora2fx.exporters.shapes import Tensors, as_dtype, named_inputs
from lora2fx.inputs import ExampleInputs, as_inputs


@dataclass(frozen=True)
class Task:
    """The copies to compare with, those that were exported (the same but for float16), and their graphs."""

    copies: Copies
    lowered: Copies
    exported: Exported
    prepared: tuple[str, ...]
    constants: dict[str, Any]

    def dtype(self, options: Options) -> str:
        """What the file's floating-point weights are in."""
        if options.int8:
            return "int8"
        found = (p.dtype for p in self.lowered.merged.parameters() if p.is_floating_point())
        return str(next(found, torch.float32)).removeprefix("torch.")


@dataclass(frozen=True)
class Proven:
    """A staged file that passed, the graph in it, and what was measured."""

    paths: list[Path]
    proof: Proof
    graph: Any
    weights_sha256: str
    provider: str
    inputs: tuple[str, ...]
    int8: dict[str, Any] | None


def export_task(copies: Copies, example_inputs: ExampleInputs, options: Options) -> Task:
    """Export base and merged model as asked; raises `ExportError` where torch can't."""
    tensors, constants = named_inputs(copies.adapted, as_inputs(copies.adapted, example_inputs))
    prepared = ["eval mode", "fused encoder path off"]
    plans: Iterable[Plan]
    if options.kv_cache:
        copies, shell = cached_copies(copies)
        shapes, cases = cached_cases(shell, tensors)
        plans = [plan_of(copies.adapted, cases, shapes, options.output_names)]
        prepared.append("use_cache=True")
    else:
        models = list({id(m): m for m in (copies.adapted, copies.base, copies.merged)}.values())
        prepared += without_cache(models)
        for module in models:
            bind_constants(module, constants)
        plans = plans_for(
            copies.adapted, tensors, options.dynamic_axes if options.dynamic else {}, options.output_names
        )
    lowered = half_copies(copies) if options.half else copies
    exported = export_both(lowered, plans, options.opset, torch.float16 if options.half else None)
    return Task(copies, lowered, exported, tuple(prepared), constants)


def write_proven(task: Task, file: Path, options: Options) -> Proven:
    """Write the merged graph and prove it; for int8 prove it in float32 first, then quantise it and the base alike."""
    graph = task.exported.merged
    if not options.int8:
        lowering = half_lowering(task.copies, task.lowered) if options.half else None
        return _prove(task, graph, file, options, lowering)
    beside = goes_beside(graph, options.external_data)
    aside = file.with_name("float32")
    aside.mkdir()
    exact = _prove(task, graph, aside / file.name, options, None)
    low = quantise(graph, aside, "merged", beside)
    found = check_int8(graph, low) | {"float32_max_error": exact.proof.max_error}
    paths = save_onnx(quantise(task.exported.base, aside, "base", beside), aside / "base.onnx", beside)
    base = open_session(paths[0], options.providers, exact=True)
    lowering = int8_lowering(functools.partial(run_session, base), functools.partial(outputs_of, task.copies.base))
    return _prove(task, low, file, options, lowering, found)


def _prove(
    task: Task,
    graph: Any,
    file: Path,
    options: Options,
    lowering: Lowering | None,
    int8: dict[str, Any] | None = None,
) -> Proven:
    plan, dtype = task.exported.plan, torch.float16 if options.half else None
    paths = save_onnx(graph, file, goes_beside(graph, options.external_data))
    session = open_session(paths[0], options.providers, exact=True)

    def run(tensors: Tensors) -> list[Array]:
        return run_session(session, as_dtype(tensors, dtype))

    proof = prove_outputs(run, task.copies, plan.cases, plan.names, lowering)
    inputs = tuple(value.name for value in session.get_inputs())
    return Proven(paths, proof, graph, weights_digest(graph), session.get_providers()[0], inputs, int8)
