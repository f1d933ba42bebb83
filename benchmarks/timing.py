"""Ratios of CPU time that a busy machine can't spoil: all variants by turns in one process, round by round."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

QUIET = 0.03
"""The largest spread of the base's own times (interquartile range over median) at which ratios are published."""


def _once(step: Callable[[], None], repeats: int) -> float:
    before = time.process_time()
    for _ in range(repeats):
        step()
    return (time.process_time() - before) / repeats


def interleaved(steps: Mapping[str, Callable[[], None]], rounds: int, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of a step, by name and round; every other round in reverse order, one thread, after a warm-up."""
    torch.set_num_threads(1)
    for step in steps.values():
        _once(step, max(2, repeats // 2))
    found: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds):
        names = list(steps) if index % 2 == 0 else list(steps)[::-1]
        for name in names:
            found[name].append(_once(steps[name], repeats))
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, first and third quartile."""
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return statistics.median(values), first, third


def spread(values: Sequence[float]) -> float:
    """Interquartile range over median."""
    median, first, third = quartiles(values)
    return (third - first) / median


def ratios(found: Mapping[str, Sequence[float]], base: str) -> dict[str, tuple[float, float, float]]:
    """Of each round's time to the base's of the same round: median and quartiles."""
    return {
        name: quartiles([own / other for own, other in zip(times, found[base], strict=True)])
        for name, times in found.items()
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def circumstances() -> dict[str, Any]:
    """Date, processor and versions, for a file of results."""
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "lora2fx")}
    return {"date": datetime.now(UTC).date().isoformat(), "processor": _processor(), "threads": 1, **packages}
