"""What keeps W and ΔW apart in a product with a `LazyWeight`, in a view of one, and in torch's attention.

Each takes what torch's function of that kind takes, and gives None where W + ΔW is due.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora2fx.passes.lazy import LazyWeight, is_plain, keeps
from lora2fx.passes.update import Update

_ASKS = "has_torch_function"
"""How torch's attention asks its tensors whether one of them knows better."""


@keeps(Tensor.__getitem__)
def matrix(self: Any, index: Any) -> Tensor | None:
    """`stack[i]`"""
    read = self.apart() if isinstance(self, LazyWeight) and self.dim() == 3 else None
    number = type(index) is int or (
        type(index) is Tensor
        and index.dim() == 0
        and not index.is_floating_point()
        and index.dtype not in (torch.bool, torch.uint8)
    )
    return self.part(read.matrix(index)) if read is not None and number else None


@keeps(Tensor.mT.__get__)  # type: ignore[attr-defined]
def transposed(input: Any) -> Tensor | None:
    """`w.mT`"""
    read = input.apart()
    return None if read is None else input.part(read.transposed())


@keeps(Tensor.T.__get__, Tensor.t, torch.t)  # type: ignore[attr-defined]
def transposed_matrix(input: Any) -> Tensor | None:
    """`w.T`"""
    return transposed(input) if input.dim() == 2 else None


@keeps(Tensor.transpose, torch.transpose)
def swapped(input: Any, dim0: Any, dim1: Any) -> Tensor | None:
    """`w.transpose(-2, -1)`"""
    last = {input.dim() - 1, input.dim() - 2}
    integers = type(dim0) is int and type(dim1) is int
    return transposed(input) if integers and {dim0 % input.dim(), dim1 % input.dim()} == last else None


@keeps(Tensor.split)
def split(self: Any, split_size: Any, dim: Any = 0) -> tuple[Tensor, ...] | None:
    """Rows of a matrix, as `w.split` cuts them."""
    length = self.shape[0]
    sizes = split_size if isinstance(split_size, list | tuple) else _equal(length, split_size)
    read: Update | None = self.apart() if self.dim() == 2 and dim == 0 and sum(sizes) == length else None
    return None if read is None else tuple(self.part(part) for part in read.rows(sizes))


@keeps(Tensor.chunk)
def chunked(input: Any, chunks: Any, dim: Any = 0) -> tuple[Tensor, ...] | None:
    """Rows of a matrix, as `w.chunk` cuts them."""
    return split(input, -(-input.shape[0] // chunks), dim) if type(chunks) is int and chunks > 0 else None


def _equal(length: int, size: Any) -> list[int]:
    return [min(size, length - start) for start in range(0, length, size)] if type(size) is int and size > 0 else []


@keeps(F.multi_head_attention_forward)
def attention(*args: Any, **kwargs: Any) -> Any:
    """torch's attention, which asks its tensors first whether one of them knows better, without asking."""
    real, tensors = F.multi_head_attention_forward, (*args, *kwargs.values())
    known = all(is_plain(t) or isinstance(t, LazyWeight) for t in tensors if isinstance(t, Tensor))
    if not known or _ASKS not in real.__code__.co_names:
        return None
    unasked = FunctionType(real.__code__, vars(F) | {_ASKS: lambda tensors: False}, real.__name__, real.__defaults__)
    unasked.__kwdefaults__ = real.__kwdefaults__
    return unasked(*args, **kwargs)


@keeps(Tensor.matmul, torch.matmul, Tensor.__matmul__)
def multiplied(input: Any, other: Any = None, *rest: Any, **options: Any) -> Tensor | None:
    """`x @ w`"""
    plain = isinstance(other, LazyWeight) and is_plain(input) and not rest and not options
    read: Update | None = other.apart() if plain else None
    if read is None or input.dim() < 1 or input.shape[-1] != other.shape[-2]:
        return None
    if other.dim() == 3 and (input.dim() != 3 or input.shape[0] != other.shape[0]):
        return None
    return read.product(input)


@keeps(Tensor.mm, torch.mm, Tensor.bmm, torch.bmm)
def multiplied_alike(input: Any, mat2: Any = None, *rest: Any, **options: Any) -> Tensor | None:
    """`torch.mm(x, w)`, `torch.bmm(x, w)`"""
    alike = isinstance(mat2, LazyWeight) and is_plain(input) and input.dim() == mat2.dim()
    return multiplied(input, mat2, *rest, **options) if alike else None


@keeps(Tensor.__rmatmul__)
def multiplied_from_right(self: Any, other: Any) -> Any:
    """`x @ w`, where x leaves it to w."""
    return multiplied(other, self)


@keeps(F.linear)
def linear(input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    """`F.linear(x, w, bias)`"""
    if not isinstance(weight, LazyWeight) or weight.dim() != 2 or not is_plain(input) or isinstance(bias, LazyWeight):
        return None
    read: Update | None = weight.apart() if input.dim() > 0 and input.shape[-1] == weight.shape[-1] else None
    return None if read is None else read.transposed().product(input, bias)


@keeps(torch._grouped_mm)
def grouped(mat_a: Any, mat_b: Any = None, offs: Any = None, **options: Any) -> Tensor | None:
    """`F.grouped_mm(x, w, offs=…)`"""
    pair = isinstance(mat_b, LazyWeight) and mat_b.dim() == 3 and is_plain(mat_a) and mat_a.dim() == 2
    plain = pair and is_plain(offs) and mat_a.dtype == mat_b.dtype and not any(v is not None for v in options.values())
    read: Update | None = mat_b.apart() if plain else None
    return None if read is None else read.grouped_product(mat_a, offs, torch._grouped_mm)
