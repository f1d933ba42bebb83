"""Bytes kept for the backward and operations of a pass, of decoders with fused or turned weights: exact counts.

Phi-3 (query, key and value in one weight, gate and up in another), GPT-NeoX (the heads' in turns), GPT-2 (in one
weight, and all weights the other way round), and Llama, where each weight is a layer of its own. Two layers, 256 wide,
512 tokens, attention and feed-forward adapted, r = 8; PEFT's LoRA has one adapter a weight, ours one a role.

python benchmarks/bench_fused.py            # writes results/fused.json
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from counting import dispatched_operations, saved_bytes, state_of
from timing import circumstances
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaModel,
    Phi3Config,
    Phi3Model,
)
from transformers.utils import logging

import lora2fx

RESULTS = Path(__file__).parent / "results"
BASE, RANK, WIDTH = "frozen", 8, 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


@dataclass(frozen=True)
class Decoder:
    """A model, and the names of its weights as PEFT is told them."""

    make: Callable[[], nn.Module]
    names: tuple[str, ...]
    turned: bool = False


def phi3() -> nn.Module:
    """Without dropout."""
    return Phi3Model(
        Phi3Config(
            **SIZES, intermediate_size=512, num_key_value_heads=2, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0
        )
    )


def gpt2() -> nn.Module:
    """Without dropout."""
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2Model(GPT2Config(n_embd=WIDTH, n_layer=2, n_head=4, vocab_size=64, n_positions=256, **none))


DECODERS = {
    "Phi-3": Decoder(phi3, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "GPT-NeoX": Decoder(
        lambda: GPTNeoXModel(GPTNeoXConfig(**SIZES, intermediate_size=4 * WIDTH)),
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "GPT-2": Decoder(gpt2, ("c_attn", "c_proj", "c_fc"), turned=True),
    "Llama": Decoder(
        lambda: LlamaModel(LlamaConfig(**SIZES, intermediate_size=512, num_key_value_heads=4)),
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
}


def frozen(decoder: Decoder, dtype: torch.dtype) -> nn.Module:
    """The model, the same for every variant."""
    torch.manual_seed(0)
    return decoder.make().to(dtype).requires_grad_(False).train()


def ours(decoder: Decoder, dtype: torch.dtype, method: lora2fx.LoRA | lora2fx.LoRA2) -> nn.Module:
    """Adapted by lora2fx, and attached."""
    model = frozen(decoder, dtype)
    lora2fx.transform(
        model, ["attention", "ffn"], method, example_inputs=(torch.zeros(1, 8, dtype=torch.int64),), seed=0
    )
    lora2fx.attach(model, torch.optim.AdamW(lora2fx.param_groups(model, lr=1e-3)), total_steps=1000)
    return model


def theirs(decoder: Decoder, dtype: torch.dtype) -> nn.Module:
    """Adapted by PEFT, whose adapters are float32, too."""
    config = peft.LoraConfig(r=RANK, target_modules=list(decoder.names), fan_in_fan_out=decoder.turned)
    wrapped: nn.Module = peft.get_peft_model(frozen(decoder, dtype), config)
    return wrapped


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """Of embedded tokens (batch, tokens, width)."""
    hidden: Tensor = model(inputs_embeds=x, use_cache=False).last_hidden_state
    return hidden.float().square().mean()


def measure(decoder: Decoder, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """By variant: bytes over the frozen model's, and operations of forward and backward."""
    x = torch.randn(4, 128, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    models = {
        BASE: frozen(decoder, dtype),
        "LoRA²": ours(decoder, dtype, lora2fx.LoRA2(r=RANK, k=RANK)),
        "LoRA": ours(decoder, dtype, lora2fx.LoRA(r=RANK)),
        "PEFT LoRA": theirs(decoder, dtype),
    }
    kept = {name: saved_bytes(lambda m=m: loss(m, x), state_of(m)) for name, m in models.items()}
    return {
        name: {
            "bytes": round(kept[name] / kept[BASE], 3),
            "operations": dispatched_operations(lambda m=model: loss(m, x).backward()).total(),
        }
        for name, model in models.items()
    }


def main() -> None:
    """Count everything, print a table, write the results."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    found = {
        precision: {name: measure(decoder, dtype) for name, decoder in DECODERS.items()}
        for precision, dtype in DTYPES.items()
    }
    variants = ("LoRA²", "LoRA", "PEFT LoRA")
    print("| | " + " | ".join(f"{name}, bytes | operations" for name in variants) + " |\n" + "|---" * 7 + "|")
    for precision, rows in found.items():
        for name, own in rows.items():
            cells = [
                f"{own[each]['bytes']:.2f} | {own[each]['operations'] - own[BASE]['operations']}" for each in variants
            ]
            print(f"| {name}, {precision} | " + " | ".join(cells) + " |")
    text = json.dumps({**circumstances(), "rank": RANK, "counts": found}, indent=1, ensure_ascii=False)
    (RESULTS / "fused.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
