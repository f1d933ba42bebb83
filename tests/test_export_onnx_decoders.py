"""Decoders through ONNX Runtime: GPT-2, Llama, T5."""

from __future__ import annotations

import pytest

from tests.architectures import CASES, export

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")


def test_gpt2_with_slices_of_its_fused_weight(tmp_path):
    report, model, _ = export("gpt2", ["query", "value", "ffn"], tmp_path)
    assert [case["case"] for case in report.details["shapes"]] == [*CASES, "padded"]
    assert "config.use_cache=False" in report.details["preparation"]
    assert model.config.use_cache
    assert len(report.sites) == report.details["weights"]["weights"] + 2


def test_llama(tmp_path):
    report, _, _ = export("llama", ["attention", "ffn"], tmp_path)
    assert report.details["dynamic_axes"]["input_ids"] == {"0": "batch", "1": "sequence"}


def test_t5_has_two_sequences(tmp_path):
    report, _, _ = export("t5", ["query", "value", "ffn"], tmp_path)
    assert report.details["dynamic_axes"]["decoder_input_ids"] == {"0": "batch", "1": "decoder_sequence"}
    names = [case["case"] for case in report.details["shapes"]]
    assert {"decoder_sequence 1", "larger decoder_sequence"} < set(names)
    assert report.details["output_names"] == ["logits", "encoder_last_hidden_state"]
