"""Faults on the disk: whatever fails while a file is written, files and model are as before."""

from __future__ import annotations

import os
import shutil
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import lora2fx
from lora2fx.checkpoints import load_checkpoint, save_checkpoint
from lora2fx.errors import FormatError, Lora2fxError
from lora2fx.streaming import fold_checkpoint
from tests.faults import FILE_ERRORS, Counter, differences, everything, file_faults, files_of, said


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.down(self.up(x).tanh()))


X = torch.linspace(-1, 1, 18).view(3, 6)


def plain(step: float = 0.1) -> nn.Module:
    model = lora2fx.transform(
        Plain().eval(), ["up", "down"], lora2fx.LoRA(r=2), example_inputs=(X,), modules_to_save=["head"], seed=0
    )
    return moved(model, step)


def moved(model: nn.Module, step: float) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(step)
    return model


def bert(step: float = 0.1) -> nn.Module:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=20, **sizes)).eval()
    return moved(lora2fx.transform(model, ["query"], lora2fx.LoRA(r=2), verify=False, seed=0), step)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(X).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def write_checkpoint(model: nn.Module, folder: Path) -> None:
    save_checkpoint(folder / "runs" / "run.pt", model, {"optimizer": torch.optim.SGD(model.parameters())})


@dataclass(frozen=True)
class Operation:
    """What is written where, by a model of `build`, and how many points it has at least."""

    build: Callable[..., nn.Module]
    write: Callable[[nn.Module, Path], Any]
    points: int
    errors: int = len(FILE_ERRORS)
    """How many kinds of error each point gets; with 1 the kinds take turns."""


OPERATIONS = {
    "save": Operation(plain, lambda model, folder: lora2fx.save(model, folder / "deep" / "adapter"), 12),
    "checkpoint": Operation(plain, write_checkpoint, 8, errors=1),
    "safetensors file": Operation(
        plain, lambda model, folder: lora2fx.exporters.export_safetensors(model, folder / "new" / "m.safetensors"), 6
    ),
    "safetensors folder": Operation(
        bert, lambda model, folder: lora2fx.exporters.export_safetensors(model, folder / "model"), 12, errors=1
    ),
    "PEFT folder": Operation(
        plain, lambda model, folder: lora2fx.exporters.export_peft(model, folder / "peft", example_inputs=(X,)), 12, 1
    ),
}


CASES = [
    pytest.param(name, earlier, id=f"{name}, {'over an earlier one' if earlier else 'nothing there'}")
    for name in OPERATIONS
    for earlier in (False, True)
]


@pytest.mark.parametrize(("name", "earlier"), CASES)
def test_a_fault_at_any_point_leaves_model_and_files_as_before(tmp_path, name, earlier):
    operation = OPERATIONS[name]
    model, folder = operation.build(), tmp_path / "out"
    folder.mkdir()
    if earlier:
        operation.write(operation.build(0.3), folder)
    files = files_of(folder)
    with file_faults(folder, Counter()) as counted:
        operation.write(model, folder)
    whole, points = files_of(folder), len(counted.seen)
    assert whole != files
    assert points >= operation.points
    before = everything(model)
    for at in range(1, points + 1):
        turns = FILE_ERRORS if operation.errors > 1 else (FILE_ERRORS[at % len(FILE_ERRORS)],)
        for error in turns:
            reset(folder, files)
            what = f"{counted.seen[at - 1]} ({at} of {points}): {error()!r}"
            raised = attempted(operation, model, folder, Counter(at, error))
            if raised is None:  # makedirs of a folder that is there
                assert files_of(folder).keys() == whole.keys() and "mkdir" in what, what
                continue
            assert isinstance(raised, (type(error()), Lora2fxError)), what
            assert str(error()) in said(raised), what
            if isinstance(raised, OSError):
                assert "Nothing was written to" in said(raised)
            assert files_of(folder) == files, what
            assert not differences(before, everything(model)), what


