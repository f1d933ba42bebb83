"""How a graph uses a weight: read off its nodes, where one matmul or one lookup is all that it does."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from lora2fx.site import Layout

OUT_IN = Layout(contracted=(1,), free=(0,))
IN_OUT = Layout(contracted=(0,), free=(1,))
STACK = Layout(contracted=(1,), free=(2,), batch=(0,))

_aten = torch.ops.aten
_LINEAR = ("input", "weight", "bias")
_ADDED = ("bias", "input", "weight")
_TABLE = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
_NAMES = {"mat1": "input", "mat2": "weight", "other": "weight", "batch1": "input", "batch2": "weight"}
"""What torch calls the operands of a product, by what they are here."""
_SHAPES = frozenset({"shape", "dtype", "device", "ndim"})
_ASKING = frozenset({"size", "dim", "numel", "type_as", "to"})

_Signature = tuple[tuple[str, ...], Layout]
_MATMULS: dict[Any, _Signature] = {
    **dict.fromkeys((F.linear, torch._C._nn.linear, _aten.linear.default), (_LINEAR, OUT_IN)),
    **dict.fromkeys((torch.matmul, torch.mm, operator.matmul, "matmul", "mm", "__matmul__"), (_LINEAR[:2], IN_OUT)),
    **dict.fromkeys((_aten.matmul.default, _aten.mm.default), (_LINEAR[:2], IN_OUT)),
    **dict.fromkeys((torch.addmm, "addmm", _aten.addmm.default), (_ADDED, IN_OUT)),
    **dict.fromkeys((torch.bmm, "bmm", _aten.bmm.default), (_LINEAR[:2], STACK)),
    **dict.fromkeys((torch.baddbmm, "baddbmm", _aten.baddbmm.default), (_ADDED, STACK)),
}
_LOOKUPS: dict[Any, tuple[str, ...]] = {
    F.embedding: _TABLE,
    torch.embedding: ("weight", "input", "padding_idx", "scale_grad_by_freq", "sparse"),
    _aten.embedding.default: ("weight", "input", "padding_idx", "scale_grad_by_freq", "sparse"),
}
_TURNS: dict[Any, tuple[Any, ...] | None] = {
    **dict.fromkeys(("t", torch.t, _aten.t.default), ()),
    **dict.fromkeys(("transpose", torch.transpose, _aten.transpose.int, "swapaxes", torch.swapaxes), (0, 1)),
    **dict.fromkeys(("permute", torch.permute, _aten.permute.default), ((1, 0),)),
}
"""Calls that turn a matrix over, with the dimensions that they are given (in this or the other order)."""


@dataclass(frozen=True)
class GraphUse:
    """The one call that a weight is for: `node` multiplies `input` by it, or looks `input` up in its rows."""

    node: fx.Node
    input: fx.Node
    layout: Layout
    lookup: bool = False
    padding: int | None = None


def weight_nodes(graph: fx.Graph, parameter: str) -> list[fx.Node]:
    """The nodes that read the parameter."""
    return [node for node in graph.nodes if node.op == "get_attr" and node.target == parameter]


def _asks(user: fx.Node, weight: fx.Node) -> bool:
    """Whether the user looks at the weight's shape, dtype or device only."""
    if user.target is getattr:
        return user.args[1] in _SHAPES
    if user.op != "call_method" or user.target not in _ASKING:
        return False
    return user.target in ("size", "dim", "numel") or weight not in user.args[:1]


def readers(weight: fx.Node) -> list[fx.Node]:
    """The nodes that compute with the weight's values."""
    return [user for user in weight.users if not _asks(user, weight)]


def _turns(user: fx.Node, weight: fx.Node) -> bool:
    """Whether the user is the transpose of the weight, a matrix."""
    if user.target is getattr:
        return user.args[1] in ("T", "mT")
    dims = _TURNS.get(user.target)
    if dims is None or user.kwargs or user.args[:1] != (weight,):
        return False
    given = tuple(_modulo(dim) for dim in user.args[1:])
    return given in (dims, dims[::-1], *dims)


def _modulo(dim: Any) -> Any:
    if isinstance(dim, int):
        return dim % 2
    return tuple(_modulo(each) for each in dim) if isinstance(dim, (tuple, list)) else dim


def _given(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any] | None:
    """The node's arguments by name, None where it has one that is not in `names`."""
    named = {_NAMES.get(name, name): value for name, value in node.kwargs.items()}
    if len(node.args) > len(names) or not named.keys() <= set(names):
        return None
    return dict(zip(names, node.args, strict=False)) | named


def _matmul(node: fx.Node, weight: fx.Node) -> tuple[Any, Layout] | None:
    if node.target not in _MATMULS:
        return None
    names, layout = _MATMULS[node.target]
    given = _given(node, names)
    if given is None or given.get("weight") is not weight or given.get("bias") is weight:
        return None
    return given.get("input"), layout


@dataclass(frozen=True)
class LinearLayer:
    """What a matmul of one matrix is as torch's linear layer: `weight` is (out, in), `turned` (in, out)."""

    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    turned: bool


def linear_layer(node: fx.Node) -> LinearLayer | None:
    """The matmul as a linear layer whose bias, if any, is a parameter; None where it is none."""
    names, layout = _MATMULS[node.target]
    given = None if layout is STACK else _given(node, names)
    bias = None if given is None else given.get("bias")
    if given is None or not (bias is None or (isinstance(bias, fx.Node) and bias.op == "get_attr")):
        return None
    return LinearLayer(given["input"], given["weight"], bias, layout is IN_OUT)


def _lookup(node: fx.Node, weight: fx.Node) -> GraphUse | None:
    given = _given(node, _LOOKUPS[node.target]) if node.target in _LOOKUPS else None
    if given is None or given.get("weight") is not weight or not isinstance(given.get("input"), fx.Node):
        return None
    padding = given.get("padding_idx")
    if given.get("max_norm") is not None or given.get("scale_grad_by_freq", False) is not False:
        return None
    if not isinstance(padding, int | None):
        return None
    padding = None if padding is None or (padding < 0 and node.target is not F.embedding) else padding
    return GraphUse(node, given["input"], IN_OUT, True, padding)


def weight_use(weight: fx.Node) -> GraphUse | None:
    """The one call that computes with the weight, if that is a plain matmul or a lookup; seen through a transpose."""
    users = readers(weight)
    if len(users) != 1:
        return None
    user, turned = users[0], False
    if _turns(user, weight):
        weight, turned = user, True
        users = readers(weight)
        if len(users) != 1:
            return None
        user = users[0]
    found = _matmul(user, weight)
    if found is None:
        return None if turned else _lookup(user, weight)
    data, layout = found
    if not isinstance(data, fx.Node) or data is weight or (turned and layout is STACK):
        return None
    return GraphUse(user, data, {OUT_IN: IN_OUT, IN_OUT: OUT_IN}[layout] if turned else layout)


def parameter_use(graph: fx.Graph, parameter: str) -> GraphUse | None:
    """`weight_use` of a parameter that one node of the graph reads."""
    reads = weight_nodes(graph, parameter)
    return weight_use(reads[0]) if len(reads) == 1 else None
