"""How a training step grows with the number of adapted matrices and with r: the launch-bound BERT, deeper; ours, wider.

Writes results/scale.json and prints two tables.

python benchmarks/bench_scale.py
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from timing import circumstances, interleaved, ratios
from training_steps import BASE, GEMM_BOUND, LAUNCH_BOUND, OURS, VARIANTS, ours
from transformers.utils import logging

RESULTS = Path(__file__).parent / "results"
LAYERS = (1, 4, 16, 80)
RANKS = (8, 32, 64, 256)


def by_sites(rounds: int) -> dict[str, dict[str, float]]:
    """By number of matrices and variant: microseconds a matrix and step above the frozen base."""
    found = {}
    for layers in LAYERS:
        setting = replace(LAUNCH_BOUND, layers=layers)
        names = (BASE, "PEFT LoRA", "PEFT AdaLoRA", OURS)
        times = interleaved({name: VARIANTS[name](setting).step for name in names}, rounds, max(2, 60 // layers))
        base = sorted(times[BASE])[rounds // 2]
        found[str(setting.sites)] = {
            name: 1e6 * (sorted(own)[rounds // 2] - base) / setting.sites for name, own in times.items() if name != BASE
        }
    return found


def by_rank(rounds: int) -> dict[str, tuple[float, float, float]]:
    """The GEMM-bound step of r, over that of r = 8."""
    steps = {str(r): partial(ours(GEMM_BOUND, r).step) for r in RANKS}
    return ratios(interleaved(steps, rounds, 1), str(RANKS[0]))


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    result: dict[str, Any] = {"microseconds_a_site": by_sites(rounds), "r_over_8": by_rank(rounds)}
    for title, rows in (("matrices", result["microseconds_a_site"]),):
        names = next(iter(rows.values()))
        print(
            f"| {title} | "
            + " | ".join(f"{name}, µs each" for name in names)
            + " |\n"
            + "|---" * (len(names) + 1)
            + "|"
        )
        for count, row in rows.items():
            print(f"| {count} | " + " | ".join(f"{value:.0f}" for value in row.values()) + " |")
    print("\n| r (k = 8) | step / that of r = 8 |\n|---|---|")
    for r, own in result["r_over_8"].items():
        print("| {} | {:.3f} [{:.3f}, {:.3f}] |".format(r, *own))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scale.json").write_text(json.dumps({**circumstances(), **result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
