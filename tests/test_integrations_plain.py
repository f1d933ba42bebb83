"""The plain loop: overflows counted, wrong set-ups named with their mend, numbers for any logger."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.utils.data import DataLoader

import lora2fx
from lora2fx.errors import AdapterError, ScheduleError
from lora2fx.training.importance import axis_importance
from lora2fx.training.logs import log_values
from tests.loops import METHOD, ROWS, STEPS, Setting, adapted, plain, rows, scaler, state, trained

SETTING = Setting()


def adamw(model, **settings):
    return torch.optim.AdamW(trained(model), lr=0.05, **settings)


def run(model, optimizer, steps, scale=None, overflow_at=()):
    for index, batch in enumerate(list(DataLoader(rows(SETTING), ROWS))[:steps]):
        optimizer.zero_grad()
        loss = model(**batch)["loss"] * (torch.inf if index in overflow_at else 1.0)
        (loss if scale is None else scale.scale(loss)).backward()
        if scale is None:
            optimizer.step()
        else:
            scale.step(optimizer)
            scale.update()


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_scaler_passes_over_are_counted(fused):
    model, scale = adapted(SETTING), scaler(Setting(scaled=True))
    optimizer = adamw(model, fused=fused)
    attachment = lora2fx.attach(model, optimizer, STEPS, scaler=scale)
    run(model, optimizer, STEPS, scale, overflow_at=(3, 7))
    assert (attachment.step, attachment.skipped) == (STEPS - 2, 2)
    lora2fx.fold(model)


def test_a_scaler_that_was_not_named_is_asked_for_at_the_fold():
    model, scale = adapted(SETTING), scaler(Setting(scaled=True))
    optimizer = adamw(model)
    attachment = lora2fx.attach(model, optimizer, STEPS)
    run(model, optimizer, STEPS, scale, overflow_at=(3, 7))
    with pytest.raises(ScheduleError, match=r"ended early: 10 of 12 optimizer steps.*pass a GradScaler as scaler="):
        lora2fx.fold(model)
    attachment.skip(2)
    lora2fx.fold(model)


def test_a_scaler_outlives_its_attachment():
    model, scale = adapted(SETTING), scaler(Setting(scaled=True))
    optimizer = adamw(model)
    dead = weakref.ref(lora2fx.attach(model, optimizer, STEPS, scaler=scale))
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    other.param_groups[0]["params"][0].grad = torch.full((1,), torch.inf)
    scale.scale(torch.ones(()))
    scale.step(other)
    assert dead().skipped == 0, "another optimizer's overflow is none of ours"
    del optimizer
    gc.collect()
    assert dead() is None
    optimizer = adamw(model)
    attachment = lora2fx.attach(model, optimizer, STEPS, scaler=scale)
    run(model, optimizer, 3, scale, overflow_at=(1,))
    assert (attachment.step, attachment.skipped) == (2, 1)


def test_an_optimizer_that_nobody_holds_does_not_stand_in_the_way():
    """As when a notebook's cell is run again."""
    model = adapted(SETTING)
    for _ in range(2):
        optimizer = adamw(model)
        lora2fx.attach(model, optimizer, STEPS)
        del optimizer


def test_attached_with_the_wrong_length_and_never_stepped_is_attached_anew():
    model = adapted(SETTING)
    optimizer = adamw(model)
    lora2fx.attach(model, optimizer, STEPS + 5).detach()
    attachment = lora2fx.attach(model, optimizer, STEPS)
    run(model, optimizer, 1)
    attachment.detach()
    with pytest.raises(ScheduleError, match=r"at step 1 of a run of 12 steps.*total_steps=12"):
        lora2fx.attach(model, optimizer, STEPS + 5)


def test_a_schedule_that_was_never_stepped_says_where_to_attach():
    model = adapted(SETTING)
    with pytest.raises(ScheduleError, match=r"never driven: call lora2fx\.attach"):
        lora2fx.fold(model)
    driven, other = adamw(model), adamw(model)
    lora2fx.attach(model, driven, STEPS)
    run(model, other, STEPS)
    with pytest.raises(ScheduleError, match=r"0 of 12 optimizer steps were taken\. Attach to the optimizer that the"):
        lora2fx.fold(model)


def test_making_an_optimizers_state_is_no_step():
    """torch.distributed.checkpoint steps a fresh optimizer with gradients and rates of 0, to have a state to load."""
    model = adapted(SETTING)
    optimizer = adamw(model)
    attachment = lora2fx.attach(model, optimizer, STEPS)
    before = state(model)
    get_optimizer_state_dict(model, optimizer)
    assert attachment.step == attachment.skipped == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(float(moment["exp_avg"].abs().max()) == 0 for moment in optimizer.state.values())


def test_a_warm_up_from_zero_is_counted():
    model = adapted(SETTING)
    optimizer = torch.optim.AdamW(trained(model), lr=0.0)
    attachment = lora2fx.attach(model, optimizer, STEPS)
    run(model, optimizer, 2)
    assert attachment.step == 2


class Engine:
    """As DeepSpeed's optimizers: no torch optimizer, with one inside."""

    def __init__(self, optimizer) -> None:
        self.optimizer = optimizer


Engine.__module__ = "deepspeed.runtime.zero.stage_1_and_2"


def test_deepspeed_is_refused():
    model = adapted(SETTING)
    optimizer = adamw(model)
    for wrapped in (Engine(optimizer), type("Accelerated", (), {"optimizer": Engine(optimizer)})()):
        with pytest.raises(ScheduleError, match=r"Engine is stepped inside DeepSpeed's engine.*fully_shard"):
            lora2fx.attach(model, wrapped, STEPS)
    model.first.bias.ds_id = 3
    with pytest.raises(AdapterError, match=r"first\.bias is held in parts by DeepSpeed ZeRO-3.*FSDP2"):
        lora2fx.attach(model, optimizer, STEPS)
    assert not optimizer._optimizer_step_pre_hooks


def test_numbers_for_any_logger():
    model = plain(SETTING)
    optimizer = adamw(model)
    attachment = lora2fx.attach(model, optimizer, STEPS)
    values = log_values(attachment)
    assert all(isinstance(value, (int, float)) for value in values.values())
    assert {
        name: values[f"lora2fx/{name}"] for name in ("steps", "skipped_steps", "lambda_active", "columns_active")
    } == {
        "steps": STEPS,
        "skipped_steps": 0,
        "lambda_active": 2 * METHOD.target_r,
        "columns_active": 2 * METHOD.target_k,
    }
    scores = zip(attachment.adapters, axis_importance(attachment.adapters, "columns"), strict=True)
    left = torch.cat([score[adapter.column_mask] for adapter, score in scores])
    assert left.numel() == 4
    for q in (10, 50, 90):
        assert values[f"lora2fx/columns_importance_q{q}"] == pytest.approx(float(left.quantile(q / 100)), rel=1e-6)
    bare = lora2fx.transform(torch.nn.Linear(4, 4), "all-linear", lora2fx.LoRA(r=2), example_inputs=(torch.ones(2, 4),))
    attachment = lora2fx.attach(bare, adamw(bare), STEPS)
    assert set(log_values(attachment)) == {f"lora2fx/{name}" for name in ("steps", "skipped_steps", "rank_active")}


def test_changing_masks_recompiles_nothing():
    torch._dynamo.reset()
    model = adapted(Setting(compiled=True))
    optimizer = adamw(model)
    attachment = lora2fx.attach(model, optimizer, STEPS)
    before = attachment.active
    run(model, optimizer, 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(model, optimizer, STEPS - 1)
    assert attachment.active < before
