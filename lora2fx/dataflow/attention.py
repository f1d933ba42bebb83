"""Attention by dataflow: its cores, and the weights that make its query, key, value and output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lora2fx.dataflow.claims import Claim, claimed_columns
from lora2fx.dataflow.columns import Columns, columns_reaching
from lora2fx.dataflow.contractions import Contraction, Operand, Use, Weights, is_depthwise, is_embedding
from lora2fx.dataflow.dims import trace
from lora2fx.dataflow.graph import Dataflow, Ops
from lora2fx.dataflow.ops import is_attention, is_pooling, is_product, is_reduction, is_softmax
from lora2fx.dataflow.recording import Op

OPERANDS = ("query", "key", "value")
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
    dim = _softmax_dim(flow, softmax)
    touched = _sides(score, trace(flow, scores, [dim], score.output))
    if not touched and shape[dim] == 1:  # one position leaves no trace: the key is where the others don't go
        others = _sides(score, trace(flow, scores, [each for each in range(len(shape)) if each != dim], score.output))
        touched = [score.other(side) for side in others]
    return touched[0] if len(touched) == 1 else None


def _sides(score: Contraction, dims: Iterable[int]) -> list[Operand]:
    """The operands that alone carry these dimensions of their product."""
    letters = {score.out[dim] for dim in dims}
    return [
        side for side in (score.left, score.right) if letters & (set(side.letters) - set(score.other(side).letters))
    ]


def _mixed(flow: Dataflow, weights: Weights, softmax: Op) -> list[tuple[Contraction, int]]:
    """The contractions of a softmax's result with a value, and that value."""
    probabilities = softmax.outputs[0]
    found = list[tuple[Contraction, int]]()
    for index in sorted(flow.sinks(probabilities)):
        mix = weights.contractions.get(index)
        if mix is None or index in weights.uses:
            continue
        sides = [side for side in (mix.left, mix.right) if softmax.index in flow.sources(side.value)]
        if len(sides) == 1:
            found.append((mix, mix.other(sides[0]).value))
    return found


def _softmax_core(flow: Dataflow, weights: Weights, softmax: Op) -> Core | None:
    """The attention around a softmax: fed by an activation × activation, feeding another; None if there is none."""
    fed_by = flow.sources(softmax.inputs[0])
    scores = [weights.contractions[index] for index in sorted(fed_by) if index in weights.contractions]
    products = [score for score in scores if score.op.index not in weights.uses]
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
    return not touched or _softmax_dim(flow, softmax) in touched


def _softmax_dim(flow: Dataflow, softmax: Op) -> int:
    return int(softmax.args[1]) % len(flow.recording.values[softmax.inputs[0]].shape)


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


