"""Compare every method on text: python -m benchmarks.quality.text --data FOLDER [--workers 2].

FOLDER holds a folder for each task, with train and dev (or validation) files of columns text, text2 and label or
GLUE's own. --task takes other folders too, and datasets of the hub, as nyu-mll/glue:rte. Each method's rate is chosen
on rows held back of the first two tasks' training rows, then the seeds are run on the dev rows. Finished runs are kept
in --out: what was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

import lora2fx
from benchmarks.quality.text.comparison import TUNING_SEEDS, Comparison
from benchmarks.quality.text.contestants import ENTRIES, GROUPS
from benchmarks.quality.text.encoder import PACKAGE
from benchmarks.quality.text.examples import BATCH, LENGTH
from benchmarks.quality.text.options import add_options, plan_of
from benchmarks.quality.text.table import show_all
from benchmarks.quality.text.task import HEAD_RATE
from lora2fx.errors import RunError

OUT = Path(__file__).resolve().parents[2] / "results" / "quality_text.jsonl"
TASKS = ("cola", "trec", "sst2", "mrpc")
"""Rates are chosen on the first two, whose short sentences cost least."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, TASKS, OUT)
    parser.add_argument("--tune", nargs="+", help="tasks that rates are chosen on (default: the first two)")
    parser.add_argument("--only", nargs="+", choices=list(ENTRIES), metavar="NAME", help="some contestants only")
    parser.add_argument("--show", action="store_true", help="run nothing, print what is finished")
    return parser.parse_args(argv)


def compared(options: argparse.Namespace) -> Comparison:
    """What is asked for. Raises `Lora2fxError`."""
    plan = plan_of(options)
    names = [source.name for source in plan.sources]
    tuning = tuple(options.tune or names[:2])
    if odd := set(tuning) - set(names):
        raise RunError(f"--tune {odd.pop()}: it is none of the tasks ({', '.join(names)}).")
    if len(set(names)) < len(names):
        raise RunError(f"--task: two of the tasks have the same name ({', '.join(sorted(names))}). Rename a folder.")
    return Comparison(plan, tuning, options.out, options.workers)


def describe(comparison: Comparison) -> str:
    """What was run, on what, when."""
    model = PACKAGE if PACKAGE in Path(comparison.plan.model).parts else comparison.plan.model
    machine = f"{platform.machine()}, {os.cpu_count()} processors, one thread a run, {comparison.plan.precision}"
    return "\n".join(
        [
            f"{model}: batches of {BATCH}, {LENGTH} tokens, head at {HEAD_RATE:g}; dev scores in per cent, standard"
            " errors over seeds.",
            f"One rate a method, by the score on held-back training rows of {' and '.join(comparison.tuning)}, seeds"
            f" {', '.join(map(str, TUNING_SEEDS))}.",
            f"{date.today()}, {machine}, torch {torch.__version__}, lora2fx {lora2fx.__version__}.",
        ]
    )


def report(comparison: Comparison, names: Sequence[str]) -> str:
    """Everything that is finished; also written beside the runs. Raises `RunError` where nothing is."""
    tasks = [source.name for source in comparison.plan.sources]
    records = [r for r in comparison.finished() if r["contestant"] in names and r["task"] in tasks]
    if not records:
        raise RunError(f"{comparison.path} holds no finished test run of these contestants and tasks.")
    text = f"{describe(comparison)}\n\n{show_all(records, tasks)}"
    comparison.path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, group by group, and print the tables."""
    options = parse(argv)
    try:
        comparison = compared(options)
        names = options.only or list(ENTRIES)
        comparison.finished()
        for group in () if options.show else GROUPS:
            wanted = [entry.contestant.name for entry in group if entry.contestant.name in names]
            if wanted:
                comparison.test(wanted, options.seeds)
                report(comparison, names)
        print(report(comparison, names))
    except lora2fx.Lora2fxError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
