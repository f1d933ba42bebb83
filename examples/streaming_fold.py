"""Merge a saved adapter into a sharded checkpoint without building the model: one tensor is in memory at a time.

On the command line: lora2fx fold --base FOLDER --adapter FOLDER --out FOLDER

python examples/streaming_fold.py                 # a small random Llama in bfloat16, no download
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora2fx
from lora2fx.streaming import fold_checkpoint


def build() -> LlamaForCausalLM:
    """The base; on the disk it lies in several files."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, intermediate_size=128, **sizes)).bfloat16().eval()


def adapt(model: LlamaForCausalLM, folder: Path) -> None:
    """Some training stands here; a small update, as that of a large model is."""
    lora2fx.transform(model, ["attention", "ffn"], lora2fx.LoRA(r=4), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=2e-4, generator=torch.Generator().manual_seed(1))
    lora2fx.save(model, folder)


def main(folder: Path) -> tuple[float, bool]:
    """Returns the share of the update that rounding took, and whether folding in memory gives the same bits."""
    model = build()
    model.save_pretrained(folder / "base", max_shard_size="100KB")
    adapt(model, folder / "adapter")
    report = fold_checkpoint(folder / "base", folder / "adapter", folder / "merged", rounding="adapter")
    lost = report.details["lost_adaptation"]
    print(f"{len(report.details['shards'])} files merged; rounding to bfloat16 took {lost:.1%} of the update")
    lora2fx.fold(model, rounding="adapter")
    merged = LlamaForCausalLM.from_pretrained(folder / "merged", dtype="auto").state_dict()
    same = all(torch.equal(value, merged[name]) for name, value in model.state_dict().items())
    print(f"the same bits as folding in memory: {same}")
    return lost, same


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
