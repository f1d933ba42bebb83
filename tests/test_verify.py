"""Verification: a right rewrite passes at rounding error, every wrong one is caught and blamed on its own site."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lora2fx.errors import VerifyError
from lora2fx.inputs import Inputs
from lora2fx.methods.adalora import AdaLoRA
from lora2fx.methods.alora import ALoRA
from lora2fx.methods.lora import LoRA
from lora2fx.methods.lora2 import LoRA2
from lora2fx.methods.salora import SaLoRA
from lora2fx.methods.sora import SoRA
from lora2fx.passes import install
from lora2fx.passes.checks import shortened
from lora2fx.passes.outputs import difference, identical
from lora2fx.passes.probe import SIZE, randomise
from lora2fx.passes.verify import reference_outputs, verify_rewrites
from tests.programs import OUT_IN, SITES, Site, Small, adapt, small_inputs, states

LINEAR = Site("linear.weight", "linear", "weight", (4, 4), OUT_IN)
METHODS = {
    "lora2": LoRA2(r=3, k=2),
    "lora2 published": LoRA2.paper(r=3, k=2),
    "lora": LoRA(r=2, lora_dropout=0.3),
    "adalora": AdaLoRA(r=3, target_r=1),
    "sora": SoRA(r=3),
    "salora": SaLoRA(r=3),
    "alora": ALoRA(r=2),
}


@pytest.fixture
def tamper(monkeypatch):
    """Make an owner's generated forward wrong, in copies and wherever it is generated again too."""
    wrong, make = {}, install.adapted_class

    def tampered(original, recipe):
        return make(original, replace(recipe, source=wrong.get(recipe.source, recipe.source)))

    def change(program, path, old, new):
        owner = program.root.get_submodule(path)
        recipe = type(owner).recipe
        assert old in recipe.source, recipe.source
        wrong[recipe.source] = recipe.source.replace(old, new)
        owner.__class__ = tampered(type(owner).original_class, recipe)

    monkeypatch.setattr(install, "adapted_class", tampered)
    return change


def rewritten(method=METHODS["lora2"], model=None, sites=SITES, **options):
    model = Small() if model is None else model
    reference = reference_outputs(model, small_inputs())
    return adapt(model, method, sites, **options), reference


def failing(verification):
    return {(check["check"], check["mode"]) for check in verification.checks if not check["passed"]}


@pytest.mark.parametrize(
    ("method", "sites"),
    [(name, SITES[:3] if name == "lora" else SITES) for name in METHODS] + [("lora2", SITES[4:])],
    ids=[*METHODS, "lora2 on the root"],
)
def test_right_rewrites_pass_at_rounding_error(method, sites):
    program, reference = rewritten(METHODS[method], sites=sites)
    found = verify_rewrites(program, small_inputs(), reference)
    assert (found.status, found.failed) == ("passed", ())
    assert found.max_error < 1e-14
    assert [check["check"] for check in found.checks] == ["base"] * 2 + ["folded"] * 3 + ["gradient"] + ["masked"]
    assert not any(check["vacuous"] for check in found.checks)
    assert min(check["effect"] for check in found.checks if check["check"] == "folded") > 0.01
    bits = [check for check in found.checks if check["check"] in ("base", "masked")]
    assert {(check["error"], check["tolerance"], check["note"]) for check in bits} == {(0, 0, "")}
    assert [check["mode"] for check in bits] == ["eval", "train", "eval"]
    assert found.to_dict() == {"status": "passed", "max_error": found.max_error, "checks": list(found.checks)}


@pytest.mark.parametrize("rewrite", ["weight", "property"])
def test_every_rewrite_passes(rewrite):
    names = ["linear.lora2fx_weight", "fused.lora2fx_weight_key", "fused.lora2fx_weight_value", "conv.lora2fx_weight"]
    program, reference = rewritten(sites=SITES[:4], plans=dict.fromkeys(names, rewrite))
    found = verify_rewrites(program, small_inputs(), reference)
    assert (found.status, {adapter.rewrite for adapter in program.adapters.values()}) == ("passed", {rewrite})


