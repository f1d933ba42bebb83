"""A digest of the masks, compared between processes: gradients that were never averaged show here first."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist

from lora2fx.adapter import Adapter
from lora2fx.errors import AdapterError


def mask_digest(adapters: Sequence[Adapter]) -> int:
    """63 bits of SHA-256 over every adapter's progress, masks and last allocation."""
    found = hashlib.sha256()
    for adapter in adapters:
        found.update(f"{adapter.site.weight} {adapter.progress.tolist()}".encode())
        for axis in adapter.axes().values():
            found.update(bytes(axis.mask.tolist()) + b"/" + bytes(axis.keep.tolist()))
    return int.from_bytes(found.digest()[:8], "big") >> 1


def check_ranks(adapters: Sequence[Adapter], group: dist.ProcessGroup | None = None) -> None:
    """Raise `AdapterError` on every process of the group where their masks differ; all of them must call it.

    Costs one exchange of eight bytes. Nothing happens outside `torch.distributed`.
    """
    if not adapters or not dist.is_available() or not dist.is_initialized():
        return
    own = torch.tensor([mask_digest(adapters)], device=adapters[0].progress.device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    digests = [int(value) for value in found]
    odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if odd:
        raise AdapterError(
            f"the masks of rank {', '.join(map(str, odd))} differ from those of rank 0: the processes were trained on"
            " gradients that nothing averaged. Put the model into DistributedDataParallel or fully_shard, and start"
            " every process from the same weights."
        )
