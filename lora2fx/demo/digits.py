"""scikit-learn's 1797 handwritten digits as two tasks: 0 to 4 to train on from scratch, 5 to 9 to adapt to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora2fx.errors import Lora2fxError


@dataclass(frozen=True)
class Examples:
    """Images (n, 8, 8) float32 in [0, 1] with their classes (n,) int64 in 0 … 4."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Examples:
        """The examples at `index`, int64 (m,)."""
        return Examples(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Task:
    """Five digits, as examples to train on and examples that nothing but the final accuracy sees."""

    train: Examples
    test: Examples


def hold_back(examples: Examples, share: float, seed: int) -> Task:
    """The same share of every class held back as `test`, the rest as `train`; the split depends on `seed` only."""
    generator = torch.Generator().manual_seed(seed)
    kept, held = [], []
    for label in range(5):
        index = torch.nonzero(examples.labels == label).squeeze(1)
        index = index[torch.randperm(len(index), generator=generator)]
        count = round(share * len(index))
        held.append(index[:count])
        kept.append(index[count:])
    return Task(examples.take(torch.cat(kept)), examples.take(torch.cat(held)))


def load_tasks(test_share: float = 0.4, seed: int = 0) -> tuple[Task, Task]:
    """Digits 0–4 and digits 5–9 (their classes counted from 0), each split into train and test.

    Raises `Lora2fxError` where scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise Lora2fxError('The demo needs scikit-learn: pip install "lora2fx[demo]".') from error
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32) / 16
    labels = torch.tensor(found.target, dtype=torch.int64)
    low, high = labels < 5, labels >= 5
    first, second = Examples(images[low], labels[low]), Examples(images[high], labels[high] - 5)
    return hold_back(first, test_share, seed), hold_back(second, test_share, seed)