ADD = "add = linear + type_as_2"
THOUSANDTH = "add = linear + (type_as_2 - 1e-3 * (type_as_2 - type_as_2.detach()))"
WRONG = {
    "a scale off by 1 in 1e6": ("linear", ADD, "add = linear + 1.000001 * type_as_2", "folded"),
    "an update left out": ("linear", ADD, "add = linear", "folded"),
    "another's columns": ("fused", "weight_key.columns", "weight_key.columns + 1", "folded"),
    "a mask that became a constant": ("conv", "mask = self.lora2fx_weight.mask", "mask = 1", "masked"),
    "a path without gradient": ("fused", "self.lora2fx_weight_value.u", "self.lora2fx_weight_value.u.data", "gradient"),
    "a gradient off by a thousandth": ("linear", ADD, THOUSANDTH, "gradient"),
    "a base that moved": ("conv", "bias = self.bias", "bias = self.bias + 1e-15", "base"),
    "a forward that raises": ("conv", "bias = self.bias", "bias = self.nowhere", "base"),
    "a shape that moved": ("linear", ADD, "add = (linear + type_as_2)[:1]", "base"),
    "a NaN": ("linear", ADD, "add = linear + type_as_2 + float('nan')", "base"),
}


@pytest.mark.parametrize(("path", "old", "new", "check"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_rewrite_is_caught_and_blamed_on_its_site(tamper, path, old, new, check):
    program, reference = rewritten()
    tamper(program, path, old, new)
    found = verify_rewrites(program, small_inputs(), reference)
    own = {name for name, adapter in program.adapters.items() if adapter.site.owner == path}
    assert found.status == "failed"
    assert check in {name for name, _ in failing(found)}
    assert set(found.failed) <= own and found.failed
    if check == "gradient":
        assert failing(found) == {("gradient", "eval with gradients")}
        assert len(found.failed) == 1, "a gradient tells the adapters of one owner apart"


@pytest.mark.parametrize(
    ("new", "note"),
    [
        ("add = (linear + type_as_2)[:1]", "outputs differ in number, shape or finiteness"),
        ("add = linear + type_as_2 + float('nan')", "outputs differ in number, shape or finiteness"),
        ("add = self.nowhere", "the rewritten model raises AttributeError: "),
    ],
    ids=["a shape", "a NaN", "an exception"],
)
def test_where_no_difference_can_be_told_a_note_says_why(tamper, new, note):
    program, reference = rewritten(sites=SITES[:1])
    tamper(program, "linear", ADD, new)
    for check in verify_rewrites(program, small_inputs(), reference).checks:
        if check["check"] == "folded":
            assert (check["passed"], check["error"]) == (False, None)
            assert check["note"].startswith(note)


def test_what_is_wrong_in_train_mode_only_is_caught(tamper):
    program, reference = rewritten()
    tamper(program, "", "drop = self.drop(norm)", "drop = norm")
    found = verify_rewrites(program, small_inputs(), reference)
    assert failing(found) == {("base", "train"), ("folded", "train")}
    assert found.failed == ("lora2fx_experts",)


def test_two_wrong_rewrites_are_both_named(tamper):
    program, reference = rewritten()
    tamper(program, "linear", ADD, "add = linear - type_as_2")
    tamper(program, "conv", "add = weight + type_as_1", "add = weight + 2 * type_as_1")
    found = verify_rewrites(program, small_inputs(), reference)
    assert set(found.failed) == {"linear.lora2fx_weight", "conv.lora2fx_weight"}
    assert found.to_dict()["failed"] == list(found.failed)


def snapshot(model):
    """All that verification must leave alone."""
    return {
        "values": states(model),
        "objects": [id(value) for value in (*model.parameters(), *model.buffers())],
        "gradients": [None if p.grad is None else p.grad.clone().tolist() for p in model.parameters()],
        "flags": [(module.training, type(module)) for module in model.modules()],
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "generators": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "global": (torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()),
    }


@pytest.mark.parametrize("wrong", [None, ("conv", "bias = self.bias", "bias = self.nowhere")], ids=["right", "raising"])
def test_everything_is_as_before(tamper, wrong):
    model = Small()
    model.norm.train()
    before = snapshot(model)
    reference = reference_outputs(model, small_inputs())
    assert snapshot(model) == before
    program = adapt(model, METHODS["lora2"])
    if wrong:
        tamper(program, *wrong)
    for adapter in program.adapters.values():
        adapter.lam.grad = torch.ones_like(adapter.lam)
    inputs = small_inputs()
    before, given = snapshot(model), inputs.args[0].clone()
    assert verify_rewrites(program, inputs, reference).status == ("failed" if wrong else "passed")
    assert snapshot(model) == before
    assert torch.equal(inputs.args[0], given)


def test_what_an_adapter_remembers_is_not_of_the_random_factors():
    program, reference = rewritten(METHODS["lora"], sites=SITES[:1])
    (adapter,) = program.adapters.values()

    class Remembering(type(adapter)):
        def right(self):
            self.remembered = super().right().detach().clone()
            return super().right()

    adapter.__class__ = Remembering
    assert verify_rewrites(program, small_inputs(), reference).status == "passed"
    assert torch.equal(adapter.remembered, type(adapter).__base__.right(adapter))


class Moody(nn.Module):
    """Raises in the nth call; moves a buffer, the train flag and every generator before."""

    def __init__(self, raises_in):
        super().__init__()
        self.linear = nn.Linear(4, 4).double()
        self.register_buffer("calls", torch.zeros(()))
        self.count, self.raises_in = itertools.count(1), raises_in  # an iterator goes on whatever is put back

    def forward(self, x):
        self.calls += 1
        self.calls = self.calls.clone()
        self.linear.train(not self.linear.training)
        random.random(), np.random.rand(), torch.rand(())
        if next(self.count) == self.raises_in:
            raise RuntimeError("no mood")
        return self.linear(x)


def test_a_raising_base_model_is_left_as_it_was():
    model = Moody(raises_in=2)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="no mood"):
        reference_outputs(model, small_inputs())
    assert snapshot(model) == before


def test_a_base_that_cannot_train_on_these_inputs_is_said():
    model = Moody(raises_in=3)
    reference = reference_outputs(model, small_inputs())
    assert set(reference.outputs) == {"eval", "eval with gradients"}
    found = verify_rewrites(adapt(model, METHODS["lora2"], [LINEAR]), small_inputs(), reference)
    assert found.status == "passed"
    assert [check["mode"] for check in found.checks if check["check"] == "base"] == ["eval", "eval with gradients"]
    skipped = found.checks[-1]
    assert (skipped["check"], skipped["mode"], skipped["passed"], skipped["vacuous"]) == ("all", "train", True, True)
    assert skipped["note"] == "the base model raises RuntimeError: no mood"


class Noisy(nn.Module):
    """Not the same twice."""

    def __init__(self, noise=1e-13):
        super().__init__()
        self.linear, self.noise = nn.Linear(4, 4).double(), noise
        self.generator = np.random.default_rng(0)

    def forward(self, x):
        return self.linear(x) * (1 + self.noise * self.generator.random())


def test_a_base_that_does_not_repeat_itself_is_compared_within_the_tolerance():
    model = Noisy()
    reference = reference_outputs(model, small_inputs())
    found = verify_rewrites(adapt(model, METHODS["lora2"], [LINEAR]), small_inputs(), reference)
    assert found.status == "passed"
    assert all("does not repeat itself" in check["note"] for check in found.checks if check["check"] == "base")


def test_no_adapter_is_blamed_for_a_base_that_repeats_itself_too_badly():
    program, reference = rewritten(model=Noisy(1e-6), sites=[LINEAR])
    found = verify_rewrites(program, small_inputs(), reference)
    assert (found.status, found.failed) == ("failed", ())
    assert {check for check, _ in failing(found)} >= {"base", "masked"}
    assert "failed" not in found.to_dict()


class Choosy(nn.Module):
    """Rounds otherwise by what needs gradients, as torch's attention and encoder layers do."""

    def __init__(self, by_hidden):
        super().__init__()
        self.linear, self.head, self.by_hidden = nn.Linear(4, 4).double(), nn.Linear(4, 4).double(), by_hidden

    def forward(self, x):
        hidden = self.linear(x)
        kernel = self.head.weight.requires_grad + 2 * (self.by_hidden and hidden.requires_grad)
        return self.head(hidden) * (1 + kernel * 2.0**-50)


FROZEN = "the bits of the frozen base"


@pytest.mark.parametrize(
    ("by_hidden", "rewrite", "status", "note"),
    [
        (False, "activation", "passed", FROZEN),
        (True, "weight", "passed", "the bits of the base with only the merged weights trained"),
        (True, "activation", "failed", "not bit-equal"),
    ],
)
def test_bits_of_a_kernel_that_torch_chooses_by_what_needs_gradients_are_the_bases(by_hidden, rewrite, status, note):
    plans = {"linear.lora2fx_weight": rewrite}
    program, reference = rewritten(model=Choosy(by_hidden), sites=[LINEAR], plans=plans)
    found = verify_rewrites(program, small_inputs(), reference)
    assert found.status == status
    checks = [check for check in found.checks if check["check"] in ("base", "masked")]
    assert len(checks) == 3
    for check in checks:
        expected, passes = (FROZEN, True) if check["mode"] == "eval" else (note, status == "passed")
        assert check["note"].startswith(expected)
        assert check["passed"] is passes


class Starved(nn.Module):
    """Runs out of memory in the nth call of it and its copies; can't be differentiated in eval mode."""

    calls, starves_in = itertools.count(), -1

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4).double()

    def forward(self, x):
        if next(self.calls) == self.starves_in:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        hidden = self.linear(x)
        out = hidden * hidden
        if not self.training:
            hidden.mul_(1.0)
        return out


