"""Folding: W + ΔW in float64, rounded once, all or nothing, and nothing else is left of the adapters."""

import copy
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import nn

from lora2fx.errors import AdapterError, Lora2fxWarning, ScheduleError
from lora2fx.folding import fold
from lora2fx.methods.lora import LoRA
from lora2fx.methods.lora2 import LoRA2
from lora2fx.passes.fold import _fits, finished, fold_adapters
from lora2fx.passes.merging import Merge, is_foldable, largest
from lora2fx.passes.rounding import round_once
from lora2fx.passes.tiles import Factors, tiles
from lora2fx.program import program_of
from lora2fx.site import Layout, Site
from tests.adapted import linear_site
from tests.programs import FUSED, Small, adapt, randomised, small_inputs, states


def exact_weights(program):
    """W + ΣΔW in float64 by weight, from the definition: left · diag(gate) · right on the site's own columns."""
    found = {}
    for adapter in program.adapters.values():
        site = adapter.site
        weight = program.root.get_submodule(site.owner)._parameters[site.parameter].detach().double()
        total = found.get(site.weight, weight.clone())
        double = copy.deepcopy(adapter).double()
        left, gate, right = double.left().detach(), double.gate().detach(), double.right().detach()
        delta = torch.einsum("...ik,...k,...ko->...io", left, gate.expand(*left.shape[:-2], -1), right)
        matrix = torch.zeros(*site.batch_shape, site.in_features, site.weight_out_features, dtype=torch.float64)
        columns = range(site.weight_out_features) if site.columns is None else site.column_index()
        matrix[..., torch.as_tensor(list(columns))] = delta
        found[site.weight] = total + site.from_matrix(matrix)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_is_the_exact_sum_rounded_once(dtype):
    model = Small().to(dtype)
    program = randomised(adapt(model, LoRA2(r=3, k=2)))
    wanted = {name: value.to(dtype) for name, value in exact_weights(program).items()}
    fold_adapters(program)
    state = model.state_dict()
    for name, value in wanted.items():
        close = torch.finfo(dtype).eps if dtype.itemsize > 2 else 0  # 16 bits: one rounding hides the sum's order
        torch.testing.assert_close(state[name], value, rtol=2 * close, atol=close / 8)


def test_fold_leaves_the_plain_model_with_its_own_objects():
    base = Small()
    model = copy.deepcopy(base)
    model.linear.bias.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    identities = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    program = randomised(adapt(model, LoRA(r=2)))
    with torch.no_grad():
        adapted = model(*small_inputs().args)
    report = fold_adapters(program)
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert list(model.state_dict()) == list(base.state_dict())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert {name: (p, p.data_ptr()) for name, p in model.named_parameters()} == identities
    torch.testing.assert_close(model(*small_inputs().args), adapted, rtol=1e-12, atol=1e-12)
    assert {entry["weight"] for entry in report.sites} == {site.weight for site in program.sites}
    with pytest.raises(AdapterError, match="fold: Small holds no adapters"):
        program_of(model, "fold")


def test_train_flags_stay():
    model = Small().train()
    model.linear.eval()
    flags = [module.training for module in model.modules()]
    fold_adapters(randomised(adapt(model, LoRA(r=2))))
    assert [module.training for module in model.modules()] == flags


def test_adapters_of_one_fused_weight_are_added_before_one_rounding():
    model = nn.ModuleDict({"fused": nn.Linear(4, 6, bias=False)}).bfloat16()
    program = randomised(adapt(model, LoRA(r=2), FUSED))
    wanted = exact_weights(program)["fused.weight"]
    before = model["fused"].weight.detach().clone()
    fold_adapters(program)
    assert torch.equal(model["fused"].weight, wanted.bfloat16())
    assert torch.equal(model["fused"].weight[2:3], before[2:3])


def test_zero_updates_change_no_bit():
    model = Small().bfloat16()
    before = states(model)
    report = fold_adapters(adapt(model, LoRA(r=2)))
    assert states(model) == before
    assert all(entry["rank"] == 0 and entry["rounding_error"] == 0 for entry in report.sites)


