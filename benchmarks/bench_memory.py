"""Bytes that a forward keeps for its backward, each storage once, weights left out: exact.

Writes results/memory.json and prints a table.

python benchmarks/bench_memory.py
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from counting import saved_bytes, state_of
from timing import circumstances
from training_steps import BASE, GEMM_BOUND, VARIANTS
from transformers.utils import logging

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure each variant in the GEMM-bound setting."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    found = {}
    for name, make in VARIANTS.items():
        training = make(GEMM_BOUND)
        found[name] = saved_bytes(training.loss, state_of(training.model))
        del training
    print("| kept for the backward, GEMM-bound | MiB | / frozen base |")
    print("|---|---|---|")
    for name, held in found.items():
        print(f"| {name} | {held / 2**20:.1f} | {held / found[BASE]:.3f} |")
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**circumstances(), "setting": vars(GEMM_BOUND), "bytes": found}, indent=1)
    (RESULTS / "memory.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
