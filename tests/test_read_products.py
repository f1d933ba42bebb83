"""Products with a matrix that is read with W + ΔW, or with a stack of them: by W and by ΔW's factors, side by side."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lora2fx
from benchmarks.counting import saved_bytes, state_of
from lora2fx import AdaLoRA, LoRA, LoRA2
from lora2fx.adapter import Adapter
from lora2fx.passes.lazy import LazyWeight
from lora2fx.passes.reads import merged
from lora2fx.training import products
from tests.adapted import adapters_of, check_as_exact, distances, in_low_precision
from tests.test_reads import Experts, adapted, gradients, same, whole

METHODS = [LoRA(r=2), LoRA2(r=3, k=2), AdaLoRA(r=3)]


@pytest.fixture
def made(monkeypatch):
    """The weights that W + ΔW was made of, one matrix or all."""
    found = []
    for place, name in ((Adapter, "weight_delta"), (LazyWeight, "_whole"), (LazyWeight, "_values")):
        real = getattr(place, name)
        monkeypatch.setattr(place, name, lambda self, real=real: (found.append(self), real(self))[1])
    return found


@pytest.fixture(params=[False, True], ids=["small", "large"])
def size(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(products, "SMALL", 0)


def activation(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def all_gradients(model, x, value):
    """Of the factors, and of x."""
    factors = [factor for adapter in adapters_of(model) for factor in adapter.parameters()]
    return torch.autograd.grad(value, [*factors, x], allow_unused=True)


def bias(outputs, dtype=torch.float64):
    return torch.linspace(-1, 1, outputs, dtype=dtype)


PRODUCTS = {
    "linear": ((5, 4), lambda x, w: F.linear(x, w[1])),
    "linear with bias": ((2, 5, 4), lambda x, w: F.linear(x, w[1], bias(8))),
    "linear of one token": ((4,), lambda x, w: F.linear(x, w[2])),
    "linear of a transposed matrix": ((5, 8), lambda x, w: F.linear(x, w[1].T)),
    "linear of a matrix of the transposed": ((5, 8), lambda x, w: F.linear(x, w.mT[1], bias(4))),
    "matmul": ((5, 8), lambda x, w: x @ w[0]),
    "matmul of one token": ((8,), lambda x, w: torch.matmul(x, w[0])),
    "method": ((2, 5, 8), lambda x, w: x.matmul(w[torch.tensor(2)])),
    "mm": ((5, 8), lambda x, w: torch.mm(x, w[-1])),
    "mm with t": ((5, 4), lambda x, w: x.mm(w[1].t())),
    "matmul with mT": ((5, 4), lambda x, w: x @ w[0].mT),
    "matmul with transpose": ((5, 4), lambda x, w: x @ w[0].transpose(0, 1)),
    "twice transposed": ((5, 8), lambda x, w: x @ torch.t(w[0].T)),
    "a part of the rows": ((5, 4), lambda x, w: F.linear(x, w[1].split([3, 5])[1], bias(5))),
    "equal parts": ((5, 4), lambda x, w: F.linear(x, w[1].split(3)[2])),
    "chunks": ((5, 4), lambda x, w: F.linear(x, w[1].chunk(3)[1]) * F.linear(x, w[1].chunk(3)[0])),
    "chunks of the transposed": ((5, 8), lambda x, w: F.linear(x, torch.t(w[1]).chunk(2)[1])),
    "bmm": ((3, 2, 8), lambda x, w: torch.bmm(x, w)),
    "bmm with transpose": ((3, 2, 4), lambda x, w: x.bmm(w.transpose(-1, -2))),
    "matmul of all": ((3, 2, 8), lambda x, w: x @ w),
    "every matrix": ((5, 4), lambda x, w: sum(F.linear(x, w[i]) for i in range(3))),
    "a matrix twice": ((5, 4), lambda x, w: F.linear(x, w[1]) * F.linear(x + 1, w[1])),
}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_that_with_the_whole(name, method, size, made):
    model, _ = adapted(method)
    shape, multiply = PRODUCTS[name]
    x = activation(*shape).requires_grad_()
    made.clear()
    found = multiply(x, model.up)
    mine = all_gradients(model, x, found.sin().sum())
    assert not made and type(found) is torch.Tensor
    expected = multiply(x, whole(model, "up"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    same(mine, all_gradients(model, x, expected.sin().sum()))


@pytest.mark.parametrize("name", ["linear with bias", "bmm"])
def test_a_product_without_gradients(name, size, made):
    model, _ = adapted()
    shape, multiply = PRODUCTS[name]
    x = activation(*shape)
    made.clear()
    with torch.no_grad():
        found = multiply(x, model.up)
    assert not made and not found.requires_grad
    torch.testing.assert_close(found, multiply(x, whole(model, "up")).detach(), rtol=1e-12, atol=1e-13)


def test_a_product_has_second_derivatives(size):
    model, _ = adapted(LoRA2(r=3, k=2))
    x = activation(5, 4).requires_grad_()
    found = []
    for weight in (model.up, whole(model, "up")):
        (grad,) = torch.autograd.grad(F.silu(F.linear(x, weight[1])).sum(), x, create_graph=True)
        found.append(gradients(model, grad.square().sum()))
    same(*found)


def test_a_trained_weight_gets_its_gradient_too(size):
    model, _ = adapted()
    weight = model._parameters["up"].requires_grad_()
    x = activation(5, 4)
    found = torch.autograd.grad(F.linear(x, model.up[1]).sin().sum(), weight)
    same(found, torch.autograd.grad(F.linear(x, whole(model, "up")[1]).sin().sum(), weight))


def test_what_does_not_fit_fails_as_with_the_whole():
    model, _ = adapted()
    for read in (lambda w: F.linear(activation(5, 3), w[1]), lambda w: activation(5, 3) @ w[0], lambda w: w[7]):
        with pytest.raises((RuntimeError, IndexError)) as expected:
            read(whole(model, "up"))
        with pytest.raises(type(expected.value)) as found:
            read(model.up)
        assert str(found.value) == str(expected.value)


OFFSETS = {"all": [2, 5, 9], "an expert without tokens": [4, 4, 9], "the last without": [3, 9, 9]}


def in_turn(x, weight, offsets):
    """The grouped product by a loop, in x's dtype."""
    spans = zip([0, *offsets], offsets, strict=False)
    return torch.cat([x[start:stop] @ weight[i] for i, (start, stop) in enumerate(spans)])


