"""Adapters ↔ named tensors: what an adapter saves, and an adapter made of exactly what was saved."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from lora2fx.adapter import Adapter
from lora2fx.errors import FormatError
from lora2fx.program import Method
from lora2fx.site import Site

SPARE = 2**20
PRUNED = 256
"""How many times as many elements as are saved an adapter may have had before it was pruned, and `SPARE` more."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def adapter_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The parameters and persistent buffers to save, by name; what only training reads stays out."""
    state: dict[str, Tensor] = adapter.state_dict(keep_vars=True)
    left_out = adapter.training_state()
    return {name: value for name, value in state.items() if name not in left_out}


def blueprint(method: Method, site: Site) -> Adapter:
    """The adapter that the method makes for the site, without memory. Raises `FormatError` where it can't."""
    try:
        with torch.device("meta"):
            adapter = method.adapter(site)
    except Exception as error:
        raise FormatError(f"{method} makes no adapter for {site.weight}: {type(error).__name__}: {error}") from error
    size, limit = sum(value.numel() for value in adapter.state_dict().values()), SPARE + 4 * prod(site.shape)
    if size > limit:
        raise FormatError(f"{method} makes an adapter of {size} elements for {site.weight}, where {limit} are plenty.")
    return adapter


def _mask_lengths(path: str, adapter: Adapter, found: Mapping[str, Tensor]) -> dict[str, int]:
    """By axis the length of its saved mask: shorter than the adapter's own where ranks were pruned."""
    buffers, lengths = dict(adapter.named_buffers()), {}
    for axis, own in adapter.axes().items():
        name = next(name for name, value in buffers.items() if value is own.mask)
        mask, most = found[name], own.mask.numel()
        if mask.dim() != 1 or mask.numel() > most:
            raise FormatError(
                f"{path}.{name} has the shape {tuple(mask.shape)} in the file; at most ({most},) is right."
            )
        lengths[axis] = mask.numel()
    return lengths


def _check_size(path: str, plan: Adapter, found: Mapping[str, Tensor]) -> None:
    """Making the method's unpruned adapter must not cost much more than the file's own tensors did."""
    size, saved = (sum(value.numel() for value in held.values()) for held in (plan.state_dict(), found))
    if size > 4 * SPARE + PRUNED * saved:
        raise FormatError(
            f"{path}: the method makes {size} elements of which the file holds {saved}: not this method's."
        )


def _shortened(method: Method, site: Site, lengths: Mapping[str, int]) -> Adapter:
    """A fresh adapter with so many entries on each axis; no random number is drawn."""
    with torch.random.fork_rng(devices=[]):
        adapter = method.adapter(site)
    for name, axis in adapter.axes().items():
        axis.mask.copy_(torch.arange(axis.mask.numel()) < lengths[name])
    adapter.compact()
    return adapter


def _check_tensors(path: str, adapter: Adapter, found: Mapping[str, Tensor]) -> torch.dtype:
    """The factors' dtype; `FormatError` unless shapes, dtypes and values are what this adapter can hold."""
    own = adapter_tensors(adapter)
    dtypes = {found[name].dtype for name, value in own.items() if value.is_floating_point()}
    dtype = next(iter(dtypes))
    if len(dtypes) > 1 or dtype not in FLOATS:
        raise FormatError(f"{path}: its factors are of {', '.join(map(str, dtypes))}, not of one floating-point dtype.")
    for name, value in own.items():
        wanted = dtype if value.is_floating_point() else value.dtype
        check_tensor(f"{path}.{name}", found[name], tuple(value.shape), wanted)
    return dtype


def saved_adapter(
    path: str,
    method: Method,
    site: Site,
    found: Mapping[str, Tensor],
    progress: tuple[int, int, int],
    device: torch.device,
) -> Adapter:
    """The method's adapter with exactly the saved tensors, zero averages, and its progress.

    Raises `FormatError` where names, shapes, dtypes or values are not what the method's adapter of the site has.
    """
    plan = blueprint(method, site)
    check_names(path, found, set(adapter_tensors(plan)))
    _check_size(path, plan, found)
    adapter = _shortened(method, site, _mask_lengths(path, plan, found))
    dtype = _check_tensors(path, adapter, found)
    adapter.to(device=device, dtype=dtype)
    averages = {name: torch.zeros_like(value) for name, value in adapter.state_dict().items() if name not in found}
    adapter.load_state_dict({**averages, **found, "progress": torch.tensor(progress, dtype=torch.int64)})
    return adapter


def check_names(path: str, found: Mapping[str, Tensor], wanted: set[str]) -> None:
    """Raise `FormatError` unless the names are exactly those wanted."""
    if odd := sorted(wanted ^ set(found)):
        kind = "lacks" if odd[0] in wanted else "has an unknown"
        raise FormatError(f"{path}: the file {kind} {odd[0]!r} ({len(odd)} such names in all).")


def check_tensor(name: str, found: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise `FormatError` unless the tensor has this shape and dtype, and finite values (a bool 0 or 1)."""
    if tuple(found.shape) != shape:
        raise FormatError(f"{name} has the shape {tuple(found.shape)} in the file; it must be {shape}.")
    if found.dtype != dtype:
        raise FormatError(f"{name} is {found.dtype} in the file; it must be {dtype}.")
    if dtype == torch.bool and bool((found.view(torch.uint8) > 1).any()):
        raise FormatError(f"{name} holds bytes that are neither true nor false.")
    if not bool(found.isfinite().all()):
        raise FormatError(f"{name} holds NaN or infinity.")
