"""W + ΣΔW, written into the weight's own storage: summed in float64, rounded once, checked before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora2fx.adapter import Adapter
from lora2fx.errors import AdapterError
from lora2fx.passes.rounding import round_once
from lora2fx.passes.tiles import Factors, Tile, positions, tiles
from lora2fx.program import Program


@dataclass(frozen=True)
class Merge:
    """One weight and every adapter that adds to it: three for a fused QKV."""

    weight: nn.Parameter
    adapters: dict[str, Adapter]

    @property
    def names(self) -> str:
        """The weight and its roles, for messages."""
        return ", ".join(f"{adapter.site.weight} ({adapter.site.role})" for adapter in self.adapters.values())

    def factors(self) -> dict[str, Factors]:
        """Every adapter's factors in float64, on the weight's device."""
        return {name: Factors(adapter, self.weight.device) for name, adapter in self.adapters.items()}


def site_weight(program: Program, adapter: Adapter) -> nn.Parameter:
    """The Parameter itself, W without ΔW even where reading the attribute gives W + ΔW."""
    weight = program.root.get_submodule(adapter.site.owner)._parameters[adapter.site.parameter]
    assert weight is not None
    return weight


def is_foldable(weight: Tensor) -> bool:
    """Whether ΔW can be added in place: a plain dense floating-point tensor with storage."""
    plain = type(weight.data) is Tensor and weight.layout == torch.strided
    return plain and weight.is_floating_point() and not weight.is_meta


def merges(program: Program) -> list[Merge]:
    """The program's adapters, grouped by the weight that they add to."""
    groups: dict[nn.Parameter, dict[str, Adapter]] = defaultdict(dict)
    for name, adapter in program.adapters.items():
        groups[site_weight(program, adapter)][name] = adapter
    return [Merge(weight, adapters) for weight, adapters in groups.items()]


def _refuse_unfoldable(merge: Merge) -> None:
    weight = merge.weight.detach()
    if not is_foldable(weight):
        kind = type(weight.data).__name__ if weight.is_floating_point() else str(weight.dtype)
        raise AdapterError(
            f"fold: {merge.names} is a {kind} on {weight.device}, to which nothing can be added in place. Gather or"
            " dequantise the weight first; the model is as it was."
        )
    for name, adapter in merge.adapters.items():
        bad = [path for path, value in adapter.named_parameters() if not value.detach().isfinite().all()]
        if bad:
            raise AdapterError(
                f"fold: {', '.join(bad)} of the adapter {name} on {adapter.site.weight} holds NaN or infinity. Go back"
                " to a checkpoint before the run diverged, or lora2fx.unload(model); the model is as it was."
            )


def _largest(weight: Tensor) -> Tensor:
    wide = weight if weight.element_size() > 1 else weight.float()  # the 8-bit floats have no aminmax
    return torch.stack(torch.aminmax(wide)).abs().amax().double()


def _overflows(merge: Merge) -> bool:
    factors = merge.factors().values()
    for tile in tiles(merge.weight.shape):
        total = merge.weight.detach()[tile].double() + sum(own.tile(tile) for own in factors)
        if not round_once(total, merge.weight.dtype).isfinite().all():
            return True
    return False


@torch.no_grad()
def check_merges(found: Sequence[Merge]) -> None:
    """Raise `AdapterError`, naming the site, where a weight can't take its ΔW; nothing is written."""
    for merge in found:
        _refuse_unfoldable(merge)
        if not merge.weight.numel():
            continue
        largest = _largest(merge.weight.detach())
        bound = largest + sum(factors.largest() for factors in merge.factors().values())
        if not bound <= torch.finfo(merge.weight.dtype).max and _overflows(merge):
            dtype = merge.weight.dtype
            cause = f"W + ΔW leaves {dtype}" if largest.isfinite() else "the base weight holds NaN or infinity"
            raise AdapterError(
                f"fold: {merge.names}: {cause}. Convert the model to a wider dtype, or lora2fx.unload(model);"
                " the model is as it was."
            )


def _own_columns(adapter: Adapter, part: Tensor, tile: Tile) -> Tensor:
    """The elements of a tile in the site's own output columns."""
    if adapter.columns is None:
        return part
    free = adapter.site.layout.free
    matrix = part.permute([dim for dim in range(part.dim()) if dim not in free] + list(free)).flatten(-len(free))
    columns = positions(adapter.site.shape, free, tile).to(part.device)
    return matrix[..., torch.isin(columns, adapter.columns.to(part.device))]


def _write(merge: Merge) -> dict[str, dict[str, float]]:
    weight, factors = merge.weight.detach(), merge.factors()
    energy = {name: weight.new_zeros((), dtype=torch.float64) for name in factors}
    lost = {name: value.clone() for name, value in energy.items()}
    for tile in tiles(weight.shape):
        part = weight[tile]
        total = part.to(torch.float64, copy=True)
        for name, own in factors.items():
            delta = own.tile(tile)
            energy[name] += torch.linalg.vector_norm(delta).square()
            total += delta
        rounded = round_once(total, weight.dtype)
        part.copy_(rounded)
        total -= rounded
        for name, adapter in merge.adapters.items():
            lost[name] += torch.linalg.vector_norm(_own_columns(adapter, total, tile)).square()
    norms = {name: float(value) ** 0.5 for name, value in energy.items()}
    return {
        name: {"delta_norm": norm, "rounding_error": float(lost[name]) ** 0.5 / norm if norm else 0.0}
        for name, norm in norms.items()
    }


@torch.no_grad()
def write_merges(found: Sequence[Merge]) -> dict[str, dict[str, float]]:
    """Write every merge, checked before; by adapter its `delta_norm` and `rounding_error` (see `fold_adapters`)."""
    written: dict[str, dict[str, float]] = {}
    for merge in found:
        written |= _write(merge)
    return written
