"""What each rewrite makes of one module, as text: `python -m tests.golden_graphs` writes tests/golden/graphs anew.

A dump holds the adapters with their rewrites, the generated forward (fx writes one line a node), what it imports, and
the weights that are read merged. A change of a rewrite shows as a change of these files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import lora2fx
from lora2fx.adapter import Adapter
from lora2fx.passes.install import Adapted, Recipe

GRAPHS = Path(__file__).parent / "golden" / "graphs"


class Rows(nn.Module):
    """addmm with a raw (in, out) weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Heads(nn.Module):
    """einsum with a raw (width, heads, head width) weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsd,dhk->bshk", x, self.weight)


class Experts(nn.Module):
    """A batched product with a stack (experts, in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


class Twice(nn.Module):
    """One weight in two products, the second transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.weight)) @ self.weight


class Branching(nn.Module):
    """A forward that asks for its mode, which a graph would freeze."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * (0.5 if self.training else 1.0)


class Fused(nn.Module):
    """Queries, keys and values of one weight, in an attention; its parts are linears."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(query, key, value))


@dataclass(frozen=True)
class Example:
    """A module, the weight's owner in it, its inputs and targets."""

    make: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    owner: str = ""
    targets: Any = "re:.*"


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


EXAMPLES = {
    "activation_linear": Example(lambda: nn.Linear(4, 6), (_normal(2, 4),)),
    "activation_addmm": Example(Rows, (_normal(2, 4),)),
    "activation_embedding": Example(lambda: nn.Embedding(9, 4, padding_idx=0), (torch.tensor([[1, 2], [3, 0]]),)),
    "activation_stack": Example(Experts, (_normal(3, 5, 4),)),
    "activation_slice": Example(Fused, (_normal(2, 9, 8),), "qkv", ("query", "value")),
    "activation_traced": Example(lambda: fx.symbolic_trace(Rows()), (_normal(2, 4),)),
    "weight_einsum": Example(Heads, (_normal(2, 5, 4),)),
    "weight_conv": Example(lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), (_normal(2, 4, 9, 9),)),
    "weight_twice": Example(Twice, (_normal(2, 4),)),
    "property_branching": Example(Branching, (_normal(2, 4),)),
    "property_attention": Example(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True), (_normal(2, 5, 8),) * 3, "", ("query", "value", "output")
    ),
}
"""By the file's name, which begins with the rewrite."""


def _said(recipe: Recipe) -> list[str]:
    read = set(re.findall(r"\w+", recipe.source or ""))
    used = [entry for entry in recipe.imports if entry[0] in read]
    lines = [f"import: {name} = {module}{'.' * bool(path)}{path}" for name, module, path in used]
    return [*lines, *(f"merged: {name} + {' + '.join(children)}" for name, children in recipe.merged)]


def dump(name: str) -> str:
    """The example's module after `transform`, as text that is the same in every process."""
    example = EXAMPLES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = example.make()
    lora2fx.transform(model, example.targets, lora2fx.LoRA(r=2), example_inputs=example.inputs, seed=0)
    owner = model.get_submodule(example.owner)
    adapters = {path: module for path, module in model.named_modules() if isinstance(module, Adapter)}
    lines = [f"adapter: {path} {each.site.role} {each.rewrite}" for path, each in adapters.items()]
    if isinstance(owner, fx.GraphModule):
        return "\n".join([*lines, "", owner.graph.python_code("self").src.strip(), ""])
    assert isinstance(owner, Adapted)
    return "\n".join([*lines, *_said(owner.recipe), "", owner.recipe.source or "forward: the class's own", ""])


def main() -> None:
    """Write every dump."""
    GRAPHS.mkdir(parents=True, exist_ok=True)
    for old in GRAPHS.glob("*.txt"):
        old.unlink()
    for name in EXAMPLES:
        (GRAPHS / f"{name}.txt").write_text(dump(name), encoding="utf-8")
    print(f"{len(EXAMPLES)} dumps in {GRAPHS}")


if __name__ == "__main__":
    main()
