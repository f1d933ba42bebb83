from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora2fx.errors import MethodError, ScheduleError
from lora2fx.methods.adalora import AdaLoRA
from lora2fx.methods.lora2 import LoRA2
from lora2fx.training.allocator import BudgetAllocator, _as, keep_highest, write_allocations
from lora2fx.training.driver import Attachment
from lora2fx.training.schedule import CubicSchedule
from lora2fx.training.slots import Step
from tests.adapted import linear_site
from tests.examples import drawn

# Few distinct values, so that ties are the rule.
scores = st.lists(
    st.lists(st.sampled_from([0.0, 1e-30, 1e-20, 0.5, 1.0]), min_size=0, max_size=6), min_size=1, max_size=5
)


@drawn(100)
@given(scores, st.integers(-2, 40))
def test_keeps_exactly_the_budget_and_the_highest(values, budget):
    total = sum(map(len, values))
    tensors = [torch.tensor(row, dtype=torch.float64) for row in values]
    kept = keep_highest(tensors, budget)
    assert [(keep.shape, keep.dtype) for keep in kept] == [(tensor.shape, torch.bool) for tensor in tensors]
    assert sum(int(keep.sum()) for keep in kept) == min(max(budget, 0), total)
    inside = [v for row, keep in zip(values, kept, strict=True) for v, k in zip(row, keep.tolist(), strict=True) if k]
    outside = [
        v for row, keep in zip(values, kept, strict=True) for v, k in zip(row, keep.tolist(), strict=True) if not k
    ]
    assert not inside or not outside or min(inside) >= max(outside)


@drawn(100)
@given(scores, st.integers(0, 30))
def test_ties_go_by_position(values, budget):
    """The dropped ones are the first by (score, adapter, entry)."""
    tensors = [torch.tensor(row, dtype=torch.float64) for row in values]
    kept = torch.cat(keep_highest(tensors, budget))
    order = sorted(range(len(kept)), key=lambda i: (float(torch.cat(tensors)[i]), i))
    dropped = set(order[: max(0, len(order) - budget)])
    assert {i for i in range(len(kept)) if not kept[i]} == dropped


def test_masks_on_several_devices_stay_where_they_are():
    """As those of a model that is spread over devices; the meta device stands for a second one."""
    keeps = [torch.tensor([True, False]), torch.ones(3, dtype=torch.bool, device="meta")]
    found = _as(torch.ones(1, dtype=torch.float64), keeps)
    assert [(keep.device.type, keep.dtype, keep.shape) for keep in found] == [
        ("cpu", torch.float64, (2,)),
        ("meta", torch.float64, (3,)),
    ]
    assert found[0].tolist() == [1.0, 0.0]


def test_all_equal_scores_drop_the_first():
    kept = keep_highest([torch.zeros(3), torch.zeros(2)], 2)
    assert [keep.tolist() for keep in kept] == [[False, False, False], [True, True]]


@drawn(100)
@given(st.floats(1e-38, 1e-20), st.integers(0, 5))
def test_scores_far_below_one_are_told_apart(size, budget):
    values = torch.arange(1, 6, dtype=torch.float32) * size
    assert keep_highest([values], budget)[0].tolist() == [i >= 5 - budget for i in range(5)]


def lora2(**settings):
    settings = {"r": 4, "k": 2, "target_r": 2, "tinit": 1, "tfinal": 3, "deltaT": 1} | settings
    return LoRA2(**settings)


def prepared(method, sizes=((6, 5), (5, 3))):
    torch.manual_seed(0)
    adapters = [method.adapter(linear_site(f"layer{i}", *size)).double() for i, size in enumerate(sizes)]
    return adapters, method.training().allocators


def set_scores(adapters, allocator, values):
    for adapter, row in zip(adapters, values, strict=True):
        for name in allocator.tracked:
            adapter.get_buffer(f"{name}_sensitivity").zero_()
        adapter.lam_sensitivity.copy_(torch.tensor(row, dtype=torch.float64))
        adapter.lam_uncertainty.fill_(1.0)


def test_a_pruned_value_grows_back_before_the_final_phase_and_never_in_it():
    adapters, (allocator,) = prepared(lora2())
    set_scores(adapters, allocator, [[4, 3, 2, 1], [8, 7, 6, 5]])
    # T = 10: events from step 2, the final phase from step 7; a budget of 4 of 8 at its start.
    allocator._allocate(adapters, allocator._axes(adapters), 4, False, None)
    assert [a.keep.tolist() for a in adapters] == [[False] * 4, [True] * 4]
    assert all(a.mask.all() for a in adapters)
    assert adapters[0].lam.tolist() == [0.0] * 4
    with torch.no_grad():
        adapters[0].lam.fill_(0.3)
    set_scores(adapters, allocator, [[9, 9, 9, 9], [8, 7, 6, 5]])
    allocator._allocate(adapters, allocator._axes(adapters), 4, True, None)
    assert adapters[0].mask.tolist() == [True] * 4
    assert adapters[0].lam.tolist() == pytest.approx([0.3] * 4)
    assert not adapters[1].mask.any()
    set_scores(adapters, allocator, [[1, 1, 1, 1], [99, 99, 99, 99]])
    allocator._allocate(adapters, allocator._axes(adapters), 4, True, None)
    assert adapters[0].mask.tolist() == [True] * 4, "what is masked can't come back, whatever its score"


