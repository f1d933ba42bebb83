"""A whole training step beside a frozen model's: PEFT's LoRA and AdaLoRA, LoRA2 as published, full fine-tuning, ours.

CPU time on one thread, all variants by turns in one process, ratios within a round; refuses to publish what a busy
machine has spoilt. Writes results/step-<setting>.json and prints the README's table.

python benchmarks/bench_step.py --settings GEMM-bound launch-bound --rounds 10
python benchmarks/bench_step.py --compiled --settings launch-bound
python benchmarks/bench_step.py --precision autocast

--compiled: forward and backward through torch.compile (inductor), of frozen base, PEFT's LoRA and ours, in models of
three layers: compiling them takes a minute each. Writes results/step-<setting>-compiled.json.
--precision: autocast, or a model loaded in bfloat16, for processors that multiply in it. Writes
results/step-<setting>-<precision>.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timing import QUIET, circumstances, interleaved, quartiles, ratios, spread
from torch._dynamo.utils import counters
from training_steps import BASE, OURS, PRECISIONS, SETTINGS, VARIANTS, Setting, Training, names_of, prepared, suffix_of
from transformers.utils import logging

RESULTS = Path(__file__).parent / "results"
PEERS = ("PEFT LoRA", "PEFT AdaLoRA")
LAYERS_COMPILED = 3


def compiled(training: Training) -> tuple[Training, dict[str, int]]:
    """The same with its model compiled, and how many graphs and breaks that made."""
    counters.clear()
    found = replace(training, model=torch.compile(training.model))
    for _ in range(3):
        found.step()
    breaks = sum(counters["graph_break"].values())
    return found, {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": breaks}


def measured(setting: Setting, rounds: int, names: list[str], compile_too: bool) -> dict[str, Any]:
    """Median and quartiles of each variant's step, as a ratio to the frozen base's and to PEFT's."""
    trainings = {name: prepared(setting, name) for name in names}
    graphs: dict[str, dict[str, int]] = {}
    for name in names if compile_too else ():
        trainings[name], graphs[name] = compiled(trainings[name])
    steps = {name: training.step for name, training in trainings.items()}
    found = interleaved(steps, rounds, 1 if setting.hidden > 256 else 20)
    base = quartiles(found[BASE])
    return {
        **circumstances(),
        **({"compiled": graphs} if compile_too else {}),
        "setting": vars(setting),
        "rounds": rounds,
        "base_ms": [1e3 * value for value in base],
        "base_spread": spread(found[BASE]),
        "ratio_to_base": ratios(found, BASE),
        "ours_to": {peer: ratios(found, peer)[OURS] for peer in PEERS if peer in found and OURS in found},
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row a variant, a column a setting."""
    head = [f"{r['setting']['name']} (base {r['base_ms'][0]:.0f} ms)" for r in results]
    lines = ["| step / frozen base | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for name in results[0]["ratio_to_base"]:
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*result["ratio_to_base"][name]) for result in results]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for peer in results[0]["ours_to"]:
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*result["ours_to"][peer]) for result in results]
        lines.append(f"| {OURS} / {peer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure, write and print; 1 where the machine was too busy for a setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=None)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0])
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    published, noisy = [], False
    RESULTS.mkdir(exist_ok=True)
    for name in arguments.settings:
        setting = replace(SETTINGS[name], precision=arguments.precision)
        setting = replace(setting, layers=LAYERS_COMPILED) if arguments.compiled else setting
        every = [BASE, "PEFT LoRA", OURS] if arguments.compiled else names_of(setting)
        names = list(dict.fromkeys([BASE, *(arguments.variants or every)]))
        result = measured(setting, arguments.rounds, names, arguments.compiled)
        print(table([result]), flush=True)
        if result["base_spread"] > QUIET:
            print(f"NOT PUBLISHED: {name}: the base's own spread is {result['base_spread']:.1%}, above {QUIET:.0%}.")
            noisy = True
            continue
        published.append(result)
        suffix = ("-compiled" if arguments.compiled else "") + suffix_of(setting)
        (RESULTS / f"step-{name}{suffix}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if len(published) > 1:
        print("\n" + table(published))
    return int(noisy)


if __name__ == "__main__":
    sys.exit(main())
