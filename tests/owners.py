"""Modules whose forward one trace does not tell, each with the reason that tracing must give and how to use it."""

from __future__ import annotations

import contextlib
import enum
import functools
import random
from statistics import mean
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

FLAG = 2.0


class Mode(enum.Enum):
    SOFT = 1.0
    HARD = 2.0


class Settings:
    scale = 2.0


def branchy(x):
    return x if x is not None else 0


def scaled(function):
    @functools.wraps(function)
    def inner(self, *args):
        return function(self, *args) * 2

    return inner


@contextlib.contextmanager
def nothing():
    yield


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad * 2 * ctx.saved_tensors[0]


class Base(nn.Module):
    """4 → 4 through the raw parameter `w`, with all kinds of state beside it."""

    SCALES: ClassVar = {"x": 2.0}

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.scale = 2.0
        self.calls = 0
        self.config = {"scale": 2.0}
        self.act = F.gelu
        self.mask = None
        self.drop = nn.Dropout(0.5)
        self.register_buffer("offset", torch.ones(4))


class BranchOnTraining(Base):
    def forward(self, x):
        return x @ self.w if self.training else x - x @ self.w


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


class BranchOnAttribute(Base):
    def forward(self, x):
        return x @ self.w if self.calls else x * 2 @ self.w


class OptionalMask(Base):
    def forward(self, x):
        return x @ self.w if self.mask is None else x @ self.w * self.mask


class ShortCircuit(Base):
    def forward(self, x):
        return (x @ self.w) * (self.calls or 3)


class Global(Base):
    def forward(self, x):
        return x @ self.w * FLAG


class GlobalClass(Base):
    def forward(self, x):
        return x @ self.w * Settings.scale


class GlobalEnum(Base):
    def forward(self, x):
        return x @ self.w * Mode.SOFT.value


class ClassTable(Base):
    def forward(self, x):
        return x @ self.w * self.SCALES["x"]


class ConfigObject(Base):
    def forward(self, x):
        return x @ self.w * self.config["scale"]


class CallableAttribute(Base):
    def forward(self, x):
        return self.act(x @ self.w)


class ChildsState(Base):
    def forward(self, x):
        return F.dropout(x @ self.w, self.drop.p, self.training)


class NoGrad(Base):
    def forward(self, x):
        with torch.no_grad():
            x = x * 2
        return x @ self.w


class NoGradDecorator(Base):
    @torch.no_grad()
    def double(self, x):
        return x * 2

    def forward(self, x):
        return self.double(x) @ self.w


class Autocast(Base):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return x @ self.w


class AutocastDecorator(Base):
    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        return x @ self.w


class OwnContext(Base):
    def forward(self, x):
        with nothing():
            return x @ self.w


class GradMode(Base):
    def forward(self, x):
        return x @ self.w * (1 + torch.is_grad_enabled())


class Checkpointed(Base):
    def body(self, x):
        return torch.tanh(x @ self.w)

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


class Decorated(Base):
    @scaled
    def forward(self, x):
        return x @ self.w


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
        return x @ self.w * self.calls


class ReassignedBuffer(Base):
    def forward(self, x):
        self.offset = self.offset * 0.9
        return x @ self.w + self.offset


class Loop(Base):
    def forward(self, x):
        for _ in range(2):
            x = x @ self.w
        return x


class Comprehension(Base):
    def forward(self, x):
        return torch.stack([part @ self.w for part in x.unbind(0)])


class Caught(Base):
    def forward(self, x):
        try:
            return x.missing @ self.w
        except AttributeError:
            return x @ self.w


class BranchInCallee(Base):
    def forward(self, x):
        return branchy(x @ self.w)


class LibraryCallee(Base):
    def forward(self, x):
        return x @ self.w * mean((2.0, 4.0))


class DataDependent(Base):
    def forward(self, x):
        return x @ self.w if x.sum() > 0 else x - x @ self.w


class CustomFunction(Base):
    def forward(self, x):
        return Square.apply(x @ self.w)


class ShapeConstant(Base):
    def forward(self, x):
        return (x @ self.w).reshape(int(x.shape[0]), -1, 4)


class SliceAssignment(Base):
    def forward(self, x):
        y = x @ self.w
        y[..., :2] = 0
        return y


class EnumDefault(Base):
    def forward(self, x, mode=Mode.SOFT):
        return x @ self.w


UNSAFE = {
    BranchOnTraining: "control flow",
    BranchOnNone: "branches or loops",
    BranchOnIsinstance: "branches or loops|reads the global isinstance",
    IsinstanceWithoutBranch: "reads the global isinstance",
    BranchOnAttribute: "control flow",
    OptionalMask: "branches or loops",
    ShortCircuit: "control flow",
    Global: "reads the global FLAG",
    GlobalClass: "reads the global Settings",
    GlobalEnum: "reads the global Mode",
    ClassTable: "reads self.SCALES, a dict",
    ConfigObject: "reads self.config, a dict",
    CallableAttribute: "reads self.act, a",
    ChildsState: "reads .p of a Dropout in it",
    NoGrad: "has a with block|runs under torch.autograd.grad_mode",
    NoGradDecorator: "runs under torch.*a mode that a graph doesn't hold",
    Autocast: "has a with block|runs under torch.amp.autocast_mode",
    AutocastDecorator: "runs under torch.*a mode that a graph doesn't hold",
    OwnContext: "has a with block|reads the global nothing",
    GradMode: "asks is_grad_enabled",
    Checkpointed: "runs under torch.*a mode that a graph doesn't hold|tracing stopped|find_spec",
    Decorated: "closure variable",
    PythonRandom: "reads the global random",
    TorchRandom: "depends on no input",
    TorchRandomItem: "asks item",
    Counter: "writes an attribute|reads self.calls",
    ReassignedBuffer: "writes an attribute",
    Loop: "branches or loops|reads the global range",
    Comprehension: "control flow|iterated|branches or loops",
    Caught: "catches exceptions",
    BranchInCallee: "branchy branches",
    LibraryCallee: "reads the global mean",
    DataDependent: "control flow",
    CustomFunction: "tracing stopped|closure|global",
    ShapeConstant: "tracing stopped|global int",
    SliceAssignment: "item assignment",
    EnumDefault: "a default of mode that source code can't say",
}
