"""Recording leaves no trace, sees every weight, and knows who reads one from outside its owner."""

from __future__ import annotations

import functools
import gc
import random
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora2fx.dataflow.graph import Dataflow
from lora2fx.dataflow.overlaps import overlap
from lora2fx.dataflow.recording import Recording, Value
from lora2fx.errors import InputsError
from lora2fx.inputs import Inputs, as_inputs
from lora2fx.record import record
from tests.zoo import ZOO


class Stateful(nn.Module):
    """Everything a forward may leave behind: buffers written, replaced and resized, caches, flags, random draws."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.norm, self.inner, self.fails = nn.BatchNorm1d(4), nn.Dropout(0.5), fails
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("replaced", torch.ones(3))
        self.register_buffer("grown", torch.ones(2))
        self.history, self.by_shape = list[int](), dict[str, Tensor]()
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls += 1
        self.replaced = self.replaced * 2
        self.grown.resize_(5).fill_(7)
        self.history.append(len(x))
        self.by_shape[str(x.shape)] = x
        self.cache = x
        self.late = "set in forward"
        x = self.inner(self.norm(x)) + random.random() + torch.rand(4) + np.random.rand()
        if self.fails:
            raise RuntimeError("the user's own error")
        return x


def state_of(model: Stateful) -> dict[str, object]:
    buffers = {name: (id(buffer), buffer.tolist()) for name, buffer in model.named_buffers()}
    flags = [module.training for module in model.modules()]
    random_states = (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())
    attributes = (sorted(vars(model)), list(model.history), dict(model.by_shape), model.cache)
    return {
        "buffers": buffers,
        "flags": flags,
        "random": random_states,
        "attributes": attributes,
        "classes": [type(module) for module in model.modules()],
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
    }


@pytest.mark.parametrize("fastpath", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_changed(fails: bool, fastpath: bool) -> None:
    model = Stateful(fails).train()
    model.inner.eval()
    torch.backends.mha.set_fastpath_enabled(fastpath)
    try:
        before = state_of(model)
        if fails:
            with pytest.raises(RuntimeError, match="the user's own error"):
                record(model, Inputs((torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),)))
        else:
            record(model, Inputs((torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),)))
        assert state_of(model) == before
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", ["bert", "gpt2", "mha", "encoder", "lstm"])
def test_parameters_and_outputs_stay_bit_equal(name: str) -> None:
    model = ZOO[name].build()
    inputs = as_inputs(model, ZOO[name].example_inputs)
    held = [(id(parameter), parameter.detach().clone(), parameter.requires_grad) for parameter in model.parameters()]
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    record(model, inputs)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys
    for parameter, (identity, value, trained) in zip(model.parameters(), held, strict=True):
        assert id(parameter) == identity
        assert parameter.requires_grad == trained
        assert parameter.grad is None
        assert torch.equal(parameter, value)


def test_inputs_stay_as_they_are() -> None:
    class Writes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    x = torch.ones(3, 4)
    record(Writes(4, 4), Inputs((x,)))
    assert torch.equal(x, torch.ones(3, 4))


def test_a_cache_that_the_forward_fills_stays_empty() -> None:
    class Cache:
        def __init__(self) -> None:
            self.keys = list[Tensor]()

    class Caches(nn.Linear):
        def forward(self, x: Tensor, cache: Cache) -> Tensor:
            assert not cache.keys, "the second run sees what the first one left"
            cache.keys.append(super().forward(x))
            return cache.keys[-1]

    cache = Cache()
    record(Caches(4, 4), Inputs((torch.ones(3, 4),), {"cache": cache}))
    assert cache.keys == []


def test_activations_are_not_kept_alive() -> None:
    alive = list[weakref.ref[Tensor]]()

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.linear(x)
            alive.append(weakref.ref(hidden))
            return hidden.sum()

    recording = record(Watched(), Inputs((torch.ones(3, 4),)))
    gc.collect()
    assert len(alive) == 1
    assert all(reference() is None for reference in alive)
    assert "aten.addmm" in [op.name for op in recording.ops]


def test_meta_weights_are_refused() -> None:
    with pytest.raises(InputsError, match=r"weight is on the meta device.*load the weights"):
        record(nn.Linear(3, 3, device="meta"), Inputs((torch.ones(2, 3),)))


def test_meta_inputs_are_refused() -> None:
    with pytest.raises(InputsError, match=r"input of shape \(2, 3\) is on the meta device.*example_inputs"):
        record(nn.Linear(3, 3), Inputs((torch.ones(2, 3, device="meta"),)))


def test_empty_inputs_are_refused() -> None:
    with pytest.raises(InputsError, match=r"input of shape \(0, 3\) is empty.*batch at least 2"):
        record(nn.Linear(3, 3), Inputs((torch.ones(0, 3),)))


def test_lazy_weights_are_refused() -> None:
    with pytest.raises(InputsError, match=r"weight has no shape yet.*run one forward"):
        record(nn.LazyLinear(3), Inputs((torch.ones(2, 3),)))


def outside(model: nn.Module, *args: Tensor) -> frozenset[str]:
    return record(model, Inputs(args or (torch.ones(3, 4),))).outside_reads


class Parent(nn.Module):
    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x)


def test_a_weight_used_by_the_parent_is_read_from_outside() -> None:
    class Reads(Parent):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.child.weight)

    assert outside(Reads(nn.Linear(4, 4))) == {"child.weight"}


def test_asking_for_a_dtype_or_shape_is_no_use() -> None:
    class Asks(Parent):
        def forward(self, x: Tensor) -> Tensor:
            assert self.child.weight.shape[1] == 4
            return self.child(x.to(self.child.weight.dtype))

    assert outside(Asks(nn.Linear(4, 4))) == frozenset()


def plain_helper(module: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, module.weight)


class Helped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return plain_helper(self, x)


class Inherited(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def decorated(function):  # without functools.wraps: only the stack tells whose forward it is
    def run(*args):
        return function(*args)

    return run


class Decorated(nn.Linear):
    @decorated
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Method(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        return (lambda: F.linear(x, self.weight))()


def overridden() -> nn.Module:
    """As hooks of accelerate do: an instance's own forward around the class's."""
    module = nn.Linear(4, 4)
    original = module.forward

    @functools.wraps(original)
    def forward(x: Tensor) -> Tensor:
        return original(x)

    module.forward = forward
    return module


@pytest.mark.parametrize("child", [Helped(4, 4), Inherited(4, 4), Decorated(4, 4), Method(4, 4), overridden()])
def test_what_the_owners_forward_runs_is_no_read_from_outside(child: nn.Module) -> None:
    assert outside(Parent(child)) == frozenset()


def test_another_method_of_the_owner_is_outside_its_forward() -> None:
    class Calls(Parent):
        def forward(self, x: Tensor) -> Tensor:
            return self.child.compute(x)

    assert outside(Calls(Method(4, 4))) == {"child.weight"}


def test_a_tied_weight_is_inside_where_any_of_its_owners_runs() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(x)

    assert outside(Tied()) == frozenset()


FAST = {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder", {f"encoder.layers.{i}.{weight}" for i in range(2) for weight in FAST}),
        ("mha", {f"{i}.attention.out_proj.weight" for i in range(2)}),
        ("mamba", {f"backbone.layers.{i}.mixer.{name}.weight" for i in range(2) for name in ("conv1d", "dt_proj")}),
        ("t5", set()),
        ("bert", set()),
        ("einsum", set()),
    ],
)
def test_outside_reads_of_the_zoo(name: str, expected: set[str]) -> None:
    """The encoder's fast path, attention's out_proj, Mamba's convolution; T5 asks its wo only for its dtype."""
    model = ZOO[name].build()
    assert record(model, as_inputs(model, ZOO[name].example_inputs)).outside_reads == expected


