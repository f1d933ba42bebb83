"""Roundings: every value the one that it must be, updates kept in low precision, float32 added in one rounding."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lora2fx.errors import Lora2fxWarning, MethodError
from lora2fx.folding import fold
from lora2fx.methods.lora import LoRA
from lora2fx.passes.adaptive_rounding import round_keeping
from lora2fx.passes.adding import write_measured, write_merge
from lora2fx.passes.fold import fold_adapters, warn_lost
from lora2fx.passes.lanes import Update, orthonormal
from lora2fx.passes.merging import Merge
from lora2fx.passes.rounding import neighbour, round_once, round_stochastically
from lora2fx.site import Layout, Site
from tests.adapted import linear_site
from tests.programs import Small, adapt, randomised, states

LOW = [torch.bfloat16, torch.float16]


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def merge_of(site, relative, dtype, r=8, seed=0):
    """A weight of N(0, 0.02²) and an update of it with ‖ΔW‖ = relative · ‖W‖, and the exact sum."""
    weight = nn.Parameter((drawn(*site.shape, seed=seed) * 0.02).to(dtype), requires_grad=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = LoRA(r=r).adapter(site)
        nn.init.normal_(adapter.A)
        nn.init.normal_(adapter.B)
    with torch.no_grad():
        adapter.B *= relative * float(weight.double().norm() / adapter.exact().delta().norm())
    exact = weight.double() + adapter.exact().weight_delta()
    return Merge(weight, {"it": adapter}), exact


def lost(merge, before, exact):
    """‖x E‖ / ‖x ΔW‖ over x = left · z, z ~ N(0, I): inputs in the adapter's own space."""
    adapter = merge.adapters["it"].exact()
    x = drawn(4000, adapter.left().shape[-1], seed=9) @ orthonormal(adapter.left()).mT
    site = adapter.site
    error, update = site.to_matrix(merge.weight.double() - exact), site.to_matrix(exact - before)
    return float((x @ error).norm() / (x @ update).norm())


@pytest.mark.parametrize(
    ("width", "out", "r", "most"),
    [(384, 256, 8, 0.015), (1536, 96, 8, 0.01), (2048, 64, 32, 0.01), (384, 64, 64, 0.15)],
)
def test_adapter_rounding_keeps_what_nearest_loses(width, out, r, most):
    site = linear_site("x", width, out)
    kept, exact = merge_of(site, 1e-3, torch.bfloat16, r)
    before = kept.weight.double()
    entry = write_measured(kept, "adapter")["it"]
    near, _ = merge_of(site, 1e-3, torch.bfloat16, r)
    plain = write_measured(near, "nearest")["it"]
    assert lost(near, before, exact) > 0.4
    assert lost(kept, before, exact) < most
    assert entry["lost_adaptation"] == pytest.approx(lost(kept, before, exact), rel=0.1)
    assert plain["lost_adaptation"] == pytest.approx(lost(near, before, exact), rel=0.1)
    errors = [float((merge.weight.double() - exact).norm()) for merge in (kept, near)]
    assert errors[0] < 1.3 * errors[1] or r == 64
    assert (entry["rounding"], plain["rounding"]) == ("adapter", "nearest")


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("relative", [1e-4, 3e-4, 1e-3, 1e-2])
def test_adapter_rounding_never_loses_more_than_nearest(dtype, relative):
    site = linear_site("x", 256, 48)
    losses = {}
    for rounding in ("nearest", "adapter"):
        merge, exact = merge_of(site, relative, dtype)
        before = merge.weight.double()
        write_merge(merge, rounding)
        losses[rounding] = lost(merge, before, exact)
    assert losses["adapter"] <= losses["nearest"] / 2 or losses["adapter"] <= 0.01


