"""SoRA's proximal step (arXiv 2311.11696, eqs. 10 and 11): after the optimizer's, gates are drawn to exact zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from warnings import warn

import torch
from torch import Tensor

from lora2fx.adapter import Adapter
from lora2fx.errors import Lora2fxWarning
from lora2fx.sharding import whole
from lora2fx.training.slots import Step

XiMode = Literal["lr", "absolute"]
XI_MODES = ("lr", "absolute")


def soft_threshold(values: Tensor, xi: float) -> Tensor:
    """T_ξ(x) = sign(x) · max(|x| - ξ, 0); ±ξ itself becomes 0."""
    return torch.nn.functional.softshrink(values, xi)


@dataclass(frozen=True)
class SoftThreshold:
    """Threshold the axis' value after every step by ξ, or by ξ times its learning rate (`mode="lr"`, eq. 10).

    Several `xi` are SoRA's sparsifying schedule: the first for `first_share` of the run, the rest for equal shares
    of what is left. A value that is exactly 0 is pruned, and may grow back until the run's last step.
    """

    axis: str
    xi: tuple[float, ...]
    mode: XiMode = "lr"
    first_share: float = 0.5

    def check(self, adapters: Sequence[Adapter], total_steps: int) -> None:
        """Any run will do."""

    def begin(self, adapters: Sequence[Adapter], total_steps: int) -> None:
        """Nothing: gates start as they were drawn."""

    def before_step(self, adapters: Sequence[Adapter], step: Step) -> None:
        """Warn once a run where the factors' weight decay is 0."""
        if step.index == 0 and not all(
            step.group(parameter)["weight_decay"] for parameter in _factors(adapters[0], self.axis)
        ):
            warn(
                "SoRA without weight decay on the factors hardly prunes: they grow as the gates shrink."
                " torch.optim.AdamW(lora2fx.param_groups(model, lr)) decays them by 0.1, and spares the gates.",
                Lora2fxWarning,
                stacklevel=2,
            )

    @torch.no_grad()
    def after_step(self, adapters: Sequence[Adapter], step: Step) -> None:
        """Threshold, and record what is left; in the last step as the mask."""
        for adapter in adapters:
            axis = adapter.axes()[self.axis]
            assert axis.value is not None
            scale = float(step.group(axis.value)["lr"]) if self.mode == "lr" else 1.0
            axis.value.copy_(soft_threshold(axis.value, self.threshold(step.index, step.total) * scale))
            left = whole(axis.value) != 0
            axis.keep.copy_(left if left.dim() == 1 else left.any(0))
            if step.last:
                axis.mask.copy_(axis.keep)

    def threshold(self, step: int, total_steps: int) -> float:
        """ξ at a step."""
        first = self.first_share * total_steps
        rest = len(self.xi) - 1
        if rest == 0 or step < first:
            return self.xi[0]
        return self.xi[min(rest, 1 + int((step - first) * rest / (total_steps - first)))]

    def budgets(self, adapters: Sequence[Adapter], step: int, total_steps: int) -> dict[str, int]:
        """None: what is left is what ξ leaves."""
        return {}

    def finished(self, step: int, total_steps: int) -> bool:
        """Always: every step is thresholded, and what the last one left is what there is."""
        return True

    @torch.no_grad()
    def finish(self, adapters: Sequence[Adapter]) -> None:
        """What is 0 stays 0."""
        for adapter in adapters:
            axis = adapter.axes()[self.axis]
            axis.mask.copy_(axis.keep)


def _factors(adapter: Adapter, axis: str) -> list[Tensor]:
    found = adapter.axes()[axis]
    return [p for name, _ in found.along if (p := adapter.get_parameter(name)) is not found.value and p.requires_grad]
