"""The buffers of adapters as a state, for runs that don't save the model's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora2fx.adapter import Adapter
from lora2fx.errors import AdapterError


def save_buffers(adapters: Sequence[Adapter]) -> list[dict[str, Any]]:
    """A copy of every buffer of every adapter, with the weight that it belongs to."""
    return [
        {"weight": adapter.site.weight, "buffers": {name: own.clone() for name, own in adapter.named_buffers()}}
        for adapter in adapters
    ]


@torch.no_grad()
def load_buffers(adapters: Sequence[Adapter], saved: Sequence[Mapping[str, Any]]) -> None:
    """Copy the state into the adapters' buffers. On any difference in kind `AdapterError`, and nothing is changed."""
    weights = [adapter.site.weight for adapter in adapters]
    if [entry["weight"] for entry in saved] != weights:
        raise AdapterError(f"the state is of {[entry['weight'] for entry in saved]}, the adapters are of {weights}.")
    pairs: list[tuple[Tensor, Tensor]] = []
    for adapter, entry in zip(adapters, saved, strict=True):
        own, other = dict(adapter.named_buffers()), entry["buffers"]
        if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in other.items()}:
            raise AdapterError(
                f"the state of {adapter.site.weight} has buffers {sorted(other)}, its adapter {sorted(own)}, or they"
                " differ in shape: it was saved with other hyperparameters."
            )
        pairs += [(value, other[name]) for name, value in own.items()]
    for value, loaded in pairs:
        value.copy_(loaded)