class AttentionRoles:
    """The roles that the attentions of a recording give to weights."""

    def __init__(self, flow: Dataflow, weights: Weights) -> None:
        self.flow, self.weights = flow, weights
        self.cores = find_cores(flow, weights)
        self._inner = frozenset().union(*(core.inner for core in self.cores))
        self._mixing = {core.outputs: frozenset(self._producers(core)) for core in self.cores}
        self._all_mixing = frozenset().union(*self._mixing.values())

    def _producers(self, core: Core) -> Iterator[int]:
        for value in core.outputs:
            op = self.flow.recording.producer(value)
            if op is not None:
                yield op.index

    def claims(self) -> Iterator[Claim]:
        """What each use of a weight is to an attention."""
        for number, core in enumerate(self.cores):
            outputs = self._outputs(core)
            for use in outputs:
                yield Claim(use, "output", f"attention #{number}, output")
            stream = self._stream(core, outputs)
            for operand, value in core.operands:
                for use in self._projections(value):
                    columns = self._columns(value, use, stream)
                    if columns is not None and not columns:
                        continue
                    if core.ambiguous and operand < 2:
                        yield Claim(use, "unknown", f"attention #{number} is ambiguous: {core.ambiguous}", columns)
                    else:
                        yield Claim(use, OPERANDS[operand], f"attention #{number}, operand {operand}", columns)

    def _stream(self, core: Core, outputs: list[Use]) -> Ops:
        """The weights that the core's result or its own projections read: what feeds them too is a residual stream."""
        after = frozenset().union(*(self.flow.sinks(value) for value in core.outputs))
        beyond = frozenset().union(*(self.flow.sinks(use.output) for use in outputs))
        own = {use.index for _, value in core.operands for use in self._projections(value)}
        return (after | beyond | own) - {use.index for use in outputs} - self._inner

    def _projections(self, value: int) -> list[Use]:
        """The weights' uses that an operand is made of, looking through depthwise convolutions."""
        found, ahead, seen = dict[int, Use](), list(self.flow.sources(value)), set[int]()
        while ahead:
            index = ahead.pop()
            op = self.flow.recording.ops[index]
            if index in seen:
                continue
            seen.add(index)
            if is_depthwise(self.flow.recording, op):
                ahead.extend(self.flow.sources(op.inputs[0]))
            elif index in self.weights.uses:
                found[index] = self.weights.uses[index]
        return [found[index] for index in sorted(found)]

    def _columns(self, value: int, use: Use, stream: Ops) -> Columns | None:
        """The use's columns that are the operand `value`: None for all, empty where they go on with the stream."""
        if use.layout is None or is_embedding(use.contraction.op):
            return frozenset()
        past = self.flow.sinks(use.output) & stream
        entry = self._entry(value, use)
        elsewhere = frozenset(self._entered(use.output)) - {entry}
        columns = claimed_columns(self.flow, use, entry, elsewhere)
        return frozenset() if past and not self._apart(use, columns, past) else columns

    def _entry(self, value: int, use: Use) -> int:
        """Where the use's result leaves the transparent ops: the operand, or a depthwise convolution before it."""
        if use.index in self.flow.sources(value):
            return value
        for index in sorted(self.flow.sinks(use.output)):
            op = self.flow.recording.ops[index]
            if is_depthwise(self.flow.recording, op) and use.index in self.flow.sources(op.inputs[0]):
                return op.inputs[0]
        return value

    def _entered(self, output: int) -> Iterator[int]:
        """The values through which a result enters the ops that it feeds."""
        for index in self.flow.sinks(output):
            op = self.flow.recording.ops[index]
            made_of = self.flow.recording.values[output].producer
            yield from (value for value in op.inputs if value == output or made_of in self.flow.sources(value))

    def _apart(self, use: Use, columns: Columns | None, past: Ops) -> bool:
        """Whether what goes on past the attention is made of other columns than the attention's."""
        if columns is None:
            return False
        entries = [value for index in past for value in self.flow.recording.ops[index].inputs]
        entries = [value for value in entries if use.index in self.flow.sources(value)]
        others = columns_reaching(self.flow, use, entries)
        return others is not None and not columns & others

    def _outputs(self, core: Core) -> list[Use]:
        """The first weights after a core, where nothing but attentions is added to its result on the way."""
        made = self._mixing[core.outputs]
        own = {use.index for _, value in core.operands for use in self._projections(value)}
        found = list[Use]()
        for index in sorted(frozenset().union(*(self.flow.sinks(value) for value in core.outputs))):
            use = self.weights.uses.get(index)
            if use is None or use.layout is None or index in self._inner or use.index in own:
                continue
            if made & self.flow.sources(use.data) and self._added(use.data, made) <= self._all_mixing | own:
                found.append(use)
        return found

    def _added(self, value: int, made: Ops) -> Ops:
        """The sources of a value, without those that only scale what is `made`: gates. A pooling ends it."""
        flow, recording = self.flow, self.flow.recording
        found, ahead, seen = set[int](), [value], set[int]()
        while ahead:
            at = ahead.pop()
            op = recording.producer(at)
            if at in seen or op is None or not flow.sources(at):
                continue
            seen.add(at)
            if is_depthwise(recording, op):
                ahead.append(op.inputs[0])
            elif not flow.transparent(op) or is_pooling(op) or (is_reduction(op) and self._drops_dimension(op)):
                found.add(op.index)
            else:
                carrying = [source for source in op.inputs if made & flow.sources(source)]
                gated = is_product(op) and len(carrying) == 1
                ahead.extend(carrying if gated else op.inputs)
        return frozenset(found)

    def _drops_dimension(self, op: Op) -> bool:
        values = self.flow.recording.values
        return len(values[op.outputs[0]].shape) < len(values[op.inputs[0]].shape)
