"""Which of a weight's own dimensions a contraction batches, contracts with the activation, and leaves free."""

from __future__ import annotations

from lora2fx.dataflow.contractions import Contraction, Operand, is_embedding
from lora2fx.dataflow.dims import Steps, along, back, root
from lora2fx.dataflow.recording import Recording
from lora2fx.site import Layout

Classes = dict[str, list[int]]


def steps_to_parameter(recording: Recording, chain: list[int]) -> Steps | None:
    """For each dimension of the operand, the parameter's dimensions that it steps along."""
    steps: Steps = tuple((dim,) for dim in range(len(recording.values[chain[0]].shape)))
    at = 0
    while at < len(chain) - 1:
        base = root(recording, chain[at])
        if base in chain[at + 1 :]:
            onwards: Steps | None = along(recording.values[chain[at]], recording.values[base])
            to = chain.index(base)
        else:
            op = recording.producer(chain[at])
            to = at + 1
            onwards = None if op is None else back(recording, op, chain[at], chain[to])
        if onwards is None:
            return None
        steps = tuple(tuple(inner for dim in group for inner in onwards[dim]) for group in steps)
        at = to
    return steps


def layout_of(steps: Steps, shape: tuple[int, ...], found: Contraction, side: Operand) -> Layout | str:
    """The layout of a weight of this shape whose operand steps along it in this way, or why it has none."""
    dims = _classes(steps, found, side)
    placed = [dim for group in dims.values() for dim in group]
    for dim in set(placed):
        kinds = [kind for kind, group in dims.items() if dim in group]
        if len(kinds) > 1:
            return f"{found.op.name} uses its dimension {dim} as {' and '.join(kinds)}"
    dims["batch"].extend(dim for dim in range(len(shape)) if shape[dim] > 1 and dim not in placed)
    for dim in range(len(shape)):
        if dim not in placed and shape[dim] == 1:
            _place_single(dims, dim)
    if not dims["contracted"] or not dims["free"]:
        return f"{found.op.name} leaves it no matrix: {dims}"
    return Layout(tuple(dims["contracted"]), tuple(dims["free"]), tuple(sorted(dims["batch"])))


def _classes(steps: Steps, found: Contraction, side: Operand) -> Classes:
    """The weight's dimensions that one contraction batches, contracts and frees, in the operand's order."""
    other, dims = found.other(side).letters, Classes(batch=[], contracted=[], free=[])
    for letter, group in zip(side.letters, steps, strict=True):
        in_out, in_other = letter in found.out, letter in other
        kind = "free" if in_out and not in_other else "batch" if in_out or not in_other else "contracted"
        dims[kind].extend(dim for dim in group if dim not in dims[kind])
    if is_embedding(found.op):  # a lookup is a contraction with one-hot rows
        return Classes(batch=[], contracted=dims["batch"], free=dims["free"])
    return dims


def _place_single(dims: Classes, dim: int) -> None:
    """Put a dimension of size 1 where one is missing, else beside its neighbour."""
    missing = [kind for kind in ("free", "contracted") if not dims[kind]]
    near = [kind for step in (1, -1) for kind, group in dims.items() if dim + step in group]
    dims[(*missing, *near, "free")[0]].append(dim)
