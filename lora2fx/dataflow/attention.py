"""The weights around each attention, by dataflow: what makes its query, key and value, and what reads its result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from lora2fx.dataflow.claims import Claim, claimed_columns
from lora2fx.dataflow.columns import Columns, columns_reaching
from lora2fx.dataflow.contractions import is_depthwise, is_embedding
from lora2fx.dataflow.cores import Core, find_cores
from lora2fx.dataflow.graph import Dataflow, Ops
from lora2fx.dataflow.ops import is_narrowing, is_pooling, is_product, is_reduction
from lora2fx.dataflow.recording import Op
from lora2fx.dataflow.weights import Use, Weights

OPERANDS = ("query", "key", "value")


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
        own = self._exclusive(core)
        found = list[Use]()
        for index in sorted(frozenset().union(*(self.flow.sinks(value) for value in core.outputs))):
            use = self.weights.uses.get(index)
            if use is None or use.layout is None or index in self._inner or use.index in own:
                continue
            if made & self.flow.sources(use.data) and self._added(use.data, made) <= self._all_mixing | own:
                found.append(use)
        return found

    def _exclusive(self, core: Core) -> Ops:
        """The projections that are this core's alone: not what several operands share, nor what feeds another."""
        operands = defaultdict[int, set[int]](set)
        for operand, value in core.operands:
            for use in self._projections(value):
                cut = any(is_narrowing(op) for op in self.flow.between(use.output, self._entry(value, use)))
                operands[use.index].add(-1 if cut else operand)
        uses = self.weights.uses
        return frozenset(
            index
            for index, shared in operands.items()
            if len(shared) == 1 and not operands.keys() & self.flow.sinks(uses[index].output)
        )

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
