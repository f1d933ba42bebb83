from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from lora2fx.errors import MethodError, ScheduleError
from lora2fx.methods.salora import SaLoRA
from lora2fx.training.density import density
from lora2fx.training.driver import Attachment, schedule_status
from lora2fx.training.hard_concrete import HardConcrete
from tests.adapted import expert_site, fill, linear_site

SITE, STACK = linear_site("layer", 10, 7), expert_site("moe", 3, 10, 7)
METHOD = SaLoRA(r=4, tinit=2, tfinal=3, multiplier_lr=0.5)
T = 9


def random(adapter):
    torch.manual_seed(0)
    return fill(adapter.double(), **{name: torch.randn_like(p) for name, p in adapter.named_parameters()})


@pytest.mark.parametrize("site", [SITE, STACK], ids=["matrix", "stack"])
def test_starts_at_zero_with_open_gates_and_is_the_formula(site):
    torch.manual_seed(0)
    fresh = METHOD.adapter(site).double()
    assert (fresh.delta() == 0).all()
    assert fresh.lambdas.tolist() == pytest.approx([0.957] * 4, abs=0.005)
    a = random(METHOD.adapter(site))
    gates = HardConcrete().evaluation_gate(a.log_theta)
    torch.testing.assert_close(a.delta(), a.A.mT @ torch.diag_embed(gates) @ a.B.mT, rtol=1e-12, atol=1e-12)
    scaled = random(SaLoRA(r=4, lora_alpha=8).adapter(site))
    torch.testing.assert_close(scaled.delta(), 2 * a.delta(), rtol=1e-12, atol=1e-12)


class Model(nn.Module):
    def __init__(self, method=METHOD) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.adapters = nn.ModuleList(method.adapter(linear_site(f"l{i}", 6, 6)) for i in range(2)).double()
        fill(self.adapters[0], B=torch.randn(6, 4))
        fill(self.adapters[1], B=torch.randn(6, 4))

    def forward(self, x):
        for adapter in self.adapters:
            x = x + adapter(x)
        return x.square().mean()


def driven(method=METHOD):
    model = Model(method)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    return model, optimizer, Attachment(model.adapters, method.training(), optimizer, T)


def run(model, optimizer, steps):
    x = torch.ones(3, 6, dtype=torch.float64)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()


def test_one_sample_a_step_and_none_in_eval_mode():
    model, optimizer, _ = driven()
    adapter = model.adapters[0]
    seen = []
    for _ in range(4):
        seen.append(adapter.noise.clone())
        sampled = adapter.delta().detach()
        model.eval()
        assert (adapter.noise == 0.5).all()
        torch.testing.assert_close(adapter.gate(), adapter.gates.evaluation_gate(adapter.log_theta))
        torch.testing.assert_close(adapter.exact().delta(), adapter.delta().detach())
        model.train()
        assert torch.equal(adapter.delta().detach(), sampled)
        run(model, optimizer, 1)
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))
    assert not torch.equal(model.adapters[0].noise, model.adapters[1].noise)
    assert ((torch.stack(seen) > 0) & (torch.stack(seen) < 1)).all()


def test_gates_and_multipliers_move_inside_the_window_only():
    model, optimizer, attachment = driven()
    adapter = model.adapters[0]
    for step in range(T):
        before = adapter.log_theta.detach().clone(), adapter.multipliers.clone(), adapter.A.detach().clone()
        run(model, optimizer, 1)
        inside = 2 <= step < 6
        assert torch.equal(adapter.log_theta, before[0]) != inside, step
        assert torch.equal(adapter.multipliers, before[1]) != inside, step
        assert not torch.equal(adapter.A, before[2])
        assert (adapter.noise == 0.5).all() == (step >= 5), "fixed gates from the end of the window on"
        assert torch.equal(model.adapters[1].multipliers, adapter.multipliers)
    assert adapter.multipliers[0] == 0
    assert adapter.multipliers[1] > 0
    assert schedule_status(model.adapters, METHOD.training()) is None
    assert attachment.step == T


def test_what_is_shut_at_the_end_of_the_window_stays_shut():
    model, optimizer, _ = driven()
    run(model, optimizer, 5)
    fill(model.adapters[0], log_theta=torch.tensor([-9.0, 3.0, -9.0, 3.0]))
    run(model, optimizer, T - 5)
    adapter = model.adapters[0]
    assert adapter.mask.tolist() == [False, True, False, True]
    assert adapter.lambdas[0] == adapter.lambdas[2] == 0
    before = adapter.delta().detach()
    adapter.compact()
    assert adapter.A.shape == (2, 6)
    assert adapter.noise.shape == adapter.sample.shape == (2,)
    torch.testing.assert_close(adapter.delta().detach(), before, rtol=0, atol=1e-14)


