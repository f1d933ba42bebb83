"""The sites of a model that can't be run: each owner's graph alone tells how it uses its weights, not their role."""

from __future__ import annotations

import torch
from torch import fx, nn

from lora2fx.passes.rewrite import matmul_input, owner_graph, weight_nodes
from lora2fx.site import Layout, Site

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


def _layout(graph: fx.Graph, parameter: str, dims: int) -> Layout | None:
    layouts = set[Layout | None]()
    for weight in weight_nodes(graph, parameter):
        for user in weight.users:
            matmul = matmul_input(user, weight)
            if matmul is not None:
                layouts.add(matmul[1])
            elif user.target in _CONVOLUTIONS and user.args[1] is weight:
                layouts.add(Layout(contracted=tuple(range(1, dims)), free=(0,)))
            elif user.target is torch.nn.functional.embedding and user.args[1] is weight:
                layouts.add(Layout(contracted=(0,), free=(1,)))
            else:
                layouts.add(None)
    return layouts.pop() if len(layouts) == 1 else None


def static_sites(model: nn.Module) -> tuple[tuple[Site, ...], dict[str, str]]:
    """Every weight whose use its owner's graph shows, role `unknown`, and the reason for each that is not there."""
    sites, rest = list[Site](), dict[str, str]()
    names = {id(parameter): name for name, parameter in reversed(list(model.named_parameters()))}
    for path, owner in model.named_modules():
        own = [(name, value) for name, value in owner.named_parameters(recurse=False) if value.dim() >= 2]
        graph, reason = owner_graph(owner) if own else (None, "")
        for parameter, value in own:
            name = f"{path}.{parameter}".lstrip(".")
            if names[id(value)] != name:
                continue
            layout = _layout(graph, parameter, value.dim()) if graph is not None else None
            if layout is None:
                rest[name] = (
                    f"its use can't be read off its module alone ({reason or 'no plain matmul'}): example_inputs"
                )
                continue
            role = "embedding" if layout.contracted == (0,) and isinstance(owner, nn.Embedding) else "unknown"
            sites.append(Site(name, path, parameter, tuple(value.shape), layout, role, "by its owner's graph alone"))
    return tuple(sites), rest
