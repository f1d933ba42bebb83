"""Step by step beside PEFT in float64, from the same factors: where PEFT is right, every number agrees."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

import lora2fx
from lora2fx import AdaLoRA, LoRA
from lora2fx.program import program_of

peft = pytest.importorskip("peft")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TARGETS = ["query", "value", "intermediate.dense", "output.dense"]
T, T_INITIAL, T_FINAL, INTERVAL = 36, 4, 12, 3


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=3, **SIZES)).double().eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, num_labels=3, pad_token_id=0, resid_pdrop=0.0)
    return GPT2ForSequenceClassification(config).double().eval()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, 40, (8, 9), generator=generator)
    return {"input_ids": ids, "labels": ids[:, 0] % 3}


def twins(build, method, config, targets):
    """Our model and PEFT's, with the same factors; PEFT's by the path of the adapted module."""
    model = build()
    lora2fx.transform(model, [f"name:{target}" for target in targets], method, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(build(), config)
    adapters = {a.site.owner: a for a in program_of(model, "test").adapters.values()}
    layers = {path: wrapped.base_model.model.get_submodule(path) for path in adapters}
    found = {name for name, module in wrapped.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert found - {name for name in found if name.rpartition(".")[2] in ("lora_A", "lora_B")} >= set(layers)
    with torch.no_grad():
        for path, layer in layers.items():
            if isinstance(method, AdaLoRA):  # else λ hardly gets a gradient in so few steps
                adapters[path].A.mul_(10)
                adapters[path].B.mul_(10)
            factor(layer, "A").copy_(adapters[path].A)
            factor(layer, "B").copy_(adapters[path].B)
    return model, wrapped, adapters, layers


def factor(layer, letter):
    held = getattr(layer, f"lora_{letter}")["default"]
    return held.weight if isinstance(held, torch.nn.Module) else held


def close(a, b, size=1e-11):
    torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=size)


def step(model, optimizer, data):
    optimizer.zero_grad()
    loss = model(**data).loss
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def adamw(parameters):
    # A large eps: what rounding leaves of a gradient that is 0 must not be scaled up to a whole step.
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-6, weight_decay=0.01)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_adalora_step_by_step_with_its_masks(weight):
    config = peft.AdaLoraConfig(
        task_type="SEQ_CLS",
        init_r=4,
        target_r=2,
        tinit=T_INITIAL,
        tfinal=T_FINAL,
        deltaT=INTERVAL,
        beta1=0.85,
        beta2=0.85,
        orth_reg_weight=weight,
        lora_alpha=8,
        total_step=T,
        target_modules=TARGETS,
    )
    method = AdaLoRA.paper(
        r=4,
        target_r=2,
        lora_alpha=8,
        tinit=T_INITIAL,
        tfinal=T_FINAL,
        deltaT=INTERVAL,
        orth_reg_weight=weight,
        force_final_mask=True,
    )
    model, wrapped, adapters, layers = twins(bert, method, config, TARGETS)
    ours = adamw([p for p in model.parameters() if p.requires_grad])
    # PEFT 0.21 leaves `ranknum`, which it divides the scale by, trainable: an optimizer that holds it moves the scale.
    theirs = adamw([p for name, p in wrapped.named_parameters() if p.requires_grad and "ranknum" not in name])
    attachment = lora2fx.attach(model, ours, total_steps=T)
    allocator = wrapped.base_model.rankallocator
    events = []
    for t in range(T):
        data = batch(t)
        loss = step(model, ours, data)
        theirs.zero_grad()
        total = wrapped(**data).loss
        total.backward()
        theirs.step()
        if t < T - T_FINAL:
            config.rank_pattern = None
        wrapped.base_model.update_and_allocate(t)
        assert loss + (attachment.penalty or 0.0) == pytest.approx(float(total.detach()), abs=1e-11)
        pattern = wrapped.peft_config["default"].rank_pattern
        event = bool(pattern) and (t <= T - T_FINAL)
        if event:
            events.append(t)
        for path, layer in layers.items():
            adapter = adapters[path]
            close(adapter.A, layer.lora_A["default"])
            close(adapter.B, layer.lora_B["default"])
            close(adapter.weight_delta(), layer.get_delta_weight("default"))
            name = f"{path}.lora_E.default"
            if pattern:
                assert adapter.keep.tolist() == pattern[name], t
            if t < T - T_FINAL:
                close(adapter.lam, layer.lora_E["default"].view(-1))
                for own, letter in (("A", "A"), ("lam", "E"), ("B", "B")):
                    key = name.replace("lora_E", f"lora_{letter}")
                    for kind, held in (("sensitivity", allocator.exp_avg_ipt), ("uncertainty", allocator.exp_avg_unc)):
                        value = adapter.get_buffer(f"{own}_{kind}")
                        torch.testing.assert_close(value, held[key].view_as(value), rtol=1e-7, atol=1e-18)
        if event or t > T - T_FINAL:
            assert attachment.active == attachment.budget
    assert events == [6, 9, 12, 15, 18, 21, 24]
    assert sorted(int(a.mask.sum()) for a in adapters.values()) != [2] * len(adapters), "one budget over all of them"
    assert sum(int(a.mask.sum()) for a in adapters.values()) == 2 * len(adapters)
    lora2fx.fold(model)
    folded, merged = model.state_dict(), wrapped.base_model.merge_and_unload().state_dict()
    for path in layers:
        close(folded[f"{path}.weight"], merged[f"{path}.weight"])


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("build", "targets"), [(bert, TARGETS), (gpt2, ["mlp.c_fc", "mlp.c_proj"])])
def test_lora_step_by_step(build, targets, rslora):
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=3,
        lora_alpha=8,
        use_rslora=rslora,
        target_modules=targets,
        fan_in_fan_out=build is gpt2,
        rank_pattern={},
    )
    model, wrapped, adapters, layers = twins(build, LoRA(r=3, lora_alpha=8, use_rslora=rslora), config, targets)
    ours = adamw([p for p in model.parameters() if p.requires_grad])
    theirs = adamw([p for p in wrapped.parameters() if p.requires_grad])
    lora2fx.attach(model, ours, total_steps=12)
    for t in range(12):
        assert step(model, ours, batch(t)) == pytest.approx(step(wrapped, theirs, batch(t)), abs=1e-12)
        for path, layer in layers.items():
            close(adapters[path].A, factor(layer, "A"))
            close(adapters[path].B, factor(layer, "B"))
            close(adapters[path].weight_delta(), layer.get_delta_weight("default"))
    close(model(**batch(99)).logits, wrapped(**batch(99)).logits)


def test_lora_dropout_draws_what_pefts_does():
    config = peft.LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=8, lora_dropout=0.4, target_modules=TARGETS)
    method = LoRA(r=3, lora_alpha=8, lora_dropout=0.4)
    model, wrapped, adapters, layers = twins(bert, method, config, TARGETS)
    optimizers = [adamw([p for p in m.parameters() if p.requires_grad]) for m in (model, wrapped)]
    for t in range(6):
        losses = []
        for own, optimizer in zip((model, wrapped), optimizers, strict=True):
            torch.manual_seed(t)
            losses.append(step(own.train(), optimizer, batch(t)))
        assert losses[0] == pytest.approx(losses[1], abs=1e-12)
        for path, layer in layers.items():
            close(adapters[path].A, factor(layer, "A"))
            close(adapters[path].B, factor(layer, "B"))
