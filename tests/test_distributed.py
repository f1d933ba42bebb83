"""Two gloo processes on a transformed model: DDP, FSDP2, their checkpoints, and the way back to a plain model."""

from __future__ import annotations

import sys

import pytest
import torch

import lora2fx
from tests import distributed_tasks as tasks
from tests.distributed_tasks import METHODS, STEPS
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the processes are forked from a warm one")


def agree(found, expected, exact=False):
    """The same entries; masks and counts equal, numbers within float64's rounding of another order."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if exact or not value.is_floating_point():
            assert torch.equal(found[name], value), name
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-11, msg=name)


def pruned(state):
    return sum(int((~value).sum()) for name, value in state.items() if name.endswith("mask"))


@pytest.fixture(scope="module")
def whole():
    return tasks.alone()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a sharded run, and what its processes found."""
    folder = tmp_path_factory.mktemp("sharded")
    return folder, run_ranks(tasks.sharded, folder, str(folder))


def test_ddp_is_one_process(whole, tmp_path):
    first, second = run_ranks(tasks.parallel, tmp_path)
    agree(first["trained"], tasks.state(whole))
    assert pruned(first["trained"]) == 4 * (4 - 2) + 4 * (3 - 2)
    for part in ("trained", "folded"):
        agree(second[part], first[part], exact=True)
    assert first["folded"].keys() == tasks.base().state_dict().keys()


def test_fsdp2_is_one_process(whole, run):
    first, second = run[1]
    agree(first["trained"], tasks.state(whole))
    agree(second["trained"], first["trained"], exact=True)
    expected = lora2fx.report(whole)
    for found in (first, second):
        assert found["active"] == expected.totals["active"] == 8
        assert found["rank"] == sum(site["rank"] or 0 for site in expected.sites)


def test_a_sharded_model_is_saved_whole_by_one_of_its_processes(whole, run):
    folder, (first, second) = run
    assert first["written"]
    assert second["written"], "when save returns the files are there"
    assert first["bytes"] > 0
    assert second["bytes"] == 0
    loaded = lora2fx.load(tasks.base(), folder / "adapter")
    lora2fx.fold(loaded)
    x = tasks.batches()[0]
    expected = whole(x)
    torch.testing.assert_close(loaded(x), expected, rtol=1e-8, atol=1e-11)
    assert (expected - tasks.base()(x)).abs().max() > 1e-2


@pytest.mark.parametrize("asked", ["fold", "unload", "onnx", "safetensors"])
def test_what_needs_whole_weights_says_the_way(run, asked):
    name = asked if asked in ("fold", "unload") else "export"
    for found in run[1]:
        assert found[asked].startswith(f"AdapterError: {name}: ")
        assert "is sharded over several processes. On every process call lora2fx.save(model, folder)" in found[asked]
        assert f"lora2fx.load(base, folder) into a fresh base model, and {name} that" in found[asked]
        agree(found["after"], found["trained"], exact=True)


def test_a_sharded_model_is_not_transformed(run):
    assert "fully_shard(model) afterwards" in run[1][0]["again"]


@pytest.mark.parametrize("attach_first", [False, True], ids=["load then attach", "attach then load"])
def test_two_processes_resume_in_the_same_bits(run, tmp_path, attach_first):
    folder, found = run
    for own, other in zip(run_ranks(tasks.resumed, tmp_path, str(folder), attach_first), found, strict=True):
        agree(own, other["trained"], exact=True)


def test_one_process_resumes_what_two_began(run, tmp_path):
    folder, found = run
    (own,) = run_ranks(tasks.resumed, tmp_path, str(folder), True, world=1)
    agree(own, found[0]["trained"])


def test_every_method_shards(tmp_path):
    first, second = run_ranks(tasks.every_method, tmp_path)
    for name, method in METHODS.items():
        torch.manual_seed(3)
        expected = tasks.state(tasks.alone(method))
        agree(first[name], expected)
        agree(second[name], first[name], exact=True)


def test_gradients_that_nothing_averaged_are_found_out(tmp_path):
    for found in run_ranks(tasks.apart, tmp_path, False):
        assert found.startswith("AdapterError: the masks of these processes differ: rank 1 from rank 0. They were")


def test_processes_that_adapt_other_weights_are_not_compared(tmp_path):
    assert run_ranks(tasks.apart, tmp_path, True) == ["nothing was refused"] * 2


def test_flat_parts_are_refused(tmp_path):
    for found in run_ranks(tasks.flat, tmp_path):
        assert "FullyShardedDataParallel (FSDP's first version)" in found
        assert "fsdp_version: 2" in found


def test_outside_torch_distributed_there_is_nothing_to_compare():
    model = tasks.adapted()
    lora2fx.attach(model, tasks.adamw(model), STEPS).check_ranks()
