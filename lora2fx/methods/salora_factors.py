"""SaLoRA's factorisation: a Hard-Concrete gate between two factors, one graph for training and evaluation."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from lora2fx.adapter import Axis
from lora2fx.methods.two_factors import FACTORS, TwoFactorAdapter, mean_over_stack
from lora2fx.site import Site
from lora2fx.training.hard_concrete import HardConcrete


class SaLoRAAdapter(TwoFactorAdapter):
    """c = a Hard-Concrete gate of log_theta (*batch, r).

    The forward reads `noise` and `temperature`, so that training and evaluation share one graph: in train mode they
    are `sample` and `sample_temperature` of this step, in eval mode 0.5 and 1, which is the evaluation gate.
    `multipliers` (2,): the Lagrangian's linear and quadratic ones, the same in every adapter.
    """

    gated_by = ("mask", "noise", "temperature")
    noise: Tensor
    temperature: Tensor
    sample: Tensor
    sample_temperature: Tensor
    multipliers: Tensor

    def __init__(
        self, site: Site, A: nn.Parameter, B: nn.Parameter, log_theta: nn.Parameter, gates: HardConcrete, scale: float
    ) -> None:
        super().__init__(site, A, B, scale, 0.0)
        self.gates = gates
        self.log_theta = log_theta
        for name, persistent in (("noise", False), ("sample", True)):
            self.register_buffer(name, torch.full_like(log_theta.detach(), 0.5), persistent=persistent)
        for name, persistent in (("temperature", False), ("sample_temperature", True)):
            self.register_buffer(name, log_theta.detach().new_ones(()), persistent=persistent)
        self.register_buffer("multipliers", log_theta.detach().new_zeros(2))
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    def gate(self) -> Tensor:
        """s · g · mask (*batch, r)"""
        return self.gates.gate(self.log_theta, self.noise, self.temperature) * self.mask * self.scale

    @property
    def lambdas(self) -> Tensor:
        """The evaluation gate (r,), 0 where pruned; of a stack of matrices the mean"""
        return mean_over_stack(self.gates.evaluation_gate(self.log_theta.detach()) * (self.mask & self.keep))

    def axes(self) -> dict[str, Axis]:
        """The gates."""
        along = (("log_theta", -1), *FACTORS)
        return {"gate": Axis(self.mask, self.keep, (("log_theta", -1),), along=along)}

    def train(self, mode: bool = True) -> Self:
        """Train mode samples, eval mode doesn't."""
        super().train(mode)
        self.show_noise()
        return self

    def set_noise(self, noise: Tensor | None) -> None:
        """Train with this noise; None trains with the evaluation gate."""
        if noise is None:
            self.sample.fill_(0.5)
        else:
            self.sample.copy_(noise)
        self.sample_temperature.fill_(1.0 if noise is None else self.gates.tau)
        self.show_noise()

    def show_noise(self) -> None:
        """Write what the forward of the present mode reads."""
        if self.training:
            self.noise.copy_(self.sample)
            self.temperature.copy_(self.sample_temperature)
        else:
            self.noise.fill_(0.5)
            self.temperature.fill_(1.0)

    def compact(self) -> None:
        """Drop masked ranks physically, their noise too."""
        kept = self.mask.nonzero().flatten()
        for name, persistent in (("noise", False), ("sample", True)):
            self.register_buffer(name, self.get_buffer(name).index_select(-1, kept), persistent=persistent)
        super().compact()


def _after_load(adapter: nn.Module, incompatible: Any) -> None:
    assert isinstance(adapter, SaLoRAAdapter)
    adapter.show_noise()
