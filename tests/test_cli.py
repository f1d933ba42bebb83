"""The command line from the outside: what it prints, what it leaves, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import lora2fx
from lora2fx.cli import main
from lora2fx.sources import SourceError, load_source

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))

def bare():
    torch.manual_seed(0)
    return Net()

def whole():
    return bare(), (torch.ones(2, 6),)

def number():
    return 7
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT classifier as a Hugging Face folder, with a file of a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("models") / "base"
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, max_position_embeddings=40, num_labels=3, **sizes)
    BertForSequenceClassification(config).eval().save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    return folder


def with_random_factors(model: nn.Module) -> nn.Module:
    """Every adapter parameter random, so that ΔW is far from 0."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def adapted(base: Path) -> nn.Module:
    model = BertForSequenceClassification.from_pretrained(base).eval()
    lora2fx.transform(model, ["query", "value", "ffn.down"], lora2fx.LoRA(r=2), seed=0)
    return with_random_factors(model)


@pytest.fixture(scope="module")
def adapter(adapted: nn.Module, base: Path) -> Path:
    folder = base.parent / "adapter"
    lora2fx.save(adapted, folder)
    return folder


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder that makes models."""
    (tmp_path / "made_here.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "made_here", raising=False)
    return "made_here"


def token_ids() -> Tensor:
    return torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(2))


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("demo", "inspect", "train", "report", "compare", "fold", "export"))


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"lora2fx {version('lora2fx')}\n"


def test_python_m_lora2fx_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "lora2fx", "inspect"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "the following arguments are required: MODEL" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: COMMAND"),
        (["unknown"], "invalid choice: 'unknown'"),
        (["export", "--base", "b", "--adapter", "a"], "one of the arguments --onnx --safetensors --peft is required"),
        (["export", "--base", "b", "--adapter", "a", "--onnx", "x", "--peft", "y"], "not allowed with argument --onnx"),
        (["demo", "--seed", "one"], "invalid int value: 'one'"),
    ],
)
def test_misuse_exits_with_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nowhere", "no_such_module:make", "json:no_such_factory"])
def test_a_model_that_is_not_there_exits_with_2_and_one_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", name]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("lora2fx: ") and shown.err.count("\n") == 1


def test_a_refusal_exits_with_1_and_no_traceback(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A plain module without example inputs: nothing says how to call it."""
    assert main(["inspect", f"{factory}:bare"]) == 1
    assert "example_inputs=" in capsys.readouterr().err


def test_inspect_prints_json_of_every_weight(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(base), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    roles = {site["weight"]: site["role"] for site in report["sites"]}
    assert roles["bert.encoder.layer.1.attention.self.query.weight"] == "query"
    assert roles["bert.encoder.layer.0.output.dense.weight"] == "ffn.down"
    assert report["totals"]["base_parameters"] == sum(
        value.numel() for value in load_file(base / "model.safetensors").values()
    )


def test_inspect_with_targets_shows_what_they_would_adapt(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(base), "--json", "--targets", "query", "ffn.up"]) == 0
    weights = [site["weight"] for site in json.loads(capsys.readouterr().out)["sites"]]
    expected = {"attention.self.query", "intermediate.dense"}
    assert set(weights) == {f"bert.encoder.layer.{i}.{name}.weight" for i in range(2) for name in expected}


