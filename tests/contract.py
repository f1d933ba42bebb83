"""Every method, and one made of the parts of two, set up for a run of twelve steps in which something is pruned."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import lora2fx
from lora2fx.methods.adalora import AdaLoRA
from lora2fx.methods.alora import ALoRA
from lora2fx.methods.lora import LoRA
from lora2fx.methods.lora2 import LoRA2
from lora2fx.methods.lora2_factors import LoRA2Adapter
from lora2fx.methods.lora2_penalty import PLANES, lora2_penalty
from lora2fx.methods.salora import SaLoRA
from lora2fx.methods.sora import SoRA
from lora2fx.site import Site
from lora2fx.training.proximal import SoftThreshold
from lora2fx.training.slots import Groups, Training

STEPS = 12
BUDGET = {"tinit": 2, "tfinal": 4, "deltaT": 2}


@dataclass(frozen=True)
class GatedPlanes:
    """LoRA2's factors with SoRA's proximal step on λ: a method made of two others' parts, and nothing else."""

    r: int = 4
    k: int = 3
    xi: float = 0.1

    def adapter(self, site: Site) -> LoRA2Adapter:
        """u v diag(λ) U V with λ = 1, V = 0."""
        return LoRA2Adapter(site, self.r, self.k, 1.0, "identity", 0.0)

    def training(self) -> Training:
        """Orthogonality of the planes, and the soft threshold."""
        threshold = SoftThreshold("lambda", (self.xi,), "absolute")
        penalty = lora2_penalty(0.01, ("u", "v", "U"), PLANES, "mean")
        return Training(penalty, (threshold,), groups=Groups(weight_decay=0.1))


METHODS = {
    "LoRA": LoRA(r=3),
    "LoRA2": LoRA2(r=4, k=3, target_r=2, **BUDGET),
    "LoRA2, columns": LoRA2(r=4, k=3, target_k=1, init="zero_out", **BUDGET),
    "LoRA2, defaults": LoRA2(r=4, **BUDGET),
    "LoRA2, by budget": LoRA2(r=4, budget="columns", target_k=1, **BUDGET),
    "LoRA2, both": LoRA2(r=4, k=3, target_r=2, target_k=2, sensitivity="task", **BUDGET),
    "LoRA2, local": LoRA2(r=4, k=3, target_r=2, budget_scope="local", reset_moments_on_mask=True, **BUDGET),
    "LoRA2, published": LoRA2.paper(r=4, k=3, target_r=2, **BUDGET),
    "AdaLoRA": AdaLoRA(r=4, target_r=2, **BUDGET),
    "SoRA": SoRA(r=4, xi=0.04, xi_mode="absolute"),
    "SaLoRA": SaLoRA(r=4, log_theta=-1.5, gate_lr=8.0, tinit=2, tfinal=4, density_warmup=3),
    "ALoRA": ALoRA(r=2, n_prune=3, cycles=2, tinit=3, deltaT=3),
    "ALoRA, undoing": ALoRA(r=2, n_prune=3, cycles=3, tinit=2, deltaT=2, rollback=True),
    "LoRA2 factors, SoRA gate": GatedPlanes(),
}


def drive(model, method, total=STEPS, lr=0.05):
    """An optimizer as `param_groups` says, attached; ALoRA's validation batch is the last of `batches`."""
    optimizer = torch.optim.AdamW(lora2fx.param_groups(model, lr))
    attachment = lora2fx.attach(model, optimizer, total_steps=total)
    attachment.evaluate = lambda: validate(model)
    return optimizer, attachment


def batches(count, shape, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64)


VALIDATION = batches(1, (5, 7, 4), seed=11)[0]


def loss_of(output):
    """Moves every output towards a fixed pattern."""
    target = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return (output - target).square().mean()


@torch.no_grad()
def validate(model):
    """-loss of one fixed batch in eval mode."""
    training = model.training
    score = -float(loss_of(model.eval()(VALIDATION)))
    model.train(training)
    return score


def run(model, optimizer, data, first=0):
    """Train mode, dropout drawn anew from each step's number."""
    model.train()
    for index, x in enumerate(data, first):
        torch.manual_seed(index)
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
