"""A stack read with W + ΔW: one expert at a time, or whole, as if W + ΔW had been made at the read."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lora2fx
from lora2fx import AdaLoRA, LoRA, LoRA2, SaLoRA, SoRA
from lora2fx.adapter import Adapter
from lora2fx.passes.lazy import LazyWeight
from lora2fx.passes.reads import merged

METHODS = [LoRA(r=2), LoRA2(r=3, k=2), AdaLoRA(r=2), SoRA(r=2), SaLoRA(r=2)]


class Experts(nn.Module):
    """An expert loop over stacks (expert, out, in) and, transposed, (expert, in, out)."""

    def __init__(self, width=4, inner=4, out=6):
        super().__init__()
        self.index = torch.tensor
        self.up = nn.Parameter(torch.randn(3, 2 * inner, width) / 2)
        self.down = nn.Parameter(torch.randn(3, inner, out) / 2)

    def forward(self, x):
        total = x.new_zeros(len(x), self.down.shape[-1])
        for expert in range(len(self.up)):
            rows = torch.arange(expert, len(x), len(self.up))
            gate, up = F.linear(x[rows], self.up[self.index(expert)]).chunk(2, -1)
            total = total.index_add(0, rows, (F.silu(gate) * up) @ self.down[expert])
        return total


def adapted(method=METHODS[0], dtype=torch.float64, target="re:.*", widths=()):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Experts(*widths).to(dtype).requires_grad_(False)
        x = torch.randn(7, model.up.shape[-1], dtype=dtype)
        lora2fx.transform(model, target, method, example_inputs=(x,), seed=0)
        model.to(dtype)
        for adapter in adapters_of(model):
            for factor in adapter.parameters():
                nn.init.normal_(factor, std=0.3)
    return model, x


def adapters_of(model):
    return [module for module in model.modules() if isinstance(module, Adapter)]


def whole(model, name):
    own = [adapter for adapter in adapters_of(model) if adapter.site.parameter == name]
    return merged(model._parameters[name], own)


def gradients(model, value):
    return torch.autograd.grad(value, [f for a in adapters_of(model) for f in a.parameters()], allow_unused=True)


def same(found, expected):
    assert len(found) == len(expected) > 0
    assert any(item is not None and item.any() for item in expected)
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None:
            assert one is None or not one.any()
            assert other is None or not other.any()
        else:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.fixture
def made(monkeypatch):
    """The weights that were made whole."""
    found, delta = [], Adapter.weight_delta
    monkeypatch.setattr(Adapter, "weight_delta", lambda self: (found.append(self.site.weight), delta(self))[1])
    return found


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("name", ["up", "down"])
@pytest.mark.parametrize("index", [0, -1, torch.tensor(1), torch.tensor(2, dtype=torch.int32)])
def test_one_expert_is_the_slice_of_the_whole(method, name, index, made):
    model, _ = adapted(method)
    made.clear()
    found = getattr(model, name)[index]
    assert type(found) is LazyWeight and found.shape == model._parameters[name].shape[1:]
    found = found * 1
    assert not made and type(found) is torch.Tensor
    expected = whole(model, name)[index]
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    same(gradients(model, (found.sin() * weights).sum()), gradients(model, (expected.sin() * weights).sum()))


def test_a_loop_makes_no_stack_and_has_the_same_gradients(made):
    model, x = adapted(LoRA2(r=3, k=2))
    made.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        out = model(x)
        found = gradients(model, out.square().sum())
    assert not made
    stacks = {str(list(model._parameters[name].shape)) for name in ("up", "down")}
    read = {event.name for event in profile.events() if any(str(shape) in stacks for shape in event.input_shapes)}
    assert read <= {"aten::select", "aten::as_strided", "aten::detach", "detach", "_Differentiable"}
    plain = Experts().double()
    total = {name: whole(model, name) for name in ("up", "down")}
    expected = torch.func.functional_call(plain, total, (x,))
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    same(found, gradients(model, expected.square().sum()))


READS = {
    "addmm": lambda w: torch.addmm(torch.ones(2, 4, dtype=w.dtype), torch.ones(2, 8, dtype=w.dtype), w[1]),
    "matmul of too few": lambda w: torch.ones(2, 8, dtype=w.dtype) @ w,
    "product from the left": lambda w: w[0] @ torch.ones(4, dtype=w.dtype),
    "out": lambda w: torch.bmm(torch.ones(3, 2, 8, dtype=w.dtype), w.detach(), out=torch.empty(3, 2, 4, dtype=w.dtype)),
    "permuted": lambda w: w.transpose(0, 1) * 2,
    "transposed": lambda w: w.transpose(1, 2).sin(),
    "mT": lambda w: w.mT * 2,
    "matrix transposed": lambda w: w[1].T.exp(),
    "slice": lambda w: w[1:],
    "list": lambda w: w[[0, 2]],
    "mask": lambda w: w[torch.tensor([True, False, True])],
    "pair": lambda w: w[1, 2],
    "split": lambda w: torch.cat(w.split([1, 2])),
    "split along the last": lambda w: w[0].split(2, dim=1)[1] * 1,
    "chunks of no rows": lambda w: torch.cat(w.chunk(2, dim=-1)),
    "bool": lambda w: w[True],
    "tensor": lambda w: w[torch.tensor([1])],
    "iterated": lambda w: torch.stack(list(w)),
    "einsum": lambda w: torch.einsum("eoi->io", w),
    "stacked": lambda w: torch.stack([w, w]),
    "of a list": lambda w: torch.cat((w, w), dim=1),
    "reduced": lambda w: w.norm() + 1,
    "data": lambda w: w.data * 1,
    "detached": lambda w: w.detach().clone(),
    "copied": lambda w: copy.deepcopy(w.detach()),
    "pickled": lambda w: pickle.loads(pickle.dumps(w.detach())),
    "numpy": lambda w: torch.from_numpy(w.detach().numpy().copy()),
    "new": lambda w: w.new_zeros(2),
    "converted": lambda w: w.to(torch.float32),
    "print": lambda w: torch.tensor(len(repr(w.detach()))),
    "item": lambda w: torch.tensor(w[0].sum().item() + w.sum().item()),
    "in place": lambda w: w.add_(1),
    "out of torch.ops": lambda w: torch.ops.aten.mul.Tensor(w, 2),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_any_other_use_is_that_of_the_whole(read):
    model, _ = adapted()
    lazy = model.up
    assert type(lazy) is LazyWeight
    found, expected = read(lazy), read(whole(model, "up"))
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-15)  # one matrix is made in another order
    assert found.requires_grad == expected.requires_grad
    if found.requires_grad:
        same(gradients(model, found.double().square().sum()), gradients(model, expected.double().square().sum()))


def test_metadata_is_answered_without_values(made):
    model, _ = adapted()
    made.clear()
    lazy, weight = model.up, model._parameters["up"]
    for name in ("shape", "dtype", "device", "ndim", "layout"):
        assert getattr(lazy, name) == getattr(weight, name)
    assert (lazy.size(), lazy.numel(), len(lazy)) == (weight.size(), 96, 3)
    assert lazy.requires_grad and not isinstance(lazy, nn.Parameter) and isinstance(lazy, torch.Tensor)
    with torch.no_grad():
        assert not model.up.requires_grad
    assert not made


class Scaled(torch.autograd.Function):
    """A product of the user's own, which no `__torch_function__` sees coming."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.mT, x.mT @ grad


