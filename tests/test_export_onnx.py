"""export_onnx: what it writes, what it refuses, and that it never leaves half of anything."""

from __future__ import annotations

import copy
import hashlib
import json
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lora2fx
from lora2fx.adapter import Adapter
from lora2fx.errors import AdapterError, ExportError, InputsError, ScheduleError
from lora2fx.exporters import export_onnx, onnx_files
from lora2fx.exporters import onnx as onnx_module
from lora2fx.exporters.copies import copies_of
from lora2fx.exporters.onnx import Options, export_copies
from tests.exported import adapt, snapshot

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Network(nn.Module):
    """Two hidden layers of 40×40, above the size up to which the exporter folds transposes away, and a small head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 3)

    def forward(self, x: Tensor, squared: bool = False) -> dict[str, Tensor]:
        hidden = self.second(self.first(x).tanh()).tanh()
        return {"logits": self.head(hidden * hidden if squared else hidden), "hidden": hidden}


WEIGHTS = ["first.weight", "second.weight", "head.weight"]


def network(seed: int = 0) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network()


def example(rows: int = 3) -> Tensor:
    return torch.randn(rows, 40, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export with one site of rank 0, and everything that tests look at."""
    folder = tmp_path_factory.mktemp("onnx")
    model = adapt(network(), WEIGHTS, {"second.weight": 0}).train()
    before = snapshot(model)
    report = export_onnx(model, folder / "m.onnx", {"x": example()})
    return folder, model, before, report


def run(path, x: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy()})


def test_the_file_computes_what_the_adapted_model_does(exported):
    folder, model, _, _ = exported
    model = copy.deepcopy(model).eval().double()
    for rows in (1, 4, 17):
        with torch.no_grad():
            expected = model(example(rows).double())
        for found, name in zip(run(folder / "m.onnx", example(rows)), ("logits", "hidden"), strict=True):
            np.testing.assert_allclose(found, expected[name].numpy(), atol=5e-6, rtol=0)


def test_the_model_is_untouched(exported):
    _, model, before, _ = exported
    assert snapshot(model) == before
    assert model.training


def test_the_report_holds_the_proof(exported):
    folder, _, _, report = exported
    details = report.details
    assert details["weights"] == {"unchanged": 4, "changed": 2, "weights": 3}
    assert details["max_error"] <= 1e-3 * details["margin"]
    assert not details["vacuous"]
    assert [case["case"] for case in details["shapes"]] == ["traced", "batch 1", "larger batch"]
    assert (details["provider"], details["opset"]) == ("CPUExecutionProvider", 20)
    assert details["op_counts"] == {"Gemm": 3, "Tanh": 2}
    assert details["dynamic_axes"] == {"x": {"0": "batch"}}
    assert report.verify["status"] == "passed"
    assert [site["rank"] for site in report.sites] == [3, 0, 3]
    written = json.loads((folder / "m.onnx.report.json").read_text())
    assert written["sha256"] == hashlib.sha256((folder / "m.onnx").read_bytes()).hexdigest()
    assert written["max_error"] == details["max_error"]
    assert "max_error" in str(report)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_the_file_says_what_it_is_and_not_where_it_was_made(exported):
    folder, _, _, report = exported
    model = onnx.load(str(folder / "m.onnx"))
    notes = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(notes["lora2fx.ranks"]) == {"first.weight": 3, "second.weight": 0, "head.weight": 3}
    assert notes["lora2fx.version"] == lora2fx.__version__
    assert json.loads(notes["lora2fx.parity"])["max_error"] == report.details["max_error"]
    assert len(notes["lora2fx.base_sha256"]) == 64
    assert notes["lora2fx.weights_sha256"] == report.details["weights_sha256"]
    assert notes["lora2fx.dtype"] == "float32"
    assert json.loads(notes["lora2fx.versions"])["onnxruntime"] == onnxruntime.__version__
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    content = (folder / "m.onnx").read_bytes()
    assert b".py" not in content
    assert b"/site-packages" not in content