def test_memory_that_runs_out_is_no_finding(monkeypatch):
    model = Starved()
    program, reference = rewritten(model=model, sites=[LINEAR])
    before = snapshot(model)
    for starves_in in itertools.count():
        monkeypatch.setattr(Starved, "calls", itertools.count())
        monkeypatch.setattr(Starved, "starves_in", starves_in)
        try:
            found = verify_rewrites(program, small_inputs(), reference)
        except torch.OutOfMemoryError:
            assert snapshot(model) == before
        else:
            break
    assert next(Starved.calls) == starves_in > 10, "every call's was passed on"
    assert found.status == "passed"


class Hidden(nn.Module):
    """One weight that hardly shows in the output, and one that does not at all."""

    def __init__(self, size=1e-12):
        super().__init__()
        self.faint, self.unused, self.size = nn.Linear(4, 4).double(), nn.Linear(4, 4).double(), size

    def forward(self, x):
        self.unused(x)
        return x + self.size * self.faint(x)


def test_a_check_that_shows_nothing_says_so():
    model = Hidden()
    sites = [Site(f"{name}.weight", name, "weight", (4, 4), OUT_IN) for name in ("faint", "unused")]
    program, reference = rewritten(model=model, sites=sites)
    found = verify_rewrites(program, small_inputs(), reference)
    checks = {(check["check"], check["mode"]): check for check in found.checks}
    assert found.status == "passed"
    assert checks["folded", "eval"]["vacuous"]
    assert "hardly changes the outputs" in checks["folded", "eval"]["note"]
    assert checks["gradient", "eval with gradients"]["note"].startswith(
        "no finite gradient above rounding reaches unused.lora2fx_weight"
    )


