"""The README's examples run as they stand, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from lora2fx.cli import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def small_bert(*named: Any, num_labels: int) -> nn.Module:
    """In place of the download, the same architecture in small."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=num_labels, **sizes)).eval()


def run_example(code: str, given: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    exec(compile(code, "README.md", "exec"), given)
    return given


def test_there_are_three_examples_of_about_15_lines() -> None:
    assert len(EXAMPLES) == 3
    assert all(len(example.strip().splitlines()) <= 18 for example in EXAMPLES)


def test_the_hugging_face_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", small_bert)
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"input_ids": torch.randint(0, 50, (4, 9), generator=generator), "labels": torch.tensor([0, 1, 0, 1])}
        for _ in range(20)
    ]
    model = run_example(EXAMPLES[0], {"batches": batches}, tmp_path, monkeypatch)["model"]
    base = small_bert(num_labels=2)
    assert type(model) is BertForSequenceClassification
    assert list(model.state_dict()) == list(base.state_dict())
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    read = BertForSequenceClassification.from_pretrained(tmp_path / "out" / "tuned")
    assert torch.equal(read.state_dict()[name], model.state_dict()[name])
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_the_plain_module_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = run_example(EXAMPLES[1], {"__name__": "example"}, tmp_path, monkeypatch)["model"]
    shown = capsys.readouterr().out
    assert "conv.weight" in shown and "mix" in shown
    trained = {name.rpartition(".")[0] for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {"conv.lora2fx_weight", "lora2fx_mix"}


def test_the_comparison_of_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example(EXAMPLES[2], {"__name__": "example"}, tmp_path, monkeypatch)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["LoRA2", "AdaLoRA", "LoRA"]
    assert all(float(line.split()[1]) < 1 for line in shown)


def test_the_numbers_of_architectures_are_those_of_the_table() -> None:
    table = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [a-z0-9_]+ \| (yes|no) \| \d+ \| (\d+)/(\d+) \|", table, re.MULTILINE)
    tuned = sum(of == "yes" for of, *_ in rows)
    right, known = sum(int(a) for _, a, _ in rows), sum(int(b) for *_, b in rows)
    flat = " ".join(README.split())
    assert f"{len(rows)} small models of as many architectures ({tuned} that" in flat
    assert f"{len(rows) - tuned} written down afterwards" in flat
    assert f"Of {known} weights that have a role {right} got it" in flat


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_the_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    help_text = build_parser().format_help()
    assert all(command in help_text for command in re.findall(r"^lora2fx (\w+)", README, re.MULTILINE))
