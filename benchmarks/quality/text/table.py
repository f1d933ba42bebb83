"""Test runs as text: a table for each task and one of the mean over tasks, the goals, and ranks layer by weight."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.quality.comparing import compare, paired_interval
from benchmarks.quality.store import Record
from benchmarks.quality.text.contestants import ENTRIES, GOALS
from lora2fx.reports import format_table

AGAINST = {name: entry.against for name, entry in ENTRIES.items()}


def over_tasks(records: Sequence[Record], tasks: Sequence[str]) -> list[Record]:
    """For each contestant and seed that all tasks were run with, the mean of the numbers over the tasks."""
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        groups.setdefault((record["contestant"], record["seed"]), []).append(record)
    return [_mean(own) for own in groups.values() if {record["task"] for record in own} == set(tasks)]


def common(records: Sequence[Record], tasks: Sequence[str]) -> list[str]:
    """The tasks that every contestant was run on."""
    names = {record["contestant"] for record in records}
    return [task for task in tasks if {r["contestant"] for r in records if r["task"] == task} == names]


def _mean(records: Sequence[Record]) -> Record:
    keys = ("score", "seconds", "before", "after", "folded")
    return {**records[0], "task": "mean", **{key: mean(record[key] for record in records) for key in keys}}


def _ordered(records: Sequence[Record]) -> list[Record]:
    return sorted(records, key=lambda record: (list(ENTRIES).index(record["contestant"]), record["seed"]))


def show_all(records: Sequence[Record], tasks: Sequence[str]) -> str:
    """All tables that something is in; means over the tasks that all contestants were run on, and over all."""
    parts = []
    for chosen in dict.fromkeys((tuple(common(records, tasks)), tuple(tasks))):
        whole = over_tasks([record for record in records if record["task"] in chosen], chosen)
        if whole and (len(chosen) > 1 or len(tasks) == 1):
            parts.append(f"Mean over {', '.join(chosen)}\n\n{compare(_ordered(whole), AGAINST)}")
            parts.append(f"Paired differences of the mean, in points\n\n{show_goals(whole)}")
    for task in tasks:
        own = _ordered([record for record in records if record["task"] == task])
        if own:
            parts.append(f"{task} ({own[0]['metric']}, {own[0]['steps']} steps)\n\n{compare(own, AGAINST)}")
    maps = [text for name in ENTRIES if (text := show_ranks([r for r in records if r["contestant"] == name], tasks))]
    if maps:
        parts.append("Ranks of the updates, layer by weight, mean over seeds\n\n" + "\n\n".join(maps))
    return "\n\n".join(parts)


def show_goals(records: Sequence[Record]) -> str:
    """The differences that the benchmark is for, of those that were run with the same seeds."""
    scores: dict[str, dict[int, float]] = {}
    for record in records:
        scores.setdefault(record["contestant"], {})[record["seed"]] = 100 * record["score"]
    rows = []
    for a, b in GOALS:
        seeds = sorted(set(scores.get(a, {})) & set(scores.get(b, {})))
        if seeds:
            difference, half = paired_interval(*([scores[name][seed] for seed in seeds] for name in (a, b)))
            rows.append([a, b, f"{difference:+.2f}", f"± {half:.2f}" if len(seeds) > 1 else "", len(seeds)])
    return format_table(["method", "minus", "difference", "95 %", "seeds"], rows) if rows else ""


def show_ranks(records: Sequence[Record], tasks: Sequence[str]) -> str:
    """One contestant's ranks, tasks side by side; nothing where all are the same."""
    if len({rank for record in records for rank in record["ranks"].values()}) < 2:
        return ""
    cells: dict[str, dict[str, float]] = {}
    layers: dict[str, list[str]] = {}
    for task in tasks:
        found: dict[str, list[int]] = {}
        for record in records:
            for weight, rank in record["ranks"].items() if record["task"] == task else ():
                found.setdefault(weight, []).append(rank)
        for weight, ranks in found.items():
            layer, rest = split_layer(weight)
            cells.setdefault(rest, {})[f"{task} {layer}"] = mean(ranks)
            layers.setdefault(task, [])
            layers[task] += [layer] if layer not in layers[task] else []
    return "\n".join(_map_lines(records[0]["contestant"], cells, layers))


def _map_lines(name: str, cells: Mapping[str, Mapping[str, Any]], layers: Mapping[str, Sequence[str]]) -> list[str]:
    width = max(len(name), *(len(row) for row in cells))
    top = [" ".join(f"{layer:>4}" for layer in own) for own in layers.values()]
    head = [task.ljust(len(line)) for task, line in zip(layers, top, strict=True)]
    lines = ["   ".join([name.ljust(width), *head]).rstrip(), "   ".join([" " * width, *top])]
    for row, ranks in cells.items():
        shown = [" ".join(f"{ranks.get(f'{task} {layer}', 0):4.1f}" for layer in own) for task, own in layers.items()]
        lines.append("   ".join([row.ljust(width), *shown]))
    return lines


def split_layer(weight: str) -> tuple[str, str]:
    """A weight's path as (number of its layer, the rest after it)."""
    found = re.search(r"\.(\d+)\.(.+)\.weight$", weight)
    return (found[1], found[2]) if found else ("", weight.removesuffix(".weight"))
