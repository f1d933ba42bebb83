"""Where a site's weight is read: in its owner's forward, or in the graph of an fx module around it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import fx, nn

from lora2fx.passes.tracing import UntraceableError, trace_owner
from lora2fx.passes.uses import weight_nodes
from lora2fx.site import Site


@dataclass(frozen=True)
class Place:
    """The module whose forward is to be rewritten, its path, and how that forward names the weight.

    `graph` is None where that forward can't be traced; `reason` then says why.
    """

    path: str
    module: nn.Module
    parameter: str
    graph: fx.Graph | None
    reason: str = ""


def owner_graph(owner: nn.Module) -> tuple[fx.Graph | None, str]:
    """The graph of the owner's own forward, or None and why it can't be traced."""
    try:
        return trace_owner(owner), ""
    except UntraceableError as error:
        return None, str(error)


def relative(name: str, path: str) -> str:
    """`name` as the module at `path` knows it."""
    return name.removeprefix(f"{path}.") if path else name


def graph_place(model: nn.Module, weight: str) -> Place | None:
    """The innermost fx module whose own graph reads the weight, its own or a child's: it is run, not its children."""
    parts = weight.split(".")[:-1]
    for stop in range(len(parts), -1, -1):
        path = ".".join(parts[:stop])
        module = model.get_submodule(path)
        if isinstance(module, fx.GraphModule) and weight_nodes(module.graph, relative(weight, path)):
            return Place(path, module, relative(weight, path), module.graph)
    return None


def find_place(model: nn.Module, site: Site, outside_reads: Collection[str] = ()) -> Place:
    """Where the site's weight is read in `model`; without a graph also where it is read from outside its owner."""
    found = graph_place(model, site.weight)
    if found is not None:
        return found
    owner = model.get_submodule(site.owner)
    if site.weight in outside_reads:
        return Place(site.owner, owner, site.parameter, None, "it is read from outside its module's forward")
    return Place(site.owner, owner, site.parameter, *owner_graph(owner))
