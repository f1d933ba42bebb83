"""Which columns of a weight's output reach a value: replay the ops between in float64, and see where gradient flows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora2fx.dataflow.contractions import is_convolution
from lora2fx.dataflow.graph import Dataflow
from lora2fx.dataflow.ops import is_view
from lora2fx.dataflow.recording import ALIAS, Op, Recording, Ref
from lora2fx.dataflow.weights import Use

Columns = frozenset[int]


def ranges(columns: Columns) -> tuple[tuple[int, int], ...]:
    """Column numbers as half-open ranges, in order."""
    starts = sorted(column for column in columns if column - 1 not in columns)
    stops = sorted(column + 1 for column in columns if column + 1 not in columns)
    return tuple(zip(starts, stops, strict=True))


def column_dim(recording: Recording, use: Use) -> int:
    """The dimension of the contraction's output along which the weight's columns lie."""
    found = use.contraction
    if is_convolution(found.op):
        return 1 - len(recording.values[use.operand.value].shape)
    letter = next(letter for letter in found.out if letter in use.operand.letters and not _shared(letter, use))
    return found.out.index(letter) - len(found.out)


def _shared(letter: str, use: Use) -> bool:
    return letter in use.contraction.other(use.operand).letters


class _Replay:
    """Runs recorded ops again on other contents, on the CPU in float64."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.made = dict[int, Tensor]()
        self._random = torch.Generator().manual_seed(0)

    def tensor(self, value: int) -> Tensor:
        """What stands for a value: replayed, a view of what is, known indices, else random numbers."""
        if value not in self.made:
            op = self.recording.producer(value)
            if op is not None and is_view(self.recording, op):
                self.run(op)
            else:
                self.made[value] = self._fresh(value)
        return self.made[value]

    def _fresh(self, value: int) -> Tensor:
        known, like = self.recording.constants.get(value), self.recording.values[value]
        if known is not None:
            return known.cpu().clone()
        if like.dtype.is_complex:
            return torch.complex(self.random(like.shape), self.random(like.shape))
        return self.random(like.shape) if like.dtype.is_floating_point else torch.zeros(like.shape, dtype=like.dtype)

    def random(self, shape: Sequence[int]) -> Tensor:
        """Float64 numbers between 0.5 and 1.5, on which no gradient vanishes by chance."""
        return torch.rand(tuple(shape), dtype=torch.float64, generator=self._random) + 0.5

    def _argument(self, nested: Any) -> Any:
        if isinstance(nested, Ref):
            return self.tensor(nested.value)
        if isinstance(nested, tuple):
            return [self._argument(item) for item in nested]
        if isinstance(nested, torch.dtype) and nested.is_floating_point:
            return torch.float64
        return torch.device("cpu") if isinstance(nested, torch.device) else nested

    def run(self, op: Op) -> None:
        """Run one op and keep what it makes; what another view of a tensor wrote is there already."""
        if op.name == ALIAS or op.func is None:
            self.made.update(dict.fromkeys(op.outputs, self.tensor(op.inputs[0])))
            return
        arguments = [self._argument(arg) for arg in op.args]
        if op.name in ("aten.split", "aten.split_with_sizes", "aten.unbind"):
            self.made.update(zip(op.outputs, self._pieces(op, *arguments), strict=True))
            return
        results = op.func(*arguments, **{name: self._argument(arg) for name, arg in op.kwargs.items()})
        several = results if isinstance(results, (list, tuple)) else [results]
        tensors = [result for result in several if isinstance(result, Tensor)]
        self.made.update(zip(op.outputs, tensors, strict=False))

    def _pieces(self, op: Op, whole: Tensor, *how: Any) -> list[Tensor]:
        """What a split or an unbind gives, each a view of its own: autograd lets no piece of a split be written."""
        if op.name == "aten.unbind":
            return [whole.select(how[0] if how else 0, place) for place in range(len(op.outputs))]
        dim, start, pieces = (how[1] if len(how) > 1 else 0), 0, list[Tensor]()
        for output in op.outputs:
            size = self.recording.values[output].shape[dim]
            pieces.append(whole.narrow(dim, start, size))
            start += size
        return pieces


def columns_reaching(flow: Dataflow, use: Use, values: Sequence[int]) -> Columns | None:
    """The columns of the use's output that `values` are made of; None where the ops between can't be replayed."""
    recording, replay = flow.recording, _Replay(flow.recording)
    output = recording.values[use.output]
    with torch.enable_grad():
        start = replay.random(output.shape).requires_grad_()
        replay.made[use.output] = start * 1.0  # in-place ops may write it, which they may not do to a leaf
        try:
            for op in _between(flow, use.output, values):
                replay.run(op)
            reached = [replay.tensor(value) for value in values]
            total = sum((replay.random(tensor.shape) * tensor).sum() for tensor in reached)
            if not isinstance(total, Tensor) or not total.requires_grad:
                return frozenset()
            (gradient,) = torch.autograd.grad(total, start)
        except (RuntimeError, NotImplementedError, TypeError):
            return None
    touched = gradient.movedim(column_dim(recording, use), -1).flatten(0, -2).ne(0).any(0)
    return frozenset(touched.nonzero().flatten().tolist())


def _between(flow: Dataflow, start: int, values: Sequence[int]) -> list[Op]:
    found = {op.index: op for value in values for op in flow.between(start, value)}
    return [found[index] for index in sorted(found)]
