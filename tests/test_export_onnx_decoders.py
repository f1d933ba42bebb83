"""Decoders through ONNX Runtime: GPT-2, Llama, T5; and what an LSTM can't have."""

from __future__ import annotations

import pytest

import lora2fx
from lora2fx.exporters import export_onnx
from tests.architectures import CASES, adapted, export
from tests.exported import adapt
from tests.zoo import ZOO

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def test_gpt2_with_slices_of_its_fused_weight(tmp_path):
    pytest.importorskip("transformers")
    report, model, _ = export("gpt2", ["query", "value", "ffn"], tmp_path)
    assert [case["case"] for case in report.details["shapes"]] == [*CASES, "padded"]
    assert "config.use_cache=False" in report.details["preparation"]
    assert model.config.use_cache
    assert len(report.sites) == report.details["weights"]["weights"] + 2


def test_llama(tmp_path):
    pytest.importorskip("transformers")
    report, _, _ = export("llama", ["attention", "ffn"], tmp_path)
    assert report.details["dynamic_axes"]["input_ids"] == {0: "batch", 1: "sequence"}


def test_t5_goes_to_eager_attention(tmp_path):
    pytest.importorskip("transformers")
    report, model, _ = export("t5", ["query", "value", "ffn"], tmp_path)
    assert report.details["dynamic_axes"]["decoder_input_ids"] == {0: "batch", 1: "decoder_sequence"}
    assert "attn_implementation='eager'" in report.details["preparation"]
    assert model.config._attn_implementation == "sdpa"
    names = [case["case"] for case in report.details["shapes"]]
    assert {"decoder_sequence 1", "larger decoder_sequence"} < set(names)


def test_an_lstm_keeps_a_fixed_sequence_and_says_so(tmp_path):
    model = adapt(ZOO["lstm"].build(), ["head.weight"])
    with pytest.warns(lora2fx.Lora2fxWarning, match="sequence can vary in the model and is fixed in the exported"):
        report = export_onnx(model, tmp_path / "m.onnx", ZOO["lstm"].example_inputs)
    assert report.details["dynamic_axes"] == {"ids": {0: "batch"}}
    with pytest.raises(lora2fx.Lora2fxError, match="can't export Recurrent"):
        export_onnx(
            model, tmp_path / "n.onnx", ZOO["lstm"].example_inputs, dynamic_axes={"ids": {0: "batch", 1: "sequence"}}
        )


def test_an_adapter_that_its_model_never_reads_is_caught(tmp_path):
    """Mamba reads dt_proj.weight without calling dt_proj: adapting the call alone would lose the adapter."""
    pytest.importorskip("transformers")
    model, _ = adapted("gpt2", ["ffn"])
    assert model is not None
    mamba = ZOO["mamba"].build()
    name = next(name for name, _ in mamba.named_parameters() if name.endswith("dt_proj.weight"))
    with pytest.raises(lora2fx.Lora2fxError, match=r"(does|do) not compute what the adapted model does"):
        export_onnx(
            adapt(mamba, [name]),
            tmp_path / "m.onnx",
            dynamic_axes={"input_ids": {0: "batch"}, "attention_mask": {0: "batch"}},
        )