def test_a_custom_function_gets_the_values_and_gives_the_gradients():
    model, _ = adapted()
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    found, expected = Scaled.apply(x, model.up), Scaled.apply(x, whole(model, "up"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    same(gradients(model, found.square().sum()), gradients(model, expected.square().sum()))
    found, expected = (torch.autograd.grad(Scaled.apply(x, w).sum(), x) for w in (model.up, whole(model, "up")))
    same(found, expected)


def test_memory_taken_as_it_is_holds_nan():
    model, _ = adapted()
    taken = nn.Parameter(torch.zeros(3, 8, 4, dtype=torch.float64))
    taken.data = model.up
    assert taken.isnan().all()
    assert model.up.stride() == model._parameters["up"].stride()


def test_a_gradient_after_the_step_is_refused():
    model, _ = adapted()
    product = Scaled.apply(torch.ones(3, 2, 8, dtype=torch.float64), model.up)
    with torch.no_grad():
        adapters_of(model)[0].A.mul_(2)
        adapters_of(model)[1].A.mul_(2)
    with pytest.raises(RuntimeError, match="up or a factor of its adapter was changed in place between a read and"):
        product.sum().backward()


def test_a_read_keeps_the_modes_that_it_was_made_under():
    model, _ = adapted()
    lazy, whole_read = model.up, whole(model, "up")
    with torch.no_grad():
        assert not lazy.sin().requires_grad
        assert lazy[0].requires_grad == whole_read[0].requires_grad
    assert lazy.sin().requires_grad
    with torch.no_grad():
        lazy = model.up
    assert not lazy[0].requires_grad and not lazy.sin().requires_grad
    with torch.inference_mode():
        assert model.up[0].is_inference()
        lazy = model.up
    assert lazy.clone().requires_grad is False


def test_autocast_gives_what_it_gave_the_whole():
    model, _ = adapted(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = model.up[1], whole(model, "up")[1]
        lazy = model.up
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = whole(model, "up")
    torch.testing.assert_close(lazy * 1, expected, rtol=0, atol=0)


class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_what_looks_between_gets_the_whole():
    model, x = adapted()
    with Counting():
        assert type(model.up) is torch.Tensor
    with torch.device("cpu"):
        assert type(model.up) is torch.Tensor
    model.requires_grad_(False)
    kinds = []
    torch.func.vmap(lambda x: (kinds.append(type(model.up)), x)[1])(x)
    with torch.autograd.forward_ad.dual_level():
        kinds.append(type(model.up))
    torch.jit.trace(lambda x: (kinds.append(type(model.up)), x * 1)[1], x, check_trace=False)
    assert set(kinds) == {torch.Tensor} and len(kinds) == 3


def test_export_sees_the_whole():
    model, x = adapted()
    expected = model(x)
    model.index = int
    exported = torch.export.export(model.eval(), (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), expected, rtol=1e-12, atol=1e-12)


def test_copies_and_files_of_the_module():
    model, x = adapted()
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x), rtol=0, atol=0)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), model(x), rtol=0, atol=0)


