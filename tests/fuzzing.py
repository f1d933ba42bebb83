"""Random damage to bytes and to JSON. `LORA2FX_FUZZ` is how many seeds each kind of damage gets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from random import Random
from typing import Any

import torch
from torch import Tensor

SEEDS = int(os.environ.get("LORA2FX_FUZZ", "200"))
VALUES = [None, True, 0, -1, 2, 10**9, 10**20, 1.5, "", "x", "linear.weight", "../x", "0" * 64, [], [[]], {}, [0, 0]]
BYTES = [b"9" * 30, b"-1", b"null", b"true", b"[]", b"{}", b"1e999", b"\\u0000"]


def damaged(data: bytes, rng: Random) -> bytes:
    """A few bits flipped, bytes cut out, copied or replaced."""
    damage = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, other = rng.randrange(len(damage)), rng.randrange(len(damage))
        match rng.randrange(4):
            case 0:
                damage[at] ^= 1 << rng.randrange(8)
            case 1:
                del damage[at : at + rng.randint(1, min(20, len(damage) - 1))]
            case 2:
                damage[at:at] = damage[other : other + rng.randint(1, 30)]
            case _:
                damage[at : at + 1] = rng.choice(BYTES)
    return bytes(damage)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place within JSON, but the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def placed(value: Any, path: tuple[Any, ...], rng: Random) -> None:
    """One place set to another value."""
    *start, last = path
    for key in start:
        value = value[key]
    value[last] = rng.choice(VALUES)


def swapped(tensors: dict[str, Tensor], rng: Random) -> None:
    """One to three tensors taken away, renamed, or changed in shape, dtype or value."""
    for _ in range(rng.randint(1, 3)):
        if not tensors:
            return
        name = rng.choice(sorted(tensors))
        value = tensors.pop(name)
        match rng.randrange(6):
            case 0:
                tensors[rng.choice(sorted(tensors) or [name])] = value
            case 1:
                tensors[name] = value.to(rng.choice([torch.float64, torch.float16, torch.int8, torch.bool]))
            case 2:
                tensors[name] = value.flatten()[: rng.randint(0, value.numel())].clone()
            case 3:
                tensors[name] = value[None].repeat(2, *[1] * value.dim())
            case 4:
                odd = rng.choice([float("nan"), float("inf"), 1e30, 0.0])
                tensors[name] = torch.full_like(value, odd) if value.is_floating_point() else value
            case _:
                tensors[name + rng.choice([".x", "", "."])] = value.mT.contiguous() if value.dim() > 1 else value
