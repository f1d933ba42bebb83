"""Zoo models adapted by `transform` with random factors, exported and held against ONNX Runtime in float64's light."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import lora2fx
from lora2fx.adapter import Adapter
from lora2fx.exporters import export_onnx
from lora2fx.inputs import as_inputs, flatten_outputs
from lora2fx.reports import Report
from tests.exported import snapshot
from tests.zoo import ZOO

CASES = ["traced", "batch 1", "larger batch", "sequence 1", "larger sequence"]


def adapted(name: str, targets: list[str]) -> tuple[nn.Module, object]:
    """The zoo's model with LoRA of rank 3 on the targets, the first site's ranks all pruned."""
    architecture = ZOO[name]
    model = architecture.build()
    lora2fx.transform(model, targets, lora2fx.LoRA(r=3), example_inputs=architecture.example_inputs, verify=False)
    generator = torch.Generator().manual_seed(3)
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    with torch.no_grad():
        for parameter in (parameter for adapter in adapters for parameter in adapter.parameters()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    next(iter(adapters[0].axes().values())).mask.fill_(False)
    return model, architecture.example_inputs


def export(name: str, targets: list[str], folder: Path) -> tuple[Report, nn.Module, Path]:
    """Export, check that the model is as it was, and that the report's promises hold."""
    model, inputs = adapted(name, targets)
    before = snapshot(model)
    report = export_onnx(model, folder / f"{name}.onnx", inputs)
    assert snapshot(model) == before
    details = report.details
    sites = {site["weight"]: site for site in report.sites}
    assert details["weights"]["weights"] == len(sites)
    assert details["max_error"] <= max(1e-3 * details["margin"], 8 * details["noise"])
    assert not details["vacuous"]
    assert sum(site["rank"] == 0 for site in report.sites) >= 1
    check_elsewhere(model, inputs, details, folder / f"{name}.onnx")
    return report, model, folder / f"{name}.onnx"


def check_elsewhere(model: nn.Module, inputs: object, details, path: Path) -> None:
    """At sizes that the exporter never saw, against the adapted model in float64."""
    import onnxruntime

    exact = copy.deepcopy(model).double().eval()
    if hasattr(exact, "config"):
        for module in exact.modules():
            if getattr(getattr(module, "config", None), "use_cache", False):
                module.config.use_cache = False
    given = as_inputs(model, inputs)
    tensors = dict(zip(details["inputs"], (*given.args, *given.kwargs.values()), strict=True))
    tensors = {name: grown(value, details["dynamic_axes"].get(name, {})) for name, value in tensors.items()}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.numpy() for name, value in tensors.items()})
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            doubled = {name: value.double() if value.is_floating_point() else value for name, value in tensors.items()}
            expected = flatten_outputs(exact(**doubled))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    for own, other, entry in zip(found, expected, details["outputs"], strict=True):
        limit = max(1e-3 * entry["margin"], 20 * entry["noise"])
        assert float(np.abs(own - other.numpy()).max()) <= limit


def grown(tensor: Tensor, dims: dict[str, str]) -> Tensor:
    """Seven rows, and sequences one longer than the example's."""
    for dim, symbol in dims.items():
        axis = int(dim)
        size = 7 if symbol == "batch" else tensor.shape[axis] + 1
        tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
    return tensor