@pytest.mark.parametrize(("what", "error"), [("open wb", 0), ("replace", 2), ("fsync", 3)])
def test_an_onnx_export_that_fails_leaves_the_earlier_file(tmp_path, what, error):
    """Each takes a whole export, so that only a few points are tried."""
    pytest.importorskip("onnxruntime")
    operation = Operation(plain, lambda model, folder: lora2fx.exporters.export_onnx(model, folder / "m.onnx", (X,)), 0)
    (tmp_path / "m.onnx").write_text("earlier")
    files, model = files_of(tmp_path), plain()
    before, fault = everything(model), AtKind(what, 2 if what == "replace" else 1, FILE_ERRORS[error])
    raised = attempted(operation, model, tmp_path, fault)
    assert isinstance(raised, type(fault.error()))
    assert files_of(tmp_path) == files
    assert not differences(before, everything(model))


class AtKind(Counter):
    """Fails at the `at`-th thing of one kind."""

    def __init__(self, what: str, at: int, error: Callable[[], BaseException]) -> None:
        super().__init__(at, error)
        self.what = what

    def see(self, what: str) -> None:
        if what == self.what:
            super().see(what)


def attempted(operation: Operation, model: nn.Module, folder: Path, counter: Counter) -> BaseException | None:
    with warnings.catch_warnings(), file_faults(folder, counter):
        warnings.simplefilter("ignore")
        try:
            operation.write(model, folder)
        except BaseException as error:
            return error
    return None


def reset(folder: Path, files: dict[str, bytes | None]) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    for name, data in sorted(files.items()):
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)


def test_a_fault_while_reading_an_adapter_leaves_the_model_as_it_was(tmp_path):
    lora2fx.save(plain(), tmp_path)
    model = Plain().eval()
    before = everything(model)
    for name in ("adapter.json", "adapter.safetensors"):
        for error in FILE_ERRORS[:3]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "open", refusing(os.open, name, error))
                with pytest.raises(FormatError, match=f"{name} can't be read") as raised:
                    lora2fx.load(model, tmp_path)
            assert error().strerror in str(raised.value)
            assert not differences(before, everything(model))


def refusing(real, name, error):
    def call(path, *args, **kwargs):
        if str(path).endswith(name):
            raise error()
        return real(path, *args, **kwargs)

    return call


class Failing:
    """A state that can be saved, and fails when it is loaded the first time."""

    def __init__(self, error: Callable[[], BaseException]) -> None:
        self.error: Callable[[], BaseException] | None = error
        self.value = 1

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]
        error, self.error = self.error, None
        if error is not None:
            raise error()


@pytest.mark.parametrize("error", [ValueError, MemoryError, KeyboardInterrupt])
def test_a_checkpoint_that_fails_half_way_changes_neither_model_nor_optimizer(tmp_path, error):
    model = plain()
    optimizer, path = optimizer_of(model), tmp_path / "run.pt"
    save_checkpoint(path, moved(model, 0.1), {"optimizer": optimizer, "other": Failing(error)})
    optimizer_state, other = moments(optimizer), Failing(error)
    moved(model, 0.1)
    model(X).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    other.value = 7
    before, now = everything(model), moments(optimizer)
    assert now != optimizer_state
    with pytest.raises(FormatError if error is ValueError else error):
        load_checkpoint(path, model, {"optimizer": optimizer, "other": other})
    assert not differences(before, everything(model))
    assert moments(optimizer) == now
    assert other.value == 7
    load_checkpoint(path, model, {"optimizer": optimizer, "other": other})
    assert moments(optimizer) == optimizer_state


