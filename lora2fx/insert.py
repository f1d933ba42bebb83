"""An insert: a trained module behind a site's matmul, y → y + insert(y). No ΔW equals it, so that it never folds."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from lora2fx.site import Site


class Insert(nn.Module):
    """What is added to the output y of a site's matmul, as a function of y. All its parameters 0: it adds 0."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    @abstractmethod
    def forward(self, y: Tensor) -> Tensor:
        """y (..., out) → (..., out), in the insert's dtype."""
