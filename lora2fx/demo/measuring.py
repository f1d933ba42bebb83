"""How far two models' outputs are apart, and how long each takes, measured side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

from torch import Tensor

Call = Callable[[Tensor], Tensor]


def differences(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """(largest absolute difference, share of equal classes) of two tensors of logits (batch, classes)."""
    error = float((got.double() - expected.double()).abs().max())
    return error, float((got.argmax(1) == expected.argmax(1)).double().mean())


def _milliseconds(call: Call, images: Tensor) -> float:
    start = time.perf_counter()
    call(images)
    return 1e3 * (time.perf_counter() - start)


def latencies(calls: Mapping[str, Call], images: Tensor, rounds: int) -> dict[str, float]:
    """Each call's median milliseconds over `rounds`; the calls take turns, forwards and backwards."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        _milliseconds(call, images)
    for turn in range(rounds):
        order = list(calls)[:: 1 if turn % 2 == 0 else -1]
        for name in order:
            times[name].append(_milliseconds(calls[name], images))
    return {name: median(values) for name, values in times.items()}
