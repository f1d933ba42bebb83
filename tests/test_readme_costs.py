"""What the README says a step costs is what the committed results of the benchmarks hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COST = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What it costs")[2].partition("\n## ")[0]
BASE, OURS, LORA, ADALORA = "frozen base", "lora2fx LoRA2", "PEFT LoRA", "PEFT AdaLoRA"


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def row(start):
    """The cells of the one row of the section's tables that begins so, without emphasis."""
    (found,) = re.findall(rf"^\| {re.escape(start)} \|(.*)\|$", COST, re.MULTILINE)
    return [cell.strip().replace("**", "") for cell in found.split("|")]


def with_quartiles(ratios):
    return "{:.2f} [{:.2f}, {:.2f}]".format(*ratios)


def test_the_step():
    ratios = result("step-GEMM-bound")["ratio_to_base"]
    names = (OURS, LORA, ADALORA, "full fine-tuning", "LoRA2, authors' arithmetic")
    assert row("1.00") == [with_quartiles(ratios[name]) for name in names]


@pytest.mark.parametrize(
    ("start", "suffix"),
    [
        ("float32", ""),
        ("bfloat16 autocast", "-autocast"),
        ("a model loaded in bfloat16, adapters in float32", "-bfloat16"),
    ],
)
def test_bytes_and_operations(start, suffix):
    kept, found = result(f"memory{suffix}")["bytes"], result(f"operations{suffix}")
    counts, sites = found["counts"], found["sites"]
    operations = {
        name: (own["forward_backward"] - counts[BASE]["forward_backward"]) / sites for name, own in counts.items()
    }
    assert row(start) == [
        *(f"{kept[name] / kept[BASE]:.2f}" for name in (OURS, LORA)),
        *(f"{operations[name]:.1f}" for name in (OURS, LORA, ADALORA)),
    ]


def test_bytes_with_dropout():
    kept = result("memory-dropout")["bytes"]
    expected = [f"{kept[name] / kept[BASE]:.2f}" for name in (OURS, LORA)]
    assert row("float32, with a dropout of 0.1 before the adapters")[:2] == expected


@pytest.mark.parametrize(
    ("start", "case"),
    [
        ("Mixtral's experts in a loop, 512 tokens", "looped experts, 512 tokens"),
        ("the same by a grouped product (transformers' default)", "grouped experts, 512 tokens"),
        ("grouped, loaded in bfloat16", "grouped experts, 512 tokens, bfloat16"),
        ("Falcon's linear layers, 512 tokens", "Falcon's linear layers, 512 tokens"),
        ("`nn.MultiheadAttention`, 1024 tokens", "torch's attention, 1024 tokens"),
    ],
)
def test_weights_read_by_property(start, case):
    own = result("property")["cases"][case]
    times, kept = own["time"], own["bytes"]
    expected = [with_quartiles(times["LoRA²"]), with_quartiles(times[LORA])]
    assert row(start) == [*expected, f"{kept['LoRA²']:.2f}", f"{kept[LORA]:.2f}"]


@pytest.mark.parametrize(("start", "name"), [("LoRA²", "LoRA²"), ("PEFT's LoRA", LORA)])
def test_decoders(start, name):
    counts = result("fused")["counts"]
    expected = [
        ", ".join(f"{counts[precision][decoder][name]['bytes']:.2f}" for precision in ("float32", "bfloat16"))
        for decoder in ("Phi-3", "GPT-NeoX", "GPT-2", "Llama")
    ]
    assert row(start) == expected
