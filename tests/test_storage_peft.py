"""PEFT's folders read as adapters of lora2fx: the outputs of PEFT's own model, and everything works on them."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch

import lora2fx
from lora2fx.errors import AdapterError, FormatError, Lora2fxWarning
from lora2fx.program import program_of
from tests.peft_folders import IDS, Net, written
from tests.programs import states
from tests.zoo import ZOO

peft = pytest.importorskip("peft")

LORA = {
    "plain": {"target_modules": ["inner.fc", "head"]},
    "a suffix": {"target_modules": ["fc"]},
    "an expression": {"target_modules": "^(?:fc|head)$"},
    "rslora": {"target_modules": ["fc", "head"], "use_rslora": True, "lora_alpha": 5},
    "rank_pattern": {"target_modules": ["fc", "head"], "rank_pattern": {"^fc": 2, "head": 1}},
    "alpha_pattern": {"target_modules": ["fc", "head"], "alpha_pattern": {"inner.fc": 3, r"^fc": 7.5}},
    "both patterns, rslora": {
        "target_modules": ["fc", "head"],
        "rank_pattern": {r"inner\.fc": 5},
        "alpha_pattern": {"fc": 2},
        "use_rslora": True,
    },
    "convolutions": {"target_modules": ["conv", "image", "fc"]},
    "embedding": {"target_modules": ["words", "inner.fc"]},
    "a head trained whole": {"target_modules": ["fc"], "modules_to_save": ["head"]},
    "dropout": {"target_modules": ["fc", "head"], "lora_dropout": 0.25},
    "left out": {"target_modules": ["fc"], "exclude_modules": ["inner.fc"]},
}


def outputs(model):
    with torch.no_grad():
        return model.eval()(IDS)


@pytest.mark.parametrize("given", [True, False], ids=["run", "not run"])
@pytest.mark.parametrize("options", LORA.values(), ids=LORA.keys())
def test_a_lora_computes_what_pefts_model_does(tmp_path, options, given):
    theirs = outputs(written(Net(), peft.LoraConfig(**{"r": 3, "lora_alpha": 6, **options}), tmp_path))
    model = Net().eval()
    base = outputs(model)
    assert lora2fx.load(model, tmp_path, example_inputs=(IDS,) if given else None) is model
    torch.testing.assert_close(outputs(model), theirs, rtol=0, atol=1e-6)
    assert (theirs - base).abs().max() > 0.02
    assert lora2fx.report(model).verify["status"] == ("passed" if given else "UNVERIFIED")


@pytest.mark.parametrize("options", LORA.values(), ids=LORA.keys())
def test_it_folds_unloads_saves_and_exports(tmp_path, options):
    theirs = written(Net(), peft.LoraConfig(**{"r": 3, "lora_alpha": 6, **options}), tmp_path / "peft")
    expected = outputs(theirs)
    model = lora2fx.load(Net(), tmp_path / "peft", example_inputs=(IDS,))
    lora2fx.save(model, tmp_path / "own")
    again = lora2fx.load(Net(), tmp_path / "own")
    assert torch.equal(outputs(again), outputs(model))
    lora2fx.unload(again)
    assert states(again) == states(Net())
    assert [type(module) for module in again.modules()] == [type(module) for module in Net().modules()]
    lora2fx.exporters.export_peft(model, tmp_path / "back", example_inputs=(IDS,))
    torch.testing.assert_close(outputs(lora2fx.load(Net(), tmp_path / "back")), expected, rtol=0, atol=2e-6)
    lora2fx.fold(model)
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=2e-6)
    assert list(model.state_dict()) == list(Net().state_dict())


def test_it_trains_on(tmp_path):
    config = peft.LoraConfig(r=3, target_modules=["fc"], modules_to_save=["head"], lora_dropout=0.1)
    written(Net(), config, tmp_path)
    model = lora2fx.load(Net(), tmp_path, example_inputs=(IDS,))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        *("fc.lora2fx_weight.A", "fc.lora2fx_weight.B", "inner.fc.lora2fx_weight.A", "inner.fc.lora2fx_weight.B"),
        *("head.weight", "head.bias"),
    }
    optimizer = torch.optim.AdamW(lora2fx.param_groups(model, 0.02))
    lora2fx.attach(model, optimizer, total_steps=20)
    losses = []
    for _ in range(20):
        loss = (model.train()(IDS) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    before = outputs(model)
    lora2fx.fold(model)
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=2e-6)


ADALORA = {
    "unpruned": ({}, None),
    "pruned": ({}, {"fc": [True, False, True, False], "inner.fc": [False, True, False, False]}),
    "one to nothing": ({}, {"fc": [False] * 4, "inner.fc": [True, True, False, False]}),
    "an image": ({"target_modules": ["image", "fc"]}, None),
}


@pytest.mark.parametrize(("options", "kept"), ADALORA.values(), ids=ADALORA.keys())
def test_an_adalora_computes_what_pefts_model_does(tmp_path, options, kept):
    config = peft.AdaLoraConfig(
        **{"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": ["fc"], "lora_alpha": 6, **options}
    )
    model = written(Net(), config, tmp_path / "full")
    if kept is not None:
        model.peft_config["default"].rank_pattern = {f"{path}.lora_E": mask for path, mask in kept.items()}
        with torch.no_grad():
            for path, mask in kept.items():
                model.base_model.model.get_submodule(path).lora_E["default"][~torch.tensor(mask)] = 0
    expected = outputs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of ranks that are 0
        model.save_pretrained(str(tmp_path / "pruned"))
    loaded = lora2fx.load(Net().eval(), tmp_path / "pruned", example_inputs=(IDS,))
    torch.testing.assert_close(outputs(loaded), expected, rtol=0, atol=1e-6)
    ranks = {site["weight"]: site["rank"] for site in lora2fx.report(loaded).sites if site["adapter"]}
    if kept is not None:
        assert ranks == {f"{path}.weight": sum(mask) for path, mask in kept.items() if any(mask)}
    lora2fx.fold(loaded)
    torch.testing.assert_close(outputs(loaded), expected, rtol=0, atol=2e-6)


def test_transformers_models_are_run_and_their_roles_known(tmp_path):
    bert = ZOO["bert"].build().eval()
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query", "dense"], modules_to_save=["classifier"]
    )
    theirs = written(ZOO["bert"].build().eval(), config, tmp_path)
    lora2fx.load(bert, tmp_path)
    ids = torch.arange(8).reshape(2, 4)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        torch.testing.assert_close(bert.eval()(input_ids=ids).logits, expected, rtol=0, atol=1e-6)
    report = lora2fx.report(bert)
    assert report.verify["status"] == "passed"
    assert {"query", "ffn.up", "ffn.down", "output"} <= {site["role"] for site in report.sites}


def test_conv1d_and_a_fused_weight(tmp_path):
    model = ZOO["gpt2"].build().eval()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    theirs = written(ZOO["gpt2"].build().eval(), config, tmp_path)
    lora2fx.load(model, tmp_path)
    ids = torch.arange(8).reshape(2, 4)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-6)
        lora2fx.fold(model)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=2e-6)


def test_tied_weights_part_and_meet_again(tmp_path):
    def build():
        model = ZOO["gpt2"].build().eval()
        assert model.lm_head.weight is model.transformer.wte.weight
        return model

    theirs = written(build(), peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["wte"]), tmp_path)
    model, ids = lora2fx.load(build(), tmp_path), torch.arange(8).reshape(2, 4)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-6)
    assert model.lm_head.weight is not model.transformer.wte.weight
    lora2fx.unload(model)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_copies_of_base_weights_must_be_the_models_own(tmp_path):
    """PEFT saves an adapted embedding's own weight beside its factors."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["embed_tokens", "q_proj"])
    theirs = written(ZOO["llama"].build().eval(), config, tmp_path)
    ids = torch.arange(8).reshape(2, 4)
    model = lora2fx.load(ZOO["llama"].build().eval(), tmp_path)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-6)
    other = ZOO["llama"].build()
    with torch.no_grad():
        other.model.embed_tokens.weight[3] += 1
    before = states(other)
    with pytest.raises(FormatError, match=r"a weight of the base model, with other values .*allow_other_base=True"):
        lora2fx.load(other, tmp_path)
    assert states(other) == before
    lora2fx.load(other, tmp_path, allow_other_base=True)
    lora2fx.unload(other)
    assert states(other) == before


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_loaded_folded_and_taken_back(tmp_path, bias):
    config = peft.LoraConfig(r=2, target_modules=["fc"], modules_to_save=["head"], bias=bias)
    theirs = written(Net(), config, tmp_path / "untrained")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and name.endswith("bias"):
                parameter.add_(0.5)
    theirs.save_pretrained(str(tmp_path / "peft"))
    expected = outputs(theirs)
    model = lora2fx.load(Net(), tmp_path / "peft", example_inputs=(IDS,))
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=1e-6)
    with pytest.raises(AdapterError, match="save: LoRA trains the model's own weights"):
        lora2fx.save(model, tmp_path / "own")
    with pytest.raises(AdapterError, match="export_peft: LoRA trains the model's own weights"):
        lora2fx.exporters.export_peft(model, tmp_path / "back", example_inputs=(IDS,))
    lora2fx.exporters.export_safetensors(model, tmp_path / "merged.safetensors")
    other = copy.deepcopy(model)
    lora2fx.unload(other)
    assert states(other) == states(Net())
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=1e-6)
    lora2fx.fold(model)
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=2e-6)
    untrained = lora2fx.load(Net(), tmp_path / "untrained")
    lora2fx.save(untrained, tmp_path / "own")


