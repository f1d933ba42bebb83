"""The product in a gated feed-forward, and which of its two factors is the gate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lora2fx.dataflow.columns import Columns, columns_reaching
from lora2fx.dataflow.graph import Dataflow
from lora2fx.dataflow.ops import is_narrowing, is_nonlinear, is_product
from lora2fx.dataflow.recording import Op
from lora2fx.dataflow.weights import Use


@dataclass(frozen=True)
class Branch:
    """One factor: the uses that it is made of, with their columns (None: all), and whether it has an activation."""

    columns: dict[int, Columns | None]
    active: bool


def count_weights(uses: Sequence[Use]) -> int:
    """How many weights they are uses of; a stack of experts is used once for each expert."""
    return len({use.name for use in uses})


def carrying(flow: Dataflow, op: Op) -> list[int]:
    """The op's inputs that anything computed goes into."""
    return [value for value in op.inputs if flow.sources(value)]


def find_gating(flow: Dataflow, ups: Sequence[Use], ways: Sequence[Op]) -> tuple[Branch, Branch] | None:
    """The factors of the last product on the ways that different weights, or other columns of one, go into."""
    for op in reversed([op for op in ways if is_product(op)]):
        factors = carrying(flow, op)
        if len(factors) != 2:
            continue
        left, right = (_branch(flow, value, ups) for value in factors)
        shared = left.columns.keys() & right.columns.keys()
        if left.columns and right.columns and not any(_meet(left.columns[at], right.columns[at]) for at in shared):
            return left, right
    return None


def _branch(flow: Dataflow, value: int, ups: Sequence[Use]) -> Branch:
    made_of = [up for up in ups if up.index in flow.sources(value)]
    between = [op for up in made_of for op in flow.between(up.output, value)]
    cut = count_weights(ups) == 1 and any(is_narrowing(op) for op in between)
    columns = {up.index: columns_reaching(flow, up, [value]) if cut else None for up in made_of}
    return Branch(columns, any(is_nonlinear(op) for op in between))


def _meet(left: Columns | None, right: Columns | None) -> bool:
    return not left or not right or bool(left & right)


def gated_roles(branches: tuple[Branch, Branch]) -> Iterator[tuple[int, str, str, Columns | None]]:
    """(use, role, what to say of it, columns) of each weight that goes into the product."""
    undecided = branches[0].active == branches[1].active
    for branch in branches:
        gate = branch.active and not undecided
        said = "up, gated by another of its kind" if undecided else "gate" if gate else "up"
        for index, columns in branch.columns.items():
            yield index, "ffn.gate" if gate else "ffn.up", said, columns
