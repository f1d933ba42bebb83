"""What the `property` rewrite costs, and what a lazy W + ΔW would: expert stacks and torch's attention, one step.

`base` is the frozen model, `property` ours: a read gives W + ΔW, of a stack only the expert's that is asked for
(`passes/stacks.py`). `low rank` is what a tensor that stays low-rank through indexing, chunk and linear could reach at
best, written by hand: x W + (x left) right for each expert, or for the fused in_proj. Process time of forward and
backward on one thread, variants in turn, medians.

python benchmarks/bench_merged_weights.py [--rounds 7] [--write]    # benchmarks/results/merged_weights.json
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora2fx

RESULT = Path(__file__).resolve().parent / "results" / "merged_weights.json"
RANK = 8


class Experts(nn.Module):
    """Mixtral's experts: stacks (expert, out, in), each given the tokens routed to it."""

    def __init__(self, experts: int, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, 2 * inner, width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(experts, width, inner) * inner**-0.5)

    def product(self, x: Tensor, name: str, expert: int) -> Tensor:
        """x (tokens, in) → (tokens, out of one expert)"""
        return F.linear(x, getattr(self, name)[expert])

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, width); the token's number decides its expert."""
        total = torch.zeros_like(x)
        for expert in range(self.up.shape[0]):
            rows = torch.arange(expert, len(x), self.up.shape[0])
            gate, up = self.product(x[rows], "up", expert).chunk(2, -1)
            total = total.index_add(0, rows, self.product(F.silu(gate) * up, "down", expert))
        return total


class LowRankExperts(Experts):
    """The same, each product with its low-rank update beside it."""

    def __init__(self, base: Experts) -> None:
        nn.Module.__init__(self)
        self.up, self.down = base.up, base.down
        for name in ("up", "down"):
            experts, out, width = getattr(base, name).shape
            setattr(self, f"{name}_left", nn.Parameter(torch.randn(experts, width, RANK) * 0.02))
            setattr(self, f"{name}_right", nn.Parameter(torch.randn(experts, RANK, out) * 0.02))

    def product(self, x: Tensor, name: str, expert: int) -> Tensor:
        """x W + (x left) right"""
        update = (x @ getattr(self, f"{name}_left")[expert]) @ getattr(self, f"{name}_right")[expert]
        return super().product(x, name, expert) + update


class Attention(nn.Module):
    """torch's attention of a sequence with itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, width // 64, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, width)"""
        return self.attention(x, x, x, need_weights=False)[0]


class LowRankAttention(nn.Module):
    """The same computation, written out, with a low-rank update beside both projections."""

    def __init__(self, base: Attention) -> None:
        super().__init__()
        self.base, width = base.attention, base.attention.embed_dim
        for name, out in (("in", 3 * width), ("out", width)):
            setattr(self, f"{name}_left", nn.Parameter(torch.randn(width, RANK) * 0.02))
            setattr(self, f"{name}_right", nn.Parameter(torch.randn(RANK, out) * 0.02))

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, width)"""
        fused = F.linear(x, self.base.in_proj_weight, self.base.in_proj_bias) + (x @ self.in_left) @ self.in_right
        heads = (part.unflatten(-1, (self.base.num_heads, -1)).transpose(1, 2) for part in fused.chunk(3, -1))
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.base.out_proj(mixed) + (mixed @ self.out_left) @ self.out_right


CASES: dict[str, tuple[Callable[[], nn.Module], type[nn.Module], tuple[int, ...]]] = {
    "8 experts 256 x 896, 512 tokens": (lambda: Experts(8, 256, 896), LowRankExperts, (512, 256)),
    "8 experts 256 x 896, 64 tokens": (lambda: Experts(8, 256, 896), LowRankExperts, (64, 256)),
    "attention 768, 16 x 64 tokens": (lambda: Attention(768), LowRankAttention, (16, 64, 768)),
    "attention 768, 2 x 16 tokens": (lambda: Attention(768), LowRankAttention, (2, 16, 768)),
}


def step(model: nn.Module, x: Tensor) -> float:
    """Process seconds of one forward and backward."""
    start = time.process_time()
    model(x).square().mean().backward()
    return time.process_time() - start


def variants(case: str) -> tuple[dict[str, nn.Module], Tensor]:
    """The case's models by name, and their input, which needs a gradient as in the middle of a network."""
    make, low_rank, shape = CASES[case]
    torch.manual_seed(0)
    base = make().train().requires_grad_(False)
    x = torch.randn(shape, requires_grad=True)
    adapted = copy.deepcopy(base)
    lora2fx.transform(adapted, "re:.*", lora2fx.LoRA(r=RANK), example_inputs=(x.detach(),), seed=0)
    return {"base": base, "property": adapted, "low rank": low_rank(base).train()}, x


def main() -> None:
    """Run the rounds, print, and write the result where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cases = {}
    for case in CASES:
        models, x = variants(case)
        ratios: dict[str, list[float]] = {name: [] for name in models}
        base = []
        for number in range(given.rounds + 1):
            order = list(models)[:: 1 if number % 2 == 0 else -1]
            seconds = {name: step(models[name], x) for name in order}
            if number:
                base.append(seconds["base"])
                for name in models:
                    ratios[name].append(seconds[name] / seconds["base"])
        medians = {name: round(statistics.median(found), 2) for name, found in ratios.items()}
        cases[case] = {"base_ms": round(1000 * statistics.median(base), 1)} | medians
        print(f"{case:36s}", cases[case])
    if given.write:
        header = {"date": str(datetime.date.today()), "torch": torch.__version__, "threads": 1, "rounds": given.rounds}
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(header | {"rank": RANK, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
