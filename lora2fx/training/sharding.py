"""Sharded parameters (FSDP2's DTensor) as whole tensors, and back; plain tensors pass through."""

from __future__ import annotations

import torch
from torch import Tensor

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every worker; differentiable."""
    if torch.distributed.is_available() and isinstance(tensor, DTensor):
        full: Tensor = tensor.full_tensor()
        return full
    return tensor


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """`tensor`, the same on every worker, laid out as `model` is."""
    if torch.distributed.is_available() and isinstance(model, DTensor):
        return distribute_tensor(tensor, model.device_mesh, model.placements)
    return tensor
