"""A page put together: title, summary, key numbers, charts, heat map, weights, tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lora2fx.html.charts import render_chart
from lora2fx.html.heat_map import render_heat_map
from lora2fx.html.style import STYLE
from lora2fx.html.tables import render_others, render_sites, render_table


def join_page(title: str, summary: str, parts: Sequence[str]) -> str:
    """A whole document of `parts`, which are HTML; title and summary are text."""
    name = escape(title)
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f"<head>{meta}<title>{name}</title><style>{STYLE}</style></head>"
    body = f"<h1>{name}</h1><p>{escape(summary)}</p>{''.join(parts)}"
    return f'<!doctype html>\n<html lang="en">{head}<body>{body}</body></html>\n'


def section(caption: str, *content: str) -> str:
    """A heading and what is under it; nothing where that is empty."""
    whole = "".join(content)
    return f"<h2>{escape(caption)}</h2>{whole}" if whole else ""


def tiles(numbers: Mapping[str, str]) -> str:
    """Key numbers, each with its name."""
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in numbers.items())
    return f'<dl class="tiles">{cells}</dl>' if cells else ""


def render_html(run: Mapping[str, Any]) -> str:
    """A page of `run`: `title`, `summary`, a report's `sites` and `tables` ({caption: {"header": …, "rows": …}}).

    Where they are there also `numbers` ({name: text}), `charts` ({caption: {line: [(step, value), …]}}) and
    `settings`, one more table, folded. Nothing is loaded from anywhere; colours follow the reader's light or dark
    setting.
    """
    sites, charts = run["sites"], run.get("charts", {})
    adapted = any(site["rank"] is not None for site in sites)
    drawn = "".join(render_chart(caption, series) for caption, series in charts.items())
    parts = [tiles(run.get("numbers", {}))]
    parts += [
        section(caption, f"<figure>{render_table(table['header'], table['rows'])}</figure>")
        for caption, table in run["tables"].items()
    ]
    if adapted:
        parts.append(section("Rank of ΔW, layer by weight", f"<figure>{render_heat_map(sites, linked=True)}</figure>"))
    parts.append(section("Over the steps", f'<div class="grid">{drawn}</div>' if drawn else ""))
    if any(site["adapter_parameters"] for site in sites):
        parts.append(section("Adapted weights", render_sites(sites)))
    parts.append(section("Not adapted", render_others(sites)))
    if settings := run.get("settings"):
        table = render_table(settings["header"], settings["rows"])
        details = f"<details><summary>show</summary><figure>{table}</figure></details>"
        parts.append(section("Settings and environment", details))
    return join_page(run["title"], run["summary"], parts)
