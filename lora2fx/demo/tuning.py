"""How the recipes' learning rates were chosen: one grid for all, a quarter of the training examples held back.

Run with `python -m lora2fx.demo.tuning`; takes some minutes. The test examples are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from statistics import mean, stdev

from lora2fx import LoRA, LoRA2
from lora2fx.demo.contestants import Recipe, adapt, train_base
from lora2fx.demo.digits import hold_back, load_tasks
from lora2fx.demo.fitting import accuracy
from lora2fx.demo.job import FULL, one_thread
from lora2fx.program import Method
from lora2fx.reports import format_table

HEAD_ONLY_RATES = (0.03, 0.1, 0.3, 1.0)
HEAD_RATES = (0.01, 0.03, 0.1)
ADAPTER_RATES = (0.01, 0.02, 0.04)
# Two of each method, so that neither gets more tuning than the other.
METHODS: dict[str, tuple[Method | None, ...]] = {
    "head only": (None,),
    "LoRA": (LoRA(r=1, lora_alpha=1), LoRA(r=1, lora_alpha=1, init="gaussian")),
    "LoRA²": tuple(LoRA2(r=8, k=4, target_k=1, lora_alpha=8, orth_reg_weight=weight) for weight in (0.1, 0.01)),
}


def candidates() -> Iterator[Recipe]:
    """Every recipe at every point of its grid."""
    for name, methods in METHODS.items():
        rates = product(HEAD_ONLY_RATES, (0.0,)) if name == "head only" else product(HEAD_RATES, ADAPTER_RATES)
        for method, (head, factors) in product(methods, list(rates)):
            yield Recipe(name, method, head, factors)


def tune(seeds: int = FULL.seeds, steps: int = FULL.steps) -> Iterator[tuple[Recipe, list[float]]]:
    """Every candidate with its accuracies on held-back training examples: for each seed its own base and quarter."""
    own, new = load_tasks()
    held = [hold_back(new.train, 0.25, seed) for seed in range(seeds)]
    bases = [train_base(own.train, FULL.base_steps, seed) for seed in range(seeds)]
    for recipe in candidates():
        models = [adapt(base, held[seed].train, recipe, steps, seed) for seed, base in enumerate(bases)]
        yield recipe, [accuracy(model, held[seed].test) for seed, model in enumerate(models)]


def main() -> None:
    """Print the grid, the best of each recipe first."""
    with one_thread():
        tried = sorted(tune(), key=lambda one: (one[0].name, -mean(one[1])))
    rows = [
        [one.name, one.head_rate, one.adapter_rate, f"{mean(found):.4f}", f"{stdev(found):.4f}", str(one.method or "")]
        for one, found in tried
    ]
    print(format_table(["recipe", "head rate", "adapter rate", "held-back accuracy", "sd", "method"], rows))


if __name__ == "__main__":
    main()
