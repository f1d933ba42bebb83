"""Verify a rewrite by running it: the base model where ΔW = 0, the folded model where it is not, and its gradients.

All in the modes eval, eval with gradients, and train with one seed; the model is as before afterwards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any

import torch

from lora2fx.errors import VerifyError
from lora2fx.inputs import Inputs
from lora2fx.passes.copying import Folded, folded_copy, partial_copy
from lora2fx.passes.fold import is_foldable, site_weight
from lora2fx.passes.gradients import compare_gradients
from lora2fx.passes.outputs import MODES, Mode, Outputs, Reference, difference, identical, observe, reference_outputs
from lora2fx.passes.probe import masked, randomise
from lora2fx.passes.state import preserved, preserved_values
from lora2fx.program import Program

__all__ = ["Check", "Reference", "Verification", "reference_outputs", "verify_rewrites"]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""How far an adapted output may be from the folded one, relative to the largest output.

The two add the same numbers in another order, once per site: some 1e2 roundings of the dtype's precision. A wrong
rewrite is off by a fraction of ΔW's own effect, which is of order 0.1; an effect below `VISIBLE` tolerances shows
nothing and is reported as vacuous.
"""
VISIBLE = 5
GRADIENT_SLACK = 1e3
"""A gradient is compared relative to its own size, however little of the site reaches the outputs."""


@dataclass(frozen=True)
class Check:
    """One comparison. `error` and `effect` (what ΔW does to the outputs) are relative; `sites` are those to blame."""

    check: str
    mode: str
    passed: bool
    error: float | None = None
    tolerance: float | None = None
    effect: float | None = None
    vacuous: bool = False
    note: str = ""
    sites: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self) | {"sites": list(self.sites)}


@dataclass(frozen=True)
class Verification:
    """What verifying found: `failed` names the adapters whose rewrite does not compute what it must."""

    status: str
    max_error: float | None = None
    checks: tuple[dict[str, Any], ...] = ()
    failed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"status": self.status, "max_error": self.max_error, "checks": list(self.checks)} | (
            {"failed": list(self.failed)} if self.failed else {}
        )


@dataclass(frozen=True)
class _Trial:
    """A rewritten program with what its base model returned."""

    program: Program
    inputs: Inputs
    reference: Reference
    tolerance: float

    @property
    def modes(self) -> list[Mode]:
        return [mode for mode in MODES if mode.name in self.reference.outputs]

    def foldable(self) -> set[str]:
        adapters = self.program.adapters
        return {name for name, adapter in adapters.items() if is_foldable(site_weight(self.program, adapter))}


def _tolerance(program: Program, reference: Reference) -> float:
    """By the coarsest dtype among the model's parameters and outputs."""
    outputs = [output for found in reference.outputs.values() for output in found]
    dtypes = {tensor.dtype for tensor in (*program.root.parameters(), *outputs) if tensor.is_floating_point()}
    return max((TOLERANCE.get(dtype, 0.0) for dtype in dtypes), default=0.0)


def _failure(check: str, mode: Mode, error: Exception) -> Check:
    return Check(check, mode.name, False, note=f"the rewritten model raises {type(error).__name__}: {error}")


def _against_base(trial: _Trial, check: str) -> list[Check]:
    """ΔW is 0 now: every output is the base's, bit for bit where the base repeats itself."""
    checks = []
    for mode in trial.modes:
        expected = trial.reference.outputs[mode.name]
        try:
            found = observe(trial.program.model, trial.inputs, mode)
        except Exception as error:
            checks.append(_failure(check, mode, error))
            continue
        gap = difference(found, expected)
        if mode.name in trial.reference.unstable:
            note = "the base model does not repeat itself bit for bit"
            checks.append(_compared(check, mode, gap, trial.tolerance, note))
        else:
            checks.append(replace(_compared(check, mode, gap, 0.0), **_bit_equality(trial.reference, mode, found)))
    return checks


def _bit_equality(reference: Reference, mode: Mode, found: Outputs) -> dict[str, Any]:
    """The base's bits as it was given, or as it is with its parameters frozen."""
    if identical(found, reference.outputs[mode.name]):
        return {"passed": True, "note": ""}
    if identical(found, reference.frozen[mode.name]):
        return {"passed": True, "note": "the bits of the frozen base: torch chose a kernel by what needs gradients"}
    return {"passed": False, "note": "not bit-equal"}


def _compared(check: str, mode: Mode, error: float, tolerance: float, note: str = "") -> Check:
    if not isfinite(error):
        return Check(check, mode.name, False, None, tolerance, note="outputs differ in number, shape or finiteness")
    return Check(check, mode.name, error <= tolerance, error, tolerance, note=note)


def _against_folded(trial: _Trial, folded: Folded) -> list[Check]:
    """Factors are random now: every output is the folded model's, and visibly not the base's."""
    checks = []
    for mode in trial.modes:
        try:
            expected = observe(folded.model, trial.inputs, mode)
            found = observe(trial.program.model, trial.inputs, mode)
        except Exception as error:
            checks.append(_failure("folded", mode, error))
            continue
        effect = difference(expected, trial.reference.outputs[mode.name])
        compared = _compared("folded", mode, difference(found, expected), trial.tolerance)
        vacuous = effect < VISIBLE * trial.tolerance
        note = compared.note or ("ΔW hardly changes the outputs, so that they show little" if vacuous else "")
        known = effect if isfinite(effect) else None
        checks.append(replace(compared, effect=known, vacuous=vacuous, note=note))
    return checks


