"""Trace one owner module's own forward into an fx graph, or say why that would not be faithful.

A traced forward is a straight line: whatever Python decided while tracing is decided for ever. So an owner
is traced only if nothing was decided: no jump in the bytecode that ran, no state read but tensors, children
and plain scalars (which stay attribute reads in the graph), nothing written, nothing random.
"""

from __future__ import annotations

import dis
import sys
import sysconfig
import types
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from lora2fx.adapter import Adapter

_JUMPS = frozenset(dis.hasjrel) | frozenset(dis.hasjabs)
_FORBIDDEN = {
    "STORE_ATTR": "writes an attribute",
    "DELETE_ATTR": "deletes an attribute",
    "STORE_GLOBAL": "writes a global",
    "BEFORE_WITH": "has a with block",
    "YIELD_VALUE": "is a generator",
    "IMPORT_NAME": "imports",
}
_QUERIES = frozenset(
    {
        *("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled", "get_autocast_dtype"),
        *("is_scripting", "is_tracing", "is_compiling", "is_exporting", "is_dynamo_compiling"),
        *("get_default_dtype", "initial_seed", "item", "tolist", "numpy"),
    }
)
_SAFE_MODULES = ("torch", "math", "_operator", "operator")
_LIBRARY = (sysconfig.get_path("stdlib"), "<frozen")
_SCALARS = (bool, int, float, str)
_MODULE_INTERNALS = frozenset(dir(nn.Module())) - {"training"}


class UntraceableError(Exception):
    """The owner's forward can't be turned into a graph that is right for every later call; says why."""


class _GraphTracer(fx.Tracer):
    """Children are leaves and buffers are nodes: `scale * mask` on buffers alone is otherwise a constant."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter):
            raise UntraceableError("makes a tensor that depends on no input; a graph would hold it as a constant")
        return super().create_arg(a)


def _code_reason(code: types.CodeType, names: dict[str, Any]) -> str | None:
    """Why running this code once does not tell what every run does, or None."""
    for step in dis.get_instructions(code):
        if step.opcode in _JUMPS:
            return "branches or loops"
        if step.opname in _FORBIDDEN:
            return _FORBIDDEN[step.opname]
        if step.opname == "LOAD_DEREF" and step.argval != "__class__":
            return f"reads the closure variable {step.argval}"
        if step.argval in _QUERIES and step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL"):
            return f"asks {step.argval}()"
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and not _is_safe_global(names, step.argval):
            return f"reads the global {step.argval}"
    return None


def _is_safe_global(names: dict[str, Any], name: str) -> bool:
    if name not in names:
        return name == "super"
    value = names[name]
    if isinstance(value, types.ModuleType):
        return value.__name__.partition(".")[0] in _SAFE_MODULES
    if isinstance(value, types.FunctionType):
        return True
    return str(getattr(value, "__module__", "")).partition(".")[0] in _SAFE_MODULES and callable(value)


class _CodeWatch:
    """A profiler that collects, while tracing, why any Python code of the user's that ran is not a straight line."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self._seen: set[types.CodeType] = set()

    def __call__(self, frame: types.FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event != "call" or code in self._seen:
            return
        self._seen.add(code)
        module = str(frame.f_globals.get("__name__", ""))
        library = code.co_filename.startswith(_LIBRARY) and "site-packages" not in code.co_filename
        if library or module.partition(".")[0] == "torch" or module == __name__ or module.startswith("namedtuple_"):
            return
        if (reason := _code_reason(code, frame.f_globals)) is not None:
            self.reasons.append(f"{code.co_name} {reason}")


def _attribute_spy(base: type[nn.Module], tracer: fx.Tracer, reasons: list[str]) -> type[nn.Module]:
    """A subclass whose plain scalars are graph nodes, read anew in each call, and whose other state is refused."""
    constants = frozenset(getattr(base, "__constants__", ()))

    def read(self: nn.Module, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name in _MODULE_INTERNALS or name in constants or value is None:
            return value
        if type(value) in _SCALARS:
            return tracer.create_proxy("get_attr", name, (), {})
        if name in object.__getattribute__(self, "__dict__"):
            reasons.append(f"reads self.{name}, a {type(value).__name__}")
        return value

    return type(base.__name__, (base,), {"__getattribute__": read})


@contextmanager
def _unchanged(owner: nn.Module) -> Iterator[None]:
    """Whatever a forward writes on the owner while it is traced is a proxy: put everything back."""
    state = vars(owner)
    saved = {name: dict(value) if type(value) is dict else value for name, value in state.items()}
    objects = dict(state)
    try:
        yield
    finally:
        for name, value in saved.items():
            if type(value) is dict:
                objects[name].clear()
                objects[name].update(value)
        state.clear()
        state.update(objects)


def _resume(profiler: Any) -> None:
    """Go on with the profiler that ran before; one written in C (cProfile) can only be enabled again."""
    if profiler is not None and not callable(profiler):
        sys.setprofile(None)
        profiler.enable()
    else:
        sys.setprofile(profiler)


def _trace_once(owner: nn.Module) -> tuple[fx.Graph, list[str]]:
    tracer, watch, reasons = _GraphTracer(), _CodeWatch(), list[str]()
    base, profiler = type(owner), sys.getprofile()
    owner.__class__ = _attribute_spy(base, tracer, reasons)
    sys.setprofile(watch)
    try:
        with _unchanged(owner):
            graph = tracer.trace(owner)
        for node in graph.nodes:
            node.type = None  # annotations would be globals of the generated source
    except Exception as error:
        raise UntraceableError(f"tracing stopped: {type(error).__name__}: {error}") from error
    finally:
        _resume(profiler)
        owner.__class__ = base
    return graph, reasons + watch.reasons


def library_key(owner: nn.Module) -> Hashable | None:
    """What alone decides the graph of a module whose forward torch itself defines; None for any other module.

    Such a forward may branch, but only on what the class declares in `__constants__` and on which parameters,
    buffers and children are there.
    """
    cls = type(owner)
    if not cls.forward.__module__.startswith("torch.nn.modules."):
        return None
    state = (owner._parameters, owner._buffers, owner._modules)
    names = tuple(name for group in state for name, value in group.items() if value is not None)
    constants = tuple((name, repr(getattr(owner, name, None))) for name in getattr(cls, "__constants__", ()))
    return cls, names, constants


_LIBRARY_GRAPHS: dict[Hashable, fx.Graph] = {}


def trace_owner(owner: nn.Module) -> fx.Graph:
    """The fx graph of the owner's own forward, its children left as calls; copy it before changing it.

    Raises `UntraceableError` where the graph would not be right for every later call: the forward branches,
    reads or writes state that a graph freezes, or can't be traced at all.
    """
    key = library_key(owner)
    if key is not None:
        if key not in _LIBRARY_GRAPHS:
            _LIBRARY_GRAPHS[key] = _trace_once(owner)[0]
        return _LIBRARY_GRAPHS[key]
    graph, reasons = _trace_once(owner)
    if reasons:
        raise UntraceableError(reasons[0])
    if str(_trace_once(owner)[0]) != str(graph):
        raise UntraceableError("two traces differ: something random or counted is read")
    return graph


def trace_adapter(adapter: Adapter, function: Callable[..., Any]) -> fx.Graph:
    """The graph of one of the adapter's own methods (`Adapter.forward`, `Adapter.weight_delta`)."""
    tracer = _GraphTracer()
    tracer.traced_func_name = function.__name__
    return tracer.trace(adapter)
