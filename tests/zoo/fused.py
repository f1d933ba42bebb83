"""Plain torch attention with fused projections or another context, as nanoGPT, timm and diffusers write them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.architecture import QKV, Architecture, fused, normal, repeated, tokens
from tests.zoo.attention import HEADS, INNER, WIDTH, FeedForward, merge_heads, split_heads


class CausalBlock(nn.Module):
    """nanoGPT: one bias-free projection split in three, `scaled_dot_product_attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.c_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = FeedForward(WIDTH, INNER)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.c_attn(self.ln_1(x)).split(WIDTH, dim=2)
        mixed = F.scaled_dot_product_attention(
            split_heads(query), split_heads(key), split_heads(value), dropout_p=0.0, is_causal=True
        )
        x = x + self.c_proj(merge_heads(mixed))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """A tied head that looks at the last position only."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(99, WIDTH), nn.Embedding(16, WIDTH)
        self.h = nn.ModuleList([CausalBlock(), CausalBlock()])
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, 99, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x)[:, [-1]])


class TimmBlock(nn.Module):
    """timm's ViT: qkv reshaped and unbound, query and key normed, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(WIDTH // HEADS), nn.LayerNorm(WIDTH // HEADS)
        self.ls1, self.ls2 = nn.Parameter(torch.full((WIDTH,), 0.1)), nn.Parameter(torch.full((WIDTH,), 0.1))
        self.mlp = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query, key = self.q_norm(query) * (width // HEADS) ** -0.5, self.k_norm(key)
        mixed = ((query @ key.transpose(-2, -1)).softmax(dim=-1) @ value).transpose(1, 2).reshape(batch, length, width)
        x = x + self.ls1 * self.proj(mixed)
        return x + self.ls2 * self.mlp(self.norm2(x))


class TimmViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.pos_embed = nn.Parameter(torch.randn(1, 16, WIDTH) * 0.02)
        self.blocks = nn.Sequential(TimmBlock(), TimmBlock())
        self.fc_norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
        return self.head(self.fc_norm(self.blocks(x).mean(dim=1)))


class ContextAttention(nn.Module):
    """diffusers: bias-free to_q, to_k, to_v over a context, to_out a list of linear and dropout."""

    def __init__(self, context_width: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k = nn.Linear(context_width, WIDTH, bias=False)
        self.to_v = nn.Linear(context_width, WIDTH, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        query, key, value = (split_heads(p) for p in (self.to_q(x), self.to_k(context), self.to_v(context)))
        mixed = merge_heads(F.scaled_dot_product_attention(query, key, value))
        for layer in self.to_out:
            mixed = layer(mixed)
        return mixed


class DiffusionBlock(nn.Module):
    """A U-Net's inner block: residual convolutions shifted by time, self- and cross-attention, GEGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, INNER), nn.SiLU(), nn.Linear(INNER, INNER))
        self.time_proj = nn.Linear(INNER, WIDTH)
        self.norm0, self.conv = nn.GroupNorm(4, WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norm1, self.attn1 = nn.LayerNorm(WIDTH), ContextAttention(WIDTH)
        self.norm2, self.attn2 = nn.LayerNorm(WIDTH), ContextAttention(24)
        self.norm3, self.geglu, self.ff_out = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 2 * INNER),
            nn.Linear(INNER, WIDTH),
        )

    def forward(self, x: Tensor, step: Tensor, context: Tensor) -> Tensor:
        angles = step[:, None] * torch.exp(torch.arange(8, device=x.device) * (-math.log(100.0) / 8))
        time = self.time_proj(F.silu(self.time(torch.cat([angles.sin(), angles.cos()], 1))))
        x = x + self.conv(F.silu(self.norm0(x))) + time[:, :, None, None]
        rows = x.flatten(2).transpose(1, 2)
        normed = self.norm1(rows)
        rows = rows + self.attn1(normed, normed)
        rows = rows + self.attn2(self.norm2(rows), context)
        up, gate = self.geglu(self.norm3(rows)).chunk(2, dim=-1)
        rows = rows + self.ff_out(up * F.gelu(gate))
        return rows.transpose(1, 2).reshape(x.shape)


CONTEXT = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "output"}
MLP = {"mlp.0": "ffn.up", "mlp.3": "ffn.down"}

FUSED = {
    "nanogpt": Architecture(
        NanoGPT,
        repeated("h.{}.", {"c_attn": QKV, "c_proj": "output"} | MLP) | {"lm_head.weight": "lm_head"},
        lambda: (tokens(2, 11),),
    ),
    "timm_vit": Architecture(
        TimmViT,
        repeated("blocks.{}.", {"qkv": QKV, "proj": "output"} | MLP),
        lambda: (normal(2, 3, 16, 16),),
    ),
    "diffusion": Architecture(
        DiffusionBlock,
        repeated("attn1.", CONTEXT, count=1)
        | repeated("attn2.", CONTEXT, count=1)
        | {"geglu.weight": fused(ffn_up=(0, 64), ffn_gate=(64, 128)), "ff_out.weight": "ffn.down"},
        lambda: (normal(2, WIDTH, 4, 4), torch.tensor([3.0, 41.0]), normal(2, 9, 24)),
    ),
}
