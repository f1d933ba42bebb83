"""Trace one owner module's own forward into an fx graph, or say why that would not be faithful.

A traced forward is a straight line: whatever Python decided while tracing is decided for ever. So an owner
is traced only if nothing was decided: no jump in the bytecode that ran, no state read but tensors, children
and plain scalars (which stay attribute reads in the graph), nothing written, nothing random.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from lora2fx.adapter import Adapter
from lora2fx.insert import Insert
from lora2fx.passes.bytecode import CodeWatch
from lora2fx.passes.spies import PLAIN, spied


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


@contextmanager
def _watched(watch: CodeWatch) -> Iterator[None]:
    """The watch sees what runs inside, and no finalizer of garbage that happens to be collected then."""
    profiler, collecting = sys.getprofile(), gc.isenabled()
    gc.disable()
    sys.setprofile(watch)
    try:
        yield
    finally:
        _resume(profiler)
        if collecting:
            gc.enable()


def _trace_once(owner: nn.Module) -> tuple[fx.Graph, list[str]]:
    tracer, watch, reasons = _GraphTracer(), CodeWatch(type(owner).forward), list[str]()
    try:
        with _unchanged(owner), spied(owner, tracer, reasons), _watched(watch):
            graph = tracer.trace(owner)
    except Exception as error:
        raise UntraceableError(f"tracing stopped: {type(error).__name__}: {error}") from error
    for node in graph.nodes:
        node.type = None  # annotations would be globals of the generated source
        if node.op == "placeholder" and not all(type(default) in PLAIN for default in node.args):
            reasons.append(f"has a default of {node.target} that source code can't say")
    return graph, reasons + watch.reasons


def library_key(owner: nn.Module) -> Hashable | None:
    """What alone decides the graph of a module whose forward torch itself defines; None for any other module.

    Such a forward may branch, but only on what the class declares in `__constants__` and on which parameters,
    buffers and children are there.
    """
    cls = type(owner)
    if not cls.__module__.startswith("torch.nn.modules.") or "forward" in vars(owner):
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
    if "forward" in vars(owner):
        raise UntraceableError("its forward is set on the module itself, not by its class")
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


def trace_adapter(adapter: Adapter | Insert, function: Callable[..., Any]) -> fx.Graph:
    """The graph of one of the module's own methods (`Adapter.forward`, `Adapter.weight_delta`, `Insert.forward`)."""
    tracer = _GraphTracer()
    tracer.traced_func_name = function.__name__
    return tracer.trace(adapter)
