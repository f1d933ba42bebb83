"""`python -m tests.mutants [allocator|fold|verify]`: changes the sources one place at a time, and runs their tests.

A change that no test notices is listed, unless `tests/MUTANTS.md` says why it is none. Each mutant is a fork of one
process that has imported the libraries, so that it costs its tests' time and not another start of torch; tools that
start a process a mutant, or copy the tree, would take hours and lose the linked folders.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
EXPLAINED = Path(__file__).with_name("MUTANTS.md")
SECONDS = 90
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "allocator": (
        ("lora2fx.training.allocator",),
        ("test_training_allocator.py", "test_methods_adalora.py", "test_training_groups.py", "test_properties.py"),
    ),
    "fold": (
        ("lora2fx.passes.fold", "lora2fx.passes.merging"),
        ("test_fold.py", "test_fold_rounding.py", "test_bad_use.py", "test_faults_compute.py"),
    ),
    "verify": (("lora2fx.passes.verify", "lora2fx.passes.checks"), ("test_verify.py", "test_transform.py")),
}
"""By name: the modules that are changed, and their tests, the quickest first."""

COMPARED: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}


@dataclass(frozen=True)
class Mutant:
    """One change of one module: where, from what to what, and the module's source with it."""

    module: str
    line: int
    place: str
    change: str
    source: str

    @property
    def name(self) -> str:
        """What stands in `MUTANTS.md`: lines move, functions hardly."""
        return f"`{self.module.removeprefix('lora2fx.')}` {self.place}: `{self.change}`"


def _changed(node: ast.AST) -> Iterator[ast.AST]:
    """Every other node that may stand in its place."""
    match node:
        case ast.Compare(ops=[operator]):
            for other in COMPARED[type(operator)]:
                yield ast.Compare(node.left, [other()], node.comparators)
        case ast.BinOp(op=operator) if type(operator) in COMPUTED:
            yield ast.BinOp(node.left, COMPUTED[type(operator)](), node.right)
        case ast.BoolOp():
            yield ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
            yield node.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield ast.Constant(node.value + 1)
        case ast.If() | ast.IfExp() | ast.While():
            other = copy.copy(node)
            other.test = ast.UnaryOp(ast.Not(), node.test)
            yield other
        case ast.comprehension(ifs=[_, *_]):
            other = copy.copy(node)
            other.ifs = []
            yield other
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.AugAssign():
            yield ast.Pass()
        case ast.Return(value=ast.AST()):
            yield ast.Return(None)
        case ast.Call(keywords=[_, *_]):
            for index in (index for index, keyword in enumerate(node.keywords) if keyword.arg != "strict"):
                yield ast.Call(node.func, node.args, node.keywords[:index] + node.keywords[index + 1 :])


def _places(tree: ast.AST, place: str = "") -> Iterator[tuple[ast.AST, str, Any, str]]:
    """(parent, field, index or None, function) of all code: no message, annotation, decorator or `strict`."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            guard = isinstance(child, ast.keyword) and child.arg == "strict"
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr) or guard:
                continue
            own = child.name if isinstance(child, (ast.FunctionDef, ast.ClassDef)) else ""
            inner = f"{place}.{own}".strip(".") if own else place
            yield tree, field, index if isinstance(value, list) else None, inner
            yield from _places(child, inner)


def _shown(node: ast.AST) -> str:
    """The node in one line, a condition without what hangs on it."""
    shown = node.test if isinstance(node, (ast.If, ast.While)) else node
    text = "pass" if isinstance(node, ast.Pass) else ast.unparse(shown)
    return " ".join(text.split()).replace("|", "¦")


def mutants(module: str) -> Iterator[Mutant]:
    """Every mutant of a module; the second of two alike in one function is numbered."""
    path = ROOT / (module.replace(".", "/") + ".py")  # found without importing anything of lora2fx
    tree, seen = ast.parse(path.read_text(encoding="utf-8")), Counter[tuple[str, str]]()
    for parent, field, index, place in list(_places(tree)):
        held = getattr(parent, field)
        node = held if index is None else held[index]
        for other in _changed(node):
            ast.copy_location(other, node if hasattr(node, "lineno") else parent)
            change = f"{_shown(node)} → {_shown(other)}"
            if index is None:
                setattr(parent, field, other)
            else:
                held[index] = other
            source = ast.unparse(ast.fix_missing_locations(tree))
            if index is None:
                setattr(parent, field, node)
            else:
                held[index] = node
            seen[place, change] += 1
            again = f" ({seen[place, change]})" if seen[place, change] > 1 else ""
            yield Mutant(module, getattr(node, "lineno", 0), place or "module", change + again, source)


class Replaced(MetaPathFinder, Loader):
    """Imports one module from a source of ours."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(name, self) if name == self.mutant.module else None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.mutant.source, self.mutant.module, "exec"), module.__dict__)


def _tested(mutant: Mutant, tests: tuple[str, ...]) -> None:
    """In a process of its own: exit with 0 where no test fails."""
    import pytest

    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    sys.meta_path.insert(0, Replaced(mutant))
    options = [
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--timeout",
        str(SECONDS),
    ]
    os._exit(int(pytest.main([*options, *(str(ROOT / "tests" / test) for test in tests)])))


def survives(mutant: Mutant, tests: tuple[str, ...]) -> bool:
    """Whether all tests pass with it, within the time; a mutant that takes longer is noticed too."""
    process = os.fork()
    if not process:
        os.setpgid(0, 0)
        _tested(mutant, tests)
    until = time.monotonic() + SECONDS * len(tests)
    while time.monotonic() < until:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return False


def run(part: str) -> int:
    """Every mutant of a part; how many survive without a reason."""
    modules, tests = PARTS[part]
    explained, total, unexplained, known = EXPLAINED.read_text(encoding="utf-8"), 0, 0, 0
    unchanged = Mutant("lora2fx.nothing", 0, "", "", "")
    for test in tests:
        if not survives(unchanged, (test,)):
            sys.exit(f"{test} fails without any change; nothing can be told from it.")
    for module in modules:
        for mutant in mutants(module):
            total += 1
            if not all(survives(mutant, (test,)) for test in tests):
                continue
            if mutant.name in explained:
                known += 1
                continue
            unexplained += 1
            print(f"survives, line {mutant.line}: {mutant.name}", flush=True)
    print(f"{part}: {total} mutants, {total - known - unexplained} noticed, {known} explained, {unexplained} not")
    return unexplained


def main() -> int:
    """The parts that are named, or all."""
    os.nice(10)
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    return min(1, sum(run(part) for part in sys.argv[1:] or PARTS))


if __name__ == "__main__":
    sys.exit(main())
