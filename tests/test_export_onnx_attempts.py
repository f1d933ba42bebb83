"""What is tried where torch.export refuses a model as it is."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora2fx
from lora2fx.errors import ExportError
from lora2fx.exporters import export_onnx, onnx_attempts
from lora2fx.exporters.copies import copies_of
from lora2fx.exporters.onnx_attempts import export_both, plans_for
from lora2fx.exporters.onnx_program import name_outputs, with_plain_kernels, without_cache
from tests.exported import adapt
from tests.zoo import ZOO

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


class Recurrent(nn.Module):
    """A loop in Python, which torch.export unrolls, so that its sequence can't vary."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(7, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 4)
        for step in range(x.shape[1]):
            state = self.cell(torch.cat([x[:, step], state], 1)).tanh()
        return self.head(state)


def test_an_unrolled_loop_keeps_a_fixed_sequence_and_says_so(tmp_path):
    model = adapt(Recurrent(), ["head.weight"])
    x = torch.randn(2, 5, 3)
    with pytest.warns(
        lora2fx.Lora2fxWarning, match="sequence can vary in the model and is fixed in the .* graph"
    ) as found:
        report = export_onnx(model, tmp_path / "m.onnx", {"x": x})
    assert found[0].filename == __file__
    assert report.details["dynamic_axes"] == {"x": {"0": "batch"}}
    with pytest.raises(
        ExportError, match=r"can't export Recurrent: .*inferred a static shape|can't export Recurrent: .*conflicts"
    ):
        export_onnx(model, tmp_path / "n.onnx", {"x": x}, dynamic_axes={"x": {0: "batch", 1: "sequence"}})
    assert not (tmp_path / "n.onnx").exists()


class Outside(nn.Module):
    """Reads a child's weight without calling the child."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.child = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x).tanh(), self.child.weight)


def test_an_adapter_that_its_model_never_runs_is_caught(tmp_path):
    adapted = adapt(Outside(), ["first.weight", "child.weight"])
    with pytest.raises(ExportError, match="not compute what the"):
        export_onnx(adapted, tmp_path / "m.onnx", (torch.randn(3, 6),))
    right = adapt(Outside(), ["first.weight", "child.weight"], outside_reads=frozenset({"child.weight"}))
    report = export_onnx(right, tmp_path / "m.onnx", (torch.randn(3, 6),))
    assert report.details["weights"]["changed"] == 2


def refuse(monkeypatch, accepts) -> Counter:
    """Replace the exporter by one that refuses what `accepts` doesn't; counts its calls."""
    calls: Counter = Counter()

    def graphs(copies, plan, opset, dtype):
        calls["all"] += 1
        if not accepts(copies, plan):
            raise ExportError(f"refusal {calls['all']}")
        return "base", "merged"

    monkeypatch.setattr(onnx_attempts, "_graphs", graphs)
    return calls


IDS = {"input_ids": torch.arange(14).reshape(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}


def test_plain_kernels_are_tried_before_sequences_are_fixed(monkeypatch):
    pytest.importorskip("transformers")
    copies = copies_of(adapt(ZOO["bert"].build(), ["classifier.weight"]), "test")
    assert copies.adapted.config._attn_implementation == "sdpa"
    calls = refuse(monkeypatch, lambda copies, plan: copies.merged.config._attn_implementation == "eager")
    found = export_both(copies, plans_for(copies.adapted, IDS, None, None), 20)
    assert calls["all"] == 2
    assert found.switched == ("attn_implementation='eager'",)
    assert copies.base.config._attn_implementation == "eager"
    assert copies.adapted.config._attn_implementation == "sdpa"
    assert set(found.plan.shapes.traced) == {"batch", "sequence"}


def test_the_first_refusal_is_told_when_nothing_helps(monkeypatch):
    pytest.importorskip("transformers")
    copies = copies_of(adapt(ZOO["bert"].build(), ["classifier.weight"]), "test")
    calls = refuse(monkeypatch, lambda copies, plan: False)
    with pytest.raises(ExportError, match="refusal 1"):
        export_both(copies, plans_for(copies.adapted, IDS, None, None), 20)
    assert calls["all"] == 3


def test_given_axes_are_never_given_up(monkeypatch):
    copies = copies_of(adapt(Recurrent(), ["head.weight"]), "test")
    calls = refuse(monkeypatch, lambda copies, plan: False)
    axes = {"x": {0: "batch", 1: "sequence"}}
    with pytest.raises(ExportError, match="refusal 1"):
        export_both(copies, plans_for(copies.adapted, {"x": torch.randn(2, 5, 3)}, axes, None), 20)
    assert calls["all"] == 1


def test_experts_go_to_a_batched_matmul():
    pytest.importorskip("transformers")
    model = ZOO["mixtral"].build()
    assert with_plain_kernels([model]) == ["attn_implementation='eager'", "experts_implementation='batched_mm'"]
    assert with_plain_kernels([model]) == []
    assert with_plain_kernels([nn.Linear(2, 2)]) == []


def test_caches_are_switched_off_in_every_config():
    pytest.importorskip("transformers")
    model = ZOO["t5"].build()
    assert without_cache([model]) == ["config.use_cache=False"]
    assert not any(getattr(m, "config", model.config).use_cache for m in model.modules())
    assert without_cache([model, nn.Linear(2, 2)]) == []


def test_outputs_are_named_by_their_keys():
    x = torch.ones(1)
    assert name_outputs(x, ["x"]) == ["output"]
    assert name_outputs((x, [x, x]), ["x"]) == ["output_0", "output_1", "output_2"]
    assert name_outputs({"logits": x, "x": x, "hidden": (x, x)}, ["x"]) == ["logits", "x_out", "hidden_0", "hidden_1"]
