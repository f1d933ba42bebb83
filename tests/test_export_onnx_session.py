"""Running an export: by name, on bound memory, an output back in as an input, and on CUDA where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora2fx.errors import ExportError, InputsError
from lora2fx.exporters import OnnxModel, export_onnx
from tests.exported import adapt

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


class Step(nn.Module):
    """One step of a recurrence: a state in, a state out."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, state: Tensor) -> dict[str, Tensor]:
        state = self.cell(torch.cat([x, state], -1)).tanh()
        return {"logits": self.head(state), "next": state}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = adapt(Step(), ["cell.weight"])
    path = tmp_path_factory.mktemp("session") / "m.onnx"
    inputs = {"x": torch.randn(3, 4), "state": torch.randn(3, 8)}
    export_onnx(model, path, inputs, dynamic_axes={"x": {0: "batch"}, "state": {0: "batch"}})
    return model, path


def steps(run, x: Tensor, count: int):
    """Feed the state back `count` times."""
    found = {"next": torch.zeros(x.shape[0], 8, device=x.device)}
    for _ in range(count):
        found = run({"x": x, "state": found["next"]})
    return found


def expected(model, x: Tensor, count: int) -> np.ndarray:
    with torch.no_grad():
        found = steps(lambda inputs: model(**inputs), x.cpu(), count)
    return found["logits"].numpy()


def test_run_and_run_bound_agree_with_torch_over_many_steps(exported):
    model, path = exported
    onnx_model, x = OnnxModel(path), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    assert (onnx_model.provider, onnx_model.inputs, onnx_model.outputs) == (
        "CPUExecutionProvider",
        ("x", "state"),
        ("logits", "next"),
    )
    for count in (1, 2, 9):
        np.testing.assert_allclose(steps(onnx_model.run, x, count)["logits"], expected(model, x, count), atol=2e-6)
        bound = steps(onnx_model.run_bound, x, count)
        np.testing.assert_allclose(bound["logits"].numpy(), expected(model, x, count), atol=2e-6)


def test_bound_outputs_are_torchs_without_a_copy(exported):
    _, path = exported
    found = OnnxModel(path).run_bound({"x": torch.ones(2, 4), "state": np.zeros((2, 8), np.float32)})["logits"]
    shared = torch.from_dlpack(found)
    assert shared.data_ptr() == found.data_ptr()
    assert shared.tolist() == found.numpy().tolist()


def test_inputs_that_do_not_fit_are_told(exported):
    _, path = exported
    model = OnnxModel(path)
    with pytest.raises(InputsError, match=r"takes the inputs x, state, and was given x, z"):
        model.run({"x": torch.ones(2, 4), "z": torch.ones(2, 8)})
    with pytest.raises(InputsError, match=r"can't run the graph on x float32 \(2, 5\), state float32 \(2, 8\)"):
        model.run({"x": torch.ones(2, 5), "state": torch.ones(2, 8)})
    with pytest.raises(InputsError, match=r"can't run the graph on bound memory"):
        model.run_bound({"x": torch.ones(2, 5), "state": torch.ones(2, 8)})


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ExportError, match="can't load the exported file"):
        OnnxModel(tmp_path / "none.onnx")


@pytest.mark.gpu
def test_cuda_runs_what_was_proven_on_cuda(tmp_path, exported):
    """Needs a CUDA device, and onnxruntime-gpu in the place of onnxruntime."""
    if not torch.cuda.is_available() or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("no CUDA device, or an onnxruntime built for the CPU")
    model, _ = exported
    inputs = {"x": torch.randn(3, 4), "state": torch.randn(3, 8)}
    report = export_onnx(model, tmp_path / "m.onnx", inputs, providers=["CUDAExecutionProvider"])
    assert report.details["provider"] == "CUDAExecutionProvider"
    onnx_model = OnnxModel(tmp_path / "m.onnx", ["CUDAExecutionProvider"], exact=True)
    x = torch.randn(5, 4)
    found = steps(onnx_model.run_bound, x.cuda(), 5)["logits"]
    assert found.device_name() == "cuda"
    np.testing.assert_allclose(found.numpy(), expected(model, x, 5), atol=1e-5)
