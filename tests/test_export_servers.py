"""What the servers that read PEFT folders make of ours, by their own scale formulas; none of them is run here.

vLLM (lora/peft_helper.py): one lora_alpha / r for all modules, / √r with rsLoRA; refuses modules_to_save and DoRA.
llama.cpp (llama-adapter.h): lora_alpha / the rank of each module's own lora_B; a lora_alpha of 0 means 1.
diffusers before rank_pattern, and TensorRT-LLM: the rank of the first module for all.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lora2fx
from lora2fx.exporters import export_peft
from lora2fx.program import program_of
from tests.exported import adapt

pytest.importorskip("peft")
RANKS = {"fc.weight": 2, "inner.fc.weight": 4, "head.weight": 1}
SERVED = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's choices for --max-lora-rank."""


class Nested(nn.Module):
    """Three layers, whose ranks will differ."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 8)
        self.inner = nn.Sequential()
        self.inner.add_module("fc", nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.fc(x).tanh()).tanh())


def vllm_scales(config: dict, ranks: list[int]) -> list[float]:
    assert not config["modules_to_save"] and not config["use_dora"]
    root = config["r"] ** 0.5 if config["use_rslora"] else config["r"]
    return [config["lora_alpha"] / root for _ in ranks]


def llama_cpp_scales(config: dict, ranks: list[int]) -> list[float]:
    return [config["lora_alpha"] / rank if config["lora_alpha"] else 1.0 for rank in ranks]


def first_rank_scales(config: dict, ranks: list[int]) -> list[float]:
    return [config["lora_alpha"] / ranks[0] for _ in ranks]


SERVERS = {"vLLM": vllm_scales, "llama.cpp": llama_cpp_scales, "the first rank for all": first_rank_scales}


def parsed(name: str) -> tuple[str, str]:
    """Module path and factor, as vLLM parses a name."""
    parts = name.split(".")
    assert parts[:2] == ["base_model", "model"]
    assert parts[-1] == "weight"
    return ".".join(parts[2:-2]), parts[-2]


def served(folder: Path, server: str) -> dict[str, Tensor]:
    """By module the ΔW (out, in) that the server adds."""
    config = json.loads((folder / "adapter_config.json").read_text())
    factors: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        path, factor = parsed(name)
        factors.setdefault(path, {})[factor] = value.double()
    scales = SERVERS[server](config, [own["lora_B"].shape[1] for own in factors.values()])
    pairs = zip(factors.items(), scales, strict=True)
    return {path: scale * own["lora_B"] @ own["lora_A"] for (path, own), scale in pairs}


def trained() -> tuple[nn.Module, dict[str, Tensor]]:
    """A model adapted with a scale of 7 / r, and by module its ΔW."""
    method = lora2fx.LoRA(r=3, lora_alpha=7, rank_pattern=RANKS)
    model = adapt(Nested(), list(RANKS), method=method)
    program = program_of(model, "test")
    return model, {a.site.owner: a.exact().weight_delta().detach() for a in program.adapters.values()}


def errors(folder: Path, server: str, wanted: dict[str, Tensor]) -> list[float]:
    found = served(folder, server)
    assert set(found) == set(wanted)
    return [float((found[path] - delta).norm() / delta.norm()) for path, delta in wanted.items()]


@pytest.mark.parametrize("server", SERVERS)
def test_a_uniform_folder_is_right_for_every_server(tmp_path, server):
    model, wanted = trained()
    export_peft(model, tmp_path / "a", "uniform")
    assert max(errors(tmp_path / "a", server, wanted)) < 1e-6


@pytest.mark.parametrize("server", ["llama.cpp", "the first rank for all"])
def test_a_compact_one_is_not(tmp_path, server):
    model, wanted = trained()
    export_peft(model, tmp_path / "a", "compact")
    assert max(errors(tmp_path / "a", server, wanted)) > 0.3


def test_the_card_names_a_rank_that_vllm_takes(tmp_path):
    model, _ = trained()
    rank = export_peft(model, tmp_path / "a").details["r"]
    least = min(known for known in SERVED if known >= rank)
    assert f"`--max-lora-rank {least}`" in (tmp_path / "a" / "README.md").read_text()


def test_the_card_says_where_heads_are_not_loaded(tmp_path):
    model = Nested()
    x = torch.randn(4, 6)
    lora2fx.transform(model, ["inner.fc"], lora2fx.LoRA(r=2), modules_to_save=["head"], example_inputs=(x,))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith(".B")).fill_(0.1)
    export_peft(model, tmp_path / "a", example_inputs=(x,))
    assert "vLLM and llama.cpp load LoRA factors only" in (tmp_path / "a" / "README.md").read_text()
    with pytest.raises(AssertionError):
        vllm_scales(json.loads((tmp_path / "a" / "adapter_config.json").read_text()), [2])
