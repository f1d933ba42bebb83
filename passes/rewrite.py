"""Rewrite the modules that read the matched weights so that each carries its low-rank update.

Three rewrites, the first that fits: `activation` adds ((x @ left) * gate) @ right to the matmul's output (or
looks the same up for an embedding's ids), `weight` replaces the weight's node by W + ΔW, `property` lets every
read of the weight give W + ΔW.
"""

from __future__ import annotations

import copy
import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from lora2fx.adapter import Adapter
from lora2fx.errors import RewriteError
from lora2fx.passes.install import Recipe, graph_recipe, install_graph, install_owner
from lora2fx.passes.places import Place, find_place, graph_place, relative
from lora2fx.passes.tracing import library_key, trace_adapter, trace_owner
from lora2fx.passes.uses import IN_OUT, GraphUse, parameter_use, weight_nodes
from lora2fx.program import Program
from lora2fx.site import Site

REWRITES = ("activation", "weight", "property")
_SCALARS = (bool, int, float, str)


def child_name(site: Site) -> str:
    """The name of the site's adapter in its owner."""
    suffix = "" if site.columns is None else "_" + site.role.replace(".", "_")
    return f"lora2fx_{site.parameter}{suffix}"


def _site_use(graph: fx.Graph, parameter: str, site: Site) -> GraphUse | None:
    """The one plain matmul or lookup of the recorded layout that the site's weight is for, if that is all."""
    found = parameter_use(graph, parameter)
    return found if found is not None and found.layout == site.layout else None


def _fits(place: Place, site: Site, rewrite: str) -> bool:
    if rewrite == "property":
        return not (isinstance(place.module, fx.GraphModule) and place.parameter == site.parameter)
    if place.graph is None:
        return False
    if rewrite == "activation":
        return _site_use(place.graph, place.parameter, site) is not None
    return bool(weight_nodes(place.graph, place.parameter))


def _refuse_owner(owner: nn.Module, site: Site) -> None:
    if "parametrizations" in site.owner.split("."):
        raise RewriteError(
            f"{site.weight} is already parametrized (torch.nn.utils.parametrize): remove the parametrization with"
            " remove_parametrizations, or leave the weight out with exclude=."
        )
    if isinstance(owner, torch.jit.ScriptModule):
        raise RewriteError(
            f"{site.weight} belongs to a scripted module, whose code can't be changed: transform the module before"
            " torch.jit.script, or leave the weight out with exclude=."
        )


def plan_rewrite(model: nn.Module, site: Site, outside_reads: Collection[str] = (), after: str | None = None) -> str:
    """The first rewrite that fits the site; with `after`, the first behind that one.

    Raises `RewriteError`, saying why and what to do, where none does.
    """
    _refuse_owner(model.get_submodule(site.owner), site)
    place = find_place(model, site, outside_reads)
    start = REWRITES.index(after) + 1 if after else 0
    for rewrite in REWRITES[start:]:
        if _fits(place, site, rewrite):
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


def _parameter(child: str, adapter: Adapter) -> str:
    """The adapter's weight as the graph names it, whose module is the adapter's parent."""
    prefix = child.rpartition(".")[0]
    return f"{prefix}.{adapter.site.parameter}".lstrip(".")


def _add_to_output(graph: fx.Graph, child: str, adapter: Adapter) -> None:
    """y → y + adapter(x), on the adapter's own columns of a fused weight."""
    found = _site_use(graph, _parameter(child, adapter), adapter.site)
    if found is None:
        raise RewriteError(f"{adapter.site.weight} is not read by one plain matmul: it can't be rewritten here.")
    matmul, users = found.node, list(found.node.users)
    function: Callable[..., Tensor] = Adapter.lookup if found.lookup else Adapter.forward
    name = "ids" if found.lookup else "x"
    with graph.inserting_before(matmul.next):
        update = _insert_adapter(graph, trace_adapter(adapter, function), child, {name: found.input})
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
            update = _insert_adapter(graph, adapter_graph, child, {})
            update = graph.call_method("type_as", (update, weight))
            total = graph.call_function(operator.add, (weight, update))
        for user in users:
            user.replace_input_with(weight, total)


def rewrite_graph(graph: fx.Graph, adapters: Mapping[str, Adapter], plans: Mapping[str, str]) -> None:
    """Add every adapter whose plan is `activation` or `weight` to the graph, in place; by its path from there."""
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
    structure = (site.shape, site.layout, site.columns is None, adapter.dropout is None, adapter.padding is None)
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
        if plans[child] == "property":
            merged[adapter.site.parameter].append(child)
    graph = None
    if set(plans.values()) - {"property"}:
        graph = copy.deepcopy(trace_owner(owner))
        rewrite_graph(graph, adapters, plans)
    return graph_recipe(graph, tuple((name, tuple(children)) for name, children in merged.items()))


def _padding_row(model: nn.Module, site: Site) -> int | None:
    """The row of an embedding that its lookup says is padding, which never moves."""
    owner = model.get_submodule(site.owner)
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return owner.padding_idx
    if site.layout != IN_OUT:
        return None
    place = find_place(model, site)
    found = None if place.graph is None else parameter_use(place.graph, place.parameter)
    return None if found is None or found.padding is None else found.padding % site.shape[0]


def _keep_padding(model: nn.Module, adapter: Adapter) -> None:
    row = _padding_row(model, adapter.site)
    if row is not None:
        adapter.padding = torch.tensor([row], device=model.get_parameter(adapter.site.weight).device)


def _grouped(program: Program, plans: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """By the path of each module to rewrite: its adapters' paths, by what their names are from there."""
    places: dict[str, dict[str, str]] = defaultdict(dict)
    for path, adapter in program.adapters.items():
        around = graph_place(program.root, adapter.site.weight) if plans[path] != "property" else None
        place = adapter.site.owner if around is None else around.path
        places[place][relative(path, place)] = path
    return places


def _rewritten_graph(module: fx.GraphModule, adapters: Mapping[str, Adapter], plans: Mapping[str, str]) -> fx.Graph:
    graph = copy.deepcopy(module.graph)
    rewrite_graph(graph, adapters, plans)
    return graph


def rewrite_owners(program: Program, plans: Mapping[str, str]) -> None:
    """Install every adapter of the program by the rewrite planned for it; both by the adapter's module path.

    An fx module gets a new graph, any other module a new class. Raises `RewriteError` with the model as it was.
    """
    for path, adapter in program.adapters.items():
        _check_dropout(adapter, plans[path])
        _keep_padding(program.root, adapter)
    recipes = list[tuple[nn.Module, Recipe]]()
    graphs = list[tuple[fx.GraphModule, fx.Graph]]()
    for place, paths in _grouped(program, plans).items():
        module = program.root.get_submodule(place)
        adapters = {child: program.adapters[path] for child, path in paths.items()}
        own = {child: plans[path] for child, path in paths.items()}
        if isinstance(module, fx.GraphModule):
            graphs.append((module, _rewritten_graph(module, adapters, own)))
        else:
            recipes.append((module, owner_recipe(module, adapters, own)))
    for path, adapter in program.adapters.items():
        adapter.rewrite = plans[path]
        program.root.get_submodule(adapter.site.owner).add_module(child_name(adapter.site), adapter)
    for owner, recipe in recipes:
        install_owner(owner, recipe)
    for around, graph in graphs:
        install_graph(around, graph)
