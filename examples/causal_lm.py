"""A causal language model: adapt, train on next tokens, generate with the adapters in place, fold, generate the same.

python examples/causal_lm.py                      # a small random Llama that learns to count, no download
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora2fx

VOCABULARY, LENGTH = 32, 12


def build() -> LlamaForCausalLM:
    """With `AutoModelForCausalLM.from_pretrained(...)` in its place, nothing below changes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, intermediate_size=96, **sizes, **special))


def counting(rows: int, generator: torch.Generator) -> torch.Tensor:
    """Rows that count upwards from anywhere, modulo the vocabulary."""
    start = torch.randint(0, VOCABULARY, (rows, 1), generator=generator)
    return (start + torch.arange(LENGTH)) % VOCABULARY


def main(steps: int = 150) -> torch.Tensor:
    """Returns what the folded model generates after 5, 6, 7."""
    model, generator = build(), torch.Generator().manual_seed(0)
    lora2fx.transform(model, ["attention", "ffn", "lm_head"], lora2fx.LoRA2(r=8, k=8, target_k=4))
    optimizer = torch.optim.AdamW(lora2fx.param_groups(model, lr=1e-2))
    lora2fx.attach(model, optimizer, total_steps=steps)
    model.train()
    for _ in range(steps):
        ids = counting(32, generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    prompt = torch.tensor([[5, 6, 7]])
    adapted = model.generate(prompt, max_new_tokens=6, do_sample=False)
    lora2fx.fold(model)
    folded = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(adapted, folded)
    print("after 5 6 7:", *folded[0, 3:].tolist())
    return folded


if __name__ == "__main__":
    main()
