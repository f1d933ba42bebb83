"""What the public docstrings say holds: each example runs as it stands, each error that is raised is named."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import textwrap
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora2fx
from lora2fx import exporters
from lora2fx.errors import AdapterError, ExportError, FormatError, InputsError, MethodError, ScheduleError, TargetError
from lora2fx.exporters import OnnxModel
from lora2fx.reports import Report
from tests.loops import forget

METHODS = ("LoRA2", "LoRA", "AdaLoRA", "SoRA", "SaLoRA", "ALoRA")
PACKAGES = {"transformers": "transformers", "accelerate": "accelerate", "lightning": "lightning.pytorch"}
NEEDS = {"OnnxModel": "onnxruntime", "export_onnx": "onnxruntime", "export_peft": "peft"}
"""By public name the package that its example needs; it is skipped, saying so, where that is missing."""


def public() -> dict[str, Any]:
    """Every public object by the name that users write, but `lora2fx` itself."""
    found = {f"lora2fx.{name}": getattr(lora2fx, name) for name in lora2fx.__all__}
    found |= {f"exporters.{name}": getattr(exporters, name) for name in exporters.__all__}
    for name in PACKAGES:
        found[f"integrations.{name}.attach"] = importlib.import_module(f"lora2fx.integrations.{name}").attach
    return found | {"reports.Report": Report}


def members(owner: type) -> dict[str, Any]:
    """The public functions that a class defines itself."""
    return {name: value for name, value in vars(owner).items() if inspect.isfunction(value) and name[0] != "_"}


PUBLIC = public()
CALLED = {name: value for name, value in PUBLIC.items() if callable(value)}
SESSION = {f"OnnxModel.{name}": value for name, value in members(OnnxModel).items()}


def examples(name: str) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.getdoc(PUBLIC[name]) or "")


def needed(name: str) -> str | None:
    parts = name.split(".")
    return PACKAGES.get(parts[1]) if parts[0] == "integrations" else NEEDS.get(parts[-1])


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


def adapted() -> nn.Sequential:
    return lora2fx.transform(plain(), "0", lora2fx.LoRA(r=2), seed=0)


def unfinished() -> nn.Sequential:
    return lora2fx.transform(plain(), "0", lora2fx.LoRA2(r=4, k=2, target_k=1), seed=0)


def damaged() -> nn.Sequential:
    model = adapted()
    with torch.no_grad():
        model[0].lora2fx_weight.B.fill_(torch.inf)
    return model


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


def attach_to_two_optimizers() -> None:
    model = adapted()
    kept = [lora2fx.attach(model, optimizer(model), 4)]
    lora2fx.attach(model, optimizer(model), 4)
    del kept


def lightning_twice() -> None:
    pl = pytest.importorskip("lightning.pytorch")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    for _ in range(2):
        PUBLIC["integrations.lightning.attach"](trainer)


def accelerate_plain(model: nn.Module, steps: int) -> None:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    PUBLIC["integrations.accelerate.attach"](accelerator, model, optimizer(model), steps)


def trainer_plain() -> None:
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments("run", use_cpu=True, report_to="none")
    PUBLIC["integrations.transformers.attach"](transformers.Trainer(plain(), arguments, train_dataset=[]))


ROWS = (torch.ones(4, 8),)
Misuse = tuple[str, type[Exception], Callable[[], Any]]
MISUSES: list[Misuse] = [
    *((f"lora2fx.{name}", MethodError, lambda name=name: getattr(lora2fx, name)(r=0)) for name in METHODS),
    ("lora2fx.transform", TargetError, lambda: lora2fx.transform(plain(), "up")),
    ("lora2fx.transform", InputsError, lambda: lora2fx.transform(plain())),
    ("lora2fx.transform", AdapterError, lambda: lora2fx.transform(adapted(), "0")),
    ("lora2fx.transform", MethodError, lambda: lora2fx.transform(plain(), "0", lora2fx.LoRA(rank_pattern={"x": 2}))),
    ("lora2fx.inspect", InputsError, lambda: lora2fx.inspect(plain())),
    ("lora2fx.inspect", InputsError, lambda: lora2fx.inspect(plain(), {"words": torch.ones(4, 8)})),
    ("lora2fx.inspect", AdapterError, lambda: lora2fx.inspect(adapted(), ROWS)),
    ("lora2fx.report", AdapterError, lambda: lora2fx.report(plain())),
    ("lora2fx.param_groups", AdapterError, lambda: lora2fx.param_groups(plain(), 0.1)),
    ("lora2fx.attach", AdapterError, lambda: lora2fx.attach(plain(), optimizer(plain()), 4)),
    ("lora2fx.attach", AdapterError, attach_to_two_optimizers),
    ("lora2fx.attach", ScheduleError, lambda: lora2fx.attach(model := adapted(), optimizer(model), 0)),
    ("lora2fx.fold", AdapterError, lambda: lora2fx.fold(damaged())),
    ("lora2fx.fold", ScheduleError, lambda: lora2fx.fold(unfinished())),
    ("lora2fx.fold", MethodError, lambda: lora2fx.fold(adapted(), rounding="up")),
    ("lora2fx.unload", AdapterError, lambda: lora2fx.unload(plain())),
    ("lora2fx.save", AdapterError, lambda: lora2fx.save(damaged(), "adapter")),
    ("lora2fx.load", FormatError, lambda: lora2fx.load(plain(), "nowhere")),
    ("lora2fx.load", AdapterError, lambda: lora2fx.load(adapted(), "nowhere")),
    ("exporters.export_safetensors", ExportError, lambda: exporters.export_safetensors(adapted(), "folder")),
    ("exporters.export_safetensors", ScheduleError, lambda: exporters.export_safetensors(unfinished(), "folder")),
    ("exporters.export_safetensors", AdapterError, lambda: exporters.export_safetensors(damaged(), "x.safetensors")),
    ("exporters.export_peft", ExportError, lambda: exporters.export_peft(adapted(), "peft")),
    ("exporters.export_peft", ScheduleError, lambda: exporters.export_peft(unfinished(), "peft")),
    ("exporters.export_peft", AdapterError, lambda: exporters.export_peft(plain(), "peft")),
    ("exporters.export_onnx", ExportError, lambda: exporters.export_onnx(plain(), "m.onnx", ROWS, adapters={})),
    ("exporters.export_onnx", InputsError, lambda: exporters.export_onnx(plain(), "m.onnx")),
    ("exporters.export_onnx", ScheduleError, lambda: exporters.export_onnx(unfinished(), "m.onnx", ROWS)),
    ("exporters.OnnxModel", ExportError, lambda: OnnxModel("nowhere.onnx")),
    ("integrations.transformers.attach", AdapterError, trainer_plain),
    ("integrations.accelerate.attach", AdapterError, lambda: accelerate_plain(plain(), 4)),
    ("integrations.accelerate.attach", ScheduleError, lambda: accelerate_plain(adapted(), 0)),
    ("integrations.lightning.attach", AdapterError, lightning_twice),
]
HARMLESS = {"lora2fx.print_trainable_parameters", "lora2fx.Lora2fxError", "lora2fx.Lora2fxWarning", "reports.Report"}
"""What raises nothing of its own."""


@pytest.fixture(autouse=True)
def _aside(tmp_path, monkeypatch):
    """An empty folder, a fixed seed, and nothing of accelerate's that an earlier test left."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    forget()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning|torch.utils.data")
        warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")
        yield
    forget()


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(name):
    if package := needed(name):
        pytest.importorskip(package)
    test = doctest.DocTest(examples(name), {}, name, None, None, None)
    printed: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=printed.append)
    assert not result.failed, "".join(printed)
    assert result.attempted


