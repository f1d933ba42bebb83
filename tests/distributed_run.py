"""One worker of a two-process run on CPU: `python -m tests.distributed_run <rank> <kind> <file>`."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lora2fx.sharding import whole
from tests.test_training_driver import Model, T, adamw, attach, batches


def poison(model, rank):
    """One NaN; of sharded gradients in the first worker's part alone."""
    gradient = model.head.weight.grad
    if isinstance(gradient, DTensor):
        gradient = gradient.to_local()[:0] if rank else gradient.to_local()
    gradient.view(-1)[:1] = float("nan")


def train(model, forward, optimizer, attachment, parts, rank):
    """T steps, and one more that is skipped: the fifth batch comes twice, with a NaN the first time."""
    data = list(batches())
    for index, x in enumerate([*data[:5], *data[4:]]):
        optimizer.zero_grad()
        forward(x.chunk(parts)[rank]).square().mean().backward()
        if index == 4:
            poison(model, rank)
        optimizer.step()
    assert (attachment.step, attachment.skipped) == (T, 1)
    return {name: whole(value.detach()).clone() for name, value in model.state_dict().items()}


def worker(rank, kind, method, path):
    dist.init_process_group("gloo", init_method=f"file://{path}.store", rank=rank, world_size=2)
    model = Model(method)
    if kind == "ddp":
        forward = DistributedDataParallel(model)
    else:
        for layer in model.layers:
            fully_shard(layer, mesh=dist.init_device_mesh("cpu", (2,)))
        forward = fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)))
    optimizer = adamw(model)
    attachment = attach(model, optimizer, method)
    found = train(model, forward, optimizer, attachment, 2, rank)
    dist.barrier()  # one that leaves first may take gloo's threads down with an abort
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    from tests.test_training_distributed import METHOD

    rank, kind, path = sys.argv[1:]
    torch.set_num_threads(1)
    torch.save(worker(int(rank), kind, METHOD, path), f"{path}.{rank}")
