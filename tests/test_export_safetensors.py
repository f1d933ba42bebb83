"""Merged weights under the model's own keys, for load_state_dict and for from_pretrained."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

import lora2fx
from lora2fx.adapter import Adapter
from lora2fx.errors import AdapterError, ExportError
from lora2fx.exporters import export_safetensors
from lora2fx.exporters import safetensors as module
from lora2fx.exporters.copies import changes_of
from lora2fx.program import program_of
from tests.exported import IN_OUT, adapt, site_of, snapshot
from tests.zoo import ZOO

VIT = ["blocks.0.attention.query.weight", "blocks.1.mlp.3.weight"]


def expected_state(model: nn.Module) -> dict[str, Tensor]:
    """The plain state_dict with every ΔW added in float64 and rounded once."""
    changes = {change.weight: change for change in changes_of(program_of(model, "test"))}
    plain = {name: value for name, value in model.state_dict().items() if "lora2fx_" not in name}
    return {
        name: (value.double() + changes[name].delta()).to(value.dtype) if name in changes else value
        for name, value in plain.items()
    }


def check_state(own: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal but for the last bit of a weight that was added to in float32."""
    torch.testing.assert_close(dict(own), other, rtol=2**-22, atol=2**-24)


def test_the_file_is_the_state_dict_with_updates_added_once(tmp_path):
    model = adapt(ZOO["vit_plain"].build(), VIT)
    before = snapshot(model)
    report = export_safetensors(model, tmp_path / "deep" / "m.safetensors")
    assert snapshot(model) == before
    found = load_file(tmp_path / "deep" / "m.safetensors")
    check_state(found, expected_state(model))
    assert found.keys() == ZOO["vit_plain"].build().state_dict().keys()
    assert report.details["tensors"] == len(found)
    assert [site["weight"] for site in report.sites] == VIT
    with safe_open(tmp_path / "deep" / "m.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "lora2fx": lora2fx.__version__}


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        export_safetensors(ZOO["vit_plain"].build(), tmp_path / "m.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o640


class Tied(nn.Module):
    """A head tied to the embedding, and a buffer that is a part of another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.middle, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.arange(12.0).reshape(3, 4))
        self.register_buffer("row", self.table[1])
        self.register_buffer("turned", self.table.T)


def test_safetensors_loads_what_is_tied(tmp_path):
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embedding.weight

    model, fresh = Small(), Small()
    export_safetensors(model, tmp_path / "m.safetensors")
    assert load_model(fresh, tmp_path / "m.safetensors") == (set(), [])
    assert torch.equal(fresh.head.weight, model.head.weight)


def test_shared_memory_is_stored_once_and_parts_are_stored_whole(tmp_path):
    model = Tied()
    report = export_safetensors(adapt(model, ["middle.weight"]), tmp_path / "m.safetensors")
    assert report.details["shared"] == {"head.weight": "embedding.weight"}
    found = load_file(tmp_path / "m.safetensors")
    assert "head.weight" not in found
    assert torch.equal(found["row"], model.table[1])
    assert torch.equal(found["turned"], model.table.T)
    fresh = Tied()
    assert fresh.load_state_dict(found, strict=False).missing_keys == ["head.weight"]
    wanted = expected_state(model)["middle.weight"]
    torch.testing.assert_close(fresh.middle.weight.detach(), wanted, rtol=2**-22, atol=2**-24)
    assert fresh.head.weight is fresh.embedding.weight


FOLDERS = {
    "bert": ("bert.encoder.layer.0.output.dense.weight",),
    "gpt2": ("transformer.h.0.mlp.c_fc.weight", IN_OUT),
    "t5": ("encoder.block.0.layer.0.SelfAttention.q.weight",),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_loads_with_from_pretrained(tmp_path, name):
    pytest.importorskip("transformers")
    model = ZOO[name].build()
    adapt(model, [site_of(model, *FOLDERS[name])])
    before = snapshot(model)
    for _ in range(2):  # the second over the first
        report = export_safetensors(model, tmp_path / name)
    assert snapshot(model) == before
    assert "model.safetensors" in report.details["files"]
    assert [path.name for path in tmp_path.iterdir()] == [name]
    loaded = type(model).from_pretrained(tmp_path / name).state_dict()
    check_state(loaded, expected_state(model))


def test_a_single_file_loads_with_from_pretrained_beside_its_config(tmp_path):
    pytest.importorskip("transformers")
    model = adapt(ZOO["gpt2"].build(), [])
    model.config.save_pretrained(tmp_path)
    export_safetensors(model, tmp_path / "model.safetensors")
    found = type(model).from_pretrained(tmp_path).state_dict()
    torch.testing.assert_close(dict(found), dict(model.state_dict()), rtol=0, atol=0)


def test_a_folder_needs_a_config_and_no_foreign_files(tmp_path):
    with pytest.raises(ExportError, match=r"ViT is no transformers model.*Name a file that ends in \.safetensors"):
        export_safetensors(ZOO["vit_plain"].build(), tmp_path / "m")
    pytest.importorskip("transformers")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"holds files that no earlier export wrote: notes\.txt"):
        export_safetensors(ZOO["bert"].build(), tmp_path / "m")
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["notes.txt"]


def test_what_does_not_read_back_is_not_written(tmp_path, monkeypatch):
    (tmp_path / "m.safetensors").write_text("older")
    real = module._compare

    def flipped(written, found):
        name = next(iter(found))
        real(written, dict(found) | {name: found[name] + 1})

    monkeypatch.setattr(module, "_compare", flipped)
    with pytest.raises(ExportError, match="does not read back from the file"):
        export_safetensors(adapt(ZOO["vit_plain"].build(), VIT), tmp_path / "m.safetensors")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"m.safetensors": "older"}


def test_bits_are_compared_not_values():
    values = torch.tensor([0.0, float("nan")])
    module._compare({"a": values}, {"a": values.clone()})
    for other in (torch.tensor([-0.0, float("nan")]), values.double(), values[:1]):
        with pytest.raises(ExportError, match="does not read back"):
            module._compare({"a": values}, {"a": other})
    with pytest.raises(ExportError, match="it is missing"):
        module._compare({"a": values}, {})


def test_a_factor_that_is_not_finite_is_refused(tmp_path):
    model = adapt(ZOO["vit_plain"].build(), VIT)
    adapter = next(module for module in model.modules() if isinstance(module, Adapter))
    with torch.no_grad():
        next(adapter.parameters()).fill_(float("inf"))
    before = snapshot(model)
    with pytest.raises(AdapterError, match="NaN or infinity"):
        export_safetensors(model, tmp_path / "m.safetensors")
    assert snapshot(model) == before
    assert not list(tmp_path.iterdir())


def test_the_report_is_plain_json(tmp_path):
    report = export_safetensors(adapt(ZOO["vit_plain"].build(), VIT), tmp_path / "m.safetensors")
    assert json.loads(json.dumps(report.to_dict()))["verify"]["checks"] == ["read back bit for bit"]
