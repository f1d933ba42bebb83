"""Every small change of a module that a test ought to notice: an operator, a number, a condition, a call left out."""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
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
    """One change of one module: the lines of its statement, from what to what, and the module's source with it."""

    module: str
    lines: range
    place: str
    change: str
    source: str

    @property
    def name(self) -> str:
        """What stands in `MUTANTS.md`: lines move, functions hardly."""
        return f"`{self.module.removeprefix('lora2fx.')}` {self.place}: `{self.change}`"


def _changes(condition: ast.expr) -> bool:
    """Whether a change of the condition's own is its opposite."""
    match condition:
        case ast.UnaryOp(op=ast.Not()) | ast.Compare(ops=[_]):
            return True
        case _:
            return False


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
        case ast.If() | ast.IfExp() | ast.While() if not _changes(node.test):
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


def _lines(node: ast.stmt) -> range:
    """The statement's own lines, without the block that hangs on it."""
    last = node.end_lineno or node.lineno
    body: list[ast.stmt] = getattr(node, "body", [])
    return range(node.lineno, 1 + (max(node.lineno, body[0].lineno - 1) if body else last))


def _places(tree: ast.AST, place: str = "", lines: range = range(0)) -> Iterator[tuple[ast.AST, str, Any, str, range]]:
    """(parent, field, index or None, function, lines) of all code: no message, annotation, decorator or `strict`."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            guard = isinstance(child, ast.keyword) and child.arg == "strict"
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr) or guard:
                continue
            own = child.name if isinstance(child, (ast.FunctionDef, ast.ClassDef)) else ""
            inner = f"{place}.{own}".strip(".") if own else place
            span = _lines(child) if isinstance(child, ast.stmt) else lines
            yield tree, field, index if isinstance(value, list) else None, inner, span
            yield from _places(child, inner, span)


def _shown(node: ast.AST) -> str:
    """The node in one line, a condition without what hangs on it."""
    shown = node.test if isinstance(node, (ast.If, ast.While)) else node
    text = "pass" if isinstance(node, ast.Pass) else ast.unparse(shown)
    return " ".join(text.split()).replace("|", "¦")


def source_path(module: str) -> Path:
    """Found without importing anything of lora2fx."""
    return ROOT / (module.replace(".", "/") + ".py")


def mutants(module: str) -> Iterator[Mutant]:
    """Every mutant of a module; the second of two alike in one function is numbered."""
    tree, seen = ast.parse(source_path(module).read_text(encoding="utf-8")), Counter[tuple[str, str]]()
    for parent, field, index, place, lines in list(_places(tree)):
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
            yield Mutant(module, lines, place or "module", change + again, source)
