"""What users do with an adapted model: everything goes on working as with the folded one."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils._pytree import tree_map

import lora2fx
from lora2fx.adapter import Adapter
from lora2fx.inputs import Inputs
from tests.usage import FAMILIES, METHOD, adapted, adapters_of, close, floats, folded, randomise
from tests.zoo import ZOO


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_hidden_states_and_attentions_are_the_folded_models(name):
    model, inputs = adapted(name)
    plain = folded(model)
    for each in (model, plain):
        each.set_attn_implementation("eager")
        each.config.output_hidden_states = each.config.output_attentions = True
    with torch.no_grad():
        found, expected = inputs.call(model), inputs.call(plain)
    assert len(floats(expected)) >= 6
    close(floats(found), floats(expected))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.1)])
def test_casts_with_its_adapters(name, dtype, tolerance):
    model, inputs = adapted(name)
    model.to(dtype)
    inputs = tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, (inputs.args, dict(inputs.kwargs)))
    inputs = Inputs(*inputs)
    assert all(p.dtype == dtype for adapter in adapters_of(model) for p in adapter.parameters())
    assert all(next(iter(adapter.axes().values())).mask.dtype == torch.bool for adapter in adapters_of(model))
    with torch.no_grad():
        found, expected = floats(inputs.call(model)), floats(inputs.call(folded(model)))
    assert {tensor.dtype for tensor in found} == {tensor.dtype for tensor in expected}
    close(found, expected, tolerance)


def test_autocast_gives_the_folded_models_dtypes(name):
    model, inputs = adapted(name)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = floats(inputs.call(model)), floats(inputs.call(folded(model)))
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    close(found, expected, 0.1)


def test_state_dicts_go_from_one_adapted_model_to_another(name):
    model, inputs = adapted(name)
    other, _ = adapted(name)
    with torch.no_grad():
        for adapter in adapters_of(other):
            adapter.u.zero_()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert all(map(torch.equal, floats(inputs.call(other)), floats(inputs.call(model))))


def test_functional_calls_take_other_parameters(name):
    model, inputs = adapted(name)
    plain = folded(model)
    halved = {key: value.detach() / 2 if "lora2fx" in key else value for key, value in model.named_parameters()}
    with torch.no_grad():
        found = torch.func.functional_call(model, halved, inputs.args, dict(inputs.kwargs))
        for adapter in adapters_of(model):
            for parameter in adapter.parameters():
                parameter.div_(2)
        close(floats(found), floats(inputs.call(model)))
        assert not torch.allclose(floats(found)[0], floats(inputs.call(plain))[0])


def test_hooks_of_every_kind_still_run(name):
    model, inputs = adapted(name)
    owner = [module for module in model.modules() if any(isinstance(c, Adapter) for c in module.children())][-1]
    calls = []
    owner.register_forward_pre_hook(lambda *_: calls.append("before"))
    owner.register_forward_hook(lambda *_: calls.append("after"))
    owner.register_full_backward_hook(lambda *_: calls.append("backward"))
    floats(inputs.call(model))[0].sum().backward()
    assert calls == ["before", "after", "backward"]


def test_another_weight_may_be_parametrized():
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 6)), nn.Linear(6, 5), nn.Linear(5, 3))
    parametrizations.orthogonal(model[2])
    x, base = torch.randn(3, 7, 4), copy.deepcopy(model)
    lora2fx.transform(model, "1", METHOD, example_inputs=(x,), seed=0)
    assert torch.equal(model(x), base(x))
    randomise(model)
    adapted_output = model(x)
    assert parametrize.is_parametrized(model[0])
    parametrize.remove_parametrizations(model[0], "weight")
    lora2fx.fold(model)
    close([model(x)], [adapted_output])


def test_a_parametrized_weight_is_refused_by_name():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 6)), nn.Linear(6, 5))
    with pytest.raises(lora2fx.Lora2fxError, match=r"0\.parametrizations\.weight\.original.*parametrized"):
        lora2fx.transform(model, lambda site: site.weight.startswith("0."), METHOD, example_inputs=(torch.randn(3, 4),))
    assert parametrize.is_parametrized(model[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_a_scripted_child_is_refused_by_name_and_its_sisters_are_adapted():
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 6)), nn.Linear(6, 5))
    x = torch.randn(3, 4)
    with pytest.raises(lora2fx.Lora2fxError, match=r"0\.weight.*scripted.*before torch\.jit\.script"):
        lora2fx.transform(model, lambda site: True, METHOD, example_inputs=(x,))
    expected = model(x)
    lora2fx.transform(model, "1", METHOD, example_inputs=(x,))
    assert torch.equal(model(x), expected)


FRESH = """
import pickle, sys, torch
def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]
for model, inputs, expected in pickle.load(open(sys.argv[1], "rb")):
    with torch.no_grad():
        assert torch.equal(first(inputs.call(model)), expected)
        import lora2fx
        lora2fx.fold(model)
        torch.testing.assert_close(first(inputs.call(model)), expected, rtol=1e-5, atol=1e-5)