def products(recording: Recording) -> list[tuple[int, int]]:
    """(index, how many earlier matmuls the left operand is made of) of each matmul."""
    flow = Dataflow(recording)
    found = [op for op in recording.ops if op.name == "aten.mm"]
    return [(op.index, len(flow.sources(op.inputs[0]) & {each.index for each in found})) for op in found]


def test_writes_into_a_part_are_followed_to_what_reads_that_part() -> None:
    class Assembles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Parameter(torch.randn(4, 4)) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            both = torch.empty(2, 3, 4)
            both[0] = x @ self.a
            both[1].copy_(x @ self.b)
            return both[0] @ self.c + both.sum(0) @ self.d

    assert [count for _, count in products(record(Assembles(), Inputs((torch.ones(3, 4),))))] == [0, 0, 1, 2]


def test_interleaved_parts_of_one_storage_do_not_overlap() -> None:
    def view(start: int, step: int) -> Value:
        return Value((3,), (step,), start, torch.float32, 0)

    assert not overlap(view(0, 2), view(1, 2))
    assert overlap(view(0, 2), view(1, 3))
    assert not overlap(view(0, 1), view(3, 1))


def test_another_view_of_a_weights_data_is_the_weight() -> None:
    class Data(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.data.T

    recording = record(Data(4, 4), Inputs((torch.ones(3, 4),)))
    (product,) = (op for op in recording.ops if op.name == "aten.mm")
    weight = product.inputs[1]
    while (op := recording.producer(weight)) is not None:
        weight = op.inputs[0]
    assert recording.parameters[weight] == "weight"


def test_a_gated_linear_unit_is_recorded_in_its_parts() -> None:
    recording = record(nn.Sequential(nn.Linear(4, 8), nn.GLU()), Inputs((torch.ones(3, 4),)))
    names = [op.name for op in recording.ops]
    assert "aten.glu" not in names
    assert names[-2:] == ["aten.sigmoid", "aten.mul"]


def test_all_names_of_a_tied_weight_are_known() -> None:
    model = ZOO["gpt2"].build()
    recording = record(model, as_inputs(model, None))
    assert recording.tied == {"transformer.wte.weight": ("transformer.wte.weight", "lm_head.weight")}
