"""Adapters ↔ named tensors: what an adapter saves, and an adapter made of exactly what was saved."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora2fx.adapter import Adapter
from lora2fx.errors import FormatError
from lora2fx.program import Method
from lora2fx.site import Site

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _left_out(adapter: Adapter) -> set[str]:
    """What is not in the file: the averages (training state), and the progress, which adapter.json tells."""
    parameters = dict(adapter.named_parameters())
    return {"progress"} | {f"{name}_{kind}" for name in parameters for kind in ("sensitivity", "uncertainty")}


def adapter_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The parameters and persistent buffers to save, by name."""
    state: dict[str, Tensor] = adapter.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if name not in _left_out(adapter)}


def blueprint(method: Method, site: Site) -> Adapter:
    """The adapter that the method makes for the site, without memory. Raises `FormatError` where it can't."""
    try:
        with torch.device("meta"):
            return method.adapter(site)
    except Exception as error:
        raise FormatError(f"{method} makes no adapter for {site.weight}: {type(error).__name__}: {error}") from error


def _shapes(adapter: Adapter, found: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes that the saved tensors must have: the adapter's own, its axes as long as their saved masks."""
    wanted = {name: list(value.shape) for name, value in adapter_tensors(adapter).items()}
    buffers = dict(adapter.named_buffers())
    for axis in adapter.axes().values():
        mask = next(name for name, value in buffers.items() if value is axis.mask)
        saved = found[mask]
        if saved.dim() != 1 or saved.numel() > axis.mask.numel():
            continue
        for name, dim in axis.along:
            wanted[name][dim] = saved.numel()
        for name, value in buffers.items():
            if value is axis.mask or value is axis.keep:
                wanted[name] = [saved.numel()]
    return {name: tuple(shape) for name, shape in wanted.items()}


def check_tensors(path: str, adapter: Adapter, found: Mapping[str, Tensor]) -> None:
    """Raise `FormatError` unless `found` are exactly the adapter's tensors: names, shapes, dtypes, finite values."""
    own = adapter_tensors(adapter)
    check_names(path, found, set(own))
    shapes = _shapes(adapter, found)
    dtypes = {found[name].dtype for name, value in own.items() if value.is_floating_point()}
    for name, value in own.items():
        dtype = next(iter(dtypes)) if value.is_floating_point() else value.dtype
        if value.is_floating_point() and (len(dtypes) > 1 or dtype not in FLOATS):
            raise FormatError(
                f"{path}: its factors are of {', '.join(map(str, dtypes))}, not of one floating-point dtype."
            )
        check_tensor(f"{path}.{name}", found[name], shapes[name], dtype)


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


def materialise(
    adapter: Adapter, found: Mapping[str, Tensor], progress: tuple[int, int, int], device: torch.device
) -> None:
    """Give a blueprint the saved tensors, zero averages, and its progress, in place."""
    for name, parameter in list(adapter.named_parameters()):
        owner, own = _place(adapter, name)
        owner.register_parameter(own, nn.Parameter(found[name].to(device), parameter.requires_grad))
    parameters = dict(adapter.named_parameters())
    averages = {f"{n}_{kind}": n for n in parameters for kind in ("sensitivity", "uncertainty")}
    for name, _ in list(adapter.named_buffers()):
        owner, own = _place(adapter, name)
        if name in found:
            owner._buffers[own] = found[name].to(device)
        elif name in averages:
            owner._buffers[own] = torch.zeros_like(parameters[averages[name]].detach())
    adapter._buffers["progress"] = torch.tensor(progress, dtype=torch.int64, device=device)
    columns = adapter.site.column_index()
    adapter._buffers["columns"] = None if columns is None else columns.to(device)
    left = [name for name, value in adapter.named_buffers() if value.is_meta]
    if left:
        raise FormatError(
            f"{type(adapter).__name__} keeps {left[0]!r} out of its state_dict, so that it can't be loaded."
        )


def _place(adapter: Adapter, name: str) -> tuple[nn.Module, str]:
    path, _, own = name.rpartition(".")
    return adapter.get_submodule(path), own
