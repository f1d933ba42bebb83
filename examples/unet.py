"""Convolutions: a small U-Net, every kernel adapted (1×1, 3×3, grouped, transposed), folded back into plain kernels.

python examples/unet.py
"""

from __future__ import annotations

import torch
from torch import nn

import lora2fx


class UNet(nn.Module):
    """Down, through, up, with a connection around; images (batch, 1, height, width), both even."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=4)
        self.mix = nn.Conv2d(2 * width, 2 * width, 1)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.leave = nn.Conv2d(2 * width, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images → images of the same size."""
        top = torch.relu(self.enter(x))
        low = torch.relu(self.mix(torch.relu(self.middle(torch.relu(self.down(top))))))
        return self.leave(torch.cat([top, torch.relu(self.up(low))], 1))


def main(steps: int = 150) -> tuple[float, float]:
    """Adapt a random U-Net to blurring; returns the squared error before and after."""
    torch.manual_seed(0)
    model, generator = UNet(), torch.Generator().manual_seed(0)
    example = torch.randn(2, 1, 12, 14)
    lora2fx.transform(model, ["conv"], lora2fx.LoRA2(r=8, k=8, target_k=6), example_inputs=(example,))
    print(lora2fx.report(model))
    optimizer = torch.optim.AdamW(lora2fx.param_groups(model, lr=1e-2))
    lora2fx.attach(model, optimizer, total_steps=steps)
    errors = []
    for _ in range(steps):
        images = torch.randn(16, 1, 12, 14, generator=generator)
        blurred = nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
        loss = (model(images) - blurred).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(loss.item())
    before = model(example)
    lora2fx.fold(model)
    torch.testing.assert_close(model(example), before, rtol=1e-4, atol=1e-5)
    print(f"squared error {errors[0]:.3f} → {errors[-1]:.3f}, folded into plain convolutions")
    return errors[0], errors[-1]


if __name__ == "__main__":
    main()
