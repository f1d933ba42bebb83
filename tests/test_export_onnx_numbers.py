"""Files of fewer bits: float16 merged before it is rounded, int8 held to what 8 bits do to the base model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora2fx.errors import ExportError
from lora2fx.exporters import export_onnx, onnx_int8
from lora2fx.exporters.copies import copies_of
from lora2fx.exporters.onnx_lowered import half_copies
from tests.exported import adapt, snapshot

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

WEIGHTS = ["first.weight", "second.weight"]


class Network(nn.Module):
    """Two layers of 48×48, a product of activations (which stays in float32), and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(48, 48), nn.Linear(48, 48, bias=False), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x).tanh()).tanh()
        return self.head((hidden @ hidden.mT) @ hidden)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return adapt(Network(), WEIGHTS)


def example(rows: int = 3) -> Tensor:
    return torch.randn(rows, 7, 48, generator=torch.Generator().manual_seed(7))


def run(path, x: Tensor, **options) -> np.ndarray:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("half"), network()
    before = snapshot(model)
    report = export_onnx(model, folder / "m.onnx", (example(),), dtype="float16")
    assert snapshot(model) == before
    return folder / "m.onnx", model, report.details


def test_half_precision_is_merged_in_float32_and_rounded_once(half):
    path, model, details = half
    merged = copies_of(model, "test").merged
    found = [onnx.numpy_helper.to_array(value) for value in onnx.load(str(path)).graph.initializer]
    for name, value in merged.named_parameters():
        exact = value.detach().numpy().astype(np.float16)
        assert any(np.array_equal(other, turned) for other in found for turned in (exact, exact.T)), name
    assert details["dtype"] == "float16"
    assert details["weights"]["changed"] == 2


def test_half_precision_is_measured_against_the_float32_model(half):
    path, model, details = half
    with torch.no_grad():
        expected = model(example(5)).numpy()
    found = run(path, example(5).half())
    assert found.dtype == np.float16
    output = details["outputs"][0]
    scale = np.abs(expected).max()
    assert np.abs(found.astype(np.float32) - expected).max() <= 2 * output["allowed"]
    assert 1e-5 < output["relative_error"] < 5e-3
    assert output["lowering"] > 20 * np.finfo(np.float32).eps * scale
    assert 0.9 < output["same_argmax"] <= 1.0


def test_a_weight_beyond_float16_is_refused(tmp_path):
    model = network()
    with torch.no_grad():
        model.head.bias.fill_(7e4)
    with pytest.raises(ExportError, match=r"head.bias holds values beyond ±65504"):
        export_onnx(model, tmp_path / "m.onnx", (example(),), dtype="float16")
    assert not list(tmp_path.iterdir())


def test_bfloat16_models_go_out_in_float32(tmp_path):
    model = network().bfloat16()
    report = export_onnx(model, tmp_path / "m.onnx", (example(),), dtype="float32")
    assert report.details["dtype"] == "float32"
    assert model.first.weight.dtype == torch.bfloat16
    with torch.no_grad():
        expected = model.float()(example()).numpy()
    np.testing.assert_allclose(run(tmp_path / "m.onnx", example()), expected, atol=1e-4 * np.abs(expected).max())


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("int8"), network()
    before = snapshot(model)
    report = export_onnx(model, folder / "m.onnx", (example(),), int8=True)
    assert snapshot(model) == before
    return folder / "m.onnx", model, report


def test_int8_weights_are_the_merged_ones_within_half_a_step(int8):
    path, model, report = int8
    merged = copies_of(model, "test").merged
    found = {value.name: onnx.numpy_helper.to_array(value) for value in onnx.load(str(path)).graph.initializer}
    low = {name: value for name, value in found.items() if name.endswith("_quantized")}
    assert len(low) == report.details["int8"]["int8"] == 3
    for weight in (merged.first.weight, merged.second.weight, merged.head.weight):
        exact = weight.detach().numpy().T
        errors = []
        for name, value in low.items():
            if value.shape == exact.shape:
                scale = found[name.replace("_quantized", "_scale")]
                errors.append(np.abs(value.astype(np.float64) * scale - exact).max() / scale.max())
        assert min(errors) <= 0.501


