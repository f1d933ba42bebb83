"""Sites that read the same x are computed together, x is made again for the backward, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lora2fx
from lora2fx import eager
from lora2fx.methods.lora2 import LoRA2
from lora2fx.training import products, rebuilding
from lora2fx.training.rebuilding import origin_of
from tests.adapted import adapters_of, check_as_exact, distances, in_low_precision

METHOD = LoRA2(r=4, k=3, target_r=2, tinit=1, tfinal=2)
OWN = pytest.mark.parametrize("size", [2**16, 0], ids=["torch's derivatives", "own function"])


class Attention(nn.Module):
    """Query, key and value of one normalised x, the key's width another; an output of their product."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(6)
        self.query, self.key, self.value = nn.Linear(6, 8), nn.Linear(6, 4, bias=False), nn.Linear(6, 8)
        self.out = nn.Linear(8, 6)
        self.use_key = True
        self.rewrite_x = False

    def forward(self, x):
        x = self.norm(x)
        q = self.query(x)
        if self.rewrite_x:
            x = x.mul_(2)
        k = self.key(x).mean(-1, keepdim=True) if self.use_key else 1.0
        return self.out(q * k * self.value(x).sigmoid())


def attached():
    model = Attention().double()
    x = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lora2fx.transform(model, ["name:query", "name:key", "name:value", "name:out"], METHOD, example_inputs=(x,), seed=0)
    with torch.no_grad():
        for adapter in adapters_of(model):
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) / 3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    lora2fx.attach(model, optimizer, total_steps=100)
    return model.train(), optimizer


def inputs():
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x.requires_grad_()


def gradients(model, run=lambda model, x: model(x)):
    model.zero_grad()
    x = inputs()
    output = run(model, x)
    output.square().sum().backward()
    return [output, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def agree(model, run=lambda model, x: model(x)):
    """Eager form and functional one, in float64."""
    found = gradients(model, run)
    expected = gradients(copy.deepcopy(model), run)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def step(model, optimizer):
    gradients(model)
    optimizer.step()


def source(model):
    return vars(model.query.lora2fx_weight)[eager.SLOT].source


@OWN
def test_query_key_and_value_are_one_product_from_the_first_step_on(size, monkeypatch):
    monkeypatch.setattr(products, "SMALL", size)
    model, optimizer = attached()
    for _ in range(3):
        agree(model)
        assert source(model)._sharing.teams == [[0, 1, 2]]
        step(model, optimizer)


def test_each_is_computed_by_itself_where_that_is_asked_for_or_nothing_was_recorded():
    model = Attention().double()
    lora2fx.transform(model, ["name:query", "name:key", "name:value"], METHOD)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    lora2fx.attach(model.train(), optimizer, total_steps=100)
    gradients(model)
    assert source(model)._sharing.teams == []
    model, optimizer = attached()
    vars(optimizer)["_optimizer_step_post_hooks"].popitem()[1].__self__.detach()
    lora2fx.attach(model, optimizer, total_steps=100, share_inputs=False)
    gradients(model)
    assert source(model)._sharing.teams == []


def test_a_resumed_run_ends_in_the_same_bits():
    whole, optimizer = attached()
    step(whole, optimizer)
    model, again = attached()
    model.load_state_dict(whole.state_dict())
    step(whole, optimizer)
    step(model, again)
    assert source(model)._sharing.teams == source(whole)._sharing.teams == [[0, 1, 2]]
    for a, b in zip(whole.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@OWN
def test_a_member_left_out_gets_no_gradient_and_ends_the_team(size, monkeypatch):
    monkeypatch.setattr(products, "SMALL", size)
    model, optimizer = attached()
    step(model, optimizer)
    model.use_key = False
    agree(model)
    assert model.key.lora2fx_weight.u.grad is None
    step(model, optimizer)
    assert source(model)._sharing.teams == []
    model.use_key = True
    agree(model)


def test_an_input_written_to_in_between_is_another_one():
    model, optimizer = attached()
    step(model, optimizer)
    model.rewrite_x = True
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        agree(model)  # as without sharing: the query needs its x
    model.rewrite_x = False
    hook = model.key.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    agree(model)
    hook.remove()


@OWN
def test_a_weight_changed_or_replaced_in_between_is_seen(size, monkeypatch):
    monkeypatch.setattr(products, "SMALL", size)
    model, optimizer = attached()
    step(model, optimizer)
    hook = model.query.register_forward_hook(lambda *_: setattr(model.key, "weight", replacement))
    replacement = nn.Parameter(torch.randn(4, 6, dtype=torch.float64), requires_grad=False)
    x = inputs()
    expected = model(x)
    hook.remove()
    torch.testing.assert_close(expected, copy.deepcopy(model)(x), rtol=1e-12, atol=1e-12)


@OWN
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_teams(size, reentrant, monkeypatch):
    monkeypatch.setattr(products, "SMALL", size)
    model, optimizer = attached()
    step(model, optimizer)
    agree(model, lambda model, x: checkpoint(model, x, use_reentrant=reentrant))
    agree(model, lambda model, x: model(checkpoint(model, x, use_reentrant=reentrant)))


@OWN
def test_second_derivatives_of_teams(size, monkeypatch):
    monkeypatch.setattr(products, "SMALL", size)
    model, optimizer = attached()
    step(model, optimizer)

    def twice(own):
        x = inputs()
        trained = [x, *(p for p in own.parameters() if p.requires_grad)]
        first = torch.autograd.grad(own(x).square().sum(), trained, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), trained)

    for a, b in zip(twice(model), twice(copy.deepcopy(model)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@OWN
def test_teams_of_a_model_in_low_precision(size, monkeypatch):
    monkeypatch.setattr(products, "SMALL", size)
    model, _ = attached()
    in_low_precision(model.float(), torch.bfloat16)
    twin, exact = copy.deepcopy(model), copy.deepcopy(model).double()

    def run(own, x):
        own.zero_grad()
        output = own(x)
        output.square().sum().backward()
        return [output, *(p.grad for p in own.parameters() if p.requires_grad)]

    errors, usual = [], []
    for _ in range(9):
        x = torch.randn(3, 5, 6).bfloat16()
        expected = run(exact, x.double())
        errors.append(distances(run(model, x), expected))
        usual.append(distances(run(twin, x), expected))
    check_as_exact(errors, usual, torch.bfloat16)


@OWN
def test_outputs_may_be_written_to(size, monkeypatch):
    monkeypatch.setattr(products, "SMALL", size)
    model, optimizer = attached()
    step(model, optimizer)
    agree(model, lambda model, x: model.out(F.relu(model.query(x), inplace=True)))


def test_accumulated_and_replaced_gradients_are_the_functional_ones():
    model, optimizer = attached()
    step(model, optimizer)
    twin = copy.deepcopy(model)
    optimizers = [optimizer, torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.01)]
    lora2fx.attach(twin, optimizers[1], total_steps=100)
    source_of_twin = vars(twin.query.lora2fx_weight)[eager.SLOT].source
    # The reference: each parameter's own gradient, the penalty by autograd.
    source_of_twin.uses = source_of_twin.gathered = lambda *_: None
    for round in range(4):
        for own, stepping in zip((model, twin), optimizers, strict=True):
            stepping.zero_grad(set_to_none=round < 2)
            for _ in range(2):
                own(inputs().detach()).square().sum().backward()
            if round == 1:
                own.out.lora2fx_weight.u.grad = own.out.lora2fx_weight.u.grad * 3
            nn.utils.clip_grad_norm_(own.parameters(), 1.0)
            stepping.step()
        for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def activations():
    """By name: how x is made of a leaf that needs a gradient."""
    weight, bias = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    return {
        "layer norm": lambda x: F.layer_norm(x * 1, (6,), weight, bias, 1e-3),
        "layer norm without bias": lambda x: F.layer_norm(x * 1, (6,), weight, None),
        "layer norm without weights": lambda x: F.layer_norm(x * 1, (5, 6)),
        "rms norm": lambda x: weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)),
        "rms norm in float32": lambda x: weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, True))).double(),
        "gelu": lambda x: F.gelu(x * 1),
        "gelu by tanh": lambda x: F.gelu(x * 1, approximate="tanh"),
        "silu": lambda x: F.silu(x * 1),
        "silu times up": lambda x: F.silu(x * weight) * (x * bias),
        "rows of an activation": lambda x: F.silu(x * 1)[torch.tensor([2, 0, 0, 1])],
        "a view of an activation": lambda x: F.silu(x * 1).view(-1, 6),
        "rows of a view of a norm in float32": lambda x: (
            (weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, True))).double()).reshape(15, 6)
        )[torch.arange(30) // 2],
    }


