from __future__ import annotations

import pytest
import torch

from lora2fx.errors import MethodError, ScheduleError
from lora2fx.methods.alora import ALoRA
from lora2fx.training.ablation import ablation_scores, shares
from lora2fx.training.driver import Attachment, schedule_status
from tests.adapted import fill, linear_site

SITES = [linear_site("a", 6, 5), linear_site("b", 5, 4), linear_site("c", 6, 5)]
METHOD = ALoRA(r=2, n_prune=2, cycles=2, tinit=2, deltaT=2)
T = 6


def adapters_for(method, seed=0):
    torch.manual_seed(seed)
    found = [method.adapter(site).double() for site in SITES]
    return [fill(a, B=torch.randn_like(a.B)) for a in found]


def test_starts_at_its_budget_with_spare_ranks():
    adapter = METHOD.adapter(SITES[0])
    assert adapter.A.shape == (4, 6)
    assert adapter.mask.tolist() == adapter.keep.tolist() == [True, True, False, False]
    assert (adapter.delta() == 0).all()
    assert adapter.scale == 1
    assert ALoRA(r=2, max_r=3, lora_alpha=8).adapter(SITES[0]).A.shape == (3, 6)
    assert ALoRA(r=2, lora_alpha=8).adapter(SITES[0]).scale == 4


def test_scores_are_the_papers_ablations():
    adapters = adapters_for(METHOD)
    axes = [a.axes()["rank"] for a in adapters]

    def score():
        """Not additive in the ranks, so that both ablations matter."""
        return -float((sum(a.delta().sum() for a in adapters) ** 2).detach())

    before = [axis.mask.clone() for axis in axes]
    found = ablation_scores(axes, score)
    assert all(torch.equal(axis.mask, mask) for axis, mask in zip(axes, before, strict=True))
    parts = [[float((a.B[:, i].sum() * a.A[i].sum()).detach()) for i in range(2)] for a in adapters]
    total = sum(map(sum, parts))
    for (importance, damage), own in zip(found, parts, strict=True):
        expected = [-(total**2) + (total - part) ** 2 for part in own]
        assert damage[:2].tolist() == pytest.approx(expected, rel=1e-5)
        assert importance[:2].tolist() == pytest.approx(
            [d - p**2 for d, p in zip(expected, own, strict=True)], rel=1e-5
        )
        assert (importance[2:] == torch.inf).all()


def test_an_evaluation_that_fails_leaves_the_masks_alone():
    axes = [a.axes()["rank"] for a in adapters_for(METHOD)]
    calls = iter([1.0, 2.0])
    with pytest.raises(StopIteration):
        ablation_scores(axes, lambda: next(calls))
    assert [axis.mask.tolist() for axis in axes] == [[True, True, False, False]] * 3


@pytest.mark.parametrize(
    ("count", "averages", "room", "expected"),
    [
        (8, [0.1, 0.3, 0.2], [9, 9, 9], [2, 3, 3]),
        (1, [0.1, 0.3], [1, 1], [0, 1]),
        (3, [0.1, 0.3], [5, 1], [2, 1]),
        (5, [0.1, 0.3], [1, 1], [1, 1]),
        (2, [], [], []),
    ],
)
def test_new_ranks_are_spread_evenly_the_rest_to_the_highest(count, averages, room, expected):
    assert shares(count, averages, room) == expected


def driven(method=METHOD, total=T, worth=None):
    adapters = adapters_for(method)
    optimizer = torch.optim.AdamW([p for a in adapters for p in a.parameters()], lr=0.01)
    attachment = Attachment(adapters, method.training(), optimizer, total)
    worth = worth or [[1.0, 1.0, 1.0, 1.0], [5.0, 5.0, 5.0, 5.0], [9.0, 9.0, 9.0, 9.0]]
    values = [torch.tensor(row) for row in worth]
    attachment.evaluate = lambda: float(sum((v * a.mask).sum() for v, a in zip(values, adapters, strict=True)))
    return adapters, optimizer, attachment


def step(adapters, optimizer):
    optimizer.zero_grad()
    sum(a.delta().square().sum() for a in adapters).backward()
    optimizer.step()


def test_a_cycle_moves_the_lowest_ranks_to_where_none_was_lost():
    adapters, optimizer, attachment = driven()
    for _ in range(2):
        before = [a.delta().detach() for a in adapters]
        moments = [optimizer.state.get(a.B, {}).get("exp_avg") for a in adapters]
        step(adapters, optimizer)
    assert [int(a.mask.sum()) for a in adapters] == [0, 3, 3]
    assert attachment.active == 6
    for adapter in adapters[1:]:
        assert (adapter.B[:, 2] == 0).all(), "a new rank leaves ΔW as it is"
        assert (adapter.A[2] != 0).all()
        assert float(adapter.A[2].abs().max().detach()) <= adapter.site.in_features**-0.5
        assert (optimizer.state[adapter.B]["exp_avg"][:, 2] == 0).all()
        assert (optimizer.state[adapter.A]["exp_avg_sq"][2] == 0).all()
        assert (optimizer.state[adapter.B]["exp_avg"][:, :2] != 0).all()
    assert len(before) == len(moments)


