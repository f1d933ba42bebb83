"""The ONNX examples run as they are, and the command line reaches every ONNX mode."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import lora2fx
from lora2fx.cli import main
from lora2fx.exporters import OnnxModel

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="example")["main"]


def test_merged_in_three_precisions(tmp_path):
    pytest.importorskip("transformers")
    errors = example("export_onnx")(tmp_path)
    assert errors["float32"] < 1e-5 < errors["float16"] < 5e-3 < 0.2
    assert errors["float16"] < errors["int8"] < 0.2


def test_a_decoder_generates_what_torch_does(tmp_path):
    pytest.importorskip("transformers")
    found, expected = example("export_onnx_decoder")(tmp_path)
    assert found == expected
    assert found[0] == [5, 6, 7, 8, 9, 10, 11, 12]


def test_swapped_adapters_compute_what_their_models_do(tmp_path):
    errors = example("export_onnx_multi")(tmp_path)
    assert set(errors) == {"none", "wide", "small"}
    assert max(errors.values()) < 1e-5


FACTORY = """
import torch
from torch import nn

def whole():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)), (torch.ones(2, 6),)
"""


@pytest.fixture
def adapters(tmp_path, monkeypatch) -> list[str]:
    """A factory on the path, and two adapters of its model."""
    (tmp_path / "net_of_onnx_cli.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    from net_of_onnx_cli import whole

    for name, rank in (("one", 2), ("two", 4)):
        model, inputs = whole()
        lora2fx.transform(model, ["0"], lora2fx.LoRA(r=rank), example_inputs=inputs)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.normal_(generator=torch.Generator().manual_seed(rank))
        lora2fx.save(model, tmp_path / name)
    return ["export", "--base", "net_of_onnx_cli:whole", "--adapter", str(tmp_path / "one")]


def test_the_command_line_writes_a_base_and_adapters(adapters, tmp_path, capsys):
    out = tmp_path / "out" / "m.onnx"
    assert main([*adapters, "--onnx", str(out), "--mode", "multi", "--also", str(tmp_path / "two")]) == 0
    assert "one base, 2 swappable adapters" in capsys.readouterr().out
    model = OnnxModel(out)
    model.load_adapter("two", out.with_name("m.two.onnx_adapter"))
    plain, other = (model.run({"input": np.ones((4, 6), np.float32)}, name)["output"] for name in (None, "two"))
    assert np.abs(plain - other).max() > 0.1


def test_the_command_line_takes_opset_and_numbers(adapters, tmp_path, capsys):
    out = tmp_path / "m.onnx"
    assert main([*adapters, "--onnx", str(out), "--opset", "18", "--dtype", "float16"]) == 0
    written = json.loads((tmp_path / "m.onnx.report.json").read_text())
    assert (written["opset"], written["dtype"]) == (18, "float16")
    assert main([*adapters, "--onnx", str(out), "--int8"]) == 0
    assert json.loads((tmp_path / "m.onnx.report.json").read_text())["dtype"] == "int8"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--onnx", "m.onnx", "--also", "x"], 2, "--also names further adapters for --mode multi"),
        (["--safetensors", "m.safetensors", "--int8"], 2, "--int8 goes with --onnx"),
        (["--peft", "m", "--kv-cache"], 2, "--kv-cache goes with --onnx"),
        (["--onnx", "m.onnx", "--kv-cache"], 1, "kv_cache=True: Sequential is no transformers decoder"),
        (["--onnx", "m.onnx", "--opset", "9"], 1, "opset=9: torch.onnx.export writes opsets 18 to 25"),
        (["--onnx", "m.onnx", "--int8", "--dtype", "float16"], 1, "without dtype='float16'"),
        (["--onnx", "m.onnx", "--providers", "Nobody"], 1, "this onnxruntime knows"),
    ],
)
def test_the_command_line_refuses(adapters, tmp_path, monkeypatch, capsys, options, code, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main([*adapters, *options]) == code
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == before
