"""Every figure in the tables of "Which method, which settings" stands in the results that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lora2fx
from lora2fx.finetuning.methods import default_rate, make_method

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "which-method.md").read_text(encoding="utf-8")
TABLES = re.findall(r"<!-- from ([\w.]+)(?:, (.+?))? -->\n((?:\|.*\n)+)", PAGE)


def printed(name: str, section: str) -> list[list[str]]:
    """The rows of a results file, or of the part of it that starts with `section`, as cells."""
    text = (ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8")
    if section:
        assert section in text, f"{name} has no part {section!r}"
        text = re.split(r"\n\n(?=\S[^\n]*\n\n)", text[text.index(section) :])[0]
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines() if "  " in line]


def shown(table: str) -> list[list[str]]:
    rows = [[cell.strip().strip("*") for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]
    return rows[2:]


def test_every_table_says_where_it_is_from() -> None:
    assert len(TABLES) == len(re.findall(r"^\|[-|]+\|$", PAGE, re.MULTILINE))


@pytest.mark.parametrize(("name", "section", "table"), TABLES, ids=[f"{name} {part}" for name, part, _ in TABLES])
def test_every_figure_was_printed(name, section, table) -> None:
    rows = printed(name, section)
    for cells in shown(table):
        keys = [cell for cell in cells if cell and not re.match(r"[-+]?\d", cell)]
        assert keys, cells
        own = [row for row in rows if all(key in row for key in keys)]
        assert len(own) == 1, f"{cells}: {len(own)} such rows in {name}"
        figures = {re.sub(r" to .*", "", cell) for cell in own[0]}
        assert set(cells) - {""} <= figures, f"{cells} is not what {name} has: {own[0]}"


DEFAULTS = re.findall(
    r"^\| `(\w+)` \| `(.+?)` \| ([\d.]+) \|$", (ROOT / "docs" / "training.md").read_text("utf-8"), re.M
)
BENCHMARKED = {"lora2": "LoRA² 3→1", "lora": "LoRA r=8", "adalora": "AdaLoRA 4→2"}


@pytest.mark.parametrize(("name", "method", "rate"), DEFAULTS)
def test_the_command_line_s_defaults_are_those_of_the_page_at_the_rates_of_the_benchmark(name, method, rate) -> None:
    assert make_method(name, {}) == eval(method, vars(lora2fx))
    assert default_rate(name, causal=False) == float(rate) == 5 * default_rate(name, causal=True)
    (row,) = (row for row in printed("quality_text.txt", "Mean over") if row[0] == BENCHMARKED[name])
    assert rate in row


def test_the_page_has_the_defaults() -> None:
    assert {name for name, *_ in DEFAULTS} == set(BENCHMARKED)
