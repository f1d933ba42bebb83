"""Who is compared on text: the scale is 2 (alpha = 2 r) for all, budgets are columns a weight on average."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.quality.contestants import Contestant, HeadOnly, Ours, Outside
from lora2fx import AdaLoRA, ALoRA, LoRA, LoRA2, SaLoRA, SoRA
from lora2fx.methods.baselines import BitFit, FullFineTuning

LADDER = (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 3e-2)
"""The learning rates that can be chosen."""
STARTS = {1: 3, 2: 4, 8: 12}
"""By budget the columns or ranks that AdaLoRA and LoRA² start from."""


@dataclass(frozen=True)
class Entry:
    """A contestant, its learning rate, whom it is compared with.

    `rate` is where the search for it starts; or the name of the contestant whose rate it takes, the same method with a
    like budget or in another implementation; or None where there is none to choose.
    """

    contestant: Contestant
    rate: float | str | None
    against: str = "LoRA r=1"


def _lora(r: int, rate: float | str) -> Entry:
    return Entry(Ours(f"LoRA r={r}", LoRA(r=r, lora_alpha=2 * r)), rate, f"LoRA r={r}")


def _lora2(columns: int, rate: float | str, start: int | None = None) -> Entry:
    start = start or STARTS[columns]
    r = max(8, start)
    method = LoRA2(r=r, k=start, target_k=columns, lora_alpha=2 * r)
    return Entry(Ours(f"LoRA² {start}→{columns}", method), rate, f"LoRA r={columns}")


def _adalora(columns: int, rate: float | str) -> Entry:
    start = STARTS[columns]
    method = AdaLoRA(r=start, target_r=columns, lora_alpha=2 * start)
    return Entry(Ours(f"AdaLoRA {start}→{columns}", method), rate, f"LoRA r={columns}")


GROUPS: tuple[tuple[Entry, ...], ...] = (
    (Entry(HeadOnly("head only"), None), _lora(1, 2e-3), _lora2(1, 2e-3)),
    (_adalora(1, 5e-3),),
    (Entry(Ours("LoRA²", LoRA2()), 2e-3, "LoRA r=8"), _lora(8, 2e-3)),
    (Entry(Ours("LoRA² k=8", LoRA2(r=8, k=8)), "LoRA²", "LoRA²"),),
    (_lora(2, "LoRA r=1"), _lora2(2, "LoRA² 3→1"), _adalora(2, "AdaLoRA 3→1"), _lora2(8, "LoRA²")),
    (_lora2(2, "LoRA² 3→1", start=3),),
    (
        Entry(Outside("PEFT LoRA r=1", 1), "LoRA r=1"),
        Entry(Outside("PEFT AdaLoRA 3→1", 1, 3), "AdaLoRA 3→1", "AdaLoRA 3→1"),
        Entry(Outside("PEFT AdaLoRA 3→1, no penalty", 1, 3, 0.0), "AdaLoRA 3→1", "AdaLoRA 3→1"),
        Entry(Outside("PEFT LoRA r=8", 8), "LoRA r=8", "LoRA r=8"),
    ),
    (
        Entry(Ours("LoRA² published, k=1", LoRA2.paper(r=8, k=1, target_r=4)), 5e-3),
        Entry(Ours("LoRA² published, k=8", LoRA2.paper(r=8, k=8, target_r=4)), "LoRA² published, k=1", "LoRA r=8"),
    ),
    (
        Entry(Ours("SoRA r=3", SoRA(r=3, lora_alpha=6)), 2e-3),
        Entry(Ours("SaLoRA r=3, density 1/3", SaLoRA(r=3, target_density=1 / 3, lora_alpha=6)), 2e-3),
        Entry(Ours("ALoRA r=1", ALoRA(r=1, max_r=3, lora_alpha=2)), 2e-3),
    ),
    (Entry(Ours("BitFit", BitFit()), 2e-3), Entry(Ours("full", FullFineTuning()), 2e-4)),
)
"""In the order in which they are run, so that what is finished is always a comparison."""
ENTRIES = {entry.contestant.name: entry for group in GROUPS for entry in group}
GOALS = (
    ("LoRA² 3→1", "LoRA r=1"),
    ("LoRA² 3→1", "AdaLoRA 3→1"),
    ("LoRA² 3→1", "PEFT AdaLoRA 3→1"),
    ("LoRA² 3→1", "LoRA² published, k=1"),
    ("LoRA² 4→2", "AdaLoRA 4→2"),
    ("LoRA² 3→2", "AdaLoRA 4→2"),
    ("LoRA² 12→8", "LoRA r=8"),
    ("LoRA²", "LoRA r=8"),
    ("LoRA²", "LoRA² published, k=8"),
    ("LoRA²", "LoRA² k=8"),
    ("LoRA² k=8", "LoRA r=8"),
    ("LoRA r=1", "PEFT LoRA r=1"),
    ("LoRA r=8", "PEFT LoRA r=8"),
    ("AdaLoRA 3→1", "PEFT AdaLoRA 3→1"),
)
"""Pairs whose difference is what the benchmark is for."""


def tuned(name: str) -> str:
    """The contestant whose search decides on the rate of the named one: often itself."""
    rate = ENTRIES[name].rate
    return tuned(rate) if isinstance(rate, str) else name
