"""The Trainer drives, logs and resumes adapters; what is set up wrongly says so before the first step."""

from __future__ import annotations

import re
import sys
import warnings
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, Trainer
from transformers.trainer_callback import TrainerCallback

import lora2fx
from lora2fx.errors import AdapterError, Lora2fxWarning, ScheduleError
from lora2fx.integrations.pages import write_page
from lora2fx.integrations.transformers import attach, ignores_loss_scaling
from tests.loops import METHOD, STEPS, Setting, adapted, arguments, forget, rows, state, trained

SETTING = Setting(clip=0.5)


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    forget()
    yield
    forget()


def trainer_of(folder, model=None, setting=SETTING, data=None, optimizers=(None, None), **changes):
    return Trainer(
        adapted(setting) if model is None else model,
        arguments(setting, folder, **changes),
        train_dataset=rows(setting) if data is None else data,
        optimizers=optimizers,
    )


class Reporter(TrainerCallback):
    """As TensorBoard's and W&B's callbacks: reads what it is handed."""

    def __init__(self) -> None:
        self.seen = []

    def on_log(self, args, state, control, logs=None, **_):
        self.seen.append(dict(logs))


def test_every_reporter_gets_the_adapters_numbers(tmp_path):
    trainer = trainer_of(tmp_path, logging_strategy="steps", logging_steps=3)
    reporter = Reporter()
    trainer.add_callback(reporter)
    callback = attach(trainer)
    assert trainer.callback_handler.callbacks[0] is callback
    assert callback.attachment is None
    trainer.train()
    seen = [logs for logs in reporter.seen if "loss" in logs]
    assert [logs["lora2fx/steps"] for logs in seen] == [3, 6, 9, 12]
    assert [logs["lora2fx/lambda_budget"] for logs in seen] == [8, 4, 4, 4]
    assert [logs["lora2fx/columns_active"] for logs in seen] == [6, 4, 4, 4]
    assert all(logs["lora2fx/penalty"] > 0 and logs["lora2fx/skipped_steps"] == 0 for logs in seen)
    levels = [[logs[f"lora2fx/columns_importance_q{q}"] for q in (10, 50, 90)] for logs in seen]
    assert all(0 < low <= middle <= high for low, middle, high in levels)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["lora2fx/lambda_active"] for entry in history] == [logs["lora2fx/lambda_active"] for logs in seen]
    assert not any(key.startswith("lora2fx") for key in reporter.seen[-1]), "the summary of the run is the Trainer's"
    assert (callback.attachment.step, callback.attachment.active) == (STEPS, 4)


def bert(seed=0):
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
        attention_probs_dropout_prob=0.1,
    )
    torch.manual_seed(seed)
    model = BertForSequenceClassification(config)
    return lora2fx.transform(model, ["query", "ffn"], METHOD, seed=1)


def sentences(count):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 20, (count, 5), generator=generator)
    return [{"input_ids": own, "labels": int(own[0] > 9)} for own in ids]


def resumable(folder, model):
    trainer = trainer_of(
        folder,
        model,
        data=sentences(96),
        train_sampling_strategy="random",
        save_strategy="steps",
        save_steps=5,
        lr_scheduler_type="linear",
        optim="adamw_torch",
    )
    trainer.model_accepts_loss_kwargs = False
    attach(trainer)
    return trainer


@pytest.mark.parametrize("step", [5, 10])
def test_resuming_after_pruning_began_ends_in_the_same_bits(tmp_path, step):
    whole = bert()
    resumable(tmp_path, whole).train()
    assert int(whole.bert.encoder.layer[0].attention.self.query.lora2fx_weight.progress[0]) == STEPS
    again = bert()
    with torch.no_grad():
        for parameter in trained(again):
            parameter.add_(1.0)
    resumable(tmp_path / "again", again).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    expected = state(whole)
    kept = sum(int(value.sum()) for name, value in expected.items() if name.endswith(".column_mask"))
    assert kept == 2 * 6, "two columns each of query, up and down in two layers"
    for name, value in state(again).items():
        assert torch.equal(value, expected[name]), name
    lora2fx.fold(again)


