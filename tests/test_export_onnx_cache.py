"""Decoders with their key–value cache: greedy generation through ONNX Runtime is torch's, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora2fx.errors import ExportError
from lora2fx.exporters import export_onnx
from tests.architectures import adapted
from tests.exported import adapt, snapshot
from tests.zoo import ZOO

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")

PAST = "past_key_values."


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Llama with grouped heads, its attention adapted, exported with its cache."""
    folder = tmp_path_factory.mktemp("cache")
    model, inputs = adapted("llama", ["attention", "ffn.down"])
    with torch.no_grad():  # else a random model says the same token again and again
        for weight in (p for p in model.model.layers.parameters() if p.ndim == 2 and min(p.shape) > 3):
            weight.mul_(8)
    before = snapshot(model)
    report = export_onnx(model, folder / "m.onnx", inputs, kv_cache=True)
    assert snapshot(model) == before
    return model.eval(), folder / "m.onnx", report


def generate(session, ids: np.ndarray, mask: np.ndarray, new: int) -> np.ndarray:
    """Greedy search, the cache fed back, a first call with past length 0."""
    shapes = {v.name: v.shape for v in session.get_inputs()}
    rows = len(ids)
    past = {n: np.zeros((rows, s[1], 0, s[3]), np.float32) for n, s in shapes.items() if n.startswith(PAST)}
    names = [value.name for value in session.get_outputs()]
    tokens, step = [], ids
    for _ in range(new):
        feed = {"input_ids": step, "attention_mask": mask, **past}
        if "position_ids" in shapes:
            feed["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)[:, -step.shape[1] :]
        found = dict(zip(names, session.run(None, feed), strict=True))
        step = found["logits"][:, -1].argmax(-1)[:, None]
        tokens.append(step)
        mask = np.concatenate([mask, np.ones((rows, 1), np.int64)], 1)
        past = {name: found[name.replace(PAST, "present.")] for name in past}
    return np.concatenate(tokens, 1)


@pytest.mark.parametrize("padding", [0, 4], ids=["whole", "padded left"])
def test_greedy_generation_is_torchs_token_by_token(llama, padding):
    model, path, _ = llama
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    # A padding row's logits are arbitrary; its own mask keeps them from the tokens that count.
    with torch.no_grad():
        expected = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[:, 9:]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = generate(session, ids.numpy(), mask.numpy(), 12)
    assert found.tolist() == expected.tolist()
    assert len(np.unique(found)) > 4


def test_names_dimensions_and_cases(llama):
    _, path, report = llama
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = {value.name: value.shape for value in session.get_inputs()}
    assert list(inputs)[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert inputs[f"{PAST}1.value"] == ["batch", 2, "past_sequence", 8]
    assert inputs["attention_mask"] == ["batch", "past_sequence + sequence"]
    outputs = [value.name for value in session.get_outputs()]
    assert outputs == ["logits", *(f"present.{i}.{kind}" for i in range(2) for kind in ("key", "value"))]
    cases = [case["case"] for case in report.details["shapes"]]
    assert {"past_sequence 0", "past_sequence 0, sequence 1", "larger past_sequence", "padded", "batch 1"} <= set(cases)
    assert report.details["weights"]["weights"] == len(report.sites)
    assert "use_cache=True" in report.details["preparation"]


def test_models_without_such_a_cache_are_refused(tmp_path):
    bert, ids = ZOO["bert"].build(), {"input_ids": torch.arange(14).reshape(2, 7)}
    with pytest.raises(ExportError, match="BertForSequenceClassification is no transformers decoder"):
        export_onnx(adapt(bert, ["classifier.weight"]), tmp_path / "m.onnx", ids, kv_cache=True)
    with pytest.raises(ExportError, match="is an encoder–decoder, which is exported without"):
        export_onnx(ZOO["t5"].build(), tmp_path / "m.onnx", kv_cache=True)
    with pytest.raises(ExportError, match="is no transformers decoder whose forward takes"):
        export_onnx(ZOO["mamba"].build(), tmp_path / "m.onnx", ids, kv_cache=True)
    with pytest.raises(ExportError, match="its own dynamic dimensions"):
        export_onnx(ZOO["llama"].build(), tmp_path / "m.onnx", ids, kv_cache=True, dynamic=False)
    embeds = {"inputs_embeds": torch.zeros(2, 7, 32)}
    with pytest.raises(ExportError, match=r"input_ids alone .* and got inputs_embeds"):
        export_onnx(ZOO["llama"].build(), tmp_path / "m.onnx", embeds, kv_cache=True)
    assert not list(tmp_path.iterdir())
