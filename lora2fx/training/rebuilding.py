"""How an activation was made of what autograd keeps anyway, so that a site needn't keep it: it is made again.

A site's backward needs its input x. Where x came out of LayerNorm, RMSNorm, GELU, SiLU or a product of two, or is a
view of such a tensor or rows of it, the frozen model keeps what went in, for that operation's own backward. It is found
in autograd's graph, whatever the architecture; what is made again is x to the rounding of its dtype, a product or an
activation to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

DEPTH = 4
"""Operations that one activation is at most made again by."""

Rebuild = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Origin:
    """`rebuild(tensors)` is the activation again, differentiable where gradients are recorded."""

    tensors: tuple[Tensor, ...]
    rebuild: Rebuild


def _saved(node: Any, name: str) -> Tensor | None:
    """What a node of autograd keeps; None where it keeps nothing, or where a hook of the user's has it."""
    raw = getattr(node, f"_raw_saved_{name}", None)
    if raw is None or getattr(raw, "unpack_hook", raw) is not None:
        return None
    found: Tensor | None = getattr(node, f"_saved_{name}")
    return found


def _scaled(normal: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if weight is not None and bias is not None:
        normal = torch.addcmul(bias, normal, weight)
    elif weight is not None:
        normal = normal * weight
    return normal.to(dtype)


def _affine(node: Any) -> tuple[list[Tensor], bool, bool]:
    weight, bias = (getattr(node, f"_saved_{name}", None) for name in ("weight", "bias"))
    return [tensor for tensor in (weight, bias) if tensor is not None], weight is not None, bias is not None


def _normalised(
    tensors: Sequence[Tensor], dims: tuple[int, ...], has_weight: bool, has_bias: bool, centred: bool
) -> Tensor:
    rest = iter(tensors)
    x, *statistics = islice(rest, 3 if centred else 2)
    weight, bias = next(rest) if has_weight else None, next(rest) if has_bias else None
    rstd, wide = statistics[-1], x.to(statistics[-1].dtype)
    if torch.is_grad_enabled():  # the statistics, as kept, don't say how they depend on x
        mean = wide.mean(dims, keepdim=True) if centred else torch.zeros_like(rstd)
        spread = (wide - mean).square().mean(dims, keepdim=True)
        normal = (wide - mean) * (spread + (rstd.pow(-2) - spread).detach()).rsqrt()
    else:
        normal = (wide - statistics[0]).mul_(rstd) if centred else wide * rstd
    return _scaled(normal, weight, bias, x.dtype)


def _norm(node: Any, centred: bool) -> Origin | None:
    kept = [_saved(node, name) for name in (("input", "result1", "result2") if centred else ("input", "result1"))]
    if any(tensor is None for tensor in kept):
        return None
    affine, has_weight, has_bias = _affine(node)
    dims = tuple(range(-len(node._saved_normalized_shape), 0))
    rebuild = partial(_normalised, dims=dims, has_weight=has_weight, has_bias=has_bias, centred=centred)
    return Origin((*(tensor for tensor in kept if tensor is not None), *affine), rebuild)


def _gelu(node: Any) -> Origin | None:
    x, approximate = _saved(node, "self"), node._saved_approximate
    return None if x is None else Origin((x,), lambda kept: F.gelu(kept[0], approximate=approximate))


def _silu(node: Any) -> Origin | None:
    x = _saved(node, "self")
    return None if x is None else Origin((x,), lambda kept: F.silu(kept[0]))


def _product(node: Any, depth: int) -> Origin | None:
    """A factor that was not kept, since the other one is frozen, is itself made again."""
    sides = []
    for name, (before, _) in zip(("self", "other"), node.next_functions, strict=True):
        own = _saved(node, name)
        sides.append(Origin((own,), lambda kept: kept[0]) if own is not None else _origin(before, depth - 1))
    left, right = sides
    if left is None or right is None:
        return None
    split = len(left.tensors)
    return Origin(left.tensors + right.tensors, lambda kept: left.rebuild(kept[:split]) * right.rebuild(kept[split:]))


def _cast(node: Any, depth: int) -> Origin | None:
    inner, dtype = _origin(node.next_functions[0][0], depth - 1), node._input_metadata[0].dtype
    return None if inner is None else Origin(inner.tensors, lambda kept: inner.rebuild(kept).to(dtype))


def _view(node: Any, depth: int) -> Origin | None:
    inner, shape = _origin(node.next_functions[0][0], depth), node._input_metadata[0].shape
    return None if inner is None else Origin(inner.tensors, lambda kept: inner.rebuild(kept).reshape(shape))


def _rows(node: Any, depth: int) -> Origin | None:
    """Rows taken by one index, not fewer than there are: else all would be made again for a few."""
    (raw, *more), source = node._raw_saved_indices, node._saved_self_sym_sizes
    if more or raw.unpack_hook is not None or prod(node._input_metadata[0].shape) < prod(source):
        return None
    index, inner = node._saved_indices[0], _origin(node.next_functions[0][0], depth)
    return None if inner is None else Origin((*inner.tensors, index), lambda kept: inner.rebuild(kept[:-1])[kept[-1]])


def _origin(node: Any, depth: int) -> Origin | None:
    if node is None or depth == 0:
        return None
    match node.name():
        case "NativeLayerNormBackward0":
            return _norm(node, centred=True)
        case "FusedRmsNormBackward0":
            return _norm(node, centred=False)
        case "GeluBackward0":
            return _gelu(node)
        case "SiluBackward0":
            return _silu(node)
        case "MulBackward0":
            return _product(node, depth)
        case "ToCopyBackward0":
            return _cast(node, depth)
        case "ViewBackward0" | "UnsafeViewBackward0" | "ReshapeAliasBackward0":
            return _view(node, depth)
        case "IndexBackward0":
            return _rows(node, depth)
    return None


def origin_of(x: Tensor) -> Origin | None:
    """How to make x again; None where it isn't to be had from what is kept anyway, or saved tensors are hooked."""
    if x.grad_fn is None or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    return _origin(x.grad_fn, DEPTH)
