"""accelerate: overflow steps are counted without a word, and a saved state resumes in the same bits."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from lora2fx.errors import AdapterError, Lora2fxWarning
from lora2fx.integrations.accelerate import attach
from lora2fx.training.logs import log_values
from tests.loops import MICRO, ROWS, STEPS, Setting, adapted, forget, rows, scaler, state, trained

SETTING = Setting()


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    forget()
    yield
    forget()


def prepared(setting=SETTING):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO)
    accelerator.scaler = scaler(setting)
    model = adapted(setting)
    loader = DataLoader(rows(setting), ROWS)
    return (accelerator, *accelerator.prepare(model, torch.optim.AdamW(trained(model), **setting.optimizer), loader))


def train(accelerator, model, optimizer, batches):
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()


def test_the_optimizer_inside_is_driven_once_a_real_step():
    accelerator, model, optimizer, loader = prepared()
    attachment = attach(accelerator, model, optimizer, STEPS)
    assert attachment.optimizer is optimizer.optimizer
    seen = []
    for index, batch in enumerate(loader):
        train(accelerator, model, optimizer, [batch])
        seen.append(attachment.step)
        assert seen[-1] == (index + 1) // MICRO
    values = log_values(attachment)
    assert values["lora2fx/steps"] == STEPS
    assert values["lora2fx/lambda_active"] == values["lora2fx/lambda_budget"] == 4


def test_a_saved_state_resumes_in_the_same_bits(tmp_path):
    accelerator, model, optimizer, loader = prepared()
    attach(accelerator, model, optimizer, STEPS)
    batches = list(loader)
    train(accelerator, model, optimizer, batches[: 7 * MICRO])
    accelerator.save_state(str(tmp_path))
    train(accelerator, model, optimizer, batches[7 * MICRO :])
    expected = state(model)
    forget()
    accelerator, again, optimizer, _ = prepared()
    accelerator.load_state(str(tmp_path))
    attachment = attach(accelerator, again, optimizer, STEPS)
    assert attachment.step == 7
    train(accelerator, again, optimizer, batches[7 * MICRO :])
    for name, value in state(again).items():
        assert torch.equal(value, expected[name]), name


def test_overflows_are_counted_until_it_is_detached():
    setting = Setting(scaled=True, overflow=True)
    accelerator, model, optimizer, loader = prepared(setting)
    attachment = attach(accelerator, model, optimizer, STEPS)
    train(accelerator, model, optimizer, loader)
    assert (attachment.step, attachment.skipped, attachment.stepped) == (STEPS - 1, 1, STEPS - 1)
    attachment.detach()
    train(accelerator, model, optimizer, list(loader)[8 : 8 + MICRO])
    assert optimizer.step_was_skipped
    assert (attachment.step, attachment.skipped) == (STEPS - 1, 1)
    assert "step" not in vars(accelerator.scaler)


def test_deepspeed_is_refused(monkeypatch):
    accelerator, model, optimizer, _ = prepared()
    monkeypatch.setattr(type(accelerator), "distributed_type", "DEEPSPEED")
    with pytest.raises(AdapterError, match=r"started with DeepSpeed.*FSDP2"):
        attach(accelerator, model, optimizer, STEPS)


def test_fsdp_that_is_plain_ddp_is_told(monkeypatch):
    """`accelerate launch --use_fsdp` on CPUs: no sharding, and no word of it."""
    accelerator, model, optimizer, _ = prepared()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.warns(Lora2fxWarning, match="FSDP was asked for, and accelerate runs NO here"):
        attach(accelerator, model, optimizer, STEPS)
