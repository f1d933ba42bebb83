"""LoRA² 3→1 with one setting changed at a time: python -m benchmarks.quality.text.ablation --data FOLDER.

Every variant is run on the first two of the tasks, CoLA and MRPC, and scored on rows held back of their training rows,
so that defaults can be chosen without a look at any dev row. Differences to the default are paired by seed. Finished
runs are kept in --out: what was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.comparing import compare
from benchmarks.quality.contestants import Contestant, Ours
from benchmarks.quality.store import Job, Record, read_runs, run_jobs
from benchmarks.quality.text.options import add_options, plan_of
from benchmarks.quality.text.table import over_tasks
from benchmarks.quality.text.task import Plan, check_precision, run_text
from lora2fx import LoRA2
from lora2fx.errors import Lora2fxError

OUT = Path(__file__).resolve().parents[2] / "results" / "quality_text_ablation.jsonl"
TASKS = ("cola", "mrpc")
FIRST_SEED = 200
RATE = 2e-3
"""The best for the default, by held-back rows, of 1e-3, 2e-3 and 5e-3."""
DEFAULT = "default"


def _method(**changes: Any) -> LoRA2:
    return LoRA2(**{"r": 8, "k": 3, "target_k": 1, "lora_alpha": 16, **changes})


VARIANTS: dict[str, tuple[LoRA2, float]] = {
    DEFAULT: (_method(), RATE),
    "rate 3e-3": (_method(), 3e-3),
    "k = 1, no pruning": (_method(k=1, target_k=None), RATE),
    "start 2": (_method(k=2), RATE),
    "start 4": (_method(k=4), RATE),
    "regulariser 0": (_method(orth_reg_weight=0.0), RATE),
    "regulariser 0.1": (_method(orth_reg_weight=0.1), RATE),
    "scale 1": (_method(lora_alpha=8), RATE),
    "scale 4": (_method(lora_alpha=32), RATE),
    "sensitivity of the task": (_method(sensitivity="task"), RATE),
    "budget in each weight": (_method(budget_scope="local"), RATE),
    "init zero_out": (_method(init="zero_out"), RATE),
    "averages 0.95": (_method(beta1=0.95, beta2=0.95), RATE),
}
"""By name the method and its rate."""


def contestant_of(name: str) -> Contestant:
    """The variant of that name."""
    return Ours(name, VARIANTS[name][0])


def run_job(plan: Plan, job: Job) -> dict[str, Any]:
    """One run, on one thread."""
    torch.set_num_threads(1)
    return run_text(plan, job.task, contestant_of(job.contestant), job.rate, job.seed, job.use)


def show(records: Sequence[Record], tasks: Sequence[str]) -> str:
    """A table of the mean over the tasks and one for each task."""
    against = dict.fromkeys(VARIANTS, DEFAULT)
    parts = {"Mean": over_tasks(records, tasks)}
    parts |= {task: [record for record in records if record["task"] == task] for task in tasks}
    return "\n\n".join(f"{name}\n\n{compare(own, against)}" for name, own in parts.items() if own)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, seed by seed, and print the tables; also written beside the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, TASKS, OUT)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), metavar="NAME", help="some variants only")
    options = parser.parse_args(argv)
    try:
        plan = plan_of(options)
        check_precision(read_runs(options.out).values(), plan, options.out)
    except Lora2fxError as error:
        sys.exit(str(error))
    tasks = [source.name for source in plan.sources]
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    order = product(seeds, options.only or VARIANTS, tasks)
    jobs = [Job(task, name, VARIANTS[name][1], seed, "tune") for seed, name, task in order]
    records = list(run_jobs(jobs, options.out, partial(run_job, plan), options.workers, "ablating").values())
    text = f"LoRA² 3→1 with one setting changed, {options.seeds} seeds, held-back rows.\n\n{show(records, tasks)}"
    print(text)
    options.out.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
