"""An adapted encoder as one ONNX file, merged and proven: in float32, float16 and 8 bits, and run without torch.

python examples/export_onnx.py                    # a small random BERT, no download
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

import lora2fx
from lora2fx.exporters import OnnxModel, export_onnx


def adapted() -> BertForSequenceClassification:
    """With `from_pretrained(...)` and a real training run in their place, nothing below changes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    model = BertForSequenceClassification(BertConfig(vocab_size=100, num_labels=3, **sizes))
    lora2fx.transform(model, ["query", "value", "ffn"], lora2fx.LoRA2(r=8, k=8), seed=0)
    optimizer = torch.optim.AdamW(lora2fx.param_groups(model, lr=1e-2))
    lora2fx.attach(model, optimizer, total_steps=20)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        labels = torch.randint(0, 3, (8,), generator=generator)
        ids = torch.randint(3, 100, (8, 12), generator=generator)
        ids[:, 1] = 10 + labels  # what is to be learned
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def main(folder: Path) -> dict[str, float]:
    """Exports three files; returns the largest error of each, as a share of the largest logit."""
    model, errors = adapted(), {}
    for name, options in {"float32": {}, "float16": {"dtype": "float16"}, "int8": {"int8": True}}.items():
        report = export_onnx(model, folder / f"{name}.onnx", **options)  # raises, and writes nothing, unless proven
        logits = report.details["outputs"][0]
        errors[name] = logits["relative_error"]
        size = (folder / f"{name}.onnx").stat().st_size
        print(f"{name}: {size} bytes, error {logits['error']:.1e} where {logits['allowed']:.1e} is allowed")
    print(f"dynamic: {report.details['dynamic_axes']['input_ids']}")

    onnx_model = OnnxModel(folder / "float32.onnx")  # on a GPU: providers=["CUDAExecutionProvider"]
    ids = np.arange(24, dtype=np.int64).reshape(2, 12) + 3
    zeros, ones = np.zeros_like(ids), np.ones_like(ids)
    known = {"input_ids": ids, "token_type_ids": zeros, "attention_mask": ones}
    found = onnx_model.run({name: known[name] for name in onnx_model.inputs})
    print(f"logits {found['logits'].shape}, on {onnx_model.provider}")
    return errors


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
