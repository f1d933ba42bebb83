"""Bytes that a forward keeps for its backward, each storage once, weights left out: exact.

Writes results/memory.json, or memory-<precision>.json, and prints a table. --dropout: of what the adapters read.

python benchmarks/bench_memory.py [--precision autocast] [--dropout 0.1]
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import replace
from pathlib import Path

from counting import saved_bytes, state_of
from timing import circumstances
from training_steps import BASE, GEMM_BOUND, PRECISIONS, names_of, prepared, suffix_of
from transformers.utils import logging

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure each variant in the GEMM-bound setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0])
    parser.add_argument("--dropout", type=float, default=0.0)
    setting = replace(GEMM_BOUND, **vars(parser.parse_args()))
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    found = {}
    for name in names_of(setting):
        training = prepared(setting, name)
        found[name] = saved_bytes(training.loss, state_of(training.model))
        del training
    print("| kept for the backward, GEMM-bound | MiB | / frozen base |")
    print("|---|---|---|")
    for name, held in found.items():
        print(f"| {name} | {held / 2**20:.1f} | {held / found[BASE]:.3f} |")
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**circumstances(), "setting": vars(setting), "bytes": found}, indent=1)
    (RESULTS / f"memory{suffix_of(setting)}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
