"""A run that is killed after any step and taken up again ends in the same bits."""

from __future__ import annotations

import io

import pytest
import torch

from lora2fx.errors import AdapterError, ScheduleError
from lora2fx.methods.lora2 import LoRA2
from tests.adapted import adapters_of
from tests.test_training_driver import METHOD, Model, T, adamw, attach, batches, run, same, state

DATA = batches()
METHODS = {
    "singular values": METHOD,
    "columns": LoRA2(r=4, k=3, target_k=1, target_r=2, tinit=1, tfinal=3, sensitivity="task"),
}


def checkpoint(model, optimizer):
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("late", [False, True], ids=["load then attach", "attach then load"])
def test_resumed_at_every_step(method, late):
    whole = Model(method)
    optimizer = adamw(whole)
    attach(whole, optimizer, method)
    saved = [checkpoint(whole, optimizer)]
    for x in DATA:
        run(whole, optimizer, [x])
        saved.append(checkpoint(whole, optimizer))
    expected = state(whole)
    for done, own in enumerate(saved):
        model = Model(method, seed=99)
        again = adamw(model)
        if late:
            attachment = attach(model, again, method)
        model.load_state_dict(own["model"])
        again.load_state_dict(own["optimizer"])
        if not late:
            attachment = attach(model, again, method)
        assert attachment.step == done
        run(model, again, DATA[done:])
        assert same(expected, state(model)), f"resumed after {done} steps"


def test_state_dict_carries_what_the_model_may_not():
    """A checkpoint of the parameters alone, as some trainers write, and the attachment's own state."""
    whole = Model()
    optimizer = adamw(whole)
    attachment = attach(whole, optimizer)
    run(whole, optimizer, DATA[:7])
    weights = {name: p.detach().clone() for name, p in whole.named_parameters()}
    own, moments = attachment.state_dict(), checkpoint(whole, optimizer)["optimizer"]
    run(whole, optimizer, DATA[7:])
    model = Model()
    model.load_state_dict(weights, strict=False)
    again = adamw(model)
    again.load_state_dict(moments)
    attach(model, again).load_state_dict(own)
    run(model, again, DATA[7:])
    assert same(state(whole), state(model))


def test_another_length_is_refused():
    model = Model()
    optimizer = adamw(model)
    attachment = attach(model, optimizer)
    run(model, optimizer, DATA[:3])
    own = attachment.state_dict()
    attachment.detach()
    before = state(model)
    with pytest.raises(ScheduleError, match=r"at step 3 of a run of 12 steps.* total_steps=12"):
        attach(model, optimizer, total=T + 1)
    other = Model()
    longer = attach(other, adamw(other), total=T + 1)
    fresh = state(other)
    with pytest.raises(ScheduleError, match="a run of 12 steps"):
        longer.load_state_dict(own)
    assert same(before, state(model))
    assert same(fresh, state(other))


def test_a_checkpoint_of_another_run_loaded_after_attaching_is_refused_at_the_next_step():
    model, other = Model(), Model()
    attach(other, adamw(other), total=T + 1)
    optimizer = adamw(model)
    attach(model, optimizer)
    model.load_state_dict(other.state_dict())
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ScheduleError, match="run of 13 steps"):
        run(model, optimizer, DATA[:1])
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_half_a_checkpoint_is_refused():
    model = Model()
    optimizer = adamw(model)
    attachment = attach(model, optimizer)
    run(model, optimizer, DATA[:3])
    attachment.detach()
    adapters_of(model)[1].progress.zero_()
    with pytest.raises(AdapterError, match=r"disagree on the steps they were trained for"):
        attach(model, optimizer)


def test_another_models_state_is_refused():
    model = Model()
    attachment = attach(model, adamw(model))
    before = state(model)
    own = attachment.state_dict()
    method = LoRA2(r=5, k=3, target_r=2)
    other = Model(method)
    foreign = attach(other, adamw(other), method).state_dict()
    with pytest.raises(AdapterError, match="saved with other hyperparameters"):
        attachment.load_state_dict(foreign)
    own["adapters"][1]["weight"] = "l7.weight"
    with pytest.raises(AdapterError, match=r"state is of .*l7.weight"):
        attachment.load_state_dict(own)
    assert same(before, state(model))
