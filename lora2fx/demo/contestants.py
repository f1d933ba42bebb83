"""What the demo compares: the same base with a fresh head, and nothing, LoRA or LoRA² trained beside that head."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import AdamW

import lora2fx
from lora2fx.demo.digits import Examples
from lora2fx.demo.fitting import fit
from lora2fx.demo.transformer import VisionTransformer
from lora2fx.program import Method

TARGETS = ("query", "key", "value", "ffn")
CORE = ("v", "lam", "U")
"""LoRA²'s inner factors, whose product is the small core between the planes."""


@dataclass(frozen=True)
class Recipe:
    """One way to adapt: a method (None trains the head alone) and the learning rates that tuning chose for it.

    LoRA²'s core learns at `core_share` of the adapter's rate: its factors multiply each other.
    The rates come from `python -m lora2fx.demo.tuning`, which tries as many candidates for one method as for the
    other on a quarter of the training examples held back. With LoRA²'s `core_share`, chosen on other such quarters,
    only two points of its grid were run. The test examples played no part in it.
    """

    name: str
    method: Method | None
    head_rate: float
    adapter_rate: float = 0.0
    core_share: float = 1.0


def train_base(examples: Examples, steps: int, seed: int) -> VisionTransformer:
    """The vision transformer, trained from scratch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionTransformer()
    optimizer = AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    fit(model, optimizer, examples, steps, seed, "base: digits 0–4")
    return model


def with_fresh_head(base: VisionTransformer, seed: int) -> VisionTransformer:
    """A copy of the base whose classes start anew: the old head knows nothing about the new digits."""
    model = copy.deepcopy(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.head = nn.Linear(base.head.in_features, base.head.out_features)
    return model.eval()


def _part(name: str) -> str:
    """Which learning rate a parameter gets."""
    if name.startswith("head."):
        return "head"
    return "core" if name.rpartition(".")[2] in CORE else "outer"


def adapt(base: VisionTransformer, examples: Examples, recipe: Recipe, steps: int, seed: int) -> VisionTransformer:
    """A copy of the base, adapted to `examples`; its adapters are still in place."""
    model = with_fresh_head(base, seed)
    if recipe.method is None:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    else:
        images = examples.images[:2]
        lora2fx.transform(model, TARGETS, recipe.method, example_inputs=(images,), modules_to_save=["head"], seed=seed)
    rates = {"head": recipe.head_rate, "core": recipe.core_share * recipe.adapter_rate, "outer": recipe.adapter_rate}
    trained = [(_part(name), parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [{"params": [p for part, p in trained if part == one], "lr": rate} for one, rate in rates.items()]
    optimizer = AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    if recipe.method is not None:
        lora2fx.attach(model, optimizer, total_steps=steps)
    fit(model, optimizer, examples, steps, seed, f"{recipe.name}: digits 5–9")
    return model


RECIPES = (
    Recipe("head only", None, head_rate=0.3),
    Recipe("LoRA", lora2fx.LoRA(r=1, lora_alpha=1), head_rate=0.01, adapter_rate=0.04),
    Recipe(
        "LoRA²",
        lora2fx.LoRA2(r=8, k=3, target_k=1, lora_alpha=8),
        head_rate=0.03,
        adapter_rate=0.04,
        core_share=0.1,
    ),
)
