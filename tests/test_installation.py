"""What becomes of a weight whose rewrite doesn't stand up to verification."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPTNeoXConfig, GPTNeoXModel

import lora2fx
from lora2fx import LoRA, installation
from lora2fx.passes.verify import Verification
from tests.adapted import adapters_of


class Attention(nn.Module):
    """By one fused weight."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


def test_all_columns_of_a_weight_go_to_the_next_rewrite(monkeypatch):
    """Where one of them fails: what reads W + ΔW of some columns has no plain matmul for the others."""
    verify, tried = installation.verify_rewrites, []

    def failing_once(program, inputs, reference):
        tried.append({name.rpartition("_")[2]: adapter.rewrite for name, adapter in program.adapters.items()})
        if len(tried) > 1:
            return verify(program, inputs, reference)
        name = next(name for name in program.adapters if name.endswith("key"))
        return Verification(
            "failed", 1.0, ({"check": "folded", "mode": "eval", "passed": False, "note": "no"},), (name,)
        )

    monkeypatch.setattr(installation, "verify_rewrites", failing_once)
    model, x = Attention(), torch.randn(2, 5, 8)
    lora2fx.transform(model, ["query", "key", "value", "output"], LoRA(r=2), example_inputs=(x,), seed=0)
    assert tried == [
        dict.fromkeys(("query", "key", "value", "weight"), "activation"),
        {**dict.fromkeys(("query", "key", "value"), "weight"), "weight": "activation"},
    ]
    assert {adapter.site.role: adapter.rewrite for adapter in adapters_of(model)}["output"] == "activation"


@pytest.mark.parametrize("ids", [torch.zeros(1, 8), torch.full((2, 3), 5)], ids=["zeros", "fives"])
def test_tokens_that_are_all_alike_are_inputs_too(ids):
    """The queries' and keys' gradients are rounding then, and show nothing."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    for _ in range(3):
        model = GPTNeoXModel(GPTNeoXConfig(vocab_size=16, **sizes))
        lora2fx.transform(model, ["attention"], LoRA(r=2), example_inputs=(ids.long(),), seed=0)
        assert {adapter.rewrite for adapter in adapters_of(model)} == {"activation"}
