"""What `property` costs, where the forward can't be rewritten and reads of the weight give W + ΔW: experts, attention.

Forward and backward without the optimizer, and the bytes kept between them (exact), of the frozen model, of ours, and
of PEFT's LoRA, which makes W + ΔW whole. Small Mixtrals with experts in a loop and by a grouped product, a Falcon, in
whose linear layers are branches, and torch's own attention. CPU time of one thread, all variants by turns, medians and
quartiles.

python benchmarks/bench_property.py [--rounds 9]        # writes results/property.json
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from counting import saved_bytes, state_of
from timing import circumstances, interleaved, ratios, spread
from torch import Tensor, nn
from transformers import FalconConfig, FalconModel, MixtralConfig, MixtralModel
from transformers.utils import logging

import lora2fx

RESULTS = Path(__file__).parent / "results"
BASE, RANK, WIDTH = "frozen", 8, 256


@dataclass(frozen=True)
class Case:
    """A model (tokens embedded in, hidden states out), a batch's rows and tokens, and what is adapted.

    `theirs` are the same weights as PEFT is told them.
    """

    make: Callable[[], nn.Module]
    rows: int
    tokens: int
    targets: Sequence[str]
    theirs: dict[str, Any]
    dtype: torch.dtype = torch.float32


class Decoder(nn.Module):
    """A transformers model without its embedding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, width)"""
        hidden: Tensor = self.model(inputs_embeds=x, use_cache=False).last_hidden_state
        return hidden


class Attention(nn.Module):
    """torch's attention of a sequence with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, tokens, width)"""
        mixed: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return mixed


def mixtral(implementation: str) -> nn.Module:
    """Two layers of eight experts 256 x 512, two of them for each token."""
    config = MixtralConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    config._experts_implementation = implementation
    return Decoder(MixtralModel(config))


def falcon() -> nn.Module:
    """Two layers, 256 wide."""
    config = FalconConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, vocab_size=256, attention_dropout=0.0
    )
    return Decoder(FalconModel(config))


FFN = ("role:ffn",)
EXPERTS: dict[str, Any] = {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": []}
LINEARS: dict[str, Any] = {"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]}
ATTENTION: dict[str, Any] = {"target_modules": ["attention"]}
CASES = {
    "looped experts, 512 tokens": Case(partial(mixtral, "eager"), 4, 128, FFN, EXPERTS),
    "looped experts, 128 tokens": Case(partial(mixtral, "eager"), 4, 32, FFN, EXPERTS),
    "grouped experts, 512 tokens": Case(partial(mixtral, "grouped_mm"), 4, 128, FFN, EXPERTS),
    "grouped experts, 128 tokens": Case(partial(mixtral, "grouped_mm"), 4, 32, FFN, EXPERTS),
    "grouped experts, 512 tokens, bfloat16": Case(partial(mixtral, "grouped_mm"), 4, 128, FFN, EXPERTS, torch.bfloat16),
    "Falcon's linear layers, 512 tokens": Case(falcon, 4, 128, ("attention", "ffn"), LINEARS),
    "torch's attention, 1024 tokens": Case(Attention, 16, 64, ("re:.*",), ATTENTION),
}


def frozen(case: Case) -> nn.Module:
    """The case's model, the same for every variant."""
    torch.manual_seed(0)
    return case.make().to(case.dtype).requires_grad_(False).train()


def activation(case: Case) -> Tensor:
    """A batch that needs a gradient, as in the middle of a network."""
    x = torch.randn(case.rows, case.tokens, WIDTH, generator=torch.Generator().manual_seed(1))
    return x.to(case.dtype).requires_grad_()


def ours(case: Case, method: lora2fx.LoRA | lora2fx.LoRA2) -> nn.Module:
    """Adapted by lora2fx."""
    adapted = frozen(case)
    lora2fx.transform(adapted, list(case.targets), method, example_inputs=(activation(case).detach(),), seed=0)
    return adapted


def theirs(case: Case) -> nn.Module:
    """Adapted by PEFT."""
    wrapped: nn.Module = peft.get_peft_model(frozen(case), peft.LoraConfig(r=RANK, **case.theirs))
    return wrapped


def variants(case: Case) -> dict[str, nn.Module]:
    """By name."""
    return {
        BASE: frozen(case),
        "LoRA²": ours(case, lora2fx.LoRA2(r=RANK, k=RANK)),
        "LoRA": ours(case, lora2fx.LoRA(r=RANK)),
        "PEFT LoRA": theirs(case),
    }


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Bytes and times of every variant, over those of the frozen model."""
    models, x = variants(case), activation(case)
    kept = {name: saved_bytes(lambda m=m: m(x).square().mean(), state_of(m)) for name, m in models.items()}
    steps = {name: partial(lambda m: m(x).square().mean().backward(), model) for name, model in models.items()}
    times = interleaved(steps, rounds, 1)
    return {
        "bytes": {name: round(own / kept[BASE], 3) for name, own in kept.items()},
        "time": {name: [round(part, 3) for part in own] for name, own in ratios(times, BASE).items()},
        "base_ms": round(1000 * sorted(times[BASE])[rounds // 2], 1),
        "spread": round(spread(times[BASE]), 3),
    }


def main() -> None:
    """Measure every case, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    found = {name: measure(case, rounds) for name, case in CASES.items()}
    names = [name for name in next(iter(found.values()))["time"] if name != BASE]
    print("| | " + " | ".join(f"{name}, time | bytes" for name in names) + " |\n" + "|---" * (2 * len(names) + 1) + "|")
    for case, own in found.items():
        cells = ["{:.2f} [{:.2f}, {:.2f}] | {:.2f}".format(*own["time"][name], own["bytes"][name]) for name in names]
        print(f"| {case} | " + " | ".join(cells) + " |")
    text = json.dumps({**circumstances(), "rank": RANK, "cases": found}, indent=1, ensure_ascii=False)
    (RESULTS / "property.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
