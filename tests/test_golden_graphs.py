"""Each rewrite's graph of one module is the one on file; `python -m tests.golden_graphs` writes the files anew."""

import pytest

from lora2fx.passes.rewrite import REWRITES
from tests.golden_graphs import EXAMPLES, GRAPHS, dump


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_rewrite_makes_the_graph_on_file(name):
    found = dump(name)
    assert found == (GRAPHS / f"{name}.txt").read_text(encoding="utf-8")
    rewrite = name.partition("_")[0]
    assert all(line.endswith(rewrite) for line in found.splitlines() if line.startswith("adapter: "))
    assert dump(name) == found


def test_there_is_a_file_for_each_example_and_an_example_for_each_rewrite():
    assert {path.stem for path in GRAPHS.iterdir()} == set(EXAMPLES)
    assert {name.partition("_")[0] for name in EXAMPLES} == set(REWRITES)
