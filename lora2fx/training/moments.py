"""What an optimizer remembers of entries that start anew: its moments of them, set to zero."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from lora2fx.sharding import like


def _moments(optimizer: Optimizer | None, parameter: Tensor) -> list[Tensor]:
    """Every state tensor of the parameter's shape: AdamW's two averages, SGD's momentum."""
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    return [value for value in state.values() if isinstance(value, Tensor) and value.shape == parameter.shape]


@torch.no_grad()
def clear_moments(optimizer: Optimizer | None, parameter: Tensor, dim: int, kept: Tensor) -> None:
    """Zero the optimizer's moments of the parameter's entries along `dim` (negative) that `kept` (bool) doesn't."""
    shape = [1] * parameter.dim()
    shape[dim] = kept.numel()
    for moment in _moments(optimizer, parameter):
        factor = kept.to(moment.dtype).view(shape)
        moment.mul_(like(factor.expand(moment.shape), moment))
