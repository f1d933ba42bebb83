"""Base and merged model are the same but for their values, or the export is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lora2fx.errors import ExportError
from lora2fx.exporters.copies import copies_of
from lora2fx.exporters.onnx_graph import paired_constants
from lora2fx.exporters.onnx_program import optimised, trace_program
from lora2fx.exporters.onnx_twin import check_structure, export_pair
from tests.exported import adapt

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(40, 40), nn.Linear(40, 3)
        self.register_buffer("shift", torch.full((40,), 0.5), persistent=False)
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.second((self.first(x) * self.scale + self.shift).tanh())


def copies():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return copies_of(adapt(Network(), ["first.weight"]), "test")


def test_the_twin_is_what_a_second_trace_gives():
    made, x = copies(), {"x": torch.randn(3, 40)}
    base, merged = export_pair(made.base, made.merged, x, {"x": {0: "batch"}}, ["y"], 20)
    program = trace_program(made.base, x, {"x": {0: "batch"}}, ["y"], 20)
    traced = optimised(program, program.model)
    for pair in paired_constants(traced, base):
        assert pair.first.numpy().tobytes() == pair.second.numpy().tobytes()
    changed = [pair for pair in paired_constants(base, merged) if (pair.first.numpy() != pair.second.numpy()).any()]
    assert [pair.first.shape.numpy() for pair in changed] == [(40, 40)]


def attribute(model):
    model.scale = 3.0


def hook(model):
    model.first.register_forward_hook(lambda *given: None)


def added(model):
    model.third = nn.Identity()


def other_class(model):
    model.second.__class__ = type("Other", (nn.Linear,), {})


def other_shape(model):
    model.second.bias = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (attribute, "an attribute of 'the model itself' is .*3.0"),
        (hook, "the number of hooks of 'first'"),
        (added, "only one of them has the module 'third'"),
        (other_class, "the class of 'second'"),
        (other_shape, "the shape or dtype of 'second'"),
    ],
)
def test_a_difference_in_structure_is_named(change, message):
    made = copies()
    check_structure(made.base, made.merged)
    change(made.merged)
    with pytest.raises(ExportError, match=message):
        check_structure(made.base, made.merged)


def test_a_merge_that_left_an_adapter_is_caught():
    made = copies()
    with pytest.raises(ExportError, match="still holds an adapter"):
        check_structure(made.adapted, made.adapted)
