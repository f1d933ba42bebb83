"""One weight and what is to be added to it, and whether it can be; the adding is in `adding`."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lora2fx.adapter import Adapter
from lora2fx.errors import AdapterError
from lora2fx.passes.rounding import round_once
from lora2fx.passes.tiles import Factors, tiles
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

    @cached_property
    def exact(self) -> dict[str, Adapter]:
        """The adapters in float64 on the weight's device, as they are when this is first asked for."""
        exact = {name: adapter.exact() for name, adapter in self.adapters.items()}
        elsewhere = any(next(twin.parameters()).device != self.weight.device for twin in exact.values())
        return {name: twin.to(self.weight.device) for name, twin in exact.items()} if elsewhere else exact

    def factors(self, dtype: torch.dtype = torch.float64) -> Factors:
        """All updates as one."""
        return Factors(list(self.exact.values()), dtype)

    def seed(self, seed: int) -> int:
        """A seed of the weight's own, whatever the order that weights are folded in; 32 bits are all that count."""
        name = next(iter(self.adapters.values())).site.weight
        return zlib.crc32(f"{seed} {name}".encode())


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
        if tuple(weight.shape) != adapter.site.shape:
            raise AdapterError(
                f"fold: {adapter.site.weight} was {adapter.site.shape} when it was adapted and is {tuple(weight.shape)}"
                " now. Put a weight of the old shape back, or lora2fx.unload(model); the model is as it was."
            )
        bad = [path for path, value in adapter.named_parameters() if not value.detach().isfinite().all()]
        if bad:
            raise AdapterError(
                f"fold: {', '.join(bad)} of the adapter {name} on {adapter.site.weight} holds NaN or infinity. Go back"
                " to a checkpoint before the run diverged, or lora2fx.unload(model); the model is as it was."
            )


def largest(weight: Tensor) -> Tensor:
    """The largest magnitude, a float64 scalar; NaN where there is one."""
    wide = weight if weight.element_size() > 1 else weight.float()  # the 8-bit floats have no aminmax
    return torch.stack(torch.aminmax(wide)).abs().amax().double()


def _overflows(merge: Merge) -> bool:
    factors, dtype = merge.factors(), merge.weight.dtype
    cut = tiles(merge.weight.shape, factors.limit)
    sums = (factors.tile(tile).add_(merge.weight.detach()[tile]) for tile in cut)
    return not all(round_once(total, dtype).isfinite().all() for total in sums)


@torch.no_grad()
def check_merges(found: Sequence[Merge]) -> None:
    """Raise `AdapterError`, naming the site, where a weight can't take its ΔW; nothing is written."""
    for merge in found:
        _refuse_unfoldable(merge)
        if not merge.weight.numel():
            continue
        own = largest(merge.weight.detach())
        bound = own + merge.factors().largest()
        if not bound <= torch.finfo(merge.weight.dtype).max and _overflows(merge):
            dtype = merge.weight.dtype
            cause = f"W + ΔW leaves {dtype}" if own.isfinite() else "the base weight holds NaN or infinity"
            raise AdapterError(
                f"fold: {merge.names}: {cause}. Convert the model to a wider dtype, or lora2fx.unload(model);"
                " the model is as it was."
            )
