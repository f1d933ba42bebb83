"""How the recipes' learning rates were chosen: one grid for all, a quarter of the training examples held back.

Run with `python -m lora2fx.demo.tuning --workers 2`; takes half an hour. The test examples are not looked at.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from math import sqrt
from multiprocessing import get_context
from statistics import mean, stdev

from lora2fx import LoRA, LoRA2
from lora2fx.demo.contestants import Recipe, adapt, train_base
from lora2fx.demo.digits import hold_back, load_tasks
from lora2fx.demo.fitting import accuracy
from lora2fx.demo.job import FULL, one_thread
from lora2fx.inspection import describe_method
from lora2fx.reports import format_table

SEEDS = 12
HEAD_ONLY_RATES = (0.03, 0.1, 0.3, 1.0)
HEAD_RATES = (0.01, 0.03, 0.1)
ADAPTER_RATES = (0.01, 0.02, 0.04, 0.08)
LORA2 = LoRA2(r=8, k=3, target_k=1, lora_alpha=8)
# Two of each method, so that neither gets more tuning than the other.
VARIANTS = (
    Recipe("head only", None, 0.0),
    Recipe("LoRA", LoRA(r=1, lora_alpha=1), 0.0),
    Recipe("LoRA", LoRA(r=1, lora_alpha=1, init="gaussian"), 0.0),
    Recipe("LoRA²", LORA2, 0.0),
    Recipe("LoRA²", LORA2, 0.0, core_share=0.1),
)


def candidates() -> list[Recipe]:
    """Every variant at every point of its grid."""
    alone, both = list(product(HEAD_ONLY_RATES, (0.0,))), list(product(HEAD_RATES, ADAPTER_RATES))
    return [
        replace(variant, head_rate=head, adapter_rate=factors)
        for variant in VARIANTS
        for head, factors in (alone if variant.method is None else both)
    ]


def tune_seed(seed: int, steps: int, recipes: Sequence[Recipe]) -> list[float]:
    """Each recipe's accuracy on the quarter of the training examples that `seed` holds back, from a base of its own."""
    own, new = load_tasks()
    held = hold_back(new.train, 0.25, seed)
    with one_thread():
        base = train_base(own.train, FULL.base_steps, seed)
        return [accuracy(adapt(base, held.train, recipe, steps, seed), held.test) for recipe in recipes]


def tune(seeds: int, steps: int, workers: int) -> list[tuple[Recipe, list[float]]]:
    """Every candidate with its held-back accuracies, seed by seed, `workers` seeds at a time."""
    from tqdm import tqdm

    recipes = candidates()
    one = partial(tune_seed, steps=steps, recipes=recipes)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        found = list(tqdm(pool.map(one, range(seeds)), total=seeds, desc="held-back seeds", disable=None))
    return list(zip(recipes, map(list, zip(*found, strict=True)), strict=True))


def _row(one: Recipe, found: Sequence[float]) -> list[object]:
    method = describe_method(one.method) if one.method else ""
    spread = stdev(found) / sqrt(len(found)) if len(found) > 1 else 0.0
    return [one.name, method, one.core_share, one.head_rate, one.adapter_rate, f"{mean(found):.4f}", f"{spread:.4f}"]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the grid, the best of each recipe first."""
    parser = argparse.ArgumentParser(description="Tune the demo's recipes on held-back training examples.")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=FULL.steps)
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread (default: 1)")
    options = parser.parse_args(argv)
    tried = tune(options.seeds, options.steps, options.workers)
    rows = [_row(one, found) for one, found in sorted(tried, key=lambda one: (one[0].name, -mean(one[1])))]
    header = ["recipe", "method", "core share", "head rate", "adapter rate", "held-back accuracy", "se"]
    print(format_table(header, rows))


if __name__ == "__main__":
    main()
