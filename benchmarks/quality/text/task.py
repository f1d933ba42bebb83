"""One run: a contestant trained on a task's rows and judged on those held back, or on the task's dev rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.quality.contestants import Contestant, Setting
from benchmarks.quality.fitting import fit
from benchmarks.quality.store import Record
from benchmarks.quality.text.encoder import HEAD, loss_of, make_model, targets_of
from benchmarks.quality.text.examples import BATCH, Examples, Rows, Source, examples_of
from lora2fx.errors import RunError

Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
HEAD_RATE = 3e-3
HELD_SHARE, HELD_ROWS = 0.25, 1000
"""Of the training rows this share is held back to choose rates, but no more than so many."""
STEPS = {"cola": 400, "mrpc": 200}
USUAL_STEPS = 120
"""Few, so that a run takes a minute or two. CoLA needs more before anything is learned: with 240 some seeds of a method
gave the commonest class alone and others didn't; on MRPC 100 steps of LoRA r=1 hardly beat the head alone."""
FIXED = 32
"""Training rows by which ALoRA scores its ranks."""


@dataclass(frozen=True)
class Plan:
    """The model's folder or hub id, the tasks, and the optimizer steps of a run, None for each task's own.

    In bfloat16 the forward computes where autocast does; what is trained stays float32. It is faster where the
    processor multiplies in it (AVX512-BF16, AMX), and elsewhere ten times slower.
    """

    model: str
    sources: tuple[Source, ...]
    steps: int | None = None
    precision: Precision = "float32"

    @property
    def low_precision(self) -> bool:
        """Whether the forward is in bfloat16."""
        return self.precision == "bfloat16"

    def source(self, name: str) -> Source:
        """The task of that name."""
        return next(source for source in self.sources if source.name == name)

    def steps_of(self, name: str) -> int:
        """Optimizer steps of a run on the task of that name."""
        return self.steps or STEPS.get(name, USUAL_STEPS)


def check_precision(records: Iterable[Record], plan: Plan, path: Path) -> None:
    """Raise `RunError` where runs that are to be compared with the plan's are of the other precision."""
    if odd := {record["precision"] for record in records} - {plan.precision}:
        raise RunError(
            f"{path} holds runs in {odd.pop()}, and {plan.precision} was asked for. Name another file with --out, or"
            " pass --precision."
        )


@torch.no_grad()
def judge(model: nn.Module, rows: Rows, examples: Examples, low_precision: bool) -> dict[str, float]:
    """`score`, the task's metric, and the mean `loss` over all rows."""
    found, labels = [], []
    for batch in rows.in_order():
        labels.append(batch.pop("labels"))
        with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
            found.append(model(**batch).logits)
    logits, wanted = torch.cat(found), torch.cat(labels)
    return {"score": examples.score(logits, wanted), "loss": float(loss_of(logits, wanted))}


def run_text(plan: Plan, task: str, contestant: Contestant, rate: float, seed: int, use: str) -> dict[str, Any]:
    """Adapt the pretrained model. `use="test"` scores it on the dev rows, "tune" on rows held back of train's."""
    examples, steps = examples_of(plan.source(task), plan.model), plan.steps_of(task)
    train, test = examples.train, examples.test
    if use == "tune":
        train, test = train.split(min(HELD_SHARE, HELD_ROWS / len(train)), seed)
    fixed = train.batch(range(min(FIXED, len(train))))

    @torch.no_grad()
    def evaluate(adapted: nn.Module) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.low_precision):
            return -float(adapted(**fixed).loss)

    model = make_model(plan.model, examples.outputs, seed)
    shown = {name: value for name, value in train.batch(range(2)).items() if name != "labels"}
    setting = Setting(targets_of(plan.model), (HEAD,), steps, rate, HEAD_RATE, shown)
    torch.manual_seed(seed)
    trainee = contestant.begin(model, setting, evaluate)
    seconds = fit(trainee, train.shuffled(steps, seed), steps, low_precision=plan.low_precision)
    asked = {"metric": examples.metric, "steps": steps, "batch": BATCH, "precision": plan.precision}
    return judge(trainee.model, test, examples, plan.low_precision) | asked | {"seconds": seconds} | trainee.outcome()
