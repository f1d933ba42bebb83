"""Sites that read the same x, as query, key and value do, computed together.

Which do, the forward that `transform` recorded has shown, so that a run computes its first step like any other, and a
resumed one ends in the same bits. The first of them to come computes the outputs of all; the others find theirs when
their turn comes, if it comes with the same x, weight and bias, none of them written to since. Where one came with
anything else, or not at all, the team is given up after the step: nothing was lost but what had been computed ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from lora2fx.adapter import Adapter
from lora2fx.training.folded import Folded
from lora2fx.training.products import Layer, is_frozen

Shared = Sequence[Mapping[Adapter, nn.Linear]]
"""Adapters whose layers read one x, with these layers, in the order of their turns."""
Parts = Callable[[Sequence[int]], Iterable[Sequence[int]]]


class Member(NamedTuple):
    """A site by its number, and the layer that it is of, not kept alive."""

    number: int
    owner: ref[nn.Linear]

    def layer(self, x: Tensor) -> Layer | None:
        """The layer as it is now; None where it isn't one of frozen plain tensors of x's kind."""
        owner = self.owner()
        held = {} if owner is None else owner._parameters
        weight, bias = held.get("weight"), held.get("bias")
        return Layer(self.number, weight, bias) if weight is not None and is_frozen(weight, bias, x) else None


class _Ahead(NamedTuple):
    """A layer's output computed ahead, and what it holds for; `hooks` tell blocks of gradient checkpointing apart."""

    output: Tensor
    layer: Layer
    x: ref[Tensor]
    versions: tuple[int, ...]
    folded: Folded
    hooks: Any


def _hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _versions(x: Tensor, layer: Layer) -> tuple[int, ...]:
    bias = 0 if layer.bias is None else layer.bias._version
    return x._version, layer.weight._version, bias


class Sharing:
    """Which sites are computed together: groups of `groups`, or the parts of them that can be."""

    def __init__(self, groups: Sequence[Sequence[Member]]) -> None:
        self._groups = groups
        self._teams: dict[int, tuple[Member, ...]] = {}
        self._ahead: dict[int, _Ahead] = {}
        self._refused: set[int] = set()
        self.involved: frozenset[int] = frozenset()
        """The sites that are in a team."""

    @property
    def teams(self) -> list[list[int]]:
        """The teams, each in its adapters' order."""
        return [[member.number for member in team] for team in self._teams.values()]

    def form(self, parts: Parts) -> None:
        """Make teams of the groups: `parts` gives those of their sites that can be computed together, in order."""
        self._teams = {}
        for group in self._groups:
            members = {member.number: member for member in group}
            for part in parts(sorted(members)):
                if len(part) > 1 and self._refused.isdisjoint(part):
                    leader = next(index for index in members if index in part)
                    self._teams[leader] = tuple(members[index] for index in part)
        self.involved = frozenset(index for team in self.teams for index in team)

    def team(self, x: Tensor, layer: Layer) -> Sequence[Layer]:
        """The layers to compute now, side by side: the one whose turn it is, and those that will read the same x."""
        members = self._teams.get(layer.number)
        if members is None:
            return (layer,)
        found = [layer if member.number == layer.number else member.layer(x) for member in members]
        if None in found:
            self._refused.add(layer.number)
            return (layer,)
        return found  # type: ignore[return-value]

    def keep(self, x: Tensor, layers: Sequence[Layer], outputs: Sequence[Tensor], own: int, folded: Folded) -> Tensor:
        """Remember what was computed ahead; the output of the site with the index `own`."""
        given, hooks = ref(x), _hooks()
        for layer, output in zip(layers, outputs, strict=True):
            if layer.number == own:
                result = output
            else:
                self._ahead[layer.number] = _Ahead(output, layer, given, _versions(x, layer), folded, hooks)
        return result

    def take(self, x: Tensor, layer: Layer, folded: Folded) -> Tensor | None:
        """What was computed ahead for this very call."""
        ahead = self._ahead.pop(layer.number, None)
        if ahead is None:
            return None
        same = ahead.layer.weight is layer.weight and ahead.layer.bias is layer.bias and ahead.x() is x
        if same and ahead.folded is folded and ahead.versions == _versions(x, layer) and ahead.hooks == _hooks():
            return ahead.output
        self._refused.add(layer.number)
        return None

    def settle(self) -> bool:
        """Between two steps: forget what was left over, and give up teams that failed; whether there were any."""
        self._refused |= self._ahead.keys()
        self._ahead.clear()
        if not self._refused:
            return False
        failed = [leader for leader, team in self._teams.items() if any(m.number in self._refused for m in team)]
        for leader in failed:
            del self._teams[leader]
        return bool(failed)
