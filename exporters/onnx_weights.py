"""The weight gate: what an export changed in the base's constants is each adapted weight's ΔW, and nothing else.

An exporter renames, transposes and slices weights, so that they are found by content.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora2fx.errors import ExportError
from lora2fx.exporters.copies import Change
from lora2fx.exporters.onnx_graph import Pair

Array = NDArray[Any]
Place = tuple[tuple[int, ...], tuple[slice, ...]]


class _Expected:
    """One weight's value before the merge, its ΔW (computed when asked for), and which entries were found changed."""

    def __init__(self, change: Change) -> None:
        self.change = change
        self.weight = change.weight
        self.before: Array = change.before.detach().cpu().numpy()
        self.seen: Array | None = None
        self.complete = False

    def update(self) -> tuple[Array, Array]:
        """ΔW, and how far rounding may leave each entry of the merged weight from before + ΔW; both float64."""
        delta: Array = self.change.delta().cpu().numpy()
        rounding: Array = self.change.rounding().cpu().numpy()
        limits = np.finfo(self.before.dtype)
        return delta, limits.eps * rounding + float(limits.smallest_subnormal)

    def mark(self, place: Place) -> None:
        order, part = place
        if all(entries == slice(None) for entries in part):
            self.complete, self.seen = True, None
        elif not self.complete:
            self.seen = np.zeros(self.before.shape, bool) if self.seen is None else self.seen
            self.seen.transpose(order)[part] = True

    def missing(self) -> int:
        """How many entries of ΔW, beyond what rounding absorbs, were found nowhere."""
        if self.complete:
            return 0
        delta, tolerance = self.update()
        due = np.abs(delta) > tolerance
        return int((due if self.seen is None else due & ~self.seen).sum())


def check_weights(pairs: Sequence[Pair], changes: Sequence[Change]) -> dict[str, int]:
    """Compare the constants of the base's and the merged export with the ΔW that each weight must have got.

    Returns how many constants are the same and how many changed. Raises `ExportError` for a constant that changed
    and is no site's weight, for one that changed by something else than its ΔW, and for a ΔW that isn't there.
    """
    expected = [_Expected(change) for change in changes]
    changed = 0
    for pair in pairs:
        base, merged = pair.first.numpy(), pair.second.numpy()
        if not _same_bits(base, merged):
            changed += 1
            _explain(pair.name, base, merged, expected)
    for entry in expected:
        if missing := entry.missing():
            raise ExportError(
                f"the exported file lacks the update of {entry.weight}: {missing} of its {entry.before.size} entries"
                " don't have it. Either the merge lost it, or the outputs that were exported don't use this weight."
            )
    return {"unchanged": len(pairs) - changed, "changed": changed, "weights": len(expected)}


def _same_bits(base: Array, merged: Array) -> bool:
    """Whether two arrays of one dtype and shape are the same memory, or hold the same bytes."""
    if base.__array_interface__["data"] == merged.__array_interface__["data"] and base.strides == merged.strides:
        return True
    own, other = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (base, merged))
    return np.array_equal(own, other)


def _explain(name: str, base: Array, merged: Array, expected: Sequence[_Expected]) -> None:
    """Find the site whose weight `base` is and mark what was found of it, or raise `ExportError`."""
    found: tuple[float, str] | None = None
    difference = merged.astype(np.float64) - base.astype(np.float64)
    for entry, place in _places(base, expected):
        order, part = place
        delta, tolerance = (value.transpose(order)[part] for value in entry.update())
        excess = float((np.abs(difference.reshape(delta.shape) - delta) - tolerance).max())
        if excess <= 0:
            entry.mark(place)
            return
        if found is None or not found[0] <= excess:
            found = (excess, entry.weight)
    if found is None:
        raise ExportError(f"the exported file changed {name}, of shape {base.shape}, which is no adapted weight.")
    raise ExportError(
        f"the exported file changed {found[1]} (as {name}) by something else than its ΔW: an entry is off by"
        f" {found[0]:.3g} beyond rounding."
    )


def _places(part: Array, expected: Sequence[_Expected]) -> Iterator[tuple[_Expected, Place]]:
    """Weights that `part` is by content, whole ones first, then those that it is a slice of."""
    for search in (_whole, _slices):
        for entry in expected:
            for order in permutations(range(entry.before.ndim)):
                turned = entry.before.transpose(order)
                yield from ((entry, (order, place)) for place in search(part, turned))


def _whole(part: Array, whole: Array) -> Iterator[tuple[slice, ...]]:
    if part.size == whole.size and (part.shape == whole.shape or part.ndim != whole.ndim):
        part = part.reshape(whole.shape)
        if np.array_equal(part[:1], whole[:1]) and np.array_equal(part, whole):
            yield (slice(None),) * whole.ndim


def _slices(part: Array, whole: Array) -> Iterator[tuple[slice, ...]]:
    """Slices of `whole` along one dimension (or an index into it) that are `part`."""
    if part.ndim == whole.ndim:
        yield from _offsets(part, whole)
    elif part.ndim == whole.ndim - 1:
        for dim in range(whole.ndim):
            yield from _offsets(np.expand_dims(part, dim), whole)


def _offsets(part: Array, whole: Array) -> Iterator[tuple[slice, ...]]:
    cut = [dim for dim in range(whole.ndim) if part.shape[dim] != whole.shape[dim]]
    if len(cut) != 1 or part.shape[cut[0]] > whole.shape[cut[0]]:
        return
    dim, size = cut[0], part.shape[cut[0]]
    place = [slice(None)] * whole.ndim
    rest = tuple(other for other in range(whole.ndim) if other != dim)
    for start in np.flatnonzero((whole == part.take([0], axis=dim)).all(axis=rest)):
        place[dim] = slice(int(start), int(start) + size)
        if int(start) + size <= whole.shape[dim] and np.array_equal(whole[tuple(place)], part):
            yield tuple(place)
