"""A mixture of experts, adapted expert by expert, merged and saved as transformers reads it.

python examples/mixture_of_experts.py [--out FOLDER]    # a small random Mixtral, no download
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

import lora2fx


def build() -> MixtralForCausalLM:
    """With `AutoModelForCausalLM.from_pretrained(...)` in its place, nothing below changes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    special = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    return MixtralForCausalLM(MixtralConfig(vocab_size=32, **sizes, **experts, **special))


def main(out: Path, steps: int = 60) -> tuple[float, float]:
    """Returns the loss before and after."""
    model, generator = build(), torch.Generator().manual_seed(0)
    lora2fx.transform(model, ["ffn", "query", "value"], lora2fx.LoRA2(r=4, k=4, target_k=2))
    print(lora2fx.report(model))
    optimizer = torch.optim.AdamW(lora2fx.param_groups(model, lr=1e-2))
    lora2fx.attach(model, optimizer, total_steps=steps)
    losses = []
    for _ in range(steps):
        ids = (torch.randint(0, 32, (16, 1), generator=generator) + torch.arange(10)) % 32
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    lora2fx.fold(model)
    model.save_pretrained(out)
    print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}; the merged model is in {out}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/mixtral"))
    main(parser.parse_args().out)