def test_gradients_of_what_is_never_used_show_nothing():
    sites = [Site("unused.weight", "unused", "weight", (4, 4), OUT_IN)]
    program, reference = rewritten(model=Hidden(), sites=sites)
    found = verify_rewrites(program, small_inputs(), reference)
    (gradient,) = [check for check in found.checks if check["check"] == "gradient"]
    assert (gradient["passed"], gradient["vacuous"], gradient["error"]) == (True, True, 0.0)


class Ranking(nn.Module):
    """Returns integers too."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4).double()

    def forward(self, x):
        found = self.linear(x)
        return found, found.argmax(-1)


@pytest.mark.parametrize(("factor", "status"), [("1", "passed"), ("1.000001", "failed")])
def test_integers_among_the_outputs_widen_no_tolerance(tamper, factor, status):
    program, reference = rewritten(model=Ranking(), sites=[LINEAR])
    tamper(program, "linear", ADD, f"add = linear + {factor} * type_as_2")
    found = verify_rewrites(program, small_inputs(), reference)
    assert found.status == status
    assert {check["tolerance"] for check in found.checks if check["check"] == "folded"} == {1e-10}


def test_what_the_outputs_do_not_show_the_gradient_does(tamper):
    program, reference = rewritten(model=Hidden(), sites=[Site("faint.weight", "faint", "weight", (4, 4), OUT_IN)])
    tamper(program, "faint", ADD, "add = linear + 1.1 * type_as_2")
    found = verify_rewrites(program, small_inputs(), reference)
    assert failing(found) == {("gradient", "eval with gradients")}
    assert found.failed == ("faint.lora2fx_weight",)


@pytest.mark.parametrize(("tolerances", "status"), [(99.5, "passed"), (100.5, "failed")])
def test_gradients_may_be_off_by_a_hundred_tolerances(tamper, tolerances, status):
    program, reference = rewritten(sites=SITES[:1])
    off = f"add = linear + (type_as_2 - {tolerances}e-10 * (type_as_2 - type_as_2.detach()))"
    tamper(program, "linear", ADD, off)
    found = verify_rewrites(program, small_inputs(), reference)
    (gradient,) = [check for check in found.checks if check["check"] == "gradient"]
    assert gradient["error"] == pytest.approx(tolerances * 1e-10, rel=1e-4)
    assert (gradient["tolerance"], found.status) == (pytest.approx(1e-8), status)


@pytest.mark.parametrize(("tolerances", "vacuous"), [(4.5, True), (5.5, False)])
def test_what_changes_the_outputs_by_less_than_five_tolerances_shows_nothing(tolerances, vacuous):
    def folded(size):
        model = Hidden(size)
        program, reference = rewritten(model=model, sites=[Site("faint.weight", "faint", "weight", (4, 4), OUT_IN)])
        return verify_rewrites(program, small_inputs(), reference).checks[2]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        effect = folded(1e-9)["effect"]
        torch.manual_seed(0)
        found = folded(1e-9 * tolerances * 1e-10 / effect)
    assert (found["check"], found["effect"]) == ("folded", pytest.approx(tolerances * 1e-10, rel=1e-4))
    assert found["vacuous"] is vacuous
    assert bool(found["note"]) is vacuous


def test_of_many_names_five_are_shown():
    assert shortened(list("abcde")) == "a, b, c, d, e"
    assert shortened(list("abcdefg")) == "a, b, c, d, e and 2 more"


class One(nn.Module):
    """One linear map, the same each time it is made."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.linear = nn.Linear(4, 4).double()

    def forward(self, x):
        return self.linear(x)


