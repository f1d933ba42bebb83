"""The HTML page: self-contained, escaped, and a heat map whose cells are the report's ranks."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from typing import Any

import pytest

from lora2fx.html import heat_cells, render_heat_map, render_html
from lora2fx.reports import site_entry

ROLES = {"query": "attention.query", "key": "attention.key", "ffn.up": "ffn.up", "ffn.down": "ffn.down"}
SVG = "{http://www.w3.org/2000/svg}"


def sites(ranks: dict[str, list[int]]) -> list[dict[str, Any]]:
    return [
        site_entry(
            f"blocks.{layer}.{ROLES[role]}.weight", role=role, r=4, active=rank, rank=rank, **{"lambda": [0.5] * rank}
        )
        for role, row in ranks.items()
        for layer, rank in enumerate(row)
    ]


@pytest.fixture
def run() -> dict[str, Any]:
    return {
        "title": "Digits <5 & up>",
        "summary": "One run.",
        "tables": {"Accuracy": {"header": ["method", "accuracy"], "rows": [["LoRA²", "0.95"], ["<b>", 1]]}},
        "sites": sites({"query": [1, 0], "ffn.down": [4, 2]}),
    }


def test_rows_are_weights_in_the_papers_order_and_columns_are_layers() -> None:
    rows, columns, cells = heat_cells(sites({"ffn.down": [1, 2], "key": [3, 0], "query": [0, 4]}))
    assert rows == ["q", "k", "down"]
    assert columns == ["blocks.0", "blocks.1"]
    ranks = [[cells[row, column]["rank"] for column in range(2)] for row in range(3)]
    assert ranks == [[0, 4], [3, 0], [1, 2]]


def test_weights_without_an_adapter_are_left_out() -> None:
    entries = [*sites({"query": [1]}), site_entry("head.weight", role="unknown", reason="not targeted")]
    assert heat_cells(entries)[0] == ["q"]


def test_a_role_that_a_layer_has_twice_gets_a_row_for_each_weight() -> None:
    """A decoder's self- and cross-attention."""
    paths = ("layer.0.SelfAttention.q", "layer.1.EncDecAttention.q")
    entries = [site_entry(f"decoder.block.0.{path}.weight", role="query", rank=i) for i, path in enumerate(paths)]
    rows, columns, cells = heat_cells(entries)
    assert rows == [f"q · {path}" for path in paths]
    assert columns == ["decoder.block.0"]
    assert [cells[row, 0]["rank"] for row in range(2)] == [0, 1]


def test_the_svg_shows_each_rank_and_names_it_on_hover() -> None:
    entries = sites({"query": [1, 0], "ffn.down": [4, 2]})
    root = ElementTree.fromstring(render_heat_map(entries))
    found = {group.findtext(f"{SVG}title"): group.findtext(f"{SVG}text") for group in root.findall(f"{SVG}g")}
    assert len(found) == 4
    for entry in entries:
        title = next(title for title in found if title and title.startswith(entry["weight"]))
        assert found[title] == str(entry["rank"])
        assert f"{entry['rank']} of 4 λ active" in title


def test_a_higher_rank_is_a_stronger_colour_and_rank_0_has_none() -> None:
    root = ElementTree.fromstring(render_heat_map(sites({"query": [0, 1, 2, 4]})))
    boxes = [group.find(f"{SVG}rect") for group in root.findall(f"{SVG}g")]
    shades = [float(box.attrib.get("fill-opacity", 0)) for box in boxes if box is not None]
    assert shades[0] == 0 and shades == sorted(shades) and len(set(shades)) == 4
    assert shades[-1] == 1


def test_all_ranks_zero_and_no_sites_still_render() -> None:
    assert ">0</text>" in render_heat_map(sites({"query": [0, 0]}))
    ElementTree.fromstring(render_heat_map([]))


def test_the_page_loads_nothing_from_anywhere(run: dict[str, Any]) -> None:
    page = render_html(run)
    assert not re.search(r"\bsrc=|\bhref=(?!\"#)|url\(|@import|<script|<link", page)
    assert re.findall(r"https?://[^\"' <]*", page) == ["http://www.w3.org/2000/svg"]  # the namespace, never fetched
    assert "prefers-color-scheme: dark" in page and "color-scheme: light dark" in page


def test_text_is_escaped(run: dict[str, Any]) -> None:
    page = render_html(run)
    assert "<h1>Digits &lt;5 &amp; up&gt;</h1>" in page
    assert ">&lt;b&gt;</td>" in page and "<b>" not in page


def test_every_tag_is_closed(run: dict[str, Any]) -> None:
    class Balance(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag != "meta":
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    balance = Balance()
    balance.feed(render_html(run))
    assert balance.open == []
