"""Each way to multiply by a weight, rewritten and checked in float64 against the weight written out; end to end."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora2fx
from lora2fx.adapter import Adapter
from lora2fx.errors import RewriteError, TargetError
from lora2fx.methods.lora import LoRA
from lora2fx.methods.lora2 import LoRA2

IDS = torch.tensor([[1, 5, 0, 2, 0], [3, 3, 6, 0, 1]])


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def form(shape, use):
    """A fresh class, so that each has its own forward."""
    return type("Form", (nn.Module,), {"__init__": _init(shape), "forward": use})()


def _init(shape):
    def init(self):
        nn.Module.__init__(self)
        self.w, self.b = nn.Parameter(torch.randn(shape) * 0.5), nn.Parameter(torch.randn(6))

    return init


X = (normal(3, 7, 4),)
STACK = (normal(2, 7, 4),)
IMAGE = (normal(2, 4, 9, 8),)
VIDEO = (normal(2, 4, 5, 6, 7),)
WORDS = (IDS,)

ACTIVATION = {
    "linear": ((6, 4), lambda self, x: F.linear(x, self.w, self.b), X),
    "linear by name": ((6, 4), lambda self, x: F.linear(input=x, weight=self.w, bias=self.b), X),
    "matmul": ((4, 6), lambda self, x: torch.matmul(x, self.w), X),
    "matmul by name": ((4, 6), lambda self, x: torch.matmul(input=x, other=self.w), X),
    "at": ((4, 6), lambda self, x: x @ self.w, X),
    "a method": ((4, 6), lambda self, x: x.matmul(self.w), X),
    "mm": ((4, 6), lambda self, x: torch.mm(x.flatten(0, 1), self.w), X),
    "addmm": ((4, 6), lambda self, x: torch.addmm(self.b, x.flatten(0, 1), self.w), X),
    "addmm by name": ((4, 6), lambda self, x: torch.addmm(self.b, mat1=x.flatten(0, 1), mat2=self.w), X),
    "addmm as a method": ((4, 6), lambda self, x: self.b.addmm(x.flatten(0, 1), self.w), X),
    "transposed": ((6, 4), lambda self, x: x @ self.w.t(), X),
    "T": ((6, 4), lambda self, x: x @ self.w.T, X),
    "transpose": ((6, 4), lambda self, x: torch.matmul(x, self.w.transpose(-1, -2)), X),
    "linear of a transpose": ((4, 6), lambda self, x: F.linear(x, self.w.mT, self.b), X),
    "its dtype asked": ((6, 4), lambda self, x: F.linear(x.to(self.w.dtype), self.w), X),
    "its shape asked": ((4, 6), lambda self, x: (x.reshape(-1, self.w.shape[0]) @ self.w).type_as(self.w), X),
    "bmm": ((2, 4, 6), lambda self, x: torch.bmm(x, self.w), STACK),
    "bmm as a method": ((2, 4, 6), lambda self, x: x.bmm(self.w), STACK),
    "baddbmm": ((2, 4, 6), lambda self, x: torch.baddbmm(self.b, x, self.w), STACK),
    "embedding": ((7, 6), lambda self, ids: F.embedding(ids, self.w), WORDS),
    "embedding with padding": ((7, 6), lambda self, ids: F.embedding(ids, self.w, 0), WORDS),
    "embedding with padding at the end": ((7, 6), lambda self, ids: F.embedding(ids, self.w, padding_idx=-1), WORDS),
    "in place behind": ((6, 4), lambda self, x: F.linear(x, self.w).mul_(2).relu_(), X),
}
WEIGHT = {
    "scaled addmm": ((4, 6), lambda self, x: torch.addmm(self.b, x.flatten(0, 1), self.w, beta=2, alpha=0.5), X),
    "einsum": ((4, 2, 3), lambda self, x: torch.einsum("btd,dhk->bhtk", x, self.w), X),
    "the weight in front": ((6, 4), lambda self, x: self.w @ x.mT, X),
    "batched matmul": ((2, 4, 6), lambda self, x: x @ self.w, STACK),
    "twice": ((4, 4), lambda self, x: torch.tanh(x @ self.w) @ self.w, X),
    "twice, once transposed": ((4, 4), lambda self, x: torch.tanh(x @ self.w) @ self.w.t(), X),
    "a slice": ((6, 4), lambda self, x: F.linear(x, self.w[:3], self.b[:3]), X),
    "slices": ((6, 4), lambda self, x: F.linear(x, self.w[:3]) * F.linear(x, self.w[3:]), X),
    "chunks": ((6, 4), lambda self, x: F.linear(x, self.w.chunk(2)[1]) + F.linear(x, self.w.chunk(2)[0]), X),
    "scaled": ((6, 4), lambda self, x: F.linear(x, self.w * 0.5), X),
    "reshaped": ((2, 3, 4), lambda self, x: F.linear(x, self.w.reshape(6, 4)), X),
    "conv1d": ((6, 4, 3), lambda self, x: F.conv1d(x.mT, self.w, self.b, padding=1), X),
    "conv2d": ((6, 4, 3, 2), lambda self, x: F.conv2d(x, self.w, self.b, stride=(2, 1)), IMAGE),
    "conv2d in groups": ((6, 2, 3, 3), lambda self, x: F.conv2d(x, self.w, self.b, dilation=2, groups=2), IMAGE),
    "depthwise": ((8, 1, 3, 3), lambda self, x: F.conv2d(x, self.w, groups=4), IMAGE),
    "conv3d": ((6, 4, 2, 3, 2), lambda self, x: F.conv3d(x, self.w, self.b, stride=2), VIDEO),
    "transposed conv1d": ((4, 6, 3), lambda self, x: F.conv_transpose1d(x.mT, self.w, self.b, stride=2), X),
    "transposed conv2d": ((4, 3, 3, 2), lambda self, x: F.conv_transpose2d(x, self.w, groups=2), IMAGE),
    "embedding scaled by frequency": ((7, 6), lambda self, ids: F.embedding(ids, self.w, None, None, 2.0, True), WORDS),
    "embedding bag": ((7, 6), lambda self, ids: F.embedding_bag(ids, self.w, mode="mean"), WORDS),
}
FORMS = {name: (*rest, "activation") for name, rest in ACTIVATION.items()}
FORMS |= {name: (*rest, "weight") for name, rest in WEIGHT.items()}


@pytest.fixture(params=FORMS)
def case(request):
    shape, use, inputs, rewrite = FORMS[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return form(shape, use).double(), inputs, rewrite


def randomise(model):
    generator = torch.Generator().manual_seed(2)
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    with torch.no_grad():
        for adapter in adapters:
            for parameter in adapter.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return adapters


def delta(adapter):
    """s · u v diag(λ) U V as the weight's own change, the padding row 0."""
    product = adapter.scale * (adapter.u @ adapter.v) @ (adapter.lam.unsqueeze(-1) * (adapter.U @ adapter.V))
    site = adapter.site
    if adapter.padding is not None:
        product = product.index_fill(-2, adapter.padding, 0)
    if site.columns is not None:
        whole = product.new_zeros(*site.batch_shape, site.in_features, site.weight_out_features)
        product = whole.index_add(-1, site.column_index(), product)
    return site.from_matrix(product)


