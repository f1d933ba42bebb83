"""Runs of `lora2fx train` in forks that are killed at random: `python -m tests.train_kill <folder> <kills>`.

The parent has imported everything, so that a fork costs little.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import lora2fx.finetuning.job
from lora2fx.cli import main as command
from tests import finetuned

STEPS = 30
LIVES = 20
"""After so many the run is given up."""


def forked(arguments: list[str], out: Path) -> int:
    process = os.fork()
    if process:
        return process
    with open(out.with_suffix(".log"), "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        code = 1
        try:
            code = command(arguments)
        finally:
            log.flush()
            os._exit(code)


def killed(arguments: list[str], out: Path, delay: float) -> bool:
    """Killed `delay` seconds after a checkpoint more was there than before; whether it was before the end."""
    before = set(out.glob("checkpoints/*/complete"))
    process = forked(arguments, out)
    while os.waitpid(process, os.WNOHANG) == (0, 0):
        if set(out.glob("checkpoints/*/complete")) - before:
            time.sleep(delay)
            os.kill(process, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        time.sleep(0.002)
    return False


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    import datasets
    import sklearn.metrics  # noqa: F401
    import transformers  # noqa: F401

    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    model = finetuned.bert_folder(folder / "bert")
    data = finetuned.write_jsonl(folder / "rows.jsonl", finetuned.rated(60))
    chance, died = random.Random(3), 0
    out, whole = folder / "killed", folder / "whole"
    start = ["train", "--model", str(model), "--data", str(data), "--cpu", "--batch", "8", "--steps", str(STEPS)]
    os.waitpid(forked([*start, "--out", str(whole)], whole), 0)
    for _ in range(LIVES):
        if died == kills:
            break
        arguments = ["train", "--out", str(out), "--resume"] if out.exists() else [*start, "--out", str(out)]
        died += killed(arguments, out, chance.uniform(0, 0.08))
    code = os.waitstatus_to_exitcode(os.waitpid(forked(["train", "--out", str(out), "--resume"], out), 0)[1])
    print(json.dumps({"killed": died, "code": code, "module": lora2fx.finetuning.job.__name__}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
