"""Rewrite the modules that read the matched weights so that each carries its low-rank update.

Three rewrites, the first that fits: `activation` adds ((x @ left) * gate) @ right to the matmul's output (or
looks the same up for an embedding's ids), `weight` replaces the weight's node by W + ΔW, `property` lets every
read of the weight give W + ΔW.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, fx, nn

from lora2fx.adapter import Adapter
from lora2fx.errors import RewriteError
from lora2fx.passes.insertion import rewrite_graph, site_use
from lora2fx.passes.install import Recipe, install_graph, install_owner
from lora2fx.passes.merging import is_foldable
from lora2fx.passes.places import Place, find_place, graph_place, relative
from lora2fx.passes.recipes import owner_recipe
from lora2fx.passes.uses import IN_OUT, parameter_use, weight_nodes
from lora2fx.program import Program
from lora2fx.site import Site

REWRITES = ("activation", "weight", "property")


def child_name(site: Site) -> str:
    """The name of the site's adapter in its owner."""
    suffix = "" if site.columns is None else "_" + site.role.replace(".", "_")
    return f"lora2fx_{site.parameter}{suffix}"


def _fits(place: Place, site: Site, rewrite: str) -> bool:
    if rewrite != "activation" and not is_foldable(place.module.get_parameter(place.parameter)):
        return False
    if rewrite == "property":
        return not (isinstance(place.module, fx.GraphModule) and place.parameter == site.parameter)
    if place.graph is None:
        return False
    if rewrite == "activation":
        return site_use(place.graph, place.parameter, site) is not None
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
    weight = model.get_parameter(site.weight)
    if not is_foldable(weight):
        raise RewriteError(
            f"{site.weight} is a {_kind(weight)}, which nothing can be added to: only a weight that one plain matmul or"
            f" lookup reads can be adapted then ({place.reason or 'its forward uses it in another way'})."
            " Dequantise it, or leave it out with exclude=."
        )
    raise RewriteError(f"{site.weight}: no rewrite is left after {after!r}; leave it out with exclude=.")


def _kind(weight: Tensor) -> str:
    plain = type(weight.data) is Tensor
    return f"{weight.dtype} tensor" if plain else f"{type(weight.data).__name__} of {weight.dtype}"


def _check_dropout(adapter: Adapter, rewrite: str) -> None:
    if adapter.dropout is not None and rewrite != "activation":
        raise RewriteError(
            f"{adapter.site.weight} can only be rewritten as `{rewrite}`, where no activation passes that lora_dropout"
            " could act on. Use lora_dropout=0, or leave the weight out with exclude=."
        )


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
