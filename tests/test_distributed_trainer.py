"""The Trainers of transformers and Lightning in two processes end where a plain loop ends in one."""

from __future__ import annotations

import sys

import pytest
import torch

from tests import distributed_tasks, loops
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the processes are forked from a warm one")


@pytest.mark.parametrize(
    "task", [distributed_tasks.trainer, distributed_tasks.fitted], ids=["transformers", "lightning"]
)
def test_two_processes_are_one(task, tmp_path):
    first, second = run_ranks(task, tmp_path, str(tmp_path))
    expected = loops.state(loops.plain(loops.Setting(clip=0.5)))
    assert first.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        if value.is_floating_point():
            torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-5, msg=name)
        else:
            assert torch.equal(first[name], value), name
    assert sum(int(value.sum()) for name, value in expected.items() if name.endswith(".mask")) == 4
