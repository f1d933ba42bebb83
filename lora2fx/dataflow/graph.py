"""Walk a recording: from a value back to the contractions it is made of, and forward to those it feeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from heapq import heapify, heappop, heappush

import torch

from lora2fx.dataflow.ops import is_constant, is_transparent
from lora2fx.dataflow.recording import Op, Recording

Ops = frozenset[int]
_NONE: Ops = frozenset()
_DISCRETE = (torch.bool, torch.int32, torch.int64)
"""Token ids, indices and masks: they choose, and are no part of what is computed."""


def _union(sets: Iterable[Ops]) -> Ops:
    distinct = {id(found): found for found in sets if found}
    return frozenset().union(*distinct.values()) if len(distinct) > 1 else next(iter(distinct.values()), _NONE)


class Dataflow:
    """A recording with the ways through it. `sources` and `sinks` stop at, and name, ops that aren't transparent."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self._transparent = [is_transparent(recording, op) for op in recording.ops]

    def transparent(self, op: Op) -> bool:
        """Whether `is_transparent`, remembered."""
        return self._transparent[op.index]

    @cached_property
    def consumers(self) -> dict[int, tuple[Op, ...]]:
        """The ops that read each value."""
        reading = defaultdict[int, list[Op]](list)
        for op in self.recording.ops:
            for value in op.inputs:
                reading[value].append(op)
        return {value: tuple(ops) for value, ops in reading.items()}

    @cached_property
    def _sources(self) -> dict[int, Ops]:
        sources = dict[int, Ops]()
        for op in self.recording.ops:
            if self.transparent(op) or is_constant(op):
                made = _NONE if is_constant(op) else _union(sources.get(value, _NONE) for value in op.inputs)
            else:
                made = frozenset({op.index})
            for value in op.outputs:
                sources[value] = _NONE if self.recording.values[value].dtype in _DISCRETE else made
        return sources

    @cached_property
    def _sinks(self) -> dict[int, Ops]:
        sinks = defaultdict[int, Ops](frozenset)
        for op in reversed(self.recording.ops):
            through = self.transparent(op)
            met = _union(sinks[value] for value in op.outputs) if through else frozenset({op.index})
            for value in op.inputs:
                sinks[value] = _union((sinks[value], met))
        return sinks

    def sources(self, value: int) -> Ops:
        """The ops a value is made of, as far back as transparent ops reach; none for weights, constants, indices."""
        return self._sources.get(value, _NONE)

    def sinks(self, value: int) -> Ops:
        """The ops that a value feeds, as far on as transparent ops reach."""
        return self._sinks.get(value, _NONE)

    def between(self, start: int, goal: int) -> list[Op]:
        """The transparent ops on all ways from value `start` to value `goal`, in the order they ran."""
        first = self.recording.values[start].producer
        seen, found, ahead = set[int](), set[int](), [goal]
        while ahead:
            value = ahead.pop()
            op = self.recording.producer(value)
            if value == start or op is None or op.index in seen or not self.transparent(op):
                continue
            seen.add(op.index)
            if first is None or op.index > first:
                ahead.extend(op.inputs)
        reached = {start}
        for index in sorted(seen):
            op = self.recording.ops[index]
            if reached.intersection(op.inputs):
                reached.update(op.outputs)
                found.add(index)
        return [self.recording.ops[index] for index in sorted(found)]

    def behind(self, values: Iterable[int], through: Ops = _NONE) -> Behind:
        """The values and all they are made of, as far back as transparent ops, and those named in `through`, reach."""
        return Behind(self, values, through)


class Behind(Iterable[int]):
    """The values that some are made of, looked for only as far back as is asked: a value is made of earlier ones."""

    def __init__(self, flow: Dataflow, values: Iterable[int], through: Ops) -> None:
        self._flow, self._through = flow, through
        self._seen = set[int](values)
        self._ahead = [-value for value in self._seen]
        heapify(self._ahead)

    def _look(self) -> None:
        op = self._flow.recording.producer(-heappop(self._ahead))
        if op is None or not (self._flow.transparent(op) or op.index in self._through):
            return
        for value in op.inputs:
            if value not in self._seen:
                self._seen.add(value)
                heappush(self._ahead, -value)

    def __contains__(self, value: int) -> bool:
        while self._ahead and -self._ahead[0] > value:
            self._look()
        return value in self._seen

    def __iter__(self) -> Iterator[int]:
        while self._ahead:
            self._look()
        return iter(self._seen)
