"""What every method must do, whatever it is made of: one contract, each method under it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lora2fx
from lora2fx.adapter import Adapter
from lora2fx.passes.fold import fold_adapters
from lora2fx.passes.prune import prune_ranks
from lora2fx.program import program_of
from lora2fx.training.driver import schedule_status
from tests.adapted import adapters_of
from tests.contract import METHODS, STEPS, GatedPlanes, batches, drive, run
from tests.programs import Small, adapt, randomised, small_inputs, states

DATA = batches(STEPS, (4, 7, 4))
X = small_inputs().args[0]
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
pruning = pytest.mark.parametrize(
    "method", [method for name, method in METHODS.items() if name != "LoRA"], ids=[n for n in METHODS if n != "LoRA"]
)


def adapted(method):
    model = Small()
    adapt(model, method, modules_to_save=["head"])
    return model


def output(model):
    with torch.no_grad():
        return model.eval()(X)


def close(a, b, size=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=size * float(b.abs().max()))


@pytest.fixture(scope="module")
def trained():
    """By method a model after its whole run."""
    found = {}
    for name, method in METHODS.items():
        model = adapted(method)
        optimizer, attachment = drive(model, method)
        run(model, optimizer, DATA)
        assert attachment.step == STEPS and attachment.skipped == 0
        found[name] = model
    return found


def pairs(trained):
    return [(METHODS[name], copy.deepcopy(model)) for name, model in trained.items()]


@every_method
def test_nothing_is_changed_at_the_start_bit_for_bit(method):
    base = Small()
    expected = output(base)
    model = adapted(method)
    assert all((adapter.delta() == 0).all() for adapter in adapters_of(model))
    assert torch.equal(output(model), expected)
    for adapter in adapters_of(model):
        adapter.train()
        assert (adapter.delta() == 0).all()


@every_method
def test_gates_off_is_the_base_bit_for_bit(method):
    model = adapted(method)
    randomised(program_of(model, "test"))
    assert not torch.equal(output(model), output(Small()))
    for adapter in adapters_of(model):
        next(iter(adapter.axes().values())).mask.fill_(False)
    assert torch.equal(output(model), output(Small()))


@pytest.mark.parametrize("name", METHODS)
def test_masked_is_pruned_is_folded(trained, name):
    model, method = copy.deepcopy(trained[name]), METHODS[name]
    expected = output(model)
    kept = [int(axis.mask.sum()) for a in adapters_of(model) for axis in a.axes().values()]
    sizes = [axis.mask.numel() for a in adapters_of(model) for axis in a.axes().values()]
    assert (sum(kept) < sum(sizes)) == (name != "LoRA"), "a run in which nothing is pruned shows nothing"
    assert schedule_status(adapters_of(model), method.training()) is None
    deltas = {name: a.weight_delta().detach() for name, a in program_of(model, "test").adapters.items()}
    base = {name: value.clone() for name, value in model.state_dict().items()}
    pruned = copy.deepcopy(model)
    prune_ranks(program_of(pruned, "test"))
    assert [axis.mask.numel() for a in adapters_of(pruned) for axis in a.axes().values()] == kept
    close(output(pruned), expected)
    for candidate in (model, pruned):
        report = fold_adapters(program_of(candidate, "test"))
        close(output(candidate), expected)
        assert not adapters_of(candidate) and list(candidate.state_dict()) == list(Small().state_dict())
        changed = {site.weight for site in program_of(trained[name], "test").sites}
        for weight, value in candidate.state_dict().items():
            own = [
                deltas[path] for path, a in program_of(trained[name], "t").adapters.items() if a.site.weight == weight
            ]
            wanted = base[weight] + sum(own) if weight in changed else base[weight]
            close(value, wanted) if value.is_floating_point() else None
        assert report.totals["kept"] == lora2fx.report(trained[name]).totals["kept"]


@every_method
def test_unload_gives_the_base_back_bit_for_bit(method):
    base = Small()
    before, classes = states(base), [type(module) for module in base.modules()]
    model = adapted(method)
    optimizer, _ = drive(model, method)
    model.norm.track_running_stats = False
    run(model, optimizer, DATA[:5])
    model.norm.track_running_stats = True
    lora2fx.unload(model)
    assert states(model) == before
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(output(model), output(base))
    assert all(p.requires_grad for p in model.parameters())


def tensors(model, optimizer):
    own = {name: value.clone() for name, value in model.state_dict().items() if not name.endswith("progress")}
    held = {
        f"{i}.{key}": torch.as_tensor(value).clone()
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
    return own | held


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["adapter", "head"])
def test_a_step_with_a_non_finite_gradient_changes_nothing(method, bad, place):
    model = adapted(method)
    optimizer, attachment = drive(model, method)
    run(model, optimizer, DATA[:4])
    model.train()
    for module in (model.norm, model.drop):
        module.eval()
    before = tensors(model, optimizer)
    optimizer.zero_grad()
    model(DATA[4]).sum().backward()
    parameter = next(adapters_of(model)[1].parameters()) if place == "adapter" else model.head.bias
    parameter.grad.view(-1)[0] = bad
    optimizer.step()
    after = tensors(model, optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (attachment.step, attachment.skipped) == (4, 1)
    run(model, optimizer, DATA[4:])
    assert all(value.isfinite().all() for value in model.state_dict().values())


def checkpoint(model, optimizer):
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


@every_method
def test_a_run_resumed_after_any_step_ends_in_the_same_bits(method):
    whole = adapted(method)
    optimizer, _ = drive(whole, method)
    saved = [checkpoint(whole, optimizer)]
    for index, x in enumerate(DATA):
        run(whole, optimizer, [x], index)
        saved.append(checkpoint(whole, optimizer))
    fresh = adapted(method)
    for done, own in enumerate(saved):
        model = copy.deepcopy(fresh)
        model.load_state_dict(own["model"])
        again, attachment = drive(model, method)
        again.load_state_dict(own["optimizer"])
        assert attachment.step == done
        run(model, again, DATA[done:], done)
        found, expected = tensors(model, again), tensors(whole, optimizer)
        assert found.keys() == expected.keys()
        wrong = [name for name in found if not torch.equal(found[name], expected[name])]
        assert not wrong, f"resumed after {done} steps"


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0], ids=["all scores 0", "tiny scores", "ties"])
@pytest.mark.parametrize("target", [0, 2, 4], ids=["none", "some", "all"])
@pytest.mark.parametrize("name", ["LoRA2", "LoRA2, local", "LoRA2, published", "AdaLoRA"])
def test_budgets_are_exact(name, target, size):
    """Every gradient the same: scores tie, down to all of them 0; whatever they are, as many are kept as asked for."""
    method = replace(METHODS[name], target_r=target, sensitivity="task")
    model = adapted(method)
    optimizer, attachment = drive(model, method)
    seen = []
    for _ in range(STEPS):
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            parameter.grad = torch.full_like(parameter, size)
        optimizer.step()
        seen.append((attachment.budget, attachment.active))
    sites = len(adapters_of(model))
    assert seen[-1] == (target * sites, target * sites)
    assert seen[0] == (4 * sites, 4 * sites)
    assert all(budget <= active for budget, active in seen)
    assert sum(int(a.mask.sum()) for a in adapters_of(model)) == target * sites


class Plain(nn.Module):
    """Two linear layers, one of them without a bias, and a head: what every exporter can write."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(6, 9), nn.Linear(9, 6, bias=False), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(x + self.down(self.up(x).tanh()))


