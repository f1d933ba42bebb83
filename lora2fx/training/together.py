"""What all methods' foldings share: in what order adapters are stacked, folded again, and left without gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import is_
from typing import Protocol, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lora2fx.adapter import Adapter
from lora2fx.training.folded import Folded, Use


@dataclass(frozen=True)
class Arrangement:
    """n adapters by their output width: equal ones from start to stop.

    `inputs` lists those of one input width, `places` says in which list an adapter is, and where.
    """

    outputs: tuple[tuple[int, int], ...]
    inputs: tuple[tuple[int, ...], ...]
    places: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, adapters: Sequence[Adapter], numbers: Sequence[int]) -> Self:
        """`numbers` are their places in the model: sites that read the same x shall lie side by side."""
        widths = [adapter.site.out_features for adapter in adapters]
        cuts = [0, *(i for i in range(1, len(widths)) if widths[i] != widths[i - 1]), len(widths)]
        inputs = defaultdict[int, list[int]](list)
        for index in sorted(range(len(adapters)), key=numbers.__getitem__):
            inputs[adapters[index].site.in_features].append(index)
        places = {i: (stack, place) for stack, group in enumerate(inputs.values()) for place, i in enumerate(group)}
        return cls(
            tuple(pairwise(cuts)),
            tuple(map(tuple, inputs.values())),
            tuple(places[i] for i in range(len(adapters))),
        )


class Order(Protocol):
    """Adapters that are folded together."""

    def fold(self) -> Folded:
        """Fold them, as their parameters are now."""

    def use(self) -> Use:
        """How they are stacked, before anything is folded."""


MakeOrder = Callable[[Sequence[Adapter], Sequence[int]], Order]
"""Of adapters of one kind, by output width, and their places in the model."""
Kind = Callable[[Adapter], object]


class Planned:
    """Adapters that are folded again and again: in what order, as long as their parameters stay the same objects.

    Those of one `kind`, on one device and of one dtype, are folded together. `names` are the parameters.
    """

    def __init__(self, names: Sequence[str], kind: Kind, make: MakeOrder, adapters: Sequence[Adapter]) -> None:
        self._names, self._kind, self._make, self._adapters = names, kind, make, adapters
        self._known: list[Tensor] = []
        self._device: torch.device | None = None
        self._plan: list[tuple[list[int], Order]] = []

    def __call__(self) -> list[tuple[list[int], Folded]]:
        """Fold all."""
        return [(indices, order.fold()) for indices, order in self._planned()]

    def uses(self) -> list[Use]:
        """How those that are folded together are stacked."""
        return [order.use() for _, order in self._planned()]

    def _planned(self) -> list[tuple[list[int], Order]]:
        now: list[Tensor] = []
        for adapter in self._adapters:
            now += map(adapter._parameters.__getitem__, self._names)  # type: ignore[arg-type]
        if self._device != now[0].device or not all(map(is_, now, self._known)):
            self._known, self._device, self._plan = now, now[0].device, self._new_plan()
        return self._plan

    def _new_plan(self) -> list[tuple[list[int], Order]]:
        groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for index, adapter in enumerate(self._adapters):
            first = cast(Tensor, adapter._parameters[self._names[0]])
            groups[self._kind(adapter), first.dtype, first.device].append(index)
        numbers = [sorted(own, key=lambda index: self._adapters[index].site.out_features) for own in groups.values()]
        return [(own, self._make([self._adapters[index] for index in own], own)) for own in numbers]


def leave_out(
    adapters: Sequence[Adapter], names: Sequence[str], read: Collection[int], gradients: Iterable[Tensor]
) -> None:
    """To be called in a backward: adapters that no site read end without gradients, not with the zeros of the stacks.

    Hooks on them see zeros. `read` are indices of `adapters`, `gradients` the stacks of gradients. DDP waits for every
    gradient, and gets the zeros.
    """
    if len(read) == len(adapters) or (dist.is_available() and dist.is_initialized()):
        return
    unread = [adapter for index, adapter in enumerate(adapters) if index not in read]
    without = [p for adapter in unread for name in names if (p := cast(Tensor, adapter._parameters[name])).grad is None]
    places = {stack.untyped_storage().data_ptr() for stack in gradients}
    torch.autograd.Variable._execution_engine.queue_callback(partial(_clear, without, places))


def _clear(parameters: Sequence[Tensor], places: Collection[int]) -> None:
    """Take gradients away that lie at these places; what another folding has added to, doesn't."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.untyped_storage().data_ptr() in places:
            parameter.grad = None