def test_on_the_whole_layer_adapter_rounding_stays_below_the_rounding_of_bfloat16_itself():
    """Inputs as a layer sees them, noise with a part in the adapter's space: nearer to the exact layer; noise alone:
    the error of the weights stays far below what rounding the activations to bfloat16 makes."""
    site = linear_site("x", 768, 256)
    outputs = {}
    noise, part = drawn(512, 768, seed=5), drawn(512, 8, seed=6)
    for rounding in ("nearest", "adapter"):
        merge, exact = merge_of(site, 1e-3, torch.bfloat16)
        x = noise + 4 * part @ orthonormal(merge.adapters["it"].exact().left()).mT * 768**0.5 / 8**0.5
        write_merge(merge, rounding)
        error = (merge.weight.double() - exact).mT
        outputs[rounding] = [float((inputs @ error).norm() / (inputs @ exact.mT).norm()) for inputs in (x, noise)]
    rounded = noise @ exact.mT
    floor = float((rounded.bfloat16().double() - rounded).norm() / rounded.norm())
    assert outputs["adapter"][0] < 0.5 * outputs["nearest"][0]
    assert outputs["adapter"][1] < 0.7 * floor


def test_adapter_rounding_gives_values_of_the_grid_about_the_sum():
    site = linear_site("x", 256, 32)
    merge, exact = merge_of(site, 1e-3, torch.bfloat16)
    write_merge(merge, "adapter")
    step = 2.0 ** (torch.floor(torch.log2(exact.abs())) - 7)
    update = (exact - merge_of(site, 0.0, torch.bfloat16)[1]).abs().max()
    off = (merge.weight.double() - exact).abs()
    assert bool((off <= torch.maximum(step, 3 * update)).all())
    assert float((off <= step).double().mean()) > 0.9


LAYOUTS = {
    "in, out": Site("w", "", "w", (96, 40), Layout((0,), (1,))),
    "convolution": Site("w", "", "w", (24, 16, 3, 3), Layout((1, 2, 3), (0,))),
    "experts": Site("w", "", "w", (3, 96, 20), Layout((1,), (2,), (0,))),
    "split output": Site("w", "", "w", (4, 96, 5), Layout((1,), (2, 0))),
    "columns": replace(linear_site("x", 96, 40), columns=((3, 20), (30, 31))),
    "embedding": Site("w", "", "w", (50, 96), Layout((0,), (1,)), role="embedding"),
}