def test_starting_again_without_the_checkpoint_is_refused(tmp_path):
    model = adapted(SETTING)
    trainer = trainer_of(tmp_path, model, max_steps=STEPS)
    attach(trainer)
    trainer.train()
    before = state(model)
    with pytest.raises(ScheduleError, match=r"starts at optimizer step 0, .* at step 12 of 12.*resume_from_checkpoint"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_run_that_failed_at_its_start_can_be_put_right(tmp_path):
    """Nothing was stepped: another length, another Trainer, and no attachment left behind."""
    model = adapted(SETTING)
    broken = trainer_of(tmp_path, model, max_steps=STEPS + 3, data=[{"x": torch.zeros(5), "y": 0.0, "scale": 1.0}])
    attach(broken)
    with pytest.raises(RuntimeError, match="shapes"):
        broken.train()
    broken.callback_handler.callbacks[0].attachment.detach()
    trainer = trainer_of(tmp_path, model)
    callback = attach(trainer)
    trainer.train()
    assert callback.attachment.step == STEPS


def test_a_run_that_stopped_early_does_not_fold_in_silence(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 7

    trainer = trainer_of(tmp_path)
    trainer.add_callback(Stop())
    attach(trainer)
    trainer.train()
    with pytest.raises(ScheduleError, match="ended early: 7 of 12 optimizer steps"):
        lora2fx.fold(trainer.model)
    with pytest.warns(Lora2fxWarning, match="unfinished schedule"):
        lora2fx.fold(trainer.model, strict=False)


# --- wrong set-ups


def test_a_trainer_is_attached_once(tmp_path):
    trainer = trainer_of(tmp_path)
    attach(trainer)
    with pytest.raises(AdapterError, match="this Trainer is attached already"):
        attach(trainer)
    other = trainer_of(tmp_path, trainer.model)
    attach(other)
    optimizer = torch.optim.AdamW(trained(trainer.model))
    lora2fx.attach(trainer.model, optimizer, STEPS)
    with pytest.raises(AdapterError, match=r"attached already.*\.detach\(\)"):
        other.train()


def test_a_model_without_adapters_is_refused(tmp_path):
    trainer = trainer_of(
        tmp_path, lora2fx.transform(adapted(SETTING).head, "all-linear", example_inputs=(torch.ones(2, 8),))
    )
    lora2fx.unload(trainer.model)
    with pytest.raises(AdapterError, match=r"attach: Linear holds no adapters\. Call lora2fx\.transform"):
        attach(trainer)


def test_a_run_too_short_for_the_schedule_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=6)
    attach(trainer)
    with pytest.raises(ScheduleError, match=r"total_steps=6 is too short for tinit=2 and tfinal=4"):
        trainer.train()


def test_an_optimizer_of_ones_own_is_checked(tmp_path):
    model = adapted(SETTING)
    head = torch.optim.AdamW(model.head.parameters())
    trainer = trainer_of(tmp_path, model, optimizers=(head, None))
    attach(trainer)
    with pytest.raises(AdapterError, match=r"10 of 10 adapter parameters are not in the AdamW"):
        trainer.train()
    trainer = trainer_of(tmp_path, model, optimizers=(torch.optim.LBFGS(trained(model)), None))
    attach(trainer)
    with pytest.raises(ScheduleError, match="LBFGS evaluates its closure several times"):
        trainer.train()


def test_deepspeed_is_refused(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    attach(trainer)
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", "DEEPSPEED")
    with pytest.raises(AdapterError, match=r"DeepSpeed.*FSDP2 \(fsdp_version: 2\)"):
        trainer.callback_handler.callbacks[0].on_train_begin(trainer.args, trainer.state, trainer.control, None)


def test_fsdp_that_is_plain_ddp_is_told(tmp_path):
    """What transformers and accelerate do on CPUs, pinned: no sharding, and no word of it."""
    trainer = trainer_of(tmp_path)
    trainer.args.fsdp = True  # one process refuses it; two run DDP
    assert not trainer.is_fsdp_enabled
    attach(trainer)
    with pytest.warns(Lora2fxWarning, match=r"FSDP was asked for, and accelerate runs NO here.*fully_shard"):
        trainer.train()


# --- the page in the end


def test_the_page_shows_the_ranks_and_the_log(tmp_path):
    trainer = trainer_of(tmp_path, logging_strategy="steps", logging_steps=3)
    attach(trainer)
    trainer.train()
    page = (tmp_path / "lora2fx.html").read_text()
    report = lora2fx.report(trainer.model)
    ranks = [site["rank"] for site in report.sites if site["rank"] is not None]
    assert re.findall(r'text-anchor="middle"(?: class="strong")?>([0-9]+)</text></g>', page) == list(map(str, ranks))
    for caption in ("Entries of the axis lambda", "Importance of what is left of columns", "Regulariser"):
        assert caption in page
    assert "kept: 4 at step 12" in page


def test_a_page_that_cannot_be_written_does_not_end_the_run(tmp_path):
    trainer = trainer_of(tmp_path)
    (tmp_path / "lora2fx.html").mkdir()
    callback = attach(trainer)
    with pytest.warns(Lora2fxWarning, match=r"lora2fx\.html could not be written.*Training is done"):
        trainer.train()
    assert callback.attachment.step == STEPS


def test_no_page_where_none_is_wanted_and_one_at_any_time(tmp_path):
    trainer = trainer_of(tmp_path)
    attach(trainer, page=None)
    trainer.train()
    assert not (tmp_path / "lora2fx.html").exists()
    write_page(trainer.model, tmp_path / "sub" / "now.html", trainer.state.log_history)
    assert "Rank of ΔW, layer by weight" in (tmp_path / "sub" / "now.html").read_text()


def test_tensorboards_own_callback_writes_the_numbers(tmp_path, monkeypatch):
    """transformers' callback with a writer that remembers: scalars under train/, at the Trainer's steps."""
    from transformers.integrations import integration_utils

    class Writer:
        scalars: ClassVar = []

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))

        def __getattr__(self, name):
            return lambda *given: None

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=None))
    trainer = trainer_of(tmp_path, logging_strategy="steps", logging_steps=6)
    trainer.add_callback(integration_utils.TensorBoardCallback(Writer()))
    attach(trainer)
    trainer.train()
    found = {(name, step): value for name, value, step in Writer.scalars}
    assert found["train/lora2fx/lambda_active", 12] == found["train/lora2fx/lambda_budget", 12] == 4
    for name in ("penalty", "skipped_steps", "columns_importance_q50", "columns_active", "steps"):
        assert ("train/lora2fx/" + name, 12) in found