@pytest.mark.parametrize("name", list(activations()))
def test_an_activation_is_made_again(name):
    torch.manual_seed(0)
    make = activations()[name]
    x = inputs()
    y = make(x)
    origin = origin_of(y)
    with torch.no_grad():
        torch.testing.assert_close(origin.rebuild(origin.tensors), y, rtol=1e-13, atol=1e-14)
    again = origin.rebuild(origin.tensors)
    found = torch.autograd.grad(again.pow(3).sum(), x, retain_graph=True)
    expected = torch.autograd.grad(y.pow(3).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x + 1,
        lambda x: x.tanh(),
        lambda x: x.detach(),
        lambda x: (x + 1) * torch.ones(6, dtype=torch.float64),
        lambda x: F.silu(x * 1)[torch.tensor([2, 0])],
        lambda x: F.silu(x * 1)[torch.arange(3), torch.tensor([0, 1, 2])],
        lambda x: (x + 1)[torch.tensor([0, 1, 2])],
    ],
    ids=["sum", "kept already", "no graph", "frozen times sum", "a few rows", "two indices", "rows of a sum"],
)
def test_what_is_not_to_be_had_is_kept(make):
    assert origin_of(make(inputs())) is None


def test_under_hooks_on_saved_tensors_x_is_kept():
    unpacked = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: unpacked.append(t) or t):
        inside = F.gelu(inputs() * 1)
        assert origin_of(F.gelu(inputs() * 1)) is None
    assert origin_of(inside) is None
    assert not unpacked


def test_x_is_kept_where_that_was_asked_for(monkeypatch):
    monkeypatch.setattr(products, "SMALL", 0)
    made = []
    monkeypatch.setattr(products, "origin_of", lambda x: made.append(rebuilding.origin_of(x)) or made[-1])
    model, optimizer = attached()
    agree(model)
    step(model, optimizer)
    assert any(made)
    made.clear()
    source(model)._rebuild = False
    agree(model)
    assert not made
