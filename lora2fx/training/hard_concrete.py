"""Hard-Concrete gates (Louizos et al., arXiv 1712.01312), as SaLoRA's eqs. (7) and (8) use them."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor


@dataclass(frozen=True)
class HardConcrete:
    """A sigmoid of temperature τ stretched to (γ, ζ) and clipped to [0, 1]."""

    tau: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1

    def gate(self, log_theta: Tensor, noise: Tensor, temperature: Tensor | float) -> Tensor:
        """A sample for uniform `noise` at `temperature` τ; noise 0.5 at temperature 1 is the evaluation gate."""
        stretched = torch.sigmoid((torch.log(noise / (1 - noise)) + log_theta) / temperature)
        return (stretched * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)

    def evaluation_gate(self, log_theta: Tensor) -> Tensor:
        """The deterministic gate: no noise, no τ."""
        return (torch.sigmoid(log_theta) * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)

    def probability(self, log_theta: Tensor) -> Tensor:
        """P(gate ≠ 0), the expected L0 of an entry."""
        return torch.sigmoid(log_theta - self.tau * log(-self.gamma / self.zeta))