def test_density_is_pooled_over_the_factors():
    gates = HardConcrete()
    adapters = [random(SaLoRA(r=r).adapter(site)) for r, site in ((4, SITE), (2, linear_site("b", 30, 5)), (3, STACK))]
    costs = [17, 35, 17]
    opened = [gates.probability(a.log_theta).sum() * cost for a, cost in zip(adapters, costs, strict=True)]
    entries = 4 * 17 + 2 * 35 + 9 * 17
    torch.testing.assert_close(density(adapters, gates), sum(opened) / entries, rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", ["quadratic", "linear_quadratic"])
@pytest.mark.parametrize("orth", ["squared_sum", "cosine"])
def test_penalty(form, orth):
    method = SaLoRA(r=4, target_density=0.3, lagrangian=form, orth_form=orth, orth_reg_weight=0.01)
    adapters = [random(method.adapter(site)) for site in (SITE, linear_site("b", 6, 5))]
    for a in adapters:
        a.multipliers.copy_(torch.tensor([0.7, 1.9], dtype=torch.float64))
    gap = density(adapters, HardConcrete()) - 0.3
    expected = 1.9 * gap**2 + (0.7 * gap if form == "linear_quadratic" else 0)
    for a in adapters:
        for rows in (a.A, a.B.T):
            if orth == "cosine":
                gram = torch.stack([torch.cosine_similarity(row, rows, dim=-1) for row in rows])
                expected = expected + 0.01 * (gram.square().sum() - 4)
            else:
                expected = expected + 0.01 * (rows @ rows.T - torch.eye(4, dtype=torch.float64)).square().sum()
    torch.testing.assert_close(method.training().penalty(adapters), expected, rtol=1e-10, atol=0)


def test_cosine_penalty_of_a_fresh_adapter_is_finite():
    method = SaLoRA(r=4, orth_form="cosine")
    adapter = method.adapter(SITE)
    penalty = method.training().penalty([adapter])
    grads = torch.autograd.grad(penalty, [adapter.A, adapter.B, adapter.log_theta])
    assert penalty.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


def test_a_run_resumes_with_its_noise():
    whole, optimizer, _ = driven()
    run(whole, optimizer, 4)
    saved = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    run(whole, optimizer, T - 4)
    model = Model()
    model.load_state_dict(saved[0])
    again = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    again.load_state_dict(saved[1])
    Attachment(model.adapters, METHOD.training(), again, T)
    run(model, again, T - 4)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), model.state_dict().values(), strict=True))


def test_the_target_comes_down_over_its_warm_up():
    method = SaLoRA(r=4, target_density=0.4, density_warmup=3, tinit=2, tfinal=3, multiplier_lr=0.5)
    model, optimizer, attachment = driven(method)
    targets = []
    for _ in range(T):
        targets.append(attachment.training.allocators[0].target.now(attachment.adapters))
        run(model, optimizer, 1)
    assert targets == pytest.approx([1, 1, 1, 0.8, 0.6, 0.4, 0.4, 0.4, 0.4])
    with pytest.raises(ScheduleError, match=r"density_warmup=5 steps are more than the 4 in which gates move"):
        driven(SaLoRA(r=4, density_warmup=5, tinit=2, tfinal=3))


def test_the_penalty_and_the_multipliers_see_the_same_target():
    method = SaLoRA(
        r=4, target_density=0.4, density_warmup=4, tinit=2, tfinal=3, multiplier_lr=0.5, orth_reg_weight=0.0
    )
    model, optimizer, attachment = driven(method)
    run(model, optimizer, 4)
    adapters = attachment.adapters
    for adapter in adapters:
        adapter.multipliers.copy_(torch.tensor([0.0, 2.0]))
    with torch.no_grad():
        gap = density(adapters, HardConcrete()) - 0.7
        torch.testing.assert_close(method.training().penalty(adapters), 2 * gap**2, rtol=1e-12, atol=0)
        method.training().allocators[0]._ascend(adapters)
        torch.testing.assert_close(adapters[1].multipliers[1], 2 + 0.5 * gap**2, rtol=1e-12, atol=0)


def test_finish_prunes_what_is_shut():
    model, optimizer, attachment = driven()
    run(model, optimizer, 3)
    fill(model.adapters[0], log_theta=torch.tensor([-9.0, 3.0, 3.0, 3.0]))
    model.eval()
    before = [a.delta().detach() for a in model.adapters]
    attachment.training.allocators[0].finish(attachment.adapters)
    assert [a.mask.tolist() for a in model.adapters] == [[False, True, True, True], [True] * 4]
    assert all(torch.equal(a.delta(), b) for a, b in zip(model.adapters, before, strict=True))


def test_a_window_that_does_not_fit_is_refused():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ScheduleError, match="too short"):
        Attachment(model.adapters, METHOD.training(), optimizer, 5)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"target_density": 0}, "target_density=0: pass a number above 0 and below 1"),
        ({"target_density": 1}, "target_density=1"),
        ({"tau": 0}, "tau=0"),
        ({"gamma": 0.1}, "-gamma"),
        ({"zeta": 1.0}, "zeta"),
        ({"multiplier_lr": 0}, "multiplier_lr"),
        ({"orth_form": "mean"}, "orth_form='mean'"),
        ({"lagrangian": "cubic"}, "lagrangian='cubic'"),
        ({"lora_alpha": -2}, "lora_alpha=-2"),
        ({"noise_seed": -1}, "noise_seed"),
    ],
)
def test_hyperparameters_that_cannot_work(settings, match):
    with pytest.raises(MethodError, match=match):
        SaLoRA(**settings)
