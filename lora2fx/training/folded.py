"""Factors of many adapters folded together: ΔW = Aᵀ B, in stacks of one width, with their way to the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

Stacks = dict[str, tuple[Tensor, ...]]
"""Parameters of many adapters, or their gradients, by name, those of one shape stacked."""


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass
class Use:
    """What becomes of a folding: which adapters a site read, and the stacks that the gradients are views of.

    `parameters` are those of every adapter by name, grouped as they are stacked, and `stacks` the stacks of them that
    were folded. What is stacked by input width is in another order than what isn't: `to_core` and `from_core` (int64)
    are the one order's places in the other, for methods that need them.
    """

    parameters: Mapping[str, Sequence[list[Tensor]]]
    to_core: Tensor = field(default_factory=_none)
    from_core: Tensor = field(default_factory=_none)
    read: set[int] = field(default_factory=set)
    gradients: Stacks = field(default_factory=dict)
    stacks: Stacks = field(default_factory=dict)

    def is_held(self) -> bool:
        """Whether every parameter's gradient still is what the last backward made of it, or was written into that."""
        return bool(self.gradients) and all(
            _are_rows(own, stack)
            for name, stacks in self.gradients.items()
            for own, stack in zip(self.parameters[name], stacks, strict=True)
        )

    def keep(self, gradients: Stacks) -> None:
        """Remember a backward's stacks, but not those that will be added to an earlier backward's."""
        if not self.is_held():
            self.gradients = gradients

    def gather(self, names: Sequence[str]) -> bool:
        """Make stacks of the gradients, by copying them; False where a parameter has none, or one of another kind."""
        parameters = [parameter for name in names for own in self.parameters[name] for parameter in own]
        if not all(map(_has_like_gradient, parameters)):
            return False
        self.gradients = {
            name: tuple(torch.stack([parameter.grad for parameter in own]) for own in self.parameters[name])  # type: ignore[misc]
            for name in names
        }
        return True

    def spread(self) -> None:
        """Write the stacks that `gather` made back into the gradients."""
        pairs = [
            (parameter.grad, row)
            for name, stacks in self.gradients.items()
            for own, stack in zip(self.parameters[name], stacks, strict=True)
            for parameter, row in zip(own, stack.unbind(), strict=True)
        ]
        torch._foreach_copy_([grad for grad, _ in pairs], [row for _, row in pairs])  # type: ignore[misc]

    def stacked(self, name: str) -> tuple[Tensor, ...]:
        """One parameter of every adapter, stacked: as it was folded, if it was."""
        return self.stacks.get(name) or tuple(torch.stack(own) for own in self.parameters[name])


def _has_like_gradient(parameter: Tensor) -> bool:
    grad = parameter.grad
    return type(grad) is Tensor and grad.dtype == parameter.dtype and not grad.is_sparse


def gradients_of(parameters: Iterable[Tensor], uses: Iterable[Use]) -> list[Tensor]:
    """All gradients, those of folded adapters as the stacks that they are."""
    found, owned = list[Tensor](), set[int]()
    for use in uses:
        found += [stack for stacks in use.gradients.values() for stack in stacks]
        for name in use.gradients:
            owned.update(*(map(id, own) for own in use.parameters[name]))
    rest = [parameter.grad for parameter in parameters if id(parameter) not in owned]
    return found + [grad for grad in rest if grad is not None]


def _are_rows(parameters: Sequence[Tensor], stack: Tensor) -> bool:
    start, size = stack.data_ptr(), stack.stride(0) * stack.element_size()
    grads = [parameter.grad for parameter in parameters]
    places = [None if grad is None else grad.data_ptr() for grad in grads]
    return places == list(range(start, start + size * len(places), size))


@dataclass(frozen=True)
class Cuts:
    """The rows of each piece of each stack of A; by adapter its stack, its piece of it, and the row where it starts."""

    sizes: tuple[tuple[int, ...], ...]
    places: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Folded:
    """Adapters folded together, by their index among them.

    `a` are stacks (n·k, in) of one input width each; `places` says in which of them an adapter's A is, and as which
    matrix of it; `right` are stacks (n, k, out) of the B, one behind the other in the adapters' order.
    """

    a: tuple[Tensor, ...]
    places: tuple[tuple[int, int], ...]
    right: tuple[Tensor, ...]
    use: Use

    @cached_property
    def b(self) -> tuple[Tensor, ...]:
        """The B (k, out), one an adapter."""
        return tuple(row for stack in self.right for row in stack.unbind())

    def to(self, dtype: torch.dtype) -> Folded:
        """The same in another dtype, of which the gradients are made what the factors' are."""
        a, right = (tuple(stack.to(dtype) for stack in stacks) for stacks in (self.a, self.right))
        return replace(self, a=a, right=right)

    def cuts(self, teams: Iterable[Sequence[int]]) -> Cuts:
        """How the stacks are cut: the A of a team, side by side, stay one piece."""
        k = self.b[0].shape[0]
        ends = {self.places[team[-1]]: len(team) for team in teams}
        counts = [[1] * (len(a) // k) for a in self.a]
        for (stack, place), members in ends.items():
            counts[stack][place - members + 1 : place + 1] = [members] + [0] * (members - 1)
        sizes = tuple(tuple(count * k for count in own if count) for own in counts)
        found = [[(piece, start) for piece, size in enumerate(own) for start in range(0, size, k)] for own in sizes]
        return Cuts(sizes, tuple((stack, *found[stack][place]) for stack, place in self.places))

    def pieces(self, cuts: Cuts) -> list[tuple[Tensor, int]]:
        """By adapter: a piece of its stack, and the row in it where its A (k, in) starts."""
        parts = [a.split(sizes) for a, sizes in zip(self.a, cuts.sizes, strict=True)]
        return [(parts[stack][piece], start) for stack, piece, start in cuts.places]
