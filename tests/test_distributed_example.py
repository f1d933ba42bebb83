"""The example under both launchers, unchanged, ends where one process ends."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "distributed.py"


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launchers():
    quiet = ("--mixed_precision", "no", "--dynamo_backend", "no", "--num_machines", "1")
    return {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)],
        # On a machine without GPUs accelerate starts one process for --cpu, whatever is asked for.
        "accelerate": [
            *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", free_port()),
            *(*quiet, str(EXAMPLE), "--sharded"),
        ],
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process writes and prints."""
    folder, out = tmp_path_factory.mktemp("alone"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", [str(EXAMPLE), "--out", str(folder)])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return out.getvalue().splitlines()


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_example_runs_unchanged(launcher, alone, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", *launchers()[launcher], "--out", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        command,
        env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [alone[0].replace("processes 1", "processes 2"), alone[1]]
    assert "columns kept 6" in alone[0]
    assert float(alone[1].split()[-1]) < 0.2 * float(alone[1].split()[2].rstrip(","))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter.json", "adapter.safetensors"]
