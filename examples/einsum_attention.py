"""An architecture of one's own: attention by einsum on raw 3-D parameters. No name tells; the dataflow does.

python examples/einsum_attention.py
"""

from __future__ import annotations

import torch
from torch import nn

import lora2fx

WIDTH, HEADS = 32, 4


class Block(nn.Module):
    """Attention and feed-forward, both residual, on parameters called a to e."""

    def __init__(self) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.a, self.b, self.c = (nn.Parameter(torch.randn(HEADS, WIDTH, size) / WIDTH**0.5) for _ in range(3))
        self.d = nn.Parameter(torch.randn(HEADS, size, WIDTH) / WIDTH**0.5)
        self.e, self.f = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, WIDTH) → the same"""
        first, second, third = (torch.einsum("btc,hcd->bhtd", x, weight) for weight in (self.a, self.b, self.c))
        weights = torch.einsum("bhtd,bhsd->bhts", second, first).softmax(-1)  # the second one asks, the first answers
        x = x + torch.einsum("bhts,bhsd,hdc->btc", weights, third, self.d)
        return x + self.f(torch.relu(self.e(x)))


def main() -> dict[str, str]:
    """Returns the role of each weight of the first block."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()), torch.randn(4, 9, WIDTH)
    report = lora2fx.inspect(model, (x,))
    print(report)
    lora2fx.transform(model, ["query", "value", "ffn"], lora2fx.LoRA2(r=4, k=2), example_inputs=(x,))
    print(model[0])
    lora2fx.unload(model)
    return {site["weight"][2:]: site["role"] for site in report.sites if site["weight"].startswith("0.")}


if __name__ == "__main__":
    main()
