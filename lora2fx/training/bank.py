"""All adapters' factors folded at once, when one of them changed: what the eager form of their sites reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora2fx.adapter import Adapter
from lora2fx.eager import connect, disconnect
from lora2fx.sharding import is_sharded

_Seen = tuple[tuple[dict[str, Tensor | None], str, Tensor | None, int], ...]


@dataclass(frozen=True)
class Folding:
    """How a method folds many adapters in a handful of operations.

    `fold` returns for each adapter A (k, in) and B (k, out) with ΔW = Aᵀ B, differentiable; `reads` names the
    parameters and buffers that it reads.
    """

    reads: tuple[str, ...]
    fold: Callable[[Sequence[Adapter]], list[tuple[Tensor, Tensor]]]


def _held(adapter: Adapter, name: str) -> dict[str, Tensor | None]:
    held: dict[str, Tensor | None] = adapter._parameters if name in adapter._parameters else adapter._buffers  # type: ignore[assignment]
    return held


def is_eager(adapter: Adapter) -> bool:
    """Whether a site of this adapter may be computed in the eager form."""
    site = adapter.site
    return adapter.rewrite == "activation" and not site.batch_shape and site.columns is None and adapter.dropout is None


class Bank:
    """The folded factors of all adapters that have an eager form; folded anew once one that is asked for changed.

    A change is seen by torch's version counters, which a write through `.data` and a fused optimizer pass by: `expire`
    says so after every step.
    """

    def __init__(self, adapters: Sequence[Adapter], folding: Folding | None) -> None:
        self._folding = folding
        plain = folding is not None and not any(map(is_sharded, adapters))
        self._adapters = tuple(filter(is_eager, adapters)) if plain else ()
        self._factors: list[tuple[Tensor, Tensor]] = []
        self._seen: list[_Seen] = []
        connect(self._adapters, self)

    def close(self) -> None:
        """The sites go back to the functional form."""
        disconnect(self._adapters)
        self.expire()

    def expire(self) -> None:
        """Forget what was folded."""
        self._factors, self._seen = [], []

    def factors(self, index: int) -> tuple[Tensor, Tensor]:
        """A (k, in) and B (k, out) of one adapter, with their gradients' way to its parameters."""
        if not self._factors or self._changed(index):
            self._refresh()
        return self._factors[index]

    def _changed(self, index: int) -> bool:
        for held, name, tensor, version in self._seen[index]:
            now = held[name]
            if now is not tensor or (now is not None and now._version != version):
                return True
        return False

    def _refresh(self) -> None:
        assert self._folding is not None
        names = self._folding.reads
        device = self._adapters[0].progress.device.type
        with torch.autocast(device, enabled=False):
            self._factors = self._folding.fold(self._adapters)
        self._seen = [
            tuple(
                (held, name, tensor, -1 if tensor is None else tensor._version)
                for name in names
                for held in (_held(adapter, name),)
                for tensor in (held[name],)
            )
            for adapter in self._adapters
        ]
