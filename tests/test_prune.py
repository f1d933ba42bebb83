"""Pruning: smaller factors, the same outputs, and an optimizer that goes on as if nothing had happened."""

import copy

import pytest
import torch

from lora2fx.errors import AdapterError
from lora2fx.methods.adalora import AdaLoRA
from lora2fx.methods.alora import ALoRA
from lora2fx.methods.lora import LoRA
from lora2fx.methods.lora2 import LoRA2
from lora2fx.methods.salora import SaLoRA
from lora2fx.methods.sora import SoRA
from lora2fx.passes.fold import fold_adapters
from lora2fx.passes.prune import prune_ranks
from tests.programs import Small, adapt, randomised, small_inputs


def masked_program(model, keep=(True, False, True), columns=(False, True)):
    program = randomised(adapt(model, LoRA2(r=3, k=2, target_r=1)))
    for adapter in program.adapters.values():
        for name, kept in (("lambda", keep), ("columns", columns)):
            axis = adapter.axes()[name]
            axis.mask.copy_(torch.tensor(kept))
            axis.keep.copy_(torch.tensor(kept))
    return program


KEPT = {
    "some of both axes": ((True, False, True), (False, True)),
    "only ranks": ((False, True, False), (True, True)),
    "only columns": ((True, True, True), (True, False)),
    "no rank": ((False, False, False), (True, True)),
    "no column": ((True, True, True), (False, False)),
    "nothing": ((False, False, False), (False, False)),
}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT.keys())
def test_outputs_gradients_and_the_fold_are_what_they_were(kept):
    model = Small()
    program = masked_program(model, *kept)
    before = model(*small_inputs().args)
    ranks = {name: adapter.rank() for name, adapter in program.adapters.items()}
    report = prune_ranks(program)
    after = model(*small_inputs().args)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    after.square().sum().backward()
    for name, adapter in program.adapters.items():
        assert adapter.u.shape[-1] == adapter.V.shape[-2] == sum(kept[1])
        assert adapter.lam.shape[-1] == adapter.v.shape[-1] == adapter.U.shape[-2] == sum(kept[0])
        assert adapter.v_sensitivity.shape == adapter.v.shape
        assert adapter.rank() == ranks[name]
        assert all(parameter.grad.shape == parameter.shape for parameter in adapter.parameters())
    assert all(entry["r"] == entry["active"] == sum(kept[0]) for entry in report.sites)
    assert report.details["dropped"] == {"lambda": 5 * (3 - sum(kept[0])), "columns": 5 * (2 - sum(kept[1]))}
    assert report.totals["adapter_parameters"] <= report.details["adapter_parameters_before"]
    with torch.no_grad():
        again = copy.deepcopy(model)(*small_inputs().args)
    torch.testing.assert_close(again, before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", [LoRA, AdaLoRA, SoRA, SaLoRA, ALoRA])
def test_every_method_prunes_and_trains_on(method):
    model = Small()
    program = randomised(adapt(model, method(r=3)))
    for adapter in program.adapters.values():
        next(iter(adapter.axes().values())).mask[1] = False
    before = model(*small_inputs().args)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    report = prune_ranks(program, optimizer)
    torch.testing.assert_close(model(*small_inputs().args), before, rtol=1e-12, atol=1e-12)
    assert all(entry["r"] == 2 for entry in report.sites)
    steps(model.train(), optimizer, 2)


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True),
    "foreach": lambda parameters: torch.optim.Adam(parameters, lr=0.01, foreach=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.9, centered=True),
}


def steps(model, optimizer, count):
    for _ in range(count):
        optimizer.zero_grad()
        model(*small_inputs().args).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_training_goes_on_as_if_masked_entries_had_never_been_dropped(make):
    pruned, masked = Small(), Small()
    runs = []
    for model in (pruned, masked):
        program = masked_program(model)
        optimizer = make([{"params": [p for p in model.parameters() if p.requires_grad]}])
        steps(model, optimizer, 3)
        runs.append((program, optimizer))
    (program, optimizer), (_, unpruned) = runs
    prune_ranks(program, optimizer)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in pruned.parameters() if p.requires_grad}
    assert set(optimizer.state) == set(held)
    steps(pruned, optimizer, 4)
    steps(masked, unpruned, 4)
    with torch.no_grad():
        torch.testing.assert_close(pruned(*small_inputs().args), masked(*small_inputs().args), rtol=1e-12, atol=1e-12)


def test_a_state_that_cannot_be_sliced_is_refused_and_nothing_changes():
    model = Small()
    program = masked_program(model)
    optimizer = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad], lr=0.01)
    steps(model, optimizer, 1)
    before = dict(model.named_parameters())
    with pytest.raises(AdapterError, match=r"Adafactor keeps '\w+' of shape .* can't be sliced along"):
        prune_ranks(program, optimizer)
    assert dict(model.named_parameters()) == before


def test_nothing_to_prune_keeps_every_object():
    model = Small()
    program = randomised(adapt(model, LoRA2(r=3, k=2)))
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    report = prune_ranks(program)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert report.details["dropped"] == {"lambda": 0, "columns": 0}


def test_pruned_and_unpruned_fold_to_the_same_weights():
    models = [Small(), Small()]
    for model, prune in zip(models, (True, False), strict=True):
        program = masked_program(model)
        for adapter in program.adapters.values():
            adapter.progress.copy_(torch.tensor([9, 9, 0]))
        if prune:
            prune_ranks(program)
        fold_adapters(program)
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13, msg=name)
