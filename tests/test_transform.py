"""The main job on real architectures: the same outputs at the start, the same outputs folded, nothing left behind."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lora2fx
from lora2fx.adapter import Adapter
from lora2fx.errors import AdapterError, InputsError, RewriteError, TargetError, VerifyError
from lora2fx.inputs import as_inputs, flatten_outputs, synthesise
from lora2fx.passes.install import Adapted
from tests.zoo import ZOO

MAIN = ("vit_plain", "bert", "deberta_v2", "gpt2", "llama", "t5", "encoder", "einsum", "mha")
TARGETS = ["query", "key", "value", "ffn"]
MODES = ("eval", "no_grad", "train")


def inputs_of(name, model):
    example = ZOO[name].example_inputs
    return synthesise(model) if example is None else as_inputs(model, example)


def outputs(model, inputs, mode):
    model.train(mode == "train")
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(mode != "no_grad"):
        torch.manual_seed(7)
        found = [tensor.detach() for tensor in flatten_outputs(inputs.call(model)) if tensor.is_floating_point()]
    model.eval()
    return found


def randomise(model):
    """Factors whose ΔW is about a fifth of W."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Adapter):
                for parameter in module.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
                norm = module.delta().norm()
                weight = next(p for n, p in model.named_parameters() if n.endswith(module.site.weight))
                module.V.mul_(0.2 * weight.detach().norm() / norm)


def same_bits(got, expected):
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def closeness(got, expected):
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True))


@pytest.fixture(params=MAIN)
def name(request):
    return request.param


def adapted(name, targets=tuple(TARGETS), **kwargs):
    model = ZOO[name].build()
    base = copy.deepcopy(model)
    kwargs.setdefault("seed", 0)
    same = lora2fx.transform(model, targets, lora2fx.LoRA2(r=4, k=2), example_inputs=ZOO[name].example_inputs, **kwargs)
    assert same is model
    return model, base


def test_starts_as_the_base_and_folds_to_what_it_computed(name):
    model, base = adapted(name)
    inputs = inputs_of(name, base)
    frozen = copy.deepcopy(base).requires_grad_(False)  # torch chooses kernels by what needs gradients
    for mode in MODES:
        found = outputs(model, inputs, mode)
        assert same_bits(found, outputs(base, inputs, mode)) or same_bits(found, outputs(frozen, inputs, mode)), mode
    randomise(model)
    before = {mode: outputs(model, inputs, mode) for mode in MODES}
    assert closeness(before["eval"], outputs(base, inputs, "eval")) > 1e-3
    report = lora2fx.fold(model).to_dict()
    for mode in MODES:
        assert closeness(outputs(model, inputs, mode), before[mode]) <= 1e-5, mode
    assert all(site["rank"] == 2 for site in report["sites"] if site["rewrite"])


def test_fold_gives_back_classes_keys_parameters_and_flags(name):
    model = ZOO[name].build()
    classes = [type(module) for module in model.modules()]
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    flags = {key: parameter.requires_grad for key, parameter in parameters.items()}
    lora2fx.transform(model, TARGETS, lora2fx.LoRA2(k=2), example_inputs=ZOO[name].example_inputs, seed=0)
    assert any(isinstance(module, Adapted) for module in model.modules())
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora2fx_" in key or key.startswith(("classifier.", "pooler.")) for key in trained)
    randomise(model)
    lora2fx.fold(model)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[key] is parameter for key, parameter in parameters.items())
    assert {key: parameter.requires_grad for key, parameter in after.items()} == flags


def test_unload_gives_the_base_back_bit_for_bit(name):
    model, base = adapted(name)
    randomise(model)
    lora2fx.unload(model)
    state, expected = model.state_dict(), base.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert [type(a) for a in model.modules()] == [type(b) for b in base.modules()]


