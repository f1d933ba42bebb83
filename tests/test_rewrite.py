"""Every rewrite computes W + ΔW: checked in float64 against the weight written out."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora2fx.adapter import Adapter
from lora2fx.errors import RewriteError
from lora2fx.methods.lora import LoRA
from lora2fx.methods.lora2 import LoRA2
from lora2fx.passes.install import Adapted, restore_owners
from lora2fx.passes.rewrite import child_name, plan_rewrite, rewrite_owners
from lora2fx.program import Program, Record
from lora2fx.site import Layout, Site

OUT_IN, IN_OUT = Layout((1,), (0,)), Layout((0,), (1,))


class Mixed(nn.Module):
    """A linear, a fused Conv1D, a convolution, a 3-D stack used by einsum, and a transposed weight."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.fused = Conv1D(6, 6)
        self.conv = nn.Conv1d(6, 5, 3, padding=1)
        self.stack = nn.Parameter(torch.randn(2, 5, 3))
        self.turned = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        y = self.conv(self.fused(self.linear(x)).transpose(1, 2))
        return torch.einsum("bcl,ecd->ebld", y, self.stack) @ self.turned.t()


class Branching(nn.Module):
    """An owner that can't be traced."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x @ self.weight if x.sum() > 0 else -x @ self.weight


SITES = {
    "linear": Site("linear.weight", "linear", "weight", (6, 4), OUT_IN, "query"),
    "fused query": Site("fused.weight", "fused", "weight", (6, 6), IN_OUT, "query", columns=((0, 2),)),
    "fused value": Site("fused.weight", "fused", "weight", (6, 6), IN_OUT, "value", columns=((3, 4), (5, 6))),
    "conv": Site("conv.weight", "conv", "weight", (5, 6, 3), Layout((1, 2), (0,)), "conv"),
    "stack": Site("stack", "", "stack", (2, 5, 3), Layout((1,), (2,), (0,))),
    "turned": Site("turned", "", "turned", (3, 3), OUT_IN),
}
PLANS = {
    "linear": "activation",
    "fused query": "activation",
    "fused value": "activation",
    "conv": "weight",
    "stack": "weight",
    "turned": "activation",
}


def adapted(model, sites, method=None, after=None):
    torch.manual_seed(1)
    method = method or LoRA2(r=3, k=2)
    adapters = {f"{site.owner}.{child_name(site)}".lstrip("."): method.adapter(site).double() for site in sites}
    program = Program(model, model, Record(method, frozenset()), adapters)
    plans = {name: plan_rewrite(model, adapter.site, after=after) for name, adapter in adapters.items()}
    rewrite_owners(program, plans)
    return program, plans


def randomise(program):
    with torch.no_grad():
        for adapter in program.adapters.values():
            for parameter in adapter.parameters():
                parameter.normal_()


def written_out(base, program):
    """The oracle: a plain model with ΔW = s · u v diag(λ) U V added to its weights by hand."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for adapter in program.adapters.values():
            site = adapter.site
            delta = adapter.scale * (adapter.u @ adapter.v) @ (adapter.lam.unsqueeze(-1) * (adapter.U @ adapter.V))
            matrix = site.to_matrix(model.get_parameter(site.weight)).clone()
            index = torch.arange(matrix.shape[-1]) if site.columns is None else site.column_index()
            matrix[..., index] += delta
            model.get_parameter(site.weight).copy_(site.from_matrix(matrix))
    return model


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Mixed().double()


@pytest.fixture
def x():
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("names", [[name] for name in SITES] + [list(SITES)], ids=", ".join)
@pytest.mark.parametrize("after", [None, "activation", "weight"])
def test_adapted_model_computes_the_weight_plus_delta(model, x, names, after):
    base = copy.deepcopy(model)
    program, _ = adapted(model, [SITES[name] for name in names], after=after)
    torch.testing.assert_close(model(x), base(x), rtol=0, atol=0)
    randomise(program)
    assert (model(x) - base(x)).abs().max() > 1e-2
    torch.testing.assert_close(model(x), written_out(base, program)(x), rtol=1e-12, atol=1e-12)


