"""How the recipes' learning rates were chosen: one grid for all, a quarter of the training examples held back.

Run with `python -m lora2fx.demo.tuning`; takes some minutes. The test examples are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, product
from statistics import mean, stdev

from lora2fx import LoRA, LoRA2
from lora2fx.demo.contestants import RECIPES, Recipe, adapt, train_base
from lora2fx.demo.digits import hold_back, load_tasks
from lora2fx.demo.fitting import accuracy
from lora2fx.demo.job import FULL, one_thread
from lora2fx.program import Method
from lora2fx.reports import format_table

HEAD_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
ADAPTER_RATES = (0.01, 0.02, 0.04)


def variants(method: Method | None) -> tuple[Method | None, ...]:
    """Two of each method, so that neither gets more tuning: LoRA's two inits, two weights of LoRA²'s regulariser."""
    match method:
        case LoRA():
            return replace(method, init="kaiming"), replace(method, init="gaussian")
        case LoRA2():
            return replace(method, orth_reg_weight=0.1), replace(method, orth_reg_weight=0.01)
        case _:
            return (method,)


def candidates(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe at every point of the grid."""
    rates = (0.0,) if recipe.method is None else ADAPTER_RATES
    for method, head, factors in product(variants(recipe.method), HEAD_RATES, rates):
        yield replace(recipe, method=method, head_rate=head, adapter_rate=factors)


def tune(seeds: int = FULL.seeds, steps: int = FULL.steps) -> list[tuple[Recipe, list[float]]]:
    """Every candidate with its accuracies on the held-back training examples, one for each seed."""
    own, new = load_tasks()
    held = hold_back(new.train, 0.25, seed=1)
    bases = [train_base(own.train, FULL.base_steps, seed) for seed in range(seeds)]
    tried = []
    for candidate in chain.from_iterable(map(candidates, RECIPES)):
        models = [adapt(base, held.train, candidate, steps, seed) for seed, base in enumerate(bases)]
        tried.append((candidate, [accuracy(model, held.test) for model in models]))
    return tried


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
