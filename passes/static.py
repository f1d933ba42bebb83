"""The sites of a model that can't be run: each forward's graph alone tells how it uses a weight, not its role."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from lora2fx.passes.places import graph_place, owner_graph
from lora2fx.passes.recurrent import recurrent_sites
from lora2fx.passes.uses import readers, weight_nodes, weight_use
from lora2fx.site import Layout, Site

_aten = torch.ops.aten
_CONVOLUTIONS: frozenset[Any] = frozenset(
    {*(torch.conv1d, torch.conv2d, torch.conv3d), *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default)}
)


def _layout(graph: fx.Graph, parameter: str, dims: int) -> Layout | None:
    """The one layout in which all nodes that read the parameter use it."""
    layouts = set[Layout | None]()
    for weight in weight_nodes(graph, parameter):
        users = readers(weight)
        found = weight_use(weight)
        if found is not None:
            layouts.add(found.layout)
        elif users and all(user.target in _CONVOLUTIONS and user.args[1] is weight for user in users):
            layouts.add(Layout(contracted=tuple(range(1, dims)), free=(0,)))
        else:
            layouts.add(None)
    return layouts.pop() if len(layouts) == 1 else None


def _place(model: nn.Module, weight: str, owner: nn.Module, parameter: str) -> tuple[fx.Graph | None, str, str]:
    """(graph that reads the weight, its name there, why there is none)"""
    around = graph_place(model, weight)
    if around is not None:
        return around.graph, around.parameter, ""
    graph, reason = owner_graph(owner)
    return graph, parameter, reason


def static_sites(model: nn.Module) -> tuple[tuple[Site, ...], dict[str, str]]:
    """Every weight whose use a graph shows, role `unknown`, and the reason for each that is not there."""
    sites, rest = list[Site](), dict[str, str]()
    names = {id(parameter): name for name, parameter in reversed(list(model.named_parameters()))}
    for path, owner in model.named_modules():
        own = [(name, value) for name, value in owner.named_parameters(recurse=False) if value.dim() >= 2]
        for parameter, value in own:
            name = f"{path}.{parameter}".lstrip(".")
            if names[id(value)] != name:
                continue
            graph, known, reason = _place(model, name, owner, parameter)
            layout = _layout(graph, known, value.dim()) if graph is not None else None
            if layout is None:
                why = reason or "no plain matmul"
                rest[name] = f"its use can't be read off its module alone ({why}): example_inputs"
                continue
            role = "embedding" if layout.contracted == (0,) and isinstance(owner, nn.Embedding) else "unknown"
            sites.append(Site(name, path, parameter, tuple(value.shape), layout, role, "by its owner's graph alone"))
    recurrent = recurrent_sites(model, rest)
    for site in recurrent:
        del rest[site.weight]
    return (*sites, *recurrent), rest
