"""Run a model without leaving a trace: modes, buffers, module attributes and random states are put back."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

Kinds = type[nn.Module] | tuple[type[nn.Module], ...]
_CONTAINERS = (dict, OrderedDict, list, set)


def _restore_container(container: Any, saved: Any) -> None:
    if not container and not saved:
        return
    container.clear()
    if isinstance(container, list):
        container.extend(saved)
    else:
        container.update(saved)


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    """The module's own dicts, lists and sets with what they hold; torch's modules and adapters write into none."""
    if type(module).__module__.startswith(("torch.nn.modules.", "lora2fx.")):
        return []
    found = [value for value in vars(module).values() if type(value) in _CONTAINERS]
    return [(value, value.copy() if value else ()) for value in found]


def insist(restore: Callable[[], None]) -> None:
    """Restore; where an interrupt, or memory that runs out, cuts that short, once more from the start."""
    try:
        restore()
    except BaseException:
        restore()
        raise


def attributes_of(modules: Sequence[nn.Module], but: Kinds = ()) -> Callable[[], None]:
    """How to give every module its attributes back (train flags, buffers, caches) and what its containers held.

    Of modules of the kinds in `but`, which no forward writes into, only the train flags.
    """
    before = [(module, dict(vars(module)), _containers(module)) for module in modules if not isinstance(module, but)]
    flags = [(module, module.training) for module in modules if isinstance(module, but)]

    def restore() -> None:
        for module, flag in flags:
            vars(module)["training"] = flag
        for module, attributes, containers in before:
            vars(module).clear()
            vars(module).update(attributes)
            for container, saved in containers:
                _restore_container(container, saved)

    return restore


def _buffers_of(model: nn.Module) -> Callable[[], None]:
    saved = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_inference()]

    def restore() -> None:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.resize_(value.shape).copy_(value)

    return restore


def random_states() -> Callable[[], None]:
    """How to give Python's, NumPy's and torch's global generators their states back."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return restore


def _has_own_train(module: nn.Module) -> bool:
    """Whether its mode is more than its flag: a `train` of its own, or a scripted module's flag, which is elsewhere."""
    kind = type(module)
    plain = kind.train is nn.Module.train and kind.__setattr__ is nn.Module.__setattr__
    return not plain or "train" in vars(module) or "training" not in vars(module)


def set_training(model: nn.Module, training: bool, modules: Sequence[nn.Module] = ()) -> None:
    """`model.train(training)`; an exported module's mode is part of its graph, so that it only runs in eval.

    `modules` are all the model's, where they are known already. Raises what its `train` raises where an exported
    module is asked to train.
    """
    modules = modules or list(model.modules())
    if not training and not any(module.training for module in modules):
        return
    if not any(map(_has_own_train, modules)):  # then train would set the flags, at five times the cost
        for module in modules:
            vars(module)["training"] = training
        return
    try:
        model.train(training)
    except NotImplementedError:
        if training:
            raise


@contextmanager
def fastpath(enabled: bool) -> Iterator[None]:
    """With the fused attention fast path of `torch.nn` on or off."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Whatever is run inside, also when it raises: afterwards `model` and the random states are as before."""
    with ExitStack() as stack:
        for restore in (random_states(), _buffers_of(model), attributes_of(list(model.modules()))):
            stack.callback(insist, restore)
        yield
