"""One forward as data: every aten call, the values it read and made, and which of those are weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

INPUT = "lora2fx.input"
ALIAS = "lora2fx.alias"


@dataclass(frozen=True)
class Ref:
    """A tensor argument of an `Op`: the id of its value."""

    value: int


@dataclass(frozen=True)
class Value:
    """A tensor at one moment: its place in its storage, and the index of the op that made it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    storage: int
    producer: int | None = None

    @property
    def numel(self) -> int:
        """The number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Op:
    """One aten call. `func` is None for an input of the model and for a tensor changed through another view of it."""

    index: int
    name: str
    func: OpOverload | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    holder: str | None = None
    """The name under which the module whose forward was running holds the weight that this call reads."""

    def operand(self, position: int) -> int | None:
        """The value given at `position`, None where no tensor was."""
        given = self.args[position] if position < len(self.args) else None
        return given.value if isinstance(given, Ref) else None

    @property
    def writes(self) -> bool:
        """Whether it changes one of its inputs in place."""
        return self.func is not None and self.func._schema.is_mutable


@dataclass(frozen=True)
class Recording:
    """What one forward did.

    `parameters` holds the name of each value that is a parameter of the model, `constants` the contents of
    integer and bool tensors (indices, masks). `outside_reads` names the weights that are used while their
    owner's forward isn't running, and `tied` all names of each parameter that has several.
    """

    values: tuple[Value, ...]
    ops: tuple[Op, ...]
    parameters: dict[int, str]
    constants: dict[int, Tensor] = field(default_factory=dict)
    outside_reads: frozenset[str] = frozenset()
    tied: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def producer(self, value: int) -> Op | None:
        """The op that made a value, None for weights and constants."""
        index = self.values[value].producer
        return None if index is None else self.ops[index]

    def same_storage(self, left: int, right: int) -> bool:
        """Whether two values look at one storage."""
        return self.values[left].storage == self.values[right].storage
