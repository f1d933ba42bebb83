from __future__ import annotations

import pytest
import torch
from torch import nn

import lora2fx
from lora2fx import AdaLoRA, LoRA, LoRA2, SaLoRA, SoRA
from lora2fx.errors import AdapterError
from lora2fx.training.groups import parameter_groups
from tests.adapted import expert_site, linear_site


def adapted(method):
    model = nn.Module()
    model.one = method.adapter(linear_site("a", 6, 5))
    model.stack = method.adapter(expert_site("b", 3, 6, 5))
    model.head = nn.Linear(5, 2)
    model.norm = nn.LayerNorm(5)
    model.frozen = nn.Linear(5, 2).requires_grad_(False)
    return model


def ids(group):
    return {id(p) for p in group["params"]}


@pytest.mark.parametrize(
    ("method", "gate", "lr", "decay", "eps"),
    [
        (LoRA2(r=4, k=2), "lam", 1.0, 0.0, None),
        (LoRA2.paper(r=4, k=2), "lam", 1.0, 0.1, None),
        (AdaLoRA(r=4, target_r=2), "lam", 1.0, 0.0, None),
        (AdaLoRA(r=4, wd_on_lambda=True), "lam", 1.0, 0.1, None),
        (SoRA(r=4), "g", 1.0, 0.0, 1e-6),
        (SoRA(r=4, gate_lr=0.5, gate_eps=1e-7), "g", 0.5, 0.0, 1e-7),
        (SaLoRA(r=4), "log_theta", 3.0, 0.0, None),
        (SaLoRA(r=4, gate_lr=10), "log_theta", 10.0, 0.0, None),
    ],
)
def test_gates_are_apart_and_as_the_method_states(method, gate, lr, decay, eps):
    model = adapted(method)
    heads = set(model.head.parameters())
    groups = parameter_groups(model, 1e-2, 0.1, method.training().groups, heads, head_lr=1e-3)
    found = {group["name"]: group for group in groups}
    assert list(found) == ["factors", "gates", "heads", "heads without decay", "others without decay"]
    assert ids(found["gates"]) == {id(a.get_parameter(gate)) for a in (model.one, model.stack)}
    assert (found["gates"]["lr"], found["gates"]["weight_decay"], found["gates"].get("eps")) == (lr * 1e-2, decay, eps)
    assert (found["factors"]["lr"], found["factors"]["weight_decay"]) == (1e-2, 0.1)
    assert "eps" not in found["factors"]
    assert ids(found["heads"]) == {id(model.head.weight)}
    assert ids(found["heads without decay"]) == {id(model.head.bias)}
    assert [found[f"heads{rest}"]["weight_decay"] for rest in ("", " without decay")] == [0.1, 0.0]
    assert {found[f"heads{rest}"]["lr"] for rest in ("", " without decay")} == {1e-3}
    assert ids(found["others without decay"]) == {id(p) for p in model.norm.parameters()}
    everything = [p for group in groups for p in group["params"]]
    assert {id(p) for p in everything} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(everything) == len({id(p) for p in everything})
    optimizer = torch.optim.AdamW(groups)
    assert optimizer.param_groups[1]["eps"] == (eps or 1e-8)


@pytest.mark.parametrize(("method", "decay"), [(SoRA(r=2), 0.1), (LoRA(r=2), 0.0), (SoRA(r=2, weight_decay=0.0), 0.0)])
def test_weight_decay_is_the_methods_where_none_is_given(method, decay):
    factors = parameter_groups(method.adapter(linear_site("a", 6, 5)), 1e-2, asked=method.training().groups)[0]
    assert factors["weight_decay"] == decay


def test_empty_groups_are_left_out():
    groups = parameter_groups(LoRA(r=2).adapter(linear_site("a", 6, 5)), 1e-2)
    assert [len(group["params"]) for group in groups] == [2]


def test_of_a_model():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    with pytest.raises(AdapterError, match="param_groups: Sequential holds no adapters"):
        lora2fx.param_groups(model, 1e-2)
    lora2fx.transform(model, ["0"], SoRA(r=2), modules_to_save=["1"])
    groups = lora2fx.param_groups(nn.ModuleDict({"wrapped": model}), 1e-2, head_lr=1e-3)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("factors", 1e-2, 0.1),
        ("gates", 1e-2, 0.0),
        ("heads", 1e-3, 0.1),
        ("heads without decay", 1e-3, 0.0),
    ]
    lora2fx.attach(model, torch.optim.AdamW(groups), total_steps=3)