def test_where_every_module_lost_a_rank_the_total_shrinks():
    worth = [[1.0, 9.0, 0.0, 0.0]] * 3
    adapters, optimizer, attachment = driven(ALoRA(r=2, n_prune=3, cycles=1, tinit=1), worth=worth)
    step(adapters, optimizer)
    assert [a.mask.tolist() for a in adapters] == [[False, True, False, False]] * 3
    assert attachment.active == 3


def test_harmless_drops_only_what_costs_nothing():
    worth = [[0.0, 2.0, 0.0, 0.0], [5.0, 5.0, 0.0, 0.0], [9.0, 9.0, 0.0, 0.0]]
    adapters, optimizer, _ = driven(
        ALoRA(r=2, n_prune=3, cycles=1, tinit=1, only_harmless=True, harmless_tol=0.5), worth=worth
    )
    step(adapters, optimizer)
    assert [int(a.mask.sum()) for a in adapters] == [1, 2, 3]


def test_default_counts():
    method = ALoRA(r=8, cycles=8)
    allocator = method.training().allocators[0]
    assert [allocator._step_of(i, 400) for i in range(8)] == [40 + 10 * i for i in range(8)]
    adapters, optimizer, _ = driven(
        ALoRA(r=4, cycles=1, tinit=1), worth=[[float(i * 8 + j) for j in range(8)] for i in range(3)]
    )
    step(adapters, optimizer)
    assert sum(int(a.mask.sum()) for a in adapters) == 12
    assert int(adapters[0].mask.sum()) == 3, "an eighth of 12 ranks, at least one"


def test_an_evaluation_is_asked_for_before_anything_moves():
    adapters, optimizer, attachment = driven()
    attachment.evaluate = None
    before = [p.detach().clone() for a in adapters for p in a.parameters()]
    with pytest.raises(ScheduleError, match=r"set attachment.evaluate to a function that returns -loss"):
        step(adapters, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, (p for a in adapters for p in a.parameters()), strict=True))


def test_status_and_length():
    adapters, optimizer, _ = driven()
    for done in range(T):
        assert (schedule_status(adapters, METHOD.training()) is None) == (done == T)
        step(adapters, optimizer)
    assert schedule_status(adapters, METHOD.training()) is None
    with pytest.raises(ScheduleError, match=r"too short for 2 cycles: the last one comes after step 4"):
        driven(total=4)


def present(adapters):
    return [[p.detach().clone() for p in (a.A, a.B, a.mask)] for a in adapters]


def equal(a, b):
    return all(torch.equal(x, y) for own, other in zip(a, b, strict=True) for x, y in zip(own, other, strict=True))


class Judge:
    """-loss by the weights, one of `scores` for each step that is looked at, and a little for each rank that is on."""

    def __init__(self, adapters, scores):
        self.adapters, self.scores, self.seen = adapters, iter(scores), {}

    def __call__(self):
        fingerprint = float(self.adapters[2].A[0, 0].detach())
        if fingerprint not in self.seen:
            self.seen[fingerprint] = next(self.scores)
        ranks = float(sum((a.mask * w).sum() for a, w in zip(self.adapters, (1.0, 5.0, 9.0), strict=True)))
        return self.seen[fingerprint] + 1e-3 * ranks


def judged(method, scores, total):
    """A run of which `scores` are the -loss at each look; returns the states after each step."""
    adapters, optimizer, attachment = driven(method, total)
    attachment.evaluate = Judge(adapters, scores)
    states = []
    for _ in range(total):
        step(adapters, optimizer)
        states.append(present(adapters))
    return adapters, states