def moments(optimizer: torch.optim.Optimizer) -> dict[int, list[Any]]:
    held = optimizer.state_dict()["state"]
    return {index: [value.tolist() for value in own.values()] for index, own in held.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base of two shards and an adapter of it."""
    folder = tmp_path_factory.mktemp("streamed")
    model = bert()
    lora2fx.save(model, folder / "adapter")
    lora2fx.unload(model)
    model.save_pretrained(folder / "base", max_shard_size="4KB")
    return folder


def test_a_streamed_fold_that_fails_anywhere_is_gone_on_with(tmp_path, folders):
    def fold() -> None:
        fold_checkpoint(folders / "base", folders / "adapter", tmp_path / "out")

    with file_faults(tmp_path, Counter()) as counted:
        fold()
    whole, points = files_of(tmp_path), len(counted.seen)
    assert points > 20
    for at in range(1, points + 1, 3):
        error = FILE_ERRORS[at % len(FILE_ERRORS)]
        shutil.rmtree(tmp_path / "out")
        with pytest.raises(type(error())), file_faults(tmp_path, Counter(at, error)):
            fold()
        if not (tmp_path / "out").exists():
            assert all(name.startswith(".out.partial") for name in files_of(tmp_path))
            fold()
        assert files_of(tmp_path) == whole


def in_a_process(work: Callable[[], None]) -> int:
    """The exit status of a fork."""
    process = os.fork()
    if process:
        return process
    try:
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


class Killed:
    """At its `at`-th point the process is gone: nothing that cleans up runs."""

    def __init__(self, at: int) -> None:
        self.counter = Counter(at, self.kill)

    @staticmethod
    def kill() -> BaseException:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def status(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def loaded(folder: Path) -> torch.Tensor | str:
    """What the adapter computes, or why it is refused."""
    try:
        return lora2fx.load(Plain().eval(), folder)(X)
    except FormatError as error:
        return str(error)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed processes are forks")
def test_a_save_killed_at_any_point_leaves_the_old_adapter_or_the_new_and_the_next_one_clears_up(tmp_path):
    old, new, folder = plain(0.3), plain(), tmp_path / "out"
    lora2fx.save(old, folder)
    files, refused, at = files_of(folder), [], 0
    with file_faults(tmp_path, Counter()) as counted:
        lora2fx.save(new, folder)
    for at in range(1, len(counted.seen) + 1):
        reset(folder, files)

        def work(at: int = at) -> None:
            with file_faults(folder, Killed(at).counter):
                lora2fx.save(new, folder)

        assert status(in_a_process(work)) == -signal.SIGKILL
        found = loaded(folder)
        if isinstance(found, str):
            assert "a save was interrupted between the two files" in found
            refused.append(at)
        else:
            assert torch.equal(found, old(X)) or torch.equal(found, new(X))
        lora2fx.save(new, folder)
        assert torch.equal(lora2fx.load(Plain().eval(), folder)(X), new(X))
        assert sorted(files_of(folder)) == ["adapter.json", "adapter.safetensors"]
    assert len(refused) <= 1, "between the two renames"


def test_a_folder_that_a_killed_process_moved_away_is_put_back(tmp_path):
    aside = tmp_path / ".lora2fx-gone"
    (aside / "earlier-peft").mkdir(parents=True)
    (aside / "earlier-peft" / "README.md").write_text("mine")
    lora2fx.save(plain(), tmp_path)
    assert (tmp_path / "peft" / "README.md").read_text() == "mine"
    assert not aside.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the other processes are forks")
def test_processes_that_save_to_one_folder_leave_one_whole_adapter(tmp_path):
    models = [plain(step) for step in (0.1, 0.2, 0.3)]

    def often(model: nn.Module) -> None:
        for _ in range(20):
            lora2fx.save(model, tmp_path / "out")

    processes = [in_a_process(lambda model=model: often(model)) for model in models]
    assert [status(process) for process in processes] == [0, 0, 0]
    found = lora2fx.load(Plain().eval(), tmp_path / "out")(X)
    assert sum(torch.equal(found, model(X)) for model in models) == 1
    assert sorted(files_of(tmp_path / "out")) == ["adapter.json", "adapter.safetensors"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a POSIX limit")
@pytest.mark.parametrize("name", ["save", "checkpoint", "safetensors file", "PEFT folder"])
def test_a_file_that_may_not_grow_is_refused_by_the_system_itself(tmp_path, name):
    """Without any patch, in the writers of other libraries too: the kernel ends every write at 700 bytes."""
    import resource

    operation, model = OPERATIONS[name], plain()
    before = everything(model)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))
        with pytest.raises(Exception, match=r"File too large") as raised:
            operation.write(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.type is not Exception
    assert files_of(tmp_path) == {}
    assert not differences(before, everything(model))
