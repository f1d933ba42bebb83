from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from lora2fx.errors import AdapterError, ScheduleError
from lora2fx.methods.lora import LoRA
from lora2fx.methods.lora2 import LoRA2
from lora2fx.training.driver import Attachment, schedule_status
from lora2fx.training.importance import averages
from lora2fx.training.slots import Training
from tests.adapted import AdaptedLinear, adapters_of, linear_site

T = 12
METHOD = LoRA2(r=4, k=3, init="zero_out", target_r=2, tinit=2, tfinal=4, deltaT=2)


class Model(nn.Module):
    """Two adapted layers and a trained head."""

    def __init__(self, method=METHOD, seed=0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        sizes = ((6, 5), (5, 4))
        self.layers = nn.ModuleList(
            AdaptedLinear(
                torch.randn(o, i).double(), torch.randn(o).double(), method.adapter(linear_site(f"l{n}", i, o))
            )
            for n, (i, o) in enumerate(sizes)
        )
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def batches(count=T, seed=5, size=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, 6, generator=generator).double()


def adamw(model, **settings):
    return torch.optim.AdamW(trained(model), **({"lr": 0.05, "weight_decay": 0.01} | settings))


def attach(model, optimizer, method=METHOD, total=T):
    return Attachment(dict(enumerate(adapters_of(model))), method.training(), optimizer, total)


def run(model, optimizer, data, scale=1.0):
    for x in data:
        optimizer.zero_grad()
        (model(x).square().mean() * scale).backward()
        optimizer.step()


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_whole_run():
    model = Model()
    optimizer = adamw(model)
    attachment = attach(model, optimizer)
    assert (attachment.step, attachment.budget, attachment.active, attachment.skipped) == (0, 8, 8, 0)
    assert attachment.penalty is None
    seen = []
    for x in batches():
        run(model, optimizer, [x])
        seen.append((attachment.budget, attachment.active))
    # T=12, events at even steps 4 and 6, the forced one at 8 and each step after.
    budgets = [8, 8, 8] + [int(4 + 4 * (1 - (t - 2) / 6) ** 3) for t in range(3, 9)] + [4] * 3
    assert [budget for budget, _ in seen] == budgets
    assert [active for _, active in seen] == [8, 8, 8, 8, budgets[4], budgets[4], budgets[6], budgets[6], 4, 4, 4, 4]
    assert attachment.penalty > 0
    assert schedule_status(adapters_of(model), METHOD.training()) is None
    assert sum(int(a.mask.sum()) for a in adapters_of(model)) == 4


def test_the_penalty_is_added_to_the_gradient_once_and_only_its_gradient():
    model, plain = Model(), Model()
    penalty = METHOD.training().penalty
    data = batches(3)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    attachment = Attachment(adapters_of(model), Training(penalty), optimizer, 3)
    reference = torch.optim.SGD(trained(plain), lr=0.1)
    for x in data:
        run(model, optimizer, [x])
        reference.zero_grad()
        value = penalty(adapters_of(plain))
        (plain(x).square().mean() + value).backward()
        reference.step()
        assert attachment.penalty == pytest.approx(float(value.detach()), abs=1e-14)
    for a, b in zip(trained(model), trained(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_clipping_does_not_touch_the_penalty():
    model = Model()
    optimizer = torch.optim.SGD(trained(model), lr=1.0)
    Attachment(adapters_of(model), Training(METHOD.training().penalty), optimizer, 1)
    before = [p.detach().clone() for p in trained(model)]
    expected = torch.autograd.grad(
        METHOD.training().penalty(adapters_of(model)), trained(model), materialize_grads=True
    )
    (model(batches(1)[0]).square().mean()).backward()
    nn.utils.clip_grad_norm_(trained(model), 0.0)
    optimizer.step()
    for old, parameter, gradient in zip(before, trained(model), expected, strict=True):
        torch.testing.assert_close(old - parameter, gradient, rtol=0, atol=1e-12)


def test_accumulated_micro_batches_are_one_step():
    whole, parts = Model(), Model()
    optimizers = [adamw(model) for model in (whole, parts)]
    attachments = [attach(model, optimizer) for model, optimizer in zip((whole, parts), optimizers, strict=True)]
    for x in batches():
        run(whole, optimizers[0], [x])
        optimizers[1].zero_grad()
        for micro in x.chunk(4):
            (parts(micro).square().mean() / 4).backward()
        optimizers[1].step()
    assert [attachment.step for attachment in attachments] == [T, T]
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["layers.0.adapter.lam", "head.bias"])
@pytest.mark.parametrize("kind", ["adamw", "sgd", "fused"])
def test_a_nonfinite_gradient_changes_nothing_and_is_counted(bad, where, kind):
    model = Model()
    optimizer = (
        torch.optim.SGD(trained(model), lr=0.1, momentum=0.9, weight_decay=0.1)
        if kind == "sgd"
        else adamw(model, fused=kind == "fused")
    )
    attachment = attach(model, optimizer)
    data = batches()
    run(model, optimizer, data[:5])
    before = state(model)
    moments = {
        key: {k: torch.as_tensor(v).clone() for k, v in s.items()} for key, s in optimizer.state_dict()["state"].items()
    }
    optimizer.zero_grad()
    model(data[5]).square().mean().backward()
    model.get_parameter(where).grad.view(-1)[-1] = bad
    optimizer.step()
    after = state(model)
    for adapter in ("layers.0.adapter", "layers.1.adapter"):
        assert before.pop(f"{adapter}.progress").tolist() == [5, T, 0]
        assert after.pop(f"{adapter}.progress").tolist() == [5, T, 1]
    assert same(before, after)
    now = optimizer.state_dict()["state"]
    assert all(torch.equal(torch.as_tensor(now[key][k]), v) for key, own in moments.items() for k, v in own.items())
    assert not model.get_parameter(where).grad.isfinite().all(), "the gradients are left as they came"
    assert (attachment.step, attachment.skipped) == (5, 1)
    run(model, optimizer, data[5:])
    assert (attachment.step, attachment.skipped) == (T, 1)


def test_a_skipped_step_is_as_if_it_had_not_been():
    with_bad, without = Model(), Model()
    data = batches()
    for model in (with_bad, without):
        optimizer = adamw(model)
        attach(model, optimizer)
        for index, x in enumerate(data):
            if model is with_bad and index == 6:
                run(model, optimizer, [x], scale=float("nan"))
            run(model, optimizer, [x])
    a, b = state(with_bad), state(without)
    for adapter in ("layers.0.adapter", "layers.1.adapter"):
        assert a.pop(f"{adapter}.progress").tolist() == [T, T, 1]
        b.pop(f"{adapter}.progress")
    assert same(a, b)


def test_an_adapter_that_got_no_gradient_is_scored_zero_and_not_an_error():
    model = Model()
    optimizer = adamw(model)
    attachment = attach(model, optimizer, LoRA2(r=4, k=3, init="zero_out", target_r=2, orth_reg_weight=0.0))
    for _ in range(T):
        optimizer.zero_grad()
        model.head(torch.ones(1, 4).double()).sum().backward()
        optimizer.step()
    assert attachment.step == T
    assert all((averages(a, "lam")[0] == 0).all() for a in adapters_of(model))
    assert attachment.active == 4


def test_the_penalty_reaches_a_factor_that_the_task_does_not():
    model = Model()
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    attach(model, optimizer)
    expected = torch.autograd.grad(METHOD.training().penalty(adapters_of(model)), model.layers[0].adapter.v)[0]
    old = model.layers[0].adapter.v.detach().clone()
    model.head(torch.ones(1, 4).double()).sum().backward()
    optimizer.step()
    torch.testing.assert_close(old - model.layers[0].adapter.v, 0.1 * expected, rtol=0, atol=1e-14)


def test_a_closure_is_prepared_after_it_has_run():
    plain, closed = Model(), Model()
    data = batches()
    optimizers = [adamw(model) for model in (plain, closed)]
    for model, optimizer in zip((plain, closed), optimizers, strict=True):
        attach(model, optimizer)
    run(plain, optimizers[0], data)
    for index, x in enumerate(data):

        def closure(x=x):
            optimizers[1].zero_grad()
            loss = closed(x).square().mean()
            loss.backward()
            return loss

        # Lightning passes it by name, others by position.
        loss = optimizers[1].step(closure) if index % 2 else optimizers[1].step(closure=closure)
        assert loss.requires_grad
    assert same(state(plain), state(closed))


@pytest.mark.parametrize("timing", ["post_step", "pre_step"])
def test_scores_are_taken_with_the_weight_of_their_time(timing):
    method = LoRA2(r=4, k=3, init="gaussian", target_r=2, score_timing=timing, tinit=2, tfinal=4)
    model = Model(method)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    attach(model, optimizer, method)
    before = {i: a.v.detach().clone() for i, a in enumerate(adapters_of(model))}
    with torch.no_grad():
        for adapter in adapters_of(model):
            adapter.lam.fill_(0.5)
    run(model, optimizer, batches(1))
    for i, adapter in enumerate(adapters_of(model)):
        weight = adapter.v.detach() if timing == "post_step" else before[i]
        torch.testing.assert_close(
            averages(adapter, "v")[0], 0.15 * (weight * adapter.v.grad).abs(), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("sensitivity", ["total", "task"])
@pytest.mark.parametrize("scaled", [False, True])
def test_scores_read_the_gradient_that_was_asked_for(sensitivity, scaled):
    method = LoRA2(r=4, k=3, init="gaussian", target_r=2, sensitivity=sensitivity, tinit=2, tfinal=4)
    model = Model(method)
    optimizer = adamw(model, fused=True)
    attach(model, optimizer, method)
    x = batches(1)[0]
    task = torch.autograd.grad(model(x).square().mean(), trained(model), materialize_grads=True)
    penalty = torch.autograd.grad(method.training().penalty(adapters_of(model)), trained(model), materialize_grads=True)
    model(x).square().mean().mul(1024.0 if scaled else 1.0).backward()
    if scaled:
        optimizer.grad_scale = torch.tensor(1024.0)
        optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    for parameter, own, pull in zip(trained(model), task, penalty, strict=True):
        for adapter in adapters_of(model):
            if parameter is adapter.v:
                gradient = own if sensitivity == "task" else own + pull
                expected = 0.15 * (parameter.detach() * gradient).abs()
                torch.testing.assert_close(averages(adapter, "v")[0], expected, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler_changes_nothing_but_the_overflow(fused, unscale):
    plain, scaled = Model(), Model()
    data = batches()
    optimizers = [adamw(model, fused=fused) for model in (plain, scaled)]
    attachments = [attach(model, optimizer) for model, optimizer in zip((plain, scaled), optimizers, strict=True)]
    run(plain, optimizers[0], data)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for index, x in enumerate([data[0], *data]):
        optimizers[1].zero_grad()
        loss = scaled(x).square().mean()
        # The first batch overflows, then it comes again.
        scaler.scale(loss * (float("inf") if index == 0 else 1.0)).backward()
        if unscale:
            scaler.unscale_(optimizers[1])
        scaler.step(optimizers[1])
        scaler.update()
    assert attachments[1].step == T
    # An unfused optimizer isn't called at all on overflow.
    assert attachments[1].skipped == int(fused)
    for (name, a), b in zip(plain.state_dict().items(), scaled.state_dict().values(), strict=True):
        if "progress" not in name:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


def test_steps_that_never_came_can_be_counted():
    model = Model()
    optimizer = adamw(model)
    attachment = attach(model, optimizer)
    run(model, optimizer, batches()[: T - 2])
    assert "10 of 12" in schedule_status(adapters_of(model), METHOD.training())
    attachment.skip(2)
    assert (attachment.step, attachment.skipped) == (T - 2, 2)
    assert schedule_status(adapters_of(model), METHOD.training()) is None


def test_parameters_are_found_anew_in_every_step():
    """As after FSDP's fully_shard or a physical pruning: the attribute is another object."""
    model = Model()
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    attach(model, optimizer)
    adapter = model.layers[0].adapter
    adapter.v = nn.Parameter(adapter.v.detach().clone())
    for group in optimizer.param_groups:
        group["params"] = trained(model)
    run(model, optimizer, batches(1))
    assert (averages(adapter, "v")[0] > 0).any()


def test_a_method_without_anything_to_drive_is_driven_in_vain():
    method = LoRA(r=2)
    model = Model(method)
    before = schedule_status(adapters_of(model), method.training())
    optimizer = adamw(model)
    attachment = attach(model, optimizer, method)
    run(model, optimizer, batches(3))
    assert (attachment.step, attachment.budget, attachment.budgets, attachment.active) == (3, None, {}, 4)
    assert before is None
    assert schedule_status(adapters_of(model), method.training()) is None


def test_status_of_a_schedule():
    model = Model()
    training = METHOD.training()
    assert "never driven: call lora2fx.attach" in schedule_status(adapters_of(model), training)
    optimizer = adamw(model)
    attach(model, optimizer)
    assert "ended early: 0 of 12" in schedule_status(adapters_of(model), training)
    data = batches()
    run(model, optimizer, data[:3])
    run(model, optimizer, data[:1], scale=float("inf"))
    assert "ended early: 4 of 12 optimizer steps were taken, 1 of them skipped" in schedule_status(
        adapters_of(model), training
    )
    for _ in range(8):
        run(model, optimizer, data[:1], scale=float("inf"))
    assert "never reached its last allocation: 9 of 12" in schedule_status(adapters_of(model), training)


def test_detach():
    model = Model()
    optimizer = adamw(model)
    attachment = attach(model, optimizer)
    run(model, optimizer, batches(2))
    attachment.detach()
    run(model, optimizer, batches(1))
    assert model.layers[0].adapter.progress.tolist() == [2, T, 0]
    again = attach(model, optimizer)
    run(model, optimizer, batches(1))
    assert again.step == 3


def test_a_dead_attachment_does_not_stand_in_the_way():
    model = Model()
    optimizer = adamw(model)
    attachment = weakref.ref(attach(model, optimizer))
    del optimizer
    gc.collect()
    assert attachment() is None
    attach(model, adamw(model))


# --- refusals: nothing is attached, nothing is changed


def refused(error, match, model, optimizer, method=METHOD, total=T):
    before = state(model)
    hooks = len(getattr(optimizer, "_optimizer_step_pre_hooks", ()))
    with pytest.raises(error, match=match):
        attach(model, optimizer, method, total)
    assert same(before, state(model))
    assert len(getattr(optimizer, "_optimizer_step_pre_hooks", ())) == hooks


def test_a_second_attachment_is_refused():
    model = Model()
    optimizer = adamw(model)
    attach(model, optimizer)
    refused(AdapterError, r"adapter of l0.weight is attached already.* \.detach\(\)", model, adamw(model))
    refused(AdapterError, "attached already", model, optimizer)


def test_parameters_outside_the_optimizer_are_refused_by_name():
    model = Model()
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if "lam" not in name], lr=0.1)
    refused(
        AdapterError,
        r"2 of 10 adapter parameters are not in the SGD \(l0.weight: lam; l1.weight: lam\)",
        model,
        optimizer,
    )
    refused(AdapterError, "and 5 more", model, torch.optim.SGD(model.head.parameters(), lr=0.1))


def test_a_frozen_factor_needs_no_optimizer():
    model = Model()
    for adapter in adapters_of(model):
        adapter.u.requires_grad_(False)
    optimizer = adamw(model)
    attach(model, optimizer)
    old = model.layers[0].adapter.u.clone()
    run(model, optimizer, batches(2))
    assert torch.equal(model.layers[0].adapter.u, old)


def test_lbfgs_and_what_is_no_optimizer_are_refused():
    model = Model()
    refused(ScheduleError, "LBFGS evaluates its closure several times", model, torch.optim.LBFGS(trained(model)))
    refused(ScheduleError, "needs a torch.optim.Optimizer; list is none", model, trained(model))


def test_the_optimizer_inside_another_is_found():
    """As accelerate's AcceleratedOptimizer, which steps the one inside and has hooks of its own that never fire."""

    class Prepared(torch.optim.Optimizer):
        def __init__(self, optimizer) -> None:
            self.optimizer = optimizer

    model = Model()
    inner = adamw(model)
    assert attach(model, Prepared(inner)).optimizer is inner


@pytest.mark.parametrize("total", [0, -3, 2.5, True, None])
def test_a_run_without_steps_is_refused(total):
    model = Model()
    refused(ScheduleError, "number of optimizer steps of the whole run", model, adamw(model), total=total)


def test_a_schedule_longer_than_the_run_is_refused():
    model = Model()
    refused(ScheduleError, "must be more than 6", model, adamw(model), total=6)


def test_no_adapters_are_refused():
    with pytest.raises(AdapterError, match="no adapters to attach"):
        Attachment([], METHOD.training(), torch.optim.SGD([torch.zeros(1)], lr=1.0), 3)


def test_partitioned_parameters_are_refused():
    model = Model()
    model.layers[0].adapter.u.ds_id = 0
    refused(AdapterError, "ZeRO-3", model, adamw(model))


def test_a_copy_of_an_attached_model_is_not_attached():
    import copy

    model = Model()
    attach(model, adamw(model))
    twin = copy.deepcopy(model)
    attach(twin, adamw(twin))
