"""How far a run came: read from the device only where something else has written it."""

from __future__ import annotations

import torch

from benchmarks.counting import host_syncs
from lora2fx.training.progress import Clock, Progress, new_counter


def test_what_the_clock_counts_itself_is_not_read_again():
    clock, counters = Clock(), [new_counter(), new_counter()]
    clock.read(counters[0])
    found = host_syncs(lambda: [clock.count(counters, done=1) for _ in range(3)] + [clock.count(counters, skipped=2)])
    assert found.total() == 0
    assert clock.read(counters[0]) == (3, 0, 2)
    assert [counter.tolist() for counter in counters] == [[3, 0, 2], [3, 0, 2]]


def test_what_something_else_writes_or_puts_in_its_place_is_read():
    clock, counter = Clock(), new_counter()
    clock.count([counter], done=1)
    counter.copy_(torch.tensor([7, 9, 1]))
    assert clock.read(counter) == Progress(7, 9, 1)
    assert clock.read(torch.tensor([4, 9, 0])) == Progress(4, 9, 0)
    clock.count([counter], skipped=1)
    assert clock.read(counter) == Progress(7, 9, 2)