def test_dropout_that_nothing_can_act_on_is_left_out_and_said(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["conv", "fc"], lora_dropout=0.2)
    theirs = outputs(written(Net(), config, tmp_path))
    with pytest.warns(Lora2fxWarning, match=r"lora_dropout=0\.2 is left out: conv adds ΔW to its weight"):
        model = lora2fx.load(Net(), tmp_path, example_inputs=(IDS,))
    torch.testing.assert_close(outputs(model), theirs, rtol=0, atol=1e-6)
    assert program_of(model, "test").method.lora_dropout == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factors_become_float32_as_in_peft(tmp_path, dtype):
    from safetensors.torch import load_file, save_file

    written(Net(), peft.LoraConfig(r=2, target_modules=["fc"]), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path)
    for build, wanted in ((Net, torch.float32), (lambda: Net().double(), torch.float64)):
        adapters = program_of(lora2fx.load(build(), tmp_path), "test").adapters
        assert {p.dtype for adapter in adapters.values() for p in adapter.parameters()} == {wanted}


def test_our_own_folder_comes_first(tmp_path):
    written(Net(), peft.LoraConfig(r=2, target_modules=["fc"]), tmp_path)
    (tmp_path / "adapter.json").write_text("{}")
    with pytest.raises(FormatError, match=r"adapter\.json"):
        lora2fx.load(Net(), tmp_path)


def test_peft_is_not_needed_to_read_its_folders(tmp_path, monkeypatch):
    import sys

    written(Net(), peft.LoraConfig(r=2, target_modules=["fc"]), tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    lora2fx.load(Net(), tmp_path)


def test_files_of_pefts_hub_have_what_it_writes(tmp_path):
    """The config that PEFT writes holds nothing that the reader doesn't know."""
    from lora2fx.storage_peft_config import _METHODS, _UNREAD, _USED

    written(Net(), peft.LoraConfig(r=2, target_modules=["fc"]), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    on = {name for name, value in config.items() if value}
    assert on <= _USED | _UNREAD
    assert "use_dora" in _METHODS
