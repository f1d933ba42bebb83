"""Small models, and the PEFT folders that PEFT itself writes for them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """An embedding with a padding row, linears of which one's name is another's suffix, convolutions, a head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.words = nn.Embedding(11, 6, padding_idx=0)
            self.fc = nn.Linear(6, 8)
            self.inner = nn.Sequential()
            self.inner.add_module("fc", nn.Linear(8, 8))
            self.conv = nn.Conv1d(8, 8, 3, padding=1)
            self.image = nn.Conv2d(1, 4, 3, stride=2, padding=1)
            self.head = nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:  # (batch, length) → (batch, 3)
        hidden = self.inner(self.fc(self.words(ids)).tanh()).tanh()
        hidden = self.conv(hidden.transpose(1, 2)).tanh()
        picture = self.image(hidden.unsqueeze(1)).tanh()
        return self.head(torch.cat([hidden.mean(-1), picture.mean((2, 3))], -1))


IDS = torch.tensor([[1, 4, 9, 3, 2], [7, 5, 10, 0, 0], [2, 2, 8, 6, 1]])


def perturbed(model: Any, size: float = 0.3) -> Any:
    """Every LoRA factor and every trained module overwritten with visible numbers, an embedding's padding left 0."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ranknum" not in name and ("lora_" in name or "modules_to_save" in name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
            if "lora_embedding_A" in name:
                parameter[:, 0] = 0
    return model


def written(base: nn.Module, config: Any, folder: Path) -> Any:
    """PEFT's model with perturbed factors, saved to the folder; in eval mode."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = perturbed(peft.get_peft_model(base, config))
        model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    return model.eval()
