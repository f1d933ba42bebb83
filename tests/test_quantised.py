"""Quantised bases: the activation rewrite adapts them as they are; what would have to add to them is refused."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lora2fx
from lora2fx.adapter import Adapter
from lora2fx.errors import AdapterError, RewriteError
from lora2fx.inputs import as_inputs, flatten_outputs
from tests.int8 import Int8, dequantise, quantise
from tests.zoo import ZOO

METHOD = lora2fx.LoRA2(r=3, k=2)
ARCHITECTURES = {"vit_plain": 12, "llama": 14, "bert": 12}


def quantised(name):
    return quantise(ZOO[name].build().double())


def adapted(name, targets=("attention", "ffn")):
    model = quantised(name)
    base = copy.deepcopy(model)
    example = ZOO[name].example_inputs
    example = tuple(x.double() for x in example) if example else None
    lora2fx.transform(model, targets, METHOD, example_inputs=example, seed=0)
    return model, base, as_inputs(base, example)


def outputs(model, inputs):
    with torch.no_grad():
        return flatten_outputs(inputs.call(model))[0]


def randomise(model):
    generator = torch.Generator().manual_seed(2)
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    with torch.no_grad():
        for adapter in adapters:
            for parameter in adapter.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapters


@pytest.fixture(params=ARCHITECTURES)
def name(request):
    return request.param


def test_roles_and_sums_are_those_of_the_dequantised_model(name):
    model, base, inputs = adapted(name)
    report = lora2fx.report(model).to_dict()
    sites = [site for site in report["sites"] if site["rewrite"]]
    assert len(sites) == ARCHITECTURES[name]
    assert {site["rewrite"] for site in sites} == {"activation"}
    truth = {weight: role for weight, role in ZOO[name].roles.items() if role != "lm_head"}
    assert {site["weight"]: site["role"] for site in sites} == truth
    assert torch.equal(outputs(model, inputs), outputs(base, inputs))
    adapters = randomise(model)
    oracle = dequantise(base)
    with torch.no_grad():
        for adapter in adapters:
            oracle.get_parameter(adapter.site.weight).add_(adapter.weight_delta())
    torch.testing.assert_close(outputs(model, inputs), outputs(oracle, inputs), rtol=1e-10, atol=1e-10)


def test_verification_says_what_it_could_not_compare(name):
    model, *_ = adapted(name)
    verify = lora2fx.report(model).to_dict()["verify"]
    assert verify["status"] == "passed"
    (said,) = [check for check in verify["checks"] if "not compared with a folded copy" in check["note"]]
    assert (said["check"], said["mode"], said["passed"], said["vacuous"]) == ("folded", "all", True, True)


def test_training_moves_the_adapters_only(name):
    model, base, inputs = adapted(name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    before = outputs(model, inputs)
    for _ in range(3):
        flatten_outputs(inputs.call(model))[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(outputs(model, inputs), before)
    lora2fx.unload(model)
    assert torch.equal(outputs(model, inputs), outputs(base, inputs)) or name == "bert"  # whose head is trained too
    assert isinstance(next(m for m in model.modules() if isinstance(m, nn.Linear)).weight, Int8)


def test_fold_refuses_with_a_way_out_and_leaves_all_as_it_was(name):
    model, _, inputs = adapted(name)
    randomise(model)
    before = outputs(model, inputs)
    with pytest.raises(AdapterError, match=r"Int8"):
        lora2fx.fold(model)
    assert torch.equal(outputs(model, inputs), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same(copied):
    model, _, inputs = adapted("vit_plain")
    randomise(model)
    assert torch.equal(outputs(copied(model), inputs), outputs(model, inputs))


def test_adapters_are_float32_on_a_narrower_base():
    model = quantise(ZOO["vit_plain"].build().bfloat16())
    x = (ZOO["vit_plain"].example_inputs[0].bfloat16(),)
    lora2fx.transform(model, "ffn", METHOD, example_inputs=x, seed=0)
    adapters = randomise(model)
    assert {parameter.dtype for adapter in adapters for parameter in adapter.parameters()} == {torch.float32}
    assert model(*x).dtype == torch.bfloat16


class LookedUp(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, ids):
        return self.head(self.words(ids))


def test_a_quantised_embedding_looks_its_update_up():
    torch.manual_seed(0)
    model, ids = quantise(LookedUp().double()), torch.arange(14).reshape(2, 7) % 9
    oracle = dequantise(copy.deepcopy(model))
    lora2fx.transform(model, ["words", "head"], METHOD, example_inputs=(ids,), seed=0)
    adapters = randomise(model)
    with torch.no_grad():
        for adapter in adapters:
            oracle.get_parameter(adapter.site.weight).add_(adapter.weight_delta())
    torch.testing.assert_close(model(ids), oracle(ids), rtol=1e-12, atol=1e-12)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        x = torch.nn.functional.linear(x, self.weight)
        return torch.nn.functional.linear(x.relu(), self.weight)


class Branching(Twice):
    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight) if self.training else super().forward(x)


@pytest.mark.parametrize(("kind", "why"), [(Twice, "uses it in another way"), (Branching, "Branching|control flow")])
def test_what_would_have_to_add_to_the_weight_is_refused_by_name(kind, why):
    model = nn.Sequential(kind()).double()
    model[0].weight = nn.Parameter(Int8.of(model[0].weight), requires_grad=False)
    with pytest.raises(RewriteError, match=rf"0\.weight is a Int8 of torch\.float64, .*({why}).*exclude="):
        lora2fx.transform(model, "name:0", METHOD, example_inputs=(torch.randn(3, 5, 4).double(),))
    assert list(model.state_dict()) == ["0.weight"]


def test_integer_weights_stay_frozen_where_a_head_is_trained_whole():
    class Packed(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.packed = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)

    model = nn.Sequential(nn.Linear(4, 4), Packed())
    lora2fx.transform(model, "name:0", METHOD, example_inputs=(torch.randn(3, 4),), modules_to_save=["1"])
    assert {name for name, p in model.named_parameters() if p.requires_grad and "lora2fx" not in name} == {
        "1.weight",
        "1.bias",
    }
    lora2fx.unload(model)
    assert not model[1].packed.requires_grad


def test_state_dicts_of_quantised_models_come_back():
    model, _, inputs = adapted("vit_plain")
    randomise(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other, *_ = adapted("vit_plain")
    with torch.serialization.safe_globals([Int8]):
        other.load_state_dict(torch.load(file, weights_only=False))
    assert torch.equal(outputs(other, inputs), outputs(model, inputs))
