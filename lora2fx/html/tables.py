"""Tables of a page: plain ones, the adapted weights with their λ and importance, and the others with their reasons."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any

from lora2fx.html.heat_map import anchor

BAR, HEIGHT = 5, 20
"""Pixels: a bar's width, and the tallest one's height."""
SHOWN = 64
"""Bars of one weight."""
_SITE_HEADER = ("weight", "role", "rewrite", "r", "kept", "rank", "parameters", "λ", "importance")


def render_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Cells as text; columns whose cells are no numbers stand at the left."""
    count = max([len(header), *map(len, rows)])
    words = {i for i in range(count) if any(i < len(row) and not _is_number(row[i]) for row in rows)}
    head = f"<thead>{_line('th', header, words)}</thead>" if header else ""
    return f"<table>{head}<tbody>{''.join(_line('td', row, words) for row in rows)}</tbody></table>"


def render_bars(values: Sequence[float], name: str) -> str:
    """Absolute values as bars, negative ones paler; the numbers on hover."""
    if not values:
        return "–"
    shown = values[:SHOWN]
    top = max((abs(value) for value in shown), default=0.0) or 1.0
    bars = "".join(_bar(index, value, top) for index, value in enumerate(shown))
    numbers = ", ".join(f"{value:.3g}" for value in values)
    size = f'width="{(BAR + 1) * len(shown)}" height="{HEIGHT}"'
    return f'<svg {size} role="img"><title>{escape(f"{name}: {numbers}")}</title>{bars}</svg>'


def render_sites(sites: Sequence[Mapping[str, Any]]) -> str:
    """The adapted weights, a row each, with an id that the heat map leads to."""
    rows = "".join(_site_row(site) for site in sites if site["rewrite"] and site["adapter_parameters"])
    return f"<figure><table><thead>{_line('th', _SITE_HEADER)}</thead><tbody>{rows}</tbody></table></figure>"


def render_others(sites: Sequence[Mapping[str, Any]]) -> str:
    """The weights without an adapter by reason, each list to be opened; nothing where there are none."""
    reasons: dict[str, list[Mapping[str, Any]]] = {}
    for site in sites:
        if site["reason"]:
            reasons.setdefault(site["reason"], []).append(site)
    return "".join(_reason(reason, found) for reason, found in reasons.items())


def _reason(reason: str, sites: Sequence[Mapping[str, Any]]) -> str:
    rows = [(site["weight"], site["role"], "×".join(map(str, site["shape"] or ()))) for site in sites]
    count = f"{len(sites)} weight{'s' if len(sites) > 1 else ''}"
    table = render_table(("weight", "role", "shape"), rows)
    return f"<details><summary>{count}: {escape(reason)}</summary><figure>{table}</figure></details>"


def _site_row(site: Mapping[str, Any]) -> str:
    columns = "" if site["slice"] is None else " " + ",".join(f"{start}:{stop}" for start, stop in site["slice"])
    kept = site.get("kept") or ({} if site["active"] is None else {"": site["active"]})
    cells = [
        f'<td class="text"><code>{_breakable(site["weight"] + columns)}</code></td>',
        *(f"<td>{escape(str(site[key] if site[key] is not None else '–'))}</td>" for key in ("role", "rewrite", "r")),
        f'<td class="one">{escape(", ".join(f"{count} {axis}".strip() for axis, count in kept.items()) or "–")}</td>',
        f"<td>{site['rank'] if site['rank'] is not None else '–'}</td><td>{site['adapter_parameters']:,}</td>",
        f"<td>{render_bars(site['lambda'], 'λ')}</td><td>{_importance(site)}</td>",
    ]
    return f'<tr id="{anchor(site)}">{"".join(cells)}</tr>'


def _breakable(path: str) -> str:
    """A dotted path that a narrow screen may break after its dots."""
    return escape(path).replace(".", ".<wbr>")


def _importance(site: Mapping[str, Any]) -> str:
    """Of the ranks, or of the axes that the method scores instead."""
    by_axis = site.get("importances") or {"importance": site["importance"]}
    return " ".join(render_bars(values, axis) for axis, values in by_axis.items()) or "–"


def _bar(index: int, value: float, top: float) -> str:
    height = max(1.0, HEIGHT * abs(value) / top) if value else 1.0
    kind = "empty" if not value else "heat down" if value < 0 else "heat"
    at = f'x="{index * (BAR + 1)}" y="{HEIGHT - height:.1f}"'
    return f'<rect {at} width="{BAR}" height="{height:.1f}" class="{kind}"/>'


def _line(tag: str, cells: Sequence[Any], words: Collection[int] = ()) -> str:
    kinds = [' class="text"' if index in words else "" for index in range(len(cells))]
    return "<tr>" + "".join(f"<{tag}{k}>{escape(str(c))}</{tag}>" for k, c in zip(kinds, cells, strict=True)) + "</tr>"


def _is_number(cell: Any) -> bool:
    return not any(character.isalpha() for character in str(cell).replace("e", "", 1)) or str(cell).endswith("B")
