"""Record one real forward of a model: every aten call, which tensors are weights, who reads them from outside."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from lora2fx.dataflow.preserve import fastpath, preserved, set_training
from lora2fx.dataflow.readers import Read, Readers, spied
from lora2fx.dataflow.recorder import Recorder
from lora2fx.dataflow.recording import Recording
from lora2fx.dataflow.subclasses import subclass_calls
from lora2fx.errors import InputsError
from lora2fx.inputs import Inputs

_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
_ATOMS = (int, float, str, bytes, bool, type(None), torch.dtype, torch.device)


def _fresh(value: Any) -> Any:
    """A copy of one argument, so that a forward that fills a cache or writes its input can be run again."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value if isinstance(value, (*_ATOMS, nn.Module)) else copy.deepcopy(value)


def _copied(inputs: Inputs) -> Inputs:
    return Inputs(tree_map(_fresh, inputs.args), tree_map(_fresh, dict(inputs.kwargs)))


def _tensors(inputs: Inputs) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((inputs.args, dict(inputs.kwargs))) if isinstance(leaf, Tensor)]


def _refuse_unready(named: Iterable[tuple[str, Tensor]], tensors: Iterable[Tensor]) -> None:
    for name, tensor in named:
        if is_lazy(tensor):
            raise InputsError(f"{name} has no shape yet (a lazy module): run one forward of the model first.")
        if tensor.is_meta:
            raise InputsError(f"{name} is on the meta device, where no forward runs: load the weights first.")
    for tensor in tensors:
        if tensor.is_meta or not tensor.numel():
            found = "is on the meta device" if tensor.is_meta else "is empty"
            raise InputsError(
                f"An example input of shape {tuple(tensor.shape)} {found}: pass example_inputs= that hold values,"
                " batch at least 2, sequence at least 8."
            )


def _tied(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """By its first name, all names of each parameter that has several."""
    names = dict[int, list[str]]()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {shared[0]: tuple(shared) for shared in names.values() if len(shared) > 1}


def _fused_reads(model: nn.Module, inputs: Inputs, readers: Readers) -> set[Read]:
    """Who reads weights from outside on the fused fast path of torch's own transformer layers, if there are any."""
    if not any(isinstance(module, _FUSED) for module in model.modules()):
        return set()
    with fastpath(True), spied(model, readers) as reads:
        _copied(inputs).call(model)
    return reads


@torch.no_grad()
def record(model: nn.Module, inputs: Inputs) -> Recording:
    """Run `model` in eval mode on a copy of `inputs` without torch's fused fast path, and record it.

    A model that may take that path is run with it before: it reads weights from outside their owners.

    Nothing of the model, its modes, buffers, caches or the random states changes, also when its forward raises;
    what the forward raises is passed on. Raises `InputsError` for meta tensors and weights without a shape.
    """
    named = (*model.named_parameters(), *model.named_buffers())
    _refuse_unready(named, _tensors(inputs))
    readers = Readers(model)
    with preserved(model):
        set_training(model, False)
        fused = _fused_reads(model, inputs, readers)
        given = _copied(inputs)
        recorder = Recorder(model, _tensors(given), readers)
        with fastpath(False), spied(model, readers) as plain, recorder, subclass_calls(model, recorder):
            given.call(model)
    # a read that both runs make is seen by the recorder if anything is computed from it; most only ask for a dtype
    outside = recorder.outside | {name for name, *_ in fused - plain}
    return Recording(
        tuple(recorder.values),
        tuple(recorder.ops),
        recorder.parameters,
        recorder.constants,
        frozenset(outside),
        _tied(model),
    )