@pytest.mark.parametrize("rounding", ["nearest", "adapter", "stochastic"])
@pytest.mark.parametrize("site", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_is_folded_on_its_own_columns_alone(site, rounding):
    merge, exact = merge_of(site, 1e-2, torch.bfloat16, r=4)
    before = merge.weight.double()
    entry = write_measured(merge, rounding)["it"]
    torch.testing.assert_close(merge.weight.double(), exact, rtol=2**-6, atol=2e-3)
    assert torch.equal(merge.weight.double()[exact == before], before[exact == before])
    error, update = merge.weight.double() - exact, exact - before
    assert entry["delta_norm"] == pytest.approx(float(update.norm()), rel=1e-9)
    assert entry["rounding_error"] == pytest.approx(float(error.norm() / update.norm()), rel=1e-6)
    if rounding == "adapter":
        assert entry["lost_adaptation"] < 0.02


@pytest.mark.parametrize("site", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_lanes_and_space_are_the_update(site):
    adapter = merge_of(site, 1.0, torch.float32, r=4)[0].exact["it"]
    update = Update.of(adapter)
    delta = adapter.delta()
    turned = delta.mT if site.role == "embedding" else delta
    torch.testing.assert_close(update.space @ update.response, turned, rtol=1e-12, atol=1e-12)
    unit = torch.eye(4, dtype=torch.float64).expand(*site.batch_shape, 4, 4)
    torch.testing.assert_close(update.space.mT @ update.space, unit, rtol=1e-12, atol=1e-12)


def test_a_space_of_lower_rank_has_columns_of_zeros():
    columns = drawn(6, 2) @ drawn(2, 4, seed=1)
    basis = orthonormal(columns)
    assert torch.linalg.matrix_rank(basis) == 2
    torch.testing.assert_close(basis @ (basis.mT @ columns), columns, rtol=1e-12, atol=1e-12)
    assert not orthonormal(torch.zeros(5, 3, dtype=torch.float64)).any()


@pytest.mark.parametrize("rounding", ["nearest", "adapter", "stochastic"])
def test_no_update_changes_no_bit(rounding):
    model = Small().bfloat16()
    before = states(model)
    report = fold_adapters(adapt(model, LoRA(r=2)), rounding=rounding)
    assert states(model) == before
    assert report.to_dict()["lost_adaptation"] == 0


@pytest.mark.parametrize("rounding", ["adapter", "stochastic"])
def test_wide_weights_round_to_nearest_whatever_is_asked(rounding):
    models = [Small().float(), Small().float()]
    report = fold_adapters(randomised(adapt(models[0], LoRA(r=2))), rounding=rounding)
    fold_adapters(randomised(adapt(models[1], LoRA(r=2))))
    assert states(models[0]) == states(models[1])
    assert {entry["rounding"] for entry in report.sites} == {"nearest"}


@pytest.mark.parametrize("dtype", [*LOW, torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_neighbour_is_the_next_value_on_the_other_side(dtype):
    grid = torch.arange(2 ** (8 * dtype.itemsize) - 1).to(torch.int16 if dtype.itemsize == 2 else torch.uint8)
    values = grid.view(dtype).double()
    values = torch.unique(values[values.isfinite()])
    for below, above, nearer in ((0, 1, 0.25), (0, 1, 0.75)):
        low, high = values[below : -1 if above == 1 else None], values[above:]
        exact = low + (high - low) * nearer
        rounded = (low if nearer < 0.5 else high).float().to(dtype)
        other = high if nearer < 0.5 else low
        assert torch.equal(neighbour(rounded, exact).double(), other)
    top = values[-1:].float().to(dtype)
    assert not neighbour(top, top.double() * 1.01).double().isfinite()


def test_stochastic_rounding_is_unbiased_and_takes_only_the_two_values_around():
    exact = torch.tensor([1 + 2**-7 * 0.3, -3e-5, 0.0, 2.0, 1e-3], dtype=torch.float64)
    many = exact.expand(40_000, 5).clone()
    found = round_stochastically(many, torch.bfloat16, torch.Generator().manual_seed(1)).double()
    low, high = found.amin(0), found.amax(0)
    assert bool(((low <= exact) & (exact <= high)).all())
    assert [len(found[:, i].unique()) for i in range(5)] == [2, 2, 1, 1, 2]
    spread = (high - low) / 2 / 40_000**0.5
    assert bool(((found.mean(0) - exact).abs() <= 4 * spread).all())


def test_stochastic_folds_are_repeatable_by_seed():
    def folded(seed):
        model = Small().bfloat16()
        fold_adapters(randomised(adapt(model, LoRA(r=2))), rounding="stochastic", seed=seed)
        return states(model)

    assert folded(1) == folded(1)
    assert folded(1) != folded(2)
    model = Small().bfloat16()
    fold_adapters(randomised(adapt(model, LoRA(r=2))), rounding="stochastic")
    assert states(model) == folded(0), "a seed that isn't given is 0"


def test_a_fold_that_loses_the_adaptation_says_so():
    site = linear_site("linear", 64, 64)
    for rounding, loses in (("nearest", True), ("adapter", False)):
        model = nn.ModuleDict({"linear": nn.Linear(64, 64, bias=False)}).bfloat16()
        merge, _ = merge_of(site, 1e-3, torch.bfloat16, r=2)
        program = adapt(model, LoRA(r=2), [site])
        next(iter(program.adapters.values())).load_state_dict(merge.adapters["it"].state_dict())
        with torch.no_grad():
            model["linear"].weight.copy_(merge.weight)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = fold(model, rounding=rounding).to_dict()
        assert [str(one.message)[:42] for one in caught] == ["fold: rounding to the weights' dtype took "] * loses
        assert report["lost_adaptation"] == pytest.approx(report["sites"][0]["lost_adaptation"])
        assert (report["lost_adaptation"] > 0.3) == loses
        assert [(one.category, one.filename) for one in caught] == [(Lora2fxWarning, __file__)] * loses


@pytest.mark.parametrize(("lost", "warns"), [(0.05, False), (0.0501, True)])
def test_up_to_five_percent_may_be_lost_without_a_word(lost, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_lost(lost, 1)
    assert bool(caught) is warns


def test_a_rounding_of_another_name_is_refused_and_nothing_changes():
    model = Small().bfloat16()
    program = randomised(adapt(model, LoRA(r=2)))
    before = states(model)
    with pytest.raises(MethodError, match=r"rounding='up': choose one of 'nearest', 'adapter', 'stochastic'"):
        fold_adapters(program, rounding="up")
    assert states(model) == before


def test_overflow_at_the_top_of_the_range_stays_finite():
    total = torch.tensor([[65504.0], [65500.0], [-65504.0]])
    found = round_keeping(total, torch.full((3, 1), 3**-0.5), torch.ones(1), torch.float16)
    assert found.isfinite().all()


@pytest.mark.parametrize("k", [1, 8, 64, 200])
@pytest.mark.parametrize("shape", [(300, 257), (64, 65), (20, 9)])
def test_float32_is_added_to_in_one_rounding(shape, k):
    """|error| ≤ half a step of the sum + (k + 4) 2⁻²⁴ |left| |right|, and in blocks as in one product."""
    site = linear_site("x", shape[1], shape[0])
    merge, exact = merge_of(site, 0.05, torch.float32, r=k)
    left, right = merge.exact["it"].rows(), merge.exact["it"].right()
    reach = (left.abs() @ right.abs()).mT
    step = np.spacing(exact.abs().float().numpy()).astype(np.float64)
    plain = merge.weight + (left.float() @ right.float()).mT
    write_merge(merge)
    error = (merge.weight.double() - exact).abs().detach().numpy()
    assert (error <= 0.5 * step + (k + 4) * 2**-24 * reach.detach().numpy()).all()
    if k <= 128 and min(shape) >= 64:
        assert torch.equal(merge.weight, plain)


def test_float32_fold_keeps_the_outputs_to_a_millionth():
    model = Small()
    program = randomised(adapt(model.float(), LoRA(r=2)))
    x = drawn(3, 7, 4)
    adapted = Small()
    twin = randomised(adapt(adapted, LoRA(r=2)))
    with torch.no_grad():
        for name, adapter in twin.adapters.items():
            for own, value in zip(adapter.parameters(), program.adapters[name].parameters(), strict=True):
                own.copy_(value)
        for name, weight in adapted.named_parameters():
            if "lora2fx" not in name:
                weight.copy_(model.get_parameter(name))
        wanted = adapted(x)
    fold_adapters(program)
    torch.testing.assert_close(model.double()(x), wanted, rtol=1e-6, atol=1e-6)


def test_reduced_precision_of_the_users_products_and_autocast_stay_out(monkeypatch):
    wanted = merge_of(linear_site("x", 256, 256), 0.1, torch.float32)[0]
    write_merge(wanted)
    merge = merge_of(linear_site("x", 256, 256), 0.1, torch.float32)[0]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            write_merge(merge)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(merge.weight, wanted.weight)


@pytest.mark.parametrize("dtype", LOW)
def test_one_rounding_on_a_million_values(dtype):
    exact = drawn(200_000, seed=3) * 2.0 ** torch.randint(
        -30, 3, (200_000,), generator=torch.Generator().manual_seed(1)
    )
    ties = exact[:1000].to(dtype).double() + torch.finfo(dtype).smallest_normal * 2.0**-20
    found = round_once(torch.cat([exact, ties]), dtype).double()
    other = neighbour(found.to(dtype), torch.cat([exact, ties])).double()
    total = torch.cat([exact, ties])
    assert bool(((found - total).abs() <= (other - total).abs())[other.isfinite()].all())
