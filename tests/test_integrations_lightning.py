"""Lightning drives, logs and resumes adapters; what is set up wrongly says so before the first step."""

from __future__ import annotations

import csv
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import lora2fx
from lora2fx.errors import AdapterError, ScheduleError
from lora2fx.integrations.lightning import attach, callback
from tests.loops import ROWS, STEPS, Setting, lightning_parts, rows, state, trained

SETTING = Setting(clip=0.5)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield


def test_loggers_get_the_adapters_numbers(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    driver = callback()
    logger = CSVLogger(str(tmp_path), name="", version="")
    trainer, module, loader = lightning_parts(
        SETTING, tmp_path, logger=logger, log_every_n_steps=3, callbacks=[driver], enable_model_summary=False
    )
    trainer.fit(module, loader)
    with open(tmp_path / "metrics.csv", newline="") as file:
        found = [line for line in csv.DictReader(file) if line["lora2fx/steps"]]
    assert [int(line["step"]) for line in found] == [3, 6, 9, 12]
    assert [float(line["lora2fx/columns_budget"]) for line in found] == [6, 4, 4, 4]
    assert [float(line["lora2fx/lambda_active"]) for line in found] == [8, 5, 4, 4]
    assert all(float(line["lora2fx/lambda_importance_q50"]) > 0 for line in found)
    assert (driver.attachment.step, driver.attachment.active) == (STEPS, 4)
    lora2fx.fold(module)


def test_resuming_after_pruning_began_ends_in_the_same_bits(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    saver = ModelCheckpoint(str(tmp_path), every_n_train_steps=6, save_top_k=-1, filename="{step}")
    trainer, whole, _ = lightning_parts(SETTING, tmp_path, callbacks=[saver], enable_checkpointing=True)
    # Lightning resumes at the start of an epoch; here they are six steps long.
    loader = DataLoader(rows(Setting(steps=6)), ROWS)
    attach(trainer)
    trainer.fit(whole, loader)
    again_trainer, again, _ = lightning_parts(SETTING, tmp_path)
    attach(again_trainer)
    with torch.no_grad():
        for parameter in trained(again):
            parameter.add_(1.0)
    again_trainer.fit(again, loader, ckpt_path=str(tmp_path / "step=6.ckpt"))
    expected = state(whole)
    for name, value in state(again).items():
        assert torch.equal(value, expected[name]), name
    fresh = lightning_parts(SETTING, tmp_path)[0]
    attach(fresh)
    with pytest.raises(ScheduleError, match=r"starts at optimizer step 0, .* at step 12 of 12.*ckpt_path"):
        fresh.fit(again, loader)


def test_of_two_optimizers_the_adapters_own_is_driven(tmp_path):
    trainer, module, loader = lightning_parts(SETTING, tmp_path, accumulate_grad_batches=1, gradient_clip_val=None)
    head = torch.optim.SGD(module.model.head.parameters(), lr=0.1)
    kept = {id(parameter) for parameter in module.model.head.parameters()}
    factors = torch.optim.SGD([p for p in trained(module) if id(p) not in kept], lr=0.1)
    module.automatic_optimization = False

    def training_step(batch):
        module.manual_backward(module.model(**batch)["loss"])
        for optimizer in module.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    module.configure_optimizers = lambda: [head, factors]
    module.training_step = training_step
    driver = attach(trainer)
    with pytest.raises(ScheduleError, match=r"counts the steps of all 2 optimizers together\. Pass total_steps="):
        trainer.fit(module, loader)
    driver.total_steps = STEPS
    trainer.fit_loop.epoch_loop.max_steps = 2 * STEPS
    trainer.fit(module, loader)
    assert driver.attachment.optimizer is factors
    assert driver.attachment.step == STEPS


# --- wrong set-ups


def test_a_trainer_is_attached_once(tmp_path):
    trainer, module, loader = lightning_parts(SETTING, tmp_path)
    attach(trainer)
    with pytest.raises(AdapterError, match="this Trainer is attached already"):
        attach(trainer)
    optimizer = torch.optim.AdamW(trained(module))
    lora2fx.attach(module, optimizer, STEPS)
    with pytest.raises(AdapterError, match=r"attached already.*\.detach\(\)"):
        trainer.fit(module, loader)


def test_a_run_of_unknown_length_is_refused(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(rows(SETTING))

    trainer, module, _ = lightning_parts(SETTING, tmp_path, max_steps=-1, max_epochs=1)
    attach(trainer)
    with pytest.raises(ScheduleError, match=r"can't say how many optimizer steps.*Trainer\(max_steps=\.\.\.\)"):
        trainer.fit(module, DataLoader(Endless(), ROWS))


def test_what_attach_refuses_is_refused(tmp_path):
    trainer, module, loader = lightning_parts(SETTING, tmp_path, max_steps=6)
    attach(trainer)
    with pytest.raises(ScheduleError, match="total_steps=6 is too short"):
        trainer.fit(module, loader)
    trainer, module, loader = lightning_parts(SETTING, tmp_path)
    module.configure_optimizers = lambda: torch.optim.SGD(module.model.head.parameters(), lr=0.1)
    attach(trainer)
    with pytest.raises(AdapterError, match="10 of 10 adapter parameters are not in the SGD"):
        trainer.fit(module, loader)
    lora2fx.unload(module)
    with pytest.raises(AdapterError, match="holds no adapters"):
        trainer.fit(module, loader)
