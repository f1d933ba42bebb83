"""Compare two ONNX graphs from their outputs down, value by value, and list the weights that stand in the same place.

Only what the outputs depend on counts, whatever the nodes' names and order, and whether equal constants are shared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lora2fx.errors import ExportError


@dataclass(frozen=True)
class Pair:
    """Two constants in the same place of two graphs."""

    name: str
    first: Any
    second: Any


@dataclass
class _Walk:
    """What is left to compare, and what was compared, by the two values' identity."""

    pending: list[tuple[Any, Any, str]] = field(default_factory=list)
    seen: set[tuple[int, int]] = field(default_factory=set)
    pairs: list[Pair] = field(default_factory=list)

    def push(self, first: Any, second: Any, place: str) -> None:
        key = (id(first), id(second))
        if key not in self.seen:
            self.seen.add(key)
            self.pending.append((first, second, place))


def paired_constants(first: Any, second: Any) -> list[Pair]:
    """The constants of two onnxscript IR models whose graphs are the same in ops, edges, attributes, shapes and dtypes.

    Raises `ExportError` naming the first place where they differ.
    """
    _same(
        [value.name for value in first.graph.inputs], [value.name for value in second.graph.inputs], "inputs", "graph"
    )
    if first.functions or second.functions:
        raise ExportError(
            f"the exported graphs hold {len(first.functions)} and {len(second.functions)} functions of their own, which"
            " can't be compared here. Export with the default passes of torch.onnx.export."
        )
    walk = _Walk()
    _push_graph(walk, first.graph, second.graph, "graph")
    while walk.pending:
        _compare(walk, *walk.pending.pop())
    return walk.pairs


def op_counts(model: Any) -> dict[str, int]:
    """How often each operator occurs, subgraphs included, by name."""
    counts: dict[str, int] = {}
    for node in model.graph.all_nodes():
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))


def constant_of(value: Any) -> Any:
    """The tensor of an initializer or of a Constant node's output; None for a value that is computed."""
    node = value.producer()
    if node is None:
        return value.const_value
    if node.op_type == "Constant" and node.domain == "" and "value" in node.attributes:
        return node.attributes["value"].value
    return None


def _push_graph(walk: _Walk, first: Any, second: Any, place: str) -> None:
    _same(len(first.outputs), len(second.outputs), "number of outputs", place)
    _same(len(first.inputs), len(second.inputs), "number of inputs", place)
    for own, other in zip(first.inputs, second.inputs, strict=True):
        walk.seen.add((id(own), id(other)))
    for own, other in zip(first.outputs, second.outputs, strict=True):
        walk.push(own, other, f"{place}, output {own.name}")


def _compare(walk: _Walk, first: Any, second: Any, place: str) -> None:
    if first is None or second is None:
        _same(first is None, second is None, "optional input", place)
        return
    own, other = constant_of(first), constant_of(second)
    if own is not None and other is not None:
        _same((own.dtype, tuple(own.shape)), (other.dtype, tuple(other.shape)), "dtype and shape of a constant", place)
        walk.pairs.append(Pair(second.name, own, other))
        return
    node, peer = first.producer(), second.producer()
    _same(_kind(node, own), _kind(peer, other), "operator", place)
    if node is None:  # a graph input that isn't the other graph's input of the same place
        raise ExportError(f"the exported graphs differ at {place}: input {first.name} here, {second.name} there.")
    _same(first.index(), second.index(), "output of the operator", place)
    _compare_nodes(walk, node, peer, f"{node.op_type} {node.name}")


def _kind(node: Any, constant: Any) -> tuple[str, ...]:
    if constant is not None:
        return ("a constant",)
    return ("an input",) if node is None else (node.domain, node.op_type, node.overload)


def _compare_nodes(walk: _Walk, node: Any, peer: Any, place: str) -> None:
    _same(len(node.inputs), len(peer.inputs), "number of inputs", place)
    _same(sorted(node.attributes), sorted(peer.attributes), "attributes", place)
    for name, attribute in node.attributes.items():
        _compare_attribute(walk, attribute, peer.attributes[name], f"{place}, attribute {name}")
    for own, other in zip(node.inputs, peer.inputs, strict=True):
        walk.push(own, other, place)


def _compare_attribute(walk: _Walk, own: Any, other: Any, place: str) -> None:
    kind = own.type.name
    _same(kind, other.type.name, "type", place)
    if kind == "GRAPH":
        _push_graph(walk, own.value, other.value, place)
    elif kind == "GRAPHS":
        for branch, peer in zip(own.value, other.value, strict=True):
            _push_graph(walk, branch, peer, place)
    elif kind == "TENSOR":
        _same(own.value.tobytes(), other.value.tobytes(), "value", place)
    else:
        _same(own.value, other.value, "value", place)


def _same(own: Any, other: Any, what: str, place: str) -> None:
    if own != other:
        raise ExportError(
            f"the merged model's graph is not the base model's: at {place}, {what} is {other!r:.200} where the base has"
            f" {own!r:.200}."
        )