def test_every_form_end_to_end(case):
    model, inputs, rewrite = case
    base = copy.deepcopy(model)
    lora2fx.transform(model, "name:w", LoRA2(r=3, k=2), example_inputs=inputs, seed=0)
    report = lora2fx.report(model).to_dict()
    assert [site["rewrite"] for site in report["sites"] if site["rewrite"]] == [rewrite]
    assert report["verify"]["status"] == "passed"
    assert torch.equal(model(*inputs), base(*inputs))
    (adapter,) = randomise(model)
    oracle = copy.deepcopy(base).requires_grad_(True)
    with torch.no_grad():
        oracle.w += delta(adapter)
    output, expected = model(*inputs), oracle(*inputs)
    assert (expected - base(*inputs)).abs().max() > 1e-2
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    cotangent = normal(*output.shape)
    output.backward(cotangent)
    expected.backward(cotangent)
    wanted = torch.autograd.grad(delta(adapter), list(adapter.parameters()), oracle.w.grad)
    for parameter, gradient in zip(adapter.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-10)
    lora2fx.fold(model)
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-12, atol=1e-12)


EMBEDDINGS = {
    "plain": (lambda: nn.Embedding(7, 6), "activation"),
    "padding": (lambda: nn.Embedding(7, 6, padding_idx=0), "activation"),
    "padding from the end": (lambda: nn.Embedding(7, 6, padding_idx=-1), "activation"),
    "sparse": (lambda: nn.Embedding(7, 6, sparse=True), "activation"),
    "scaled": (lambda: nn.Embedding(7, 6, scale_grad_by_freq=True), "weight"),
    "bag": (lambda: nn.EmbeddingBag(7, 6, padding_idx=0), "weight"),
}