def test_dimensions_and_names_are_those_of_the_model(exported):
    folder, _, _, _ = exported
    graph = onnx.load(str(folder / "m.onnx")).graph
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.input, *graph.output)
    }
    assert shapes == {"x": ["batch", 40], "logits": ["batch", 3], "hidden": ["batch", 40]}


def test_only_the_three_files_are_there(exported):
    folder, _, _, _ = exported
    assert sorted(path.name for path in folder.iterdir()) == ["m.onnx", "m.onnx.report.json"]


def test_weights_go_beside_the_file_when_asked_for_or_many_and_replace_older_ones(tmp_path, monkeypatch):
    model = adapt(network(), WEIGHTS)
    place = tmp_path / "new" / "m.onnx"
    export_onnx(model, place, (example(),), external_data=True)
    first = sorted(path.name for path in place.parent.glob("*.data"))
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    with torch.no_grad():
        next(adapters[0].parameters()).mul_(1.5)
        expected = model(example())["logits"].numpy()
    monkeypatch.setattr(onnx_files, "EXTERNAL_DATA_ABOVE", 10_000)
    export_onnx(model, place, (example(),))
    second = sorted(path.name for path in place.parent.glob("*.data"))
    assert len(first) == len(second) == 1
    assert first != second
    assert place.stat().st_size < 4000 < (place.parent / second[0]).stat().st_size
    np.testing.assert_allclose(run(place, example())[0], expected, atol=5e-6, rtol=0)


def test_constants_fixed_dimensions_and_own_names(tmp_path):
    model = adapt(network(), WEIGHTS)
    report = export_onnx(
        model,
        tmp_path / "m.onnx",
        {"x": example(), "squared": True},
        dynamic=False,
        output_names=["a", "b"],
        metadata=False,
        opset=18,
    )
    assert report.details["constants"] == {"squared": True}
    assert report.details["dynamic_axes"] == {}
    graph = onnx.load(str(tmp_path / "m.onnx"))
    assert [value.name for value in graph.graph.output] == ["a", "b"]
    assert [entry.version for entry in graph.opset_import] == [18]
    assert not graph.metadata_props
    with torch.no_grad():
        expected = model(example(), squared=True)["logits"].numpy()
    np.testing.assert_allclose(run(tmp_path / "m.onnx", example())[0], expected, atol=5e-6, rtol=0)


def test_a_plain_model_is_exported_and_said_to_be_plain(tmp_path):
    report = export_onnx(network(), tmp_path / "m.onnx", (example(),))
    assert "base model (it holds no adapters)" in report.title
    assert report.details["margin"] == 0.0
    assert report.sites == ()


def test_half_precision_is_proven_within_its_own_rounding(tmp_path):
    report = export_onnx(adapt(network().half(), WEIGHTS, size=0.5), tmp_path / "m.onnx", (example().half(),))
    assert 1e-5 < report.details["noise"] < 1e-2
    assert run(tmp_path / "m.onnx", example().half())[0].dtype == np.float16


def tampered(change):
    """An adapted model's copies, the merged one changed."""
    model = adapt(network(), WEIGHTS)
    copies = copies_of(model, "test")
    with torch.no_grad():
        change(copies)
    return copies


def scaled(copies) -> None:
    copies.merged.second.weight.add_(0.01 * copies.changes[1].delta().float())


def dropped(copies) -> None:
    copies.merged.second.weight.copy_(copies.base.second.weight)


def swapped(copies) -> None:
    first, second = (change.delta().float() for change in copies.changes[:2])
    copies.merged.first.weight.copy_(copies.base.first.weight + second)
    copies.merged.second.weight.copy_(copies.base.second.weight + first)


def foreign(copies) -> None:
    copies.merged.head.bias = nn.Parameter(copies.merged.head.bias + 1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scaled, r"changed second.weight \(as .*\) by something else than its ΔW"),
        (dropped, "lacks the update of second.weight"),
        (swapped, "by something else than its ΔW"),
        (foreign, "which is no adapted weight"),
    ],
)
def test_a_wrong_merge_is_caught_by_its_weights(tmp_path, change, message):
    copies = tampered(change)
    (tmp_path / "m.onnx").write_text("older")
    with pytest.raises(ExportError, match=message):
        export_copies(copies, tmp_path / "m.onnx", (example(),), Options())
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_text() == "older"


