"""Verify a rewrite by running it: the base model where ΔW = 0, the folded model where it is not, and its gradients.

Each in the modes that could make a difference: eval, eval with gradients, train, with one seed. The model is as before
afterwards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lora2fx.adapter import Adapter
from lora2fx.errors import VerifyError
from lora2fx.inputs import Inputs
from lora2fx.passes.checks import Check, Trial, all_checks, shortened
from lora2fx.passes.copying import partial_copy
from lora2fx.passes.install import rewritten_path
from lora2fx.passes.outputs import Reference, reference_outputs
from lora2fx.program import Program

__all__ = ["Reference", "Verification", "reference_outputs", "verify_rewrites"]


@dataclass(frozen=True)
class Verification:
    """What verifying found: `failed` names the adapters whose rewrite does not compute what it must."""

    status: str
    max_error: float | None = None
    checks: tuple[dict[str, Any], ...] = ()
    failed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        found = {"status": self.status, "max_error": self.max_error, "checks": list(self.checks)}
        return found | ({"failed": list(self.failed)} if self.failed else {})


def _starts_at_zero(adapter: Adapter) -> bool:
    """Whether ΔW = 0: one of its factors is 0, or their product in float64 is."""
    with torch.no_grad():
        if not adapter.right().any() or not adapter.rows().any():
            return True
    return not adapter.exact().delta().any()


def _not_zero(program: Program) -> list[str]:
    return [name for name, adapter in program.adapters.items() if not _starts_at_zero(adapter)]


def _culprits(groups: Sequence[tuple[str, ...]], fails: Callable[[Sequence[str]], bool]) -> list[str]:
    """The groups that fail on their own, by halving a failing set; all of it where only together they fail."""
    names = [name for group in groups for name in group]
    if len(groups) == 1:
        return names
    halves = (groups[: len(groups) // 2], groups[len(groups) // 2 :])
    failing = [half for half in halves if fails([name for group in half for name in group])]
    return [name for half in failing for name in _culprits(half, fails)] or names


def _blamed(trial: Trial, checks: Sequence[Check]) -> tuple[str, ...]:
    """The adapters to blame: known from their gradients, or found with only some of the owners rewritten.

    None where even a copy with no owner rewritten fails.
    """
    failing = [check for check in checks if not check.passed]
    if all(check.sites for check in failing):
        return tuple(dict.fromkeys(name for check in failing for name in check.sites))

    def fails(names: Sequence[str]) -> bool:
        part = replace(trial, program=partial_copy(trial.program, names))
        return any(not check.passed for check in all_checks(part))

    if fails(()):
        return ()
    owners: dict[str, list[str]] = defaultdict(list)
    for name, adapter in trial.program.adapters.items():
        owners[rewritten_path(trial.program.root, adapter)].append(name)
    return tuple(_culprits([tuple(names) for names in owners.values()], fails))


def _left_out(trial: Trial) -> list[Check]:
    """What could not be checked, and why."""
    found = [Check("all", mode, True, vacuous=True, note=note) for mode, note in trial.reference.skipped.items()]
    if unfoldable := trial.unfoldable:
        note = f"not compared with a folded copy, since nothing can be added to their weights: {shortened(unfoldable)}"
        found.append(Check("folded", "all", True, vacuous=True, note=note))
    return found


def verify_rewrites(program: Program, inputs: Inputs, reference: Reference) -> Verification:
    """Run the four checks on a program whose ΔW is still 0.

    base: ΔW = 0 gives the base's outputs, bit for bit. folded: random factors give a folded copy's outputs, within
    `TOLERANCE` of their size. gradient: each adapter then gets the gradient that its folded weight's gradient
    gives it, not 0. masked: masks that are all False give the base's outputs again, bit for bit, in eval: adapters and
    their masks know no mode.
    On failure `failed` names the adapters to blame. The model is as before afterwards, also on an error.

    Raises `VerifyError` where the model can't be copied or starts with ΔW ≠ 0.
    """
    if wrong := _not_zero(program):
        raise VerifyError(
            f"{shortened(wrong)}: ΔW is not 0 before training, so the method's adapters would change the model."
            " Start one factor or the gate at 0."
        )
    trial = Trial(program, inputs, reference)
    checks = all_checks(trial)
    known = [check.error for check in checks if check.check == "folded" and check.error is not None]
    passed = all(check.passed for check in checks)
    failed = () if passed else _blamed(trial, checks)
    listed = tuple(check.to_dict() for check in (*checks, *_left_out(trial)))
    return Verification("passed" if passed else "failed", max(known, default=None), listed, failed)
