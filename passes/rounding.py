"""float64 → a narrower dtype in one rounding: torch goes to the 16-bit and 8-bit floats by way of float32, in two."""

from __future__ import annotations

import torch
from torch import Tensor


def _to_odd(exact: Tensor) -> Tensor:
    """float32, cut off toward zero and with the last bit set where anything was cut.

    Rounding that to any dtype of at most 22 bits of precision gives what rounding `exact` would (round to odd).
    """
    near = exact.to(torch.float32)
    cut = torch.where(near.abs() > exact.abs(), torch.nextafter(near, torch.zeros_like(near)), near)
    return (cut.view(torch.int32) | (cut != exact)).view(torch.float32)


def round_once(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """A float64 tensor rounded to the nearest value of `dtype`, ties to even."""
    if dtype.itemsize >= 4:
        return exact.to(dtype)
    return _to_odd(exact).to(dtype)
