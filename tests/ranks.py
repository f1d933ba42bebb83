"""Run a function in several gloo processes, forked from one that has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 100


def worker(rank: int, world: int, folder: Path, task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """One process: what torchrun sets in its environment, a group, the task's result in a file."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/{task.__name__}.store", rank=rank, world_size=world
        )
        torch.save(task(rank, *arguments), folder / f"{task.__name__}.{rank}")
        dist.barrier()  # a process that leaves first takes gloo's threads down with an abort, now and then
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{task.__name__}.{rank}.error").write_text(traceback.format_exc())
        os._exit(1)


def run_ranks(task: Callable[..., Any], folder: Path, *arguments: Any, world: int = 2) -> list[Any]:
    """`task(rank, *arguments)` of every rank; one that fails takes the others with it, and raises."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed_tasks"])
    processes = [context.Process(target=worker, args=(rank, world, folder, task, arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        until = time.monotonic() + SECONDS
        while any(process.is_alive() for process in processes) and time.monotonic() < until:
            if any(process.exitcode for process in processes):
                break
            processes[0].join(0.02)
    finally:
        for process in processes:
            process.kill()
            process.join()
    errors = [file.read_text() for file in sorted(folder.glob(f"{task.__name__}.*.error"))]
    assert not errors, "\n".join(errors)
    assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]
    return [torch.load(folder / f"{task.__name__}.{rank}", weights_only=True) for rank in range(world)]


assert sys.platform != "win32", "forked processes"
