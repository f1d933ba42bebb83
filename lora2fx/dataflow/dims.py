"""Follow dimensions of a tensor back through views and copies, by their strides: no data is touched."""

from __future__ import annotations

from collections.abc import Sequence

from lora2fx.dataflow.graph import Dataflow
from lora2fx.dataflow.ops import is_view
from lora2fx.dataflow.recording import ALIAS, Op, Recording, Value

Steps = tuple[tuple[int, ...], ...]
"""For each dimension of a tensor, those of another tensor that it steps along, outermost first."""


def along(view: Value, base: Value) -> Steps:
    """For each dimension of a view the dimensions that it steps along of a `base` in the same storage."""
    order = sorted(range(len(base.shape)), key=lambda dim: -base.stride[dim])

    def steps(size: int, stride: int) -> tuple[int, ...]:
        if size < 2 or stride == 0:
            return ()
        return tuple(
            dim
            for dim in order
            if base.shape[dim] > 1 and stride < base.stride[dim] * base.shape[dim] and base.stride[dim] < stride * size
        )

    return tuple(steps(size, stride) for size, stride in zip(view.shape, view.stride, strict=True))


def _aligned(made: Value, source: Value) -> Steps:
    """Dimensions matched from the right, as broadcasting does; a broadcast one steps along nothing."""
    shift = len(made.shape) - len(source.shape)
    return tuple(
        (dim - shift,) if dim >= shift and source.shape[dim - shift] > 1 else () for dim in range(len(made.shape))
    )


def _indexed(op: Op, made: Value, source: Value, recording: Recording) -> Steps | None:
    """`source[:, index]`: the dimensions of one index tensor all step along the indexed dimension."""
    indices = op.args[1]
    given = [position for position, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        return None
    at = given[0]
    rank = len(recording.values[indices[at].value].shape)
    whole = range(len(made.shape))
    return tuple((dim,) if dim < at else (at,) if dim < at + rank else (dim - rank + 1,) for dim in whole)


def _stacked(op: Op, made: Value) -> Steps:
    new = (op.args[1] if len(op.args) > 1 else 0) % len(made.shape)
    return tuple(() if dim == new else (dim - (dim > new),) for dim in range(len(made.shape)))


def back(recording: Recording, op: Op, output: int, source: int) -> Steps | None:
    """For each dimension of an op's output the dimensions of its input that it steps along, None if unknown."""
    made, given = recording.values[output], recording.values[source]
    if (is_view(recording, op) or op.name == ALIAS) and made.storage == given.storage:
        return along(made, given)
    if op.name == "aten.index" and source == op.operand(0):
        return _indexed(op, made, given, recording)
    if op.name == "aten.stack":
        return _stacked(op, made)
    return _aligned(made, given) if len(given.shape) <= len(made.shape) else None


def root(recording: Recording, value: int) -> int:
    """The tensor that a value is a view of, through as many views as there are."""
    op = recording.producer(value)
    while op is not None and is_view(recording, op):
        value = op.inputs[0]
        op = recording.producer(value)
    return value


def _onwards(steps: Steps, dims: frozenset[int]) -> frozenset[int]:
    return frozenset(inner for dim in dims for inner in steps[dim])


def trace(flow: Dataflow, value: int, dims: Sequence[int], goal: int) -> frozenset[int]:
    """The dimensions of `goal` that `dims` of `value`, made of it through transparent ops, step along."""
    recording, found = flow.recording, frozenset[int]()
    ahead, seen = [(value, frozenset(dims))], set[tuple[int, frozenset[int]]]()
    while ahead:
        at, moving = ahead.pop()
        if at == goal:
            found |= moving
        if at == goal or not moving or (at, moving) in seen:
            continue
        seen.add((at, moving))
        op = recording.producer(at)
        base = root(recording, at)
        if base != at:
            ahead.append((base, _onwards(along(recording.values[at], recording.values[base]), moving)))
        elif op is not None and flow.transparent(op):
            for source in op.inputs:
                steps = back(recording, op, at, source)
                if steps is not None:
                    ahead.append((source, _onwards(steps, moving)))
    return found
