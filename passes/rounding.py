"""float64 → a narrower dtype in one rounding: torch goes to the 16-bit and 8-bit floats by way of float32, in two."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lora2fx.errors import MethodError

Rounding = Literal["nearest", "adapter", "stochastic"]
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_rounding(rounding: str) -> None:
    """Raise `MethodError` for a name that is no rounding."""
    if rounding not in get_args(Rounding):
        raise MethodError(f"rounding={rounding!r}: choose one of {', '.join(map(repr, get_args(Rounding)))}.")


def _to_odd(exact: Tensor) -> Tensor:
    """float32, cut off toward zero and with the last bit set where anything was cut.

    Rounding that to any dtype of at most 22 bits of precision gives what rounding `exact` would (round to odd).
    """
    near = exact.to(torch.float32)
    cut = torch.where(near.abs() > exact.abs(), torch.nextafter(near, torch.zeros_like(near)), near)
    return (cut.view(torch.int32) | (cut != exact)).view(torch.float32)


def _to_bfloat16(exact: Tensor) -> Tensor:
    """By way of float32 too, whose upper half bfloat16 is: only what became a tie there can go wrong."""
    near = exact.to(torch.float32)
    rounded = near.to(torch.bfloat16)
    ties = (near.view(torch.int32) & 0xFFFF) == 0x8000
    if ties.any():
        rounded[ties] = _to_odd(exact[ties]).to(torch.bfloat16)
    return rounded


def round_once(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """A float64 tensor rounded to the nearest value of `dtype`, ties to even."""
    if dtype.itemsize >= 4:
        return exact.to(dtype)
    return _to_bfloat16(exact) if dtype == torch.bfloat16 else _to_odd(exact).to(dtype)


def neighbour(rounded: Tensor, exact: Tensor) -> Tensor:
    """The value of `rounded`'s dtype next to it on the side of `exact`: with it, the two that lie around `exact`.

    Where `rounded` is `exact`, the next one below; at the end of the range no finite value.
    """
    bits, wide = _BITS[rounded.dtype.itemsize], rounded.to(exact.dtype)
    upward, above = exact > wide, wide >= 0
    steps = torch.where(upward == above, 1, -1).to(bits)
    found = rounded.view(bits) + steps
    least = torch.where(upward, 1, torch.iinfo(bits).min + 1).to(bits)  # the smallest numbers on both sides of ±0
    return torch.where(wide == 0, least, found).view(rounded.dtype)


def round_stochastically(exact: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Each element to one of the two values of `dtype` around it, each as likely as it is near: no bias."""
    near = round_once(exact, dtype)
    other = neighbour(near, exact).double()
    share = ((exact - near.double()) / (other - near.double())).nan_to_num(0.0)
    drawn = torch.rand(exact.shape, dtype=torch.float64, device=exact.device, generator=generator)
    return torch.where(drawn < share, other, near.double()).to(dtype)
