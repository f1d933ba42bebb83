"""The best state of a run by its validation score, structure and weights, kept in the adapters' own buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from lora2fx.adapter import Adapter
from lora2fx.sharding import like, whole


class RememberingAdapter(Protocol):
    """What an adapter with a memory offers.

    `best_step` (int64, 0: nothing is remembered) and `best_score` are scalars, the same in every adapter; `settled`
    (bool) says that no rank moves any more.
    """

    mask: Tensor
    keep: Tensor
    best_step: Tensor
    best_score: Tensor
    settled: Tensor

    def remembered(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """(live tensor, its best value) of all that is remembered."""


def remembering(adapter: Adapter) -> RememberingAdapter:
    """The adapter, which has a memory."""
    return cast(RememberingAdapter, adapter)


def best_score(adapters: Sequence[Adapter]) -> float | None:
    """The remembered state's score; None where nothing is remembered."""
    first = remembering(adapters[0])
    return float(first.best_score) if int(first.best_step) else None


def as_remembered(adapters: Sequence[Adapter], score: float) -> float:
    """The score with as many digits as the adapters remember."""
    return float(torch.tensor(score, dtype=torch.float64).to(remembering(adapters[0]).best_score.dtype))


@torch.no_grad()
def remember(adapters: Sequence[Adapter], step: int, score: float) -> None:
    """The present state, after `step` steps, is the best."""
    for adapter in map(remembering, adapters):
        for live, best in adapter.remembered():
            best.copy_(whole(live))
        adapter.best_score.fill_(score)
        adapter.best_step.fill_(step)


@torch.no_grad()
def recall(adapters: Sequence[Adapter]) -> None:
    """Go back to the best state."""
    for adapter in map(remembering, adapters):
        for live, best in adapter.remembered():
            live.copy_(like(best, live))
        adapter.keep.copy_(adapter.mask)


def present(adapters: Sequence[Adapter]) -> list[list[Tensor]]:
    """Copies of what `recall` overwrites."""
    return [[live.detach().clone() for live, _ in adapter.remembered()] for adapter in map(remembering, adapters)]


@torch.no_grad()
def put_back(adapters: Sequence[Adapter], before: Sequence[Sequence[Tensor]]) -> None:
    """Undo a `recall`."""
    for adapter, values in zip(map(remembering, adapters), before, strict=True):
        for (live, _), value in zip(adapter.remembered(), values, strict=True):
            live.copy_(value)
        adapter.keep.copy_(adapter.mask)
