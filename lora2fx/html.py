"""A run as one self-contained HTML page: facts, tables and the rank heat map (LoRA², Figure 3) as plain SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

CELL, GAP, LABEL = 34, 2, 92
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --line: #d7dce2; --soft: #5b6570; --heat: 37 99 168;
        --empty: #eef1f4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --paper: #14171a; --line: #343b43; --soft: #98a2ad; --heat: 106 173 240; --empty: #20252b; }
}
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p, caption { color: var(--soft); } figure { margin: 0; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; } svg .axis { fill: var(--soft); }
svg .empty { fill: var(--empty); } svg .heat { fill: rgb(var(--heat)); } svg .strong { fill: var(--paper); }
"""
_SHORT = {"query": "q", "key": "k", "value": "v", "output": "o", "ffn.up": "up", "ffn.gate": "gate", "ffn.down": "down"}
_ORDER = {role: position for position, role in enumerate(_SHORT)}


def _layer(weight: str) -> tuple[str, str]:
    """A weight's path as (layer, the rest): split after its first number, else before the parameter."""
    parts = weight.split(".")
    numbers = [position for position, part in enumerate(parts) if part.isdigit()]
    cut = numbers[0] + 1 if numbers else len(parts) - 1
    return ".".join(parts[:cut]), ".".join(parts[cut:])


def heat_cells(sites: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str], dict[tuple[int, int], Any]]:
    """Row names (weights), column names (layers) and the adapted sites by (row, column), in the model's order.

    A row is a role; where one layer has a role twice (cross-attention, experts) it is the role and the weight's
    path within the layer.
    """
    adapted = [site for site in sites if site["rank"] is not None]
    seen = [(_layer(site["weight"])[0], site["role"]) for site in adapted]
    crowded = {role for layer, role in seen if seen.count((layer, role)) > 1} | {"unknown"}
    columns = list(dict.fromkeys(layer for layer, _ in seen))
    rows: dict[str, int] = {}
    placed = []
    for site in adapted:
        layer, rest = _layer(site["weight"])
        short = _SHORT.get(site["role"], site["role"])
        row = f"{short} · {rest.removesuffix('.weight')}" if site["role"] in crowded else short
        rows.setdefault(row, _ORDER.get(site["role"], len(_ORDER)))
        placed.append((row, layer, site))
    ordered = sorted(rows, key=lambda row: rows[row])
    return ordered, columns, {(ordered.index(row), columns.index(layer)): site for row, layer, site in placed}


def _hover(site: Mapping[str, Any]) -> str:
    lines = [f"{site['weight']} ({site['role']})", f"rank {site['rank']}, {site['active']} of {site['r']} λ active"]
    if site["lambda"]:
        lines.append("λ " + ", ".join(f"{value:.3g}" for value in site["lambda"]))
    return escape("\n".join([*lines, f"{site['adapter_parameters']} adapter parameters"]))


def _cell(x: int, y: int, site: Mapping[str, Any], top: int) -> str:
    rank = site["rank"]
    shade = f'class="heat" fill-opacity="{0.15 + 0.85 * rank / top:.3f}"' if rank else 'class="empty"'
    ink = ' class="strong"' if rank > 0.6 * top else ""
    middle = f'x="{x + CELL / 2:g}" y="{y + CELL / 2 + 4:g}" text-anchor="middle"'
    box = f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" rx="3" {shade}/>'
    return f"<g><title>{_hover(site)}</title>{box}<text {middle}{ink}>{rank}</text></g>"


def render_heat_map(sites: Sequence[Mapping[str, Any]]) -> str:
    """The ranks of a report's `sites` as an SVG, layer by weight; hovering a cell names it and lists its λ."""
    rows, columns, cells = heat_cells(sites)
    top = max((site["rank"] for site in cells.values()), default=0)
    label = max([LABEL, *(7 * len(row) + 14 for row in rows)])
    pitch = CELL + GAP
    width, height = label + pitch * len(columns), pitch * (len(rows) + 1)
    parts = [_cell(label + pitch * x, pitch * y, site, top) for (y, x), site in cells.items()]
    for y, row in enumerate(rows):
        parts.append(f'<text x="{label - 10}" y="{pitch * y + 21}" text-anchor="end">{escape(row)}</text>')
    for x, column in enumerate(columns):
        at = f'x="{label + pitch * x + CELL // 2}" y="{pitch * len(rows) + 16}"'
        name = escape(column.rpartition(".")[2])
        parts.append(f'<text class="axis" {at} text-anchor="middle"><title>{escape(column)}</title>{name}</text>')
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="ranks">{"".join(parts)}</svg>'


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(tag: str, cells: Sequence[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    head = f"<thead>{line('th', header)}</thead>" if header else ""
    return f"<table>{head}<tbody>{''.join(line('td', row) for row in rows)}</tbody></table>"


def render_html(run: Mapping[str, Any]) -> str:
    """A page of `run`: `title`, `summary`, a report's `sites` and `tables` ({caption: {"header": …, "rows": …}}).

    Nothing is loaded from anywhere; colours follow the reader's light or dark setting.
    """
    title = escape(run["title"])
    parts = [f"<h1>{title}</h1>", f"<p>{escape(run['summary'])}</p>"]
    for caption, table in run["tables"].items():
        parts.append(f"<h2>{escape(caption)}</h2><figure>{_table(table['header'], table['rows'])}</figure>")
    parts.append("<h2>Rank of ΔW, layer by weight</h2>")
    parts.append(f"<figure>{render_heat_map(run['sites'])}</figure>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    head = f"<head>{head}<style>{_STYLE}</style></head>"
    return f'<!doctype html>\n<html lang="en">{head}<body>{"".join(parts)}</body></html>\n'
