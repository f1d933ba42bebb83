"""A program put into its model, all or nothing: owners rewritten, the rest frozen, verified, the next rewrite tried."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lora2fx.analysis import ModelAnalysis
from lora2fx.dataflow.preserve import random_states
from lora2fx.errors import RewriteError, VerifyError
from lora2fx.passes.install import restore_owners
from lora2fx.passes.outputs import Reference
from lora2fx.passes.rewrite import plan_rewrite, rewrite_owners
from lora2fx.passes.verify import Verification, verify_rewrites
from lora2fx.program import RECORD, TIED, Program, drop_attribute, keep_attribute

_LOG = logging.getLogger(__name__)


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """On any error the model has its classes, parameters and flags back, and the global generators their states."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    config = getattr(model, "config", None)
    tied = getattr(config, TIED, None)
    owned = [(m, dict(m._parameters)) for m in model.modules() if isinstance(m._parameters, dict)]
    generators = random_states()
    try:
        yield
    except BaseException:
        generators()
        restore_owners(model)
        drop_attribute(model, RECORD)
        for module, parameters in owned:
            module._parameters.update(parameters)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        if tied is not None:
            setattr(config, TIED, tied)
        raise


def install(program: Program, plans: Mapping[str, str]) -> None:
    """Rewrite the owners, leave the record, freeze everything but adapters and the modules to save."""
    rewrite_owners(program, plans)
    keep_attribute(program.root, RECORD, program.record)
    modules = (*program.adapters.values(), *map(program.root.get_submodule, program.record.modules_to_save))
    trained = {parameter for module in modules for parameter in module.parameters() if _may_train(parameter)}
    for parameter in program.root.parameters():
        parameter.requires_grad_(parameter in trained)


def _may_train(parameter: nn.Parameter) -> bool:
    """Whether gradients exist for its dtype; those of a quantised weight don't."""
    return parameter.is_floating_point() or parameter.is_complex()


def _reasons(verification: Verification) -> str:
    failing = (check for check in verification.checks if not check["passed"])
    said = (f"{c['check']} check in {c['mode']} mode: {c['note'] or 'error {error}'.format(**c)}" for c in failing)
    return "; ".join(dict.fromkeys(said))


def _next_rewrite(program: Program, name: str, found: ModelAnalysis, failed: str, verification: Verification) -> str:
    site = program.adapters[name].site
    try:
        return plan_rewrite(program.root, site, found.outside_reads, after=failed)
    except RewriteError as error:
        kinds = {check["check"] for check in verification.checks if not check["passed"]}
        way = "Leave it out with exclude=."
        if kinds == {"masked"}:
            way = f"Let {type(program.adapters[name]).__name__}.gate() multiply by the mask of each of its axes."
        raise VerifyError(
            f"{site.weight}, rewritten as `{failed}`, does not compute what it must ({_reasons(verification)}), and no"
            f" rewrite is left. {way}"
        ) from error


def _of_their_weights(program: Program, failed: Sequence[str]) -> list[str]:
    """The adapters that failed, and those of other columns of their weights: a weight has one rewrite."""
    weights = {program.adapters[name].site.weight for name in failed}
    return [name for name, adapter in program.adapters.items() if adapter.site.weight in weights]


def install_verified(
    program: Program, found: ModelAnalysis, plans: dict[str, str], reference: Reference
) -> Verification:
    """Install and verify a program whose ΔW is 0; a weight that fails goes to its next rewrite until none is left."""
    assert found.inputs is not None
    while True:
        install(program, plans)
        verification = verify_rewrites(program, found.inputs, reference)
        if verification.status == "passed":
            return verification
        if not verification.failed:
            raise VerifyError(
                f"{type(program.root).__name__} with its original forwards does not compute again what it did before"
                f" ({_reasons(verification)}), so that nothing can be verified. Make its forward repeatable, or pass"
                " verify=False."
            )
        restore_owners(program.root)
        for name in _of_their_weights(program, verification.failed):
            failed, plans[name] = plans[name], _next_rewrite(program, name, found, plans[name], verification)
            weight = program.adapters[name].site.weight
            _LOG.info("%s: %s failed (%s); %s is tried", weight, failed, _reasons(verification), plans[name])


def originals(model: nn.Module, paths: Sequence[str]) -> dict[str, torch.Tensor]:
    """Copies of everything in the modules at `paths`, by full name."""
    return {
        f"{path}.{name}": value.detach().clone()
        for path in paths
        for name, value in model.get_submodule(path).state_dict(keep_vars=True).items()
    }
