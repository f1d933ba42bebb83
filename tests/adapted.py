"""Sites and adapted linear layers built by hand, for tests of methods and training."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from lora2fx.adapter import Adapter
from lora2fx.site import Layout, Site

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str):
    return json.loads((GOLDEN / name).read_text())


def linear_site(name: str, inputs: int, outputs: int, role: str = "unknown") -> Site:
    layout = Layout(contracted=(1,), free=(0,))
    return Site(f"{name}.weight", name, "weight", (outputs, inputs), layout, role)


def expert_site(name: str, experts: int, inputs: int, outputs: int) -> Site:
    layout = Layout(batch=(0,), contracted=(1,), free=(2,))
    return Site(f"{name}.weight", name, "weight", (experts, inputs, outputs), layout)


class AdaptedLinear(nn.Module):
    """y = x Wᵀ + b + adapter(x), W and b frozen."""

    def __init__(self, weight: Tensor, bias: Tensor, adapter: Adapter) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) + self.adapter(x)


def fill(adapter: Adapter, **values: Tensor) -> Adapter:
    with torch.no_grad():
        for name, value in values.items():
            adapter.get_parameter(name).copy_(torch.as_tensor(value, dtype=torch.float64))
    return adapter


def adapters_of(model: nn.Module) -> list[Adapter]:
    return [module for module in model.modules() if isinstance(module, Adapter)]


def in_low_precision(model, dtype):
    """What is no adapter's in `dtype`, as a model that was loaded so."""
    factors = {id(parameter) for adapter in adapters_of(model) for parameter in adapter.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in factors:
            parameter.data = parameter.data.to(dtype)


def distances(found, exact):
    """How far each tensor is from the exact one, of whose norm."""
    pairs = [(own, value) for own, value in zip(found, exact, strict=True) if value is not None]
    return [float(((own - value).norm() / value.norm()).detach()) for own, value in pairs]


def check_as_exact(errors, usual, dtype):
    """Of distances from the exact tensors over several inputs, the medians: one that cancels out says nothing."""
    error, known = (torch.tensor(each).median(0).values for each in (errors, usual))
    assert (error <= (1.5 * known).clamp_min(4 * torch.finfo(dtype).eps)).all(), error / known
