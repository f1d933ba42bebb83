"""The eager form against the functional one, in float64; and which of them runs when."""

from __future__ import annotations

import contextlib
import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

import lora2fx
from lora2fx import eager
from lora2fx.methods.lora2 import LoRA2
from lora2fx.training import products
from lora2fx.training.products import AddedProducts
from tests.adapted import adapters_of, check_as_exact, distances, in_low_precision

METHOD = LoRA2(r=4, k=3, target_r=2, tinit=1, tfinal=2)
KIN = [
    lora2fx.LoRA(r=4, rank_pattern={"up": 3}, alpha_pattern={"down": 5}),
    lora2fx.AdaLoRA(r=4, target_r=2, tinit=1, tfinal=2),
    lora2fx.SoRA(r=4),
    lora2fx.SaLoRA(r=4, tinit=1, tfinal=2),
    lora2fx.ALoRA(r=4, max_r=5),
]
"""LoRA and its gated kin."""
WIDE = LoRA2(r=7, k=3, init="gaussian", rank_pattern={"up": 5}, target_r=2, target_k=2)


class Block(nn.Module):
    """Layers of three shapes, one without a bias, one used twice, one that a call may leave out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.same = nn.Linear(6, 9), nn.Linear(9, 6, bias=False), nn.Linear(6, 6)
        self.spare, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x, spare=True):
        x = x + self.down(self.up(x).tanh())
        x = self.same(self.same(x).tanh())
        return self.head(self.spare(x) if spare else x)


def attached(method=METHOD, dtype=torch.float64, optimizer=torch.optim.SGD):
    """(model, optimizer) with random factors, some masked."""
    model, targets = Block().to(dtype), ["up", "down", "same", "spare"]
    x = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(1), dtype=dtype)
    lora2fx.transform(model, targets, method, example_inputs=(x,), modules_to_save=["head"], seed=0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in adapters_of(model):
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)
            adapter.mask[1] = False
            if hasattr(adapter, "column_mask"):
                adapter.column_mask[2] = False
    step = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.01)
    lora2fx.attach(model, step, total_steps=10)
    return model.train(), step


def functional(model):
    """A copy whose sites are computed in the functional form."""
    twin = copy.deepcopy(model)
    assert all(vars(adapter)[eager.SLOT] is None for adapter in adapters_of(twin))
    return twin


def gradients(model, x, **arguments):
    model.zero_grad()
    output = model(x, **arguments)
    output.square().sum().backward()
    return [output, *(p.grad for p in model.parameters() if p.requires_grad)]


def inputs(requires_grad=False, seed=3):
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.requires_grad_(requires_grad)


def close(found, expected, size=1e-12):
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=size * max(1.0, float(b.detach().abs().max())))


@pytest.fixture(params=[2**16, 0], ids=["torch's derivatives", "own function"])
def _size(request, monkeypatch):
    monkeypatch.setattr(products, "SMALL", request.param)


@pytest.mark.usefixtures("_size")
@pytest.mark.parametrize("method", [METHOD, WIDE], ids=["square core", "more singular values than columns"])
@pytest.mark.parametrize("spare", [True, False], ids=["all used", "one left out"])
def test_outputs_and_gradients_are_the_functional_ones(method, spare, monkeypatch):
    model, _ = attached(method)
    calls = []
    monkeypatch.setattr(AddedProducts, "apply", spy(AddedProducts.apply, calls))
    found = gradients(model, inputs(), spare=spare)
    assert bool(calls) == (products.SMALL == 0)
    close(found, gradients(functional(model), inputs(), spare=spare))
    assert (model.spare.lora2fx_weight.u.grad is None) == (not spare)


def spy(function, calls):
    def watched(*args):
        calls.append(args)
        return function(*args)

    return watched


@pytest.mark.usefixtures("_size")
def test_the_gradient_of_the_input_and_second_derivatives():
    model, _ = attached()
    twin, x, y = functional(model), inputs(True), inputs(True)
    found = torch.autograd.grad(model(x).square().sum(), [x, *trained(model)], create_graph=True)
    expected = torch.autograd.grad(twin(y).square().sum(), [y, *trained(twin)], create_graph=True)
    close(found, expected)
    second = torch.autograd.grad(sum(g.square().sum() for g in found), [x, *trained(model)])
    close(second, torch.autograd.grad(sum(g.square().sum() for g in expected), [y, *trained(twin)]), 1e-11)


@pytest.mark.usefixtures("_size")
@pytest.mark.parametrize("method", KIN, ids=lambda method: type(method).__name__)
def test_lora_and_its_kin_in_the_eager_form(method):
    """Two micro-batches through one folding, with a layer left out; then second derivatives."""
    model, _ = attached(method)
    twin, x, y = functional(model), inputs(True), inputs(True)
    assert all(vars(adapter)[eager.SLOT] for adapter in adapters_of(model))
    for own in (model, twin):
        for row in inputs():
            own(row, spare=False).square().sum().backward()
    close([p.grad for p in trained(model)], [p.grad for p in trained(twin)])
    assert all(parameter.grad is None for parameter in model.spare.lora2fx_weight.parameters())
    found = torch.autograd.grad(model(x).square().sum(), [x, *trained(model)], create_graph=True)
    expected = torch.autograd.grad(twin(y).square().sum(), [y, *trained(twin)], create_graph=True)
    close(found, expected)
    second = torch.autograd.grad(sum(g.square().sum() for g in found), [x, *trained(model)])
    close(second, torch.autograd.grad(sum(g.square().sum() for g in expected), [y, *trained(twin)]), 1e-11)


DROPPING = pytest.mark.parametrize("method", [replace(METHOD, lora_dropout=0.4), lora2fx.LoRA(r=4, lora_dropout=0.4)])


@pytest.mark.usefixtures("_size")
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)], ids=["contiguous", "transposed"])
@DROPPING
def test_dropout_drops_what_the_functional_form_drops(method, order, monkeypatch):
    model, _ = attached(method)
    twin, calls, found = functional(model), [], []
    monkeypatch.setattr(AddedProducts, "apply", spy(AddedProducts.apply, calls))
    assert all(vars(adapter)[eager.SLOT] for adapter in adapters_of(model))
    for own in (model, twin):
        torch.manual_seed(5)
        x = inputs().relu().requires_grad_()  # what is 0 anyway may be kept or dropped
        output = own(x.permute(order))
        output.square().sum().backward()
        found.append([output, x.grad, *(p.grad for p in trained(own))])
    assert bool(calls) == (products.SMALL == 0)
    close(*found)


@pytest.mark.usefixtures("_size")
@DROPPING
def test_under_autocast_dropout_is_as_exact_as_the_functional_form(method):
    """Both against float32, where the same elements are dropped, over nine inputs."""
    model, _ = attached(method, torch.float32)
    twin, errors, usual = functional(model), [], []

    def run(own, seed, cast):
        torch.manual_seed(seed)
        with low_precision(enabled=cast):
            return gradients(own, inputs(seed=seed).float())

    for seed in range(9):
        expected = run(twin, seed, False)
        errors.append(distances(run(model, seed, True), expected))
        usual.append(distances(run(twin, seed, True), expected))
    check_as_exact(errors, usual, torch.bfloat16)


@pytest.mark.usefixtures("_size")
def test_second_derivatives_and_evaluation_with_dropout():
    model, _ = attached(replace(METHOD, lora_dropout=0.4))
    twin, found = functional(model), []
    for own in (model, twin):
        torch.manual_seed(5)
        first = torch.autograd.grad(own(inputs()).square().sum(), trained(own), create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), trained(own))])
    close(*found, 1e-11)
    for own in (model, twin):
        for adapter in adapters_of(own):
            adapter.dropout.eval()
    close(gradients(model, inputs()), gradients(twin, inputs()))


@pytest.mark.usefixtures("_size")
@pytest.mark.parametrize("method", [METHOD, KIN[2]], ids=lambda method: type(method).__name__)
def test_fused_columns_and_weights_that_lie_the_other_way_have_the_eager_form(method):
    """GPT-2: query and value are columns of one weight, all weights are (in, out) and meet an `addmm`."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model, ids = GPT2LMHeadModel(config).double(), torch.arange(12).view(2, 6)
    lora2fx.transform(model, ["query", "value", "output", "ffn"], method, seed=0)
    with torch.no_grad():
        for adapter in adapters_of(model):
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, dtype=torch.float64) / 3)
    lora2fx.attach(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]), 10)
    adapters, calls = adapters_of(model), {"product": [], "product_of_columns": [], "factors": []}
    source = vars(adapters[0])[eager.SLOT].source
    twin = functional(model)
    twin.train()(ids, labels=ids).loss.backward()
    with pytest.MonkeyPatch.context() as patch:
        for name, found in calls.items():
            patch.setattr(type(source), name, spy(getattr(type(source), name), found))
        model.train()(ids, labels=ids).loss.backward()
    assert [len(found) for found in calls.values()] == [3, 1, 0]
    assert sum(adapter.columns is not None for adapter in adapters) == 2
    close([p.grad for p in trained(model)], [p.grad for p in trained(twin)])


