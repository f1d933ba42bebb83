"""The example of a method of one's own: short, right, and everything works on it that works on ours."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lora2fx
from lora2fx.passes.prune import prune_ranks
from lora2fx.program import program_of
from tests.adapted import adapters_of, linear_site

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "write_a_method.py"
VERA = runpy.run_path(str(EXAMPLE), run_name="example")["VeRA"]


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8)).double()


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def trained(method, steps=12):
    model = base()
    lora2fx.transform(model, ["0", "2", "4"], method, example_inputs=(X,))
    optimizer = torch.optim.AdamW(lora2fx.param_groups(model, 0.05))
    lora2fx.attach(model, optimizer, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        optimizer.step()
    return model


def test_the_method_takes_fewer_than_60_lines():
    method, found, _ = EXAMPLE.read_text().partition('if __name__ == "__main__":')
    assert found
    assert len(method.strip().splitlines()) < 60
    assert "examples/write_a_method.py" in (ROOT / "CONTRIBUTING.md").read_text()


def test_the_script_runs_and_folding_changes_nothing(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    shown = capsys.readouterr().out
    losses = [float(value) for value in re.findall(r"loss (\S+)", shown)]
    assert len(losses) == 5
    assert losses[-1] < 0.2 * losses[0]
    assert losses[-1] <= losses[-2]
    assert "status passed" in shown
    assert "active 64, budget 64" in shown


def test_it_is_the_papers_formula():
    """ΔW = Λ_b B Λ_d A of eq. (2), there with A (r, in) and B (out, r); 0 at the start."""
    adapter = VERA(r=5).adapter(linear_site("layer", 6, 8)).double()
    assert (adapter.weight_delta() == 0).all()
    with torch.no_grad():
        adapter.b.normal_()
        adapter.d.normal_()
    expected = torch.diag(adapter.b) @ adapter.B.T @ torch.diag(adapter.d) @ adapter.A.T
    torch.testing.assert_close(adapter.weight_delta(), expected, rtol=0, atol=1e-12)
    adapter.mask[1] = False
    cut = adapter.d * torch.tensor([1, 0, 1, 1, 1])
    expected = torch.diag(adapter.b) @ adapter.B.T @ torch.diag(cut) @ adapter.A.T
    torch.testing.assert_close(adapter.weight_delta(), expected, rtol=0, atol=1e-12)


def test_frozen_matrices_are_shared_and_neither_trained_nor_saved(tmp_path):
    model = trained(VERA(r=5, target_r=2))
    first, _, last = adapters_of(model)
    assert torch.equal(first.A, last.A) and torch.equal(first.B, last.B)
    assert {name for name, _ in first.named_parameters()} == {"d", "b"}
    lora2fx.save(model, tmp_path)
    names = {name.rpartition(".")[2] for name in load_file(tmp_path / "adapter.safetensors")}
    assert names == {"d", "b", "mask", "keep"}
    again = lora2fx.load(base(), tmp_path, methods=[VERA])
    assert torch.equal(again(X), model(X))


def test_masked_is_pruned_is_folded_and_exported(tmp_path):
    model = trained(VERA(r=5, target_r=2))
    assert sum(int(a.mask.sum()) for a in adapters_of(model)) == 6
    expected = model(X).detach()
    prune_ranks(program_of(model, "test"))
    assert torch.equal(model(X), expected)
    lora2fx.exporters.export_peft(model, tmp_path / "peft", example_inputs=(X,))
    lora2fx.exporters.export_safetensors(model, tmp_path / "model.safetensors")
    merged = base()
    merged.load_state_dict(load_file(tmp_path / "model.safetensors"))
    report = lora2fx.fold(model)
    for candidate in (model, merged):
        torch.testing.assert_close(candidate(X), expected, rtol=0, atol=1e-12)
    assert all(site["rank"] <= site["active"] for site in report.sites)


def test_masks_off_and_unload_are_the_base():
    model, expected = trained(VERA(r=5, target_r=2)), base()(X)
    for adapter in adapters_of(model):
        adapter.mask.fill_(False)
    assert torch.equal(model(X), expected)
    lora2fx.unload(model)
    assert torch.equal(model(X), expected)


def test_its_budget_is_checked_like_ours():
    with pytest.raises(lora2fx.Lora2fxError, match="axis 'rank' is 9 entries in each of 3 adapters"):
        trained(VERA(r=5, target_r=9))
