"""`lora2fx demo`: a small model trained, adapted, pruned, folded and exported."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora2fx.commands.naming import Commands


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    demo = commands.add_parser("demo", help="train, adapt, prune, fold and export a small model; under a minute")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="where its files go (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="the first seed (default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="a few steps of one seed: shows the way, not the accuracy")
    demo.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from lora2fx.demo.job import FULL, QUICK, run_demo
    from lora2fx.demo.tables import format_demo

    run = run_demo(options.out, options.seed, QUICK if options.quick else FULL)
    print(format_demo(run))
    print(f"\nWritten to {options.out}: adapter/, model.onnx, report.json, report.html")