def plain(method, dtype):
    model = Plain().to(dtype).eval()
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    lora2fx.transform(model, ["up", "down"], method, example_inputs=(x,), modules_to_save=["head"], seed=0)
    optimizer = torch.optim.AdamW(lora2fx.param_groups(model, 0.05))
    attachment = lora2fx.attach(model, optimizer, total_steps=STEPS)
    attachment.evaluate = lambda: -float((model(x) - 1).square().mean().detach())
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model.train()(x) - 1).square().mean().backward()
        optimizer.step()
    return model.eval(), x


@every_method
def test_exports_compute_what_the_masked_model_does(method, tmp_path):
    model, x = plain(method, torch.float64)
    expected = model(x).detach()
    deltas = {name: a.weight_delta().detach() for name, a in program_of(model, "test").adapters.items()}
    lora2fx.exporters.export_safetensors(model, tmp_path / "merged.safetensors")
    merged = Plain().double()
    merged.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    close(merged(x).detach(), expected)
    lora2fx.exporters.export_peft(model, tmp_path / "peft", example_inputs=(x,))
    held = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    for path in ("up", "down"):
        names = [f"base_model.model.{path}.lora_{letter}.weight" for letter in "BA"]
        found = (
            held[names[0]].double() @ held[names[1]].double()
            if names[0] in held
            else torch.zeros((), dtype=torch.float64)
        )
        wanted = deltas[f"{path}.lora2fx_weight"]
        torch.testing.assert_close(
            found.expand_as(wanted), wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()) + 1e-12
        )
    assert torch.equal(model(x), expected), "the model is as it was"


@pytest.mark.parametrize("name", ["LoRA2", "SaLoRA", "LoRA2 factors, SoRA gate"])
def test_onnx_computes_what_the_masked_model_does(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = plain(METHODS[name], torch.float32)
    lora2fx.exporters.export_onnx(model, tmp_path / "model.onnx", example_inputs=(x,))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=0, atol=2e-6)


@every_method
def test_saved_is_loaded(method, tmp_path):
    model, x = plain(method, torch.float64)
    expected = model(x).detach()
    lora2fx.save(model, tmp_path / "adapter")
    again = lora2fx.load(Plain().double().eval(), tmp_path / "adapter", methods=[GatedPlanes])
    close(again(x).detach(), expected, size=1e-14)  # a sum's order follows where in memory the factors lie
    assert all(isinstance(a, Adapter) for a in adapters_of(again))
    lora2fx.fold(again)
    close(again(x).detach(), expected)


@pruning
def test_an_early_end_folds_what_it_came_to_and_says_so(method):
    model = adapted(method)
    optimizer, attachment = drive(model, method)
    run(model, optimizer, DATA[:7])
    with pytest.raises(lora2fx.Lora2fxError, match=r"ended early: 7 of 12 optimizer steps"):
        lora2fx.fold(model)
    finished = copy.deepcopy(model)
    for allocator in method.training().allocators:
        allocator.finish(adapters_of(finished))
    active = dict.fromkeys(list(attachment.budgets)[:1], attachment.active)
    with pytest.warns(lora2fx.Lora2fxWarning, match=r"The last allocation took effect first; it keeps \d+ on the axis"):
        report = lora2fx.fold(model, strict=False)
    close(output(model), output(finished))
    kept = {name: sum(int(a.axes()[name].mask.sum()) for a in adapters_of(finished)) for name in report.totals["kept"]}
    assert report.totals["kept"] == kept
    assert active.items() <= kept.items()
