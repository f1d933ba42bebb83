"""Rewrite the modules that own the matched weights so that each carries its low-rank update.

Three rewrites, the first that fits: `activation` adds ((x @ left) * gate) @ right to the matmul's output,
`weight` replaces the weight's node by W + ΔW, `property` lets every read of the weight give W + ΔW.
"""

from __future__ import annotations

import copy
import operator
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping
from typing import Any

import torch
from torch import fx, nn

from lora2fx.adapter import Adapter
from lora2fx.errors import RewriteError
from lora2fx.passes.install import Recipe, graph_recipe, install_owner
from lora2fx.passes.tracing import UntraceableError, library_key, trace_adapter, trace_owner
from lora2fx.program import Program
from lora2fx.site import Layout, Site

REWRITES = ("activation", "weight", "property")
_SCALARS = (bool, int, float, str)
_OUT_IN = Layout(contracted=(1,), free=(0,))
_IN_OUT = Layout(contracted=(0,), free=(1,))


def child_name(site: Site) -> str:
    """The name of the site's adapter in its owner."""
    suffix = "" if site.columns is None else "_" + site.role.replace(".", "_")
    return f"lora2fx_{site.parameter}{suffix}"


def weight_nodes(graph: fx.Graph, parameter: str) -> list[fx.Node]:
    """The nodes that read the parameter."""
    return [node for node in graph.nodes if node.op == "get_attr" and node.target == parameter]


def matmul_input(node: fx.Node, weight: fx.Node) -> tuple[Any, Layout] | None:
    """(activation, layout of the weight) where `node` is a plain matmul of an activation with this 2-D weight."""
    args, named = node.args, node.kwargs
    if node.target is torch.nn.functional.linear or node.target is torch._C._nn.linear:
        linear = args[1] if len(args) > 1 else named.get("weight")
        return (args[0] if args else named["input"], _OUT_IN) if linear is weight else None
    if node.target in (torch.matmul, torch.mm, operator.matmul, "matmul", "mm", "__matmul__"):
        return (args[0], _IN_OUT) if len(args) == 2 and args[1] is weight else None
    if node.target in (torch.addmm, "addmm"):
        return (args[1], _IN_OUT) if len(args) == 3 and args[2] is weight and not named else None
    return None


def _activation_input(graph: fx.Graph, site: Site) -> tuple[fx.Node, fx.Node] | None:
    """(matmul, its activation) if the site's weight is used once, by a plain matmul of the recorded layout."""
    reads = weight_nodes(graph, site.parameter)
    users = [user for node in reads for user in node.users]
    if len(site.shape) != 2 or len(reads) != 1 or len(users) != 1:
        return None
    found = matmul_input(users[0], reads[0])
    if found is None or found[1] != site.layout or not isinstance(found[0], fx.Node) or found[0] is reads[0]:
        return None
    return users[0], found[0]


def _fits(graph: fx.Graph | None, site: Site, rewrite: str) -> bool:
    if rewrite == "property":
        return True
    if graph is None:
        return False
    if rewrite == "activation":
        return _activation_input(graph, site) is not None
    return bool(weight_nodes(graph, site.parameter))


def owner_graph(owner: nn.Module) -> tuple[fx.Graph | None, str]:
    """The owner's graph, or None and why it can't be traced."""
    try:
        return trace_owner(owner), ""
    except UntraceableError as error:
        return None, str(error)


def plan_rewrite(model: nn.Module, site: Site, outside_reads: Collection[str] = (), after: str | None = None) -> str:
    """The first rewrite that fits the site; with `after`, the first behind that one.

    Raises `RewriteError`, saying why and what to do, where none does.
    """
    owner = model.get_submodule(site.owner)
    if hasattr(owner, "parametrizations") or "parametrizations" in site.owner.split("."):
        raise RewriteError(
            f"{site.weight} is already parametrized (torch.nn.utils.parametrize): remove the parametrization with"
            " remove_parametrizations, or leave the weight out with exclude=."
        )
    graph = None if site.weight in outside_reads else owner_graph(owner)[0]
    start = REWRITES.index(after) + 1 if after else 0
    for rewrite in REWRITES[start:]:
        if _fits(graph, site, rewrite):
            return rewrite
    raise RewriteError(f"{site.weight}: no rewrite is left after {after!r}; leave it out with exclude=.")


def _insert_adapter(graph: fx.Graph, adapter_graph: fx.Graph, child: str, inputs: Mapping[str, fx.Node]) -> fx.Node:
    """Copy the adapter's graph to the insertion point; its state is read from the owner's child."""
    copied: dict[fx.Node, Any] = {}
    for node in adapter_graph.nodes:
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


