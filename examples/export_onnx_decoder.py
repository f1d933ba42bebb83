"""An adapted Llama as ONNX with its key–value cache, and greedy generation through ONNX Runtime on bound memory.

python examples/export_onnx_decoder.py            # a small random Llama, no download
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora2fx
from lora2fx.exporters import OnnxModel, export_onnx


def adapted() -> LlamaForCausalLM:
    """A small Llama that learned to count; with `from_pretrained(...)` in its place, nothing below changes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, intermediate_size=96, **sizes))
    lora2fx.transform(model, ["attention", "ffn", "lm_head"], lora2fx.LoRA(r=16), seed=0)
    optimizer = torch.optim.AdamW(lora2fx.param_groups(model, lr=1e-2))
    lora2fx.attach(model, optimizer, total_steps=60)
    for step in range(60):
        ids = (torch.arange(8)[:, None] * 4 + step + torch.arange(12)) % 32
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def generate(model: OnnxModel, prompt: np.ndarray, count: int) -> np.ndarray:
    """The next `count` tokens of each row; the cache stays on the provider's device from step to step."""
    rows, done = prompt.shape
    shapes = {value.name: value.shape for value in model.session.get_inputs()}
    past = {name: np.zeros((rows, s[1], 0, s[3]), np.float32) for name, s in shapes.items() if name.startswith("past")}
    step, tokens = prompt, []
    for _ in range(count):
        positions = np.tile(np.arange(done - step.shape[1], done), (rows, 1))
        inputs = {"input_ids": step, "attention_mask": np.ones((rows, done), np.int64), "position_ids": positions}
        found = model.run_bound(inputs | past)
        step = found["logits"].numpy()[:, -1].argmax(-1)[:, None]
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        tokens, done = [*tokens, step], done + 1
    return np.concatenate(tokens, 1)


def main(folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Returns what ONNX Runtime and torch generate."""
    model = adapted()
    report = export_onnx(model, folder / "model.onnx", kv_cache=True)
    print(f"inputs {', '.join(report.details['inputs'][:4])}, ...; checked at {len(report.details['shapes'])} sizes")
    prompt = torch.tensor([[1, 2, 3, 4], [20, 21, 22, 23]])
    found = generate(OnnxModel(folder / "model.onnx"), prompt.numpy(), 8).tolist()
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    print(f"generated {found}")
    return found, expected[:, 4:].tolist()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
