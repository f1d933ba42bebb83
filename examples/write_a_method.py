"""A method of your own: VeRA (arXiv 2310.11454), ΔW = A diag(d) B diag(b), A and B random and frozen; d is pruned."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lora2fx
from lora2fx.adapter import Adapter, Axis
from lora2fx.site import Site
from lora2fx.training.allocator import BudgetAllocator
from lora2fx.training.schedule import CubicSchedule
from lora2fx.training.slots import Training


class VeRAAdapter(Adapter):
    """A (in, r) and B (r, out) frozen, d (r,) = 0.1 and b (out,) = 0 trained."""

    def __init__(self, site: Site, r: int) -> None:
        super().__init__(site)
        draw = torch.Generator().manual_seed(0)  # the same for every site of a shape: nothing to save
        for name, shape in (("A", (site.in_features, r)), ("B", (r, site.out_features))):
            frozen = torch.randn(shape, generator=draw, device="cpu") / shape[0] ** 0.5
            self.register_buffer(name, frozen, persistent=False)
        self.d, self.b = nn.Parameter(torch.full((r,), 0.1)), nn.Parameter(torch.zeros(site.out_features))
        for name in ("mask", "keep"):
            self.register_buffer(name, torch.ones(r, dtype=torch.bool))
        self.track("d")  # the two averages that importance is made of

    def left(self) -> Tensor:
        return self.A

    def gate(self) -> Tensor:
        return self.d * self.mask

    def right(self) -> Tensor:
        return self.B * self.b

    @property
    def lambdas(self) -> Tensor:
        return self.d.detach() * (self.mask & self.keep)

    def axes(self) -> dict[str, Axis]:
        return {"rank": Axis(self.mask, self.keep, scored=(("d", -1),), value=self.d)}


@dataclass(frozen=True)
class VeRA:
    """`r` random directions, of which `target_r` a site on average are kept."""

    r: int = 64
    target_r: float = 32

    def adapter(self, site: Site) -> VeRAAdapter:
        return VeRAAdapter(site, self.r)

    def training(self) -> Training:
        return Training(allocators=(BudgetAllocator("rank", self.target_r, CubicSchedule(), ("d",)),))


if __name__ == "__main__":
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)), torch.randn(256, 16)
    y = x[:, :4].sin()
    lora2fx.transform(model, ["0", "2"], VeRA(), example_inputs=(x,))
    optimizer = torch.optim.AdamW(lora2fx.param_groups(model, lr=0.02))
    lora2fx.attach(model, optimizer, total_steps=300)
    for step in range(300):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == 299:
            print(f"step {step}: loss {loss.item():.4f}")
    print(lora2fx.report(model))
    lora2fx.fold(model)
    print(f"folded: loss {(model(x) - y).square().mean().item():.4f}")
