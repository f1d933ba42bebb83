"""Everything that users do in the wrong order or to the wrong model: defined, and documented by its message."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import lora2fx
from lora2fx import AdaLoRA, ALoRA, LoRA, LoRA2, SaLoRA, SoRA
from lora2fx.errors import AdapterError, FormatError, InputsError, MethodError, RewriteError, ScheduleError, TargetError
from tests.faults import differences, everything

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
X = torch.linspace(-1, 1, 24).view(4, 6)
EVERY = [LoRA(r=2), AdaLoRA(r=2), SoRA(r=2), SaLoRA(r=2), ALoRA(r=1), LoRA2(r=2, k=2)]


pytestmark = pytest.mark.filterwarnings(
    "ignore:Initializing zero-element tensors", "ignore:folding an unfinished schedule:lora2fx.Lora2fxWarning"
)


def net(width=9):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 6)).eval()


def adapted(method=None, model=None, **options):
    model = net() if model is None else model
    return lora2fx.transform(
        model, ["0", "2"], LoRA(r=2) if method is None else method, example_inputs=(X,), seed=0, **options
    )


def randomised(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


def folded():
    model = adapted()
    lora2fx.fold(model)
    return model


def saved(folder):
    lora2fx.save(randomised(adapted()), folder)
    return folder


def with_value(value):
    model = net()
    model[2].weight.data[0, 0] = value
    return model


def replaced():
    model = adapted()
    model[0].weight = nn.Parameter(torch.zeros(10, 6))
    return model


def diverged():
    model = randomised(adapted())
    model[0].lora2fx_weight.B.data[0, 0] = float("nan")
    return model


def tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    return model


def unfinished():
    model = adapted(AdaLoRA(r=2, target_r=1))
    lora2fx.attach(model, optimizer_of(model), 10)
    return model


def attached_again(model):
    optimizer = optimizer_of(model)
    first = lora2fx.attach(model, optimizer, 10)
    try:
        lora2fx.attach(model, optimizer, 10)
    finally:
        first.detach()


def integers():
    model = net()
    model[0].weight = nn.Parameter(torch.ones(9, 6, dtype=torch.int8), requires_grad=False)
    return model


# (what is built, what is done to it, the error, how its message begins or what it says)
CASES = {
    "transform twice": (adapted, lambda m, _: adapted(model=m), AdapterError, "already holds adapters"),
    "load into an adapted model": (
        adapted,
        lambda m, f: lora2fx.load(m, saved(f)),
        AdapterError,
        "already holds adapters",
    ),
    "fold twice": (folded, lambda m, _: lora2fx.fold(m), AdapterError, "holds no adapters"),
    "unload after fold": (folded, lambda m, _: lora2fx.unload(m), AdapterError, "holds no adapters"),
    "attach after fold": (
        folded,
        lambda m, _: lora2fx.attach(m, optimizer_of(m), 9),
        AdapterError,
        "holds no adapters",
    ),
    "save without adapters": (net, lambda m, f: lora2fx.save(m, f), AdapterError, "holds no adapters"),
    "report without adapters": (net, lambda m, _: lora2fx.report(m), AdapterError, "holds no adapters"),
    "no module": (net, lambda _, __: lora2fx.transform("bert", ["query"]), AdapterError, "takes a torch.nn.Module"),
    "a class for a method": (net, lambda m, _: adapted(LoRA, m), MethodError, "pass one with its hyperparameters"),
    "no targets": (net, lambda m, _: lora2fx.transform(m, [], LoRA()), TargetError, "targets is empty"),
    "a target of nothing": (
        net,
        lambda m, _: lora2fx.transform(m, ["query_proj"], LoRA()),
        TargetError,
        "matches none of the",
    ),
    "another architecture": (
        lambda: nn.Sequential(nn.Linear(6, 9)),
        lambda m, f: lora2fx.load(m, saved(f)),
        FormatError,
        "which Sequential does not have",
    ),
    "another width": (
        lambda: net(8),
        lambda m, f: lora2fx.load(m, saved(f)),
        FormatError,
        "the adapter is for 0.weight of shape",
    ),
    "another base": (
        lambda: with_value(7.0),
        lambda m, f: lora2fx.load(m, saved(f)),
        FormatError,
        "is not the base weight that the adapter was trained on",
    ),
    "a meta model": (lambda: net().to("meta"), lambda m, _: adapted(model=m), InputsError, "is on the meta device"),
    "moved to meta": (
        lambda: adapted().to("meta"),
        lambda m, _: lora2fx.fold(m),
        AdapterError,
        "to which nothing can be added in place",
    ),
    "a NaN in a weight": (
        lambda: with_value(float("nan")),
        lambda m, _: adapted(model=m),
        RewriteError,
        "holds NaN or infinity",
    ),
    "an infinity in a weight": (
        lambda: with_value(float("inf")),
        lambda m, _: adapted(model=m),
        RewriteError,
        "holds NaN or infinity",
    ),
    "a diverged run, folded": (diverged, lambda m, _: lora2fx.fold(m), AdapterError, "holds NaN or infinity"),
    "a diverged run, saved": (diverged, lambda m, f: lora2fx.save(m, f), AdapterError, "holds NaN or infinity"),
    "a weight of another shape": (replaced, lambda m, _: lora2fx.fold(m), AdapterError, "when it was adapted and is"),
    "a tied weight": (tied, lambda m, _: lora2fx.transform(m, ["0"], LoRA()), RewriteError, "is tied to"),
    "r = 0": (net, lambda m, _: adapted(LoRA(r=0), m), MethodError, "pass a whole number of at least 1"),
    "k above r": (net, lambda m, _: adapted(LoRA2(r=2, k=4), m), MethodError, "which needs r ≥ k"),
    "a budget above r": (
        net,
        lambda m, _: adapted(AdaLoRA(r=2, target_r=3), m),
        MethodError,
        "but a budget only falls",
    ),
    "a rank for nothing": (
        net,
        lambda m, _: adapted(LoRA(rank_pattern={"1": 3}), m),
        MethodError,
        "names none of the 2 adapted weights",
    ),
    "an unfinished schedule": (unfinished, lambda m, _: lora2fx.fold(m), ScheduleError, "ended early"),
    "a schedule that was never driven": (
        lambda: adapted(AdaLoRA(r=2, target_r=1)),
        lambda m, _: lora2fx.fold(m),
        ScheduleError,
        "was never driven",
    ),
    "attached twice": (adapted, lambda m, _: attached_again(m), AdapterError, "is attached already"),
    "an optimizer of before": (
        adapted,
        lambda m, _: lora2fx.attach(m, torch.optim.SGD(net().parameters(), 0.1), 9),
        AdapterError,
        "adapter parameters are not in the SGD",
    ),
    "frozen adapters": (
        lambda: adapted().requires_grad_(False),
        lambda m, _: lora2fx.attach(m, torch.optim.SGD(net().parameters(), 0.1), 9),
        AdapterError,
        "no parameter of any adapter requires a gradient",
    ),
    "a run of no steps": (adapted, lambda m, _: lora2fx.attach(m, optimizer_of(m), 0), ScheduleError, "total_steps=0"),
    "a weight of no elements": (
        lambda: nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 6)),
        lambda m, _: lora2fx.transform(m, ["1"], LoRA()),
        RewriteError,
        "has no elements",
    ),
    "nothing that meets an activation": (
        lambda: nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 6)),
        lambda m, _: lora2fx.transform(m, ["0"], LoRA(), example_inputs=(X,)),
        InputsError,
        "no weight of two or more dimensions met an activation",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_with_the_way_out_and_nothing_changes(name, tmp_path):
    build, use, kind, words = CASES[name]
    model = build()
    meta = any(p.is_meta for p in model.parameters())
    before = None if meta else everything(model)
    with pytest.raises(kind, match=re.escape(words)):
        use(model, tmp_path / "adapter")
    if before is not None:
        found = differences(before, everything(model))
        assert [name for name in found if "progress" not in name] == []


def test_the_page_explains_every_message():
    text = PAGE.read_text(encoding="utf-8")
    headings = re.findall(r"^### `(.*)`$", text, re.MULTILINE)
    messages = {words for _, _, _, words in CASES.values()}
    assert sorted(messages - set(headings)) == []
    assert len(headings) == len(set(headings))
    for link in re.findall(r"\]\(([^)#]+\.md)[^)]*\)", text):
        assert (PAGE.parent / link).exists(), link


@pytest.mark.parametrize("method", EVERY, ids=lambda method: type(method).__name__)
def test_a_rank_above_the_dimensions_is_no_error_and_folds(method):
    """The factors cost more than the weight; the rank of ΔW is that of the smaller dimension at most."""
    wide = {"ALoRA": ALoRA(r=20), "LoRA2": LoRA2(r=40, k=20)}.get(type(method).__name__, type(method)(r=40))
    model = randomised(adapted(wide))
    expected = model(X).detach()
    report = lora2fx.fold(model, strict=False)
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)
    assert all(site["rank"] <= 6 for site in report.sites)


def test_a_frozen_model_is_adapted_and_stays_frozen():
    model = adapted(model=net().requires_grad_(False))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{layer}.lora2fx_weight.{factor}" for layer in (0, 2) for factor in "AB"
    }
    randomised(model)
    lora2fx.fold(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_an_int8_weight_takes_an_update_beside_it_or_says_why_not():
    model = integers()
    with pytest.raises(RuntimeError, match="same dtype"):
        adapted(model=model)
    assert type(model[0]) is nn.Linear
    assert not any(isinstance(name, str) and "lora2fx" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", EVERY, ids=lambda method: type(method).__name__)
def test_a_dtype_changed_between_transform_and_fold(method, dtype):
    model = randomised(adapted(method)).to(dtype)
    expected = model(X.to(dtype)).detach()
    lora2fx.fold(model, strict=False)
    assert {p.dtype for p in model.parameters()} == {dtype}
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(model(X.to(dtype)), expected, rtol=16 * step, atol=16 * step)


def test_one_layer_in_another_dtype_than_its_adapter():
    model = randomised(adapted())
    expected = model(X).detach()
    model[0].weight.data = model[0].weight.data.double()
    lora2fx.fold(model)
    assert [layer.weight.dtype for layer in (model[0], model[2])] == [torch.float64, torch.float32]
    model.float()
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_changed_between_transform_and_fold():
    model = randomised(adapted())
    expected = model(X).detach()
    model.cuda()
    lora2fx.fold(model)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    torch.testing.assert_close(model(X.cuda()).cpu(), expected, rtol=1e-5, atol=1e-5)


def test_a_meta_model_that_is_filled_later():
    """Adapted by name before its weights are there; they are loaded into it, and it folds."""
    source = net()
    model = lora2fx.transform(net().to("meta"), ["0", "2"], LoRA(r=2), verify=False)
    model.to_empty(device="cpu")
    state = randomised(adapted(model=net())).state_dict()
    model.load_state_dict(state)
    again = adapted(model=net())
    again.load_state_dict(state)
    assert torch.equal(model(X), again(X))
    lora2fx.fold(model)
    assert not torch.equal(model[0].weight, source[0].weight)


def test_a_step_after_the_fold_moves_no_weight():
    model = randomised(adapted())
    optimizer = optimizer_of(model)
    lora2fx.attach(model, optimizer, 3)
    model(X).sum().backward()
    lora2fx.fold(model)
    before = everything(model)["parameters"]
    optimizer.step()
    assert {name: own[-1] for name, own in everything(model)["parameters"].items()} == {
        name: own[-1] for name, own in before.items()
    }


@pytest.mark.parametrize("method", EVERY, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("rewrite", ["activation", "property"])
def test_eight_threads_at_once_compute_what_one_does(method, rewrite):
    model = randomised(adapted(method)).eval()
    if rewrite == "property":
        base = nn.MultiheadAttention(6, 2, batch_first=True).eval()
        lora2fx.transform(base, ["in_proj_weight"], method, example_inputs=(X[None], X[None], X[None]), seed=0)
        attention = randomised(base)

        def call(x):
            return attention(x[None], x[None], x[None])[0]
    else:

        def call(x):
            return model(x)

    inputs = [X * (1 + index / 8) for index in range(64)]

    def work(x):
        x = x.clone().requires_grad_()
        y = call(x)
        return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]

    expected = [work(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, inputs * 4))
    for (y, grad), (wanted, wanted_grad) in zip(found, expected * 4, strict=True):
        assert torch.equal(y, wanted)
        assert torch.equal(grad, wanted_grad)