def test_gradient_reaches_a_zeroed_value_but_not_a_masked_one():
    adapters, _ = prepared(lora2(init="gaussian"))
    adapter = adapters[0]
    keep = torch.tensor([True, False, True, False])
    with torch.no_grad():
        adapter.lam.fill_(1.0)
    for final, reaches in ((False, True), (True, False)):
        write_allocations([adapter.axes()["lambda"]], [keep], final)
        adapter.zero_grad()
        adapter.delta().square().sum().add(adapter.delta().sum()).backward()
        assert (adapter.lam.grad[~keep] != 0).all() == reaches
        assert (adapter.lam.grad[~keep] == 0).all() != reaches


def test_columns_are_pruned_for_good():
    adapters, (allocator,) = prepared(lora2(target_r=None, target_k=1))
    for adapter, size in zip(adapters, (1.0, 2.0), strict=True):
        for name in ("u", "V"):
            adapter.get_buffer(f"{name}_sensitivity").fill_(size)
            adapter.get_buffer(f"{name}_uncertainty").fill_(size)
    allocator._allocate(adapters, allocator._axes(adapters), 2, False, None)
    assert [a.column_mask.tolist() for a in adapters] == [[False, False], [True, True]]
    adapters[0].u_sensitivity.fill_(100.0)
    allocator._allocate(adapters, allocator._axes(adapters), 2, False, None)
    assert [a.column_keep.tolist() for a in adapters] == [[False, False], [True, True]]


@pytest.mark.parametrize("target", [0, 4])
def test_everything_and_nothing_can_be_pruned(target):
    adapters, (allocator,) = prepared(lora2(target_r=target))
    for index in range(10):
        for adapter in adapters:
            for parameter in adapter.parameters():
                parameter.grad = torch.ones_like(parameter)
        allocator.after_step(adapters, Step(index, 10))
    assert [int(a.mask.sum()) for a in adapters] == [target] * 2
    assert all(a.delta().norm() == 0 for a in adapters)


def test_the_budget_is_over_all_adapters_together_whatever_their_ranks():
    method = lora2(rank_pattern={"layer1": 6}, target_r=2.5)
    adapters, (allocator,) = prepared(method)
    assert [allocator.budgets(adapters, step, 10) for step in (0, 1, 9)] == [
        {"lambda": 10},
        {"lambda": 10},
        {"lambda": 5},
    ]


def test_a_target_above_what_there_is_is_refused():
    method = lora2(rank_pattern={"layer1": 6}, target_r=5.5)
    adapters, (allocator,) = prepared(method)
    with pytest.raises(ScheduleError, match=r"axis 'lambda' is 5.5 entries in each of 2 adapters, 11 in all.* only 10"):
        allocator.check(adapters, 10)


def test_both_axes_have_their_own_budgets():
    adapters, allocators = prepared(lora2(target_r=2, target_k=1))
    for index in range(10):
        for adapter in adapters:
            for parameter in adapter.parameters():
                parameter.grad = torch.randn_like(parameter)
        for allocator in allocators:
            allocator.after_step(adapters, Step(index, 10))
    assert sum(int(a.mask.sum()) for a in adapters) == 4
    assert sum(int(a.column_mask.sum()) for a in adapters) == 2


def driven(method, total=10, lr=0.1, seed=1):
    """The adapters after a run of AdamW on random gradients, and its optimizer."""
    adapters, _ = prepared(method)
    optimizer = torch.optim.AdamW([p for a in adapters for p in a.parameters()], lr=lr, weight_decay=0.0)
    attachment = Attachment(adapters, method.training(), optimizer, total)
    generator = torch.Generator().manual_seed(seed)
    states = []
    for _ in range(total):
        for adapter in adapters:
            for parameter in adapter.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        states.append(([a.keep.clone() for a in adapters], attachment.budget))
    return adapters, optimizer, states


@pytest.mark.parametrize("method", [AdaLoRA, LoRA2], ids=["AdaLoRA", "LoRA2"])
def test_a_local_budget_keeps_as_many_in_every_site(method):
    settings = {"r": 4, "target_r": 2, "tinit": 1, "tfinal": 3, "deltaT": 1, "rank_pattern": {"layer1": 6}}
    settings |= {"k": 2} if method is LoRA2 else {}
    adapters, _, states = driven(method(**settings, budget_scope="local"))
    assert [int(a.mask.sum()) for a in adapters] == [2, 2]
    for index, (kept, budget) in enumerate(states):
        own = [4, 6] if index <= 1 else [int(2 + (r - 2) * max(0.0, 1 - (index - 1) / 6) ** 3) for r in (4, 6)]
        assert [int(keep.sum()) for keep in kept] == own
        assert budget == sum(own)


