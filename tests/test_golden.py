"""The authors' own numbers (see tests/golden), through the real classes, in float64 to 1e-10."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora2fx.methods.adalora import AdaLoRA
from lora2fx.methods.lora import LoRA
from lora2fx.methods.lora2 import LoRA2
from lora2fx.methods.salora import SaLoRA
from lora2fx.methods.sora import SoRA
from lora2fx.training.allocator import keep_highest
from lora2fx.training.driver import Attachment
from lora2fx.training.hard_concrete import HardConcrete
from lora2fx.training.importance import averages, axis_importance
from lora2fx.training.proximal import soft_threshold
from lora2fx.training.schedule import Phases
from lora2fx.training.slots import Training
from tests.adapted import AdaptedLinear, adapters_of, fill, golden, linear_site

TOLERANCE = {"rtol": 0, "atol": 1e-10}
# The package's names, transposed there, to the paper's.
LORA2_NAMES = {"u": "lora_A", "v": "lora_B", "U": "lora_aa", "V": "lora_bb"}


def close(found, expected):
    torch.testing.assert_close(found.detach(), torch.as_tensor(expected, dtype=torch.float64), **TOLERANCE)


def matrix(values):
    return torch.tensor(values, dtype=torch.float64)


def shared_settings(trace):
    allocator = trace["allocator"]
    return {
        "lora_alpha": trace["alpha"],
        "target_r": allocator["target_rank_per_matrix"],
        "tinit": allocator["init_warmup"],
        "tfinal": allocator["final_warmup"],
        "deltaT": allocator["mask_interval"],
        "beta1": allocator["beta1"],
        "beta2": allocator["beta2"],
    }


def lora2_method(trace):
    return LoRA2.paper(r=trace["r"], k=trace["K"], **shared_settings(trace))


def lora2_values(values, layer):
    named = {name: matrix(values[f"{layer}.{theirs}"]).T for name, theirs in LORA2_NAMES.items()}
    return named | {"lam": matrix(values[f"{layer}.lora_E"]).flatten()}


def golden_model(trace, method, values_of):
    layers = []
    for name, size in trace["layers"].items():
        adapter = fill(
            method.adapter(linear_site(name, size["in"], size["out"])).double(), **values_of(trace["init"], name)
        )
        layers.append(
            AdaptedLinear(matrix(trace["init"][f"{name}.weight"]), matrix(trace["init"][f"{name}.bias"]), adapter)
        )
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def check_trace(trace, method, values_of, names):
    """`names`: the scored parameters, each with the package's name and how its tensors become ours."""
    model = golden_model(trace, method, values_of)
    adapters = dict(zip(trace["layers"], adapters_of(model), strict=True))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=trace["optimizer"]["lr"])
    total = trace["allocator"]["total_step"]
    # The trace is the allocator's alone: the published trainer adds its regulariser to the loss elsewhere.
    attachment = Attachment(adapters, Training(None, method.training().allocators), optimizer, total)
    checked = 0
    for step, x, y in zip(trace["steps"], matrix(trace["X"]), matrix(trace["Y"]), strict=True):
        output = model(x)
        loss = (output - y).square().mean()
        close(loss, step["loss"])
        if "forward_out" in step:
            close(output, step["forward_out"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert attachment.budget == step["curr_rank"]
        for layer, score in zip(adapters, axis_importance(list(adapters.values()), "lambda"), strict=True):
            close(score, step["score"][layer])
            close(adapters[layer].lam, step["lambda_after_mask"][layer])
            for ours, (theirs, convert) in names.items() if "ema_ipt" in step else ():
                sensitivity, uncertainty = averages(adapters[layer], ours)
                close(sensitivity, convert(matrix(step["ema_ipt"][f"{layer}.{theirs}"])))
                close(uncertainty, convert(matrix(step["ema_unc"][f"{layer}.{theirs}"])))
                checked += 1
    assert checked == 3 * len(names) * len(adapters)
    for layer, adapter in adapters.items():
        for name, expected in values_of(trace["final"], layer).items():
            close(adapter.get_parameter(name), expected)
        assert torch.equal(adapter.mask, adapter.lam != 0)


def transposed(values):
    return values.T


def same(values):
    return values


def test_twenty_steps_of_lora2():
    trace = golden("lora2_20steps.json")
    names = {"v": ("lora_B", transposed), "lam": ("lora_E", torch.flatten), "U": ("lora_aa", transposed)}
    check_trace(trace, lora2_method(trace), lora2_values, names)


def adalora_values(values, layer):
    return {
        "A": matrix(values[f"{layer}.lora_A"]),
        "B": matrix(values[f"{layer}.lora_B"]),
        "lam": matrix(values[f"{layer}.lora_E"]).flatten(),
    }


def test_twenty_steps_of_adalora():
    trace = golden("adalora_20steps.json")
    names = {"A": ("lora_A", same), "lam": ("lora_E", torch.flatten), "B": ("lora_B", same)}
    method = AdaLoRA(r=trace["r"], scale_eps=1e-5, force_final_mask=False, **shared_settings(trace))
    check_trace(trace, method, adalora_values, names)


def test_adalora_forward_and_merged_weight():
    saved = golden("adalora_lora_forward.json")
    own = saved["adalora"]
    method = AdaLoRA(r=own["r"], lora_alpha=own["alpha"], target_r=None, scale_eps=1e-5)
    values = {"A": matrix(own["A"]), "B": matrix(own["B"]), "lam": matrix(own["E"])}
    adapter = fill(method.adapter(linear_site("layer", 10, 7)).double(), **values)
    layer = AdaptedLinear(matrix(own["weight"]), matrix(own["bias"]), adapter)
    close(layer(matrix(saved["x"])), own["y"])
    close(layer.weight + adapter.weight_delta(), own["merged_weight"])


@pytest.mark.parametrize("form", ["mean", "squared_sum"])
def test_adalora_regulariser(form):
    saved = golden("orth_reg_adalora.json")
    adapters = []
    for layer, (inputs, outputs, r) in {"0": (6, 5, 4), "1": (5, 3, 2)}.items():
        method = AdaLoRA(r=r, target_r=None, orth_reg_weight=1.0, orth_form=form)
        site = linear_site(layer, inputs, outputs)
        adapters.append(fill(method.adapter(site).double(), **adalora_values(saved["params"], layer)))
    penalty = method.training().penalty(adapters)
    close(penalty, saved["official_mean_unsquared" if form == "mean" else "paper_sum_squared"])
    penalty.backward()
    if form == "mean":
        for layer, adapter in enumerate(adapters):
            close(adapter.A.grad, saved["official_grad"][f"{layer}.lora_A"])
            close(adapter.B.grad, saved["official_grad"][f"{layer}.lora_B"])


def test_sora_soft_threshold():
    operator = golden("sora.json")["operator"]
    close(soft_threshold(matrix(operator["x"]), golden("sora.json")["threshold"]), operator["eq11"])


def test_twenty_steps_of_sora():
    saved = golden("sora.json")
    method = SoRA(r=8, xi=saved["threshold"], xi_mode="absolute")
    adapter = fill(method.adapter(linear_site("layer", 3, 2)).double(), g=matrix(saved["gate0"]))
    own = saved["adamw"]
    groups = [
        {"params": [adapter.g], "lr": own["lr"], "eps": own["eps"], "weight_decay": 0.0},
        {"params": [adapter.A, adapter.B], "weight_decay": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups, lr=own["lr"])
    Attachment([adapter], method.training(), optimizer, len(saved["grads"]))
    for gradient, step in zip(matrix(saved["grads"]), saved["trace_eq11"], strict=True):
        close(soft_threshold(matrix(step["adam_only"]), saved["threshold"]), step["after"])
        adapter.g.grad = gradient.clone()
        optimizer.step()
        # torch adds eps to the root after bias correction, the official optimiser before.
        torch.testing.assert_close(adapter.g.detach(), matrix(step["after"]), rtol=0, atol=2e-5)
        assert torch.equal(adapter.g == 0, matrix(step["after"]) == 0)


def test_lora2_forward_gradients_and_mask():
    saved = golden("lora2_forward.json")
    method = LoRA2.paper(r=saved["r"], k=saved["K"], lora_alpha=saved["alpha"])
    values = {name: matrix(saved[name]) for name in "uvUV"} | {"lam": matrix(saved["lambda_"])}
    adapter = fill(method.adapter(linear_site("layer", 10, 7)).double(), **values)
    layer = AdaptedLinear(matrix(saved["weight"]), matrix(saved["bias"]), adapter)
    output = layer(matrix(saved["x"]))
    close(output, saved["y"])
    output.backward(matrix(saved["grad_y"]))
    for name, expected in saved["grad"].items():
        close(adapter.get_parameter("lam" if name == "lambda" else name).grad, expected)
    close(adapter.weight_delta(), saved["delta_weight_out_in"])
    assert adapter.rank() == saved["rank_delta"]
    adapter.mask[saved["masked_indices"]] = False
    close(layer(matrix(saved["x"])), saved["y_masked"])


def test_lora_forward_and_merged_weight():
    saved = golden("adalora_lora_forward.json")
    own = saved["lora"]
    method = LoRA(r=own["r"], lora_alpha=own["alpha"])
    adapter = fill(method.adapter(linear_site("layer", 10, 7)).double(), A=matrix(own["A"]), B=matrix(own["B"]))
    layer = AdaptedLinear(matrix(own["weight"]), matrix(own["bias"]), adapter)
    close(layer(matrix(saved["x"])), own["y"])
    close(layer.weight + adapter.weight_delta(), own["merged_weight"])


@pytest.mark.parametrize("index", range(3))
def test_budget_schedule(index):
    saved = golden("budget_schedule.json")[index]
    config = saved["config"]
    phases = Phases(
        config["init_warmup"], config["total"] - config["final_warmup"], config["mask_interval"], forced=False
    )
    start, target = config["total_rank"], config["target"]
    for step, budget, masked in saved["points"]:
        assert (phases.budget(step, start, target), phases.is_event(step)) == (budget, masked), f"step {step}"
    steps = range(config["total"])
    assert sum(phases.budget(step, start, target) for step in steps) == saved["sum_curr_rank"]
    assert sum(map(phases.is_event, steps)) == saved["num_mask_events"]


@pytest.mark.parametrize("scorer", ["eq9", "eq8"])
def test_eq8_and_eq9_keep_disjoint_sets(scorer):
    saved = golden("eq8_vs_eq9.json")
    # β = 0 leaves Ī = |w·g| and Ū = 0; a score of one step's |w·g| alone is read with Ū set to 1.
    method = LoRA2.paper(r=2, k=1, lora_alpha=2, scale_eps=0.0, target_r=1, beta1=0.0, beta2=0.0, scorer=scorer)
    adapters = {}
    for name, own in saved["matrices"].items():
        values = {key: matrix(own[key]) for key in ("u", "v", "lam", "U", "V")}
        adapters[name] = fill(method.adapter(linear_site(name, 2, 2)).double(), **values)
        (adapters[name].delta() * matrix(own["G_in_out"])).sum().backward()
    allocator = method.training().allocators[0]
    optimizer = torch.optim.SGD([p for adapter in adapters.values() for p in adapter.parameters()], lr=0.0)
    Attachment(adapters, Training(None, (allocator,)), optimizer, 10)
    optimizer.step()
    for adapter in adapters.values():
        for name in allocator.tracked:
            averages(adapter, name)[1].fill_(1.0)
    scores = allocator.score(list(adapters.values()), "lambda")
    for score, own in zip(scores, saved["matrices"].values(), strict=True):
        close(score, matrix(own["eq9"]) + (own["outer"] if scorer == "eq8" else 0.0))
    kept = [
        [name, int(index)]
        for name, keep in zip(adapters, keep_highest(scores, 2), strict=True)
        for index in keep.nonzero().flatten()
    ]
    assert kept == saved[f"keep_top2_{scorer}"]


@pytest.mark.parametrize("index", range(2))
def test_hard_concrete_gates(index):
    saved = golden("hard_concrete.json")[index]
    gates = HardConcrete(saved["tau"], saved["gamma"], saved["zeta"])
    logits = matrix(saved["log_theta"])
    close(gates.probability(logits), saved["prob_nonzero"])
    close(gates.evaluation_gate(logits), saved["gate_eval"])
    method = SaLoRA(r=len(logits), tau=saved["tau"], gamma=saved["gamma"], zeta=saved["zeta"])
    adapter = fill(method.adapter(linear_site("layer", 3, 2)).double(), log_theta=logits)
    close(adapter.gate(), saved["gate_eval"])
    for noise, expected in zip(saved["u"], matrix(saved["gate"]).T, strict=True):
        adapter.set_noise(torch.full((len(logits),), noise, dtype=torch.float64))
        close(adapter.gate(), expected)
    close(adapter.eval().gate(), saved["gate_eval"])
