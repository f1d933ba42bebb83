"""W + ΣΔW, written into the weight's own storage and rounded once to its dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lora2fx.passes.adaptive_rounding import round_keeping
from lora2fx.passes.lanes import Sample, Update, from_lanes, site_lanes
from lora2fx.passes.merging import Merge
from lora2fx.passes.rounding import Rounding, round_once, round_stochastically
from lora2fx.passes.tiles import tiles

_LANES = 2**20
"""Elements of a weight that are rounded for the adapter at a time."""
_SUMMED_FIRST, _LEAST_SIDE = 128, 64
"""Up to so many products, on matrices that are not small, a BLAS sums before it adds them to the weight."""


@contextmanager
def _full_products() -> Iterator[None]:
    """float32 products in float32, whatever the user lets his own be: no TF32, no bfloat16, no autocast."""
    mkldnn: Any = torch.backends.mkldnn
    backends = (mkldnn.matmul, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _shares(view: Tensor, weight: Tensor) -> bool:
    return view.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


def _write_wide(merge: Merge) -> None:
    """A float32 or float64 weight: ΔW made in its dtype and added, in one rounding."""
    weight = merge.weight.detach()
    factors = merge.factors(weight.dtype)
    matrix, k = factors.site.to_matrix(weight), factors.left.shape[-1]
    if k <= _SUMMED_FIRST and min(matrix.shape[-2:]) >= _LEAST_SIDE and _shares(matrix, weight):
        add = torch.baddbmm if matrix.dim() == 3 else torch.addmm
        add(matrix, factors.left, factors.right, out=matrix)
        return
    for tile in tiles(weight.shape, factors.limit):
        weight[tile].add_(factors.tile(tile))


def _write_nearest(merge: Merge) -> None:
    """A weight of fewer bits: summed in float64, rounded once."""
    weight, factors = merge.weight.detach(), merge.factors()
    for tile in tiles(weight.shape, factors.limit):
        part = weight[tile]
        part.copy_(round_once(factors.tile(tile).add_(part), weight.dtype))


def _write_stochastically(merge: Merge, seed: int) -> None:
    weight, factors = merge.weight.detach(), merge.factors()
    generator = torch.Generator(weight.device).manual_seed(merge.seed(seed))
    for tile in tiles(weight.shape, factors.limit):
        part = weight[tile]
        part.copy_(round_stochastically(factors.tile(tile).add_(part), weight.dtype, generator))


def _write_keeping(merge: Merge) -> None:
    weight = merge.weight.detach()
    for adapter in merge.exact.values():
        update = Update.of(adapter)
        lanes = site_lanes(update.site, weight)
        parts = (lanes, update.space.float(), update.response.float())
        stacks = parts if update.site.batch_shape else [part.unsqueeze(0) for part in parts]
        for matrix, space, response in zip(*stacks, strict=True):
            _write_lanes(matrix, space, response, update.lanes)
        if not _shares(lanes, weight):
            weight.copy_(from_lanes(update.site, lanes))


def _write_lanes(matrix: Tensor, space: Tensor, response: Tensor, own: Tensor) -> None:
    for chunk in torch.arange(own.numel(), device=own.device).split(max(1, _LANES // max(1, matrix.shape[0]))):
        total = matrix[:, own[chunk]].float() + space @ response[:, chunk]
        matrix[:, own[chunk]] = round_keeping(total, space, response[:, chunk].norm(dim=0), matrix.dtype)


@torch.no_grad()
def write_merge(merge: Merge, rounding: Rounding = "nearest", seed: int = 0) -> None:
    """Write one merge that was checked before; `rounding` is for dtypes below 32 bits, all others round to nearest."""
    with _full_products():
        if merge.weight.dtype.itemsize >= 4:
            _write_wide(merge)
        elif rounding == "nearest":
            _write_nearest(merge)
        elif rounding == "stochastic":
            _write_stochastically(merge, seed)
        else:
            _write_keeping(merge)


@torch.no_grad()
def write_measured(merge: Merge, rounding: Rounding = "nearest", seed: int = 0) -> dict[str, dict[str, Any]]:
    """`write_merge`, and by adapter what it did to the site (see `fold_adapters`)."""
    weight = merge.weight.detach()
    samples = {name: Sample.of(weight, Update.of(own)) for name, own in merge.exact.items()}
    write_merge(merge, rounding, seed)
    used = rounding if weight.dtype.itemsize < 4 else "nearest"
    return {name: sample.measure(weight) | {"rounding": used} for name, sample in samples.items()}
