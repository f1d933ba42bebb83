"""Fused weights, whose columns have adapters of their own, and linear layers written as other products, in training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPTNeoXConfig, GPTNeoXModel, Phi3Config, Phi3Model

import lora2fx
from benchmarks.counting import dispatched_operations, saved_bytes, state_of
from lora2fx import AdaLoRA, LoRA, LoRA2, eager
from lora2fx.training import products
from lora2fx.training.bank import Bank
from tests.adapted import adapters_of, check_as_exact, distances, in_low_precision

METHODS = [LoRA2(r=4, k=3, target_k=2, tinit=1, tfinal=2), LoRA(r=2), AdaLoRA(r=3, target_r=2, tinit=1, tfinal=2)]


@pytest.fixture(params=[2**16, 0], ids=["small", "large"])
def _size(request, monkeypatch):
    monkeypatch.setattr(products, "SMALL", request.param)


class Parallel(nn.Module):
    """Attention by one fused weight, beside a feed-forward of the same x that comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        x = self.norm(x)
        rest = self.fc(x).relu()
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v)) + rest


def activation(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attach(model, method, targets, x, dtype=torch.float64):
    model.to(dtype).requires_grad_(False)
    lora2fx.transform(model, targets, method, example_inputs=(x.to(dtype),), seed=0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in adapters_of(model):
            for factor in adapter.parameters():
                factor.copy_(torch.randn(factor.shape, generator=generator, dtype=torch.float64) / 3)
    optimizer = torch.optim.AdamW(trained(model), lr=0.01, fused=True)
    lora2fx.attach(model, optimizer, total_steps=10)
    return model.train(), optimizer


def parallel(method=METHODS[0], targets=("query", "key", "value", "re:fc.*"), dtype=torch.float64):
    torch.manual_seed(0)
    return attach(Parallel(), method, list(targets), activation(2, 5, 8), dtype)


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def functional(model):
    """A copy, whose sites are computed in the functional form."""
    twin = copy.deepcopy(model)
    assert all(vars(adapter)[eager.SLOT] is None for adapter in adapters_of(twin))
    return twin


@pytest.fixture
def calls(monkeypatch):
    """How often each of a bank's forms was asked for."""
    found = dict.fromkeys(("product", "product_of_columns", "factors"), 0)

    def counted(name):
        real = getattr(Bank, name)

        def call(*args, **kwargs):
            found[name] += 1
            return real(*args, **kwargs)

        return call

    for name in found:
        monkeypatch.setattr(Bank, name, counted(name))
    return found


def close(found, expected, size=1e-12):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=size * max(1.0, float(other.detach().abs().max())))


@pytest.mark.usefixtures("_size")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize(
    "targets", [("query", "key", "value"), ("query", "value"), ("query", "key", "value", "re:fc.*")]
)
def test_a_fused_weight_is_one_product(method, targets, calls):
    """Two micro-batches through one folding, then second derivatives."""
    model, _ = parallel(method, targets)
    twin = functional(model)
    x, y = (activation(2, 5, 8).requires_grad_() for _ in range(2))
    for own, given in ((model, x), (twin, y)):
        for row in given:
            own(row).square().sum().backward()
    assert calls == {"product": 2 if "re:fc.*" in targets else 0, "product_of_columns": 2, "factors": 0}
    close([x.grad, *(p.grad for p in trained(model))], [y.grad, *(p.grad for p in trained(twin))])
    found = torch.autograd.grad(model(x).square().sum(), [x, *trained(model)], create_graph=True)
    expected = torch.autograd.grad(twin(y).square().sum(), [y, *trained(twin)], create_graph=True)
    close(found, expected)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in found), [x, *trained(model)])
    close(second, torch.autograd.grad(sum(g.square().sum() for g in expected), [y, *trained(twin)]), 1e-11)


