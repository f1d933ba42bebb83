"""Saved adapters that every later version must load: `python -m tests.golden_adapters` writes those of this format.

Each folder of `tests/golden/adapters/v1/` is what `save` wrote, and `outputs.json` what the adapted model computed. A
folder that is there is never written again: from a release on, such files are on users' disks.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

import lora2fx
from lora2fx.methods.adalora import AdaLoRA
from lora2fx.methods.alora import ALoRA
from lora2fx.methods.lora import LoRA
from lora2fx.methods.lora2 import LoRA2
from lora2fx.methods.salora import SaLoRA
from lora2fx.methods.sora import SoRA
from lora2fx.passes.prune import prune_ranks
from lora2fx.program import program_of

FOLDER = Path(__file__).parent / "golden" / "adapters" / "v1"
METHODS = {
    "lora": LoRA(r=3, rank_pattern={"mix": 2}),
    "lora2-columns": LoRA2(r=4, k=3, target_k=2, tinit=1, tfinal=1),
    "lora2-lambda": LoRA2.paper(r=3, k=2, target_r=2, rank_pattern={"role:unknown": 3}),
    "adalora": AdaLoRA(r=3, target_r=2),
    "sora": SoRA(r=3, xi=(0.1, 0.2)),
    "salora": SaLoRA(r=3, lora_alpha=6),
    "alora": ALoRA(r=2, n_prune=1),
}


def exact(shape: torch.Size | tuple[int, ...], step: int) -> torch.Tensor:
    """Multiples of 1/16, the same on every platform and in every version."""
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return ((count * step % 17 - 8) / 16).view(shape)


class Base(nn.Module):
    """An embedding with padding, a linear, a convolution and a head, all of numbers that are exact."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4, padding_idx=0)
        self.mix = nn.Linear(4, 5)
        self.conv = nn.Conv1d(5, 3, 3, padding=1)
        self.head = nn.Linear(3, 2)
        self.double().eval()
        with torch.no_grad():
            for step, parameter in enumerate(self.parameters(), 3):
                parameter.copy_(exact(parameter.shape, step))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(self.mix(self.words(ids)).tanh().mT).mT)


IDS = torch.tensor([[0, 1, 2, 3, 4, 5], [6, 5, 4, 3, 2, 1]])


def adapted(name: str) -> nn.Module:
    """Factors of exact numbers, one entry of every axis masked, a head that was trained; the LoRA's also pruned."""
    model = lora2fx.transform(
        Base(), ["words", "mix", "conv"], METHODS[name], example_inputs=(IDS,), modules_to_save=["head"], seed=0
    )
    program = program_of(model, "golden adapters")
    with torch.no_grad():
        for step, parameter in enumerate((p for p in model.parameters() if p.requires_grad), 5):
            parameter.copy_(exact(parameter.shape, step))
        for adapter in program.adapters.values():
            adapter.progress.copy_(torch.tensor([9, 9, 1]))
            for axis in adapter.axes().values():
                axis.mask[-1] = axis.keep[-1] = False
    if name == "lora":
        prune_ranks(program)
    return model


def main() -> None:
    for name in METHODS:
        folder = FOLDER / name
        if folder.exists():
            print(f"{folder} is there, and stays")
            continue
        model = adapted(name)
        lora2fx.save(model, folder)
        with torch.no_grad():
            outputs = model(IDS)
        (folder / "outputs.json").write_text(json.dumps(outputs.tolist()) + "\n")
        print(f"{folder} written")


if __name__ == "__main__":
    main()
