"""Who is compared on the digits: the scale is 2 (alpha = 2 r) for all, budgets are columns of three weights each."""

from __future__ import annotations

from benchmarks.quality.contestants import Contestant, Ours, Outside
from lora2fx import AdaLoRA, ALoRA, LoRA, LoRA2, SaLoRA, SoRA
from lora2fx.methods.baselines import BitFit, FullFineTuning

STARTS = {1: 3, 4: 8, 8: 12}
"""By budget the columns or ranks that AdaLoRA and LoRA² start from."""


def _budget(columns: int) -> list[Contestant]:
    start = STARTS[columns]
    found: list[Contestant] = [
        Ours(f"LoRA r={columns}", LoRA(r=columns, lora_alpha=2 * columns)),
        Ours(f"AdaLoRA {start}→{columns}", AdaLoRA(r=start, target_r=columns, lora_alpha=2 * start)),
        Ours(
            f"LoRA² {start}→{columns}",
            LoRA2(r=max(8, start), k=start, target_k=columns, lora_alpha=2 * max(8, start)),
        ),
        Outside(f"PEFT LoRA r={columns}", columns),
    ]
    if columns == 1:
        name = f"PEFT AdaLoRA {start}→{columns}"
        found += [Outside(name, columns, start), Outside(f"{name}, no penalty", columns, start, 0.0)]
    return found


_ALL: list[Contestant] = [
    Ours("full", FullFineTuning(scope="targets")),
    Ours("BitFit", BitFit(scope="targets")),
    *_budget(1),
    *_budget(4),
    *_budget(8),
    Ours("SoRA r=3", SoRA(r=3, lora_alpha=6)),
    Ours("SaLoRA r=3, density 1/3", SaLoRA(r=3, target_density=1 / 3, lora_alpha=6)),
    Ours("ALoRA r=1", ALoRA(r=1, max_r=3, lora_alpha=2)),
    Ours("LoRA² published, k=1", LoRA2.paper(r=8, k=1, target_r=4)),
    Ours("LoRA² published, k=8", LoRA2.paper(r=8, k=8, target_r=4)),
    Ours("LoRA² k=8", LoRA2(r=8, k=8)),
]
CONTESTANTS = {contestant.name: contestant for contestant in _ALL}
AGAINST = {
    name: next((f"LoRA r={n}" for n in (4, 8) if name.endswith((f"→{n}", f"={n}"))), "LoRA r=1") for name in CONTESTANTS
} | {"LoRA² k=8": "LoRA² 8→4"}
"""Each is compared with LoRA of as many columns; what is not pruned with the same pruned to half."""
