"""Sharded parameters (FSDP2's DTensor) as whole tensors, and back; plain tensors pass through."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lora2fx.errors import AdapterError


def _sharded(tensor: Tensor) -> Any | None:
    """The module of DTensor where the tensor is one. Importing it takes a second: who shards has done so."""
    module = sys.modules.get("torch.distributed.tensor")
    return module if module is not None and isinstance(tensor, module.DTensor) else None


def is_spread(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor."""
    return _sharded(tensor) is not None


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every worker; differentiable."""
    if _sharded(tensor) is None:
        return tensor
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full


def _holds_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any is a DTensor; one look at each kind."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(issubclass(kind, module.DTensor) for kind in set(map(type, tensors)))


def all_whole(tensors: list[Tensor]) -> list[Tensor]:
    """Each as `whole`; the list itself where none is sharded."""
    return [whole(tensor) for tensor in tensors] if _holds_sharded(tensors) else tensors


def all_like(tensors: list[Tensor], models: list[Tensor]) -> list[Tensor]:
    """Each as `like` its model; the list itself where no model is sharded."""
    if not _holds_sharded(models):
        return tensors
    return [like(tensor, model) for tensor, model in zip(tensors, models, strict=True)]


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """`tensor`, the same on every worker, laid out as `model` is."""
    module = _sharded(model)
    if module is None:
        return tensor
    laid_out: Tensor = module.distribute_tensor(tensor, model.device_mesh, model.placements)  # type: ignore[attr-defined]
    return laid_out


def is_sharded(model: nn.Module) -> bool:
    """Whether any of the model's parameters is a DTensor; then every worker must take part in reading it."""
    return any(_sharded(parameter) is not None for parameter in model.parameters())


def is_replicated(model: nn.Module) -> bool:
    """Whether torch copies the model over devices or processes, with the parameters that it had at that moment."""
    return any(isinstance(m, nn.DataParallel | nn.parallel.DistributedDataParallel) for m in model.modules())


@contextmanager
def one_writer(model: nn.Module) -> Iterator[bool]:
    """Whether this process writes: the first of those that share a sharded model, any that has it whole.

    The others leave the block when the first one has, with its files there or its error raised.
    """
    if not is_sharded(model):
        yield True
        return
    import torch.distributed as dist

    try:
        yield dist.get_rank() == 0
    finally:
        dist.barrier()


def refuse_sharded(model: nn.Module, asked: str) -> None:
    """Raise `AdapterError`, with the way out, where a parameter is sharded or its module is FSDP's (version 2)."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    found = next((name for name, parameter in model.named_parameters() if _sharded(parameter) is not None), None)
    if found is None and fsdp is not None:
        found = next((name or "the model" for name, module in model.named_modules() if isinstance(module, fsdp)), None)
    if found is not None:
        raise AdapterError(
            f"{asked}: {found} is sharded over several processes. On every process call lora2fx.save(model, folder),"
            " which gathers the adapters; then, in one process, lora2fx.load(base, folder) into a fresh base model,"
            f" and {asked} that. The model is as it was."
        )