def test_a_wrong_merge_is_caught_by_its_outputs(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_module, "check_weights", lambda pairs, changes: {})
    with pytest.raises(ExportError, match="does not compute what the model does: at traced, output logits"):
        export_copies(tampered(scaled), tmp_path / "m.onnx", (example(),), Options())
    assert not list(tmp_path.iterdir())


def nan_factor(model) -> None:
    adapter = next(module for module in model.modules() if isinstance(module, Adapter))
    with torch.no_grad():
        next(adapter.parameters())[0, 0] = float("nan")


def unfinished(model) -> None:
    method = lora2fx.LoRA2(r=4, k=4, target_r=1, tinit=1, tfinal=1, deltaT=1)
    lora2fx.transform(model, targets=["first", "second"], method=method, example_inputs=(example(),))


def locked(model) -> None:
    model.lock = threading.Lock()


def keep(model) -> None:
    pass


REFUSALS = {
    "nan": (nan_factor, {}, AdapterError, "not finite|NaN"),
    "lock": (locked, {}, ExportError, "Network can't be copied .*lock"),
    "bfloat16": (lambda model: model.bfloat16(), {}, ExportError, "is in bfloat16"),
    "outputs": (keep, {"output_names": ["one"]}, ExportError, "has 1 names, and the outputs are logits, hidden"),
    "axes": (keep, {"dynamic_axes": {"y": {0: "n"}}}, ExportError, "dynamic_axes names dimension 0 of 'y'"),
    "fixed": (keep, {"dynamic_axes": {"x": {1: "n"}}}, ExportError, "asks for 'n' to vary"),
    "provider": (keep, {"providers": ["NoneExecutionProvider"]}, ExportError, "this onnxruntime knows"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS)
def test_refusals_change_nothing(tmp_path, case):
    prepare, options, error, message = case
    model = adapt(network(), WEIGHTS)
    prepare(model)
    before = snapshot(model) if model.head.weight.dtype == torch.float32 else None
    (tmp_path / "m.onnx").write_text("older")
    with pytest.raises(error, match=message):
        export_onnx(model, tmp_path / "m.onnx", (example(),), **options)
    assert before is None or snapshot(model) == before
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"m.onnx": "older"}


def test_an_unfinished_schedule_says_what_to_do(tmp_path):
    model = network()
    unfinished(model)
    before = snapshot(model)
    with pytest.raises(ScheduleError, match="Finish the run"):
        export_onnx(model, tmp_path / "m.onnx", (example(),))
    assert snapshot(model) == before
    assert not list(tmp_path.iterdir())


def test_inputs_that_do_not_fit_and_folders_are_refused(tmp_path):
    with pytest.raises(InputsError, match="example_inputs"):
        export_onnx(network(), tmp_path / "m.onnx")
    with pytest.raises(InputsError, match="don't fit"):
        export_onnx(network(), tmp_path / "m.onnx", {"z": example()})
    with pytest.raises(ExportError, match="is a folder"):
        export_onnx(network(), tmp_path, (example(),))
    with pytest.raises(ExportError, match="no tensor input"):
        export_onnx(nn.Sequential(), tmp_path / "m.onnx", {"input": None})


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if float(x.sum()) > 0 else x


def test_a_model_that_torch_can_not_export_is_told(tmp_path, capfd):
    with pytest.raises(ExportError, match=r"torch.onnx.export can't export Deciding: GuardOnDataDependentSymNode"):
        export_onnx(Deciding(), tmp_path / "m.onnx", (torch.ones(2, 4),))
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_shells_are_taken_off(tmp_path):
    model = adapt(network(), WEIGHTS)
    report = export_onnx(torch.compile(model, backend="eager"), tmp_path / "m.onnx", (example(),))
    assert report.details["weights"]["changed"] == 3