def first_entries(draws):
    """Of `u` under the random factors of these draws: what tells a forward which ones it runs with."""
    (adapter,) = rewritten(model=One(), sites=[LINEAR])[0].adapters.values()
    for draw in draws:
        randomise(adapter, One().linear.weight, torch.Generator().manual_seed(draw))
        yield adapter.u.flatten()[0].item()


@pytest.mark.parametrize(
    ("draws", "wrong", "status", "error"),
    [
        ([1], "type_as_2.detach()", "passed", 0.0),
        ([1, 2], "type_as_2.detach()", "passed", 0.0),
        ([1, 2, 3], "type_as_2.detach()", "failed", 0.25),
        ([1], "4 * type_as_2.detach()", "failed", 1.0),
        ([1], "self.nothing", "failed", None),
    ],
    ids=["once", "twice", "thrice", "by more than half", "an exception"],
)
def test_one_rounding_that_turns_a_relu_over_is_no_wrong_rewrite(tamper, draws, wrong, status, error):
    """It shows with some random factors only, and changes a result by less than half of its size."""
    program, reference = rewritten(model=One(), sites=[LINEAR])
    here = f"self.lora2fx_weight.u.flatten()[0].item() in {list(first_entries(draws))}"
    tamper(program, "linear", ADD, f"add = linear + type_as_2 + ({wrong} if {here} else 0)")
    found = verify_rewrites(program, small_inputs(), reference)
    assert found.status == status
    assert found.max_error == (None if error is None else pytest.approx(error, rel=0.3, abs=1e-15))


