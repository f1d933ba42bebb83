"""Two processes score the same bits and keep the same entries, and end where one process on all data ends."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from lora2fx.methods.lora2 import LoRA2
from tests.distributed_run import train
from tests.test_training_driver import Model, adamw, attach

METHOD = LoRA2(r=4, k=3, init="orthonormal", target_r=2, target_k=2, tinit=2, tfinal=4, deltaT=2)


def outcome(workers, seconds=120):
    """Return codes; one that fails takes the others with it."""
    try:
        for _ in range(seconds * 10):
            codes = [worker.poll() for worker in workers]
            if None not in codes or any(codes):
                break
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.kill()
    return [worker.wait() for worker in workers]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_are_one(kind, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed_run"]
    logs = [tmp_path / f"log.{rank}" for rank in range(2)]
    workers = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            workers.append(subprocess.Popen([*command, str(rank), kind, str(tmp_path / "state")], stderr=file))
    assert outcome(workers) == [0, 0], [log.read_text() for log in logs]
    first, second = (torch.load(tmp_path / f"state.{rank}", weights_only=True) for rank in range(2))
    model = Model(METHOD)
    optimizer = adamw(model)
    alone = train(model, model, optimizer, attach(model, optimizer, METHOD), 1, 0)
    assert first.keys() == second.keys() == alone.keys()
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        if value.dtype == torch.bool:
            assert torch.equal(first[name], value), name
        else:
            torch.testing.assert_close(first[name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert int(sum(value.sum() for name, value in alone.items() if name.endswith("adapter.mask"))) == 4
