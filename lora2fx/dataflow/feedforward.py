"""Feed-forwards by dataflow: weights with an activation between them, back to the width, added to the stream."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from lora2fx.dataflow.claims import Claim
from lora2fx.dataflow.columns import Columns, columns_reaching
from lora2fx.dataflow.contractions import is_convolution, is_depthwise, is_embedding
from lora2fx.dataflow.graph import Dataflow, Ops
from lora2fx.dataflow.ops import is_adding, is_narrowing, is_nonlinear, is_product, is_view
from lora2fx.dataflow.recording import Op
from lora2fx.dataflow.weights import Use, Weights
from lora2fx.site import Site

_COPIES = ("aten._to_copy", "aten.clone")

Branch = dict[int, Columns | None]
"""Uses by index, with the columns (None: all) that go into one factor of a product."""


def _count(uses: list[Use]) -> int:
    """How many weights they are uses of; a stack of experts is used once for each expert."""
    return len({use.name for use in uses})


def _widths(use: Use, shape: tuple[int, ...]) -> tuple[int, int]:
    """(in, out) of the matrix that a use multiplies by."""
    assert use.layout is not None
    site = Site(use.name, "", "", shape, use.layout)
    return site.in_features, site.weight_out_features


class FeedForwardRoles:
    """The roles that the feed-forwards of a recording give to weights."""

    def __init__(self, flow: Dataflow, weights: Weights) -> None:
        self.flow, self.weights, self.recording = flow, weights, flow.recording

    def claims(self) -> Iterator[Claim]:
        """What each use of a weight is to a feed-forward."""
        numbers = count()
        for down in self.weights.uses.values():
            ups = self._ups(down)
            if ups and self._returns(down, ups):
                yield from self._roles(down, ups, f"ffn #{next(numbers)}")

    def _is_linear(self, use: Use | None) -> bool:
        return use is not None and use.layout is not None and not self._is_lookup(use)

    def _is_lookup(self, use: Use) -> bool:
        return is_convolution(use.contraction.op) or is_embedding(use.contraction.op)

    def _made_of(self, value: int) -> Ops:
        """The sources of a value, looking through depthwise convolutions."""
        found, ahead, seen = set[int](), set(self.flow.sources(value)), set[int]()
        while ahead:
            op = self.recording.ops[ahead.pop()]
            if op.index in seen:
                continue
            seen.add(op.index)
            if is_depthwise(self.recording, op):
                ahead |= self.flow.sources(op.inputs[0])
            else:
                found.add(op.index)
        return frozenset(found)

    def _ups(self, down: Use) -> list[Use]:
        """The uses of one weight or two, of the width that `down` returns to, that are all its input is made of."""
        if not self._is_linear(down):
            return []
        found = [self.weights.uses.get(index) for index in sorted(self._made_of(down.data))]
        ups = [use for use in found if use is not None and self._is_linear(use)]
        if len(ups) < len(found) or not 1 <= _count(ups) <= 2:
            return []
        width, read = self._width(down)[1], self.flow.sources(ups[0].data)
        if any(self._width(up)[0] != width or self.flow.sources(up.data) != read for up in ups):
            return []
        return ups if self._activated(down, ups) else []

    def _width(self, use: Use) -> tuple[int, int]:
        return _widths(use, self.recording.values[use.parameter].shape)

    def _ways(self, up: Use, down: Use) -> list[Op]:
        """The ops from one weight's output to the other's input, past a depthwise convolution if there is one."""
        ways = self.flow.between(up.output, down.data)
        for index in self.flow.sources(down.data):
            op = self.recording.ops[index]
            if is_depthwise(self.recording, op):
                ways = [
                    *self.flow.between(up.output, op.inputs[0]),
                    *self.flow.between(op.outputs[0], down.data),
                    *ways,
                ]
        return ways

    def _activated(self, down: Use, ups: list[Use]) -> bool:
        gated = self._gating(down, ups) is not None
        return gated or (_count(ups) == 1 and any(is_nonlinear(op) for op in self._ways(ups[0], down)))

    def _carrying(self, op: Op) -> list[int]:
        return [value for value in op.inputs if self.flow.sources(value)]

    def _returns(self, down: Use, ups: list[Use]) -> bool:
        """Whether the result is added to what the feed-forward started from, which makes it a residual block."""
        depthwise = frozenset(op.index for op in self.recording.ops if is_depthwise(self.recording, op))
        started = set().union(*(self.flow.behind(up.data, depthwise) for up in ups))
        ahead, seen = [down.output], set[int]()
        while ahead:
            value = ahead.pop(0)
            for op in self.flow.consumers.get(value, ()):
                if op.index in seen or not self.flow.transparent(op):
                    continue
                seen.add(op.index)
                if is_adding(op) and any(self._summands(other) & started for other in op.inputs if other != value):
                    return True
                ahead.extend(op.outputs)
        return False

    def _summands(self, value: int) -> set[int]:
        """The value, what it is a view, a copy or a multiple of, and what it is a sum of."""
        found, ahead = set[int](), [value]
        while ahead:
            at = ahead.pop()
            op = self.recording.producer(at)
            if at in found or not self.flow.sources(at):
                continue
            found.add(at)
            if op is None:
                continue
            scaled = is_product(op) and len(self._carrying(op)) == 1
            if scaled or is_adding(op) or is_view(self.recording, op) or op.name in _COPIES:
                ahead.extend(op.inputs)
        return found

    def _roles(self, down: Use, ups: list[Use], name: str) -> Iterator[Claim]:
        yield Claim(down, "ffn.down", f"{name}, down")
        product = self._gating(down, ups)
        if product is None:
            yield from (Claim(up, "ffn.up", f"{name}, up") for up in ups)
            return
        branches = [(value, self._branch(value, ups)) for value in product]
        active = [self._active(value, ups) for value, _ in branches]
        if active[0] == active[1]:
            reason = "both branches" if active[0] else "neither branch"
            yield from (Claim(up, "ffn.up", f"{name}, up: gated with an activation on {reason}") for up in ups)
            return
        for (_, branch), gate in zip(branches, active, strict=True):
            role, said = ("ffn.gate", "gate") if gate else ("ffn.up", "up")
            for index, columns in branch.items():
                yield Claim(self.weights.uses[index], role, f"{name}, {said}", columns)

    def _gating(self, down: Use, ups: list[Use]) -> list[int] | None:
        """The two factors of the product that different weights, or different columns of one, go into."""
        for op in reversed([op for op in self._ways(ups[0], down) if is_product(op)]):
            factors = self._carrying(op)
            if len(factors) != 2:
                continue
            left, right = (self._branch(value, ups) for value in factors)
            if left and right and not any(self._meet(left[index], right[index]) for index in left.keys() & right):
                return factors
        return None

    def _branch(self, value: int, ups: list[Use]) -> Branch:
        made_of = self._made_of(value)
        branch: Branch = {}
        for up in ups:
            if up.index in made_of:
                cut = _count(ups) == 1 and any(is_narrowing(op) for op in self.flow.between(up.output, value))
                branch[up.index] = columns_reaching(self.flow, up, [value]) if cut else None
        return branch

    def _meet(self, left: Columns | None, right: Columns | None) -> bool:
        return left is None or right is None or not left or not right or bool(left & right)

    def _active(self, value: int, ups: list[Use]) -> bool:
        return any(is_nonlinear(op) for up in ups for op in self.flow.between(up.output, value))
