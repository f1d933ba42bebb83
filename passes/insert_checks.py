"""Verify inserts by running the model: with parameters 0 it is the base, with random ones each gets its gradient."""

from __future__ import annotations

import torch
from torch import nn

from lora2fx.errors import VerifyError
from lora2fx.inputs import Inputs
from lora2fx.passes.copying import base_copy
from lora2fx.passes.outputs import (
    EVAL_GRAD,
    MODES,
    Mode,
    Reference,
    call,
    difference,
    identical,
    observe,
    repeated_outputs,
    running,
)
from lora2fx.passes.probe import draw_like, pull_back
from lora2fx.passes.state import preserved, preserved_values
from lora2fx.program import Program

SIZE = 0.1
"""Of random parameters: large enough to be seen, small enough for outputs to stay sane."""


def _base_check(program: Program, inputs: Inputs, reference: Reference, mode: Mode) -> dict[str, object]:
    found = observe(program.model, inputs, mode)
    gap, passed, noted = difference(found, reference.outputs[mode.name]), True, ""
    if not identical(found, reference.outputs[mode.name]):
        with base_copy(program) as base:
            repeats = repeated_outputs(base, inputs, reference)
        noted = "the base model does not repeat itself bit for bit" if mode.name in repeats.unstable else ""
        passed = bool(noted) or identical(found, repeats.frozen[mode.name])
    return {"check": "base", "mode": mode.name, "passed": passed, "error": gap, "note": noted}


def _unreached(program: Program, inputs: Inputs) -> list[str]:
    leaves = {
        f"{path}.{name}": parameter
        for path, insert in program.inserts.items()
        for name, parameter in insert.named_parameters()
    }
    with running(program.model, EVAL_GRAD):
        gradients = pull_back(call(program.model, inputs), list(leaves.values()))
    pairs = zip(leaves, gradients, strict=True)
    return [name for name, gradient in pairs if gradient is None or not gradient.any()]


@torch.no_grad()
def _fill(parameters: list[nn.Parameter], generator: torch.Generator | None) -> None:
    for parameter in parameters:
        parameter.copy_(torch.zeros_like(parameter) if generator is None else SIZE * draw_like(parameter, generator))


def verify_inserts(program: Program, inputs: Inputs, reference: Reference) -> dict[str, object]:
    """Run both checks; the model is as before afterwards. A report's `verify`.

    base: inserts whose parameters are all 0 give the base's outputs, bit for bit, in eval, eval with gradients and
    train. gradient: with random ones every parameter gets a gradient.
    Raises `VerifyError` where a check fails.
    """
    parameters = [parameter for insert in program.inserts.values() for parameter in insert.parameters()]
    modes = [mode for mode in MODES if mode.name in reference.outputs]
    with preserved(program.model), preserved_values(parameters):
        _fill(parameters, None)
        checks = [_base_check(program, inputs, reference, mode) for mode in modes]
        _fill(parameters, torch.Generator().manual_seed(1))
        unreached = _unreached(program, inputs)
    if wrong := [check for check in checks if not check["passed"]]:
        raise VerifyError(f"inserts that add 0 change the outputs of {type(program.root).__name__}: {wrong}.")
    if unreached:
        raise VerifyError(
            f"{', '.join(unreached[:5])}: no gradient reaches what was inserted there; the example inputs don't take"
            " that path. Leave it out with exclude=, or pass inputs that do."
        )
    gradient = {"check": "gradient", "mode": EVAL_GRAD.name, "passed": True, "error": None, "note": ""}
    return {"status": "passed", "max_error": 0.0, "checks": [*checks, gradient]}