def test_a_local_target_above_a_sites_ranks_keeps_them_all():
    adapters, _, _ = driven(lora2(r=5, target_r=3, rank_pattern={"layer0": 2}, budget_scope="local"))
    assert [int(a.mask.sum()) for a in adapters] == [2, 3]


def test_under_a_local_budget_equations_8_and_9_keep_the_same():
    """A constant added to every score of a matrix changes no order within it, and does across matrices."""

    def kept(scorer, scope):
        adapters, (allocator,) = prepared(lora2(scorer=scorer, budget_scope=scope, target_r=2))
        generator = torch.Generator().manual_seed(0)
        for adapter, size in zip(adapters, (1.0, 30.0), strict=True):
            for name in ("u", "v", "lam", "U", "V"):
                scale = size if name in ("u", "V") else 1.0
                for kind in ("sensitivity", "uncertainty"):
                    buffer = getattr(adapter, f"{name}_{kind}", None)
                    if buffer is not None:
                        buffer.copy_(scale * torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
            generator.manual_seed(7)
        lam = [torch.tensor([4.0, 1.0, 3.0, 2.0]), torch.tensor([1.5, 2.5, 0.5, 3.5])]
        for adapter, values in zip(adapters, lam, strict=True):
            adapter.lam_sensitivity.copy_(values)
            adapter.lam_uncertainty.fill_(10.0)
            for name in ("v", "U"):
                adapter.get_buffer(f"{name}_sensitivity").zero_()
        for pool in allocator._pools(adapters):
            allocator._allocate(pool, allocator._axes(pool), 4 if scope == "global" else 2, True, None)
        return [a.mask.tolist() for a in adapters]

    assert kept("eq8", "local") == kept("eq9", "local") == [[True, False, True, False], [False, True, False, True]]
    assert kept("eq8", "global") != kept("eq9", "global")


def test_an_allocator_of_ones_own_averages_as_published_and_leaves_the_moments_alone():
    """β₁ = β₂ = 0.85 (arXiv 2303.10512, eqs. 9 and 10): Ī = 0.15 |w·g| and Ū = 0.15 · 0.85 |w·g| after one step."""
    adapters, (own,) = prepared(lora2())
    allocator = BudgetAllocator("lambda", 2, CubicSchedule(tinit=0, tfinal=3, deltaT=1), own.tracked, own.score)
    optimizer = torch.optim.AdamW([p for a in adapters for p in a.parameters()])
    for adapter in adapters:
        for parameter in adapter.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    products = [0.5 * adapter.lam.detach().abs() for adapter in adapters]
    allocator.after_step(adapters, Step(0, 10, optimizer=optimizer))
    for adapter, product in zip(adapters, products, strict=True):
        torch.testing.assert_close(adapter.lam_sensitivity, 0.15 * product, rtol=1e-12, atol=0)
        torch.testing.assert_close(adapter.lam_uncertainty, 0.15 * 0.85 * product, rtol=1e-12, atol=0)
    allocator.after_step(adapters, Step(9, 10, optimizer=optimizer))
    assert sum(int((~adapter.keep).sum()) for adapter in adapters) == 4
    assert all((optimizer.state[adapter.lam]["exp_avg"] != 0).all() for adapter in adapters)


@pytest.mark.parametrize("reset", [False, True])
def test_moments_of_a_zeroed_value_are_cleared_where_asked(reset):
    adapters, optimizer, _ = driven(lora2(reset_moments_on_mask=reset))
    for adapter in adapters:
        state, dropped = optimizer.state[adapter.lam], ~adapter.keep
        for name in ("exp_avg", "exp_avg_sq"):
            assert (state[name][adapter.keep] != 0).all()
            assert (state[name][dropped] == 0).all() == (reset or not dropped.any())
        assert (optimizer.state[adapter.v]["exp_avg"] != 0).all()
    assert any((~a.keep).any() for a in adapters)


def test_finish_makes_the_last_allocation_take_effect_and_twice_is_once():
    adapters, (allocator,) = prepared(lora2())
    set_scores(adapters, allocator, [[4, 3, 2, 1], [8, 7, 6, 5]])
    allocator._allocate(adapters, allocator._axes(adapters), 5, False, None)
    with torch.no_grad():
        for adapter in adapters:
            adapter.lam.add_(0.25)
    for _ in range(2):
        allocator.finish(adapters)
        assert [a.mask.tolist() for a in adapters] == [[True, False, False, False], [True] * 4]
        assert adapters[0].lam.tolist() == [1.25, 0.0, 0.0, 0.0]


def test_finish_without_an_allocation_changes_nothing():
    adapters, (allocator,) = prepared(lora2())
    allocator.finish(adapters)
    assert all(a.mask.all() and (a.lam == 1).all() for a in adapters)


@pytest.mark.parametrize("method", [AdaLoRA, LoRA2])
def test_a_local_target_must_be_whole(method):
    with pytest.raises(MethodError, match=r"keeps target_r entries in every site, but target_r=1.5 is no whole number"):
        method(r=8, target_r=1.5, budget_scope="local")
    with pytest.raises(MethodError, match="budget_scope='site'"):
        method(budget_scope="site")
