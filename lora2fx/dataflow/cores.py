"""The attentions of a forward: a fused call, or a softmax between two products of activations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lora2fx.dataflow.contractions import Contraction, Operand
from lora2fx.dataflow.dims import trace
from lora2fx.dataflow.graph import Dataflow, Ops
from lora2fx.dataflow.ops import is_attention, is_softmax
from lora2fx.dataflow.recording import Op, Recording
from lora2fx.dataflow.weights import Weights

SINGLE = "a single position looks at a single position"
ACROSS = "the softmax runs along another dimension than the one that is summed over"


@dataclass(frozen=True)
class Core:
    """One attention: (operand number, value) of each query, key and value, and what it consists of.

    `inner` are its own contractions, from scores to mixed values; `outputs` hold what it made.
    """

    operands: tuple[tuple[int, int], ...]
    inner: Ops
    outputs: tuple[int, ...]
    ambiguous: str = ""


def _key_side(flow: Dataflow, score: Contraction, softmax: Op) -> Operand | None:
    """The operand that one softmax position touches one position of, None where that can't be told."""
    scores = softmax.inputs[0]
    shape = flow.recording.values[scores].shape
    dim = softmax_dim(flow.recording, softmax)
    touched = _sides(score, trace(flow, scores, [dim], score.output))
    if not touched:  # a single position leaves no trace: the key is where the others don't go
        others = _sides(score, trace(flow, scores, [each for each in range(len(shape)) if each != dim], score.output))
        touched = [score.other(side) for side in others]
    return touched[0] if len(touched) == 1 else None


def _sides(score: Contraction, dims: Iterable[int]) -> list[Operand]:
    """The operands that alone carry these dimensions of their product."""
    letters = {score.out[dim] for dim in dims}
    return [
        side for side in (score.left, score.right) if letters & (set(side.letters) - set(score.other(side).letters))
    ]


def _pairs(weights: Weights, found: Contraction) -> bool:
    """Whether both sides are activations, or a weight that stands for one: learned queries, the same in every row."""
    use = weights.uses.get(found.op.index)
    return use is None or use.spread


def _mixed(flow: Dataflow, weights: Weights, softmax: Op) -> list[tuple[Contraction, int]]:
    """The contractions of a softmax's result with a value, and that value."""
    probabilities = softmax.outputs[0]
    found = list[tuple[Contraction, int]]()
    for index in sorted(flow.sinks(probabilities)):
        mix = weights.contractions.get(index)
        if mix is None or not _pairs(weights, mix):
            continue
        sides = [side for side in (mix.left, mix.right) if softmax.index in flow.sources(side.value)]
        if len(sides) == 1:
            found.append((mix, mix.other(sides[0]).value))
    return found


def _softmax_core(flow: Dataflow, weights: Weights, softmax: Op) -> Core | None:
    """The attention around a softmax: fed by an activation × activation, feeding another; None if there is none."""
    fed_by = flow.sources(softmax.inputs[0])
    scores = [weights.contractions[index] for index in sorted(fed_by) if index in weights.contractions]
    products = [score for score in scores if _pairs(weights, score)]
    mixed = _mixed(flow, weights, softmax)
    if not products or not mixed:
        return None
    operands = list[tuple[int, int]]()
    ambiguous = "" if all(_mixes_along(flow, mix, value, softmax) for mix, value in mixed) else ACROSS
    for score in products:
        key = _key_side(flow, score, softmax)
        if key is not None:
            operands += [(1, key.value), (0, score.other(key).value)]
        elif all(flow.sources(side.value) for side in (score.left, score.right)):
            operands += [(0, score.left.value), (1, score.right.value)]
            single = max(flow.recording.values[score.output].shape[-2:]) == 1
            ambiguous = SINGLE if single else f"which operand of {score.op.name} is the key can't be told"
    operands += [(2, value) for _, value in mixed]
    inner = frozenset({score.op.index for score in scores} | {mix.op.index for mix, _ in mixed} | {softmax.index})
    return Core(tuple(operands), inner, tuple(mix.output for mix, _ in mixed), ambiguous)


def _mixes_along(flow: Dataflow, mix: Contraction, value: int, softmax: Op) -> bool:
    """Whether the contraction sums over the dimension that the softmax runs along, as far as can be seen."""
    side = mix.left if mix.right.value == value else mix.right
    summed = [dim for dim, letter in enumerate(side.letters) if letter not in mix.out]
    touched = trace(flow, side.value, summed, softmax.outputs[0])
    return not touched or softmax_dim(flow.recording, softmax) in touched


def softmax_dim(recording: Recording, softmax: Op) -> int:
    """The dimension that a softmax runs along."""
    given = softmax.args[1] if len(softmax.args) > 1 and isinstance(softmax.args[1], int) else -1
    return given % max(len(recording.values[softmax.inputs[0]].shape), 1)


def find_cores(flow: Dataflow, weights: Weights) -> list[Core]:
    """Every attention of the recording, in the order they ran."""
    cores = list[Core]()
    for op in flow.recording.ops:
        if is_attention(op):
            operands = tuple((position, value) for position in range(3) if (value := op.operand(position)) is not None)
            cores.append(Core(operands, frozenset({op.index}), op.outputs[:1]))
        elif is_softmax(op) and op.inputs:
            core = _softmax_core(flow, weights, op)
            if core is not None:
                cores.append(core)
    return cores
