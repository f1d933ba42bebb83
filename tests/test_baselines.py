"""Full fine-tuning, BitFit and Houlsby's adapters through the same front door as the methods."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

import lora2fx
from lora2fx.adapter import Adapter
from lora2fx.errors import AdapterError, MethodError, RewriteError, TargetError
from lora2fx.insert import Insert
from lora2fx.methods.baselines import BitFit, FullFineTuning
from lora2fx.methods.houlsby import STD, Bottleneck, Houlsby
from lora2fx.training.driver import Attachment
from tests.adapted import linear_site

IDS = torch.tensor([[3, 7, 11, 2, 5, 9, 4, 8], [1, 9, 9, 30, 21, 4, 2, 6], [2, 2, 5, 6, 7, 8, 9, 1]])
LABELS = torch.tensor([0, 1, 0])


def bert(dtype=torch.float64):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=40, num_labels=2, **sizes)
    return BertForSequenceClassification(config).to(dtype).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2Model(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)).double().eval()


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return LlamaModel(LlamaConfig(vocab_size=40, **sizes)).double().eval()


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def train(model, steps=3, total=None):
    groups = lora2fx.param_groups(model, 1e-2, 0.01)
    optimizer = torch.optim.AdamW(groups)
    attachment = lora2fx.attach(model, optimizer, total_steps=total or steps)
    attachment.evaluate = lambda: -float(model(IDS, labels=LABELS).loss.detach())
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=LABELS).loss.backward()
        optimizer.step()
    return attachment


METHODS = [
    FullFineTuning(),
    FullFineTuning(scope="targets"),
    BitFit(),
    BitFit(scope="targets"),
    Houlsby(m=3),
    Houlsby(m=3, norms=False, init="identity"),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_run_moves_what_is_trained_and_unload_brings_every_bit_back(method):
    model = bert()
    before, classes = bits(model), [type(module) for module in model.modules()]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    objects = [id(p) for p in model.parameters()]
    expected = model(IDS).logits
    targets = ["output", "ffn"]
    lora2fx.transform(model, targets, method)
    assert torch.equal(model(IDS).logits, expected) or method == Houlsby(m=3)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    attachment = train(model)
    assert (attachment.step, attachment.skipped, attachment.penalty, attachment.budget, attachment.active) == (
        3,
        0,
        None,
        None,
        0,
    )
    moved = {name for name, p in model.named_parameters() if name not in before or not torch.equal(p, before[name])}
    assert moved == trained
    assert {"classifier.weight", "classifier.bias"} < moved
    assert not torch.equal(model(IDS).logits, expected)
    lora2fx.unload(model)
    assert same(before, bits(model))
    assert [type(module) for module in model.modules()] == classes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [id(p) for p in model.parameters()] == objects
    assert torch.equal(model(IDS).logits, expected)
    lora2fx.transform(model, targets, method)


def trainable(model, method, targets=None):
    lora2fx.transform(model, targets, method)
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_full_fine_tuning_trains_everything_or_the_targets():
    assert trainable(bert(), FullFineTuning(), ["query"]) == {name for name, _ in bert().named_parameters()}
    found = trainable(bert(), FullFineTuning(scope="targets"), ["query"])
    queries = {f"bert.encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)}
    assert found == queries | {"classifier.weight", "classifier.bias"}


def test_bitfit_trains_every_bias_and_the_head_or_those_of_the_targets():
    everywhere = {name for name, _ in bert().named_parameters() if name.endswith(".bias")}
    assert len(everywhere) == 2 * 8 + 1 + 2
    assert trainable(bert(), BitFit()) == everywhere | {"classifier.weight"}
    # The published variant: the query's bias and that of the second layer of the MLP.
    kept = {f"bert.encoder.layer.{i}.{part}.bias" for i in (0, 1) for part in ("attention.self.query", "output.dense")}
    found = trainable(bert(), BitFit(scope="targets"), ["query", "ffn.down"])
    assert found == kept | {"classifier.weight", "classifier.bias"}
    encoder = nn.Sequential(nn.MultiheadAttention(8, 2), nn.LSTM(8, 8))
    biases = {"0.in_proj_bias", "0.out_proj.bias", "1.bias_ih_l0", "1.bias_hh_l0"}
    assert trainable(encoder, BitFit()) == biases


def test_houlsby_goes_behind_both_sublayers_and_norms_are_trained():
    model = bert()
    found = trainable(model, Houlsby(m=3))
    places = [f"bert.encoder.layer.{i}.{part}" for i in (0, 1) for part in ("attention.output.dense", "output.dense")]
    own = {f"{path}.lora2fx_weight.{name}" for path in places for name in ("down", "down_bias", "up", "up_bias")}
    norms = {name for name, _ in bert().named_parameters() if ".LayerNorm." in name}
    assert len(norms) == 2 * 5
    assert found == own | norms | {"classifier.weight", "classifier.bias"}
    report = lora2fx.report(model)
    inserted = [site for site in report.sites if site["rewrite"] == "insert"]
    assert [site["adapter"].removesuffix(".lora2fx_weight") for site in inserted] == places
    assert [site["adapter_parameters"] for site in inserted] == [2 * 16 * 3 + 16 + 3] * 4
    assert report.totals["adapter_parameters"] == 4 * (2 * 16 * 3 + 16 + 3)
    assert set(report.to_dict()["trained"]) == norms
    assert report.verify["status"] == "passed"
    assert [check["check"] for check in report.verify["checks"]] == ["base"] * 3 + ["gradient"]
    assert trainable(bert(), Houlsby(m=3, norms=False)) == own | {"classifier.weight", "classifier.bias"}
    scales = trainable(llama(), Houlsby(m=3)) - {n for n, _ in llama().named_parameters() if "norm" not in n}
    assert {name for name in scales if "lora2fx" not in name} == {
        "norm.weight",
        *(f"layers.{i}.{part}_layernorm.weight" for i in (0, 1) for part in ("input", "post_attention")),
    }


def test_the_published_start_is_near_the_identity():
    torch.manual_seed(0)
    site = linear_site("layer", 300, 400)
    near, exact = Bottleneck(site, 64, "near_identity"), Bottleneck(site, 64, "identity")
    for matrix in (near.down, near.up, exact.down):
        # A normal distribution cut off at 2σ has the standard deviation 0.8796 σ.
        assert float(matrix.detach().std()) == pytest.approx(0.8796 * STD, rel=0.02)
        assert float(matrix.detach().abs().max()) <= 2 * STD
    assert not near.down_bias.any() and not near.up_bias.any() and not exact.up.any()
    assert (near.down.shape, near.up.shape) == ((64, 400), (400, 64))


def hooked(model, inserts):
    """The formula of the paper behind each owner, by forward hooks: independent of tracing."""

    def behind(insert):
        def hook(module, args, h):
            inner = torch.nn.functional.gelu(h @ insert.down.T + insert.down_bias)
            return h + inner @ insert.up.T + insert.up_bias

        return hook

    for path, insert in inserts.items():
        model.get_submodule(path.rpartition(".")[0]).register_forward_hook(behind(insert))
    return model


@pytest.mark.parametrize("build", [bert, gpt2, llama])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_houlsby_is_the_papers_formula_behind_the_right_layers(build, mode):
    model, oracle = build(), build()
    lora2fx.transform(model, method=Houlsby(m=3))
    inserts = {name: module for name, module in model.named_modules() if isinstance(module, Insert)}
    assert len(inserts) == 4
    generator = torch.Generator().manual_seed(3)
    for insert in inserts.values():
        for parameter in insert.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
    oracle = hooked(oracle, inserts)
    plain = build()
    outputs = []
    for candidate in (model, oracle, plain):
        torch.manual_seed(5)
        outputs.append(candidate.train(mode == "train")(IDS)[0].detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-13)
    assert (outputs[0] - outputs[2]).abs().max() > 0.002


def test_houlsby_gradients_are_the_formulas():
    model, oracle = bert(), bert()
    lora2fx.transform(model, method=Houlsby(m=3))
    inserts = {name: module for name, module in model.named_modules() if isinstance(module, Insert)}
    loss = model(IDS, labels=LABELS).loss
    leaves = [p for insert in inserts.values() for p in insert.parameters()]
    found = torch.autograd.grad(loss, leaves)
    expected = torch.autograd.grad(hooked(oracle, inserts)(IDS, labels=LABELS).loss, leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-15)


def test_houlsby_does_not_fold_and_says_so_and_nothing_changes():
    model = bert()
    lora2fx.transform(model, method=Houlsby(m=3))
    train(model)
    before = bits(model)
    with pytest.raises(AdapterError, match=r"fold: Houlsby put 4 modules .* no linear maps: no weights equal them"):
        lora2fx.fold(model)
    with pytest.raises(AdapterError, match="fold: Houlsby put 4 modules"):
        lora2fx.exporters.export_onnx(model, "/nonexistent/model.onnx")
    assert same(before, bits(model))


@pytest.mark.parametrize("method", METHODS[:4], ids=repr)
def test_what_trains_the_models_own_weights_folds_to_a_plain_model(method):
    model = bert()
    lora2fx.transform(model, ["output", "ffn"], method)
    train(model)
    expected, state = model(IDS).logits, bits(model)
    report = lora2fx.fold(model)
    assert report.sites == ()
    assert torch.equal(model(IDS).logits, expected)
    assert same(state, bits(model)) and list(state) == list(bert().state_dict())
    with pytest.raises(AdapterError, match="holds no adapters"):
        lora2fx.report(model)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[2], METHODS[4]], ids=repr)
def test_there_is_no_update_to_save_or_export_as_lora(method, tmp_path):
    model = bert()
    lora2fx.transform(model, method=method)
    for asked, write in (("save", lora2fx.save), ("export_peft", lora2fx.exporters.export_peft)):
        name = type(method).__name__
        with pytest.raises(AdapterError, match=rf"{asked}: {name} .* no low-rank update to write\. Save the model"):
            write(model, tmp_path / "out")
        assert not list(tmp_path.iterdir())


def test_a_trained_model_is_exported_as_it_is(tmp_path):
    model = bert(torch.float32)
    lora2fx.transform(model, method=BitFit())
    train(model)
    before = bits(model)
    lora2fx.exporters.export_safetensors(model, tmp_path / "model.safetensors")
    from safetensors.torch import load_file

    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in before.items() if name in found)
    assert same(before, bits(model)), "exporting leaves the trained model as it is"
    assert {"bert.encoder.layer.0.output.dense.bias", "classifier.weight"} <= set(found)


def test_copies_and_pickles_keep_their_inserts():
    model = bert()
    lora2fx.transform(model, method=Houlsby(m=3))
    train(model)
    expected = model(IDS).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False))
    for candidate in copies:
        assert torch.equal(candidate(IDS).logits, expected)
    lora2fx.unload(copies[0])
    assert torch.equal(model(IDS).logits, expected)
    other = bert()
    lora2fx.transform(other, method=Houlsby(m=3))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS).logits, expected)


def test_an_fx_graph_takes_inserts_too():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x):
            return x + self.down(self.up(x).relu())

    torch.manual_seed(0)
    block, x = Block().double(), torch.randn(3, 4, dtype=torch.float64)
    model = torch.fx.symbolic_trace(block)
    expected = model(x)
    lora2fx.transform(model, ["down"], Houlsby(m=2, init="identity"), example_inputs=(x,))
    assert torch.equal(model(x), expected)
    insert = model.down.lora2fx_weight
    nn.init.normal_(insert.up)
    h = torch.nn.functional.linear(block.up(x).relu(), block.down.weight, block.down.bias)
    inner = torch.nn.functional.gelu(h @ insert.down.T + insert.down_bias)
    torch.testing.assert_close(model(x), x + h + inner @ insert.up.T, rtol=0, atol=1e-14)
    lora2fx.unload(model)
    assert torch.equal(model(x), expected) and not hasattr(model.down, "lora2fx_weight")


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.linear(x))


def test_running_statistics_beside_trained_parameters_come_back():
    model = Normed()
    before = bits(model)
    lora2fx.transform(model, method=FullFineTuning())
    model.train()(torch.randn(8, 4)).sum().backward()
    assert not torch.equal(model.norm.running_mean, before["norm.running_mean"])
    lora2fx.unload(model)
    assert same(before, bits(model))


def test_a_step_with_a_non_finite_gradient_changes_nothing():
    model = bert()
    lora2fx.transform(model, method=FullFineTuning())
    optimizer = torch.optim.AdamW(lora2fx.param_groups(model, 1e-2))
    attachment = lora2fx.attach(model, optimizer, total_steps=3)
    before = bits(model)
    model(IDS, labels=LABELS).loss.backward()
    model.classifier.bias.grad[0] = torch.inf
    optimizer.step()
    assert same(before, bits(model))
    assert (attachment.step, attachment.skipped) == (0, 1)
    with pytest.raises(AdapterError, match="there are no adapters to attach"):
        Attachment([], lora2fx.LoRA2(target_r=1).training(), optimizer, 3)


def test_weights_decay_but_biases_and_norms_do_not():
    model = bert()
    lora2fx.transform(model, method=FullFineTuning())
    groups = {group["name"]: group for group in lora2fx.param_groups(model, 1e-3, 0.1)}
    assert list(groups) == ["heads", "heads without decay", "others", "others without decay"]
    for name, group in groups.items():
        assert group["weight_decay"] == (0.0 if name.endswith("without decay") else 0.1)
        assert all((p.dim() > 1) != name.endswith("without decay") for p in group["params"])


def test_only_the_method_is_another_argument():
    """One script for every method: nothing but the argument changes."""
    methods = [
        lora2fx.LoRA2(r=4, k=2, target_r=2),
        lora2fx.LoRA(r=2),
        lora2fx.AdaLoRA(r=4, target_r=2),
        lora2fx.SoRA(r=4),
        lora2fx.SaLoRA(r=4),
        lora2fx.ALoRA(r=2, cycles=1, n_prune=1),
        FullFineTuning(),
        BitFit(),
        Houlsby(m=2),
    ]
    for method in methods:
        model = bert()
        before, loss = bits(model), float(model(IDS, labels=LABELS).loss.detach())
        lora2fx.transform(model, ["output", "ffn"], method=method, seed=1)
        attachment = train(model, steps=10)
        assert attachment.step == 10
        assert float(model.eval()(IDS, labels=LABELS).loss.detach()) < loss
        lora2fx.unload(model)
        assert same(before, bits(model))


def test_targets_that_leave_nothing_to_do():
    with pytest.raises(MethodError, match=r"go behind output and ffn.down, .*other roles \(query\)\. Pass targets="):
        lora2fx.transform(bert(), ["query"], Houlsby())
    with pytest.raises(MethodError, match="BitFit trains biases, and LlamaModel has none"):
        lora2fx.transform(llama(), method=BitFit())
    with pytest.raises(MethodError, match="the targeted layers has none"):
        lora2fx.transform(bert(), ["word_embeddings"], BitFit(scope="targets"))
    with pytest.raises(TargetError, match="nothing_like_it"):
        lora2fx.transform(bert(), ["nothing_like_it"], FullFineTuning())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Houlsby(m=0), "m=0"),
        (lambda: Houlsby(init="zero"), "init='zero'"),
        (lambda: BitFit(scope="query"), "scope='query'"),
        (lambda: FullFineTuning(scope=""), "scope=''"),
    ],
)
def test_hyperparameters_that_cannot_work(make, match):
    with pytest.raises(MethodError, match=match):
        make()


def test_a_layer_whose_output_is_not_to_be_had_is_refused_and_the_model_is_as_it_was():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    before, x = bits(model), torch.randn(2, 8, 8)
    with pytest.raises(RewriteError, match=r"behind self_attn.out_proj.weight: it is read from outside .*exclude="):
        lora2fx.transform(model, method=Houlsby(m=2), example_inputs=(x,))
    # torch's fused encoder reads this one past its module, so that it would pass the insert by.
    with pytest.raises(RewriteError, match=r"behind linear2.weight: it is read from outside"):
        lora2fx.transform(model, method=Houlsby(m=2), example_inputs=(x,), exclude=["output"])
    assert same(before, bits(model)) and all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(module, (Adapter, Insert)) for module in model.modules())


def test_a_model_is_transformed_once():
    for method in (FullFineTuning(), Houlsby(m=2)):
        model = bert()
        lora2fx.transform(model, method=method)
        with pytest.raises(AdapterError, match="already holds adapters"):
            lora2fx.transform(model, method=BitFit())


def test_without_inputs_the_report_says_that_inserts_are_unverified():
    model = nn.Sequential(nn.Linear(4, 4))
    lora2fx.transform(model, ["0"], Houlsby(m=2))
    assert lora2fx.report(model).verify["status"] == "UNVERIFIED"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model(torch.zeros(1, 4)).shape == (1, 4)
