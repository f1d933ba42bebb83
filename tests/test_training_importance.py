from __future__ import annotations

import torch

from lora2fx.methods.lora2 import LoRA2
from lora2fx.training.importance import averages, axis_importance, axis_total, update_averages
from lora2fx.training.slots import Step
from tests.adapted import expert_site, linear_site

METHOD = LoRA2(r=4, k=3, target_r=2, target_k=1)
NAMES = ("v", "lam", "U", "u", "V")


def adapters():
    torch.manual_seed(0)
    sites = [linear_site("a", 6, 5), linear_site("b", 5, 3), linear_site("c", 6, 5), expert_site("d", 2, 6, 5)]
    return [METHOD.adapter(site).double() for site in sites]


def by_hand(weights, gradients, beta1, beta2):
    """Eqs. (8) to (11) over a sequence, one element at a time in effect: Ī·Ū."""
    sensitivity = uncertainty = torch.zeros_like(weights[0])
    for w, g in zip(weights, gradients, strict=True):
        now = (w * g).abs()
        sensitivity = beta1 * sensitivity + (1 - beta1) * now
        uncertainty = beta2 * uncertainty + (1 - beta2) * (now - sensitivity).abs()
    return sensitivity, uncertainty


def test_averages_and_entries_by_hand():
    torch.manual_seed(1)
    found = adapters()
    history = {(i, name): ([], []) for i in range(len(found)) for name in NAMES}
    for step in range(5):
        for i, adapter in enumerate(found):
            for name in NAMES:
                parameter = adapter.get_parameter(name)
                with torch.no_grad():
                    parameter.normal_()
                parameter.grad = torch.randn_like(parameter)
                history[i, name][0].append(parameter.detach().clone())
                history[i, name][1].append(parameter.grad.clone())
        update_averages(found, NAMES, Step(step, 10), 0.9, 0.7)
    products = {}
    for (i, name), (weights, gradients) in history.items():
        expected = by_hand(weights, gradients, 0.9, 0.7)
        for average, value in zip(averages(found[i], name), expected, strict=True):
            torch.testing.assert_close(average, value, rtol=1e-12, atol=0)
        products[i, name] = expected[0] * expected[1]
    for i, (scores, columns, totals) in enumerate(
        zip(
            axis_importance(found, "lambda"),
            axis_importance(found, "columns"),
            axis_total(found, "columns"),
            strict=True,
        )
    ):
        lam, v, U, u, V = (
            products[i, name].reshape(-1, *products[i, name].shape[-d:])
            for name, d in zip(("lam", "v", "U", "u", "V"), (1, 2, 2, 2, 2), strict=True)
        )
        torch.testing.assert_close(scores, lam.mean(0) + v.mean((0, 1)) + U.mean((0, 2)), rtol=1e-12, atol=0)
        torch.testing.assert_close(columns, u.mean((0, 1)) + V.mean((0, 2)), rtol=1e-12, atol=0)
        torch.testing.assert_close(totals, u.sum((0, 1)) + V.sum((0, 2)), rtol=1e-12, atol=0)


def test_a_missing_gradient_counts_as_zero():
    found = adapters()[:1]
    adapter = found[0]
    adapter.lam.grad = torch.ones_like(adapter.lam)
    update_averages(found, NAMES, Step(0, 10), 0.5, 0.5)
    assert (averages(adapter, "lam")[0] == 0.5).all()
    assert (averages(adapter, "v")[0] == 0).all()
    update_averages(found, NAMES, Step(1, 10), 0.5, 0.5)
    adapter.lam.grad = None
    update_averages(found, NAMES, Step(2, 10), 0.5, 0.5)
    assert (averages(adapter, "lam")[0] == 0.375).all()
    assert all(average.isfinite().all() for name in NAMES for average in averages(adapter, name))


def test_only_what_a_budget_scores_is_tracked():
    site = linear_site("a", 6, 5)
    named = {
        tuple(sorted(name for name, _ in method.adapter(site).named_buffers() if name.endswith("_sensitivity")))
        for method in (LoRA2(k=8), LoRA2(target_r=2), LoRA2(target_k=2))
    }
    assert named == {
        (),
        ("U_sensitivity", "lam_sensitivity", "v_sensitivity"),
        ("V_sensitivity", "u_sensitivity"),
    }