def test_report_agrees_with_the_truth_table(name):
    model, _ = adapted(name)
    report = lora2fx.report(model).to_dict()
    assert report["verify"]["status"] == "passed"
    wanted = {"query", "key", "value", "ffn.up", "ffn.gate", "ffn.down"}
    truth = set()
    for weight, roles in ZOO[name].roles.items():
        for role in [roles] if isinstance(roles, str) else roles:
            if role in wanted:
                truth.add((weight, role))
    found = {(site["weight"], site["role"]) for site in report["sites"] if site["rewrite"]}
    assert found == truth
    assert all(site["reason"] for site in report["sites"] if not site["rewrite"])


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_of_an_adapted_model_compute_and_fold_the_same(name, copied):
    model, base = adapted(name)
    randomise(model)
    inputs = inputs_of(name, base)
    expected = outputs(model, inputs, "eval")
    twin = copied(model)
    assert same_bits(outputs(twin, inputs, "eval"), expected)
    lora2fx.fold(twin)
    assert closeness(outputs(twin, inputs, "eval"), expected) <= 1e-5
    assert same_bits(outputs(model, inputs, "eval"), expected)


@pytest.mark.parametrize("generator", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_generate_gives_the_folded_models_tokens(generator, options):
    model, _ = adapted(generator)
    randomise(model)
    ids = torch.arange(10, 18).view(1, -1)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    tokens = model.generate(ids, **settings, **options)
    lora2fx.fold(model)
    assert torch.equal(model.generate(ids, **settings, **options), tokens)


@pytest.mark.parametrize("checkpointed", ["bert", "gpt2", "llama", "t5"])
def test_gradient_checkpointing_changes_no_gradient(checkpointed):
    model, base = adapted(checkpointed)
    randomise(model)
    model.double()
    inputs = inputs_of(checkpointed, base)

    def gradients():
        model.train()
        model.zero_grad()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            inputs.call(model).logits.square().sum().backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    recomputed = gradients()
    assert plain.keys() == recomputed.keys()
    for key, gradient in plain.items():
        assert float((recomputed[key] - gradient).norm()) <= 1e-12 * float(gradient.norm()), key


def test_fused_weight_is_adapted_on_the_targeted_columns_only():
    model, base = adapted("gpt2", ["query", "value"])
    randomise(model)
    lora2fx.fold(model)
    for layer, before in zip(model.transformer.h, base.transformer.h, strict=True):
        moved = (layer.attn.c_attn.weight - before.attn.c_attn.weight).abs().amax(0) > 0
        width = moved.numel() // 3
        assert moved[:width].all()
        assert not moved[width : 2 * width].any()
        assert moved[2 * width :].all()


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])

    def forward(self, x):
        x = x + self.down(torch.relu(self.up(x)))
        for block in self.blocks:
            x = block(x)
        return x


def unchanged(model, keys):
    assert list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, (Adapted, Adapter)) for module in model.modules())
    assert "_lora2fx" not in vars(model)


class TestErrors:
    def test_roles_on_a_plain_module_need_example_inputs(self):
        model = Plain()
        keys = list(model.state_dict())
        with pytest.raises(InputsError, match="example_inputs="):
            lora2fx.transform(model, "query")
        unchanged(model, keys)

    def test_a_target_that_matches_nothing_names_near_misses(self):
        model = Plain()
        keys = list(model.state_dict())
        with pytest.raises(TargetError, match=r"upp.*up"):
            lora2fx.transform(model, ["upp"], example_inputs=(torch.randn(2, 9, 6),))
        unchanged(model, keys)

    def test_a_second_transform_is_refused(self):
        model = Plain()
        lora2fx.transform(model, "up", example_inputs=(torch.randn(2, 9, 6),))
        with pytest.raises(AdapterError, match=r"already holds adapters.*fold.*unload"):
            lora2fx.transform(model, "down", example_inputs=(torch.randn(2, 9, 6),))

    def test_a_model_that_is_replicated_already_is_refused(self):
        model = nn.DataParallel(Plain())
        keys = list(model.state_dict())
        with pytest.raises(AdapterError, match=r"DataParallel.*never synchronises.*wrap the model afterwards"):
            lora2fx.transform(model, "up", example_inputs=(torch.randn(2, 9, 6),))
        unchanged(model, keys)

    def test_a_tied_weight_is_refused_by_name_unless_untied(self):
        model = ZOO["gpt2"].build()
        keys = list(model.state_dict())
        with pytest.raises(RewriteError, match=r"tied to .*untie=True"):
            lora2fx.transform(model, ["role:lm_head"])
        unchanged(model, keys)
        lora2fx.transform(model, ["role:lm_head"], untie=True)
        assert model.lm_head.weight is not model.transformer.wte.weight
        assert model.config.tie_word_embeddings is False
        lora2fx.unload(model)
        assert model.lm_head.weight is model.transformer.wte.weight
        assert model.config.tie_word_embeddings is True

    def test_an_exception_in_the_users_forward_leaves_the_model_alone(self):
        class Raises(Plain):
            def forward(self, x):
                if any("lora2fx" in key for key in self.state_dict()):
                    raise RuntimeError("the user's own")
                return super().forward(x)

        model = Raises()
        keys = list(model.state_dict())
        with pytest.raises(VerifyError, match=r"up\.weight.*`property`.*the user's own.*exclude="):
            lora2fx.transform(model, "up", example_inputs=(torch.randn(2, 9, 6),))
        unchanged(model, keys)

    @pytest.mark.parametrize(
        "call", [lora2fx.report, lora2fx.fold, lora2fx.unload, lambda model: lora2fx.save(model, "never")]
    )
    def test_without_adapters_every_pass_says_what_to_do(self, call):
        with pytest.raises(AdapterError, match=r"holds no adapters.*lora2fx\.transform"):
            call(Plain())

    def test_modules_to_save_that_names_nothing(self):
        with pytest.raises(TargetError, match=r"modules_to_save='heads'.*There are: .*up"):
            lora2fx.transform(Plain(), "up", modules_to_save=["heads"])


