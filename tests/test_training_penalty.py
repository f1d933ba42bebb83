"""The regulariser against the papers' formulas with every Gram matrix formed (the oracle forms P and Q)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora2fx
from lora2fx.methods.lora2 import LoRA2
from lora2fx.methods.lora2_penalty import PLANES
from lora2fx.training import bank
from lora2fx.training.penalty import product_deviation
from tests.adapted import expert_site, fill, linear_site

SHAPES = [(1, 4), (2, 6), (4, 4), (6, 3)]


def grams(adapter, V=True):
    """Eq. (5)'s six Gram matrices (four where V is left out), by plane, P and Q formed."""
    u, v, U, W = adapter.u, adapter.v, adapter.U, adapter.V
    P, Q = u @ v, U @ W
    found = {"uv": [u.mT @ u, v @ v.mT], "UV": [U.mT @ U], "PQ": [P.mT @ P]}
    if V:
        found["UV"].append(W @ W.mT)
        found["PQ"].append(Q @ Q.mT)
    return found


def norms(adapter, planes=PLANES, V=True):
    found = [gram for plane in planes for gram in grams(adapter, V)[plane]]
    return [torch.linalg.norm(g - torch.eye(g.shape[-1], dtype=g.dtype), dim=(-2, -1)) for g in found]


def random_adapters(method, sites):
    torch.manual_seed(0)
    found = [method.adapter(site).double() for site in sites]
    for adapter in found:
        fill(adapter, **{name: 0.7 * torch.randn_like(p) for name, p in adapter.named_parameters()})
    return found


SITES = [linear_site("a", 9, 7), linear_site("b", 8, 6), linear_site("c", 9, 7)]


