"""Each example runs on small local data and does what it says; the others have tests of their own."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
ELSEWHERE = {"distributed": "test_distributed_example.py", "write_a_method": "test_write_a_method.py"}


def main_of(name: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="example")["main"]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.utils.data|accelerate")
        warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")
        yield


def test_bert_with_the_trainer(tmp_path):
    assert main_of("bert_trainer")(None, str(tmp_path)) > 0.95


def test_a_causal_language_model_counts(capsys):
    assert main_of("causal_lm")(120)[0].tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13]


def test_a_vision_transformer_is_exported(tmp_path):
    assert main_of("vision_transformer")(tmp_path, 100) > 0.5  # ten classes, half as long as the example
    assert (tmp_path / "vit.onnx").is_file()


def test_whispers_decoder_writes_tones_down():
    assert main_of("whisper")(100) > 0.9


def test_roles_without_names():
    expected = {"a": "key", "b": "query", "c": "value", "d": "output", "e.weight": "ffn.up", "f.weight": "ffn.down"}
    assert main_of("einsum_attention")() == expected


def test_experts_are_merged_into_what_transformers_reads(tmp_path):
    from transformers import MixtralForCausalLM

    before, after = main_of("mixture_of_experts")(tmp_path, 40)
    assert after < 0.95 * before
    base = runpy.run_path(str(EXAMPLES / "mixture_of_experts.py"), run_name="example")["build"]()
    read = MixtralForCausalLM.from_pretrained(tmp_path)
    changed = {n for n, p in read.state_dict().items() if not torch.equal(p, base.state_dict()[n])}
    targets = ("q_proj.weight", "v_proj.weight", "experts.gate_up_proj", "experts.down_proj")
    assert changed
    assert all(name.endswith(targets) for name in changed)  # a site may have lost all its columns


def test_a_unet_learns_to_blur():
    before, after = main_of("unet")(100)
    assert after < 0.1 * before


def test_a_sweep_finds_settings():
    optuna = pytest.importorskip("optuna", reason="the sweep's package is not installed")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = main_of("sweep")(4)
    assert len(study.trials) == 4
    assert study.best_value < 0.5
