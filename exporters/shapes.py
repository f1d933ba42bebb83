"""Which dimensions of a model's inputs may vary, found by trying, and the shapes that an export is checked at."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora2fx.errors import ExportError
from lora2fx.inputs import Inputs

Tensors = dict[str, Tensor]
Axes = dict[str, dict[int, str]]
Runs = Callable[[Tensors], bool]


@dataclass(frozen=True)
class Shapes:
    """The dynamic dimensions by input, the size of each symbol in the trace, and a larger one that the model takes."""

    axes: Axes
    traced: Mapping[str, int]
    larger: Mapping[str, int]

    def without(self, symbols: Collection[str]) -> Shapes:
        """The same with these symbols' dimensions fixed."""
        axes = {name: {d: s for d, s in dims.items() if s not in symbols} for name, dims in self.axes.items()}
        traced = {symbol: size for symbol, size in self.traced.items() if symbol not in symbols}
        return Shapes({name: dims for name, dims in axes.items() if dims}, traced, self.larger)


@dataclass(frozen=True)
class Case:
    """One set of inputs to check an export with."""

    name: str
    tensors: Tensors


def named_inputs(model: nn.Module, inputs: Inputs) -> tuple[Tensors, dict[str, Any]]:
    """The call's arguments by name, in the order of the forward's signature: tensors, and all others.

    Raises `ExportError` for an argument that can't become a graph's input or a constant.
    """
    signature = inspect.signature(model.forward)
    tensors: Tensors = {}
    constants: dict[str, Any] = {}
    for name, value in signature.bind(*inputs.args, **inputs.kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named = value
        elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise ExportError(
                f"{type(model).__name__}.forward takes {name!r} by position only: an exported graph's inputs need"
                " names. Export a small module whose forward names them and calls this one."
            )
        else:
            named = {name: value}
        for key, item in named.items():
            if isinstance(item, Tensor):
                tensors[key] = item.detach().cpu()
            else:
                _check_constant(key, item)
                constants[key] = item
    return tensors, constants


def _check_constant(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise ExportError(
            f"example_inputs[{name!r}] is a {type(value).__name__}: an exported graph takes tensors, and None, bool,"
            " int, float or str as constants. Pass tensors, or export a module whose forward takes them apart."
        )


def find_axes(tensors: Tensors, runs: Runs) -> Shapes:
    """Name the dimensions that may vary: dimension 0 "batch", dimension 1 of ids, masks and embeddings "sequence".

    Dimensions of one name and size are one symbol and vary together; arguments whose name starts with "decoder_"
    have a sequence of their own. A symbol counts when the model runs at other sizes of it; the rest is fixed.
    Float inputs of two or of four and more dimensions (features, images) vary in their batch only.
    """
    axes: Axes = {}
    found: dict[str, tuple[int, int]] = {}
    for symbol, strict, optional in _groups(tensors):
        for members in (strict + optional, strict) if optional else (strict,):
            trial = _joined(axes, symbol, members)
            sizes = _sizes(tensors, trial, symbol, found, runs)
            if sizes is not None:
                axes, found[symbol] = trial, sizes
                break
    return _shapes(axes, found)


def given_axes(tensors: Tensors, axes: Mapping[str, Mapping[int, str]], runs: Runs) -> Shapes:
    """The caller's own dynamic dimensions; raises `ExportError` for one that isn't there or that can't vary."""
    found: dict[str, tuple[int, int]] = {}
    known: Axes = {}
    for symbol in dict.fromkeys(symbol for dims in axes.values() for symbol in dims.values()):
        members = [(name, dim) for name, dims in axes.items() for dim, other in dims.items() if other == symbol]
        for name, dim in members:
            if name not in tensors or not 0 <= dim < tensors[name].ndim:
                raise ExportError(
                    f"dynamic_axes names dimension {dim} of {name!r}. The tensor inputs are "
                    + ", ".join(f"{key} {tuple(value.shape)}" for key, value in tensors.items())
                    + "."
                )
        known = _joined(known, symbol, members)
        sizes = _sizes(tensors, known, symbol, found, runs)
        if sizes is None:
            raise ExportError(
                f"dynamic_axes asks for {symbol!r} to vary, and the model runs at no other size of it than the example"
                " inputs'. Leave it out."
            )
        found[symbol] = sizes
    return _shapes(known, found)


def resize(tensors: Tensors, axes: Axes, sizes: Mapping[str, int]) -> Tensors:
    """The inputs at other sizes: cut, or repeated; rows that a batch gains are shifted, so that none equals another."""
    return {
        name: _resized(tensor, {dim: sizes[symbol] for dim, symbol in axes.get(name, {}).items()})
        for name, tensor in tensors.items()
    }


def as_dtype(tensors: Tensors, dtype: torch.dtype | None) -> Tensors:
    """The floating-point inputs in another dtype; None leaves them."""
    if dtype is None:
        return tensors
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def cases(tensors: Tensors, shapes: Shapes) -> list[Case]:
    """The inputs to check with: as traced, each symbol at 1 and larger than traced, and padded if there's a mask."""
    found = [Case("traced", resize(tensors, shapes.axes, shapes.traced))]
    for symbol in shapes.traced:
        for name, size in ((f"{symbol} 1", 1), (f"larger {symbol}", shapes.larger[symbol])):
            found.append(Case(name, resize(tensors, shapes.axes, {**shapes.traced, symbol: size})))
    padded = _padded(found[0].tensors)
    return found if padded is None else [*found, Case("padded", padded)]


def _shapes(axes: Axes, found: Mapping[str, tuple[int, int]]) -> Shapes:
    traced = {symbol: sizes[0] for symbol, sizes in found.items()}
    return Shapes(axes, traced, {symbol: sizes[1] for symbol, sizes in found.items()})


Member = tuple[str, int]


def _groups(tensors: Tensors) -> list[tuple[str, list[Member], list[Member]]]:
    """Candidates: (symbol, dimensions that must vary together, dimensions of the same size that may belong to them)."""
    batch = next((tensor.shape[0] for tensor in tensors.values() if tensor.ndim), 0)
    groups: dict[tuple[str, int], list[Member]] = {}
    late: list[Member] = []
    for name, tensor in tensors.items():
        for dim in range(min(tensor.ndim, 2)):
            if tensor.shape[0] != batch:
                late.append((name, dim))
            elif dim == 0:
                groups.setdefault(("batch", batch), []).append((name, dim))
            elif _is_sequence(tensor):
                prefix = "decoder_" if name.startswith("decoder_") else ""
                groups.setdefault((f"{prefix}sequence", tensor.shape[1]), []).append((name, dim))
    taken = {member for members in groups.values() for member in members}
    symbols: dict[str, tuple[str, int]] = {}
    for key, members in groups.items():
        symbols[key[0] if key[0] not in symbols else f"{members[0][0]}_{key[0]}"] = key
    return [(symbol, groups[key], _same_size(tensors, key[1], taken, late)) for symbol, key in symbols.items()]


def _is_sequence(tensor: Tensor) -> bool:
    return tensor.ndim == 3 if tensor.is_floating_point() else tensor.ndim == 2


def _same_size(tensors: Tensors, size: int, taken: set[Member], late: Sequence[Member]) -> list[Member]:
    """Dimensions outside every group that have a group's size: float masks, square masks, transposed masks."""
    return [
        (name, dim)
        for name, tensor in tensors.items()
        for dim in range(tensor.ndim)
        if tensor.shape[dim] == size and (name, dim) not in taken and (dim or (name, dim) in late)
    ]


def _joined(axes: Axes, symbol: str, members: Sequence[Member]) -> Axes:
    joined = {name: dict(dims) for name, dims in axes.items()}
    for name, dim in members:
        joined.setdefault(name, {})[dim] = symbol
    return joined


def _sizes(
    tensors: Tensors, axes: Axes, symbol: str, found: Mapping[str, tuple[int, int]], runs: Runs
) -> tuple[int, int] | None:
    """Two sizes at which the model runs, at least 2 and unlike the other symbols': the traced one and a larger one."""
    sizes = {tensors[name].shape[dim] for name, dims in axes.items() for dim, own in dims.items() if own == symbol}
    if len(sizes) != 1:
        return None
    size = sizes.pop()
    others = {symbol: traced for symbol, (traced, _) in found.items()}
    used = set(others.values())
    for traced, larger in ((size, size + 3), (size + 1, size + 4), (size + 2, size + 5), (size // 2, size)):
        fits = traced >= 2 and traced not in used and larger > traced
        if fits and all(runs(resize(tensors, axes, {**others, symbol: n})) for n in (traced, larger)):
            return traced, larger
    return None


def _resized(tensor: Tensor, sizes: Mapping[int, int]) -> Tensor:
    shifts = bool(sizes) and tensor.ndim > 1 and torch.unique(tensor).numel() > 2
    for dim, size in sizes.items():
        had = tensor.shape[dim]
        tensor = tensor.index_select(dim, torch.arange(size) % had)
        if dim == 0 and shifts:
            rows = [tensor[i].roll(i // had, -1) for i in range(size)]
            tensor = torch.stack(rows)
    return tensor.contiguous()


def _padded(tensors: Tensors) -> Tensors | None:
    """All rows but the first padded at their end, in every mask: zeros, or True in a key padding mask."""
    masks = {name: tensor for name, tensor in tensors.items() if _is_mask(name, tensor)}
    if not masks:
        return None
    padded = dict(tensors)
    for name, mask in masks.items():
        padded[name] = mask.clone()
        padded[name][1:, (mask.shape[1] + 1) // 2 :] = name.endswith("key_padding_mask")
    return padded


def _is_mask(name: str, tensor: Tensor) -> bool:
    shaped = tensor.ndim == 2 and tensor.shape[0] > 1 and tensor.shape[1] > 1
    if name.endswith("key_padding_mask"):
        return shaped and tensor.dtype == torch.bool
    return shaped and name.endswith("attention_mask")
