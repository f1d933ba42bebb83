"""The recipe of an owner's new class, made once for all modules that are alike."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lora2fx.adapter import Adapter
from lora2fx.passes.insertion import eager_graph, rewrite_graph
from lora2fx.passes.install import Recipe, forward_source, graph_recipe
from lora2fx.passes.tracing import library_key, trace_owner

_NO_SETTINGS = frozenset(vars(nn.Module())) | {"site", "rewrite"}


def _adapter_key(adapter: Adapter) -> Hashable:
    """What alone decides an adapter's graphs: its class, its settings, and the matrix that its site is."""
    site = adapter.site
    own = tuple(item for item in sorted(vars(adapter).items()) if item[0] not in _NO_SETTINGS)
    structure = (site.shape, site.layout, site.columns is None, adapter.dropout is None, adapter.padding is None)
    return type(adapter), own, structure, site.parameter, tuple(adapter._parameters), tuple(adapter._buffers)


def _recipe_key(owner: nn.Module, adapters: Mapping[str, Adapter], plans: Mapping[str, str]) -> Hashable | None:
    library = library_key(owner)
    if library is None:
        return None
    key = library, tuple((child, plans[child], _adapter_key(adapter)) for child, adapter in adapters.items())
    return key if _is_hashable(key) else None


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


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
    graph = eager = None
    if set(plans.values()) - {"property"}:
        traced = trace_owner(owner)
        graph, eager = copy.deepcopy(traced), eager_graph(traced, adapters, plans)
        rewrite_graph(graph, adapters, plans)
    recipe = graph_recipe(graph, tuple((name, tuple(children)) for name, children in merged.items()))
    return recipe if eager is None else replace(recipe, eager=forward_source(eager), children=tuple(adapters))
