"""Adapters that earlier versions saved load, compute and fold: of every released format, for ever."""

from __future__ import annotations

import json

import pytest
import torch

import lora2fx
from lora2fx.program import program_of
from lora2fx.storage_format import SCHEMA
from lora2fx.storage_method import ADDED, encode_method
from lora2fx.storage_method import METHODS as KNOWN
from tests.golden_adapters import FOLDER, IDS, METHODS, Base

FOLDERS = sorted(path for path in FOLDER.parent.glob("v*/*") if path.is_dir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_an_older_adapter_loads_computes_and_folds(folder):
    expected = torch.tensor(json.loads((folder / "outputs.json").read_text()), dtype=torch.float64)
    model = lora2fx.load(Base(), folder)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), expected, rtol=0, atol=1e-12)
    said = json.loads((folder / "adapter.json").read_text())["method"]
    meant = encode_method(program_of(model, "test").method)
    assert meant["name"] == said["name"]
    assert said["hyperparameters"].items() <= meant["hyperparameters"].items()
    assert [adapter.progress.tolist() for adapter in program_of(model, "test").adapters.values()] == [[9, 9, 1]] * 3
    lora2fx.fold(model, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), expected, rtol=0, atol=1e-12)
    assert list(model.state_dict()) == list(Base().state_dict())


def test_every_method_of_the_present_format_is_there_and_small():
    found = {path.name for path in FOLDERS if path.parent.name == f"v{SCHEMA}"}
    assert found == set(METHODS)
    assert {type(method) for method in METHODS.values()} == set(KNOWN)
    assert sum(file.stat().st_size for folder in FOLDERS for file in folder.iterdir()) < 200_000


def test_a_hyperparameter_that_came_later_may_be_missing_and_means_its_default(tmp_path, monkeypatch):
    """What a file of before looks like to a version that added `lora_dropout`."""
    from lora2fx import storage_method

    found = json.loads((FOLDER / "lora" / "adapter.json").read_text())["method"]
    del found["hyperparameters"]["lora_dropout"]
    with pytest.raises(lora2fx.Lora2fxError, match="takes other hyperparameters than were saved: lora_dropout"):
        storage_method.decode_method(found, KNOWN)
    monkeypatch.setattr(storage_method, "ADDED", {"LoRA": frozenset({"lora_dropout"})})
    assert storage_method.decode_method(found, KNOWN).lora_dropout == 0
    found["hyperparameters"]["surprise"] = 1
    with pytest.raises(lora2fx.Lora2fxError, match="takes other hyperparameters than were saved: surprise"):
        storage_method.decode_method(found, KNOWN)


def test_what_may_be_missing_exists():
    fields = {method.__name__: set(method.__dataclass_fields__) for method in KNOWN}
    assert all(names <= fields[method] for method, names in ADDED.items())