def test_eight_threads_on_one_model():
    model, x = adapted()
    expected = model(x)
    wanted = gradients(model, expected.square().sum())

    def step(_):
        return gradients(model, model(x).square().sum())

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(step, range(24)):
            same(found, wanted)


def test_a_fold_gives_the_same_outputs():
    model, x = adapted()
    expected = model(x)
    lora2fx.fold(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_no_stack_is_made_in_the_experts_of_transformers(name, made):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 32}
    experts = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**sizes, **heads, **experts)
        config._experts_implementation = "eager"
        model = getattr(transformers, f"{name}Model")(config).double().eval()
        ids = torch.randint(32, (2, 6))
        lora2fx.transform(model, ["role:ffn"], LoRA(r=2), example_inputs=(ids,), seed=0)
        model.double()
        found = [a for a in adapters_of(model) if a.site.batch_shape]
        assert len(found) >= 2 and {a.rewrite for a in found} == {"property"}
        for adapter in adapters_of(model):
            for factor in adapter.parameters():
                nn.init.normal_(factor, std=0.1)
    made.clear()
    out = model(ids).last_hidden_state
    out.square().sum().backward()
    assert not made
    assert all(factor.grad.any() for adapter in found for factor in adapter.parameters())
    lora2fx.fold(model)
    torch.testing.assert_close(model(ids).last_hidden_state, out, rtol=1e-12, atol=1e-12)
