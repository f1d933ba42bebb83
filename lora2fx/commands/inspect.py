"""`lora2fx inspect`: what each weight of a model does, and how it would be adapted."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING

import lora2fx
from lora2fx.analysis import analyse
from lora2fx.commands.naming import MODEL_HELP, add_class, named_source
from lora2fx.passes.match import match_sites

if TYPE_CHECKING:
    from lora2fx.commands.naming import Commands


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    inspect = commands.add_parser("inspect", help="what each weight of a model does and how it would be adapted")
    inspect.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    inspect.add_argument(
        "--targets",
        nargs="+",
        metavar="TARGET",
        help="show only what these would adapt: roles (query, ffn), names (q_proj), patterns (encoder.*.dense)",
    )
    inspect.add_argument("--json", action="store_true", help="print the report as JSON")
    add_class(inspect)
    inspect.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    source = named_source(options.model, options)
    report = lora2fx.inspect(source.model, source.example_inputs)
    if options.targets:
        sites = analyse(source.model, source.example_inputs, roles_needed=True).sites
        matched = {(site.weight, site.role) for site in match_sites(sites, options.targets)}
        entries = tuple(entry for entry in report.sites if (entry["weight"], entry["role"]) in matched)
        report = replace(report, sites=entries)
    print(json.dumps(report.to_dict(), indent=1) if options.json else report)
