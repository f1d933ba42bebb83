"""A Hugging Face ViT on scikit-learn's handwritten digits, exported to ONNX.

python examples/vision_transformer.py [--out FOLDER]     # needs lora2fx[hf,onnx] and scikit-learn
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

import lora2fx


def build() -> ViTForImageClassification:
    """With `from_pretrained(...)` of a model for images of this size in its place, nothing below changes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes))


def main(out: Path, steps: int = 200) -> float:
    """Adapt, train, export; returns the accuracy on the last 400 digits."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    model, generator = build(), torch.Generator().manual_seed(0)
    lora2fx.transform(model, ["query", "key", "value", "output", "ffn"], lora2fx.LoRA2(r=8, k=8, target_k=4))
    optimizer = torch.optim.AdamW(lora2fx.param_groups(model, lr=3e-3))
    lora2fx.attach(model, optimizer, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(0, len(images) - 400, (64,), generator=generator)
        model(pixel_values=images[rows], labels=labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[-400:]).logits.argmax(-1) == labels[-400:]).float().mean().item()
    report = lora2fx.exporters.export_onnx(model, out / "vit.onnx")
    print(f"accuracy {accuracy:.3f}; ONNX error {report.verify['max_error']:.1e}; written to {out / 'vit.onnx'}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/vit"))
    main(parser.parse_args().out)
