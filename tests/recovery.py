"""The toy of known answer: two linear maps moved by updates of rank 3 and 1, found again from noisy samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.adapted import AdaptedLinear, linear_site

INPUTS, OUTPUTS, SAMPLES, NOISE = 20, 16, 960, 0.01
SINGULAR_VALUES = ((4.0, 3.0, 2.0), (3.0,))


@dataclass(frozen=True)
class Recovery:
    """The adapted maps, their inputs (map, sample, in), the noisy targets and the true updates (out, in)."""

    model: nn.ModuleList
    x: Tensor
    y: Tensor
    truth: tuple[Tensor, ...]

    @property
    def adapters(self):
        return [layer.adapter for layer in self.model]

    def loss(self, batch=slice(None)):
        outputs = (layer(x[batch]) for layer, x in zip(self.model, self.x, strict=True))
        return sum((out - y[batch]).square().mean() for out, y in zip(outputs, self.y, strict=True))

    def errors(self):
        """Relative error of each ΔW."""
        found = (adapter.weight_delta() for adapter in self.adapters)
        return [float((a.detach() - b).norm() / b.norm()) for a, b in zip(found, self.truth, strict=True)]


def recovery(method, seed: int) -> Recovery:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    truth, layers, inputs, targets = [], [], [], []
    torch.manual_seed(seed)
    for index, values in enumerate(SINGULAR_VALUES):
        left, right = torch.linalg.qr(normal(OUTPUTS, len(values))).Q, torch.linalg.qr(normal(INPUTS, len(values))).Q
        truth.append(left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T)
        weight, bias = normal(OUTPUTS, INPUTS) / INPUTS**0.5, normal(OUTPUTS)
        adapter = method.adapter(linear_site(f"map{index}", INPUTS, OUTPUTS)).double()
        layers.append(AdaptedLinear(weight, bias, adapter))
        x = normal(SAMPLES, INPUTS)
        inputs.append(x)
        targets.append(x @ (weight + truth[-1]).T + bias + NOISE * normal(SAMPLES, OUTPUTS))
    return Recovery(nn.ModuleList(layers), torch.stack(inputs), torch.stack(targets), tuple(truth))


def train(problem: Recovery, optimizer, steps: int, batch: int = 64) -> None:
    for step in range(steps):
        start = step * batch % SAMPLES
        optimizer.zero_grad()
        problem.loss(slice(start, start + batch)).backward()
        optimizer.step()