# --- the loss that is not divided


def gradients(folder, accept, parts):
    """The first step's gradient of the head, over one batch of 8 in `parts` micro-batches."""
    model = bert()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    seen = []
    optimizer = torch.optim.SGD(trained(model), lr=1e-9)
    optimizer.register_step_pre_hook(lambda *_: seen.append(model.classifier.weight.grad.clone()))
    trainer = trainer_of(
        folder,
        model,
        data=sentences(96),
        optimizers=(optimizer, None),
        per_device_train_batch_size=8 // parts,
        gradient_accumulation_steps=parts,
        max_grad_norm=0.0,
    )
    if accept is not None:
        trainer.model_accepts_loss_kwargs = accept
    attach(trainer)
    trainer.train()
    return seen[0]


def test_a_model_that_ignores_the_loss_scaling_is_named(tmp_path):
    """What transformers does, pinned: BERT's gradient is multiplied by the accumulation steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Lora2fxWarning)
        one = gradients(tmp_path, None, 1)
        right = gradients(tmp_path, False, 4)
    with pytest.warns(Lora2fxWarning, match=r"up to 4 times too large.*model_accepts_loss_kwargs = False"):
        wrong = gradients(tmp_path, None, 4)
    torch.testing.assert_close(right, one, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(wrong, 4 * one, rtol=1e-4, atol=1e-6)


def test_models_that_divide_by_the_items_are_not_named():
    config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    assert not ignores_loss_scaling(LlamaForCausalLM(config))
    assert ignores_loss_scaling(bert())