@pytest.mark.parametrize(("make", "rewrite"), EMBEDDINGS.values(), ids=EMBEDDINGS)
def test_embeddings_of_every_kind(make, rewrite):
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Linear(6, 5)).double()
    base = copy.deepcopy(model)
    lora2fx.transform(model, "0", LoRA2(r=3, k=2), example_inputs=(IDS,), seed=0)
    report = lora2fx.report(model).to_dict()
    assert [site["rewrite"] for site in report["sites"] if site["rewrite"]] == [rewrite]
    assert torch.equal(model(IDS), base(IDS))
    (adapter,) = randomise(model)
    with torch.no_grad():
        base[0].weight += delta(adapter)
    torch.testing.assert_close(model(IDS), base(IDS), rtol=1e-12, atol=1e-12)
    kept = model[0].padding_idx
    before = model[0]._parameters["weight"].detach().clone()
    expected = model(IDS)
    lora2fx.fold(model)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-12, atol=1e-12)
    moved = (model[0].weight != before).any(1)
    assert not moved[kept] if kept is not None else moved.all()


def test_an_embedding_that_rescales_itself_is_refused_with_the_way_out():
    model = nn.Sequential(nn.Embedding(7, 6, max_norm=1.0), nn.Linear(6, 5))
    with pytest.raises(TargetError, match=r"0\.weight can't be adapted: .*max_norm=None"):
        lora2fx.transform(model, "0", example_inputs=(IDS,))


def test_a_lookup_never_materialises_the_update():
    """The update of 100000 rows would be a thousand times what five looked up rows need."""
    model = nn.Sequential(nn.Embedding(100_000, 8))
    lora2fx.transform(model, "0", LoRA2(r=2, k=2), example_inputs=(IDS,), seed=0)
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and not func.is_view:
                largest.append(made.numel())
            return made

    with Sizes(), torch.no_grad():
        model(IDS)
    assert max(largest) <= IDS.numel() * 8


def test_dropout_on_a_lookup_is_refused_with_the_way_out():
    model = nn.Sequential(nn.Embedding(7, 6))
    with pytest.raises(RewriteError, match=r"0\.weight.*looked up.*lora_dropout=0"):
        lora2fx.transform(model, "0", LoRA(r=2, lora_dropout=0.1), example_inputs=(IDS,))
    assert list(model.state_dict()) == ["0.weight"]