def test_the_first_rewrite_that_fits_is_chosen(model):
    for name, site in SITES.items():
        assert plan_rewrite(model, site) == PLANS[name], name
        assert plan_rewrite(model, site, outside_reads={site.weight}) == "property"
    branching = Branching()
    assert plan_rewrite(branching, Site("weight", "", "weight", (4, 4), IN_OUT)) == "property"


def test_untraceable_owner_reads_its_weight_merged():
    torch.manual_seed(0)
    model = Branching().double()
    base = copy.deepcopy(model)
    program, plans = adapted(model, [Site("weight", "", "weight", (4, 4), IN_OUT)])
    assert plans == {"lora2fx_weight": "property"}
    randomise(program)
    for x in (torch.ones(2, 4).double(), -torch.ones(2, 4).double()):
        torch.testing.assert_close(model(x), written_out(base, program)(x), rtol=1e-12, atol=1e-12)


def test_masks_stay_live_in_the_generated_forward(model, x):
    """A tracer that folds `lam * mask` into a constant would prune nothing, silently."""
    base = copy.deepcopy(model)
    program, _ = adapted(model, list(SITES.values()))
    randomise(program)
    for adapter in program.adapters.values():
        adapter.mask.fill_(False)
    torch.testing.assert_close(model(x), base(x), rtol=0, atol=0)


def test_same_objects_classes_and_keys_before_during_and_after(model, x):
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    classes = [type(module) for module in model.modules()]
    calls = []
    model.linear.register_forward_hook(lambda *_: calls.append(1))
    adapted(model, list(SITES.values()))
    assert isinstance(model.linear, nn.Linear)
    assert isinstance(model.linear, Adapted)
    assert type(model.linear).__name__ == "Linear"
    assert all(dict(model.named_parameters())[name] is value for name, value in parameters.items())
    assert set(keys) < set(model.state_dict())
    model(x)
    assert calls == [1]
    restore_owners(model)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert all(dict(model.named_parameters())[name] is value for name, value in parameters.items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("after", [None, "weight"])
def test_copies_compute_the_same_and_are_independent(model, x, copied, after):
    program, _ = adapted(model, list(SITES.values()), after=after)
    randomise(program)
    y, twin = model(x), copied(model)
    torch.testing.assert_close(twin(x), y, rtol=0, atol=0)
    with torch.no_grad():
        next(module for module in twin.modules() if isinstance(module, Adapter)).lam.zero_()
    assert (twin(x) - y).abs().max() > 1e-3
    torch.testing.assert_close(model(x), y, rtol=0, atol=0)


def test_modules_alike_share_one_generated_class():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapted(model, [Site(f"{i}.weight", str(i), "weight", (4, 4), OUT_IN) for i in range(2)])
    assert type(model[0]) is type(model[1])


def test_dropout_acts_on_the_adapters_input_alone_and_only_in_training(model, x):
    base = copy.deepcopy(model)
    program, _ = adapted(model, [SITES["linear"]], LoRA(r=2, lora_dropout=0.5))
    randomise(program)
    model.eval()
    torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
    model.train()
    assert (model(x) - model(x)).abs().max() > 1e-3
    with torch.no_grad():
        program.adapters["linear.lora2fx_weight"].B.zero_()
    torch.testing.assert_close(model(x), base(x), rtol=0, atol=0)


def test_dropout_where_no_activation_passes_is_refused_and_nothing_is_installed(model):
    with pytest.raises(RewriteError, match=r"stack can only be rewritten as `weight`.*lora_dropout=0"):
        adapted(model, [SITES["linear"], SITES["stack"]], LoRA(r=2, lora_dropout=0.1))
    assert not any(isinstance(module, (Adapted, Adapter)) for module in model.modules())


def test_parametrized_weight_is_refused():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    site = Site("0.parametrizations.weight.original1", "0.parametrizations.weight", "original1", (4, 4), OUT_IN)
    with pytest.raises(RewriteError, match=r"already parametrized.*exclude="):
        plan_rewrite(model, site)


def test_generated_source_shows_factors_lambda_and_mask(model):
    adapted(model, [SITES["linear"]])
    source = type(model.linear).recipe.source
    for name in ("u", "v", "lam", "mask", "U", "V"):
        assert f"self.lora2fx_weight.{name}" in source
