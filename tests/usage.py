"""Adapted models of a few families, as their users hold them."""

import copy
from functools import cache

import torch

import lora2fx
from lora2fx.adapter import Adapter
from lora2fx.inputs import as_inputs, flatten_outputs
from tests.zoo import ZOO

FAMILIES = ("vit_plain", "bert", "gpt2", "llama", "t5", "encoder", "einsum", "mha")
METHOD = lora2fx.LoRA2(r=3, k=2)
TARGETS = ("query", "key", "value", "ffn")


def adapters_of(model):
    return [module for module in model.modules() if isinstance(module, Adapter)]


def randomise(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in adapters_of(model):
            for parameter in adapter.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@cache
def transformed(name, targets, untie):
    architecture = ZOO[name]
    model = architecture.build()
    inputs = as_inputs(model, architecture.example_inputs)
    lora2fx.transform(model, targets, METHOD, example_inputs=architecture.example_inputs, untie=untie, seed=0)
    return randomise(model), inputs


def adapted(name, targets=TARGETS, untie=False):
    """A copy of the adapted model, and the inputs that it was transformed with."""
    model, inputs = transformed(name, targets, untie)
    return copy.deepcopy(model), inputs


def folded(model):
    twin = copy.deepcopy(model)
    lora2fx.fold(twin)
    return twin


def floats(output):
    return [tensor for tensor in flatten_outputs(output) if tensor.is_floating_point()]


def close(found, expected, tolerance=1e-5):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