def test_report_holds_norms_ranks_and_rounding_errors():
    model = Small().bfloat16()
    program = randomised(adapt(model, LoRA2(r=3, k=2)))
    before = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    wanted = exact_weights(program)
    report = fold_adapters(program)
    assert [entry["slice"] for entry in report.sites] == [None, [[0, 2]], [[3, 4], [5, 6]], None, None]
    for entry, site in zip(report.sites, program.sites, strict=True):
        name, columns = entry["weight"], site.column_index()
        own = slice(None) if columns is None else columns
        norm = float(site.to_matrix(wanted[name] - before[name])[..., own].norm())
        lost = float(site.to_matrix(model.state_dict()[name].double() - wanted[name])[..., own].norm())
        assert entry["delta_norm"] == pytest.approx(norm, rel=1e-9)
        assert entry["rounding_error"] == pytest.approx(lost / norm, rel=1e-6)
        assert (entry["r"], entry["active"], entry["rank"]) == (3, 3, 2)
        assert len(entry["lambda"]) == 3
    assert report.to_dict()["max_rounding_error"] == max(entry["rounding_error"] for entry in report.sites)
    assert report.totals["base_parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_factor_is_refused_and_nothing_changes(value):
    model = Small()
    program = randomised(adapt(model, LoRA(r=2)))
    with torch.no_grad():
        program.adapters["conv.lora2fx_weight"].A.view(-1)[1] = value
    before = states(model)
    with pytest.raises(AdapterError, match=r"A of the adapter conv\.lora2fx_weight on conv\.weight holds NaN or inf"):
        fold_adapters(program)
    assert states(model) == before
    assert len(program_of(model, "fold").adapters) == len(program.adapters)


def test_a_sum_that_overflows_is_refused_and_nothing_changes():
    model = Small().half()
    program = randomised(adapt(model, LoRA(r=2)))
    with torch.no_grad():
        program.adapters["conv.lora2fx_weight"].B.mul_(1e6)
    before = states(model)
    with pytest.raises(AdapterError, match=r"conv\.weight \(conv\): W \+ ΔW leaves torch\.float16"):
        fold_adapters(program)
    assert states(model) == before


def test_a_factor_bound_above_the_range_alone_is_no_overflow():
    model = nn.ModuleDict({"fused": nn.Linear(4, 6, bias=False)}).half()
    program = adapt(model, LoRA(r=2), FUSED[:1])
    adapter = next(iter(program.adapters.values()))
    with torch.no_grad():
        adapter.A.zero_()
        adapter.A[0, 0], adapter.B[0, 1] = 1e5, 1e5
    fold_adapters(program)
    assert model["fused"].weight.isfinite().all()


def test_a_non_finite_base_weight_is_named_as_the_cause():
    model = Small()
    program = randomised(adapt(model, LoRA(r=2)))
    with torch.no_grad():
        model.conv.weight[0, 0, 0] = float("inf")
    with pytest.raises(AdapterError, match=r"conv\.weight .*: the base weight holds NaN or infinity"):
        fold_adapters(program)


def test_a_weight_that_cannot_be_written_is_refused():
    model = Small()
    program = randomised(adapt(model, LoRA(r=2)))
    weight = model.conv.weight.detach()
    model.conv._parameters["weight"] = nn.Parameter((weight * 10).to(torch.int8), requires_grad=False)
    with pytest.raises(AdapterError, match=r"conv\.weight .* is a torch\.int8 .*dequantise"):
        fold_adapters(program)
    model.conv._parameters["weight"] = nn.Parameter(weight.to("meta"))
    with pytest.raises(AdapterError, match=r"conv\.weight .* on meta"):
        fold_adapters(program)


def driven(program, done, total, skipped=0):
    for adapter in program.adapters.values():
        adapter.progress.copy_(torch.tensor([done, total, skipped]))
    return program


@pytest.mark.parametrize(("done", "total", "reason"), [(0, 0, "never driven"), (40, 100, "ended early")])
def test_an_unfinished_schedule_is_refused_unless_asked_for(done, total, reason):
    model = Small()
    program = driven(randomised(adapt(model, LoRA2(r=3, k=2, target_r=1))), done, total)
    before = states(model)
    with pytest.raises(ScheduleError, match=rf"{reason}.*strict=False"):
        fold_adapters(program)
    assert states(model) == before
    with pytest.warns(Lora2fxWarning, match=reason) as caught:
        fold(model, strict=False)
    assert [one.filename for one in caught] == [__file__], "a warning names the line that called"
    assert type(model.linear) is nn.Linear


def test_without_a_schedule_no_adapter_is_copied():
    program = adapt(Small(), LoRA(r=2))
    assert finished(program) is program


def test_the_last_allocation_of_an_unfinished_schedule_is_what_is_folded():
    """Between two mask events every λ is alive: a checkpoint from there is pruned only by folding."""
    model, expected = Small(), Small()
    method = LoRA2(r=3, k=2, target_r=1)
    program = driven(randomised(adapt(model, method)), 40, 100)
    for adapter in program.adapters.values():
        adapter.keep.copy_(torch.tensor([True, False, True]))
    cut = driven(randomised(adapt(expected, method)), 100, 100)
    with torch.no_grad():
        for adapter in cut.adapters.values():
            adapter.lam[..., 1] = 0
    fold_adapters(cut)
    program.adapters["linear.lora2fx_weight"].u.data[0, 0] = torch.nan
    before = states(model)
    with pytest.raises(AdapterError, match="holds NaN"):
        fold_adapters(program, strict=False)
    assert states(model) == before
    randomised(program)
    with pytest.warns(Lora2fxWarning, match=r"keeps 10 on the axis 'lambda' \(of a final budget of 5\), 10 on"):
        report = fold_adapters(program, strict=False)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-15)
    assert report.totals["kept"] == {"lambda": 10, "columns": 10}
    assert all(site["active"] == 2 for site in report.sites)