class Stack(nn.Module):
    """Experts as one 3-D parameter, routed by hand, as in mixtures of experts."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 4)), nn.Parameter(torch.randn(3, 4, 8))

    def forward(self, x, expert):
        mixed = torch.zeros_like(x)
        for index in range(len(self.up)):
            rows = expert == index
            if rows.any():
                mixed[rows] = F.linear(torch.relu(F.linear(x[rows], self.up[index])), self.down[index])
        return mixed


def test_a_stack_of_experts_gets_one_low_rank_update_each():
    torch.manual_seed(0)
    model, inputs = Stack().double(), (normal(11, 4), torch.arange(11) % 3)
    base = copy.deepcopy(model)
    lora2fx.transform(model, ["up", "down"], LoRA2(r=3, k=2), example_inputs=inputs, seed=0)
    adapters = randomise(model)
    assert [adapter.site.batch_shape for adapter in adapters] == [(3,), (3,)]
    assert {adapter.rewrite for adapter in adapters} == {"property"}
    with torch.no_grad():
        base.up += delta(adapters[0])
        base.down += delta(adapters[1])
    torch.testing.assert_close(model(*inputs), base(*inputs), rtol=1e-12, atol=1e-12)


class Lists(nn.Module):
    """Weights in torch's own parameter containers, which run no forward of their own."""

    def __init__(self):
        super().__init__()
        self.many = nn.ParameterList([torch.randn(4, 4) for _ in range(2)])
        self.named = nn.ParameterDict({"out": torch.randn(4, 5)})

    def forward(self, x):
        for weight in self.many:
            x = torch.tanh(x @ weight)
        return x @ self.named["out"]


def test_weights_in_parameter_containers():
    torch.manual_seed(0)
    model = Lists().double()
    base = copy.deepcopy(model)
    lora2fx.transform(model, "all-linear", LoRA2(r=3, k=2), example_inputs=X, seed=0)
    adapters = randomise(model)
    assert [adapter.site.weight for adapter in adapters] == ["many.0", "many.1", "named.out"]
    with torch.no_grad():
        for adapter in adapters:
            base.get_parameter(adapter.site.weight).add_(delta(adapter))
    torch.testing.assert_close(model(*X), base(*X), rtol=1e-12, atol=1e-12)
    assert len(model.many) == 2
    lora2fx.fold(model)
    torch.testing.assert_close(model(*X), base(*X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("role", ["query", "key", "value", "output", "attention", "ffn"])
def test_torchs_own_attention_adapts_just_the_role(role, fast):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).double().eval()
    x, base = normal(2, 5, 8), copy.deepcopy(model)
    lora2fx.transform(model, role, LoRA2(r=3, k=2), example_inputs=(x,), seed=0)
    adapters = randomise(model)
    with torch.no_grad():
        for adapter in adapters:
            base.get_parameter(adapter.site.weight).add_(delta(adapter))
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(model(x), base(x), rtol=1e-11, atol=1e-11)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(4, 5, 2, batch_first=True, bidirectional=True),
        lambda: nn.GRU(4, 5, batch_first=True),
        lambda: nn.RNN(4, 5, batch_first=True),
        lambda: nn.LSTM(4, 5, batch_first=True, dropout=0.0, proj_size=3),
    ],
    ids=["LSTM", "GRU", "RNN", "projected LSTM"],
)
def test_recurrent_layers(make):
    torch.manual_seed(0)
    model = make().double()
    base = copy.deepcopy(model)
    lora2fx.transform(model, "all-linear", LoRA2(r=3, k=2), example_inputs=X, seed=0)
    adapters = randomise(model)
    assert len(adapters) == sum(value.dim() == 2 for value in base.parameters())
    with torch.no_grad():
        for adapter in adapters:
            base.get_parameter(adapter.site.weight).add_(delta(adapter))
    for mode in (True, False):
        model.train(mode)
        base.train(mode)
        torch.testing.assert_close(model(*X)[0], base(*X)[0], rtol=1e-12, atol=1e-12)
    twin = copy.deepcopy(model)
    lora2fx.fold(model)
    for other in (model, twin):
        torch.testing.assert_close(other(*X)[0], base(*X)[0], rtol=1e-12, atol=1e-12)
