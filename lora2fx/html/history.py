"""The log of a run as lines over its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LOGGED = "lora2fx/"
"""How the names of the adapters' own numbers start."""
_BUDGET, _MEDIAN = "_budget", "_importance_q50"
Entries = Sequence[Mapping[str, Any]]
Charts = dict[str, dict[str, list[tuple[float, float]]]]


def series(entries: Entries, name: str) -> list[tuple[float, float]]:
    """(step, value) of those entries that have the value."""
    return [(entry["step"], entry[name]) for entry in entries if isinstance(entry.get(name), (int, float))]


def adapter_charts(training: Entries) -> Charts:
    """What each axis keeps and may keep, importance quantiles of what is left, and the penalty, as far as logged."""
    names = dict.fromkeys(name.removeprefix(LOGGED) for entry in training for name in entry if name.startswith(LOGGED))
    charts: Charts = {}
    for axis in (name.removesuffix(_BUDGET) for name in names if name.endswith(_BUDGET)):
        kept, budget = (series(training, f"{LOGGED}{axis}_{kind}") for kind in ("active", "budget"))
        charts[f"Entries of the axis {axis}, all weights"] = {"kept": kept, "budget": budget}
    for axis in (name.removesuffix(_MEDIAN) for name in names if name.endswith(_MEDIAN)):
        charts[f"Importance of what is left of {axis}"] = {
            f"{q}% quantile": series(training, f"{LOGGED}{axis}_importance_q{q}") for q in (10, 50, 90)
        }
    if "penalty" in names:
        charts["Regulariser"] = {"penalty": series(training, f"{LOGGED}penalty")}
    return charts
