"""The adapters of a model as a page, at any time: ranks as a heat map, λ and importance, the log as charts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lora2fx.exporters.writing import publish, staging
from lora2fx.html import adapter_charts, render_html
from lora2fx.inspection import report_model


def adapters_page(model: nn.Module, log: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page as HTML. `log` are entries with `step` and what `log_values` gives, as the Trainer's `log_history`.

    Of a model that FSDP shards every process must ask. Raises `AdapterError` where there are no adapters.
    """
    report = report_model(model)
    training = [entry for entry in log if "step" in entry]
    page = {"title": report.title, "summary": _summary(report.totals), "sites": report.sites, "tables": {}}
    return render_html(page | {"charts": adapter_charts(training)})


def write_page(model: nn.Module, path: str | os.PathLike[str], log: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write the page as a file that is there whole or not at all; `OSError` where it can't be."""
    write_text(Path(path), adapters_page(model, log))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with staging(path.parent) as aside:
        (aside / path.name).write_text(text, encoding="utf-8")
        publish({aside / path.name: path})


def _summary(totals: Mapping[str, Any]) -> str:
    kept = ", ".join(f"{count:,} {axis}" for axis, count in totals["kept"].items())
    budgets = ", ".join(f"{count:,} {axis}" for axis, count in totals["budgets"].items())
    known = (
        f"{totals['adapter_parameters']:,} adapter parameters on {totals['base_parameters']:,}; kept {kept or 'all'}"
    )
    return f"{known}; the budget ends with {budgets}." if budgets else f"{known}."