def _gradients(trial: _Trial, folded: Folded) -> Check:
    """Factors are random now: every adapter gets the gradient that the folded weight's gradient gives it."""
    try:
        found = compare_gradients(trial.program, trial.inputs, folded)
    except Exception as error:
        return _failure("gradient", MODES[1], error)
    tolerance = min(0.5, GRADIENT_SLACK * trial.tolerance)
    wrong = tuple(name for name, error in found.errors.items() if not error <= tolerance)
    worst = max(found.errors.values(), default=0.0)
    unseen = f"no finite gradient reaches {', '.join(found.unreached)}, folded or not" if found.unreached else ""
    known = worst if isfinite(worst) else None
    return Check(
        "gradient", MODES[1].name, not wrong, known, tolerance, vacuous=not found.errors, note=unseen, sites=wrong
    )


def _not_zero(program: Program) -> tuple[str, ...]:
    return tuple(name for name, adapter in program.adapters.items() if bool(adapter.exact().delta().any()))


def _all_checks(trial: _Trial) -> list[Check]:
    """The four checks; factors, masks and all else are as before afterwards."""
    adapters = trial.program.adapters
    foldable = trial.foldable()
    generator = torch.Generator().manual_seed(1)
    with ExitStack() as stack:
        stack.enter_context(preserved(trial.program.model))
        stack.enter_context(preserved_values([p for adapter in adapters.values() for p in adapter.parameters()]))
        checks = _against_base(trial, "base")
        for adapter in adapters.values():
            randomise(adapter, site_weight(trial.program, adapter), generator)
        with masked([adapter for name, adapter in adapters.items() if name not in foldable]):
            folded = folded_copy(trial.program)
            checks += [*_against_folded(trial, folded), _gradients(trial, folded)]
        with masked(list(adapters.values())):
            checks += _against_base(trial, "masked")
    return checks


def _culprits(groups: Sequence[tuple[str, ...]], fails: Callable[[Sequence[str]], bool]) -> list[str]:
    """The groups that fail on their own, by halving a failing set; all of it where only together they fail."""
    names = [name for group in groups for name in group]
    if len(groups) == 1:
        return names
    halves = (groups[: len(groups) // 2], groups[len(groups) // 2 :])
    failing = [half for half in halves if fails([name for group in half for name in group])]
    return [name for half in failing for name in _culprits(half, fails)] or names


def _blamed(trial: _Trial, checks: Sequence[Check]) -> tuple[str, ...]:
    """The adapters to blame: known from their gradients, or found with only some of the owners rewritten."""
    failing = [check for check in checks if not check.passed]
    if all(check.sites for check in failing):
        return tuple(dict.fromkeys(name for check in failing for name in check.sites))

    def fails(names: Sequence[str]) -> bool:
        part = replace(trial, program=partial_copy(trial.program, names))
        return any(not check.passed for check in _all_checks(part))

    owners: dict[str, list[str]] = defaultdict(list)
    for name, adapter in trial.program.adapters.items():
        owners[adapter.site.owner].append(name)
    return tuple(_culprits([tuple(names) for names in owners.values()], fails))


def verify_rewrites(program: Program, inputs: Inputs, reference: Reference) -> Verification:
    """Run the four checks on a program whose ΔW is still 0.

    base: ΔW = 0 gives the base's outputs, bit for bit. folded: random factors give a folded copy's outputs, within
    `TOLERANCE` of their size. gradient: each adapter then gets the gradient that its folded weight's gradient
    gives it, not 0. masked: masks that are all False give the base's outputs again, bit for bit.
    On failure `failed` names the adapters to blame. The model is as before afterwards, also on an error.

    Raises `VerifyError` where the model can't be copied or starts with ΔW ≠ 0.
    """
    if wrong := _not_zero(program):
        raise VerifyError(
            f"{', '.join(wrong[:5])}: ΔW is not 0 before training, so the method's adapters would change the model."
            " Start one factor or the gate at 0."
        )
    trial = _Trial(program, inputs, reference, _tolerance(program, reference))
    checks = _all_checks(trial)
    known = [check.error for check in checks if check.check == "folded" and check.error is not None]
    skipped = [Check("all", mode, True, vacuous=True, note=note) for mode, note in reference.skipped.items()]
    unfolded = sorted(set(program.adapters) - trial.foldable())
    if unfolded:
        note = f"not compared with a folded copy, since nothing can be added to their weights: {', '.join(unfolded)}"
        skipped.append(Check("folded", "all", True, vacuous=True, note=note))
    passed = all(check.passed for check in checks)
    failed = () if passed else _blamed(trial, checks)
    listed = tuple(check.to_dict() for check in (*checks, *skipped))
    return Verification("passed" if passed else "failed", max(known, default=None), listed, failed)
