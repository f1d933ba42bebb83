"""Which values are weights, and every contraction of one with an activation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lora2fx.dataflow.contractions import Contraction, Operand, contraction
from lora2fx.dataflow.graph import Dataflow
from lora2fx.dataflow.layouts import layout_of, steps_to_parameter
from lora2fx.dataflow.ops import is_pointwise, is_view
from lora2fx.dataflow.recording import ALIAS, Op
from lora2fx.site import Layout

_COPIES = frozenset(
    {"aten.clone", "aten._to_copy", "aten.lift_fresh", "aten.index", "aten.index_select", "aten.contiguous"}
)


@dataclass(frozen=True)
class Use:
    """One contraction of a weight with an activation (`data`); `layout` is None where `reason` says why.

    `spread`: the weight stands once for each entry of a batch, as learned queries of an attention do.
    """

    contraction: Contraction
    parameter: int
    name: str
    operand: Operand
    data: int
    layout: Layout | None
    reason: str = ""
    spread: bool = False

    @property
    def index(self) -> int:
        """The index of the contraction's op."""
        return self.contraction.op.index

    @property
    def output(self) -> int:
        """The value of the contraction's result."""
        return self.contraction.output


class Weights:
    """Which values are a parameter looked at, copied, cast or scaled, and every contraction of such a value."""

    def __init__(self, flow: Dataflow) -> None:
        self.flow, self.recording = flow, flow.recording
        self._parent = dict[int, int]()
        for op in self.recording.ops:
            source = self._carried(op)
            if source is not None:
                self._parent.update(dict.fromkeys(op.outputs, source))

    def is_weight(self, value: int) -> bool:
        """Whether a value is a parameter, or one looked at, copied, cast or scaled."""
        return value in self.recording.parameters or value in self._parent

    def _carried(self, op: Op) -> int | None:
        """The input whose weight the op's output still is: viewed, copied, or scaled by what no activation decides."""
        recording, weights = self.recording, [value for value in op.inputs if self.is_weight(value)]
        if op.writes or not op.outputs or not weights:
            return None
        if is_view(recording, op) or op.name in _COPIES or (op.name == ALIAS and len(op.inputs) == 1):
            return op.inputs[0] if op.inputs[0] in weights else None
        made = recording.values[op.outputs[0]].shape
        whole = [value for value in weights if recording.values[value].shape == made]
        constant = not any(self.flow.sources(value) for value in op.inputs)
        return whole[0] if is_pointwise(op) and len(whole) == 1 and constant else None

    def readers(self, parameter: int) -> list[str]:
        """The names of the ops that read a parameter, or what it is looked at, copied or scaled as."""
        family = {value for value in (parameter, *self._parent) if self.lineage(value)[-1] == parameter}
        reading = (op for value in sorted(family) for op in self.flow.consumers.get(value, ()))
        return list(dict.fromkeys(op.name for op in reading if not family.issuperset(op.outputs)))

    def lineage(self, value: int) -> list[int]:
        """The values from `value` back to its parameter."""
        chain = [value]
        while chain[-1] in self._parent:
            chain.append(self._parent[chain[-1]])
        return chain

    def _weight_side(self, found: Contraction) -> Operand | None:
        """The operand that is a weight; of two, the right one, where nn.Linear, x @ W and embeddings have it."""
        sides = [side for side in (found.left, found.right) if self.is_weight(side.value)]
        return sides[-1] if sides else None

    @cached_property
    def contractions(self) -> dict[int, Contraction]:
        """Every contraction, by the index of its op."""
        found = (contraction(self.recording, op) for op in self.recording.ops)
        return {each.op.index: each for each in found if each is not None}

    @cached_property
    def uses(self) -> dict[int, Use]:
        """Every contraction of a weight, by the index of its op."""
        uses = dict[int, Use]()
        for index, found in self.contractions.items():
            side = self._weight_side(found)
            if side is not None:
                uses[index] = self._use(found, side)
        return uses

    def _use(self, found: Contraction, side: Operand) -> Use:
        chain = self.lineage(side.value)
        parameter = chain[-1]
        reader = next((op for op in self.flow.consumers[parameter] if set(op.outputs) & set(chain)), found.op)
        name = reader.holder or self.recording.parameters[parameter]
        data, steps = found.other(side).value, steps_to_parameter(self.recording, chain)
        if steps is None:
            reason = f"its way into {found.op.name} can't be followed"
            return Use(found, parameter, name, side, data, None, reason)
        layout = layout_of(steps, self.recording.values[parameter].shape, found, side)
        spread = any(self._spread(dim, side, found) and not group for dim, group in enumerate(steps))
        if isinstance(layout, str):
            return Use(found, parameter, name, side, data, None, layout, spread)
        return Use(found, parameter, name, side, data, layout, "", spread)

    def _spread(self, dim: int, side: Operand, found: Contraction) -> bool:
        """Whether an operand's dimension pairs its entries with the activation's, one by one."""
        letter, size = side.letters[dim], self.recording.values[side.value].shape[dim]
        return size > 1 and letter in found.out and letter in found.other(side).letters
