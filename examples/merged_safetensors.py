"""The merged weights as files that `from_pretrained` reads; the model in memory stays adapted and trains on.

python examples/merged_safetensors.py             # a small random BERT, no download
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

import lora2fx


def build() -> BertForSequenceClassification:
    """With `AutoModelForSequenceClassification.from_pretrained(...)` in its place, nothing below changes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=2, **sizes)).eval()


def main(folder: Path, steps: int = 30) -> float:
    """Returns how far the outputs of the file's model are off."""
    model, ids = build(), torch.randint(0, 50, (16, 9), generator=torch.Generator().manual_seed(1))
    lora2fx.transform(model, ["query", "value", "ffn"], lora2fx.LoRA(r=4), seed=0)
    optimizer = torch.optim.AdamW(lora2fx.param_groups(model, lr=5e-3))
    lora2fx.attach(model, optimizer, total_steps=steps)
    for _ in range(steps):
        model(input_ids=ids, labels=ids[:, 0] % 2).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lora2fx.exporters.export_safetensors(model, folder)  # a folder with its config; or one file, "x.safetensors"
    read = BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        gap = float((read(input_ids=ids).logits - model.eval()(input_ids=ids).logits).abs().max())
    print(f"{folder}: {type(read).__name__}, logits off by at most {gap:.1e}")
    return gap


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch) / "merged")