@pytest.mark.parametrize("method", KIN[1:4], ids=lambda method: type(method).__name__)
def test_a_changed_gate_is_seen(method):
    model, _ = attached(method)
    adapter = model.same.lora2fx_weight
    (gate,) = (name for name, parameter in adapter.named_parameters() if parameter.dim() == 1)
    before = model(inputs())
    for change in (lambda: adapter.get_parameter(gate).mul_(0.3), lambda: adapter.mask.logical_not_()):
        with torch.no_grad():
            change()
        after = model(inputs())
        close([after], [functional(model)(inputs())])
        assert not torch.equal(after, before)
        before = after


def test_a_new_noise_is_seen():
    model, _ = attached(KIN[3])
    before = model(inputs())
    model.same.lora2fx_weight.set_noise(torch.full((4,), 0.2, dtype=torch.float64))
    after = model(inputs())
    close([after], [functional(model)(inputs())])
    assert not torch.equal(after, before)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.usefixtures("_size")
def test_gradcheck():
    model, _ = attached()
    parameters = list(model.down.lora2fx_weight.parameters())

    def run(x, *changed):
        # Perturbed through .data, which nothing can see: the sum is a new tensor each time.
        new = {name: value + 0 for name, value in zip(names, changed, strict=True)}
        return torch.func.functional_call(model, new, (x,))

    names = [f"down.lora2fx_weight.{name}" for name, _ in model.down.lora2fx_weight.named_parameters()]
    assert torch.autograd.gradcheck(run, (inputs(True), *parameters))


