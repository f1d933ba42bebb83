"""To PEFT and back: an adapted Llama as a LoRA folder for PEFT, vLLM or llama.cpp, and that folder as adapters again.

python examples/peft_folder.py                    # a small random Llama, no download
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora2fx


def build() -> LlamaForCausalLM:
    """With `AutoModelForCausalLM.from_pretrained(...)` in its place, nothing below changes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, intermediate_size=96, **sizes)).eval()


def train(model: LlamaForCausalLM, steps: int) -> None:
    """Rows of one number; half of the columns are pruned on the way."""
    optimizer = torch.optim.AdamW(lora2fx.param_groups(model, lr=1e-2))
    lora2fx.attach(model, optimizer, total_steps=steps)
    model.train()
    for step in range(steps):
        ids = ((torch.arange(8) + step)[:, None] % 32).expand(-1, 10)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def main(folder: Path, steps: int = 40) -> tuple[dict[str, int], float]:
    """Returns the rank of each module in the folder, and how far the outputs are off after the way there and back."""
    model = build()
    lora2fx.transform(model, ["attention", "ffn"], lora2fx.LoRA2(r=8, k=4, target_k=2), seed=0)
    train(model, steps)
    report = lora2fx.exporters.export_peft(model, folder)  # read back by PEFT and compared before it is there
    print(f"{folder}: r = {report.details['r']}, ranks {report.details['ranks']}")

    loaded = lora2fx.load(build(), folder)  # any LoRA or AdaLoRA folder of PEFT's; nothing in it is executed
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        gap = float((loaded(input_ids=ids).logits - model(input_ids=ids).logits).abs().max())
    print(f"loaded again: logits off by at most {gap:.1e}")
    lora2fx.fold(loaded)  # or train on, prune, export to ONNX, ...
    return report.details["ranks"], gap


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch) / "peft")
