"""Contractions, and for each that meets a weight: which of the weight's own dimensions it contracts, frees, batches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lora2fx.dataflow.dims import Steps, along, back, root
from lora2fx.dataflow.graph import Dataflow
from lora2fx.dataflow.ops import is_pointwise, is_view
from lora2fx.dataflow.recording import ALIAS, Op, Recording
from lora2fx.site import Layout

_EQUATIONS = {
    "aten.mm": (0, "nk", 1, "km", "nm"),
    "aten.bmm": (0, "bnk", 1, "bkm", "bnm"),
    "aten.addmm": (1, "nk", 2, "km", "nm"),
    "aten._addmm_activation": (1, "nk", 2, "km", "nm"),
    "aten.baddbmm": (1, "bnk", 2, "bkm", "bnm"),
    "aten.addbmm": (1, "bnk", 2, "bkm", "nm"),
    "aten.mv": (0, "nk", 1, "k", "n"),
    "aten.addmv": (1, "nk", 2, "k", "n"),
    "aten.dot": (0, "k", 1, "k", ""),
    "aten._scaled_mm": (0, "nk", 1, "km", "nm"),
    "aten._int_mm": (0, "nk", 1, "km", "nm"),
    "aten._weight_int8pack_mm": (0, "nk", 1, "mk", "nm"),
    "aten.embedding": (1, "n", 0, "km", "nm"),
    "aten._embedding_bag": (1, "n", 0, "km", "nm"),
    "aten._embedding_bag_forward_only": (1, "n", 0, "km", "nm"),
}
"""By op: position and subscripts of either operand, subscripts of the result; an embedding's indices stand for k."""
_ADDED_TO = {"aten.addmm_": "aten.addmm", "aten.baddbmm_": "aten.baddbmm", "aten.addbmm_": "aten.addbmm"}
_COPIES = frozenset(
    {"aten.clone", "aten._to_copy", "aten.lift_fresh", "aten.index", "aten.index_select", "aten.contiguous"}
)


@dataclass(frozen=True)
class Operand:
    """One side of a contraction: its value, and a letter for each of its dimensions."""

    value: int
    letters: str


@dataclass(frozen=True)
class Contraction:
    """A call that multiplies two tensors and sums over shared dimensions; `out` are the letters of its result."""

    op: Op
    left: Operand
    right: Operand
    out: str

    @property
    def output(self) -> int:
        """The value of the result."""
        return self.op.outputs[0]

    def other(self, operand: Operand) -> Operand:
        """The side that `operand` isn't."""
        return self.right if operand is self.left else self.left


def _equation(recording: Recording, op: Op) -> tuple[int, str, int, str, str] | None:
    name = _ADDED_TO.get(op.name, op.name)
    if name in _EQUATIONS:
        return _EQUATIONS[name]
    if name == "aten.linear":
        return 0, "...k", 1, "mk", "...m"
    if name in ("aten._grouped_mm", "aten._scaled_grouped_mm"):
        ranks = tuple(len(recording.values[value].shape) for value in op.inputs[:2])
        return (
            (0, "nk", 1, "gkm", "nm") if ranks == (2, 3) else (0, "bnk", 1, "bkm", "bnm") if ranks == (3, 3) else None
        )
    if name in ("aten.convolution", "aten._convolution", "aten.convolution_overrideable"):
        window = "xyz"[: len(recording.values[op.inputs[1]].shape) - 2]
        return (0, "ni", 1, "io" + window, "no" + window) if op.args[6] else (0, "ni" + window, 1, "oi" + window, "no")
    return None


def contraction(recording: Recording, op: Op) -> Contraction | None:
    """The op as a contraction of two tensors, None if it is no such thing."""
    equation = _equation(recording, op)
    if equation is None:
        return None
    left, right = op.operand(equation[0]), op.operand(equation[2])
    if left is None or right is None:
        return None
    return Contraction(op, Operand(left, equation[1]), Operand(right, equation[3]), equation[4])


def is_convolution(op: Op) -> bool:
    """Whether the op is a convolution, transposed ones included."""
    return "convolution" in op.name


def is_embedding(op: Op) -> bool:
    """Whether the op looks rows of a table up."""
    return "embedding" in op.name


def is_depthwise(recording: Recording, op: Op) -> bool:
    """Whether the op is a convolution of each channel alone."""
    if not is_convolution(op):
        return False
    groups = int(op.args[8])
    return groups > 1 and groups == recording.values[op.inputs[0]].shape[-len(op.args[3]) - 1]


@dataclass(frozen=True)
class Use:
    """One contraction of a weight with an activation (`data`); `layout` is None where `reason` says why."""

    contraction: Contraction
    parameter: int
    name: str
    operand: Operand
    data: int
    layout: Layout | None
    reason: str = ""

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
        layout = _layout(self.recording, chain, found, side)
        data = found.other(side).value
        if isinstance(layout, str):
            return Use(found, parameter, name, side, data, None, layout)
        return Use(found, parameter, name, side, data, layout)


def _steps_to_parameter(recording: Recording, chain: list[int]) -> Steps | None:
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


def _layout(recording: Recording, chain: list[int], found: Contraction, side: Operand) -> Layout | str:
    steps = _steps_to_parameter(recording, chain)
    if steps is None:
        return f"its way into {found.op.name} can't be followed"
    other = found.other(side).letters
    dims: dict[str, list[int]] = {"batch": [], "contracted": [], "free": []}
    for letter, group in zip(side.letters, steps, strict=True):
        in_out, in_other = letter in found.out, letter in other
        kind = "free" if in_out and not in_other else "batch" if in_out or not in_other else "contracted"
        dims[kind].extend(dim for dim in group if dim not in dims[kind])
    if found.op.name.startswith(("aten.embedding", "aten._embedding")):
        dims = {"batch": [], "contracted": dims["batch"], "free": dims["free"]}
    shape = recording.values[chain[-1]].shape
    placed = sorted(dim for group in dims.values() for dim in group)
    for dim in set(placed):
        kinds = [kind for kind, group in dims.items() if dim in group]
        if len(kinds) > 1:
            return f"{found.op.name} uses its dimension {dim} as {' and '.join(kinds)}"
    dims["batch"].extend(dim for dim in range(len(shape)) if shape[dim] > 1 and dim not in placed)
    for dim in range(len(shape)):
        if dim not in placed and shape[dim] == 1:
            _place_single(dims, dim)
    if not dims["contracted"] or not dims["free"]:
        return f"{found.op.name} leaves it no matrix: dimensions {dims}"
    return Layout(tuple(dims["contracted"]), tuple(dims["free"]), tuple(sorted(dims["batch"])))


def _place_single(dims: dict[str, list[int]], dim: int) -> None:
    """Put a dimension of size 1 where one is missing, else beside its neighbour."""
    missing = [kind for kind in ("free", "contracted") if not dims[kind]]
    near = [kind for step in (1, -1) for kind, group in dims.items() if dim + step in group]
    dims[(*missing, *near, "free")[0]].append(dim)
