"""The README's comparison with PEFT, row by row: what PEFT does here and now, and what lora2fx does."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import lora2fx
from lora2fx.errors import ScheduleError, TargetError

STEPS = 12
IDS = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 0, 1])


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=50, **sizes)).eval()


def adalora(model, **changes):
    given = {"init_r": 4, "target_r": 1, "tinit": 2, "tfinal": 4, "deltaT": 1, "total_step": STEPS}
    return peft.get_peft_model(model, peft.AdaLoraConfig(target_modules=["query", "value"], **(given | changes)))


def loop(model, optimizer, after=lambda step: None, poison=None):
    for step in range(STEPS):
        loss = model(input_ids=IDS, labels=LABELS).loss
        (loss * float("nan") if step == poison else loss).backward()
        optimizer.step()
        after(step)
        optimizer.zero_grad()


def trained(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def peft_ranks(model):
    return [int((e != 0).sum()) for name, e in model.named_parameters() if "lora_E" in name]


class TestTargets:
    def test_a_name_that_matches_nothing_beside_one_that_does(self):
        peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query", "vlaue"]))  # not a word
        with pytest.raises(TargetError, match=r"'vlaue' matches none.*Did you mean 'value'"):
            lora2fx.transform(bert(), ["query", "vlaue"], lora2fx.LoRA())

    def test_what_a_weight_does_in_place_of_its_name(self):
        with pytest.raises(ValueError, match="not found in the base model"):
            peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["ffn.down"]))
        own = lora2fx.transform(bert(), ["ffn.down"], lora2fx.LoRA())
        adapted = {site["weight"] for site in lora2fx.report(own).sites if site["rewrite"]}
        assert adapted == {f"bert.encoder.layer.{i}.output.dense.weight" for i in range(2)}

    def test_the_query_of_a_fused_weight(self):
        small = GPT2Config(
            n_layer=1, n_embd=16, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0
        )
        whole = peft.get_peft_model(
            GPT2LMHeadModel(small), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        )
        shapes = [p.shape for name, p in whole.named_parameters() if "lora_B" in name]
        assert shapes == [(48, 2)]  # query, key and value together
        own = lora2fx.transform(GPT2LMHeadModel(small), ["query"], lora2fx.LoRA(r=2))
        (site,) = (site for site in lora2fx.report(own).sites if site["rewrite"])
        assert site["slice"] == [[0, 16]]


class TestAdaLoRA:
    def test_forgetting_to_drive_it(self):
        model = adalora(bert())
        loop(model, trained(model))
        assert peft_ranks(model) == [4, 4, 4, 4]  # nothing was pruned, nothing was said
        own = lora2fx.transform(bert(), ["query", "value"], lora2fx.AdaLoRA(r=4, target_r=1))
        loop(own, trained(own))
        with pytest.raises(ScheduleError):
            lora2fx.fold(own)

    def test_its_regulariser_where_no_task_type_is_named(self):
        kinds = {None: adalora(bert()), "SEQ_CLS": adalora(bert(), task_type="SEQ_CLS")}
        losses = {kind: model(input_ids=IDS, labels=LABELS) for kind, model in kinds.items()}
        added = {kind: out.loss - nn.functional.cross_entropy(out.logits, LABELS) for kind, out in losses.items()}
        assert abs(added[None].item()) < 1e-6  # the wrapper passes by what adds it
        assert added["SEQ_CLS"].item() == pytest.approx(0.5 * 2, abs=0.1)  # factors near 0: ‖I - 0‖ = √4
        own = lora2fx.transform(bert(), ["query", "value"], lora2fx.AdaLoRA(r=4, target_r=1, orth_reg_weight=0.5))
        optimizer = trained(own)
        attachment = lora2fx.attach(own, optimizer, total_steps=STEPS)
        own(input_ids=IDS, labels=LABELS).loss.backward()
        optimizer.step()
        assert attachment.penalty == pytest.approx(0.5 * 2, abs=0.1)

    def test_one_step_that_is_not_finite(self):
        model = adalora(bert())
        loop(model, trained(model), model.base_model.update_and_allocate, poison=1)
        assert any(not torch.isfinite(p).all() for p in model.parameters())
        own = lora2fx.transform(
            bert(), ["query", "value"], lora2fx.AdaLoRA(r=4, target_r=1, tinit=2, tfinal=4, deltaT=1)
        )
        optimizer = trained(own)
        attachment = lora2fx.attach(own, optimizer, total_steps=STEPS)
        loop(own, optimizer, poison=1)
        assert attachment.skipped == 1
        assert all(torch.isfinite(p).all() for p in own.parameters())
        assert sum(site["active"] for site in lora2fx.report(own).sites if site["rewrite"]) == 4

    def test_what_a_pruned_rank_still_takes(self):
        model = adalora(bert())
        loop(model, trained(model), model.base_model.update_and_allocate)
        factors = [p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name]
        assert all(4 in p.shape for p in factors)  # as many rows as before pruning
        own = lora2fx.transform(
            bert(), ["query", "value"], lora2fx.AdaLoRA(r=4, target_r=1, tinit=2, tfinal=4, deltaT=1)
        )
        optimizer = trained(own)
        lora2fx.attach(own, optimizer, total_steps=STEPS)
        loop(own, optimizer)
        from lora2fx.passes.prune import prune_ranks
        from lora2fx.program import program_of

        before = lora2fx.report(own).totals["adapter_parameters"]
        prune_ranks(program_of(own, "prune"), optimizer)
        assert lora2fx.report(own).totals["adapter_parameters"] < 0.5 * before


def test_taking_an_update_out_of_bfloat16_again():
    base = nn.Sequential(nn.Linear(32, 32)).bfloat16()
    weight = base[0].weight.detach().clone()
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    )
    model.merge_adapter()
    model.unmerge_adapter()
    assert not torch.equal(model.base_model.model[0].base_layer.weight, weight)
    own = lora2fx.transform(base, ["0"], lora2fx.LoRA(r=4), example_inputs=(torch.randn(2, 32, dtype=torch.bfloat16),))
    with torch.no_grad():
        own[0].lora2fx_weight.right().normal_()
    lora2fx.unload(own)
    assert torch.equal(own[0].weight, weight)


def test_peft_has_no_onnx():
    assert not [name for name in dir(peft) if "onnx" in name.lower()]


def test_the_models_own_class():
    assert not isinstance(
        peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query"])), BertForSequenceClassification
    )
    assert type(lora2fx.fold(own := lora2fx.transform(bert(), ["query"], lora2fx.LoRA()))) and isinstance(
        own, BertForSequenceClassification
    )
