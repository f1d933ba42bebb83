"""LoRA2 computed as its authors' released code does: ΔW formed in full, loops over parameters; restated, not copied."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BETA = 0.85


class PublishedLinear(nn.Module):
    """y = x Wᵀ + b + s · x (u v diag(λ) U V), with the in x out product formed in every forward."""

    def __init__(self, base: nn.Linear, k: int, r: int) -> None:
        super().__init__()
        self.base, self.scale = base, 16 / (r + 1e-5)
        inputs, outputs = base.in_features, base.out_features
        for name, shape in {"u": (inputs, k), "v": (k, r), "U": (r, k), "V": (k, outputs)}.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.02))
        self.lam = nn.Parameter(torch.zeros(r, 1))
        self.averages = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.scored().items()}

    def scored(self) -> dict[str, Tensor]:
        """What importance is made of (eq. 9)."""
        return {"v": self.v, "lam": self.lam, "U": self.U}

    def forward(self, x: Tensor) -> Tensor:
        """The base's output, and a second product of the weight's size."""
        delta = (self.u @ self.v) @ (self.lam * (self.U @ self.V))
        return F.linear(x, self.base.weight, self.base.bias) + (x @ delta) * self.scale


def adapt_as_published(model: nn.Module, suffixes: Sequence[str], k: int, r: int) -> list[PublishedLinear]:
    """Replace the linear layers whose names end so."""
    layers = []
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.startswith("bert.encoder") and path.endswith(tuple(suffixes)):
            layer = PublishedLinear(module, k, r)
            setattr(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], layer)
            layers.append(layer)
    return layers


def _off(gram: Tensor) -> Tensor:
    return torch.norm(gram - torch.eye(gram.shape[0]), p="fro")


def penalty_as_published(layers: Sequence[PublishedLinear]) -> Tensor:
    """The mean of the Gram matrices' deviations; the product of all four factors is formed for every factor."""
    total, terms = torch.zeros(()), 0
    for layer in layers:
        outer = {"u": layer.u.T @ layer.u, "v": layer.v @ layer.v.T, "U": layer.U.T @ layer.U, "V": layer.V @ layer.V.T}
        for gram in outer.values():
            product = (layer.u @ layer.v) @ (layer.U @ layer.V)
            total, terms = total + _off(gram) + 0 * product[0, 0], terms + 1
        p, q = layer.u @ layer.v, layer.U @ layer.V
        total, terms = total + _off(p.T @ p) + _off(q @ q.T), terms + 2
    return total / terms


@torch.no_grad()
def allocate_as_published(layers: Sequence[PublishedLinear], step: int) -> None:
    """Importance parameter by parameter, one threshold over all λ, masked entry by entry."""
    scores = []
    for layer in layers:
        parts = []
        for name, parameter in layer.scored().items():
            sensitivity, uncertainty = layer.averages[name]
            now = (parameter * parameter.grad).abs()
            sensitivity.mul_(BETA).add_(now, alpha=1 - BETA)
            uncertainty.mul_(BETA).add_((now - sensitivity).abs(), alpha=1 - BETA)
            parts.append(sensitivity * uncertainty)
        v, lam, U = parts
        scores.append(lam.view(-1) + v.mean(0) + U.mean(1))
    budget = sum(layer.lam.numel() for layer in layers) - step % 7
    threshold = torch.kthvalue(torch.cat(scores), sum(score.numel() for score in scores) - budget + 1)[0].item()
    for layer, score in zip(layers, scores, strict=True):
        layer.lam.masked_fill_((score < threshold).unsqueeze(-1), 0.0)
