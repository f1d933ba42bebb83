"""Install a baseline: the model's own parameters that it trains, and the modules that it puts behind sites."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora2fx.inputs import Inputs
from lora2fx.insert import Insert
from lora2fx.passes.insert_checks import verify_inserts
from lora2fx.passes.inserting import install_inserts
from lora2fx.passes.outputs import Reference
from lora2fx.passes.rewrite import child_name
from lora2fx.program import RECORD, Baseline, Program, keep_attribute
from lora2fx.site import Site


def make_inserts(model: nn.Module, method: Baseline, sites: Sequence[Site]) -> dict[str, Insert]:
    """By module path the inserts for the sites that get one, on the weight's device, float32 or wider."""
    found = {}
    for site in sites:
        insert = method.insert(site)
        if insert is not None:
            weight = model.get_parameter(site.weight)
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            found[f"{site.owner}.{child_name(site)}".lstrip(".")] = insert.to(weight.device, dtype)
    return found


def _state_of(model: nn.Module, trained: Sequence[str]) -> dict[str, Tensor]:
    """Copies of the trained parameters, and of the buffers beside them (a BatchNorm's averages)."""
    owners = {name.rpartition(".")[0] for name in trained}
    kept = {name for name, _ in model.named_buffers() if name.rpartition(".")[0] in owners} | set(trained)
    state = model.state_dict(keep_vars=True)
    return {name: value.detach().clone() for name, value in state.items() if name in kept}


def install_baseline(program: Program, sites: Sequence[Site], outside_reads: Collection[str]) -> Program:
    """The program with its inserts in place, its record on the model, and only what is to be trained trainable.

    Raises `MethodError` (nothing to train) and `RewriteError` (an insert that can't be put behind its site).
    """
    root, record, method = program.root, program.record, program.method
    assert isinstance(method, Baseline)
    program = replace(program, inserts=make_inserts(root, method, sites))
    record.trained = method.trained(root, sites)
    record.originals |= _state_of(root, record.trained)
    install_inserts(program, outside_reads)
    keep_attribute(root, RECORD, record)
    modules = (*program.inserts.values(), *map(root.get_submodule, record.modules_to_save))
    wanted = {p for module in modules for p in module.parameters() if p.is_floating_point()}
    wanted |= {root.get_parameter(name) for name in record.trained}
    for parameter in root.parameters():
        parameter.requires_grad_(parameter in wanted)
    return program


def verify_baseline(program: Program, inputs: Inputs | None, reference: Reference | None) -> dict[str, Any] | None:
    """A report's `verify`; None where there are inserts and nothing to run them with."""
    if not program.inserts:
        return {"status": "passed", "max_error": 0.0, "checks": [], "reason": "nothing is rewritten"}
    return None if inputs is None or reference is None else verify_inserts(program, inputs, reference)
