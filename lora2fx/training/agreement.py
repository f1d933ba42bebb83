"""A digest of the masks, compared between processes: gradients that were never averaged show here first."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist

from lora2fx.adapter import Adapter
from lora2fx.errors import AdapterError


def _digest(parts: Iterable[bytes]) -> int:
    """63 bits of SHA-256."""
    return int.from_bytes(hashlib.sha256(b"/".join(parts)).digest()[:8], "big") >> 1


def _sites(adapters: Sequence[Adapter]) -> Iterator[bytes]:
    for adapter in adapters:
        yield f"{adapter.site.weight} {adapter.site.columns}".encode()


def _masks(adapters: Sequence[Adapter]) -> Iterator[bytes]:
    for adapter in adapters:
        yield str(adapter.progress.tolist()).encode()
        for axis in adapter.axes().values():
            yield bytes(axis.mask.tolist())
            yield bytes(axis.keep.tolist())


def check_ranks(adapters: Sequence[Adapter], group: dist.ProcessGroup | None = None) -> None:
    """Raise `AdapterError` on every process of the group where their masks differ; all of them must call it.

    Processes that adapt other weights, as the stages of a pipeline do, are compared among themselves. Costs one
    exchange of 16 bytes. Nothing happens outside `torch.distributed`.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    own = torch.tensor([_digest(_sites(adapters)), _digest(_masks(adapters))], device=adapters[0].progress.device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    first: dict[int, tuple[int, int]] = {}
    odd: dict[int, int] = {}
    for rank, (sites, masks) in enumerate(value.tolist() for value in found):
        if first.setdefault(sites, (rank, masks))[1] != masks:
            odd[rank] = first[sites][0]
    if odd:
        pairs = ", ".join(f"rank {rank} from rank {other}" for rank, other in odd.items())
        raise AdapterError(
            f"the masks of these processes differ: {pairs}. They were trained on gradients that nothing averaged. Put"
            " the model into DistributedDataParallel or fully_shard, and start every process from the same weights."
        )
