"""Put modules behind sites: the output y of a site's matmul becomes y + insert(y), in the owner's own graph."""

from __future__ import annotations

import copy
import operator
from collections import defaultdict
from collections.abc import Collection

from torch import fx, nn

from lora2fx.errors import RewriteError
from lora2fx.insert import Insert
from lora2fx.passes.insertion import insert_module, site_use
from lora2fx.passes.install import graph_recipe, install_graph, install_owner
from lora2fx.passes.places import Place, find_place, relative
from lora2fx.passes.rewrite import child_name
from lora2fx.passes.tracing import trace_adapter
from lora2fx.program import Program


def _place(program: Program, insert: Insert, outside_reads: Collection[str]) -> Place:
    """Where the site's matmul is. Raises `RewriteError` where its output isn't to be had, alone and whole."""
    site = insert.site
    place = find_place(program.root, site, outside_reads)
    use = None if place.graph is None else site_use(place.graph, place.parameter, site)
    if use is None or use.lookup or site.columns is not None or site.batch_shape:
        reason = place.reason or "its owner's forward does not make that output by one plain matmul"
        raise RewriteError(
            f"nothing can be put behind {site.weight}: {reason}. Leave it out with exclude=, or choose another method."
        )
    return place


def _insert_behind(graph: fx.Graph, parameter: str, child: str, insert: Insert) -> None:
    found = site_use(graph, parameter, insert.site)
    assert found is not None
    matmul, users = found.node, list(found.node.users)
    with graph.inserting_before(matmul.next):
        update = insert_module(graph, trace_adapter(insert, type(insert).forward), child, {"y": matmul})
        update = graph.call_method("type_as", (update, matmul))
        total = graph.call_function(operator.add, (matmul, update))
    for user in users:
        user.replace_input_with(matmul, total)


def install_inserts(program: Program, outside_reads: Collection[str] = ()) -> None:
    """Put every insert of the program behind its site, in place.

    Raises `RewriteError` with the model as it was, where a site's matmul can't be reached in its owner's graph.
    """
    places: dict[str, list[tuple[Place, str, Insert]]] = defaultdict(list)
    for path, insert in program.inserts.items():
        place = _place(program, insert, outside_reads)
        places[place.path].append((place, path, insert))
    graphs: list[tuple[nn.Module, fx.Graph]] = []
    for found in places.values():
        graph = copy.deepcopy(found[0][0].graph)
        assert graph is not None
        for place, path, insert in found:
            _insert_behind(graph, place.parameter, relative(path, place.path), insert)
        graph.lint()
        graphs.append((found[0][0].module, graph))
    for insert in program.inserts.values():
        program.root.get_submodule(insert.site.owner).add_module(child_name(insert.site), insert)
    for module, graph in graphs:
        if isinstance(module, fx.GraphModule):
            install_graph(module, graph)
        else:
            install_owner(module, graph_recipe(graph, ()))
