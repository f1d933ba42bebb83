"""A claim: what one use of a weight, or some of its columns, does."""

from __future__ import annotations

from dataclasses import dataclass

from lora2fx.dataflow.columns import Columns, columns_reaching
from lora2fx.dataflow.graph import Dataflow, Ops
from lora2fx.dataflow.ops import is_narrowing
from lora2fx.dataflow.weights import Use


@dataclass(frozen=True)
class Claim:
    """`columns` of the use's output (None: all) have this role."""

    use: Use
    role: str
    evidence: str
    columns: Columns | None = None


def claimed_columns(flow: Dataflow, use: Use, value: int, elsewhere: Ops) -> Columns | None:
    """The columns of `use` that reach `value`, None for all of them.

    They are looked for only where the output is cut up on its way and also feeds ops `elsewhere`; empty where
    the way can't be replayed.
    """
    if not elsewhere or not any(is_narrowing(op) for op in flow.between(use.output, value)):
        return None
    found = columns_reaching(flow, use, [value])
    return frozenset() if found is None else found