def test_plain_module_by_name_without_inputs_is_unverified_and_right():
    model = Plain()
    base, x = copy.deepcopy(model), torch.randn(2, 9, 6)
    lora2fx.transform(model, ["up", "blocks.*"], lora2fx.LoRA2(r=4, k=2))
    report = lora2fx.report(model).to_dict()
    assert report["verify"]["status"] == "UNVERIFIED"
    assert {site["weight"] for site in report["sites"] if site["rewrite"]} == {
        "up.weight",
        *(f"blocks.{i}.weight" for i in range(3)),
    }
    assert torch.equal(model(x), base(x))


def test_verify_false_says_so():
    model = lora2fx.transform(Plain(), "up", example_inputs=(torch.randn(2, 9, 6),), verify=False)
    assert lora2fx.report(model).to_dict()["verify"]["status"] == "UNVERIFIED"


def test_seed_repeats_the_factors_and_leaves_torchs_generator_alone():
    def factors():
        model = lora2fx.transform(Plain(), "up", seed=3)
        return model.up.lora2fx_weight.u.detach().clone()

    state = torch.get_rng_state()
    first = factors()
    torch.manual_seed(11)
    assert torch.equal(first, factors())
    torch.set_rng_state(state)
    lora2fx.transform(model := Plain(), "up", seed=3)
    expected = torch.get_rng_state()
    torch.set_rng_state(state)
    Plain()
    assert torch.equal(torch.get_rng_state(), expected)
    assert model.up.lora2fx_weight.u.dtype == torch.float32


def test_inspect_shows_every_weight_and_leaves_the_model_alone(name):
    model = ZOO[name].build()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    report = lora2fx.inspect(model, ZOO[name].example_inputs).to_dict()
    named = dict(model.named_parameters(remove_duplicate=False))
    shown = {id(named[site["weight"]]) for site in report["sites"]}
    assert shown == {id(parameter) for parameter in named.values() if parameter.dim() >= 2}
    assert all(site["rewrite"] or site["reason"] for site in report["sites"])
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


def test_a_forward_that_asks_whether_embeddings_are_tied_is_refused_untied():
    class Scaled(type(ZOO["gpt2"].build())):
        def forward(self, input_ids=None, **kwargs):
            found = super().forward(input_ids, **kwargs)
            found.logits = found.logits * (0.5 if self.config.tie_word_embeddings else 1.0)
            return found

    model = ZOO["gpt2"].build()
    model.__class__ = Scaled
    weight, flag = model.lm_head.weight, model.config.tie_word_embeddings
    with pytest.raises(
        lora2fx.Lora2fxError, match=r"untie=True for lm_head\.weight.*reads config\.tie_word_embeddings"
    ):
        lora2fx.transform(model, "role:lm_head", lora2fx.LoRA2(k=2), untie=True)
    assert model.lm_head.weight is weight
    assert model.config.tie_word_embeddings is flag


def test_made_up_inputs_that_the_forward_does_not_take_ask_for_example_inputs():
    model = ZOO["bert"].build()
    model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(
        lora2fx.Lora2fxError, match=r"raised ZeroDivisionError on inputs made from its config \(input_ids"
    ):
        lora2fx.inspect(model)
