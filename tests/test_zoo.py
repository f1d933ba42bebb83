"""The zoo itself: each model builds, runs and is described by a truth that fits its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lora2fx.inputs import as_inputs, flatten_outputs
from lora2fx.site import ROLES
from tests.zoo import HELD_OUT, ZOO, Architecture

EVERY = ZOO | HELD_OUT
OPERANDS = ("query", "key", "value")
WITHOUT_SDPA = {
    *("vit_plain", "einsum", "timm_vit", "unet", "unprojected_query"),  # softmax written out
    *("mha", "mha_cross", "encoder", "decoder"),  # torch's own modules hide the call from a function mode
    *("mixer", "lstm", "branching", "two_tower", "graph", "squeeze_excite", "dense_tanh_dense"),  # no attention
    *("convnext", "mamba", "fnet", "rwkv", "gmlp", "up_first"),
    *("switch", "gpt_oss", "gemma2", "openai_gpt", "mpnet", "squeezebert", "timesformer"),
    *("deberta_v2", "deberta_v2_separate", "bloom", "longformer", "xlnet", "mpt", "gptj", "codegen", "gpt_neo", "blip"),
}


@pytest.mark.parametrize("name", EVERY)
def test_the_model_runs_and_its_truth_fits(name: str) -> None:
    architecture = EVERY[name]
    model = architecture.build()
    assert not model.training
    shapes = {weight: value.shape for weight, value in model.named_parameters(remove_duplicate=False)}
    assert architecture.undecided <= shapes.keys()
    assert not architecture.undecided & architecture.roles.keys()
    for weight, role in architecture.roles.items():
        assert len(shapes[weight]) >= 2, weight
        roles = role if isinstance(role, Mapping) else {role: ()}
        assert roles.keys() <= set(ROLES)
        if isinstance(role, Mapping):
            columns = sorted(c for spans in role.values() for start, stop in spans for c in range(start, stop))
            assert columns == list(range(len(columns))), f"the roles of {weight} leave a gap or overlap"
            assert len(columns) in shapes[weight]
    with torch.no_grad():
        outputs = flatten_outputs(as_inputs(model, architecture.example_inputs).call(model))
    assert outputs
    assert all(output.isfinite().all() for output in outputs if output.is_floating_point())


class Attentions(TorchFunctionMode):
    """Notes the operands of every `scaled_dot_product_attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = dict(zip(OPERANDS, args, strict=False)) | kwargs
            self.calls.append(tuple(given[name].clone() for name in OPERANDS))
        return func(*args, **kwargs)


def attentions(model: nn.Module, inputs: Any) -> list[tuple[Tensor, ...]]:
    with torch.no_grad(), Attentions() as seen:
        inputs.call(model)
    return seen.calls


def projections(architecture: Architecture) -> Iterator[tuple[str, str, Any]]:
    """Each weight, role and columns (None: all) of the queries, keys and values."""
    for weight, role in architecture.roles.items():
        for part, columns in role.items() if isinstance(role, Mapping) else ((role, None),):
            if part in OPERANDS:
                yield weight, part, columns


@torch.no_grad()
def perturb(weight: nn.Parameter, columns: Any, total: int) -> None:
    """Add noise to the weight's output columns, all of them where `columns` is None."""
    if columns is None:
        columns = ((0, weight.shape[0]),)
        total = weight.shape[0]
    dim = list(weight.shape).index(total)
    index = torch.cat([torch.arange(start, stop) for start, stop in columns])
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)).index_select(dim, index)
    weight.index_add_(dim, index, noise)


@pytest.mark.parametrize("name", EVERY)
def test_a_weight_moves_the_operand_that_the_truth_says(name: str) -> None:
    """The first attention that changes when a weight's columns do changes in that operand and no other."""
    architecture = EVERY[name]
    model = architecture.build()
    inputs = as_inputs(model, architecture.example_inputs)
    base = attentions(model, inputs)
    assert bool(base) is (name not in WITHOUT_SDPA)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for weight, role, columns in projections(architecture) if base else ():
        fused = architecture.roles[weight]
        total = sum(b - a for spans in fused.values() for a, b in spans) if isinstance(fused, Mapping) else 0
        before = parameters[weight].detach().clone()
        perturb(parameters[weight], columns, total)
        changed = (
            {part for part, old, new in zip(OPERANDS, *call, strict=True) if not torch.equal(old, new)}
            for call in zip(base, attentions(model, inputs), strict=True)
        )
        assert next(filter(None, changed), None) == {role}, (weight, columns)
        parameters[weight].detach().copy_(before)


@pytest.mark.parametrize("name", ["vit_plain", "bert"])
def test_a_model_is_the_same_each_time_and_draws_nothing(name: str) -> None:
    before = torch.get_rng_state()
    first, second = ZOO[name].build().state_dict(), ZOO[name].build().state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[key], second[key]) for key in first)
