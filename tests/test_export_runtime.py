"""Packages that are missing or doubled, and providers that don't run, are told."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest
import torch

from lora2fx.errors import ExportError
from lora2fx.exporters.runtime import first_line, open_session, require_onnx_packages, run_session

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ExportError, match=rf'export_onnx needs {name}, .*pip install "lora2fx\[onnx\]"'):
        require_onnx_packages()


def test_two_runtimes_are_refused(monkeypatch):
    both = {"onnxruntime": ["onnxruntime", "onnxruntime-gpu"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: both)
    with pytest.raises(ExportError, match="onnxruntime and onnxruntime-gpu are installed together"):
        require_onnx_packages()


def test_one_runtime_is_fine():
    require_onnx_packages()


def relu(path):
    onnx = pytest.importorskip("onnx")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    x, y = (helper.make_tensor_value_info(name, float32, ["n", 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(path))
    return path


def test_a_session_runs_named_inputs(tmp_path):
    session = open_session(relu(tmp_path / "m.onnx"), ["CPUExecutionProvider"])
    x = torch.tensor([[-1.0, 0.0, 2.0]])
    assert run_session(session, {"x": x, "unused": x})[0].tolist() == [[0.0, 0.0, 2.0]]
    with pytest.raises(ExportError, match=r"can't run the exported file on x \(1, 4\)"):
        run_session(session, {"x": torch.ones(1, 4)})


def test_an_unknown_provider_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"providers=\['TeleportExecutionProvider'\]: this onnxruntime knows"):
        open_session(relu(tmp_path / "m.onnx"), ["TeleportExecutionProvider"])


def test_a_runtime_built_for_the_cpu_says_what_to_install(tmp_path):
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime is built for CUDA")
    with pytest.raises(ExportError, match=r'built for the CPU: pip uninstall onnxruntime, .*"lora2fx\[gpu\]"'):
        open_session(relu(tmp_path / "m.onnx"), ["CUDAExecutionProvider"])


def test_a_proof_keeps_cuda_from_rounding_to_tf32(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])

    def session(path, options, providers):
        asked.append(providers)
        raise RuntimeError("no device")

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    given = ("CUDAExecutionProvider", {"device_id": 0})
    for providers, exact in ((["CUDAExecutionProvider"], True), (["CUDAExecutionProvider"], False), ([given], True)):
        with pytest.raises(ExportError, match="can't load the exported file: RuntimeError: no device"):
            open_session(relu(tmp_path / "m.onnx"), providers, exact)
    assert asked == [[("CUDAExecutionProvider", {"use_tf32": "0"})], ["CUDAExecutionProvider"], [given]]


def test_a_provider_that_silently_falls_back_is_refused(tmp_path, monkeypatch):
    known = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: known)
    real = onnxruntime.InferenceSession

    def session(path, options, providers):
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(ExportError, match="ONNX Runtime runs CPUExecutionProvider: CUDAExecutionProvider did not load"):
        open_session(relu(tmp_path / "m.onnx"), [("CUDAExecutionProvider", {"device_id": 0})])


def test_a_file_that_can_not_be_loaded_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"not a graph")
    with pytest.raises(ExportError, match="can't load the exported file"):
        open_session(tmp_path / "m.onnx", ["CPUExecutionProvider"])


def test_an_error_is_told_in_a_line():
    assert first_line(ValueError("\n  one  \ntwo")) == "ValueError: one"
    assert first_line(ValueError("these:\n - two\nthree")) == "ValueError: these: - two"
    assert first_line(KeyError()) == "KeyError: no text"
