"""Attention whose query no weight projects: the nearest weight behind it must not be taken for one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.architecture import Architecture, normal, tokens


class LatentPooling(nn.Module):
    """Learned queries, as in a perceiver's first layer; the rows come from a linear stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 32)
        self.latents = nn.Parameter(torch.randn(5, 32))
        self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(3))
        self.head = nn.Linear(32, 3)

    def forward(self, rows: Tensor) -> Tensor:
        rows = F.gelu(self.stem(rows))
        query = self.latents.expand(len(rows), -1, -1)
        mixed = F.scaled_dot_product_attention(query, self.key(rows), self.value(rows))
        return self.head(self.out(mixed).mean(1))


class UnprojectedQuery(nn.Module):
    """The normed rows are the query themselves; behind them stand a stem and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.stem = nn.Embedding(99, 24), nn.Linear(24, 32)
        self.norm = nn.LayerNorm(32)
        self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.stem(self.embedding(ids))
        query = self.norm(rows)
        weights = (query @ self.key(query).transpose(1, 2) / 32**0.5).softmax(-1)
        return rows + self.out(weights @ self.value(query))


REST = {"key.weight": "key", "value.weight": "value", "out.weight": "output"}

TRAPS = {
    "latent_pooling": Architecture(LatentPooling, REST, lambda: (normal(2, 11, 12),)),
    "unprojected_query": Architecture(UnprojectedQuery, REST, lambda: (tokens(2, 11),)),
}
