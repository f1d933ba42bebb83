"""A run of `lora2fx train` that was stopped, killed or asked for more exports ends as the one that never was."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora2fx.cli import main
from lora2fx.finetuning.folder import complete_checkpoints, drop_incomplete
from tests import finetuned
from tests.loops import forget

STEPS = 20


@pytest.fixture(autouse=True)
def _aside(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    forget()
    yield
    forget()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetuned.bert_folder(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def words(bert, tmp_path) -> list[str]:
    data = finetuned.write_jsonl(tmp_path / "rows.jsonl", finetuned.rated(60))
    return ["train", "--model", str(bert), "--data", str(data), "--cpu", "--batch", "8", "--steps", str(STEPS)]


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while that step is computed."""
    import lora2fx.finetuning.job as job

    make = job.make_trainer

    def stopping(*given):
        trainer = make(*given)

        def interrupt(*_):
            if trainer.state.global_step == step - 1 and not signalled:
                signalled.append(step)
                os.kill(os.getpid(), signal.SIGINT)

        signalled: list[int] = []
        trainer.optimizer.register_step_pre_hook(interrupt)
        return trainer

    monkeypatch.setattr(job, "make_trainer", stopping)


@pytest.mark.parametrize("step", [3, 13])
def test_ctrl_c_keeps_what_was_trained_and_resuming_ends_in_the_same_bits(words, tmp_path, monkeypatch, capsys, step):
    """Before and after pruning began; dropout is on."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main([*words, "--out", str(whole)]) == 0
    forget()
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        assert main([*words, "--out", str(out)]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    said = capsys.readouterr().err
    assert f"kept up to step {step}. Go on with: lora2fx train --out {out} --resume" in said
    found = json.loads((out / "report.json").read_text())
    assert (found["status"], found["step"]) == ("interrupted", step)
    assert f"was stopped: step {step} of {STEPS}" in (out / "report.html").read_text()
    forget()
    assert main([*words, "--out", str(out), "--resume"]) == 0
    own, expected = (load_file(folder / "adapter" / "adapter.safetensors") for folder in (out, whole))
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], value) for name, value in expected.items())
    histories = [json.loads((folder / "report.json").read_text())["history"] for folder in (out, whole)]
    assert histories[0]["validation"] == histories[1]["validation"]
    losses = [[entry["loss"] for entry in history["training"]] for history in histories]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def test_kills_at_random_moments(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.train_kill", str(tmp_path), "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    logs = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["killed"], found["code"]) == (3, 0), logs
    own, expected = (load_file(tmp_path / name / "adapter" / "adapter.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(own[name], value) for name, value in expected.items())
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [
        "adapter",
        "report.html",
        "report.json",
        "run.json",
    ]


def test_a_finished_run_is_asked_for_another_export(words, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*words, "--out", str(out)]) == 0
    before = (out / "adapter" / "adapter.safetensors").read_bytes()
    forget()
    assert main(["train", "--out", str(out), "--resume", "--export", "safetensors"]) == 0
    assert (out / "merged" / "model.safetensors").exists() and (out / "merged" / "tokenizer.json").exists()
    assert (out / "adapter" / "adapter.safetensors").read_bytes() == before
    assert list(json.loads((out / "report.json").read_text())["exports"]) == ["safetensors"]


def test_a_resumed_run_keeps_its_settings_and_its_data(words, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*words, "--out", str(out)]) == 0
    capsys.readouterr()
    forget()
    assert main(["train", "--out", str(out), "--resume", "--lr", "0.5"]) == 2
    assert "this run was started without --lr. A resumed run keeps its settings" in capsys.readouterr().err
    finetuned.write_jsonl(tmp_path / "rows.jsonl", finetuned.rated(60, seed=5))
    forget()
    assert main(["train", "--out", str(out), "--resume"]) == 2
    assert "holds other rows than when" in capsys.readouterr().err


def test_checkpoints_hold_what_is_trained_and_are_readable(words, bert, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop_at(13, monkeypatch)
    assert main([*words, "--out", str(out)]) == 130
    newest, older = complete_checkpoints(out)
    assert (newest.name, older.name) == ("checkpoint-13", "checkpoint-12")
    tensors = load_file(newest / "model.safetensors")
    base = load_file(bert / "model.safetensors")
    assert not any(name.removeprefix("bert.") in base for name in tensors)
    assert any(name.endswith("progress") for name in tensors) and "classifier.weight" in tensors
    umask = os.umask(0)
    os.umask(umask)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in newest.iterdir()}
    assert modes == {0o666 & ~umask}
    (older / "complete").unlink()
    drop_incomplete(out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-13"]


def test_a_checkpoint_of_another_model_is_refused(words, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        assert main([*words, "--out", str(out)]) == 130
    (newest, *_) = complete_checkpoints(out)
    (newest / "model.safetensors").write_bytes(b"cut short")
    capsys.readouterr()
    forget()
    assert main(["train", "--out", str(out), "--resume"]) == 2
    assert "can't be read" in capsys.readouterr().err
