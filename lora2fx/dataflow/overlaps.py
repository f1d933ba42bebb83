"""Whether two views of one storage share an element."""

from __future__ import annotations

import torch

from lora2fx.dataflow.recording import Value

_EXACT = 1 << 20
"""Storages up to this many elements are compared element by element to see whether two views overlap."""


def _span(value: Value) -> tuple[int, int]:
    reach = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride, strict=True))
    return value.offset, value.offset + reach + 1


def overlap(left: Value, right: Value) -> bool:
    """Whether two views of one storage share an element."""
    if not left.numel or not right.numel:
        return False
    (start, stop), (other_start, other_stop) = _span(left), _span(right)
    if stop <= other_start or other_stop <= start:
        return False
    if max(stop, other_stop) > _EXACT:
        return True
    written = torch.zeros(max(stop, other_stop), dtype=torch.bool)
    written.as_strided(left.shape, left.stride, left.offset).fill_(True)
    return bool(written.as_strided(right.shape, right.stride, right.offset).any())