"""


def test_unpickles_in_a_fresh_process(tmp_path):
    pickled = []
    for name in ("gpt2", "einsum", "encoder"):
        model, inputs = adapted(name)
        with torch.no_grad():
            output = inputs.call(model)
        pickled.append((model, inputs, output if isinstance(output, torch.Tensor) else output[0]))
    (tmp_path / "models.pkl").write_bytes(pickle.dumps(pickled))
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-W", "ignore", "-c", FRESH, str(tmp_path / "models.pkl")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
class TestPretrained:
    def reloaded(self, model, folder):
        model.save_pretrained(folder)
        other, info = type(model).from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        return other.eval()

    def test_folded_and_saved(self, name, tmp_path):
        model, inputs = adapted(name)
        expected = floats(inputs.call(model))
        lora2fx.fold(model)
        close(floats(inputs.call(self.reloaded(model, tmp_path))), expected)

    def test_unloaded_and_saved(self, name, tmp_path):
        model, inputs = adapted(name)
        base = ZOO[name].build()
        lora2fx.unload(model)
        other = self.reloaded(model, tmp_path)
        assert all(map(torch.equal, floats(inputs.call(other)), floats(inputs.call(base))))
        assert list(other.state_dict()) == list(base.state_dict())

    def test_merged_copies_are_saved_while_training_goes_on(self, name, tmp_path):
        model, inputs = adapted(name)
        expected = floats(inputs.call(model))
        close(floats(inputs.call(self.reloaded(folded(model), tmp_path))), expected)
        assert all(map(torch.equal, floats(inputs.call(model)), expected))


@pytest.mark.parametrize("name", ["gpt2", "t5"])
@pytest.mark.parametrize("side", ["role:lm_head", "role:embedding"])
def test_an_untied_weight_is_saved_and_read_back_untied(name, side, tmp_path):
    model, inputs = adapted(name, (side,), untie=True)
    expected = floats(inputs.call(model))
    lora2fx.fold(model)
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path).eval()
    close(floats(inputs.call(other)), expected)


class Twins(nn.Module):
    """One module under two names, as layers are shared."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_a_shared_module_is_adapted_once_for_all_its_uses():
    torch.manual_seed(0)
    model, x = Twins().double(), torch.randn(3, 7, 4, dtype=torch.float64)
    base = copy.deepcopy(model)
    lora2fx.transform(model, "first", METHOD, example_inputs=(x,), seed=0)
    (adapter,) = adapters_of(randomise(model))
    with torch.no_grad():
        base.first.weight += adapter.weight_delta()
    close([model(x)], [base(x)], 1e-12)
    lora2fx.fold(model)
    close([model(x)], [base(x)], 1e-12)
    assert model.first is model.second


def test_new_tokens_can_be_added_beside_adapters():
    model, inputs = adapted("llama")
    model.resize_token_embeddings(110)
    assert floats(inputs.call(model))[0].shape[-1] == 110
    close(floats(inputs.call(folded(model)))[:1], floats(inputs.call(model))[:1])
