"""Unloading: the base model back, bit for bit, trained heads included."""

import copy

import pytest
import torch

from lora2fx.errors import AdapterError
from lora2fx.methods.lora import LoRA
from lora2fx.methods.lora2 import LoRA2
from lora2fx.passes.fold import fold_adapters
from lora2fx.passes.unload import unload_adapters
from lora2fx.program import program_of
from tests.programs import SITES, Small, adapt, randomised, small_inputs, states


def trained(model, modules_to_save=("head", "norm")):
    """Adapted, with every adapter, head weight and statistic moved."""
    program = randomised(adapt(model, LoRA2(r=3, k=2), modules_to_save=modules_to_save))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    model(*small_inputs().args).square().mean().backward()
    optimizer.step()
    return program


def test_everything_is_as_before_transform():
    base = Small()
    base.linear.bias.requires_grad_(False)
    model = copy.deepcopy(base)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    identities = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    program = trained(model)
    assert states(model)["head.weight"] != states(base)["head.weight"]
    assert states(model)["norm.running_mean"] != states(base)["norm.running_mean"]
    unload_adapters(program)
    assert states(model) == states(base)
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert {name: (p, p.data_ptr()) for name, p in model.named_parameters()} == identities
    assert torch.equal(model.eval()(*small_inputs().args), base(*small_inputs().args))
    with pytest.raises(AdapterError, match="unload: Small holds no adapters"):
        program_of(model, "unload")


@pytest.mark.parametrize("rewrite", ["weight", "property"])
def test_every_rewrite_is_undone(rewrite):
    base = Small()
    model = copy.deepcopy(base)
    names = ["linear.lora2fx_weight", "fused.lora2fx_weight_key", "fused.lora2fx_weight_value", "conv.lora2fx_weight"]
    unload_adapters(randomised(adapt(model, LoRA(r=2), SITES[:4], plans=dict.fromkeys(names, rewrite))))
    assert states(model) == states(base)
    assert torch.equal(model(*small_inputs().args), base(*small_inputs().args))


def test_a_head_of_another_shape_is_refused_and_nothing_changes():
    model = Small()
    program = trained(model)
    model.head = torch.nn.Linear(3, 4).double()
    before = states(model)
    with pytest.raises(AdapterError, match=r"head\.weight.* had shape \(2, 3\) and is now \(4, 3\)"):
        unload_adapters(program)
    assert states(model) == before
    del model.head
    with pytest.raises(AdapterError, match=r"head\.weight.* is now missing"):
        unload_adapters(program)


def test_a_tied_parameter_gets_its_flag_back_under_any_of_its_names():
    model = Small()
    model.second = torch.nn.Linear(4, 6).double()
    model.second.weight = model.linear.weight
    program = adapt(model, LoRA(r=2), SITES[3:4])
    unload_adapters(program)
    assert all(parameter.requires_grad for parameter in model.parameters())


def untied(model):
    """What `transform(untie=True)` does to `second`, which shares its weight with `linear`, by hand."""
    shared = model.second.weight
    model.second.weight = torch.nn.Parameter(shared.detach().clone())
    program = adapt(model, LoRA(r=2), SITES[3:4])
    program.record.untied["second.weight"] = shared
    program.record.trainable_before -= {"second.weight"}  # named once before, as linear.weight
    return program, shared


def test_a_weight_that_was_untied_is_tied_again_and_folding_leaves_it_trainable():
    model = Small()
    model.second = torch.nn.Linear(4, 6).double()
    model.second.weight = model.linear.weight
    other = copy.deepcopy(model)
    program, shared = untied(model)
    unload_adapters(program)
    assert model.second.weight is model.linear.weight is shared
    assert shared.requires_grad
    program, _ = untied(other)
    fold_adapters(program)
    assert other.second.weight is not other.linear.weight
    assert other.second.weight.requires_grad
