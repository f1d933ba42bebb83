"""Choose each contestant's rate on held-back training examples, then run the test seeds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.comparing import best_rates
from benchmarks.quality.digits.contestants import CONTESTANTS
from benchmarks.quality.digits.task import run_digits
from benchmarks.quality.store import Job, run_jobs

TASK = "digits"
RATES = (0.01, 0.02, 0.04, 0.08)
TUNING_SEEDS = range(100, 106)


def run_job(job: Job) -> dict[str, Any]:
    """One run, on one thread."""
    torch.set_num_threads(1)
    return run_digits(CONTESTANTS[job.contestant], job.rate, job.seed, job.use)


def choose_and_test(names: Sequence[str], seeds: int, path: Path, workers: int) -> list[dict[str, Any]]:
    """The test runs of the named contestants, each at the rate that its tuning runs chose."""
    tuning = [Job(TASK, name, rate, seed, "tune") for seed, name, rate in product(TUNING_SEEDS, names, RATES)]
    tuned = run_jobs(tuning, path, run_job, workers, "choosing rates")
    rates = best_rates(list(tuned.values()))
    jobs = [Job(TASK, name, rates[TASK, name], seed, "test") for name, seed in product(names, range(seeds))]
    return list(run_jobs(jobs, path, run_job, workers, "testing").values())
