"""What refusing a file may cost: CPU time and memory, measured around one call."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS, MEGABYTES = 2.0, 64
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _kilobytes(kind: str) -> int:
    return next(int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith(kind + ":"))


def _reset_peak() -> bool:
    """Let the peak of resident memory start anew; only Linux can."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


@contextmanager
def bounded() -> Iterator[None]:
    """Fails where the block took more than 2 s of CPU time, or its resident memory peaked 64 MB above the start's."""
    measured = _reset_peak()
    before = _kilobytes("VmRSS") if measured else 0
    start = time.process_time()
    yield
    assert time.process_time() - start < SECONDS
    assert not measured or (_kilobytes("VmHWM") - before) / 1000 < MEGABYTES