def test_factors_are_folded_once_a_step_whatever_the_number_of_micro_batches(monkeypatch):
    model, optimizer = attached()
    folds = []
    source = vars(model.up.lora2fx_weight)[eager.SLOT].source
    monkeypatch.setattr(type(source), "_refresh", spy(type(source)._refresh, folds))
    expected = functional(model)
    for x in inputs().unsqueeze(1):
        model(x).square().sum().backward()
        expected(x).square().sum().backward()
    assert len(folds) == 1
    close([p.grad for p in trained(model)], [p.grad for p in trained(expected)])
    optimizer.step()
    model(inputs())
    assert len(folds) == 2


@pytest.mark.parametrize("name", ["v", "lam", "U", "V", "u"])
def test_a_factor_changed_between_forwards_is_seen(name):
    model, _ = attached()
    model(inputs())
    with torch.no_grad():
        model.same.lora2fx_weight.get_parameter(name).mul_(2.0)
    close([model(inputs())], [functional(model)(inputs())])
    setattr(model.same.lora2fx_weight, name, nn.Parameter(model.same.lora2fx_weight.get_parameter(name).detach() * 3))
    close([model(inputs())], [functional(model)(inputs())])
    for mask in ("mask", "column_mask"):
        model.same.lora2fx_weight.get_buffer(mask)[0] = False
        close([model(inputs())], [functional(model)(inputs())])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_an_optimizers_step_is_seen_however_it_writes(kind, settings):
    model, optimizer = attached(optimizer=lambda p, lr: kind(p, lr=lr, **settings))
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs()).square().mean().backward()
        optimizer.step()
        close([model(inputs())], [functional(model)(inputs())])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.usefixtures("_size")
