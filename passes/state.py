"""Run a model without leaving a trace: train flags, buffers and random generators are put back."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lora2fx.dataflow.preserve import Kinds, attributes_of, insist, random_states

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""What says nothing about the model that raises it: never a finding, always passed on."""
SCAN_EVERY = 50_000
"""New objects between two looks for garbage, where Python's own 700 would look at every new adapter many times."""


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every value, a NaN with a NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


@contextmanager
def unscanned() -> Iterator[None]:
    """The garbage collector looks at new objects only, and seldom: of a large model a fourth of the time."""
    if gc.get_freeze_count():  # somebody's own choice, which an unfreeze would undo
        yield
        return
    first, *older = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(first and max(first, SCAN_EVERY), *older)
    try:
        yield
    finally:
        gc.set_threshold(first, *older)
        gc.unfreeze()


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Python's, NumPy's and torch's global generators (every CUDA device in use) are as before afterwards."""
    restore = random_states()
    try:
        yield
    finally:
        insist(restore)


@contextmanager
def preserved_buffers(modules: Sequence[nn.Module], but: Kinds = ()) -> Iterator[None]:
    """The same buffer objects with the same values afterwards; one that did not change is not written."""
    dicts = [module._buffers for module in modules if not isinstance(module, but)]
    buffers = [(own, own.copy()) for own in dicts if isinstance(own, dict)]  # a scripted module's is none
    values = {buffer: buffer.detach().clone() for _, own in buffers for buffer in own.values() if buffer is not None}

    def restore() -> None:
        for held, own in buffers:
            if held or own:
                held.clear()
                held.update(own)
        with torch.no_grad():
            for buffer, value in values.items():
                if not same_values(buffer, value):
                    buffer.copy_(value)

    try:
        yield
    finally:
        insist(restore)


@contextmanager
def preserved_values(parameters: list[nn.Parameter]) -> Iterator[None]:
    """The parameters' values are as before afterwards."""
    values = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        insist(partial(_write, parameters, values))


@torch.no_grad()
def _write(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


@contextmanager
def kept_on_error(tensors: Iterable[Tensor]) -> Iterator[None]:
    """On any error, an interrupt too, the tensors' values are as before."""
    live = list(tensors)
    values = [tensor.detach().clone() for tensor in live]
    try:
        yield
    except BaseException:
        insist(partial(_write, live, values))
        raise


@contextmanager
def preserved_attributes(modules: Sequence[nn.Module], but: Kinds = ()) -> Iterator[None]:
    """Every module's attributes are as before afterwards: counters, caches, buffers that a forward makes anew.

    Of modules of the kinds in `but` only the train flags.
    """
    restore = attributes_of(modules, but)
    try:
        yield
    finally:
        insist(restore)


@contextmanager
def preserved(model: nn.Module, but: Kinds = ()) -> Iterator[list[nn.Module]]:
    """Train flags, attributes, buffers and random generators are as before afterwards, whatever happens within.

    Of modules of the kinds in `but`, which no forward writes into, only the train flags. Yields all modules.
    """
    modules = list(model.modules())
    with preserved_attributes(modules, but), preserved_buffers(modules, but), preserved_generators():
        yield modules
