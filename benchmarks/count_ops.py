"""How many operations a training step dispatches, and how often the host waits: exact, the same on every machine.

Writes results/operations.json, or operations-<precision>.json, and prints a table. A foreach operation over many
tensors is one; views are none.

python benchmarks/count_ops.py [--precision autocast]
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from counting import dispatched_operations, host_syncs
from timing import circumstances
from training_steps import BASE, LAUNCH_BOUND, PRECISIONS, Training, names_of, prepared, suffix_of
from transformers.utils import logging

RESULTS = Path(__file__).parent / "results"


def counted(training: Training) -> dict[str, int]:
    """Operations of forward and backward, of the rest of the step, and host syncs; after three steps."""
    for _ in range(3):
        training.step()

    def differentiate() -> None:
        training.optimizer.zero_grad()
        training.loss().backward()

    def rest() -> None:
        training.optimizer.step()
        if training.after is not None:
            training.after()

    return {
        "forward_backward": dispatched_operations(differentiate).total(),
        "after_backward": dispatched_operations(rest).total(),
        "host_syncs": host_syncs(training.step).total(),
    }


def main() -> None:
    """Count each variant in the launch-bound setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0])
    setting = replace(LAUNCH_BOUND, precision=parser.parse_args().precision)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    sites = setting.sites
    found: dict[str, Any] = {name: counted(prepared(setting, name)) for name in names_of(setting)}
    base = found[BASE]
    print(f"| launch-bound, {sites} matrices | more in forward and backward, each | after the backward | host syncs |")
    print("|---|---|---|---|")
    for name, own in found.items():
        extra = (own["forward_backward"] - base["forward_backward"]) / sites
        print(f"| {name} | {extra:.1f} | {own['after_backward']} | {own['host_syncs']} |")
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**circumstances(), "sites": sites, "counts": found}, indent=1)
    (RESULTS / f"operations{suffix_of(setting)}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
