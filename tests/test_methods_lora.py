from __future__ import annotations

import pytest
import torch
from torch import nn

import lora2fx
from lora2fx.errors import Lora2fxError, MethodError
from lora2fx.methods.lora import LoRA
from lora2fx.methods.lora2 import LoRA2
from tests.adapted import adapters_of, expert_site, fill, linear_site

SITE = linear_site("layer", 10, 7)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
@pytest.mark.parametrize("site", [SITE, expert_site("moe", 3, 10, 7)], ids=["matrix", "stack"])
def test_starts_at_zero_and_B_learns_first(init, site):
    adapter = LoRA(r=4, init=init).adapter(site).double()
    assert (adapter.delta() == 0).all()
    assert adapter.delta().shape == (*site.batch_shape, 10, 7)
    (adapter.delta() * torch.randn_like(adapter.delta())).sum().backward()
    assert (adapter.A.grad == 0).all()
    assert (adapter.B.grad != 0).any()


def test_delta_is_the_scaled_product():
    torch.manual_seed(0)
    for method, scale in ((LoRA(r=4, lora_alpha=8), 2.0), (LoRA(r=4, lora_alpha=8, use_rslora=True), 4.0)):
        adapter = method.adapter(SITE).double()
        fill(adapter, B=torch.randn(7, 4))
        torch.testing.assert_close(adapter.weight_delta(), scale * adapter.B @ adapter.A, rtol=1e-14, atol=0)


def test_a_stack_has_a_pair_of_factors_an_expert():
    torch.manual_seed(0)
    adapter = LoRA(r=4, lora_alpha=4).adapter(expert_site("moe", 3, 10, 7)).double()
    fill(adapter, B=torch.randn(3, 7, 4))
    for expert in range(3):
        expected = (adapter.B[expert] @ adapter.A[expert]).T
        torch.testing.assert_close(adapter.weight_delta()[expert], expected, rtol=1e-14, atol=0)


def test_initial_size_of_A():
    torch.manual_seed(0)
    site = linear_site("wide", 400, 3)
    kaiming = LoRA(r=50).adapter(site).A.detach()
    assert float(kaiming.abs().max()) <= 0.05
    assert float(kaiming.std()) == pytest.approx(0.05 / 3**0.5, rel=0.02)
    assert float(LoRA(r=50, init="gaussian").adapter(site).A.detach().std()) == pytest.approx(1 / 50, rel=0.02)


@pytest.mark.parametrize("kept", [[], [2], [0, 3], [0, 1, 2, 3]])
def test_the_mask_switches_ranks_off_and_compaction_drops_them(kept):
    torch.manual_seed(0)
    adapter = fill(LoRA(r=4).adapter(SITE).double(), B=torch.randn(7, 4))
    axis = adapter.axes()["rank"]
    axis.mask.zero_()[kept] = True
    expected = 4 * adapter.B[:, kept] @ adapter.A[kept]
    torch.testing.assert_close(adapter.weight_delta(), expected, rtol=1e-14, atol=1e-15)
    assert adapter.rank() == len(kept)
    assert adapter.lambdas.tolist() == [float(i in kept) for i in range(4)]
    before = adapter.delta()
    adapter.compact()
    assert adapter.A.shape == (len(kept), 10)
    assert adapter.B.shape == (7, len(kept))
    assert adapter.mask.shape == adapter.keep.shape == (len(kept),)
    torch.testing.assert_close(adapter.delta(), before, rtol=0, atol=1e-15)
    assert adapter(torch.randn(3, 10).double()).shape == (3, 7)


def test_float32_by_default_and_the_wider_default_where_there_is_one():
    assert LoRA().adapter(SITE).A.dtype == torch.float32
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert LoRA().adapter(SITE).A.dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        assert LoRA().adapter(SITE).A.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_rank_pattern_names_modules_weights_suffixes_globs_and_roles():
    site = linear_site("encoder.layer.3.attention.query", 10, 7, role="query")
    for name in (
        "encoder.layer.3.attention.query",
        "encoder.layer.3.attention.query.weight",
        "query",
        "attention.query",
        "encoder.layer.*.query",
        "role:query",
    ):
        assert LoRA(r=4, rank_pattern={name: 2, "other": 3}).adapter(site).A.shape == (2, 10), name
    for name in ("uery", "attention", "encoder", "role:key", "query.bias"):
        assert LoRA(r=4, rank_pattern={name: 2}).adapter(site).A.shape == (4, 10), name


def test_rank_pattern_that_contradicts_itself_is_refused():
    with pytest.raises(MethodError, match=r"several ranks .*'layer': 2, 'lay\*': 3"):
        LoRA(rank_pattern={"layer": 2, "lay*": 3}).adapter(SITE)
    assert LoRA(rank_pattern={"layer": 2, "lay*": 2}).adapter(SITE).A.shape[0] == 2


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"r": 0}, "r=0: pass a whole number of at least 1"),
        ({"r": 2.0}, r"r=2\.0: pass a whole number"),
        ({"r": True}, "r=True"),
        ({"lora_alpha": 0}, "lora_alpha=0: pass a number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1\.0: pass a number at least 0 and below 1"),
        ({"lora_dropout": -0.1}, "lora_dropout"),
        ({"init": "zeros"}, "init='zeros': pass one of 'kaiming', 'gaussian'"),
        ({"rank_pattern": {"query": 0}}, r"rank_pattern\['query'\]=0"),
    ],
)
def test_hyperparameters_that_cannot_work(settings, match):
    with pytest.raises(MethodError, match=match) as caught:
        LoRA(**settings)
    assert isinstance(caught.value, Lora2fxError)
    assert isinstance(caught.value, ValueError)


def test_dropout_acts_on_the_input_in_training_only():
    torch.manual_seed(0)
    adapter = fill(LoRA(r=4, lora_dropout=0.5).adapter(SITE).double(), B=torch.randn(7, 4))
    x = torch.ones(1, 10, dtype=torch.float64)
    torch.testing.assert_close(adapter.eval()(x), x @ adapter.delta(), rtol=1e-13, atol=0)
    torch.manual_seed(1)
    dropped = adapter.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(dropped, adapter.dropout(x) @ adapter.delta(), rtol=1e-13, atol=0)


def test_a_rank_pattern_that_names_no_adapted_weight_is_an_error_and_changes_nothing():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    with pytest.raises(MethodError, match=r"rank_pattern\['2'\] names none of the 2 adapted weights\. Close to it are"):
        lora2fx.transform(model, ["0", "1"], LoRA(rank_pattern={"0": 2, "2": 4}))
    with pytest.raises(MethodError, match=r"'role:vaule'\] names none of the 1 adapted weights.*0, role:unknown"):
        lora2fx.transform(model, ["0"], LoRA2(rank_pattern={"role:vaule": 8}))
    assert type(model[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())
    lora2fx.transform(model, ["0", "1"], LoRA(r=3, rank_pattern={"0": 2, "role:unknown": 2}))
    assert [adapter.A.shape[0] for adapter in adapters_of(model)] == [2, 2]
