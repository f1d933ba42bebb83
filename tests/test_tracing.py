"""An owner is traced only where one trace tells every later call."""

import gc
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora2fx.passes.tracing import UntraceableError, trace_owner
from tests.owners import UNSAFE, Base


@pytest.mark.parametrize("module", UNSAFE, ids=lambda module: module.__name__)
def test_unsafe_owner_is_refused_with_the_reason_and_left_alone(module):
    owner = module()
    state = dict(vars(owner))
    with pytest.raises(UntraceableError, match=UNSAFE[module]):
        trace_owner(owner)
    assert type(owner) is module
    assert vars(owner) == state


def test_a_forward_set_on_the_module_itself_is_not_taken_for_its_classs():
    owner = nn.Linear(4, 4)
    owner.forward = types.MethodType(lambda self, x: x, owner)
    with pytest.raises(UntraceableError, match="its forward is set on the module itself"):
        trace_owner(owner)


class Reflecting(nn.Conv1d):
    """Inherits torch's forward, and branches in a method that it calls."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight, bias) if self.training else x


def test_a_subclass_of_torchs_own_module_is_looked_at_itself():
    with pytest.raises(UntraceableError, match="control flow"):
        trace_owner(Reflecting(4, 4, 1))


class Optional(Base):
    def forward(self, x):
        return F.linear(x, self.w, self.mask).to(self.kind)

    @property
    def kind(self):
        return self.w.dtype


def test_what_is_none_today_and_dtypes_are_read_in_each_call():
    source = trace_owner(Optional()).python_code("self").src
    assert "self.mask" in source
    assert "float32" not in source


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


def test_packed_keywords_stay_packed():
    class Packed(Base):
        def forward(self, x, **options):
            return x @ self.w * options.get("scale", 1.0)

    code = trace_owner(Packed()).python_code("self").src
    assert "**options" in code
    assert "options.get('scale', 1.0)" in code


class Litter:
    """Garbage that only the collector finds, whose finalizer runs code that loops."""

    def __init__(self):
        self.own, self.stream = self, (item for item in range(3))
        next(self.stream)


def test_finalizers_that_happen_to_run_meanwhile_are_no_part_of_the_forward():
    owner, threshold = PlainMatmul(), gc.get_threshold()
    try:
        for objects in range(10, 1500, 20):
            gc.collect()
            gc.set_threshold(objects)
            Litter()
            trace_owner(owner)
    finally:
        gc.set_threshold(*threshold)


class PlainMatmul(Base):
    def forward(self, x):
        return x @ self.w


def test_tracing_is_the_same_once_the_process_has_compiled_something():
    torch.compile(nn.Linear(4, 3), backend="eager")(torch.ones(2, 4))
    assert "self.scale" in trace_owner(ReadsScalars()).python_code("self").src
