"""The zoo itself: each model builds, runs and is described by a truth that fits its weights."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from lora2fx.inputs import as_inputs, flatten_outputs
from lora2fx.site import ROLES
from tests.zoo import ZOO


@pytest.mark.parametrize("name", ZOO)
def test_the_model_runs_and_its_truth_fits(name: str) -> None:
    architecture = ZOO[name]
    model = architecture.build()
    assert not model.training
    shapes = {weight: value.shape for weight, value in model.named_parameters(remove_duplicate=False)}
    assert architecture.undecided <= shapes.keys()
    assert not architecture.undecided & architecture.roles.keys()
    for weight, role in architecture.roles.items():
        assert len(shapes[weight]) >= 2, weight
        roles = role if isinstance(role, Mapping) else {role: ()}
        assert roles.keys() <= set(ROLES)
        if isinstance(role, Mapping):
            columns = sorted(c for spans in role.values() for start, stop in spans for c in range(start, stop))
            assert columns == list(range(len(columns))), f"the roles of {weight} leave a gap or overlap"
            assert len(columns) in shapes[weight]
    with torch.no_grad():
        outputs = flatten_outputs(as_inputs(model, architecture.example_inputs).call(model))
    assert outputs
    assert all(output.isfinite().all() for output in outputs if output.is_floating_point())


@pytest.mark.parametrize("name", ["vit_plain", "bert"])
def test_a_model_is_the_same_each_time_and_draws_nothing(name: str) -> None:
    before = torch.get_rng_state()
    first, second = ZOO[name].build().state_dict(), ZOO[name].build().state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[key], second[key]) for key in first)
