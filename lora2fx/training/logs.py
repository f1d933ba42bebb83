"""What a training run logs of its adapters: budgets, what they keep, importance, penalty, skipped steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora2fx.adapter import Adapter
from lora2fx.training.driver import Attachment
from lora2fx.training.importance import axis_importance

QUANTILES = (0.1, 0.5, 0.9)


def _is_scored(adapters: Sequence[Adapter], name: str) -> bool:
    scored = adapters[0].axes()[name].scored
    buffers = {key for key, _ in adapters[0].named_buffers()}
    return bool(scored) and all(f"{one}_sensitivity" in buffers for one, _ in scored)


def _importance(attachment: Attachment, name: str) -> Tensor | None:
    """Importance of what is left on an axis, float32 on the CPU; None where the method keeps no averages of it."""
    if not _is_scored(attachment.adapters, name):
        return None
    axes = [adapter.axes()[name] for adapter in attachment.adapters]
    scores = axis_importance(attachment.adapters, name)
    left = [score[axis.mask & axis.keep].float().cpu() for score, axis in zip(scores, axes, strict=True)]
    return torch.cat(left)


def site_importances(adapters: Sequence[Adapter]) -> list[dict[str, list[float]]]:
    """By adapter and scored axis the importance of every entry, as far as the method keeps averages of it."""
    found: list[dict[str, list[float]]] = [{} for _ in adapters]
    for name in adapters[0].axes() if adapters else ():
        if _is_scored(adapters, name):
            for own, scores in zip(found, axis_importance(adapters, name), strict=True):
                own[name] = scores.tolist()
    return found


def log_values(attachment: Attachment) -> dict[str, float]:
    """Plain numbers under names that start with "lora2fx/", for any logger.

    For each axis (lambda, columns, gate, ...): `<axis>_active` entries over all adapters, `<axis>_budget` where one
    falls, `<axis>_importance_q10`, `_q50`, `_q90` of those active where importance is kept. Beside them `penalty`,
    `steps` that counted and `skipped_steps`. Reading them waits for the device.
    """
    values: dict[str, float] = {"steps": attachment.step, "skipped_steps": attachment.skipped}
    if attachment.penalty is not None:
        values["penalty"] = attachment.penalty
    for name, budget in attachment.budgets.items():
        values[f"{name}_budget"] = budget
    for name in attachment.adapters[0].axes() if attachment.adapters else ():
        axes = [adapter.axes()[name] for adapter in attachment.adapters]
        values[f"{name}_active"] = sum(int((axis.mask & axis.keep).sum()) for axis in axes)
        found = _importance(attachment, name)
        if found is not None and found.numel():
            levels = torch.quantile(found, torch.tensor(QUANTILES)).tolist()
            values |= {f"{name}_importance_q{q * 100:.0f}": level for q, level in zip(QUANTILES, levels, strict=True)}
    return {f"lora2fx/{name}": value for name, value in values.items()}
