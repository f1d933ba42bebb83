"""One architecture of the zoo: how to build it, what to call it with, and what its weights do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Columns = tuple[tuple[int, int], ...]
Role = str | Mapping[str, Columns]


@dataclass(frozen=True)
class Architecture:
    """A tiny model with the truth about its weights, written from the architecture.

    `roles`: every weight of an attention (query, key, value, output), a feed-forward (ffn.up, ffn.gate, ffn.down),
    a router or a language-model head; a fused weight names the output columns of each of its roles; a tied weight
    stands under the name of the module that multiplies by it. Any weight left out must get none of these
    roles, except the `undecided` ones, of which nothing is asked.
    """

    make: Callable[[], nn.Module]
    roles: Mapping[str, Role]
    inputs: Callable[[], Any] | None = None
    undecided: frozenset[str] = frozenset()

    def build(self) -> nn.Module:
        """The model in eval mode, with the same weights each time; the global generator stays as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().eval()

    @property
    def example_inputs(self) -> Any:
        """A dict or tuple of arguments of the forward; None for a transformers model, whose inputs are synthesised."""
        return None if self.inputs is None else self.inputs()


def repeated(prefix: str, block: Mapping[str, Role], count: int = 2) -> dict[str, Role]:
    """The roles of `count` equal blocks; `{}` in `prefix` is the block's number."""
    return {prefix.format(i) + weight + ".weight": role for i in range(count) for weight, role in block.items()}


def fused(**columns: tuple[int, ...]) -> dict[str, Columns]:
    """Columns by role, `query=(0, 32)`; a role in several pieces lists them flat, `query=(0, 8, 24, 32)`."""
    return {
        name.replace("ffn_", "ffn."): tuple(zip(flat[::2], flat[1::2], strict=True)) for name, flat in columns.items()
    }


QKV = fused(query=(0, 32), key=(32, 64), value=(64, 96))
"""Query, key and value side by side, of width 32 each."""


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int, vocabulary: int = 99, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))