class Amplifying(nn.Module):
    """Turns the last bits of its hidden layer into visible differences."""

    def __init__(self, size=3e3):
        super().__init__()
        self.linear, self.size = nn.Linear(4, 6), size

    def forward(self, x):
        return torch.sin(self.size * self.linear(x))


@pytest.mark.parametrize(("new", "status"), [(ADD, "passed"), ("add = linear + type_as_2.detach()", "failed")])
def test_gradients_may_be_off_by_the_models_noise_but_not_missing(tamper, new, status):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Amplifying(1e6)
    inputs = small_inputs(torch.float32)
    reference = reference_outputs(model, inputs)
    program = adapt(model, METHODS["lora2"], SITES[:1])
    tamper(program, "linear", ADD, new)
    found = verify_rewrites(program, inputs, reference)
    (gradient,) = [check for check in found.checks if check["check"] == "gradient"]
    assert (found.status, gradient["passed"]) == (status, status == "passed")
    assert 1e-3 == gradient["tolerance"] < gradient["error"]


@pytest.mark.parametrize(("new", "status"), [(None, "passed"), ("add = linear - type_as_2", "failed")])
def test_a_model_that_amplifies_rounding_is_judged_by_its_own_noise(tamper, new, status):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Amplifying()
    inputs = small_inputs(torch.float32)
    reference = reference_outputs(model, inputs)
    program = adapt(model, METHODS["lora2"], SITES[:1])
    if new:
        tamper(program, "linear", ADD, new)
    found = verify_rewrites(program, inputs, reference)
    assert found.status == status
    folded = [check for check in found.checks if check["check"] == "folded"]
    assert all(check["error"] > 1e-5 and 1e-5 < check["tolerance"] < 0.2 for check in folded)


def test_adapters_that_start_away_from_zero_are_refused():
    program, reference = rewritten()
    with torch.no_grad():
        program.adapters["conv.lora2fx_weight"].V.fill_(1)
    with pytest.raises(VerifyError, match=r"conv\.lora2fx_weight: ΔW is not 0 before training"):
        verify_rewrites(program, small_inputs(), reference)


def test_factors_that_cancel_are_zero_too():
    program, reference = rewritten(METHODS["lora"], sites=SITES[:1])
    (adapter,) = program.adapters.values()
    with torch.no_grad():
        adapter.A.fill_(1.0)
        adapter.B.copy_(torch.tensor([1.0, -1.0]).expand(6, 2))
    assert verify_rewrites(program, small_inputs(), reference).status == "passed"


