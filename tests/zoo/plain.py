"""Plain torch models with little or no attention: what an adapter compiler meets outside transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.architecture import Architecture, normal, repeated, tokens
from tests.zoo.attention import Attention, FeedForward


class UNet(nn.Module):
    """Down, attention in the middle, up again with a skip; a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 4, stride=2, padding=1)
        self.norm, self.middle = nn.GroupNorm(4, 32), Attention()
        self.up, self.leave = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.Conv2d(32, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        skip = F.relu(self.enter(images))
        x = F.relu(self.down(skip))
        rows = self.norm(x).flatten(2).transpose(1, 2)
        x = x + self.middle(rows, rows).transpose(1, 2).reshape(x.shape)
        return self.leave(torch.cat([skip, F.relu(self.up(x))], 1))


class MixerBlock(nn.Module):
    """One feed-forward over the tokens, one over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.tokens = nn.LayerNorm(32), FeedForward(16, 24)
        self.norm2, self.channels = nn.LayerNorm(32), FeedForward(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 4, stride=4)
        self.blocks = nn.Sequential(MixerBlock(), MixerBlock())
        self.head = nn.Linear(32, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images).flatten(2).transpose(1, 2)).mean(1))


class Recurrent(nn.Module):
    """A two-layer bidirectional LSTM, whose weights no linear owns."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(99, 24)
        self.lstm = nn.LSTM(24, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(ids))[0][:, -1])


class Branching(nn.Module):
    """Python control flow on data, on a flag and on the training mode: nothing that a trace may freeze."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 20), nn.Linear(20, 20), nn.Linear(20, 4)
        self.deep = True

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first(x))
        for _ in range(1 + int(hidden.mean() > 0)):
            hidden = torch.tanh(self.second(hidden)) + hidden
        if self.training:
            hidden = F.dropout(hidden, 0.1)
        return self.third(hidden) if self.deep else hidden


class TwoTower(nn.Module):
    """A recommender: users and items embedded and projected to a common space, scored by their product."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(50, 16), nn.EmbeddingBag(60, 16, mode="mean")
        self.user = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
        self.item = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        return F.normalize(self.user(self.users(users)), dim=-1) @ F.normalize(self.item(self.items(items)), dim=-1).T


class GraphNetwork(nn.Module):
    """Messages along edges, summed at their target; two rounds and a readout."""

    def __init__(self) -> None:
        super().__init__()
        self.message = nn.ModuleList([nn.Linear(12, 20), nn.Linear(20, 20)])
        self.own = nn.ModuleList([nn.Linear(12, 20, bias=False), nn.Linear(20, 20, bias=False)])
        self.readout = nn.Linear(20, 3)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        for message, own in zip(self.message, self.own, strict=True):
            sent = message(nodes)[edges[0]]
            gathered = torch.zeros(len(nodes), sent.shape[1], dtype=sent.dtype, device=sent.device)
            nodes = F.relu(own(nodes) + gathered.index_add(0, edges[1], sent))
        return self.readout(nodes.mean(0, keepdim=True))


class SqueezeExcite(nn.Module):
    """Channels gated by their own means: two linears of an excitation, which is no feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.squeeze, self.excite = nn.Linear(16, 4), nn.Linear(4, 16)
        self.point, self.head = nn.Conv2d(16, 24, 1), nn.Linear(24, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(images)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        x = self.point(x * gate[:, :, None, None])
        return self.head(x.mean((2, 3)))


def dense_tanh_dense() -> nn.Module:
    """A classifier head: its two linears are of equal width, which makes them no feed-forward."""
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))


MIXER = {
    f"{name}.{number}": role for name in ("tokens", "channels") for number, role in ((0, "ffn.up"), (3, "ffn.down"))
}

PLAIN = {
    "unet": Architecture(
        UNet,
        {f"middle.{name}.weight": name for name in ("query", "key", "value")} | {"middle.out.weight": "output"},
        lambda: (normal(2, 3, 8, 8),),
    ),
    "mixer": Architecture(Mixer, repeated("blocks.{}.", MIXER), lambda: (normal(2, 3, 16, 16),)),
    "lstm": Architecture(Recurrent, {}, lambda: (tokens(2, 11),)),
    "branching": Architecture(Branching, {}, lambda: (normal(3, 12),)),
    "two_tower": Architecture(TwoTower, {}, lambda: (tokens(3, vocabulary=50), tokens(5, 4, vocabulary=60, seed=2))),
    "graph": Architecture(GraphNetwork, {}, lambda: (normal(9, 12), tokens(2, 15, vocabulary=9))),
    "squeeze_excite": Architecture(SqueezeExcite, {}, lambda: (normal(2, 3, 8, 8),)),
    "dense_tanh_dense": Architecture(dense_tanh_dense, {}, lambda: (normal(3, 16),)),
}
