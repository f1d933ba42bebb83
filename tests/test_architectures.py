"""docs/architectures.md lists the zoo as it is; `python -m tests.zoo` writes it anew."""

from tests.zoo import HELD_OUT, ZOO
from tests.zoo.__main__ import HEADER, MARKS, PAGE, USES, adapted, between_marks, cases, right_roles, row, static_row

EVERY = ZOO | HELD_OUT
PAGE_ROWS = [line.strip("|").split(" | ") for line in between_marks(PAGE.read_text(encoding="utf-8")).splitlines()]


def test_the_page_lists_every_architecture_and_nothing_else():
    header, _, *rows = ([cell.strip() for cell in cells] for cells in PAGE_ROWS)
    assert tuple(header) == HEADER
    assert [tuple(cells[:3]) for cells in rows] == [static_row(name, EVERY[name]) for name in EVERY]


def test_every_row_says_that_all_roles_were_right_and_verified():
    for cells in PAGE_ROWS[2:]:
        _, _, weights, right, _, status, error, _ = (cell.strip() for cell in cells)
        assert right == f"{weights}/{weights}", cells
        assert status in ("passed", "") and float(error or 0) < 1e-4, cells


def test_the_last_column_is_what_tests_are_parametrized_over():
    for cells in PAGE_ROWS[2:]:
        uses = [use for use, test in USES.items() if cells[0].strip() in cases(test)]
        assert cells[-1].strip() == ", ".join(uses), cells


def test_a_row_is_made_by_running_the_model():
    assert right_roles(ZOO["gpt2"]) == len(ZOO["gpt2"].roles)
    assert adapted(ZOO["gpt2"])[:2] == ("12 activation", "passed")
    assert row("gpt2", ZOO["gpt2"])[-1] == "generate, compile"
    assert MARKS[0] in PAGE.read_text(encoding="utf-8")
