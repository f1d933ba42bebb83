"""The four checks of a rewritten program, each a run of the model in its modes: base, folded, gradient, masked."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import isfinite
from typing import Any

import torch

from lora2fx.inputs import Inputs
from lora2fx.passes.copying import Folded, base_copy, folded_copy
from lora2fx.passes.gradients import GradientErrors, backward_error, compare_gradients, gradient_noise
from lora2fx.passes.merging import is_foldable, site_weight
from lora2fx.passes.outputs import (
    EVAL_GRAD,
    MODES,
    Mode,
    Outputs,
    Reference,
    Repeats,
    difference,
    identical,
    observe,
    repeated_outputs,
)
from lora2fx.passes.probe import masked, randomise, wobbled
from lora2fx.passes.state import OUT_OF_MEMORY, preserved, preserved_values
from lora2fx.program import Program

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""How far an adapted output may be from the folded one, relative to the largest output.

The two add the same numbers in another order: a few roundings a layer, 2e-7 to 7e-7 in float32 over 24 architectures.
A wrong rewrite is off by a fraction of what ΔW does to the outputs, which is of order 0.1.
"""
GRADIENT_SLACK = 100
"""Gradients of one adapter are compared relative to their own size, which may be the rest of a cancellation."""
NOISE = 8
"""A larger error is allowed up to this multiple of what moving every adapted weight by its last bit does."""
KINK = 0.5
"""A difference above it is no ReLU's that one rounding turned over."""
DRAWS = 3
"""How many random factors are tried where a difference may be such a ReLU's."""
SHOWN = 5
"""Names of adapters that a note lists."""
VISIBLE = 5
"""An effect of ΔW below so many tolerances shows nothing: reported as vacuous."""


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
class Trial:
    """A rewritten program, the inputs to run it on, and what its base model returned."""

    program: Program
    inputs: Inputs
    reference: Reference

    @cached_property
    def repeats(self) -> Repeats:
        """How a copy of the base model repeats itself; only asked for where something is not bit-equal."""
        with base_copy(self.program) as model:
            return repeated_outputs(model, self.inputs, self.reference)

    @property
    def modes(self) -> list[Mode]:
        """The modes that the base model could run in."""
        return [mode for mode in MODES if mode.name in self.reference.outputs]

    @property
    def bit_modes(self) -> list[Mode]:
        """Eval, and train (eval with gradients where it can't train): torch chooses kernels by who needs gradients."""
        plain, *others = self.modes
        return [plain, *others[-1:]]

    @cached_property
    def tolerance(self) -> float:
        """By the coarsest dtype among the model's parameters and outputs."""
        outputs = [output for found in self.reference.outputs.values() for output in found]
        tensors = (*self.program.root.parameters(), *outputs)
        dtypes = {tensor.dtype for tensor in tensors}
        return max([0.0, *(TOLERANCE[dtype] for dtype in dtypes if dtype in TOLERANCE)])

    @cached_property
    def unfoldable(self) -> list[str]:
        """Adapters whose weights nothing can be added to."""
        adapters = self.program.adapters
        return [name for name, adapter in adapters.items() if not is_foldable(site_weight(self.program, adapter))]


