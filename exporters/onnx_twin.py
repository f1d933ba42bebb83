"""The base model's graph out of the merged model's trace: one and the same structure, the base's own values.

Tracing is most of what an export costs. Both copies are first held against each other module by module, so that a
second trace could only repeat the first; both graphs then go through the optimiser, each with its own constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lora2fx.adapter import Adapter
from lora2fx.errors import ExportError
from lora2fx.exporters.onnx_program import optimised, trace_program
from lora2fx.exporters.shapes import Axes, Tensors

_PLAIN = (bool, int, float, str, type(None))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def export_pair(
    base: nn.Module, merged: nn.Module, tensors: Tensors, axes: Axes, output_names: Sequence[str], opset: int
) -> tuple[Any, Any]:
    """The base's and the merged model's graphs (onnxscript IR); one and the same for the same module.

    Raises `ExportError` where torch can't export, or where the two modules differ in more than their values.
    """
    if base is not merged:
        check_structure(base, merged)
    program = trace_program(merged, tensors, axes, output_names, opset)
    twin = None if base is merged else _with_values(program.model, base)
    graph = optimised(program, program.model)
    return (graph if twin is None else optimised(program, twin)), graph


def _with_values(model: Any, module: nn.Module) -> Any:
    """A copy of an unoptimised graph, whose constants still have their names, with the module's own values."""
    from onnxscript import ir

    twin = model.clone()
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors |= dict(module.named_buffers(remove_duplicate=False))
    tensors = {_user_name(name): tensor for name, tensor in tensors.items()}
    for name, value in twin.graph.initializers.items():
        if name in tensors:
            value.const_value = ir.tensor(tensors[name].detach(), name=name)
    return twin


def _user_name(name: str) -> str:
    while name.startswith("lora2fx_inner."):
        name = name.removeprefix("lora2fx_inner.")
    return name


def check_structure(base: nn.Module, merged: nn.Module) -> None:
    """Raise `ExportError` where two modules differ in anything but values, or where one still holds an adapter."""
    own, other = dict(base.named_modules()), dict(merged.named_modules())
    if own.keys() != other.keys():
        names = sorted(own.keys() ^ other.keys())
        raise ExportError(f"the merged model isn't the base model: only one of them has the module {names[0]!r}.")
    for name, module in own.items():
        first, second = _description(module), _description(other[name])
        for what in first:
            if first[what] != second[what]:
                raise ExportError(
                    f"the merged model isn't the base model: {what} of {name or 'the model itself'!r} is"
                    f" {second[what]!r:.200}, and {first[what]!r:.200} in the base."
                )


def _description(module: nn.Module) -> dict[str, Any]:
    """What decides what a module computes, beside the values of its tensors."""
    if isinstance(module, Adapter):
        raise ExportError("the merged model still holds an adapter; its merge failed. Nothing was written.")
    tensors = {**module._parameters, **module._buffers}
    return {
        "the class": type(module),
        "the shape or dtype": {n: (t.shape, t.dtype) for n, t in tensors.items() if t is not None},
        "an attribute": {name: value for name, value in vars(module).items() if isinstance(value, _PLAIN)},
        "the number of hooks": [len(vars(module)[name]) for name in _HOOKS],
        "the code": getattr(module, "code", None),
    }