def test_the_run_ends_with_its_best_state_structure_and_weights():
    """Looks after steps 2, 4, 6 (cycles after 2 and 4) and after the last, 7."""
    method = ALoRA(r=2, n_prune=2, cycles=2, tinit=2, deltaT=2)
    adapters, states = judged(method, [-3.0, -1.0, -2.0, -4.0], 7)
    before_second_cycle = states[2]
    assert [int(a.mask.sum()) for a in adapters] == [0, 3, 3]
    assert torch.equal(adapters[1].mask, before_second_cycle[1][2])
    assert torch.equal(adapters[1].keep, adapters[1].mask)
    ends = judged(method, [-3.0, -1.0, -2.0, -0.5], 7)
    assert equal(present(ends[0]), ends[1][-1]) and [int(a.mask.sum()) for a in ends[0]] != [0, 3, 3]
    other = judged(ALoRA(r=2, n_prune=2, cycles=2, tinit=2, deltaT=2, keep_best=False), [-3.0, -1.0], 7)
    assert [int(a.mask.sum()) for a in other[0]] == [int(a.mask.sum()) for a in ends[0]]


def test_weights_beside_the_adapters_may_speak_against_the_best_state():
    """The best look was better, but with what was trained since (heads) it isn't any more."""
    adapters, optimizer, attachment = driven(ALoRA(r=2, n_prune=2, cycles=1, tinit=2, deltaT=2), 6)
    looks = iter([-1.0, *[0.0] * 12, -2.0, -3.0, -3.0, -5.0])
    attachment.evaluate = lambda: next(looks)
    for _ in range(6):
        step(adapters, optimizer)
    last = present(adapters)
    assert next(looks, None) is None
    assert all(int(a.best_step) == 0 for a in adapters)
    assert equal(last, present(adapters)) and [int(a.mask.sum()) for a in adapters] != [2, 2, 2]


def test_rollback_undoes_a_cycle_that_made_things_worse_and_moves_no_more():
    method = ALoRA(r=2, n_prune=2, cycles=3, tinit=2, deltaT=2, rollback=True, keep_best=False)
    adapters, states = judged(method, [-3.0, -2.0, -9.0, -1.0], 9)
    counts = [[int(mask.sum()) for _, _, mask in state] for state in states]
    assert counts[0] == [2, 2, 2]
    assert counts[1] == counts[2] == [0, 3, 3], "the first cycle helped"
    assert counts[3] == counts[4] != [0, 3, 3], "the second"
    assert counts[5:] == [[0, 3, 3]] * 4, "did not: it is undone, and the third never comes"
    assert all(bool(a.settled) for a in adapters)
    assert all(torch.equal(a.keep, a.mask) for a in adapters)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_loss_that_is_not_finite_is_never_the_best(bad):
    method = ALoRA(r=2, n_prune=2, cycles=1, tinit=2, deltaT=2)
    adapters, optimizer, attachment = driven(method, 4)
    attachment.evaluate = lambda: bad
    for _ in range(4):
        step(adapters, optimizer)
    assert [int(a.mask.sum()) for a in adapters] == [2, 2, 2], "nothing can be told: nothing moves"
    assert all((a.best_A == 0).all() for a in adapters)


def test_an_early_end_folds_the_best_state_and_pruning_forgets_it():
    method = ALoRA(r=2, n_prune=2, cycles=1, tinit=2, deltaT=2)
    adapters, optimizer, attachment = driven(method, 8)
    attachment.evaluate = Judge(adapters, [-1.0, -2.0, -3.0])
    for _ in range(2):
        step(adapters, optimizer)
    best = [(a.best_A.clone(), a.best_B.clone()) for a in adapters]
    assert all((b != 0).any() for b, _ in best)
    for _ in range(3):
        step(adapters, optimizer)
    assert [int(a.mask.sum()) for a in adapters] == [0, 3, 3]
    (allocator,) = method.training().allocators
    for _ in range(2):
        allocator.finish(adapters)
        assert [int(a.mask.sum()) for a in adapters] == [2, 2, 2]
        assert all(torch.equal(a.A, b) for a, (b, _) in zip(adapters, best, strict=True))
    adapters[0].compact()
    assert adapters[0].A.shape == adapters[0].best_A.shape == (2, 6)
    assert int(adapters[0].best_step) == 0


def test_fresh_ranks_are_drawn_from_the_methods_own_seed():
    rows = []
    for seed in (1, 2):
        adapters, optimizer, _ = driven()
        torch.manual_seed(seed)
        for _ in range(2):
            step(adapters, optimizer)
        rows.append(adapters[1].A[2].detach())
    assert torch.equal(*rows)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"max_r": 7}, "max_r=7 is less than the r=8"),
        ({"cycles": 0}, "cycles=0"),
        ({"n_prune": 0}, "n_prune=0"),
        ({"tinit": 0}, "tinit=0"),
        ({"deltaT": 0}, "deltaT=0"),
        ({"harmless_tol": float("nan")}, "harmless_tol=nan"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"growth_seed": -1}, "growth_seed=-1"),
    ],
)
def test_hyperparameters_that_cannot_work(settings, match):
    with pytest.raises(MethodError, match=match):
        ALoRA(**settings)
