"""All adapters' factors folded at once, when one of them changed: what the eager form of their sites reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter, is_
from typing import NamedTuple, Protocol
from weakref import ref

import torch
from torch import Tensor, nn

from lora2fx.adapter import Adapter
from lora2fx.eager import connect, disconnect
from lora2fx.sharding import is_sharded
from lora2fx.training.columns import scattered
from lora2fx.training.folded import Cuts, Folded, Stacks, Use
from lora2fx.training.products import (
    CAST,
    NOTHING,
    Drawn,
    Layer,
    added_products,
    can_draw,
    fits,
    is_cast,
    is_frozen,
    product_dtype,
)
from lora2fx.training.sharing import Member, Shared, Sharing

_version = attrgetter("_version")


class Together(Protocol):
    """Folds the adapters that it was made for, again and again."""

    def __call__(self) -> list[tuple[list[int], Folded]]:
        """Those that are folded together, by index, and what became of them: ΔW = Aᵀ B.

        As long as the same are folded together in the same order, `Folded.places` is the same object.
        """

    def uses(self) -> list[Use]:
        """How those that are folded together are stacked, without folding them."""


@dataclass(frozen=True)
class Folding:
    """How a method folds many adapters in a handful of operations.

    `reads` names the parameters, and `masks` the buffers, that it reads. `penalise` adds the gradient of the method's
    penalty to that of adapters folded together, out of how many matrices in all, and returns the penalty's value: what
    the method's own `penalty`, the reference, is for any adapters; `penalised` names the parameters that it is of.
    """

    reads: tuple[str, ...]
    masks: tuple[str, ...]
    together: Callable[[Sequence[Adapter]], Together]
    penalise: Callable[[Use, Stacks, int], Tensor] | None = None
    penalised: tuple[str, ...] = ()


def is_eager(adapter: Adapter) -> bool:
    """Whether a site of this adapter may be computed in the eager form."""
    site = adapter.site
    return adapter.rewrite == "activation" and not site.batch_shape


class _Folds(NamedTuple):
    """One adapter's part in a folding: its B (k, out), the piece of a stack that holds its A (k, in), from `start` on.

    `tensors` are what was folded, and `version` the sum of their versions, which only grow.
    """

    folded: Folded
    place: int
    b: Tensor
    piece: Tensor
    start: int
    tensors: list[Tensor]
    version: int

    def a(self) -> Tensor:
        """Its A (k, in)."""
        k = self.b.shape[0]
        return self.piece if self.piece.shape[0] == k else self.piece[self.start : self.start + k]


class Bank:
    """The folded factors of all adapters that have an eager form; folded anew once one that is asked for changed.

    A change is seen by torch's version counters, which a write through `.data` and a fused optimizer pass by: `expire`
    says so after every step. `shared` are adapters whose layers are computed together. Autocast gets copies of the
    folded stacks in its dtype, made once a folding.
    """

    def __init__(
        self, adapters: Sequence[Adapter], folding: Folding | None, shared: Shared = (), rebuild: bool = True
    ) -> None:
        self._rebuild, self._attached = rebuild, len(adapters)
        plain = folding is not None and not any(map(is_sharded, adapters))
        self._adapters = tuple(filter(is_eager, adapters)) if plain else ()
        if folding is not None and self._adapters:
            self._fold, self._reads, self._masks = folding.together(self._adapters), folding.reads, folding.masks
        self._groups: list[tuple[list[int], Folded]] = []
        self._folds: list[_Folds] = []
        self._cast: dict[torch.dtype, list[_Folds]] = {}
        self._fused: dict[tuple[tuple[int, ...], torch.dtype], tuple[Tensor, Tensor]] = {}
        self._laid: list[tuple[tuple[int, int], ...]] = []
        self._cuts: list[Cuts] = []
        self._sharing = Sharing(self._members(shared))
        connect(self._adapters, self)

    def _members(self, shared: Shared) -> list[list[Member]]:
        numbers = {adapter: index for index, adapter in enumerate(self._adapters)}
        return [[Member(numbers[a], ref(layer)) for a, layer in own.items() if a in numbers] for own in shared]

    def close(self) -> None:
        """The sites go back to the functional form."""
        disconnect(self._adapters)
        self.expire()

    def expire(self) -> None:
        """Forget what was folded."""
        if self._sharing.settle():
            self._laid = []
        self._groups, self._folds, self._cast, self._fused = [], [], {}, {}

    def uses(self) -> list[Use] | None:
        """What became of the adapters' folding, where their gradients are still stacked as it left them.

        None where some have no eager form, or got no gradient, or another one.
        """
        if not self._folds or len(self._adapters) < self._attached:
            return None
        uses = [folded.use for _, folded in self._groups]
        return uses if all(use.is_held() for use in uses) else None

    def gathered(self, names: Sequence[str]) -> list[Use] | None:
        """The same with gradients of these parameters copied into stacks, whatever made them; to be spread again."""
        if not self._adapters or len(self._adapters) < self._attached:
            return None
        uses = self._fold.uses()
        return uses if all(use.gather(names) for use in uses) else None

    def factors(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """A (k, in) and B (k, out) of one adapter, with their gradients' way to its parameters; cast as x is."""
        own = self._current(index)
        if is_cast(x) and own.b.dtype in CAST:
            own = self._in_dtype(product_dtype(x))[index]
        own.folded.use.read.add(own.place)
        return own.a(), own.b

    def product(
        self, index: int, x: Tensor, weight: Tensor, bias: Tensor | None, dropout: nn.Dropout | None = None
    ) -> Tensor | None:
        """x Wᵀ + b + (dropout(x) Aᵀ) B in the dtype of a linear layer of x.

        None where W or b trains or is no plain tensor, the factors don't fit x, or the dropout can't be drawn.
        """
        own, dtype = self._current(index).b.dtype, product_dtype(x)
        if not is_frozen(weight, bias, x) or not fits(own, x) or not can_draw([dropout] if dropout else [], x):
            return None
        folds = self._in_dtype(dtype) if is_cast(x) and dtype != own else self._folds
        part = folds[index]
        part.folded.use.read.add(part.place)
        layer = Layer(index, weight, bias)
        if dropout is not None or index not in self._sharing.involved:
            drawn = NOTHING if dropout is None else Drawn.by([dropout], x, [len(part.b)])
            return added_products(x.to(dtype), (layer,), part.a(), (part.b,), self._rebuild, drawn)[0]
        return self._product_of_team(folds, x, layer)

    def product_of_columns(
        self,
        indices: tuple[int, ...],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dropouts: Sequence[nn.Dropout] = (),
    ) -> Tensor | None:
        """x Wᵀ + b + (x Aᵀ) B, A and B those of several adapters, each of some columns of W.

        None as `product`, and of dropouts that not all have.
        """
        for index in indices:
            self._current(index)
        own, dtype = [self._folds[index].b.dtype for index in indices], product_dtype(x)
        if not is_frozen(weight, bias, x) or not all(fits(each, x) for each in own) or len(set(own)) > 1:
            return None
        if not can_draw(dropouts, x) or (dropouts and len(dropouts) < len(indices)):
            return None
        folds = self._in_dtype(dtype) if is_cast(x) and dtype != own[0] else self._folds
        for part in (folds[index] for index in indices):
            part.folded.use.read.add(part.place)
        a, b = self._joined(indices, folds)
        drawn = Drawn.by(dropouts, x, [len(folds[index].b) for index in indices]) if dropouts else NOTHING
        return added_products(x.to(dtype), (Layer(indices[0], weight, bias),), a, (b,), self._rebuild, drawn)[0]

    def _joined(self, indices: tuple[int, ...], folds: Sequence[_Folds]) -> tuple[Tensor, Tensor]:
        """A (Σ k, in) and B (Σ k, all columns) of the adapters of one weight."""
        dtype = folds[indices[0]].b.dtype
        if (indices, dtype) not in self._fused:
            a = torch.cat([folds[index].a() for index in indices])
            b = scattered([self._adapters[index] for index in indices], [folds[index].b for index in indices])
            self._fused[indices, dtype] = a, b
        return self._fused[indices, dtype]

    def _in_dtype(self, dtype: torch.dtype) -> list[_Folds]:
        """All adapters' parts as autocast would cast them."""
        if dtype not in self._cast:
            self._cast[dtype] = self._parts([(indices, folded.to(dtype)) for indices, folded in self._groups])
        return self._cast[dtype]

    def _product_of_team(self, folds: Sequence[_Folds], x: Tensor, layer: Layer) -> Tensor:
        """The layer's output, out of those computed together where it can be."""
        own = folds[layer.number]
        known = self._sharing.take(x, layer, own.folded)
        if known is not None:
            return known
        layers = self._sharing.team(x, layer)
        read = x.to(product_dtype(x))
        if len(layers) == 1:
            return added_products(read, layers, own.a(), (own.b,), self._rebuild)[0]
        right = [folds[member.number].b for member in layers]
        found = added_products(read, layers, own.piece, right, self._rebuild)
        return self._sharing.keep(x, layers, found, layer.number, own.folded)

    def _current(self, index: int) -> _Folds:
        if not self._folds or self._changed(index):
            self._refresh()
        return self._folds[index]

    def _changed(self, index: int) -> bool:
        now, known = self._read(self._adapters[index]), self._folds[index]
        return not all(map(is_, now, known.tensors)) or sum(map(_version, now)) != known.version

    def _read(self, adapter: Adapter) -> list[Tensor]:
        factors = map(adapter._parameters.__getitem__, self._reads)
        return [*factors, *map(adapter._buffers.__getitem__, self._masks)]  # type: ignore[list-item]

    def _refresh(self) -> None:
        with torch.autocast(self._adapters[0].progress.device.type, enabled=False):
            self._groups = self._fold()
        laid = [folded.places for _, folded in self._groups]
        if len(laid) != len(self._laid) or not all(map(is_, laid, self._laid)):
            self._lay_out()
            self._laid = laid
        self._folds, self._cast, self._fused = self._parts(self._groups), {}, {}

    def _parts(self, groups: Iterable[tuple[list[int], Folded]]) -> list[_Folds]:
        """Each adapter's part in the foldings, in the adapters' order."""
        folds = dict[int, _Folds]()
        for (indices, folded), cuts in zip(groups, self._cuts, strict=True):
            pieces = folded.pieces(cuts)
            for place, (index, b, (piece, start)) in enumerate(zip(indices, folded.b, pieces, strict=True)):
                tensors = self._read(self._adapters[index])
                folds[index] = _Folds(folded, place, b, piece, start, tensors, sum(map(_version, tensors)))
        return [folds[index] for index in range(len(self._adapters))]

    def _lay_out(self) -> None:
        """Which sites are computed together, and how the stacks of A are cut for that: the same from step to step."""
        self._sharing.form(self._side_by_side)
        self._cuts = []
        for indices, folded in self._groups:
            own = {index: place for place, index in enumerate(indices)}
            teams = [[own[index] for index in team] for team in self._sharing.teams if team[0] in own]
            self._cuts.append(folded.cuts(teams))

    def _side_by_side(self, indices: Sequence[int]) -> list[list[int]]:
        """The sites, in order, in parts whose A lie one behind the other in one stack."""
        where = {
            index: (group, *folded.places[place])
            for group, (own, folded) in enumerate(self._groups)
            for place, index in enumerate(own)
        }
        parts = [[indices[0]]] if indices else []
        for before, index in pairwise(indices):
            group, stack, row = where[before]
            if where[index] == (group, stack, row + 1):
                parts[-1].append(index)
            else:
                parts.append([index])
        return parts
