"""Train in forks that are killed at random, until one gets to the end: `python -m tests.kill_run <folder> <kills>`.

The parent has imported everything and never computed anything, so that a fork costs milliseconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import lora2fx
from lora2fx.checkpoints import load_checkpoint, save_checkpoint

STEPS = 120
METHOD = lora2fx.LoRA2(r=4, k=3, target_r=2, target_k=2, tinit=20, tfinal=40, deltaT=3, lora_dropout=0.1)
UNREACHED = 40
"""Seconds after which the run is given up."""


class Centred(nn.Module):
    """Less a running mean: a buffer that the base model moves. (The first batch norm of a process takes a second.)"""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


def make():
    """A model with dropout and a moving buffer, its optimizer and its schedule."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), Centred(), nn.Dropout(0.2), nn.Linear(8, 3))
    lora2fx.transform(model, ["0", "3"], METHOD, verify=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=STEPS)
    return model, optimizer, schedule


def train(file: Path, done) -> None:
    """To the end, a checkpoint after each step; `done(step)` after it."""
    model, optimizer, schedule = make()
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    states = {"optimizer": optimizer, "schedule": schedule}
    if file.exists():
        load_checkpoint(file, model, states)
    attachment = lora2fx.attach(model, optimizer, STEPS)
    while attachment.step < STEPS:
        x = torch.randn(16, 6) * random.uniform(0.5, 2) + np.random.rand()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        schedule.step()
        save_checkpoint(file, model, states)
        done(attachment.step)


def forked(file: Path) -> tuple[int, int]:
    """(process, pipe that gets a byte for every checkpoint)"""
    read, write = os.pipe()
    process = os.fork()
    if process:
        os.close(write)
        return process, read
    code = 1
    try:
        os.close(read)
        train(file, lambda step: os.write(write, b"."))
        code = 0
    finally:
        os._exit(code)


def killed(file: Path, chance: random.Random) -> bool:
    """One life: killed within the milliseconds after a few checkpoints; whether it was before the end."""
    process, pipe = forked(file)
    for _ in range(chance.randrange(6)):
        if not os.read(pipe, 1):
            break
    time.sleep(chance.uniform(0, 0.02))
    os.kill(process, signal.SIGKILL)
    os.close(pipe)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def check(file: Path) -> int:
    """Readable by torch and by others; the step that it holds (0: there is none yet)."""
    if not file.exists():
        return 0
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask
    return int(torch.load(file, weights_only=True)["model"]["0.lora2fx_weight.progress"][0])


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    make()  # imports what the children would
    chance = random.Random(7)
    for name in ("killed", "whole"):
        (folder / name).mkdir()
    file, whole = folder / "killed" / "run.pt", folder / "whole" / "run.pt"
    resumed: list[int] = []
    started = time.monotonic()
    while len(resumed) < kills and time.monotonic() - started < UNREACHED:
        if killed(file, chance):
            resumed.append(check(file))
    codes = [os.waitstatus_to_exitcode(os.waitpid(forked(path)[0], 0)[1]) for path in (file, whole)]
    print(json.dumps({"resumed": resumed, "codes": codes, "left": sorted(os.listdir(folder / "killed"))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