@pytest.mark.usefixtures("_size")
def test_columns_that_lie_among_others(calls):
    """GPT-NeoX: the heads' queries, keys and values take turns in one weight."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = GPTNeoXModel(GPTNeoXConfig(vocab_size=16, **sizes))
    ids = torch.arange(10).view(2, 5)
    lora2fx.transform(model, ["attention"], METHODS[0], seed=0)
    model.double()
    for adapter in adapters_of(model):
        nn.init.normal_(adapter.V, std=0.3)
    assert {len(adapter.site.columns) for adapter in adapters_of(model) if adapter.site.columns} == {2}
    lora2fx.attach(model, torch.optim.AdamW(trained(model)), total_steps=10)
    model.train()
    twin = functional(model)
    for own in (model, twin):
        own(ids).last_hidden_state.sin().sum().backward()
    assert calls == {"product": 2, "product_of_columns": 2, "factors": 0}
    close([p.grad for p in trained(model)], [p.grad for p in trained(twin)])


@pytest.mark.usefixtures("_size")
@pytest.mark.parametrize("cast", [True, False], ids=["autocast", "a model in low precision"])
def test_low_precision_is_as_exact_as_the_functional_form(cast, calls):
    model, _ = parallel(dtype=torch.float32)
    if not cast:
        in_low_precision(model, torch.bfloat16)
    twin, exact = functional(model), functional(model).double()
    errors, usual = [], []
    for seed in range(9):
        x = activation(2, 5, 8, seed=seed).to(torch.float32 if cast else torch.bfloat16)
        found = []
        for own in (model, twin, exact):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast and own is not exact):
                y = own(x.double() if own is exact else x)
            found.append([y, *torch.autograd.grad(y.double().square().sum(), trained(own))])
        assert found[0][0].dtype == found[1][0].dtype == torch.bfloat16
        errors.append(distances([each.double() for each in found[0]], found[2]))
        usual.append(distances([each.double() for each in found[1]], found[2]))
    assert calls["factors"] == 0
    check_as_exact(errors, usual, torch.bfloat16)


@pytest.mark.usefixtures("_size")
def test_what_changes_between_forwards_is_seen():
    model, optimizer = parallel()
    x = activation(2, 5, 8)
    adapter = model.qkv.lora2fx_weight_key
    changes = [
        lambda: adapter.V.mul_(2),
        lambda: adapter.u.mul_(2),
        lambda: adapter.mask[1].fill_(False),
        lambda: adapter.column_mask[0].fill_(False),
    ]
    before = model(x)
    for change in changes:
        with torch.no_grad():
            change()
        found = model(x)
        close([found], [functional(model)(x)])
        assert not torch.equal(found, before)
        before = found
    found.square().sum().backward()
    optimizer.step()
    close([model(x)], [functional(model)(x)])


@pytest.mark.usefixtures("_size")
@pytest.mark.parametrize("probabilities", [(0.5, 0.5, 0.5), (0.5, 0.0, 0.5), (0.2, 0.3, 0.2), (1.0, 1.0, 1.0)])
def test_dropouts_draw_what_the_functional_form_draws(probabilities, calls):
    model, _ = parallel(LoRA(r=2, lora_dropout=0.5))
    for role, p in zip(("query", "key", "value"), probabilities, strict=True):
        adapter = model.qkv.get_submodule(f"lora2fx_weight_{role}")
        adapter.dropout.p = p
        adapter.dropout.train(p > 0)
    twin, found = functional(model), []
    for own in (model, twin):
        x = activation(2, 5, 8).requires_grad_()
        torch.manual_seed(5)
        first = torch.autograd.grad(own(x).square().sum(), [x, *trained(own)], create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), [x, *trained(own)])
        found.append([own(x), *first, *second])
    close(*found, 1e-11)
    one_product = products.SMALL == 0 and set(probabilities) == {0.5}
    assert calls["factors"] == (0 if one_product else 6 if products.SMALL == 0 else 8)
    for own in (model, twin):
        for adapter in adapters_of(own):
            adapter.dropout.eval()
    close([model(x)], [twin(x)])


@pytest.mark.usefixtures("_size")
def test_a_fused_weight_that_trains_gets_its_gradient(calls):
    model, _ = parallel()
    model.qkv.weight.requires_grad_()
    twin, x = functional(model), activation(2, 5, 8)
    close(*(torch.autograd.grad(own(x).square().sum(), trained(own)) for own in (model, twin)))
    assert calls["factors"] == 3


@pytest.mark.usefixtures("_size")
def test_whole_runs_end_alike():
    model, optimizer = parallel()
    twin, stepping = parallel()
    source = vars(adapters_of(twin)[0])[eager.SLOT].source
    eager.disconnect(source._adapters)
    for step in range(10):
        for own, optimiser in ((model, optimizer), (twin, stepping)):
            optimiser.zero_grad()
            own(activation(2, 5, 8, seed=step)).square().mean().backward()
            optimiser.step()
    close(*([value.double() for value in own.state_dict().values()] for own in (model, twin)), 1e-9)


class Rows(nn.Module):
    """A weight (in, out) and one (out, in), and a bias of each."""

    def __init__(self):
        super().__init__()
        self.up, self.up_bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))
        self.down, self.down_bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4))


class Operator(Rows):
    def forward(self, x):
        return (x @ self.up).tanh() @ self.down.T


class Method(Rows):
    def forward(self, x):
        return x.matmul(self.up).tanh().matmul(self.down.t())


class Added(Rows):
    def forward(self, x):
        y = torch.addmm(self.up_bias, x.view(-1, 8), self.up).tanh()
        return torch.addmm(self.down_bias, y, self.down.transpose(0, 1))


class Multiplied(Rows):
    def forward(self, x):
        return torch.mm(torch.mm(x.reshape(-1, 8), self.up).tanh(), self.down.T)


class Biased(Rows):
    def forward(self, x):
        return F.linear(torch.matmul(x, self.up) + self.up_bias, self.down, self.down_bias)


class Computed(Rows):
    """The bias is no parameter: not a linear layer."""

    def forward(self, x):
        y = torch.addmm(self.up_bias * 2, x.view(-1, 8), self.up).tanh()
        return F.linear(y, self.down, self.down_bias + 1)


@pytest.mark.usefixtures("_size")
@pytest.mark.parametrize("form", [Operator, Method, Added, Multiplied, Biased, Computed])
def test_a_linear_layer_however_it_is_written(form, calls):
    torch.manual_seed(0)
    model, _ = attach(form(), METHODS[0], ["up", "down"], activation(3, 5, 8))
    assert {adapter.rewrite for adapter in adapters_of(model)} == {"activation"}
    twin, x = functional(model), activation(3, 5, 8)
    found = [[y := own(x), *torch.autograd.grad(y.square().sum(), trained(own))] for own in (model, twin)]
    close(*found)
    assert calls == {
        "product": 0 if form is Computed else 2,
        "product_of_columns": 0,
        "factors": 2 * (form is Computed),
    }


def phi(dtype):
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    config = Phi3Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=32, **heads)
    config.resid_pdrop = config.embd_pdrop = config.attention_dropout = 0.0
    return Phi3Model(config).to(dtype).requires_grad_(False).train()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_weights_keep_no_input_for_the_backward(dtype, dropout, monkeypatch):
    monkeypatch.setattr(products, "SMALL", 0)
    model, frozen = phi(dtype), phi(dtype)
    method, ids = LoRA(r=2, lora_dropout=dropout), torch.arange(8).view(2, 4)
    lora2fx.transform(model, ["attention", "ffn"], method, example_inputs=(ids,), seed=0)
    lora2fx.attach(model, torch.optim.AdamW(trained(model)), total_steps=10)
    x = torch.randn(4, 64, 64).to(dtype).requires_grad_()
    kept, own = (
        saved_bytes(lambda m=m: m(inputs_embeds=x, use_cache=False)[0].float().sum(), state_of(m))
        for m in (model, frozen)
    )
    tokens = 4 * 64
    inner = 2 * (3 + 1 + 2 + 1) * 2 * tokens * 4
    factors = 4 * 2 * 2 * 4 * (3 * 64 + 128 + 64 + 64 + 2 * 64 + 192 + 96 + 64)
    output = 2 * tokens * 64 * dtype.itemsize  # the heads put together, which the frozen projection doesn't keep
    masks = 2 * tokens * ((3 + 2) * 64 + 64 + 96) if dropout else 0  # a byte an element and adapter
    assert kept <= own + inner + factors + output + masks


def test_a_fused_weight_costs_few_operations():
    def counts(targets):
        model, _ = parallel(LoRA(r=2), targets)
        x = activation(2, 5, 8)

        def passes():
            model.zero_grad()
            model(x).square().mean().backward()

        for _ in range(3):
            passes()
        return dispatched_operations(passes).total()

    assert counts(("query", "key", "value", "re:fc.*")) - counts(("re:fc.*",)) <= 6 + 2 * 3 + 16
