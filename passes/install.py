"""Install a generated forward by swapping the owner's class, and give the class back; an fx module swaps its graph.

The owner stays the same object, an instance of its own class, with its own hooks, parameters and keys. The
new class is rebuilt from its recipe wherever the module goes: deepcopy, pickle, another process.
"""

from __future__ import annotations

import copyreg
import importlib
import linecache
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, fx, nn

from lora2fx.adapter import Adapter
from lora2fx.eager import two_forms
from lora2fx.errors import RewriteError
from lora2fx.insert import Insert
from lora2fx.passes.reads import read_merged, reading_once
from lora2fx.passes.recurrent import FLAT_WEIGHTS
from lora2fx.program import drop_attribute, keep_attribute

GRAPH = "_lora2fx_graph"


Source = tuple[str, tuple[tuple[str, str, str], ...]]
"""A generated forward and its globals as (name, module, attribute)."""


@dataclass(frozen=True)
class Recipe:
    """What an adapted class is made of beside its base: plain strings, so that it can be pickled.

    `source` is the generated forward (None: the base's own) and `imports` its globals as (name, module,
    attribute). `merged` lists (parameter, adapters): reading the parameter gives W + ΔW, once within a forward (see
    `passes.reads`). `eager` is a second forward, source and imports, for training op by op (see `lora2fx.eager`), with
    `children` in it.
    """

    source: str | None = None
    imports: tuple[tuple[str, str, str], ...] = ()
    merged: tuple[tuple[str, tuple[str, ...]], ...] = ()
    eager: Source | None = None
    children: tuple[str, ...] = ()


class Adapted:
    """Marks a module whose class carries a generated forward or merged weights."""

    recipe: ClassVar[Recipe]
    original_class: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        function, _, *state = reduced
        if function is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise RewriteError(
                f"copying an adapted {type(self).__name__}: its class reduces itself in its own way, which can't be"
                " rebuilt. Fold or unload the adapters first."
            )
        return (_rebuild, (self.original_class, self.recipe), *state)


def _rebuild(original: type[nn.Module], recipe: Recipe) -> nn.Module:
    cls = adapted_class(original, recipe)
    return cls.__new__(cls)


def graph_recipe(graph: fx.Graph | None, merged: tuple[tuple[str, tuple[str, ...]], ...]) -> Recipe:
    """The recipe of a rewritten graph and of the parameters that are read merged."""
    if graph is None:
        return Recipe(merged=merged)
    return Recipe(*forward_source(graph), merged)


def forward_source(graph: fx.Graph) -> Source:
    """The graph as a forward's source, with what it imports."""
    code = graph.python_code("self")
    imports = tuple((name, *_import_path(value)) for name, value in sorted(code.globals.items()))
    return code.src.strip() + "\n", imports


def _import_path(value: Any) -> tuple[str, str]:
    """(module, dotted attribute) from which a graph's global can be imported again."""
    if (name := getattr(value, "__name__", None)) and importlib.util.find_spec(name.partition(".")[0]) is not None:
        with_spec = getattr(value, "__spec__", None)
        if with_spec is not None:
            return name, ""
    module, attribute = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module and attribute and "<" not in attribute and _resolve(module, attribute) is value:
        return module, attribute
    return _constant_path(value)


def _constant_path(value: Any) -> tuple[str, str]:
    """fx names a few values that are neither modules nor functions: inf, nan, NoneType, device."""
    known = {"inf": ("math", "inf"), "nan": ("math", "nan"), "None": ("builtins", "None")}
    if str(value) in known:
        return known[str(value)]
    if value is type(None):
        return "types", "NoneType"
    raise RewriteError(f"the generated forward needs {value!r}, which can't be imported by name")


def _resolve(module: str, attribute: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in filter(None, attribute.split(".")):
        found = getattr(found, part, None)
    return found


def _compile_forward(name: str, generated: Source) -> Any:
    source, imports = generated
    names = {name: _resolve(module, attribute) for name, module, attribute in imports}
    file = f"<lora2fx {name}.forward {abs(hash(source)):x}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), names)
    return names["forward"]


def _merged_weight(parameter: str, children: tuple[str, ...]) -> property:
    def merged(self: nn.Module) -> Tensor:
        weight = self._parameters[parameter]
        assert weight is not None
        return read_merged(weight, [cast(Adapter, self._modules[child]) for child in children])

    return property(merged, doc=f"{parameter} + ΔW")


_CLASSES: dict[tuple[type, Recipe], type[nn.Module]] = {}


def adapted_class(original: type[nn.Module], recipe: Recipe) -> type[nn.Module]:
    """The subclass of `original` that the recipe describes; one class for all modules that share both."""
    if (original, recipe) not in _CLASSES:
        _CLASSES[original, recipe] = _make_class(original, recipe)
    return _CLASSES[original, recipe]


def _make_class(original: type[nn.Module], recipe: Recipe) -> type[nn.Module]:
    body: dict[str, Any] = {"recipe": recipe, "original_class": original}
    body |= {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    body |= {parameter: _merged_weight(parameter, children) for parameter, children in recipe.merged}
    if issubclass(original, nn.RNNBase):
        body["_flat_weights"] = FLAT_WEIGHTS
    if recipe.source is not None:
        body["forward"] = _compile_forward(original.__qualname__, (recipe.source, recipe.imports))
        if recipe.eager is not None:
            eager = _compile_forward(original.__qualname__, recipe.eager)
            body["forward"] = two_forms(body["forward"], eager, recipe.children)
    if recipe.merged:
        body["forward"] = reading_once(body.get("forward", original.forward))
    return type(original.__name__, (Adapted, original), body)


def install_owner(owner: nn.Module, recipe: Recipe) -> None:
    """Give the owner, which holds its adapters already, the class of the recipe."""
    owner.__class__ = adapted_class(type(owner), recipe)


def install_graph(module: fx.GraphModule, graph: fx.Graph) -> None:
    """Give an fx module the rewritten graph; its own is kept beside it."""
    keep_attribute(module, GRAPH, module.graph)
    module.graph = graph


def rewritten_path(root: nn.Module, adapter: Adapter) -> str:
    """The path of the module that was rewritten for an adapter: its owner, or an fx module around that."""
    parts = adapter.site.owner.split(".") if adapter.site.owner else []
    for stop in range(len(parts), -1, -1) if adapter.rewrite != "property" else ():
        path = ".".join(parts[:stop])
        if GRAPH in vars(root.get_submodule(path)):
            return path
    return adapter.site.owner


def restore_module(module: nn.Module) -> None:
    """Give one module its class or graph back and take its own adapters away; parameters stay as they are."""
    owner: Any = module
    for name in [name for name, child in module.named_children() if isinstance(child, (Adapter, Insert))]:
        delattr(module, name)
    if isinstance(module, Adapted):
        owner.__class__ = owner.original_class
    if isinstance(module, fx.GraphModule) and GRAPH in vars(module):
        module.graph = vars(module)[GRAPH]
        drop_attribute(module, GRAPH)


def restore_owners(root: nn.Module) -> None:
    """Give every module in `root` its class and graph back and take its adapters away; parameters stay as they are."""
    for module in list(root.modules()):
        restore_module(module)
