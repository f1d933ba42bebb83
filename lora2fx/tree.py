"""A model's weights as a tree of its modules, layers that are alike shown once; in colour for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from typing import Any

from torch import nn

Entry = Mapping[str, Any]

BOLD, DIM, RESET = "\x1b[1m", "\x1b[2m", "\x1b[0m"
COLOURS = {
    "attention": "\x1b[36m",
    "ffn": "\x1b[32m",
    "unknown": "\x1b[33m",
    "other": "\x1b[35m",
}
_ATTENTION = ("query", "key", "value", "output")


def _columns(entry: Entry) -> str:
    spans = ", ".join(f"{start}:{stop}" for start, stop in entry.get("slice") or ())
    return f" [{spans if len(spans) < 30 else spans[:24] + ' …'}]" if spans else ""


@dataclass
class _Node:
    """A module: its class, the weights that it owns, the modules within it."""

    kind: str = ""
    weights: list[tuple[str, Entry]] = field(default_factory=list)
    children: dict[str, _Node] = field(default_factory=dict)

    def only(self) -> tuple[str, _Node | Entry] | None:
        """The one thing that the module holds; None where it holds more."""
        items: list[tuple[str, _Node | Entry]] = [(name + _columns(entry), entry) for name, entry in self.weights]
        items += self.children.items()
        return items[0] if len(items) == 1 else None


@dataclass(frozen=True)
class _Row:
    """One line: a module with its class, or a weight."""

    indent: str
    name: str
    kind: str = ""
    entry: Entry | None = None
    below: str = ""


@dataclass(frozen=True)
class TreeStyle:
    """Whether to colour, to show each role's evidence, and to show layers that are alike one by one."""

    colour: bool = False
    evidence: bool = False
    expand: bool = False

    def paint(self, text: str, code: str) -> str:
        """The text in a colour, where there are any."""
        return f"{code}{text}{RESET}" if self.colour and text else text


def _tree(model: nn.Module, entries: Sequence[Entry]) -> _Node:
    kinds = {path: type(module).__name__ for path, module in model.named_modules()}
    root = _Node(kinds[""])
    for entry in entries:
        owner, _, name = str(entry["weight"]).rpartition(".")
        node, path = root, ""
        for part in filter(None, owner.split(".")):
            path = f"{path}.{part}".lstrip(".")
            node = node.children.setdefault(part, _Node(kinds.get(path, "")))
        node.weights.append((name, entry))
    return root


def _colour(role: str) -> str:
    if role in _ATTENTION:
        return COLOURS["attention"]
    return COLOURS["ffn" if role.startswith("ffn") else role if role == "unknown" else "other"]


def _cells(entry: Entry, style: TreeStyle) -> str:
    """Role, shape, parameters of the whole weight, rewrite, and the reason where there is one."""
    shape = entry["shape"] or ()
    role = style.paint(f"{entry['role']:<9}", _colour(str(entry["role"]))) if entry["rewrite"] else f"{'–':<9}"
    numbers = f"{'×'.join(map(str, shape)):<14} {prod(shape):>13,}" if shape else f"{'':<28}"
    found = f"{role}  {numbers}  {entry['rewrite'] or '':<10}  {style.paint(entry['reason'] or '', DIM)}"
    return found.rstrip()


def _shape_of(name: str, node: _Node) -> tuple[Any, ...]:
    """What makes two layers alike: classes, names, roles, shapes, slices and rewrites, but not the layer's number."""
    own = tuple(
        (leaf, entry["role"], str(entry["shape"]), str(entry["slice"]), entry["rewrite"], bool(entry["reason"]))
        for leaf, entry in node.weights
    )
    return (name.isdigit(), node.kind, own, tuple((k, _shape_of(k, child)) for k, child in node.children.items()))


def _groups(node: _Node, style: TreeStyle) -> Iterator[tuple[str, _Node]]:
    """The children, each run of numbered ones that are alike as one."""
    if style.expand:
        yield from node.children.items()
        return
    for alike, run in groupby(node.children.items(), key=lambda child: _shape_of(*child)):
        names = list(run)
        if not alike[0] or len(names) == 1:
            yield from names
        else:
            yield f"{names[0][0]}–{names[-1][0]} ({len(names)} alike)", names[0][1]


def _rows(node: _Node, style: TreeStyle, indent: str = "") -> Iterator[_Row]:
    """The node's weights and modules; a module that holds one thing only shares its line."""
    items: list[tuple[str, _Node | Entry]] = [(name + _columns(entry), entry) for name, entry in node.weights]
    items += _groups(node, style)
    for index, (name, found) in enumerate(items):
        last = index == len(items) - 1
        branch, below = indent + ("└─ " if last else "├─ "), indent + ("   " if last else "│  ")
        while isinstance(found, _Node) and (only := found.only()):
            inner, found = only
            name += "." + inner
        if isinstance(found, _Node):
            yield _Row(branch, name, found.kind)
            yield from _rows(found, style, below)
        else:
            yield _Row(branch, name, entry=found, below=below)


def format_tree(model: nn.Module, entries: Sequence[Entry], style: TreeStyle | None = None) -> str:
    """The entries of a report's `sites` as a tree of the model's modules: role, shape, parameters, rewrite or reason.

    Consecutive numbered children that are alike (same classes, weights, roles, shapes) are one line, but for
    `style.expand`.
    """
    style = style or TreeStyle()
    root = _tree(model, entries)
    rows = list(_rows(root, style))
    width = max((len(row.indent + row.name) for row in rows if row.entry is not None), default=0)
    lines = [style.paint(root.kind, BOLD)]
    for row in rows:
        if row.entry is None:
            lines.append(f"{row.indent}{style.paint(row.name, BOLD)} {style.paint(row.kind, DIM)}".rstrip())
            continue
        lines.append(f"{row.indent}{row.name:<{width - len(row.indent)}}  {_cells(row.entry, style)}")
        if style.evidence and row.entry["evidence"]:
            lines.append(f"{row.below}   {style.paint(str(row.entry['evidence']), DIM)}")
    return "\n".join(lines)
