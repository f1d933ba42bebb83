"""Example inputs: what a model's forward is called with, and the tensors of what it returns."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lora2fx.errors import InputsError
from lora2fx.synthesis import is_pretrained, synthesise_inputs


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of a model's forward."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def call(self, model: nn.Module) -> Any:
        """What `model` returns for them."""
        return model(*self.args, **self.kwargs)


ExampleInputs = Mapping[str, Any] | tuple[Any, ...] | Tensor | Inputs | None


def as_inputs(model: nn.Module, example_inputs: ExampleInputs) -> Inputs:
    """`example_inputs` as the arguments of `model`'s forward, checked against its signature.

    A dict holds keyword arguments, a tuple positional ones, a tensor is the only one; None synthesises
    (transformers models only). Raises `InputsError` where they don't fit; the forward is not run.
    """
    if example_inputs is None:
        return synthesise(model)
    inputs = _read(example_inputs)
    _bind(model, inputs)
    return inputs


def synthesise(model: nn.Module) -> Inputs:
    """Inputs for a transformers model from its config and signature: batch 2, distinct sizes, its device and dtype.

    Raises `InputsError` for any other module, whose inputs only its user knows.
    """
    if not is_pretrained(model):
        names = [name for name, _ in _named_parameters(model)]
        raise InputsError(
            f"{type(model).__name__} is no transformers model, so its inputs can't be made up. Its signature is"
            f" forward{inspect.signature(model.forward)}. Pass example_inputs=, {_how(names)}; batch at least 2,"
            " sequence at least 8, all sizes distinct."
        )
    inputs = Inputs(kwargs=synthesise_inputs(model))
    _bind(model, inputs)
    return inputs


def flatten_outputs(output: Any) -> list[Tensor]:
    """Every tensor in a forward's output, depth first in the order of its containers.

    Goes into mappings, sequences, dataclasses and plain objects (key–value caches, distributions); a module
    inside an output is left out.
    """
    return list(_tensors(output, frozenset()))


def _tensors(value: Any, outer: frozenset[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in outer or isinstance(value, (str, bytes, type, nn.Module)):
        return
    for item in _items(value):
        yield from _tensors(item, outer | {id(value)})


def _items(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return list(value)
    if dataclasses.is_dataclass(value):
        return [getattr(value, entry.name) for entry in dataclasses.fields(value)]
    return list(vars(value).values()) if hasattr(value, "__dict__") else []


def _read(example_inputs: object) -> Inputs:
    match example_inputs:
        case Inputs():
            return example_inputs
        case Tensor():
            return Inputs(args=(example_inputs,))
        case tuple():
            return Inputs(args=example_inputs)
        case Mapping() if all(isinstance(key, str) for key in example_inputs):
            return Inputs(kwargs=dict(example_inputs))
        case _:
            raise InputsError(
                f"example_inputs is a {type(example_inputs).__name__}. Pass a dict of the forward's keyword arguments,"
                " a tuple of its positional arguments, or a single tensor; a list that is one argument goes in a"
                " tuple: example_inputs=(the_list,)."
            )


def _named_parameters(model: nn.Module) -> list[tuple[str, inspect.Parameter]]:
    """The forward's parameters that have a name to pass them by, in order."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters
    return [(name, entry) for name, entry in parameters.items() if entry.kind not in variadic]


def _how(names: list[str]) -> str:
    if not names:
        return "a tuple of positional arguments: example_inputs=(tensor, ...)"
    keywords = ", ".join(f'"{name}": tensor' for name in names[:2])
    return f"a dict of keyword arguments or a tuple of positional ones: example_inputs={{{keywords}}}"


def _bind(model: nn.Module, inputs: Inputs) -> None:
    signature = inspect.signature(model.forward)
    forward = f"{type(model).__name__}.forward{signature}"
    try:
        signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        given = [f"{len(inputs.args)} positional"] if inputs.args else []
        given += [repr(name) for name in inputs.kwargs]
        raise InputsError(
            f"example_inputs don't fit {forward}: {error}. Given: {', '.join(given) or 'nothing'}."
            " A dict holds keyword arguments, a tuple positional ones."
        ) from error
    known = [name for name, _ in _named_parameters(model)]
    for name in inputs.kwargs:  # a forward with **kwargs binds a misspelt name and ignores it
        near = difflib.get_close_matches(name, [other for other in known if other not in inputs.kwargs], 1, 0.8)
        if name not in known and near:
            raise InputsError(
                f"example_inputs name {name!r}, which {type(model).__name__}.forward would take into **kwargs and"
                f" ignore. Did you mean {near[0]!r}?"
            )
