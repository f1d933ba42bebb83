"""Plain torch attention, each written the way people write it: separate, fused, einsum, torch's own modules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.architecture import QKV, Architecture, normal, repeated, tokens

WIDTH, HEADS, INNER = 32, 4, 64


def split_heads(x: Tensor) -> Tensor:
    """(batch, tokens, width) → (batch, heads, tokens, width / heads)"""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Separate projections, softmax written out; keys and values from `context` where there is one."""

    def __init__(self, context_width: int = WIDTH) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(context_width, WIDTH)
        self.value = nn.Linear(context_width, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        query, key, value = split_heads(self.query(x)), split_heads(self.key(context)), split_heads(self.value(context))
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        return self.out(merge_heads(self.dropout(scores.softmax(-1)) @ value))


class FeedForward(nn.Sequential):
    def __init__(self, width: int = WIDTH, inner: int = INNER) -> None:
        super().__init__(nn.Linear(width, inner), nn.GELU(), nn.Dropout(0.1), nn.Linear(inner, width))


class ViTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed)
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """8×8 grey images in 2×2 patches, as a digits classifier has them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(4, WIDTH)
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 17, WIDTH) * 0.02)
        self.blocks = nn.ModuleList([ViTBlock() for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unflatten(1, (4, 2)).unflatten(3, (4, 2)).permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)
        x = torch.cat([self.first.expand(len(images), -1, -1), self.patch(patches)], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class EinsumBlock(nn.Module):
    """Attention on raw 3-D parameters (width, heads, head width); the feed-forward contracts with einsum too."""

    def __init__(self) -> None:
        super().__init__()
        head = WIDTH // HEADS
        for name in ("wq", "wk", "wv"):
            setattr(self, name, nn.Parameter(torch.randn(WIDTH, HEADS, head) * WIDTH**-0.5))
        self.wo = nn.Parameter(torch.randn(HEADS, head, WIDTH) * WIDTH**-0.5)
        self.up = nn.Parameter(torch.randn(WIDTH, INNER) * WIDTH**-0.5)
        self.down = nn.Parameter(torch.randn(INNER, WIDTH) * INNER**-0.5)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        query = torch.einsum("bsd,dhk->bshk", normed, self.wq)
        key = torch.einsum("bsd,dhk->bshk", normed, self.wk)
        value = torch.einsum("bsd,dhk->bshk", normed, self.wv)
        weights = (torch.einsum("bqhk,bshk->bhqs", query, key) / math.sqrt(query.shape[-1])).softmax(-1)
        x = x + torch.einsum("bqhk,hkd->bqd", torch.einsum("bhqs,bshk->bqhk", weights, value), self.wo)
        hidden = F.gelu(torch.einsum("bsd,df->bsf", self.norm2(x), self.up))
        return x + torch.einsum("bsf,fd->bsd", hidden, self.down)


class MultiheadBlock(nn.Module):
    """Self-attention by `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class CrossAttention(nn.Module):
    """`nn.MultiheadAttention` over a context: once with one fused weight, once with three (other widths)."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.other = nn.MultiheadAttention(WIDTH, HEADS, kdim=24, vdim=20, batch_first=True)

    def forward(self, x: Tensor, context: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        x = x + self.same(x, context, context)[0]
        return x + self.other(x, keys, values)[0]


class Encoder(nn.Module):
    """`nn.TransformerEncoder` over token ids with a padding mask: takes the fused fast path in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(99, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(self.embedding(ids), src_key_padding_mask=padding).mean(1))


class Decoder(nn.Module):
    """`nn.TransformerDecoder`, norm first, with a causal mask and a memory of another length."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(99, WIDTH)
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, INNER, batch_first=True, norm_first=True, activation="gelu")
        self.decoder = nn.TransformerDecoder(layer, 2)
        self.head = nn.Linear(WIDTH, 99)

    def forward(self, ids: Tensor, memory: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.decoder(self.embedding(ids), memory, tgt_mask=causal, tgt_is_causal=True))


def padded() -> dict[str, Tensor]:
    padding = torch.zeros(2, 11, dtype=torch.bool)
    padding[1, 7:] = True
    return {"ids": tokens(2, 11), "padding": padding}


SEPARATE = {"query": "query", "key": "key", "value": "value", "out": "output"}
MLP = {"mlp.0": "ffn.up", "mlp.3": "ffn.down"}
ROWS = {"in_proj_weight": QKV, "out_proj.weight": "output"}
LINEARS = {"linear1.weight": "ffn.up", "linear2.weight": "ffn.down"}


def _layers(prefix: str, attentions: tuple[str, ...]) -> dict[str, Any]:
    block = {f"{name}.{weight}": role for name in attentions for weight, role in ROWS.items()} | LINEARS
    return {f"{prefix}.layers.{i}.{weight}": role for i in range(2) for weight, role in block.items()}


ATTENTION = {
    "vit_plain": Architecture(
        ViT,
        repeated("blocks.{}.", {f"attention.{name}": role for name, role in SEPARATE.items()} | MLP),
        lambda: (normal(2, 8, 8),),
    ),
    "einsum": Architecture(
        lambda: nn.Sequential(EinsumBlock(), EinsumBlock()),
        {
            f"{i}.{weight}": role
            for i in range(2)
            for weight, role in {"wq": "query", "wk": "key", "wv": "value", "wo": "output"}.items()
        }
        | {f"{i}.{weight}": f"ffn.{weight}" for i in range(2) for weight in ("up", "down")},
        lambda: (normal(2, 11, WIDTH),),
    ),
    "mha": Architecture(
        lambda: nn.Sequential(MultiheadBlock(), MultiheadBlock()),
        {f"{i}.attention.{weight}": role for i in range(2) for weight, role in ROWS.items()} | repeated("{}.", MLP),
        lambda: (normal(2, 11, WIDTH),),
    ),
    "mha_cross": Architecture(
        CrossAttention,
        {f"same.{weight}": role for weight, role in ROWS.items()}
        | {"other.q_proj_weight": "query", "other.k_proj_weight": "key", "other.v_proj_weight": "value"}
        | {"other.out_proj.weight": "output"},
        lambda: (normal(2, 11, WIDTH), normal(2, 13, WIDTH), normal(2, 9, 24), normal(2, 9, 20)),
    ),
    "encoder": Architecture(Encoder, _layers("encoder", ("self_attn",)), padded),
    "decoder": Architecture(
        Decoder,
        _layers("decoder", ("self_attn", "multihead_attn")) | {"head.weight": "lm_head"},
        lambda: (tokens(2, 11), normal(2, 13, WIDTH)),
    ),
}
