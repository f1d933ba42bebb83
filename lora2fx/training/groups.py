"""Optimizer groups that fit what is trained: factors, gates and singular values, and what is no adapter's."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from lora2fx.adapter import Adapter
from lora2fx.training.slots import Groups

NOTHING = Groups()
"""What a method asks that asks nothing."""


def is_gate(adapter: Adapter, parameter: nn.Parameter) -> bool:
    """Whether an adapter's parameter is a vector of each matrix (λ, a gate), and no factor."""
    return parameter.dim() <= len(adapter.site.batch_shape) + 1


def _decayed(name: str, parameters: Sequence[nn.Parameter], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with decay, biases and scales without."""
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    return [
        {"name": name, "params": matrices, "lr": lr, "weight_decay": weight_decay},
        {"name": f"{name} without decay", "params": vectors, "lr": lr, "weight_decay": 0.0},
    ]


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float | None = None,
    asked: Groups = NOTHING,
    heads: Collection[nn.Parameter] = (),
    head_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Groups of everything in `model` that is trained, for an optimizer that takes AdamW's options.

    `factors` and `gates` are the adapters', `heads` those named, `others` everything else that needs a gradient;
    heads and others without decay where they are vectors. `asked` is what the method asks; `weight_decay=None` takes
    it from there, `head_lr=None` is `lr`. Empty groups are left out.
    """
    decay = asked.weight_decay if weight_decay is None else weight_decay
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    owned = [(adapter, p) for adapter in adapters for p in adapter.parameters() if p.requires_grad]
    gates = [p for adapter, p in owned if is_gate(adapter, p)]
    factors = [p for adapter, p in owned if not is_gate(adapter, p)]
    known, named = {id(p) for _, p in owned}, {id(p) for p in heads}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    gate = {"name": "gates", "params": gates, "lr": asked.gate_lr * lr, "weight_decay": decay * asked.gate_decay}
    if asked.gate_eps is not None:
        gate["eps"] = asked.gate_eps
    groups = [
        {"name": "factors", "params": factors, "lr": lr, "weight_decay": decay},
        gate,
        *_decayed("heads", [p for p in rest if id(p) in named], lr if head_lr is None else head_lr, decay),
        *_decayed("others", [p for p in rest if id(p) not in named], lr, decay),
    ]
    return [group for group in groups if group["params"]]
