"""An owner is traced only where one trace tells every later call."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora2fx.passes.tracing import UntraceableError, trace_owner

FLAG = 2.0


def branchy(x):
    return x if x is not None else 0


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad * 2 * ctx.saved_tensors[0]


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.scale = 2.0
        self.calls = 0
        self.config = {"scale": 2.0}
        self.act = F.gelu
        self.register_buffer("offset", torch.ones(4))


class BranchOnTraining(Base):
    def forward(self, x):
        return x @ self.w if self.training else x


class BranchOnNone(Base):
    def forward(self, x, mask=None):
        return x @ self.w if mask is None else x @ self.w * mask


class BranchOnIsinstance(Base):
    def forward(self, x):
        x = x[0] if isinstance(x, tuple) else x
        return x @ self.w


class IsinstanceWithoutBranch(Base):
    def forward(self, x):
        return x @ self.w * (1 + isinstance(x, tuple))


class Global(Base):
    def forward(self, x):
        return x @ self.w * FLAG


class NoGrad(Base):
    def forward(self, x):
        with torch.no_grad():
            x = x * 2
        return x @ self.w


class Autocast(Base):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return x @ self.w


class GradMode(Base):
    def forward(self, x):
        return x @ self.w * (1 + torch.is_grad_enabled())


class PythonRandom(Base):
    def forward(self, x):
        return x @ self.w * random.random()


class TorchRandom(Base):
    def forward(self, x):
        return x @ self.w * torch.rand(())


class TorchRandomItem(Base):
    def forward(self, x):
        return x @ self.w * torch.rand(()).item()


class Counter(Base):
    def forward(self, x):
        self.calls += 1
        return x @ self.w


class ReassignedBuffer(Base):
    def forward(self, x):
        self.offset = self.offset * 0.9
        return x @ self.w + self.offset


class Loop(Base):
    def forward(self, x):
        for _ in range(2):
            x = x @ self.w
        return x


class ConfigObject(Base):
    def forward(self, x):
        return x @ self.w * self.config["scale"]


class CallableAttribute(Base):
    def forward(self, x):
        return self.act(x @ self.w)


class BranchInCallee(Base):
    def forward(self, x):
        return branchy(x @ self.w)


class DataDependent(Base):
    def forward(self, x):
        return x @ self.w if x.sum() > 0 else x


class CustomFunction(Base):
    def forward(self, x):
        return Square.apply(x @ self.w)


class ShapeConstant(Base):
    def forward(self, x):
        return (x @ self.w).reshape(int(x.shape[0]), -1)


class SliceAssignment(Base):
    def forward(self, x):
        y = x @ self.w
        y[..., :2] = 0
        return y


UNSAFE = {
    BranchOnTraining: "control flow",
    BranchOnNone: "branches or loops",
    BranchOnIsinstance: "branches or loops|reads the global isinstance",
    IsinstanceWithoutBranch: "reads the global isinstance",
    Global: "reads the global FLAG",
    NoGrad: "has a with block",
    Autocast: "has a with block",
    GradMode: "asks is_grad_enabled",
    PythonRandom: "reads the global random",
    TorchRandom: "depends on no input",
    TorchRandomItem: "asks item",
    Counter: "writes an attribute",
    ReassignedBuffer: "writes an attribute",
    Loop: "branches or loops|reads the global range",
    ConfigObject: "reads self.config, a dict",
    CallableAttribute: "reads self.act, a",
    BranchInCallee: "branchy branches",
    DataDependent: "control flow",
    CustomFunction: "tracing stopped|closure|global",
    ShapeConstant: "tracing stopped|global int",
    SliceAssignment: "item assignment",
}


@pytest.mark.parametrize("module", UNSAFE, ids=lambda module: module.__name__)
def test_unsafe_owner_is_refused_with_the_reason_and_left_alone(module):
    owner = module()
    state = dict(vars(owner))
    with pytest.raises(UntraceableError, match=UNSAFE[module]):
        trace_owner(owner)
    assert type(owner) is module
    assert vars(owner) == state


class ReadsScalars(Base):
    def forward(self, x):
        return F.dropout(x @ self.w * self.scale, 0.5, self.training) + self.offset * self.offset


def test_scalars_and_the_training_flag_stay_reads():
    source = trace_owner(ReadsScalars()).python_code("self").src
    assert "self.scale" in source
    assert "self.training" in source


def test_arithmetic_on_buffers_alone_is_not_folded_away():
    assert "self.offset" in trace_owner(ReadsScalars()).python_code("self").src


@pytest.mark.parametrize(
    "owner",
    [
        nn.Linear(4, 3),
        nn.Linear(4, 3, bias=False),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv1d(4, 6, 3, groups=2),
        nn.Embedding(5, 4),
        Conv1D(6, 4),
    ],
    ids=repr,
)
def test_owners_of_torch_and_transformers_are_traced(owner):
    graph = trace_owner(owner)
    assert [node.target for node in graph.nodes if node.op == "get_attr"].count("weight") == 1


def test_signature_keeps_names_defaults_and_keywords():
    class Keywords(Base):
        def forward(self, x, shift=1.0, *, factor=2.0):
            return x @ self.w * factor + shift

    code = trace_owner(Keywords()).python_code("self").src
    assert "def forward(self, x, shift = 1.0, factor = 2.0):" in code
