from __future__ import annotations

import pytest
import torch

from lora2fx.errors import Lora2fxWarning, MethodError
from lora2fx.methods.sora import SoRA
from lora2fx.training.driver import Attachment, schedule_status
from lora2fx.training.groups import parameter_groups
from lora2fx.training.proximal import SoftThreshold, soft_threshold
from tests.adapted import expert_site, fill, linear_site

SITE, STACK = linear_site("layer", 10, 7), expert_site("moe", 3, 10, 7)


def random(adapter):
    torch.manual_seed(0)
    return fill(adapter.double(), **{name: torch.randn_like(p) for name, p in adapter.named_parameters()})


@pytest.mark.parametrize("site", [SITE, STACK], ids=["matrix", "stack"])
def test_starts_at_zero_and_is_the_formula(site):
    torch.manual_seed(0)
    method = SoRA(r=4, lora_alpha=8)
    assert (method.adapter(site).double().delta() == 0).all()
    a = random(method.adapter(site))
    torch.testing.assert_close(a.delta(), 2 * a.A.mT @ torch.diag_embed(a.g) @ a.B.mT, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        a.g[..., 1] = 0
    assert a.rank() == 3


def attached(method, adapters, groups, steps):
    optimizer = torch.optim.SGD(groups, lr=0.5)
    return optimizer, Attachment(adapters, method.training(), optimizer, steps)


@pytest.mark.parametrize(("mode", "xi"), [("lr", 0.04), ("absolute", 0.2)])
def test_the_threshold_follows_the_gates_own_learning_rate(mode, xi):
    adapter = fill(SoRA(r=4).adapter(SITE).double(), g=torch.tensor([0.5, -0.5, 0.1, -0.03]))
    groups = [{"params": [adapter.g], "lr": 2.0}, {"params": [adapter.A, adapter.B], "weight_decay": 0.1}]
    optimizer, _ = attached(SoRA(r=4, xi=xi, xi_mode=mode), [adapter], groups, 3)
    adapter.A.grad, adapter.B.grad, adapter.g.grad = (torch.zeros_like(p) for p in (adapter.A, adapter.B, adapter.g))
    optimizer.step()
    shift = 0.08 if mode == "lr" else 0.2
    expected = torch.tensor([0.5 - shift, shift - 0.5, max(0.1 - shift, 0), 0.0], dtype=torch.float64)
    torch.testing.assert_close(adapter.g.detach(), expected, rtol=0, atol=1e-8)
    assert adapter.keep.tolist() == [v != 0 for v in expected.tolist()]
    assert adapter.mask.all(), "a gate may grow back before the last step"


def test_the_last_step_fixes_what_is_left():
    method = SoRA(r=4, xi=0.1, xi_mode="absolute")
    adapter = fill(method.adapter(SITE).double(), g=torch.tensor([0.05, 0.15, -0.25, 1.0]))
    groups = parameter_groups(torch.nn.ModuleList([adapter]), 0.5, weight_decay=0.1)
    optimizer, attachment = attached(method, [adapter], groups, 2)
    for done, kept in ((1, [False, True, True, True]), (2, [False, False, True, True])):
        adapter.g.grad = torch.zeros_like(adapter.g)
        optimizer.step()
        assert adapter.keep.tolist() == kept
        assert attachment.active == sum(kept)
        assert (schedule_status([adapter], method.training()) is None) == (done == 2)
    assert adapter.mask.tolist() == [False, False, True, True]
    adapter.compact()
    assert adapter.g.shape == (2,)


def test_a_rank_of_a_stack_is_kept_where_any_matrix_keeps_it():
    method = SoRA(r=2, xi=0.1, xi_mode="absolute")
    adapter = fill(method.adapter(STACK).double(), g=torch.tensor([[0.0, 0.05], [1.0, 0.02], [0.0, -0.01]]))
    optimizer, _ = attached(method, [adapter], parameter_groups(torch.nn.ModuleList([adapter]), 0.5, 0.1), 1)
    adapter.g.grad = torch.zeros_like(adapter.g)
    optimizer.step()
    assert adapter.mask.tolist() == [True, False]


def test_no_weight_decay_on_the_factors_warns_once():
    method = SoRA(r=4)
    adapter = method.adapter(SITE)
    optimizer, _ = attached(method, [adapter], [{"params": list(adapter.parameters())}], 3)
    adapter.g.grad = torch.zeros_like(adapter.g)
    with pytest.warns(Lora2fxWarning, match="hardly prunes"):
        optimizer.step()
    optimizer.step()


def test_sparsifying_rounds():
    threshold = SoftThreshold("gate", (0.0, 0.1, 0.2), first_share=0.5)
    found = [threshold.threshold(step, 12) for step in range(12)]
    assert found == [0.0] * 6 + [0.1] * 3 + [0.2] * 3
    assert SoftThreshold("gate", (0.3,)).threshold(11, 12) == 0.3


def test_l1_term():
    method = SoRA(r=4, l1_coef=10.0)
    adapters = [random(method.adapter(site)) for site in (SITE, STACK)]
    total = sum(a.g.abs().sum() for a in adapters)
    torch.testing.assert_close(method.training().penalty(adapters), 10 * total / 16, rtol=1e-12, atol=0)
    assert SoRA().training().penalty is None


def test_the_operator_has_no_dead_zone():
    x = torch.linspace(-1, 1, 201, dtype=torch.float64)
    expected = x.sign() * (x.abs() - 0.25).clamp(min=0)
    torch.testing.assert_close(soft_threshold(x, 0.25), expected, rtol=0, atol=1e-16)
    assert soft_threshold(torch.tensor([0.25, -0.25]), 0.25).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"xi": -1.0}, "xi=-1"),
        ({"xi": ()}, "pass a threshold"),
        ({"xi": (0.2, 0.1)}, "thresholds rise"),
        ({"xi_mode": "both"}, "xi_mode='both'"),
        ({"l1_coef": -1}, "l1_coef"),
        ({"first_share": 1.5}, "first_share"),
        ({"r": 0}, "r=0"),
    ],
)
def test_hyperparameters_that_cannot_work(settings, match):
    with pytest.raises(MethodError, match=match):
        SoRA(**settings)
