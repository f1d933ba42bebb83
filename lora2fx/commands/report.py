"""`lora2fx report` and `lora2fx compare`: what run folders hold, on the terminal and as pages."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora2fx.errors import RunError
from lora2fx.reports import format_table

if TYPE_CHECKING:
    from lora2fx.commands.naming import Commands


def add_parser(commands: Commands) -> None:
    """Add the commands to the command line."""
    report = commands.add_parser("report", help="show a run, and make its report.html again from its report.json")
    report.add_argument("run_folder", type=Path, metavar="RUN", help="the --out of lora2fx train or lora2fx demo")
    report.add_argument("--json", action="store_true", help="print report.json instead")
    report.set_defaults(run=_report)

    compare = commands.add_parser("compare", help="runs of lora2fx train side by side")
    compare.add_argument("run_folders", type=Path, nargs="+", metavar="RUN", help="folders of runs, two or more")
    compare.add_argument("--json", action="store_true", help="print the comparison as JSON")
    compare.add_argument("--html", type=Path, metavar="FILE", help="write it as a page too, with heat maps and charts")
    compare.set_defaults(run=_compare)


def _report(options: argparse.Namespace) -> None:
    from lora2fx.demo.tables import demo_tables, format_demo
    from lora2fx.finetuning.folder import PAGE, read_record
    from lora2fx.finetuning.pages import run_page
    from lora2fx.finetuning.summary import format_run
    from lora2fx.html import render_html
    from lora2fx.integrations.pages import write_text

    folder: Path = options.run_folder
    record = read_record(folder)
    try:
        if record.get("kind") == "train":
            page, text = run_page(record), format_run(record)
        else:
            page, text = demo_tables(record) | {"sites": record["delivered"]["sites"]}, format_demo(record)
        html = render_html(page)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise RunError(f"{folder / 'report.json'} is no report of this version of lora2fx: {error!r}.") from error
    write_text(folder / PAGE, html)
    print(json.dumps(record, indent=1, ensure_ascii=False) if options.json else f"{text}\n\nWritten: {folder / PAGE}")


def _compare(options: argparse.Namespace) -> None:
    from lora2fx.finetuning.comparing import compare_runs, comparison_page, comparison_table, read_runs
    from lora2fx.integrations.pages import write_text

    if len(options.run_folders) < 2:
        raise RunError("compare: name two runs or more. lora2fx report RUN shows one.")
    runs = read_runs(options.run_folders)
    try:
        rows: dict[str, Any] = compare_runs(runs)
        page = comparison_page(runs) if options.html else ""
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise RunError(f"a report.json is not of this version of lora2fx: {error!r}.") from error
    if options.html:
        write_text(options.html, page)
    print(json.dumps(rows, indent=1, ensure_ascii=False) if options.json else format_table(*comparison_table(rows)))
