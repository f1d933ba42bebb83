"""Insert adapters into the graph of the forward that reads their weights."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from lora2fx.adapter import Adapter
from lora2fx.eager import adapted_linear, adapted_output
from lora2fx.errors import RewriteError
from lora2fx.passes.tracing import trace_adapter
from lora2fx.passes.uses import GraphUse, LinearLayer, linear_layer, parameter_use, weight_nodes
from lora2fx.site import Site


def site_use(graph: fx.Graph, parameter: str, site: Site) -> GraphUse | None:
    """The one plain matmul or lookup of the recorded layout that the site's weight is for, if that is all."""
    found = parameter_use(graph, parameter)
    return found if found is not None and found.layout == site.layout else None


def insert_module(graph: fx.Graph, module_graph: fx.Graph, child: str, inputs: Mapping[str, fx.Node]) -> fx.Node:
    """Copy a module's graph to the insertion point; its state is read from the owner's child."""
    copied: dict[fx.Node, Any] = {}
    for node in module_graph.nodes:
        if node.op == "output":
            result: Any = node.args[0]
            return copied[result]  # type: ignore[no-any-return]
        if node.op == "placeholder":
            copied[node] = inputs[node.target]
            continue
        if node.op == "get_attr":
            copied[node] = graph.create_node("get_attr", f"{child}.{node.target}", name=f"{child}_{node.target}")
            continue
        copied[node] = graph.node_copy(node, lambda n: copied[n])
        if node.op == "call_module":
            copied[node].target = f"{child}.{node.target}"
    raise AssertionError("a graph without output")


def _parameter(child: str, adapter: Adapter) -> str:
    """The adapter's weight as the graph names it, whose module is the adapter's parent."""
    prefix = child.rpartition(".")[0]
    return f"{prefix}.{adapter.site.parameter}".lstrip(".")


def _add_to_output(graph: fx.Graph, child: str, adapter: Adapter) -> None:
    """y → y + adapter(x), on the adapter's own columns of a fused weight."""
    found = site_use(graph, _parameter(child, adapter), adapter.site)
    if found is None:
        raise RewriteError(f"{adapter.site.weight} is not read by one plain matmul: it can't be rewritten here.")
    if found.lookup and adapter.dropout is not None:
        raise RewriteError(
            f"{adapter.site.weight} is looked up, so that no activation passes that lora_dropout could act on. Use"
            " lora_dropout=0, or leave the weight out with exclude=."
        )
    matmul, users = found.node, list(found.node.users)
    function: Callable[..., Tensor] = Adapter.lookup if found.lookup else Adapter.forward
    name = "ids" if found.lookup else "x"
    with graph.inserting_before(matmul.next):
        update = insert_module(graph, trace_adapter(adapter, function), child, {name: found.input})
        update = graph.call_method("type_as", (update, matmul))
        if adapter.columns is None:
            total = graph.call_function(operator.add, (matmul, update))
        else:
            columns = graph.get_attr(f"{child}.columns")
            total = graph.call_method("index_add", (matmul, -1, columns, update))
    for user in users:
        user.replace_input_with(matmul, total)


def _add_to_weight(graph: fx.Graph, child: str, adapter: Adapter) -> None:
    """W → W + ΔW wherever the owner's forward reads W."""
    adapter_graph = trace_adapter(adapter, Adapter.weight_delta)
    for weight in weight_nodes(graph, _parameter(child, adapter)):
        users = list(weight.users)
        with graph.inserting_before(weight.next):
            update = insert_module(graph, adapter_graph, child, {})
            update = graph.call_method("type_as", (update, weight))
            total = graph.call_function(operator.add, (weight, update))
        for user in users:
            user.replace_input_with(weight, total)


def eager_graph(graph: fx.Graph, adapters: Mapping[str, Adapter], plans: Mapping[str, str]) -> fx.Graph | None:
    """A rewritten copy of the graph in the eager form; None where an adapter has none.

    A linear layer, however it is written, becomes `adapted_linear` with all adapters of its weight; what any other
    matmul returns goes through `adapted_output`.
    """
    if set(plans.values()) != {"activation"}:
        return None
    graph = copy.deepcopy(graph)
    uses: dict[fx.Node, tuple[GraphUse, list[str]]] = {}
    for child, adapter in adapters.items():
        found = site_use(graph, _parameter(child, adapter), adapter.site)
        if found is None or found.lookup:
            return None
        uses.setdefault(found.node, (found, []))[1].append(child)
    for found, children in uses.values():
        layer = linear_layer(found.node)
        if layer is None:
            for child in children:
                _pass_through(graph, found, child)
        else:
            _become_linear(graph, found.node, layer, children)
    return graph


def _become_linear(graph: fx.Graph, matmul: fx.Node, layer: LinearLayer, children: Sequence[str]) -> None:
    with graph.inserting_before(matmul):
        weight = graph.call_method("t", (layer.weight,)) if layer.turned else layer.weight
        own = [graph.get_attr(child) for child in children]
        total = graph.call_function(adapted_linear, (layer.input, weight, layer.bias, *own))
    matmul.replace_all_uses_with(total)
    graph.erase_node(matmul)


def _pass_through(graph: fx.Graph, found: GraphUse, child: str) -> None:
    users = list(found.node.users)
    with graph.inserting_before(found.node.next):
        total = graph.call_function(adapted_output, (found.node, found.input, graph.get_attr(child)))
    for user in users:
        user.replace_input_with(found.node, total)


def rewrite_graph(graph: fx.Graph, adapters: Mapping[str, Adapter], plans: Mapping[str, str]) -> None:
    """Add every adapter whose plan is `activation` or `weight` to the graph, in place; by its path from there."""
    for child, adapter in adapters.items():
        if plans[child] == "weight":
            _add_to_weight(graph, child, adapter)
    for child, adapter in adapters.items():
        if plans[child] == "activation":
            _add_to_output(graph, child, adapter)
    graph.lint()
