"""Encoders through ONNX Runtime: BERT, a plain ViT, a padded nn.TransformerEncoder, an einsum model."""

from __future__ import annotations

import pytest
import torch

from tests.architectures import CASES, export

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def test_bert(tmp_path):
    pytest.importorskip("transformers")
    report, _, _ = export("bert", ["attention", "ffn"], tmp_path)
    details = report.details
    assert [case["case"] for case in details["shapes"]] == [*CASES, "padded"]
    assert details["output_names"] == ["logits"]
    assert details["weights"]["changed"] == details["weights"]["weights"] - 1


def test_a_plain_vit(tmp_path):
    report, _, _ = export("vit_plain", ["query", "key", "value", "ffn"], tmp_path)
    assert report.details["dynamic_axes"] == {"images": {"0": "batch"}}


def test_a_padded_transformer_encoder(tmp_path):
    """Its fused fast path, which would move the reference, is off while exporting and on again afterwards."""
    assert torch.backends.mha.get_fastpath_enabled()
    report, _, _ = export("encoder", ["query", "value", "output", "ffn"], tmp_path)
    assert torch.backends.mha.get_fastpath_enabled()
    assert [case["case"] for case in report.details["shapes"]] == CASES
    assert "fused encoder path off" in report.details["preparation"]


def test_einsum_on_raw_parameters(tmp_path):
    report, _, _ = export("einsum", ["attention", "ffn"], tmp_path)
    assert {len(site["shape"]) for site in report.sites} == {2, 3}
