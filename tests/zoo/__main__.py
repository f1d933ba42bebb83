"""`python -m tests.zoo` prints what works on which architecture, and writes it into docs/architectures.md.

Every row is made by running it: roles held against the truth, every weight with a role adapted, verified and folded.
The last column names the tests of further uses that have the architecture among their cases.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import lora2fx
from lora2fx.analysis import tied_weights
from lora2fx.inputs import as_inputs, flatten_outputs
from lora2fx.program import program_of
from tests import test_transform, test_usage_compiled
from tests.usage import randomise
from tests.zoo import HELD_OUT, ZOO, Architecture

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
MARKS = ("<!-- made by python -m tests.zoo -->\n", "<!-- end -->\n")
HEADER = ("architecture", "tuned on", "weights", "roles right", "rewrites", "transformed, verified", "folded", "also")
METHOD = lora2fx.LoRA2(r=3, k=2)
USES = {
    "generate": test_transform.test_generate_gives_the_folded_models_tokens,
    "compile": test_usage_compiled.test_compiles_to_one_graph_that_masks_do_not_break,
    "export": test_usage_compiled.test_exports_with_the_adapters_in_it,
}


def cases(test: object) -> set[str]:
    """The architectures that a test is parametrized over."""
    return {case for mark in getattr(test, "pytestmark", ()) for case in mark.args[1] if isinstance(case, str)}


def static_row(name: str, architecture: Architecture) -> tuple[str, str, str]:
    """What is known without running: the name, whether rules were tuned on it, its weights with a role."""
    return name, "yes" if name in ZOO else "no", str(len(architecture.roles))


def right_roles(architecture: Architecture) -> int:
    """How many weights get exactly the roles and columns that the truth says."""
    found: dict[str, dict[str, object]] = {}
    for site in lora2fx.inspect(architecture.build(), architecture.example_inputs).sites:
        if site["shape"]:
            columns = site["slice"] and tuple(tuple(span) for span in site["slice"])
            found.setdefault(site["weight"], {})[site["role"]] = columns
    truth = {w: dict(r) if isinstance(r, Mapping) else {r: None} for w, r in architecture.roles.items()}
    return sum(found.get(weight) == roles for weight, roles in truth.items())


def adapted(architecture: Architecture) -> tuple[str, str, str]:
    """(rewrites, verification, worst error of the folded model's outputs)."""
    model = architecture.build()
    inputs = as_inputs(model, architecture.example_inputs)
    wanted = architecture.roles.keys() - tied_weights(model).keys()
    lora2fx.transform(
        model, lambda site: site.weight in wanted, METHOD, example_inputs=architecture.example_inputs, seed=0
    )
    rewrites = Counter(adapter.rewrite for adapter in program_of(model, "zoo").adapters.values())
    status = str(lora2fx.report(model).verify["status"])
    randomise(model)
    before = [out for out in flatten_outputs(inputs.call(model)) if out.is_floating_point()]
    lora2fx.fold(model)
    after = [out for out in flatten_outputs(inputs.call(model)) if out.is_floating_point()]
    gaps = [(a - b).abs().max() / b.abs().max().clamp(min=1e-9) for a, b in zip(after, before, strict=True)]
    return ", ".join(f"{n} {name}" for name, n in rewrites.items()), status, f"{max(gap.item() for gap in gaps):.0e}"


def row(name: str, architecture: Architecture) -> tuple[str, ...]:
    """One line of the table."""
    also = ", ".join(use for use, test in USES.items() if name in cases(test))
    right = f"{right_roles(architecture)}/{len(architecture.roles)}"
    free = architecture.roles.keys() - tied_weights(architecture.build()).keys()
    return (*static_row(name, architecture), right, *(adapted(architecture) if free else ("", "", "")), also)


def table() -> str:
    """The whole table, as Markdown."""
    rows = [HEADER, ("---",) * len(HEADER)]
    rows += [row(name, architecture) for name, architecture in (ZOO | HELD_OUT).items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"


def between_marks(page: str) -> str:
    """What stands between the marks."""
    return page.partition(MARKS[0])[2].partition(MARKS[1])[0]


def main() -> None:
    """Print the table, and put it between the page's marks."""
    warnings.simplefilter("ignore")
    page, made = PAGE.read_text(encoding="utf-8"), table()
    print(made)
    PAGE.write_text(
        page.replace(MARKS[0] + between_marks(page) + MARKS[1], MARKS[0] + made + MARKS[1]), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
