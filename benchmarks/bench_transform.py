"""How long `transform` takes, analysis and verification included, against one forward of the same model.

Process time on one thread, so that other processes hardly count; the models take turns, medians and quartiles. The
first `transform` of a process also imports torch's compiler (about a second), which is not counted here.

python benchmarks/bench_transform.py [--rounds 5] [--write]    # benchmarks/results/transform.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import lora2fx

RESULT = Path(__file__).resolve().parent / "results" / "transform.json"
METHOD = lora2fx.LoRA2(r=8, k=8)


class Block(nn.Module):
    """Two small linears beside a residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, width)"""
        return x + 0.05 * self.down(torch.tanh(self.up(x)))


def bert_base() -> tuple[nn.Module, object]:
    """BERT-base with a classifier, random weights: 74 linears of 85 M parameters."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig()).eval(), None


def many_linears() -> tuple[nn.Module, object]:
    """2000 linears of width 16."""
    return nn.Sequential(*[Block(16) for _ in range(1000)]).eval(), (torch.randn(2, 16),)


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, object]], bool]] = {
    "BERT-base, 74 linears": (bert_base, True),
    "BERT-base, 74 linears, verify=False": (bert_base, False),
    "2000 linears": (many_linears, True),
    "2000 linears, verify=False": (many_linears, False),
}


def timed(call: Callable[[], object]) -> float:
    """Process seconds of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


@torch.no_grad()
def forward_time(model: nn.Module, inputs: object) -> float:
    """Process seconds of one forward on the inputs that `transform` uses, the best of three."""
    from lora2fx.inputs import as_inputs

    given = as_inputs(model, inputs)
    return min(timed(lambda: given.call(model)) for _ in range(3))


def measure(make: Callable[[], tuple[nn.Module, object]], verify: bool) -> dict[str, float]:
    """One round of one case."""
    torch.manual_seed(0)
    model, inputs = make()
    forward = forward_time(model, inputs)
    options = {"example_inputs": inputs, "exclude": ("role:embedding",) if inputs is None else ()}
    seconds = timed(lambda: lora2fx.transform(model, "re:.*", METHOD, verify=verify, seed=0, **options))
    sites = sum(site["rewrite"] is not None for site in lora2fx.report(model).sites)
    return {"seconds": seconds, "forwards": seconds / forward, "sites": sites}


def main() -> None:
    """Run the rounds, print, and write the result where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    lora2fx.transform(nn.Linear(2, 2), "re:.*", METHOD, example_inputs=(torch.ones(2, 2),))
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    for number in range(given.rounds):
        for name in list(CASES)[:: 1 if number % 2 == 0 else -1]:
            rounds[name].append(measure(*CASES[name]))
    cases = {name: summary(found) for name, found in rounds.items()}
    for name, found in cases.items():
        print(
            f"{name:40s} {found['seconds']:6.2f} s  [{found['quartiles'][0]:.2f}, {found['quartiles'][1]:.2f}]"
            f"  {found['forwards']:6.1f} forwards  {found['sites']} sites"
        )
    if given.write:
        RESULT.parent.mkdir(exist_ok=True)
        header = {"date": str(datetime.date.today()), "cpu": cpu(), "torch": torch.__version__, "threads": 1}
        RESULT.write_text(json.dumps(header | {"rounds": given.rounds, "cases": cases}, indent=1) + "\n")


def summary(found: list[dict[str, float]]) -> dict[str, object]:
    """Medians and quartiles of a case's rounds."""
    seconds = sorted(one["seconds"] for one in found)
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {
        "seconds": round(statistics.median(seconds), 3),
        "quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
        "least": round(seconds[0], 3),
        "forwards": round(statistics.median(one["forwards"] for one in found), 1),
        "sites": found[0]["sites"],
    }


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