def test_a_finished_schedule_folds_and_reports_its_budget():
    program = driven(randomised(adapt(Small(), LoRA2(r=3, k=2, target_r=1))), 100, 100)
    report = fold_adapters(program)
    assert report.totals["budget"] == len(program.adapters)
    assert all(len(entry["importance"]) == 3 for entry in report.sites)


@pytest.mark.parametrize(("shapes", "fits"), [([(2**26,)], True), ([(2**26 + 1,)], False), ([(2**25,)] * 3, False)])
def test_weights_are_kept_twice_up_to_256_mib_of_all_together(shapes, fits):
    weights = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    assert _fits([Merge(weight, {}) for weight in weights]) is fits


class Special(torch.Tensor):
    """As those that quantise or shard."""


@pytest.mark.parametrize(
    ("weight", "foldable"),
    [
        (torch.eye(3), True),
        (torch.eye(3).as_subclass(Special), False),
        (torch.eye(3).to_sparse(), False),
        (torch.eye(3, device="meta"), False),
        (torch.eye(3, dtype=torch.int8), False),
    ],
    ids=["dense", "a subclass", "sparse", "meta", "integers"],
)
def test_only_plain_dense_floating_point_tensors_are_added_to(weight, foldable):
    assert is_foldable(weight) is foldable


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2],
    ids=str,
)
def test_the_largest_magnitude_of_a_weight_in_every_dtype(dtype):
    assert largest(torch.tensor([[0.5, -3.0], [2.0, 1.0]]).to(dtype)).item() == 3.0
    assert largest(torch.tensor([0.5, torch.nan]).to(dtype)).isnan()


def test_factors_are_multiplied_where_the_weight_is():
    """As where a model is spread over devices; the meta device stands for a second one."""
    adapter = LoRA(r=2).adapter(linear_site("linear", 4, 6))
    merge = Merge(nn.Parameter(torch.empty(6, 4, device="meta")), {"linear": adapter})
    assert {parameter.device.type for parameter in merge.exact["linear"].parameters()} == {"meta"}
    assert {parameter.device.type for parameter in adapter.parameters()} == {"cpu"}


def test_a_program_without_adapters_loses_nothing():
    model = Small()
    program, before = adapt(model, LoRA(r=2), sites=()), states(model)
    details = fold_adapters(program).details
    assert (details["max_rounding_error"], details["lost_adaptation"]) == (0.0, 0.0)
    assert states(model) == before


