from __future__ import annotations

import pytest
from torch import nn

from lora2fx.methods.adalora import AdaLoRA
from lora2fx.methods.lora import LoRA
from lora2fx.methods.lora2 import LoRA2
from lora2fx.methods.salora import SaLoRA
from lora2fx.methods.sora import SoRA
from lora2fx.training.groups import parameter_groups
from tests.adapted import expert_site, linear_site


@pytest.mark.parametrize(
    ("method", "gate"),
    [(LoRA2(r=4, k=2), "lam"), (AdaLoRA(r=4, target_r=2), "lam"), (SoRA(r=4), "g"), (SaLoRA(r=4), "log_theta")],
)
def test_gates_are_apart_and_not_decayed(method, gate):
    model = nn.Module()
    model.one = method.adapter(linear_site("a", 6, 5))
    model.stack = method.adapter(expert_site("b", 3, 6, 5))
    model.head = nn.Linear(5, 2)
    model.frozen = nn.Linear(5, 2).requires_grad_(False)
    factors, gates, heads = parameter_groups(model, 0.1, gate_lr=3e-3, head_lr=1e-3)
    assert {id(p) for p in gates["params"]} == {id(a.get_parameter(gate)) for a in (model.one, model.stack)}
    assert {id(p) for p in heads["params"]} == {id(p) for p in model.head.parameters()}
    everything = [p for group in (factors, gates, heads) for p in group["params"]]
    assert {id(p) for p in everything} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(everything) == len({id(p) for p in everything})
    assert (factors["weight_decay"], gates["weight_decay"], heads["weight_decay"]) == (0.1, 0.0, 0.1)
    assert "lr" not in factors
    assert (gates["lr"], heads["lr"]) == (3e-3, 1e-3)


def test_empty_groups_are_left_out():
    assert [len(group["params"]) for group in parameter_groups(LoRA(r=2).adapter(linear_site("a", 6, 5)))] == [2]
