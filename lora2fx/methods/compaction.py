"""Drop masked entries of an adapter's axes physically: smaller factors, ΔW as it was."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora2fx.adapter import Adapter


@torch.no_grad()
def compact_axes(adapter: Adapter) -> None:
    """Slice every parameter along every axis to what the mask lets through, its averages with it.

    Parameters whose axis loses an entry become new objects; the masks that are left are all true.
    """
    for axis in adapter.axes().values():
        kept = axis.mask.nonzero().flatten()
        if kept.numel() == axis.mask.numel():
            continue
        for name, dim in axis.along:
            old = adapter.get_parameter(name)
            adapter.register_parameter(name, nn.Parameter(old.index_select(dim, kept), old.requires_grad))
            for average in (f"{name}_sensitivity", f"{name}_uncertainty"):
                _replace(adapter, average, dim, kept)
        for buffer, value in list(adapter.named_buffers(recurse=False)):
            if value is axis.mask or value is axis.keep:
                adapter.register_buffer(buffer, torch.ones_like(kept, dtype=torch.bool))


def _replace(adapter: Adapter, buffer: str, dim: int, kept: Tensor) -> None:
    held = dict(adapter.named_buffers(recurse=False))
    if buffer in held:
        adapter.register_buffer(buffer, held[buffer].index_select(dim, kept))
