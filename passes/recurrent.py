"""Recurrent layers: their kernels take all weights in one list, which no attribute read fills anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lora2fx.passes.uses import OUT_IN
from lora2fx.site import Site


def recurrent_sites(model: nn.Module, weights: Iterable[str]) -> tuple[Site, ...]:
    """A site for each of `weights` that a recurrent layer multiplies its input, its state or its output by."""
    return tuple(site for weight in weights if (site := _site(model, weight)) is not None)


def _site(model: nn.Module, weight: str) -> Site | None:
    path, _, parameter = weight.rpartition(".")
    owner = model.get_submodule(path)
    if not isinstance(owner, nn.RNNBase) or parameter not in owner._flat_weights_names:
        return None
    shape = tuple(owner.get_parameter(parameter).shape)
    return Site(weight, path, parameter, shape, OUT_IN, evidence=f"a weight of an {owner.mode}'s kernel")


def _read(self: Any) -> list[Tensor | None]:
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _write(self: Any, value: list[Tensor | None]) -> None:
    """Keep the parameters themselves: W + ΔW is of one forward only."""
    vars(self)["_flat_weights"] = [self._parameters.get(name) for name in self._flat_weights_names]


FLAT_WEIGHTS = property(_read, _write, doc="The kernel's weights, each read by its name.")
