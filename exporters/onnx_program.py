"""torch.onnx.export of one copy of a model: what is switched for it, under which names, at which sizes."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import nn

from lora2fx.errors import ExportError
from lora2fx.exporters.runtime import first_line
from lora2fx.exporters.shapes import Axes, Tensors
from lora2fx.inputs import flatten_outputs

_PLAIN = (
    ("attn", "set_attn_implementation", "eager", ("sdpa", "flex_attention", "flash_attention_2")),
    ("experts", "set_experts_implementation", "batched_mm", ("grouped_mm",)),
)
"""What a transformers config names, the model's method that sets it, a kernel that exports, and those that may not."""


@contextmanager
def plain_attention() -> Iterator[None]:
    """Run without the fused encoder path, which zeroes padded positions where no exported graph does."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def without_cache(models: Sequence[nn.Module]) -> list[str]:
    """Switch key–value caches off in copies, since no graph can return one; says what was done."""
    switched = 0
    for module in (module for model in models for module in model.modules()):
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # type: ignore[union-attr]
            switched += 1
    return ["config.use_cache=False"] if switched else []


def with_plain_kernels(models: Sequence[nn.Module]) -> list[str]:
    """Put copies of transformers models on kernels that export where their own don't; says what was switched."""
    switched: list[str] = []
    for model in models:
        config = getattr(model, "config", None)
        for what, method, kernel, instead_of in _PLAIN:
            switch: Any = getattr(model, method, None)
            if switch is not None and getattr(config, f"_{what}_implementation", kernel) in instead_of:
                switch(kernel)
                switched.append(f"{what}_implementation={kernel!r}")
    return list(dict.fromkeys(switched))


def name_outputs(output: Any, inputs: Sequence[str]) -> list[str]:
    """Names for an output's tensors: a mapping's keys, else "output", numbered where there are several."""
    items = list(output.items()) if isinstance(output, Mapping) else [("output", output)]
    names: list[str] = []
    for key, value in items:
        tensors = len(flatten_outputs(value))
        names += [str(key)] if tensors == 1 else [f"{key}_{index}" for index in range(tensors)]
    return [f"{name}_out" if name in inputs else name for name in names]


def export_program(model: nn.Module, tensors: Tensors, axes: Axes, output_names: Sequence[str], opset: int) -> Any:
    """The model as onnxscript IR without traces of where its source lies. Raises `ExportError` where it can't be."""
    shapes = {name: dict(axes[name]) if name in axes else None for name in tensors}
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                model,
                (),
                kwargs=dict(tensors),
                dynamo=True,
                dynamic_shapes=shapes if axes else None,
                output_names=list(output_names),
                opset_version=opset,
                verbose=False,
            )
    except Exception as error:  # torch.export raises many types, from user code too
        cause = error.__cause__ or error
        raise ExportError(
            f"torch.onnx.export can't export {type(model).__name__}: {first_line(cause)} If a"
            " dimension is to blame that the model fixes, leave it out with dynamic_axes= (dynamic=False fixes all)."
        ) from error
    assert program is not None
    strip_traces(program.model)
    return program.model


def strip_traces(model: Any) -> None:
    """Take out what the exporter notes beside each node: stack traces with local paths, scopes, doc strings."""
    from onnxscript import ir

    ir.passes.common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about its own internals, logs missing packages, and prints the graph that it can't export."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