def test_a_model_that_cannot_be_copied_is_refused_with_the_way_out():
    program, reference = rewritten()
    program.root.stream = (item for item in ())
    with pytest.raises(VerifyError, match=r"Small can't be copied .*generator.* verify=False"):
        verify_rewrites(program, small_inputs(), reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_dtypes_pass_with_their_own_tolerance(tamper, dtype):
    model = Small().to(dtype)
    inputs = small_inputs(dtype)
    reference = reference_outputs(model, inputs)
    program = adapt(model, METHODS["lora2"])
    found = verify_rewrites(program, inputs, reference)
    assert found.status == "passed"
    (gradient,) = [check for check in found.checks if check["check"] == "gradient"]
    assert gradient["tolerance"] == pytest.approx({torch.float32: 1e-3, torch.float16: 0.2, torch.bfloat16: 0.5}[dtype])
    tamper(program, "linear", ADD, "add = linear - type_as_2")
    found = verify_rewrites(program, inputs, reference)
    assert (found.status, found.failed) == ("failed", ("linear.lora2fx_weight",))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("site", SITES, ids=[f"{site.weight} {site.role}" for site in SITES])
def test_random_factors_have_the_announced_size(method, site):
    model = Small()
    adapter = method.adapter(site).double()
    weight = model.get_parameter(site.weight)
    randomise(adapter, weight, torch.Generator().manual_seed(0))
    assert (adapter.delta().norm() / weight.norm()).item() == pytest.approx(SIZE, rel=1e-9)


def test_outputs_with_infinities_are_compared_where_they_are_finite():
    a = torch.tensor([1.0, -float("inf"), float("nan")])
    b = torch.tensor([1.5, -float("inf"), float("nan")])
    assert identical([a], [a.clone()]) and not identical([a], [b])
    assert difference([a], [b]) == pytest.approx(0.5 / 1.5)
    assert difference([b.nan_to_num()], [b]) == float("inf")
    assert difference([a], [a, a]) == float("inf")
    assert difference([torch.tensor([1, 2])], [torch.tensor([1, 3])]) == 0


def test_inputs_that_the_forward_changes_are_the_same_in_every_run():
    class Eager(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4).double()

        def forward(self, x, cache):
            x.add_(1)
            cache.append(x)
            return self.linear(x) * len(cache)

    model, inputs = Eager(), Inputs((torch.ones(2, 4).double(), []))
    reference = reference_outputs(model, inputs)
    program = adapt(model, METHODS["lora2"], [LINEAR])
    assert verify_rewrites(program, inputs, reference).status == "passed"
    assert inputs.args[1] == [] and torch.equal(inputs.args[0], torch.ones(2, 4).double())


class Caching(nn.Module):
    """In eval mode it writes what its own backward needs, as a cache does; in train mode it does not."""

    def __init__(self, always=False):
        super().__init__()
        self.linear, self.always = nn.Linear(4, 4).double(), always

    def forward(self, x):
        hidden = self.linear(x)
        out = hidden * hidden
        if self.always or not self.training:
            hidden.mul_(1.0)
        return out


@pytest.mark.parametrize(("always", "mode"), [(False, "train"), (True, "eval with gradients")])
def test_gradients_are_compared_where_the_model_can_be_differentiated(always, mode):
    program, reference = rewritten(model=Caching(always), sites=[LINEAR])
    found = verify_rewrites(program, small_inputs(), reference)
    (gradient,) = [check for check in found.checks if check["check"] == "gradient"]
    assert found.status == "passed"
    assert (gradient["mode"], gradient["vacuous"]) == (mode, always)
    assert ("can't be differentiated: RuntimeError" in gradient["note"]) is always


def test_gradients_that_underflow_are_said_to_show_nothing():
    model = nn.Sequential(*[nn.Linear(4, 4).double() for _ in range(3)], Vanishing())
    sites = [Site(f"{i}.weight", str(i), "weight", (4, 4), OUT_IN) for i in range(3)]
    program, reference = rewritten(model=model, sites=sites)
    found = verify_rewrites(program, small_inputs(), reference)
    assert found.status == "passed"
    assert any("no finite gradient above rounding reaches 0.lora2fx_weight" in check["note"] for check in found.checks)


class Vanishing(nn.Module):
    def forward(self, x):
        return x * 1e-60 + 1
