"""Choose each contestant's rate on held-back training rows, the same for all tasks, then run the test seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.quality.store import Job, Record, read_runs, run_jobs
from benchmarks.quality.text.contestants import ENTRIES, LADDER, tuned
from benchmarks.quality.text.task import Plan, check_precision, run_text
from lora2fx.errors import RunError

TUNING_SEEDS = (100, 101)


def run_job(plan: Plan, job: Job) -> dict[str, Any]:
    """One run, on one thread."""
    torch.set_num_threads(1)
    return run_text(plan, job.task, ENTRIES[job.contestant].contestant, job.rate, job.seed, job.use)


def climb(score: Callable[[float], float], ladder: Sequence[float], start: float) -> float:
    """The best rate: the start and its neighbours are tried, and the next one while the best is the last tried."""
    tried: dict[float, float] = {}
    place = ladder.index(start)
    while True:
        for rate in ladder[max(0, place - 1) : place + 2]:
            if rate not in tried:
                tried[rate] = score(rate)
        best = max(tried, key=lambda rate: (tried[rate], -rate))
        if ladder.index(best) == place:
            return best
        place = ladder.index(best)


@dataclass(frozen=True)
class Comparison:
    """Runs of a plan, kept in `path`: rates chosen on the tasks of `tuning`, `workers` processes."""

    plan: Plan
    tuning: tuple[str, ...]
    path: Path
    workers: int = 1

    def run(self, jobs: Iterable[Job], label: str) -> dict[Job, Record]:
        """The records of `jobs`; those that are missing are run."""
        return run_jobs(jobs, self.path, partial(run_job, self.plan), self.workers, label)

    def held_back_score(self, name: str, rate: float) -> float:
        """The mean over the tuning tasks and seeds."""
        jobs = [Job(task, name, rate, seed, "tune") for seed, task in product(TUNING_SEEDS, self.tuning)]
        scores: list[float] = [record["score"] for record in self.run(jobs, f"{name}, rate {rate:g}").values()]
        return mean(scores)

    def rate_of(self, name: str) -> float:
        """The rate chosen, 0 where there is none to choose."""
        whose = tuned(name)
        start = ENTRIES[whose].rate
        return climb(partial(self.held_back_score, whose), LADDER, start) if isinstance(start, float) else 0.0

    def test(self, names: Sequence[str], seeds: int) -> None:
        """Choose the rates of the named contestants and run their test seeds, seed by seed."""
        rates = {name: self.rate_of(name) for name in names}
        tasks = [source.name for source in self.plan.sources]
        order = product(range(seeds), tasks, names)
        self.run([Job(task, name, rates[name], seed, "test") for seed, task, name in order], ", ".join(names))

    def finished(self) -> list[Record]:
        """The test runs in `path` at the rates that its tuning runs choose; those at rates since given up are left out.

        Raises `RunError` where runs are of other steps or another precision than the plan's, or of two rates and
        nothing says which. Tuning runs may be of another precision: a rate is a rung of a ladder.
        """
        runs = read_runs(self.path)
        self._check_steps(runs.values())
        check_precision((record for job, record in runs.items() if job.use == "test"), self.plan, self.path)
        chosen = self._chosen(runs)
        found = [
            record
            for job, record in runs.items()
            if job.use == "test" and job.rate == chosen.get(tuned(job.contestant), job.rate)
        ]
        self._check_rates(found)
        return found

    def _chosen(self, runs: Mapping[Job, Record]) -> dict[str, float]:
        """By contestant the best of the rates that were run on all tuning tasks and seeds."""
        scores: dict[tuple[str, float], list[float]] = {}
        for job, record in runs.items():
            if job.use == "tune" and job.task in self.tuning and job.seed in TUNING_SEEDS:
                scores.setdefault((job.contestant, job.rate), []).append(record["score"])
        whole = {key: mean(own) for key, own in scores.items() if len(own) == len(self.tuning) * len(TUNING_SEEDS)}
        ordered = sorted(whole, key=lambda key: (whole[key], -key[1]))
        return dict(ordered)

    def _check_steps(self, records: Iterable[Record]) -> None:
        known = {source.name for source in self.plan.sources}
        for task, steps in {(r["task"], r["steps"]) for r in records if r["task"] in known}:
            if steps != self.plan.steps_of(task):
                raise RunError(
                    f"{self.path} holds runs of {steps} steps on {task}, and {self.plan.steps_of(task)} were asked for."
                    " Name another file with --out."
                )

    def _check_rates(self, records: Iterable[Record]) -> None:
        rates: dict[str, float] = {}
        for record in records:
            name = record["contestant"]
            if rates.setdefault(name, record["rate"]) != record["rate"]:
                raise RunError(
                    f"{self.path} holds runs of {name} at the rates {rates[name]:g} and {record['rate']:g}, chosen on"
                    " other tasks. Name another file with --out."
                )