def test_int8_sums_of_two_products_fit_into_sixteen_bits(int8):
    """As processors without VNNI add them: what saturates there is right elsewhere, and no proof here would tell."""
    path, _, _ = int8
    weights = [v for v in onnx.load(str(path)).graph.initializer if v.name.endswith("_quantized")]
    largest = max(int(np.abs(onnx.numpy_helper.to_array(value).astype(int)).max()) for value in weights)
    assert largest > 60 and 2 * 255 * largest < 2**15


def test_int8_says_what_it_costs(int8):
    path, model, report = int8
    output = report.details["outputs"][0]
    with torch.no_grad():
        expected = model(example(5)).numpy()
    found = run(path, example(5))
    assert 1e-4 < output["relative_error"] < 0.1
    assert np.abs(found - expected).max() <= 2 * output["allowed"]
    assert output["error"] <= 8 * output["lowering"]
    assert report.details["int8"]["float32_max_error"] < 1e-2 * output["error"]
    assert report.details["op_counts"]["MatMulInteger"] == 3
    notes = {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    assert notes["lora2fx.dtype"] == "int8"
    assert json.loads(notes["lora2fx.parity"])["max_error"] == report.details["max_error"]
    assert sorted(file.name for file in path.parent.iterdir()) == ["m.onnx", "m.onnx.report.json"]


def test_int8_weights_may_lie_beside_the_file(tmp_path):
    model = network()
    report = export_onnx(model, tmp_path / "m.onnx", (example(),), int8=True, external_data=True)
    with torch.no_grad():
        expected = model(example()).numpy()
    assert np.abs(run(tmp_path / "m.onnx", example()) - expected).max() <= 2 * report.details["outputs"][0]["allowed"]
    assert len(list(tmp_path.glob("m.onnx.*.data"))) == 1


def test_a_quantiser_that_changes_something_else_is_caught(tmp_path, monkeypatch):
    real = onnx_int8.quantise

    def tampered(suffix):
        def quantise(graph, folder, name, external):
            low = real(graph, folder, name, external)
            from onnxscript import ir

            key = next(key for key in low.graph.initializers if key.endswith(suffix))
            value = low.graph.initializers[key]
            array = value.const_value.numpy().copy()
            array.flat[0] += np.asarray(3, array.dtype)
            value.const_value = ir.tensor(array, name=key)
            return low

        return quantise

    from lora2fx.exporters import onnx_tasks

    for suffix, message in (("_quantized", "more than half a step"), (".bias", "changed .*bias")):
        monkeypatch.setattr(onnx_tasks, "quantise", tampered(suffix))
        with pytest.raises(ExportError, match=message):
            export_onnx(network(), tmp_path / "m.onnx", (example(),), int8=True)
    assert not list(tmp_path.iterdir())


def test_nothing_to_quantise_is_told(tmp_path):
    with pytest.raises(ExportError, match="no MatMul with a constant weight"):
        export_onnx(nn.Sequential(nn.Tanh()), tmp_path / "m.onnx", (example(),), int8=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "choose 'float32' or 'float16'"),
        ({"dtype": "float16", "int8": True}, "without dtype='float16'"),
        ({"opset": 11}, "opsets 18 to 25"),
        ({"providers": []}, "leaves nothing to prove the file with"),
    ],
)
def test_contradictions_are_told(tmp_path, options, message):
    with pytest.raises(ExportError, match=message):
        export_onnx(network(), tmp_path / "m.onnx", (example(),), **options)
    assert not list(tmp_path.iterdir())


def test_the_shared_copies_stay_in_float32():
    copies = copies_of(network(), "test")
    lowered = half_copies(copies)
    assert copies.merged.first.weight.dtype == torch.float32
    assert lowered.merged.first.weight.dtype == lowered.changes[0].before.dtype == torch.float16
