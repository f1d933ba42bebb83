"""Which aten calls are contractions of two tensors, with a letter for each dimension, as einsum writes them."""

from __future__ import annotations

from dataclasses import dataclass

from lora2fx.dataflow.recording import Op, Recording

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
