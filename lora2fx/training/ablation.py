"""ALoRA's AB-LoRA (arXiv 2403.16187, eq. 6): what a rank is worth is what the model loses without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora2fx.adapter import Axis
from lora2fx.training.allocator import keep_highest

Evaluate = Callable[[], float]


@torch.no_grad()
def ablation_scores(
    axes: Sequence[Axis], evaluate: Evaluate, whole: float | None = None
) -> list[tuple[Tensor, Tensor]]:
    """By axis, over its entries: IS(ρ) = S(M) - S(M without ρ) + S(M with ρ alone), and D = S(M) - S(M without ρ).

    S is what `evaluate` returns, S(M) is `whole` where that is known. Entries that are off get +inf. Costs two
    evaluations an entry.
    """
    masks = [axis.mask.clone() for axis in axes]
    whole = evaluate() if whole is None else whole
    scores = [(torch.full(mask.shape, torch.inf), torch.full(mask.shape, torch.inf)) for mask in masks]
    try:
        for axis, mask, (importance, damage) in zip(axes, masks, scores, strict=True):
            for entry in mask.nonzero().flatten().tolist():
                axis.mask[entry] = False
                damage[entry] = whole - evaluate()
                for other in axes:
                    other.mask.fill_(False)
                axis.mask[entry] = True
                importance[entry] = damage[entry] + evaluate()
                _restore(axes, masks)
    finally:
        _restore(axes, masks)
    return scores


def _restore(axes: Sequence[Axis], masks: Sequence[Tensor]) -> None:
    for axis, mask in zip(axes, masks, strict=True):
        axis.mask.copy_(mask)


@dataclass(frozen=True)
class Shift:
    """What a cycle moves: by axis a bool mask of the entries that stay, and how many new ones it gets."""

    kept: list[Tensor]
    grown: list[int]


def plan_shift(
    axes: Sequence[Axis], scores: Sequence[tuple[Tensor, Tensor]], drop: int | None, harmless: float | None
) -> Shift:
    """Drop the `drop` lowest entries (None: an eighth), and grow as many on the axes that lost none.

    `harmless` spares entries that cost more than that (D > harmless). Where every axis loses one, nothing grows.
    """
    before = [int(axis.mask.sum()) for axis in axes]
    count = max(1, sum(before) // 8) if drop is None else drop
    candidates = [
        importance if harmless is None else importance.masked_fill(damage > harmless, torch.inf)
        for importance, damage in scores
    ]
    count = min(count, sum(int(candidate.isfinite().sum()) for candidate in candidates))
    kept = keep_highest(candidates, sum(candidate.numel() for candidate in candidates) - count)
    spared = [i for i, keep in enumerate(kept) if keep.all()]
    averages = [float(scores[i][0][axes[i].mask.cpu()].mean()) if before[i] else -torch.inf for i in spared]
    given = shares(count, averages, [axes[i].mask.numel() - before[i] for i in spared])
    grown = dict(zip(spared, given, strict=True))
    return Shift(kept, [grown.get(i, 0) for i in range(len(axes))])


def shares(count: int, averages: Sequence[float], room: Sequence[int]) -> list[int]:
    """`count` new entries over modules as evenly as their room allows, the remainder to the highest averages."""
    given = [0] * len(room)
    order = sorted(range(len(room)), key=lambda i: -averages[i])
    while count and any(given[i] < room[i] for i in order):
        for i in order:
            if count and given[i] < room[i]:
                given[i] += 1
                count -= 1
    return given
