"""The output gate measures errors against the adapters' own effect and against rounding."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora2fx.errors import ExportError
from lora2fx.exporters.copies import Copies
from lora2fx.exporters.onnx_proof import largest_difference, outputs_of, prove_outputs
from lora2fx.exporters.shapes import Case


def network(scale: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        model[4].weight.mul_(scale)
    return model


def changed(model: nn.Module, layer: int, size: float, seed: int = 1) -> nn.Module:
    """A copy whose layer has a ΔW of `size` times a fixed direction."""
    other = copy.deepcopy(model)
    weight = other[layer].weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        weight.add_(size * direction)
    return other


def inputs(rows: int) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows))


CASES = [Case("traced", {"input": inputs(3)}), Case("batch 1", {"input": inputs(1)})]


def prove(exported: nn.Module, adapted: nn.Module, base: nn.Module, merged: nn.Module | None = None):
    copies = Copies(adapted, base, adapted if merged is None else merged, (), None)
    return prove_outputs(lambda tensors: outputs_of(exported, tensors), copies, CASES, ["output"])


def test_a_right_export_passes_and_says_what_was_measured():
    base = network()
    adapted = changed(base, 0, 0.01)
    proof = prove(copy.deepcopy(adapted), adapted, base)
    exact = copy.deepcopy(adapted).double()
    with torch.no_grad():
        rows = [case.tensors["input"] for case in CASES]
        noise = max(float((exact(x.double()) - adapted(x)).abs().max()) for x in rows)
        margin = max(float((base(x) - adapted(x)).abs().max()) for x in rows)
    assert proof.max_error == 0.0
    assert proof.margin == margin
    assert noise <= proof.noise <= 4 * noise
    assert not proof.vacuous
    assert [entry["case"] for entry in proof.shapes] == ["traced", "batch 1"]
    assert proof.shapes[1]["inputs"] == {"input": [1, 8]}
    assert proof.noise_source == "float64"


@pytest.mark.parametrize("scale", [1.0, 1e-2], ids=["ordinary", "fresh head"])
def test_a_scale_off_by_one_percent_is_caught(scale):
    base = network(scale)
    adapted, wrong = changed(base, 0, 1e-2), changed(base, 0, 1.01e-2)
    with pytest.raises(ExportError, match=r"at traced, output output is off by .*adapters' effect"):
        prove(wrong, adapted, base)


def test_a_dropped_layer_that_a_usual_tolerance_accepts_is_caught():
    base = network(1e-2)
    both = changed(changed(base, 0, 1e-3), 2, 2e-5)
    dropped = changed(base, 0, 1e-3)
    x = CASES[0].tensors["input"]
    torch.testing.assert_close(dropped(x), both(x), atol=1e-5, rtol=0)
    with pytest.raises(ExportError, match="is off by"):
        prove(dropped, both, base)


def test_a_merge_that_loses_less_than_the_margin_allows_is_caught():
    base = network()
    adapted = changed(changed(base, 0, 0.1), 2, 2e-6)
    lossy = changed(base, 0, 0.1)
    with pytest.raises(ExportError, match="merged weights do not compute what the adapted model does"):
        prove(lossy, adapted, base, merged=lossy)


def test_an_effect_within_rounding_is_vacuous():
    base = network()
    proof = prove(changed(base, 0, 1e-8), changed(base, 0, 1e-8), base)
    assert proof.vacuous


def test_one_bad_value_fails():
    base = network()
    adapted = changed(base, 0, 0.01)
    for bad in (np.nan, np.inf):

        def run(tensors, bad=bad):
            found = outputs_of(adapted, tensors)
            found[0][0, 0] = bad
            return found

        with pytest.raises(ExportError, match="off by inf"):
            prove_outputs(run, Copies(adapted, base, adapted, (), None), CASES, ["output"])


def test_other_shapes_and_counts_are_refused():
    base = network()
    copies = Copies(base, base, base, (), None)
    with pytest.raises(ExportError, match=r"gives output as \(3, 3\) at traced, the model as \(3, 4\)"):
        prove_outputs(lambda t: [outputs_of(base, t)[0][:, :3]], copies, CASES, ["output"])
    with pytest.raises(ExportError, match="gives 2 outputs where the model gives 1"):
        prove_outputs(lambda t: outputs_of(base, t) * 2, copies, CASES, ["output"])


class OnlyFloat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(input.float())
        return y, y.argmax(-1)


def test_without_float64_the_dtype_says_what_rounding_is():
    model = OnlyFloat().eval()
    copies = Copies(model, model, model, (), None)
    proof = prove_outputs(lambda t: outputs_of(model, t), copies, CASES, ["logits", "best"])
    assert "doesn't run in float64 (RuntimeError)" in proof.noise_source
    assert proof.noise > 0
    assert [entry["allowed"] for entry in proof.outputs][1] == 0.0


def test_integers_must_be_equal():
    model = OnlyFloat().eval()

    def run(tensors):
        logits, best = outputs_of(model, tensors)
        return [logits, (best + 1) % 4]

    with pytest.raises(ExportError, match="output best is off by"):
        prove_outputs(run, Copies(model, model, model, (), None), CASES, ["logits", "best"])


def test_infinities_and_nans_in_the_same_place_are_equal():
    values = np.array([1.0, np.inf, -np.inf, np.nan], np.float32)
    assert largest_difference(values, values.copy()) == 0.0
    assert largest_difference(values, np.array([1.0, np.inf, np.inf, np.nan], np.float32)) == np.inf
    assert largest_difference(np.zeros(0, np.float32), np.zeros(0, np.float32)) == 0.0
