"""Optimizer groups that fit adapters: gates and singular values apart from the factors, without weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora2fx.adapter import Adapter


def is_gate(adapter: Adapter, parameter: nn.Parameter) -> bool:
    """Whether an adapter's parameter is a vector of each matrix (λ, a gate), and no factor."""
    return parameter.dim() <= len(adapter.site.batch_shape) + 1


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.0, gate_lr: float | None = None, head_lr: float | None = None
) -> list[dict[str, Any]]:
    """Groups of everything in `model` that is trained: factors, gates, and what isn't an adapter's (heads).

    Gates get no weight decay, and `gate_lr` where it is given; heads `head_lr`. What is None is the optimizer's own
    default: `torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3)`. Empty groups are left out.
    """
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    owned = [(adapter, p) for adapter in adapters for p in adapter.parameters() if p.requires_grad]
    gates = [p for adapter, p in owned if is_gate(adapter, p)]
    factors = [p for adapter, p in owned if not is_gate(adapter, p)]
    known = {id(p) for _, p in owned}
    heads = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    settings: list[tuple[list[nn.Parameter], float, float | None]] = [
        (factors, weight_decay, None),
        (gates, 0.0, gate_lr),
        (heads, weight_decay, head_lr),
    ]
    return [
        {"params": params, "weight_decay": decay} | ({} if lr is None else {"lr": lr})
        for params, decay, lr in settings
        if params
    ]