@pytest.mark.parametrize(("k", "r"), SHAPES)
@pytest.mark.parametrize("planes", [PLANES, ("uv",), ("UV", "PQ")])
@pytest.mark.parametrize("form", ["mean", "squared_sum"])
def test_six_terms_and_their_gradients(k, r, planes, form):
    method = LoRA2.paper(r=r, k=k, orth_reg_weight=0.3, orth_planes=planes, orth_form=form)
    adapters = random_adapters(method, SITES)
    parameters = [p for adapter in adapters for name, p in adapter.named_parameters() if name != "lam"]
    every = [norm for adapter in adapters for norm in norms(adapter, planes)]
    expected = 0.3 * (sum(n**2 for n in every) if form == "squared_sum" else sum(every) / (6 * len(adapters)))
    found = method.training().penalty(adapters)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(found, parameters, materialize_grads=True),
        torch.autograd.grad(expected, parameters, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_stack_of_experts_counts_as_its_matrices():
    method = LoRA2.paper(r=5, k=3)
    adapters = random_adapters(method, [SITES[0], expert_site("moe", 4, 8, 6)])
    total = sum(norm.sum() for adapter in adapters for norm in norms(adapter))
    torch.testing.assert_close(method.training().penalty(adapters), 0.1 * total / (6 * 5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("init", ["identity", "zero_out"])
def test_V_is_left_out_where_it_starts_at_zero_and_the_others_weigh_the_same(init):
    method = LoRA2(r=5, k=3, init=init, orth_reg_weight=0.1)
    adapters = random_adapters(method, SITES)
    total = sum(norm for adapter in adapters for norm in norms(adapter, V=False))
    found = method.training().penalty(adapters)
    torch.testing.assert_close(found, 0.1 * total / (6 * 3), rtol=1e-12, atol=0)
    grads = torch.autograd.grad(found, [adapter.V for adapter in adapters], allow_unused=True)
    assert grads == (None, None, None)


@pytest.mark.parametrize("init", ["identity", "zero_out", "orthonormal"])
def test_at_its_minimum_the_gradient_is_zero_and_finite(init):
    torch.manual_seed(0)
    method = LoRA2(r=4, k=4, init=init)
    adapters = [method.adapter(site).double() for site in SITES]
    for adapter in adapters:
        adapter.u.data.zero_()[:4] = torch.eye(4, dtype=torch.float64)
        adapter.v.data.copy_(torch.eye(4))
        adapter.U.data.copy_(torch.eye(4))
        adapter.V.data.zero_()[:, :4] = torch.eye(4, dtype=torch.float64)
    penalty = method.training().penalty(adapters)
    assert penalty == 0
    parameters = [p for adapter in adapters for p in adapter.parameters()]
    grads = torch.autograd.grad(penalty, parameters, allow_unused=True)
    assert all(grad is None or (grad == 0).all() for grad in grads)


@pytest.mark.parametrize("init", ["identity", "zero_out", "orthonormal"])
@pytest.mark.parametrize(("k", "r"), [(3, 3), (3, 5)])
def test_fresh_factors_are_at_the_minimum(init, k, r):
    """Every term but those of P, Q (r - K at least) is 0 for orthonormal factors."""
    torch.manual_seed(0)
    method = LoRA2(r=r, k=k, init=init, orth_form="squared_sum", orth_reg_weight=1.0)
    adapters = [method.adapter(site) for site in SITES]
    excess = (2 if init == "orthonormal" else 1) * (r - k) * len(SITES)
    assert float(method.training().penalty(adapters).detach()) == pytest.approx(excess, abs=1e-4)


@pytest.mark.parametrize(("k", "r"), SHAPES)
def test_product_term_without_the_product(k, r):
    torch.manual_seed(0)
    u, v = torch.randn(2, 9, k, dtype=torch.float64), torch.randn(2, k, r, dtype=torch.float64)
    P = u @ v
    expected = (P.mT @ P - torch.eye(r, dtype=torch.float64)).square().sum((-2, -1))
    torch.testing.assert_close(product_deviation(u.mT @ u, v), expected, rtol=1e-12, atol=0)


def test_no_plane_or_no_weight_is_no_penalty():
    assert LoRA2(orth_reg_weight=0).training().penalty is None
    assert LoRA2(orth_planes=()).training().penalty is None


@pytest.mark.parametrize(("k", "r"), SHAPES)
@pytest.mark.parametrize("planes", [PLANES, ("uv",), ("UV", "PQ")])
@pytest.mark.parametrize("form", ["mean", "squared_sum"])
@pytest.mark.parametrize("init", ["gaussian", "zero_out"])
def test_the_closed_form_is_the_reference(k, r, planes, form, init):
    """On stacks: value and gradient of adapters of three shapes, as autograd finds them."""
    method = LoRA2(r=r, k=k, init=init, orth_reg_weight=0.3, orth_planes=planes, orth_form=form)
    adapters = random_adapters(method, [*SITES, linear_site("d", 8, 7)])
    training = method.training()
    ((_, folded),) = training.folding.together(adapters)()
    names = ["u", "v", "U", "V"]
    stacks = {name: tuple(torch.randn_like(own) for own in folded.use.stacked(name)) for name in names}
    before = {name: [own.clone() for own in stack] for name, stack in stacks.items()}
    found = training.folding.penalise(folded.use, stacks, len(adapters))
    expected = training.penalty(adapters)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for name in names:
        for own, stack, old in zip(folded.use.parameters[name], stacks[name], before[name], strict=True):
            wanted = torch.autograd.grad(expected, own, retain_graph=True, materialize_grads=True, allow_unused=True)
            torch.testing.assert_close(stack - old, torch.stack(wanted), rtol=1e-9, atol=1e-12)


def test_the_closed_form_at_its_minimum():
    torch.manual_seed(0)
    method = LoRA2(r=4, k=4)
    adapters = [method.adapter(site).double() for site in SITES]
    for adapter in adapters:
        for name in ("u", "v", "U"):
            adapter.get_parameter(name).data.zero_()[:4, :4] = torch.eye(4, dtype=torch.float64)
    training = method.training()
    ((_, folded),) = training.folding.together(adapters)()
    stacks = {name: tuple(torch.zeros_like(own) for own in folded.use.stacked(name)) for name in ("u", "v", "U", "V")}
    assert training.folding.penalise(folded.use, stacks, 3) == 0
    assert all((own == 0).all() for stack in stacks.values() for own in stack)


@pytest.mark.parametrize("closed", [True, False])
def test_an_orthonormal_start_is_not_pushed_along_its_rounding(closed, monkeypatch):
    """The un-squared norm's gradient has length 1 however small the deviation is; of rounding alone it is noise."""
    if not closed:
        monkeypatch.setattr(bank, "is_eager", lambda adapter: False)
    model = lora2fx.transform(
        nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)),
        ["0", "1"],
        LoRA2(r=4, k=4, orth_reg_weight=1.0),
        seed=0,
        example_inputs=(torch.ones(2, 12),),
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    lora2fx.attach(model, optimizer, total_steps=100)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (0 * model(torch.ones(2, 12))).sum().backward()
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
