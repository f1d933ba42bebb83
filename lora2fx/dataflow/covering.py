"""Which columns of the whole weight a use of a part of it multiplies by."""

from __future__ import annotations

from math import prod

import torch

from lora2fx.dataflow.recording import Recording, Value
from lora2fx.dataflow.weights import Use
from lora2fx.site import Layout


def _positions(operand: Value, parameter: Value, dims: list[int]) -> torch.Tensor:
    """Where in the parameter's storage the operand's entries along `dims` lie, counted from its first element."""
    places = torch.tensor(operand.offset - parameter.offset)
    for dim in dims:
        places = places.unsqueeze(-1) + torch.arange(operand.shape[dim]) * operand.stride[dim]
    return places.flatten()


def _columns(places: torch.Tensor, parameter: Value, layout: Layout) -> list[int]:
    """The column, in the order of the layout's free dimensions, of each place in the parameter's storage."""
    index = dict[int, torch.Tensor]()
    for dim in sorted(range(len(parameter.shape)), key=lambda dim: -parameter.stride[dim]):
        index[dim] = places // max(parameter.stride[dim], 1)
        places = places % max(parameter.stride[dim], 1)
    columns = torch.zeros_like(places)
    for dim in layout.free:
        columns = columns * parameter.shape[dim] + index[dim]
    return [int(column) for column in columns]


def parameter_columns(recording: Recording, use: Use) -> list[int]:
    """For each column that a use multiplies by, its number among the whole weight's columns."""
    assert use.layout is not None
    operand, parameter = recording.values[use.operand.value], recording.values[use.parameter]
    found = use.contraction
    other = found.other(use.operand).letters
    letters = enumerate(use.operand.letters)
    dims = [dim for dim, letter in letters if letter in found.out and letter not in other]
    width = prod(parameter.shape[dim] for dim in use.layout.free)
    if prod(operand.shape[dim] for dim in dims) == width:
        return list(range(width))
    return _columns(_positions(operand, parameter, dims), parameter, use.layout)
