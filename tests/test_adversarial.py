"""Owners that one trace does not tell, through `transform`: right in float64 in every mode, also after toggling."""

import copy

import pytest
import torch
from torch import nn

import lora2fx
from lora2fx.adapter import Adapter
from tests import owners
from tests.owners import UNSAFE


class Around(nn.Module):
    """The owner between two layers, so that gradients have to pass it."""

    def __init__(self, owner):
        super().__init__()
        self.before, self.owner, self.after = nn.Linear(4, 4), owner, nn.Linear(4, 4)

    def forward(self, x):
        return self.after(self.owner(torch.tanh(self.before(x))))


def build(owner):
    torch.manual_seed(0)
    return Around(owner()).double().eval()


def batch():
    return torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def randomise(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in (module for module in model.modules() if isinstance(module, Adapter)):
            for parameter in adapter.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


def merged(base, model):
    """The oracle: the base with s · u v diag(λ) U V added to its weights by hand."""
    oracle = copy.deepcopy(base)
    with torch.no_grad():
        for adapter in (module for module in model.modules() if isinstance(module, Adapter)):
            delta = adapter.scale * (adapter.u @ adapter.v) @ (adapter.lam.unsqueeze(-1) * (adapter.U @ adapter.V))
            oracle.get_parameter(adapter.site.weight).add_(adapter.site.from_matrix(delta))
    return oracle


def toggled(monkeypatch, models):
    """Everything that the owners read beside tensors gets another value."""
    monkeypatch.setattr(owners, "FLAG", 3.0)
    monkeypatch.setattr(owners.Settings, "scale", 0.5)
    for model in models:
        owner = model.owner
        owner.scale, owner.calls, owner.config, owner.act = 0.5, 4, {"scale": 0.5}, torch.relu
        owner.mask, owner.drop.p = torch.full((4,), 3.0, dtype=torch.float64), 0.25
        owner.offset = owner.offset * 2


def same(model, oracle, mode):
    model.train(mode == "train")
    oracle.train(mode == "train")
    found = []
    for one in (model, oracle):
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(mode != "no_grad"):
            torch.manual_seed(3)
            owners.random.seed(3)
            found.append(one(batch()))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    return found[0]


@pytest.mark.parametrize("owner", UNSAFE, ids=lambda owner: owner.__name__)
def test_unsafe_owners_compute_what_the_merged_weight_does(owner, monkeypatch):
    model = build(owner)
    base, state = copy.deepcopy(model), dict(vars(model.owner))
    lora2fx.transform(model, ["w", "after"], lora2fx.LoRA2(r=3, k=2), example_inputs=(batch(),), seed=0)
    report = lora2fx.report(model).to_dict()
    assert {site["weight"]: site["rewrite"] for site in report["sites"] if site["rewrite"]} == {
        "owner.w": "property",
        "after.weight": "activation",
    }
    assert report["verify"]["status"] == "passed"
    assert {name: value for name, value in vars(model.owner).items() if name != "_modules"} == {
        name: value for name, value in state.items() if name != "_modules"
    }
    for mode in ("eval", "no_grad", "train"):
        same(copy.deepcopy(model), copy.deepcopy(base), mode)
    randomise(model)
    oracle = merged(base, model)
    for mode in ("eval", "no_grad", "train", "eval"):
        same(model, oracle, mode)
    toggled(monkeypatch, (model, oracle))
    for mode in ("eval", "no_grad", "train"):
        before = same(model, oracle, mode)
    lora2fx.fold(model)
    if owner is not owners.Counter and owner is not owners.ReassignedBuffer:
        model.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            owners.random.seed(3)
            torch.testing.assert_close(model(batch()), before, rtol=1e-10, atol=1e-10)
    assert type(model.owner) is owner


def test_there_are_enough_of_them():
    assert len(UNSAFE) >= 18
