"""The examples of the exporters: each runs, and what it writes is what it says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def main_of(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="example")["main"]


def test_to_peft_and_back(tmp_path):
    pytest.importorskip("peft")
    ranks, gap = main_of("peft_folder")(tmp_path / "peft", 20)
    assert ranks
    assert set(ranks.values()) <= {1, 2, 3, 4}
    assert gap < 1e-5
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()


def test_merged_weights_are_read_by_transformers(tmp_path):
    assert main_of("merged_safetensors")(tmp_path / "merged", 6) < 1e-5
    assert (tmp_path / "merged" / "config.json").is_file()


def test_a_checkpoint_is_merged_tensor_by_tensor(tmp_path):
    lost, same = main_of("streaming_fold")(tmp_path)
    assert same
    assert lost < 0.05
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
