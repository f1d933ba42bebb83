from __future__ import annotations

import pytest
import torch

from lora2fx.errors import MethodError
from lora2fx.methods.adalora import AdaLoRA
from tests.adapted import expert_site, fill, linear_site

SITE, STACK = linear_site("layer", 10, 7), expert_site("moe", 3, 10, 7)


def random(adapter):
    torch.manual_seed(0)
    return fill(adapter.double(), **{name: torch.randn_like(p) for name, p in adapter.named_parameters()})


@pytest.mark.parametrize("site", [SITE, STACK], ids=["matrix", "stack"])
def test_starts_at_zero_and_lambda_learns_first(site):
    torch.manual_seed(0)
    adapter = AdaLoRA(r=4, target_r=2).adapter(site).double()
    assert (adapter.delta() == 0).all()
    (adapter.delta() * torch.randn_like(adapter.delta())).sum().backward()
    assert {name for name, p in adapter.named_parameters() if (p.grad != 0).any()} == {"lam"}


@pytest.mark.parametrize("site", [SITE, STACK], ids=["matrix", "stack"])
def test_forward_and_delta_are_the_formula(site):
    a = random(AdaLoRA(r=4, target_r=None, lora_alpha=6).adapter(site))
    a.mask[2] = False
    lam = torch.diag_embed(a.lam * torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64))
    expected = 6 / 4 * a.A.mT @ lam @ a.B.mT
    torch.testing.assert_close(a.delta(), expected, rtol=1e-12, atol=1e-12)
    x = torch.randn(*site.batch_shape, 5, 10).double()
    torch.testing.assert_close(a(x), x @ expected, rtol=1e-12, atol=1e-12)
    assert a.rank() == 3
    assert a.lambdas.shape == (4,)
    assert a.lambdas[2] == 0
    before = a.delta().detach()
    a.compact()
    assert a.lam.shape == (*site.batch_shape, 3)
    torch.testing.assert_close(a.delta().detach(), before, rtol=0, atol=1e-12)


def test_a_stack_is_regularised_matrix_by_matrix():
    method = AdaLoRA(r=4, orth_reg_weight=0.2)
    a = random(method.adapter(STACK))
    eye = torch.eye(4, dtype=torch.float64)
    norms = [torch.linalg.norm(g - eye) for e in range(3) for g in (a.A[e] @ a.A[e].T, a.B[e].T @ a.B[e])]
    torch.testing.assert_close(method.training().penalty([a]), 0.2 * sum(norms) / 6, rtol=1e-12, atol=0)


def test_without_a_target_there_is_nothing_to_allocate():
    method = AdaLoRA(target_r=None)
    assert method.training().allocators == ()
    assert not [name for name, _ in method.adapter(SITE).named_buffers() if "sensitivity" in name]
    assert AdaLoRA(orth_reg_weight=0).training().penalty is None


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"target_r": 13}, "target_r=13 is more than r=8"),
        ({"tfinal": 0}, "tfinal=0"),
        ({"orth_form": "max"}, "orth_form='max'"),
        ({"orth_reg_weight": -1}, "orth_reg_weight"),
        ({"sensitivity": "none"}, "sensitivity='none'"),
        ({"score_timing": "later"}, "score_timing='later'"),
        ({"scale_eps": -1}, "scale_eps"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
    ],
)
def test_hyperparameters_that_cannot_work(settings, match):
    with pytest.raises(MethodError, match=match):
        AdaLoRA(**settings)