def shortened(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _failure(check: str, mode: Mode, error: Exception) -> Check:
    return Check(check, mode.name, False, note=f"the rewritten model raises {type(error).__name__}: {error}")


def _compared(check: str, mode: Mode, error: float, tolerance: float, note: str = "") -> Check:
    if not isfinite(error):
        return Check(check, mode.name, False, None, tolerance, note="outputs differ in number, shape or finiteness")
    return Check(check, mode.name, error <= tolerance, error, tolerance, note=note)


def _with_trained_weights(trial: Trial, mode: Mode) -> Outputs:
    """What the base returns where gradients reach the weights that ΔW is added to, and no others; ΔW is 0 now."""
    folded = folded_copy(trial.program)
    for name, weight in folded.weights.items():
        weight.requires_grad_(trial.program.adapters[name].rewrite != "activation")
    return observe(folded.model, trial.inputs, mode)


def _bit_equality(trial: Trial, mode: Mode, found: Outputs) -> dict[str, Any]:
    """The base's bits as it was given, or as it is with its parameters frozen, all or all but the adapted ones."""
    if identical(found, trial.reference.outputs[mode.name]):
        return {"passed": True, "note": ""}
    if identical(found, trial.repeats.frozen[mode.name]):
        return {"passed": True, "note": "the bits of the frozen base: torch chose a kernel by what needs gradients"}
    if mode.grad and identical(found, _with_trained_weights(trial, mode)):
        return {
            "passed": True,
            "note": "the bits of the base with only the merged weights trained: torch chose a kernel",
        }
    return {"passed": False, "note": "not bit-equal"}


def _against_base(trial: Trial, check: str, mode: Mode) -> Check:
    """ΔW is 0 now: every output is the base's, bit for bit where the base repeats itself."""
    try:
        found = observe(trial.program.model, trial.inputs, mode)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        return _failure(check, mode, error)
    gap = difference(found, trial.reference.outputs[mode.name])
    equal = identical(found, trial.reference.outputs[mode.name])
    if not equal and mode.name in trial.repeats.unstable:
        return _compared(check, mode, gap, trial.tolerance, "the base model does not repeat itself bit for bit")
    return replace(_compared(check, mode, gap, 0.0), **_bit_equality(trial, mode, found))


def _output_noise(trial: Trial, folded: Folded, mode: Mode, expected: Outputs) -> float:
    with wobbled(list(folded.weights.values())):
        return difference(observe(folded.model, trial.inputs, mode), expected)


def _against_folded(trial: Trial, folded: Folded, mode: Mode, known: GradientErrors | None) -> Check:
    """Factors are random now: every output is the folded model's, and visibly not the base's.

    `known` holds the outputs in the mode that gradients were found in.
    """
    try:
        if known is not None and mode == known.mode:
            expected, found = known.expected, known.found
        else:
            expected = observe(folded.model, trial.inputs, mode)
            found = observe(trial.program.model, trial.inputs, mode)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        return _failure("folded", mode, error)
    gap, tolerance = difference(found, expected), trial.tolerance
    if tolerance < gap < float("inf"):
        tolerance = max(tolerance, NOISE * _output_noise(trial, folded, mode, expected))
    compared = _compared("folded", mode, gap, tolerance)
    effect = difference(expected, trial.reference.outputs[mode.name])
    vacuous = effect < VISIBLE * tolerance
    note = compared.note or ("ΔW hardly changes the outputs, so that they show little" if vacuous else "")
    return replace(compared, effect=effect if isfinite(effect) else None, vacuous=vacuous, note=note)


def _checked_gradients(trial: Trial, folded: Folded, found: GradientErrors) -> Check:
    """Factors are random now: every adapter gets the gradient that the folded weight's gradient gives it."""
    tolerance = min(0.5, GRADIENT_SLACK * trial.tolerance)
    wrong = [name for name, error in found.errors.items() if error > tolerance]
    if wrong:  # below 1: an adapter without any gradient is never noise
        noise = gradient_noise(trial.program, trial.inputs, folded, found.mode)
        wrong = [name for name in wrong if found.errors[name] > min(0.9, NOISE * noise[name])]
    worst = max(found.errors.values(), default=0.0)
    known = worst if isfinite(worst) else None
    note = (
        f"no finite gradient above rounding reaches {shortened(found.unreached)}, folded or not"
        if found.unreached
        else ""
    )
    empty = not found.errors
    return Check("gradient", found.mode.name, not wrong, known, tolerance, None, empty, note, tuple(wrong))


def _gradients(trial: Trial, folded: Folded) -> tuple[GradientErrors | None, Check]:
    """In eval mode; in train mode where the model itself can't be differentiated in eval (a cache that it writes)."""
    reason = None
    for mode in (mode for mode in trial.modes if mode.grad):
        try:
            found = compare_gradients(trial.program, trial.inputs, folded, mode)
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            reason = backward_error(trial.inputs, folded, mode)
            if reason is None:
                return None, _failure("gradient", mode, error)
        else:
            return found, _checked_gradients(trial, folded, found)
    note = f"the model itself can't be differentiated: {reason}"
    return None, Check("gradient", EVAL_GRAD.name, True, vacuous=True, note=note)


def _with_factors(trial: Trial, draw: int) -> list[Check]:
    """The checks with visible random factors, the `draw`th ones."""
    adapters, generator = trial.program.adapters, torch.Generator().manual_seed(draw)
    for adapter in adapters.values():
        randomise(adapter, site_weight(trial.program, adapter), generator)
    with masked([adapters[name] for name in trial.unfoldable]):
        folded = folded_copy(trial.program)
        known, gradients = _gradients(trial, folded)
        return [*(_against_folded(trial, folded, mode, known) for mode in trial.modes), gradients]


def _may_be_a_kink(check: Check) -> bool:
    """Whether one rounding that turned a ReLU over may have made the difference: no exception, no other order."""
    return check.passed or (check.error is not None and check.error < KINK)


def all_checks(trial: Trial) -> list[Check]:
    """The four checks of a program whose ΔW is 0; factors, masks and all else are as before afterwards.

    A wrong rewrite differs with any factors, a rounding that turns a ReLU over only with some.
    """
    adapters = trial.program.adapters
    with ExitStack() as stack:
        stack.enter_context(preserved(trial.program.model))
        stack.enter_context(preserved_values([p for adapter in adapters.values() for p in adapter.parameters()]))
        checks = [_against_base(trial, "base", mode) for mode in trial.bit_modes]
        for draw in range(1, DRAWS + 1):
            found = _with_factors(trial, draw)
            if all(check.passed for check in found) or not all(map(_may_be_a_kink, found)):
                break
        with masked(list(adapters.values())):
            found.append(_against_base(trial, "masked", trial.modes[0]))  # no mask knows a mode
    return checks + found