def test_gradient_checkpointing(reentrant):
    model, _ = attached()
    twin = functional(model)
    x, y = inputs(True), inputs(True)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    twin(y).square().sum().backward()
    close([x.grad, *(p.grad for p in trained(model))], [y.grad, *(p.grad for p in trained(twin))])


@pytest.mark.usefixtures("_size")
@pytest.mark.parametrize("context", [contextlib.nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_mixed_precision_gives_the_functional_dtypes(context, base):
    model, _ = attached(dtype=torch.float32)
    for module in (model.up, model.down, model.same, model.spare):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(base)
    twin, x = functional(model), inputs().to(base)
    with context():
        found, expected = model.same(x), twin.same(x)
    assert found.dtype == expected.dtype
    tolerance = 1e-6 if found.dtype == torch.float32 else 0.03
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def low_precision(dtype=torch.bfloat16, **arguments):
    return torch.autocast("cpu", dtype, **arguments)


@pytest.mark.usefixtures("_size")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spare", [True, False], ids=["all used", "one left out"])
@pytest.mark.parametrize("cast", [True, False], ids=["autocast", "a model in low precision"])
def test_low_precision_is_as_exact_as_the_functional_form(dtype, spare, cast, monkeypatch):
    """Both against float64, over nine inputs: neither the outputs nor the gradients are further off."""
    model, _ = attached(dtype=torch.float32)
    if not cast:
        in_low_precision(model, dtype)
    twin, exact, calls = functional(model), functional(model).double(), []
    monkeypatch.setattr(AddedProducts, "apply", spy(AddedProducts.apply, calls))
    errors, usual = [], []
    for seed in range(9):
        x = inputs(seed=seed).to(torch.float32 if cast else dtype)
        expected = gradients(exact, x.double(), spare=spare)
        with low_precision(dtype, enabled=cast):
            found = gradients(model, x, spare=spare)
            assert bool(calls) == (products.SMALL == 0)
            reference = gradients(twin, x, spare=spare)
        assert [own is None or own.dtype for own in found] == [own is None or own.dtype for own in reference]
        errors.append(distances(found, expected))
        usual.append(distances(reference, expected))
    check_as_exact(errors, usual, dtype)
    if not spare:
        assert model.spare.lora2fx_weight.u.grad is None


@pytest.mark.usefixtures("_size")
def test_second_derivatives_of_a_model_in_low_precision():
    model, _ = attached(dtype=torch.float32)
    in_low_precision(model, torch.bfloat16)
    twin, exact = functional(model), functional(model).double()

    def second(own, x):
        first = torch.autograd.grad(own(x).square().sum(), trained(own), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), trained(own))

    errors, usual = [], []
    for seed in range(9):
        x = inputs(seed=seed).bfloat16()
        expected = second(exact, x.double())
        errors.append(distances(second(model, x), expected))
        usual.append(distances(second(twin, x), expected))
    check_as_exact(errors, usual, torch.bfloat16)


@pytest.mark.usefixtures("_size")
def test_a_part_of_the_model_that_leaves_autocast_computes_in_float32(monkeypatch):
    model, _ = attached(dtype=torch.float32)
    twin, folds = functional(model), []
    source = vars(model.up.lora2fx_weight)[eager.SLOT].source
    monkeypatch.setattr(type(source), "_refresh", spy(type(source)._refresh, folds))

    def run(own, x):
        own.zero_grad()
        for _ in range(2):
            inner = own.up(x).tanh()
            with low_precision(enabled=False):
                inner = own.up(x) + inner.float()
                assert inner.dtype == torch.float32
            own.same(own.down(inner)).square().sum().backward()
        return [own.up.lora2fx_weight.u.grad, own.down.lora2fx_weight.V.grad, own.same.lora2fx_weight.lam.grad]

    with low_precision():
        found, expected = run(model, inputs().float()), run(twin, inputs().float())
    assert len(folds) == 1, "one folding, and one copy of it, for both dtypes and both micro-batches"
    for own, other in zip(found, expected, strict=True):
        assert float((own - other).norm() / other.norm()) < 0.02


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in jvp
def test_transforms_of_torch_func_use_the_functional_form():
    model, _ = attached()
    twin = functional(model)
    own, other = dict(model.named_parameters()), dict(twin.named_parameters())
    x = inputs()

    def loss(parameters, module, row):
        return torch.func.functional_call(module, parameters, (row,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, None, 0))(own, model, x)
    expected = torch.func.vmap(torch.func.grad(loss), in_dims=(None, None, 0))(other, twin, x)
    close(list(found.values()), list(expected.values()))
    _, tangent = torch.func.jvp(lambda y: model(y), (x,), (torch.ones_like(x),))
    _, wanted = torch.func.jvp(lambda y: twin(y), (x,), (torch.ones_like(x),))
    close([tangent], [wanted])


def test_copies_pickles_and_evaluation_use_the_functional_form():
    model, _ = attached()
    again = pickle.loads(pickle.dumps(model))
    assert all(vars(adapter)[eager.SLOT] is None for adapter in adapters_of(again))
    close([again(inputs())], [model(inputs())])
    assert torch.equal(model.eval()(inputs()), again.eval()(inputs()))
    with torch.no_grad():
        assert torch.equal(model.train()(inputs()), again.train()(inputs()))


def test_a_detached_model_uses_the_functional_form():
    model, optimizer = attached()
    assert all(vars(adapter)[eager.SLOT] for adapter in adapters_of(model))
    (hook,) = optimizer._optimizer_step_post_hooks.values()
    hook.__self__.detach()
    assert not any(eager.SLOT in vars(adapter) for adapter in adapters_of(model))
    close(gradients(model, inputs()), gradients(copy.deepcopy(model), inputs()), 0)


def test_an_adapter_that_no_site_read_keeps_what_it_had():
    """None, or the gradient of an earlier micro-batch that read it."""
    model, _ = attached()
    twin = functional(model)
    spare = model.spare.lora2fx_weight
    model(inputs(), spare=False).square().sum().backward()
    assert all(parameter.grad is None for parameter in spare.parameters())
    for own in (model, twin):
        own.zero_grad()
        own(inputs()).square().sum().backward()
        own(inputs() * 2, spare=False).square().sum().backward()
    close([p.grad for p in trained(model)], [p.grad for p in trained(twin)], 1e-11)
    assert all(parameter.grad is not None for parameter in spare.parameters())


def test_two_foldings_go_back_together():
    """An adapter that the first left unread, and the second read."""
    model, _ = attached()
    twin = functional(model)
    for own in (model, twin):
        first = own(inputs(), spare=False).square().sum()
        own.up.lora2fx_weight.mask = ~own.up.lora2fx_weight.mask
        (first + own(inputs() * 2).square().sum()).backward()
    close([p.grad for p in trained(model)], [p.grad for p in trained(twin)], 1e-11)
    assert all(parameter.grad.any() for parameter in model.spare.lora2fx_weight.parameters())


def test_frozen_factors_get_no_gradient():
    model, _ = attached()
    for adapter in adapters_of(model):
        adapter.u.requires_grad_(False)
    close(gradients(model, inputs()), gradients(functional(model), inputs()))
    model.same.lora2fx_weight.v.requires_grad_(False)
    close(gradients(model, inputs()), gradients(functional(model), inputs()))
    assert model.same.lora2fx_weight.v.grad is None
