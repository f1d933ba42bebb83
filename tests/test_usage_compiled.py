"""torch.compile and torch.export of adapted models: one graph, no recompilation, the adapters in it."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import lora2fx
from tests.usage import FAMILIES, METHOD, TARGETS, adapted, adapters_of, close, floats, randomise
from tests.zoo import ZOO


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def changing_masks(model, call):
    """Run with all ranks, without the first of each site, and with none."""
    found = []
    for keep in (slice(0), slice(1), slice(None)):
        for adapter in adapters_of(model):
            next(iter(adapter.axes().values())).mask[keep] = False
        with torch.no_grad():
            found.append([tensor.clone() for tensor in floats(call(model))])
    return found


@pytest.mark.parametrize("name", ["vit_plain", "bert", "gpt2", "encoder", "einsum", "mha"])
def test_compiles_to_one_graph_that_masks_do_not_break(name):
    model, inputs = adapted(name)
    expected = changing_masks(copy.deepcopy(model), inputs.call)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = changing_masks(model, lambda _: inputs.call(compiled))
    assert counters["stats"]["unique_graphs"] == 1
    for one, other in zip(found, expected, strict=True):
        close(one, other)
    assert not any(torch.allclose(one[0], other[0]) for one, other in pairwise(found))


class EveryRewrite(nn.Module):
    """A linear (activation), a raw weight in an einsum (weight), torch's attention (property)."""

    def __init__(self):
        super().__init__()
        self.linear, self.attention = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.w = nn.Parameter(torch.randn(8, 2, 3))

    def forward(self, x):
        x = self.linear(x)
        x = self.attention(x, x, x, need_weights=False)[0]
        return torch.einsum("btd,dhk->bhtk", x, self.w)


def test_compiled_gradients_are_the_eager_ones():
    torch.manual_seed(0)
    model, x = EveryRewrite().double(), torch.randn(2, 5, 6, dtype=torch.float64)
    lora2fx.transform(model, lambda site: True, METHOD, example_inputs=(x,), seed=0)
    assert {adapter.rewrite for adapter in adapters_of(model)} == {"activation", "weight", "property"}
    randomise(model)

    def gradients(run):
        model.zero_grad()
        run(x).square().sum().backward()
        return [parameter.grad.clone() for adapter in adapters_of(model) for parameter in adapter.parameters()]

    eager = gradients(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(gradients(compiled), eager, 1e-9)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for adapter in adapters_of(model):
            adapter.mask[0] = False
        close(gradients(compiled), gradients(model), 1e-9)


def test_a_model_compiled_before_is_compiled_again_with_its_adapters():
    architecture = ZOO["vit_plain"]
    model = architecture.build()
    compiled = torch.compile(model, backend="eager")
    base = compiled(*architecture.example_inputs).clone()
    lora2fx.transform(model, TARGETS, METHOD, example_inputs=architecture.example_inputs, seed=0)
    assert torch.equal(compiled(*architecture.example_inputs), base)
    randomise(model)
    close([compiled(*architecture.example_inputs)], [model(*architecture.example_inputs)])
    lora2fx.unload(model)
    assert torch.equal(compiled(*architecture.example_inputs), base)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("gpt2", "llama", "t5")])
def test_exports_with_the_adapters_in_it(name):
    model, inputs = adapted(name)
    exported = torch.export.export(model, inputs.args, dict(inputs.kwargs)).module()
    close(floats(inputs.call(exported)), floats(inputs.call(model)))
    assert any("lora2fx_" in str(node.target) for node in exported.graph.nodes)