def grouped(x, weight, offsets):
    return F.grouped_mm(x, weight, offs=torch.tensor(offsets, dtype=torch.int32))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_grouped_product_is_that_of_a_loop(method, offsets, transposed, made):
    model, _ = adapted(method, torch.float32)
    exact = copy.deepcopy(model).double()
    x = activation(9, 4 if transposed else 8, dtype=torch.float32).requires_grad_()
    turned = (lambda w: w.transpose(-2, -1)) if transposed else (lambda w: w)
    made.clear()
    found = grouped(x, turned(model.up), offsets)
    mine = all_gradients(model, x, found.sin().sum())
    assert not made
    wide = x.detach().double().requires_grad_()
    expected = in_turn(wide, turned(whole(exact, "up")), offsets)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    theirs = all_gradients(exact, wide, expected.sin().sum())
    for one, other in zip(mine, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_a_grouped_product_has_second_derivatives():
    model, _ = adapted(LoRA2(r=3, k=2), torch.float32)
    exact = copy.deepcopy(model).double()
    x, offsets = activation(9, 8, dtype=torch.float32).requires_grad_(), OFFSETS["all"]
    wide = x.detach().double().requires_grad_()
    pairs = [(model, x, grouped(x, model.up, offsets)), (exact, wide, in_turn(wide, whole(exact, "up"), offsets))]
    found = []
    for own, given, y in pairs:
        (grad,) = torch.autograd.grad(F.silu(y).sum(), given, create_graph=True)
        found.append([grad for grad in gradients(own, grad.square().sum()) if grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4)


def test_a_grouped_product_of_a_trained_weight_is_torchs_own():
    model, _ = adapted(dtype=torch.float32)
    weight = model._parameters["up"].requires_grad_()
    x = activation(9, 8, dtype=torch.float32)
    (found,) = torch.autograd.grad(grouped(x, model.up, [2, 5, 9]).sin().sum(), weight)
    (expected,) = torch.autograd.grad(in_turn(x, whole(model, "up"), [2, 5, 9]).sin().sum(), weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "autocast"), [("loop", False), ("loop", True), ("grouped", False)])
def test_low_precision_is_as_exact_as_with_the_whole(name, autocast, size):
    errors, usual = [], []
    for seed in range(5):
        model, _ = adapted(LoRA2(r=3, k=2), torch.float32, widths=(8, 8, 8))  # rows of 16 bytes
        torch.manual_seed(seed)
        x = torch.randn(9, 16)
        if not autocast:
            in_low_precision(model, torch.bfloat16)
            x = x.bfloat16()
        exact = copy.deepcopy(model).double()
        for weight, found in ((model.up, errors), (whole(model, "up"), usual)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = x @ weight[1] if name == "loop" else grouped(x, weight, OFFSETS["all"])
            assert y.dtype == torch.bfloat16
            total, wide = whole(exact, "up"), x.double()
            reference = wide @ total[1] if name == "loop" else in_turn(wide, total, OFFSETS["all"])
            pair = gradients(model, y.double().square().sum()), gradients(exact, reference.square().sum())
            own, theirs = ([grad.double() for grad in grads if grad is not None] for grads in pair)
            found.append(distances([y.double(), *own], [reference, *theirs]))
    check_as_exact(errors, usual, torch.bfloat16)


def test_a_small_update_of_a_weight_in_low_precision_is_not_rounded_away():
    model, _ = adapted(dtype=torch.float32)
    in_low_precision(model, torch.bfloat16)
    for adapter in adapters_of(model):
        adapter.B.data *= 1e-3
    exact = copy.deepcopy(model).double()
    x = torch.eye(8, dtype=torch.bfloat16)
    with torch.no_grad():
        base = model._parameters["up"][1].double()
        delta = whole(exact, "up")[1] - base
        low = (x @ model.up[1]).double() - base  # x is the identity: W comes back exactly, and ΔW beside it
        rounded = whole(model, "up")[1].double() - base
    assert (rounded - delta).norm() > 0.5 * delta.norm()
    torch.testing.assert_close(low, (base + delta).bfloat16().double() - base, rtol=0, atol=0)


@pytest.fixture
def computed(monkeypatch):
    found, rows = [], Adapter.rows
    monkeypatch.setattr(Adapter, "rows", lambda self: (found.append(self.site.weight), rows(self))[1])
    return found


def test_the_factors_of_a_stack_are_computed_once_a_forward(computed):
    model, x = adapted(LoRA2(r=3, k=2))
    computed.clear()
    model(x)
    once = list(computed)
    assert sorted(once) == sorted(adapter.site.weight for adapter in adapters_of(model))
    model(x)
    assert computed == once * 2


def change_by_data(model, x):
    for adapter in adapters_of(model):
        adapter.A.data.mul_(2)


def change_by_fused_optimizer(model, x):
    factors = [factor for adapter in adapters_of(model) for factor in adapter.parameters()]
    optimizer = torch.optim.AdamW(factors, lr=0.1, fused=True)
    model(x).square().sum().backward()
    model(x)  # a forward between the gradient and the step
    optimizer.step()


@pytest.mark.parametrize("change", [change_by_data, change_by_fused_optimizer])
def test_a_forward_sees_what_changed_before_it(change):
    model, x = adapted()
    before = model(x)
    change(model, x)
    found = model(x)
    total = {name: whole(model, name) for name in ("up", "down")}
    torch.testing.assert_close(found, torch.func.functional_call(Experts().double(), total, (x,)))
    assert not torch.allclose(found, before)


class Twice(Experts):
    """Reads a stack twice in a forward, with something between."""

    def __init__(self):
        super().__init__()
        self.between = lambda: None

    def forward(self, x):
        first = F.linear(x, self.up[0])
        self.between()
        return first - F.linear(x, self.up[0])


def test_a_write_within_a_forward_is_seen():
    torch.manual_seed(0)
    model, x = Twice().double().requires_grad_(False), activation(7, 4)
    lora2fx.transform(model, "re:up", LoRA(r=2), example_inputs=(x,), seed=0)
    (adapter,) = adapters_of(model)
    nn.init.normal_(adapter.double().B)
    assert not model(x).any()
    model.between = torch.no_grad()(lambda: adapter.A.mul_(2))
    assert model(x).any()


def test_two_forwards_go_back_one_by_one():
    model, x = adapted(LoRA2(r=3, k=2))
    first, second = model(x).square().sum(), model(x + 1).square().sum()
    found = [a + b for a, b in zip(gradients(model, first), gradients(model, second), strict=True)]
    both = model(x).square().sum() + model(x + 1).square().sum()
    same(found, gradients(model, both))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_forward_has_the_same_gradients(reentrant, size):
    model, x = adapted(LoRA2(r=3, k=2))
    x = x.requires_grad_()
    model(x).square().sum().backward()
    expected = [factor.grad.clone() for adapter in adapters_of(model) for factor in adapter.parameters()]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    same([factor.grad for adapter in adapters_of(model) for factor in adapter.parameters()], expected)


class Table(nn.Module):
    """A matrix that is read in a loop, of which no straight line can be made."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))

    def forward(self, x):
        for _ in range(2):
            x = (x @ self.weight).tanh() @ self.weight.T
        return x


def test_one_matrix_is_not_made_in_training(size, made):
    torch.manual_seed(0)
    model, x = Table().requires_grad_(False), activation(7, 6)
    lora2fx.transform(model, "re:weight", LoRA(r=2), example_inputs=(x,), seed=0)
    (adapter,) = adapters_of(model)
    adapter.double()
    nn.init.normal_(adapter.B)
    assert adapter.rewrite == "property"
    made.clear()
    found = model(x)
    mine = gradients(model, found.square().sum())
    assert not made
    plain = Table()
    expected = torch.func.functional_call(plain, {"weight": merged(model._parameters["weight"], [adapter])}, (x,))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    same(mine, gradients(model, expected.square().sum()))
    with torch.no_grad():
        assert type(model.weight) is torch.Tensor  # torch's attention takes its fast path on plain tensors alone
        torch.testing.assert_close(model(x), found.detach(), rtol=1e-12, atol=1e-13)


ATTENTIONS = {
    "self": lambda attention, x, y, z: attention(x, x, x),
    "without weights": lambda attention, x, y, z: attention(x, x, x, need_weights=False),
    "masked": lambda attention, x, y, z: attention(x, x, x, attn_mask=torch.ones(5, 5).triu(1).bool()),
    "cross": lambda attention, x, y, z: attention(x, y, y),
    "three": lambda attention, x, y, z: attention(x, y, z),
}


def check_attention(call, widths, others, made):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True, **widths).double().requires_grad_(False)
    plain, x = copy.deepcopy(model), activation(3, 5, 8).requires_grad_()
    lora2fx.transform(model, "re:.*", LoRA2(r=3, k=2), example_inputs=(x.detach(), *others), seed=0)
    for adapter in adapters_of(model):
        nn.init.normal_(adapter.double().V, std=0.1)
    made.clear()
    out, weights = call(model, x, *others)
    found = all_gradients(model, x, out.sin().sum())
    assert not made
    total = {}
    for name in dict(plain.named_parameters()):
        own = [adapter for adapter in adapters_of(model) if adapter.site.weight == name]
        total |= {name: merged(plain.get_parameter(name), own)} if own else {}
    assert total.keys() >= {"out_proj.weight"}
    expected = call(lambda *args, **options: torch.func.functional_call(plain, total, args, options), x, *others)
    torch.testing.assert_close((out, weights), expected, rtol=1e-11, atol=1e-12)
    same(found, all_gradients(model, x, expected[0].sin().sum()))


@pytest.mark.parametrize("call", ATTENTIONS.values(), ids=ATTENTIONS)
def test_torchs_attention_makes_no_weight_in_training(call, size, made):
    check_attention(call, {}, (activation(3, 4, 8) + 1, activation(3, 4, 8) - 1), made)


@pytest.mark.parametrize("call", [ATTENTIONS["cross"], ATTENTIONS["three"]])
def test_torchs_attention_with_weights_apart_makes_none_in_training(call, size, made):
    check_attention(call, {"kdim": 6, "vdim": 6}, (activation(3, 4, 6) + 1, activation(3, 4, 6) - 1), made)


def test_torchs_attention_reads_each_weight_once(monkeypatch):
    found, of = [], LazyWeight.of
    monkeypatch.setattr(
        LazyWeight, "of", lambda read, modes: (found.append(tuple(read.weight.shape)), of(read, modes))[1]
    )
    model, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
    lora2fx.transform(model, "re:.*", LoRA(r=2), example_inputs=(x, x, x), seed=0)
    found.clear()
    model(x, x, x)
    assert sorted(found) == [(8, 8), (24, 8)]


def test_attention_among_tensors_of_another_kind_gets_the_whole(made):
    class Other(torch.Tensor):
        pass

    model, x = nn.MultiheadAttention(8, 2, batch_first=True).double(), activation(3, 5, 8)
    lora2fx.transform(model, "re:.*", LoRA(r=2), example_inputs=(x, x, x), seed=0)
    expected = model(x, x, x)[0]
    made.clear()
    found = model(*[x.as_subclass(Other)] * 3)[0]
    assert made
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected, rtol=1e-12, atol=1e-13)


def experts_of_transformers(implementation):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    config._experts_implementation = implementation
    return transformers.MixtralModel(config).requires_grad_(False)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_the_experts_of_transformers_keep_hardly_more_than_the_frozen_ones(implementation, monkeypatch, made):
    monkeypatch.setattr(products, "SMALL", 0)
    model = experts_of_transformers(implementation)
    ids, x = torch.randint(32, (2, 6)), torch.randn(8, 64, 64, requires_grad=True)
    frozen = copy.deepcopy(model)
    lora2fx.transform(model, ["role:ffn"], LoRA(r=2), example_inputs=(ids,), seed=0)
    assert {adapter.rewrite for adapter in adapters_of(model)} == {"property"}
    made.clear()
    kept, own = (saved_bytes(lambda m=m: m(inputs_embeds=x)[0].sum(), state_of(m)) for m in (model, frozen))
    assert not made
    tokens = 8 * 64
    inner = 2 * 2 * (4 + 2) * tokens * 4  # of gate and up, and of down, each token with two experts, in two layers
    factors = 2 * 2 * 4 * (4 * (64 + 192) + 2 * (96 + 64)) * 4
    routed = 2 * 2 * tokens * 64 * 4  # what a loop takes of the hidden state expert by expert
    grouped = implementation == "grouped_mm"
    assert kept <= own + 4 * inner + 2 * factors + (0 if grouped else routed)


def test_grouped_experts_of_transformers_compute_what_folded_ones_do():
    model = experts_of_transformers("grouped_mm").eval()
    ids = torch.randint(32, (2, 9))
    lora2fx.transform(model, ["role:ffn"], LoRA2(r=4, k=3), example_inputs=(ids,), seed=0)
    for adapter in adapters_of(model):
        nn.init.normal_(adapter.V, std=0.2)
    out = model(ids).last_hidden_state
    lora2fx.fold(model)
    torch.testing.assert_close(model(ids).last_hidden_state, out, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, experts_of_transformers("grouped_mm").eval()(ids).last_hidden_state, atol=1e-3)