@pytest.mark.parametrize("name", PUBLIC)
def test_it_has_an_example_that_shows_something(name):
    """Imports alone, or code of which nothing is printed, would be none."""
    found = examples(name)
    assert re.search(r"^Examples:$", inspect.getdoc(PUBLIC[name]), re.MULTILINE), f"{name} has no Examples: section"
    assert any("import" not in example.source for example in found), name
    assert any(example.want or example.exc_msg for example in found), f"{name}: nothing is printed"
    short = name.split(".")[-1]
    assert any(short in example.source for example in found), f"{name} is not in its own example"


@pytest.mark.parametrize(
    ("name", "error", "misuse"), MISUSES, ids=[f"{name}-{error.__name__}" for name, error, _ in MISUSES]
)
def test_an_error_that_it_raises_is_named(name, error, misuse):
    if package := needed(name):
        pytest.importorskip(package)
    with pytest.raises(error) as caught:
        misuse()
    assert caught.type is error
    assert f"`{error.__name__}`" in (inspect.getdoc(PUBLIC[name]) or ""), f"{name} doesn't name {error.__name__}"


@pytest.mark.parametrize("name", CALLED)
def test_what_is_called_says_what_it_raises(name):
    words = inspect.getdoc(CALLED[name]) or ""
    assert bool(re.search(r"\b[Rr]aises `\w+`|Raises what", words)) == (name not in HARMLESS), name
    assert (name in {known for known, *_ in MISUSES}) == (name not in HARMLESS), f"{name}: no misuse is tried"


@pytest.mark.parametrize("name", [*CALLED, *SESSION])
def test_every_error_in_its_source_is_named(name):
    value = (CALLED | SESSION)[name]
    source = ast.parse(textwrap.dedent(inspect.getsource(value if inspect.isclass(value) else inspect.unwrap(value))))
    own = source if not inspect.isclass(value) else ast.Module([n for n in ast.walk(source) if _opens(n)], [])
    raised = {
        node.exc.func.id
        for node in ast.walk(own)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
    }
    named = {error for error in raised if f"`{error}`" in (inspect.getdoc(value) or "")}
    assert raised == named


def _opens(node: ast.AST) -> bool:
    """Whether the node is what runs when an object is made."""
    return isinstance(node, ast.FunctionDef) and node.name in ("__init__", "__post_init__")


def test_the_errors_of_a_session_are_named():
    pytest.importorskip("onnxruntime")
    exporters.export_onnx(plain(), "model.onnx", ROWS)
    model = OnnxModel("model.onnx")
    misuses: list[Misuse] = []
    for name in ("run", "run_bound"):
        method = getattr(model, name)
        misuses.append((name, InputsError, lambda method=method: method({})))
        misuses.append((name, InputsError, lambda method=method: method({"input": ROWS[0][0]})))
        misuses.append((name, AdapterError, lambda method=method: method({"input": ROWS[0]}, adapter="other")))
    misuses.append(("load_adapter", AdapterError, lambda: model.load_adapter("other", "other.onnx_adapter")))
    for name, error, misuse in misuses:
        with pytest.raises(error):
            misuse()
        assert f"`{error.__name__}`" in (inspect.getdoc(SESSION[f"OnnxModel.{name}"]) or ""), name
