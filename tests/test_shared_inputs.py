"""Which weights a recorded forward multiplies with one and the same activation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora2fx.analysis import analyse


class Layers(nn.Module):
    """Three linear layers of six inputs, and whatever `run` does with them."""

    def __init__(self, run):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def shared(run, shape=(2, 8, 6)):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return [tuple(name.removesuffix(".weight") for name in group) for group in analyse(Layers(run), (x,), True).shared]


@pytest.mark.parametrize("shape", [(2, 8, 6), (8, 6), (2, 2, 8, 6)])
def test_layers_of_one_input_are_found_in_the_order_of_their_calls(shape):
    assert shared(lambda m, x: m.c(m.b(x) + m.a(x)), shape) == [("b", "a")]
    assert shared(lambda m, x: m.a(x) * m.b(x) + m.c(x), shape) == [("a", "b", "c")]


def test_an_input_that_is_not_contiguous_is_one_too():
    assert shared(lambda m, x: m.a(x.mT.tanh().mT) + m.b(x)) == []
    assert shared(lambda m, x: both(m, x.mT.tanh().mT)) == [("a", "b")]


def both(model, x):
    return model.a(x) + model.b(x)


def test_another_tensor_of_the_same_values_is_another_input():
    assert shared(lambda m, x: m.a(x + 1) + m.b(x + 1)) == []
    assert shared(lambda m, x: m.a(x.reshape(-1, 6)).view(x.shape) + m.b(x)) == [("a", "b")]  # told in the first step


def test_a_layer_that_is_used_again_in_other_company_is_in_no_group():
    assert shared(lambda m, x: m.a(m.a(x) + m.b(x))) == []
    assert shared(lambda m, x: both(m, both(m, x).tanh())) == [("a", "b")]
    assert shared(lambda m, x: both(m, x) + m.a(x)) == []


def test_layers_written_out_are_found_by_their_weights():
    assert shared(lambda m, x: F.linear(x, m.a.weight) + x @ m.b.weight.t()) == [("a", "b")]