def test_inspect_takes_a_factory_with_example_inputs(factory: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{factory}:whole"]) == 0
    shown = capsys.readouterr().out
    assert "first.weight" in shown and "second.weight" in shown


def test_a_folder_without_weights_is_inspected_with_a_note(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    shown = capsys.readouterr()
    assert "holds no weights: the model's are random" in shown.err
    assert len(json.loads(shown.out)["sites"]) >= 12


def test_load_source_gives_the_folders_weights(base: Path) -> None:
    source = load_source(str(base))
    assert source.note == "" and not source.model.training
    stored = load_file(base / "model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in source.model.state_dict().items() if name in stored)


def test_as_names_the_class(base: Path) -> None:
    assert type(load_source(str(base), "BertModel").model).__name__ == "BertModel"
    with pytest.raises(SourceError, match="as a Nonesuch: transformers has no such model class"):
        load_source(str(base), "Nonesuch")


def test_sources_that_are_no_models_are_refused(factory: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"returned a int; return an nn\.Module"):
        load_source(f"{factory}:number")
    with pytest.raises(SourceError, match=r"holds no config\.json"):
        load_source(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SourceError, match=r"config\.json is no JSON"):
        load_source(str(tmp_path))


@pytest.mark.parametrize(
    "options", [[], ["--as", "AutoModelForSequenceClassification"], ["--rounding", "adapter", "--allow-other-base"]]
)
def test_fold_writes_a_plain_folder_with_the_adapted_outputs(
    base: Path, adapter: Path, adapted: nn.Module, tmp_path: Path, options: list[str]
) -> None:
    """Tensor by tensor, or through a model of the class that --as names."""
    out = tmp_path / "new" / "folded"
    assert main(["fold", "--base", str(base), "--adapter", str(adapter), "--out", str(out), *options]) == 0
    folded = BertForSequenceClassification.from_pretrained(out).eval()
    plain = BertForSequenceClassification.from_pretrained(base).eval()
    with torch.no_grad():
        logits = [model(input_ids=token_ids()).logits for model in (folded, adapted, plain)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)
    assert (logits[0] - logits[2]).abs().max() > 1e-2
    assert (out / "vocab.txt").read_text() == (base / "vocab.txt").read_text()
    assert set(load_file(out / "model.safetensors")) == set(load_file(base / "model.safetensors"))
    assert [path.name for path in out.parent.iterdir()] == ["folded"]


def test_fold_refuses_a_folder_that_is_there(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fold", "--base", str(base), "--adapter", str(adapter), "--out", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_fold_of_a_missing_adapter_is_refused_and_writes_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folded"
    assert main(["fold", "--base", str(base), "--adapter", str(tmp_path / "none"), "--out", str(out)]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert not out.exists()


def test_export_safetensors_holds_the_merged_weights(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Oracle: W + ΔW in float64; the fold adds in float32."""
    path = tmp_path / "merged.safetensors"
    assert main(["export", "--base", str(base), "--adapter", str(adapter), "--safetensors", str(path)]) == 0
    merged, stored = load_file(path), load_file(base / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    saved = lora2fx.load(BertForSequenceClassification.from_pretrained(base), adapter)
    delta = saved.get_submodule("bert.encoder.layer.0.attention.self.query.lora2fx_weight").exact().delta().T
    torch.testing.assert_close(merged[name], (stored[name].double() + delta).float(), rtol=2**-22, atol=2**-24)


def test_export_onnx_takes_a_factorys_example_inputs_and_runs(factory: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    source = load_source(f"{factory}:whole")
    lora2fx.transform(source.model, ["first"], lora2fx.LoRA(r=2), example_inputs=source.example_inputs, seed=0)
    lora2fx.save(with_random_factors(source.model), tmp_path / "adapter")
    path = tmp_path / "model.onnx"
    base, adapter = f"{factory}:whole", str(tmp_path / "adapter")
    assert main(["export", "--base", base, "--adapter", adapter, "--onnx", str(path)]) == 0
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), source.model(x), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own call
def test_export_peft_is_read_by_peft(base: Path, adapter: Path, adapted: nn.Module, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = tmp_path / "peft"
    assert main(["export", "--base", str(base), "--adapter", str(adapter), "--peft", str(folder)]) == 0
    read = peft.PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(base), folder).eval()
    with torch.no_grad():
        got, expected = read(input_ids=token_ids()).logits, adapted(input_ids=token_ids()).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_demo_runs_quick_and_prints_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job itself is tested in test_demo.py; here only that the options reach it."""
    asked = {}

    def job(out: Path, seed: int, size: object) -> dict[str, object]:
        asked.update(out=out, seed=seed, size=size)
        raise lora2fx.Lora2fxError("stopped here")

    from lora2fx.demo.job import QUICK

    monkeypatch.setattr("lora2fx.demo.job.run_demo", job)
    assert main(["demo", "--out", str(tmp_path), "--seed", "3", "--quick"]) == 1
    assert asked == {"out": tmp_path, "seed": 3, "size": QUICK}
    assert capsys.readouterr().err == "lora2fx: stopped here\n"


def test_an_interrupt_ends_with_130_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def job(*given: object) -> dict[str, object]:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora2fx.demo.job.run_demo", job)
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == ""
