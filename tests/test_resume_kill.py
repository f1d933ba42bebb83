"""A training process killed again and again ends in the bits of one that was left alone; its file is always whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lora2fx
from lora2fx.checkpoints import load_checkpoint, save_checkpoint
from lora2fx.errors import FormatError
from tests.kill_run import METHOD, STEPS, make

KILLS = 24


def same(a, b, path=""):
    """Both nests hold the same keys, tensors bit for bit, and values."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for index, (own, other) in enumerate(zip(a, b, strict=True)):
            same(own, other, f"{path}/{index}")
    else:
        assert a == b, path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed processes are forks of one that has imported torch")
def test_killed_at_random_and_resumed_until_it_is_done(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kill_run", str(tmp_path), str(KILLS)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["resumed"]) == KILLS
    assert found["resumed"] == sorted(found["resumed"]), "no checkpoint was lost"
    assert max(found["resumed"]) > METHOD.tinit, "pruning had begun"
    assert found["codes"] == [0, 0]
    assert found["left"] == ["run.pt"]
    interrupted, whole = (torch.load(tmp_path / name / "run.pt", weights_only=True) for name in ("killed", "whole"))
    same(interrupted, whole)
    assert whole["model"]["0.lora2fx_weight.progress"].tolist() == [STEPS, STEPS, 0]
    assert sum(int(whole["model"][f"{i}.lora2fx_weight.column_mask"].sum()) for i in (0, 3)) == 4


def saved(file):
    model, optimizer, schedule = make()
    save_checkpoint(file, model, {"optimizer": optimizer, "schedule": schedule})
    return model, optimizer, schedule


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_only_what_moves_is_in_the_file(tmp_path):
    saved(tmp_path / "new" / "run.pt")
    names = set(torch.load(tmp_path / "new" / "run.pt", weights_only=True)["model"])
    assert "1.mean" in names
    assert {"0.lora2fx_weight.u", "0.lora2fx_weight.mask", "0.lora2fx_weight.lam_sensitivity"} <= names
    assert not names & {"0.weight", "0.bias", "3.weight", "3.bias"}


def test_another_file_model_or_run_is_refused(tmp_path):
    file = tmp_path / "run.pt"
    model, optimizer, schedule = saved(file)
    states = {"optimizer": optimizer, "schedule": schedule}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def refused(match, path=file, into=model, states=states):
        random = torch.get_rng_state()
        with pytest.raises(FormatError, match=match):
            load_checkpoint(path, into, states)
        assert unchanged(model, before)
        assert torch.equal(random, torch.get_rng_state())

    refused("holds the state 'schedule'", states={"optimizer": optimizer})
    refused("lacks the state 'scaler'", states={**states, "scaler": schedule})
    other = lora2fx.transform(nn.Sequential(nn.Linear(6, 8)), ["0"], METHOD, verify=False)
    refused(r"holds the tensor '1\.mean'", into=other)
    wider = make()[0]
    lora2fx.unload(wider)
    lora2fx.transform(wider, ["0", "3"], lora2fx.LoRA2(r=5, k=3, target_r=2, target_k=2), verify=False)
    refused(r"0\.lora2fx_weight\.v is .*\(3, 4\); the model has .*\(3, 5\)", into=wider)
    fewer = torch.optim.AdamW([next(p for p in model.parameters() if p.requires_grad)])
    refused("the saved state 'optimizer' doesn't fit: ValueError", states={**states, "optimizer": fewer})
    whole = file.read_bytes()
    for name, content in {"half": whole[: len(whole) // 2], "noise": b"\x80\x04" * 99, "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        refused("is no checkpoint that can be read", path=tmp_path / name)
    torch.save({"model": {}}, tmp_path / "other.pt")
    refused(r"is no lora2fx checkpoint; lora2fx\.load", path=tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none.pt", model, states)
    load_checkpoint(file, model, states)
    assert not unchanged(model, before)


def test_a_save_that_fails_leaves_the_earlier_file(tmp_path, monkeypatch):
    file = tmp_path / "run.pt"
    model, optimizer, schedule = saved(file)
    before = file.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(file, model, {"optimizer": optimizer, "schedule": schedule})
    assert file.read_bytes() == before