def _add_to_output(graph: fx.Graph, child: str, adapter: Adapter) -> None:
    """y → y + adapter(x), on the adapter's own columns of a fused weight."""
    found = _activation_input(graph, adapter.site)
    assert found is not None
    matmul, activation = found
    users = list(matmul.users)
    with graph.inserting_before(matmul.next):
        update = _insert_adapter(graph, trace_adapter(adapter, Adapter.forward), child, {"x": activation})
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
    for weight in weight_nodes(graph, adapter.site.parameter):
        users = list(weight.users)
        with graph.inserting_before(weight.next):
            update = _insert_adapter(graph, adapter_graph, child, {})
            update = graph.call_method("type_as", (update, weight))
            total = graph.call_function(operator.add, (weight, update))
        for user in users:
            user.replace_input_with(weight, total)


def rewrite_graph(graph: fx.Graph, adapters: Mapping[str, Adapter], plans: Mapping[str, str]) -> None:
    """Add every adapter whose plan is `activation` or `weight` to the owner's graph, in place."""
    for child, adapter in adapters.items():
        if plans[child] == "weight":
            _add_to_weight(graph, child, adapter)
    for child, adapter in adapters.items():
        if plans[child] == "activation":
            _add_to_output(graph, child, adapter)
    graph.lint()


def _check_dropout(adapter: Adapter, rewrite: str) -> None:
    if adapter.dropout is not None and rewrite != "activation":
        raise RewriteError(
            f"{adapter.site.weight} can only be rewritten as `{rewrite}`, where no activation passes that lora_dropout"
            " could act on. Use lora_dropout=0, or leave the weight out with exclude=."
        )


def _adapter_key(adapter: Adapter) -> Hashable:
    """What alone decides an adapter's graphs: its class, its plain settings, and the matrix that its site is."""
    site = adapter.site
    plain = tuple((name, value) for name, value in sorted(vars(adapter).items()) if isinstance(value, _SCALARS))
    structure = (site.shape, site.layout, site.columns is None, adapter.dropout is None)
    return type(adapter), plain, structure, site.parameter, tuple(adapter._parameters), tuple(adapter._buffers)


def _recipe_key(owner: nn.Module, adapters: Mapping[str, Adapter], plans: Mapping[str, str]) -> Hashable | None:
    library = library_key(owner)
    if library is None:
        return None
    return library, tuple((child, plans[child], _adapter_key(adapter)) for child, adapter in adapters.items())


_RECIPES: dict[Hashable, Recipe] = {}


def owner_recipe(owner: nn.Module, adapters: Mapping[str, Adapter], plans: Mapping[str, str]) -> Recipe:
    """The recipe of the owner's new class; `adapters` and `plans` by child name. Modules alike are rewritten once."""
    key = _recipe_key(owner, adapters, plans)
    if key is None or key not in _RECIPES:
        recipe = _make_recipe(owner, adapters, plans)
        if key is None:
            return recipe
        _RECIPES[key] = recipe
    return _RECIPES[key]


def _make_recipe(owner: nn.Module, adapters: Mapping[str, Adapter], plans: Mapping[str, str]) -> Recipe:
    merged: dict[str, list[str]] = defaultdict(list)
    for child, adapter in adapters.items():
        _check_dropout(adapter, plans[child])
        if plans[child] == "property":
            merged[adapter.site.parameter].append(child)
    graph = None
    if len(set(plans.values()) - {"property"}) > 0:
        graph = copy.deepcopy(trace_owner(owner))
        rewrite_graph(graph, adapters, plans)
    return graph_recipe(graph, tuple((name, tuple(children)) for name, children in merged.items()))


def rewrite_owners(program: Program, plans: Mapping[str, str]) -> None:
    """Install every adapter of the program by the rewrite planned for it; both by the adapter's module path."""
    owners: dict[str, dict[str, Adapter]] = defaultdict(dict)
    for path, adapter in program.adapters.items():
        owners[adapter.site.owner][path.rpartition(".")[2]] = adapter
    recipes = {}
    for path, adapters in owners.items():
        children = {child: plans[f"{path}.{child}".lstrip(".")] for child in adapters}
        recipes[path] = owner_recipe(program.root.get_submodule(path), adapters, children)
    for path, adapters in owners.items():
        for child, adapter in adapters.items():
            adapter.rewrite = plans[f"{path}.{child}".lstrip(".")]
        install_owner(program.root.get_submodule(path), recipes[path], adapters)