def test_trained_heads_stay_trained():
    model = Small()
    program = randomised(adapt(model, LoRA(r=2), modules_to_save=("head",)))
    with torch.no_grad():
        model.head.weight.add_(1)
    trained = model.head.weight.detach().clone()
    fold_adapters(program)
    assert torch.equal(model.head.weight, trained)


def nearest(exact: float, candidates: list[float]) -> float:
    """The candidate closest to the exact value; of two equally close ones, None decides: neither is wrong."""
    return min(candidates, key=lambda value: abs(Fraction(value) - Fraction(exact)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_next_to_a_tie_goes_to_the_nearest_value(dtype):
    torch.manual_seed(0)
    low = (torch.randn(300) * 2 ** torch.randint(-3, 4, (300,))).to(dtype)
    high = (low.view(torch.int16) + 1).view(dtype)
    for nudge in (1 + 2**-40, 1 - 2**-40):  # invisible in float32, so that rounding by way of it would tie
        middle = (low.double() + high.double()) / 2 * nudge
        found = round_once(middle, dtype)
        for value, a, b, rounded in zip(middle.tolist(), low.tolist(), high.tolist(), found.tolist(), strict=True):
            assert rounded == nearest(value, [a, b])


def test_rounding_keeps_what_has_no_rounding():
    special = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0, 1e300, 1.5, -2.0], dtype=torch.float64)
    assert torch.equal(round_once(special, torch.bfloat16), special.bfloat16())
    assert round_once(torch.tensor(float("nan"), dtype=torch.float64), torch.float16).isnan()


LAYOUTS = {
    "out, in": ((6, 4), Layout((1,), (0,))),
    "in, out": ((4, 6), Layout((0,), (1,))),
    "convolution": ((5, 3, 2, 2), Layout((1, 2, 3), (0,))),
    "experts": ((3, 4, 5), Layout((1,), (2,), (0,))),
    "experts in the middle": ((4, 3, 5), Layout((0,), (2,), (1,))),
    "heads of two batches": ((2, 3, 4, 5), Layout((2,), (3,), (0, 1))),
    "turned batches": ((5, 3, 4, 2), Layout((2,), (0,), (3, 1))),
    "split output": ((3, 4, 5), Layout((1,), (2, 0))),
    "split input": ((3, 4, 5), Layout((2, 0), (1,))),
}


@pytest.mark.parametrize("limit", [1, 7, 10**6])
@pytest.mark.parametrize(("shape", "layout"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_tiles_cover_the_update_once_in_any_layout(shape, layout, limit):
    site = Site("weight", "", "weight", shape, layout)
    if not layout.batch:
        site = replace(site, columns=((0, 1), (2, site.weight_out_features)))
    torch.manual_seed(0)
    adapter = LoRA(r=2).adapter(site).double()
    nn.init.normal_(adapter.B)
    factors, seen = Factors([adapter.exact()], torch.float64), torch.zeros(shape)
    wanted = adapter.weight_delta().detach()
    for tile in tiles(shape, limit):
        assert seen[tile].numel() <= limit
        seen[tile] += 1
        torch.testing.assert_close(factors.tile(tile).detach(), wanted[tile], rtol=1e-13, atol=1e-13)
    assert torch.equal(seen, torch.ones(shape))
    assert float(wanted.abs().max()) <= float(factors.largest()) * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_tiles_fold_to_the_same_bits_and_report(dtype, monkeypatch):
    models = [Small().to(dtype), Small().to(dtype)]
    reports = [fold_adapters(randomised(adapt(models[0], LoRA2(r=3, k=2))))]
    monkeypatch.setattr("lora2fx.passes.tiles.TILE", 16)
    reports.append(fold_adapters(randomised(adapt(models[1], LoRA2(r=3, k=2)))))
    if dtype == torch.bfloat16:
        assert states(models[0]) == states(models[1])
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=2**-22, atol=2**-22)
    for a, b in zip(reports[0].sites, reports[1].sites, strict=True):
        assert a["rounding_error"] == pytest.approx(b["rounding_error"], rel=1e-9 if dtype == torch.bfloat16 else 0.1)
        assert a["delta_norm"] == pytest.approx(b["delta_norm"], rel=1e-9)


def test_tiles_of_nothing_are_none():
    assert list(tiles((0, 4), 8)) == []
