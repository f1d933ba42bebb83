"""Sharded parameters (FSDP2's DTensor) as whole tensors, and back; plain tensors pass through."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def _sharded(tensor: Tensor) -> Any | None:
    """The module of DTensor where the tensor is one. Importing it takes a second: who shards has done so."""
    module = sys.modules.get("torch.distributed.tensor")
    return module if module is not None and isinstance(tensor, module.DTensor) else None


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every worker; differentiable."""
    if _sharded(tensor) is None:
        return tensor
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """`tensor`, the same on every worker, laid out as `model` is."""
    module = _sharded(model)
    if module is None:
        return tensor
    laid_out: Tensor = module.distribute_tensor(tensor, model.device_mesh, model.placements)  # type: ignore[attr-defined]
    return laid_out
