"""Adapt, prune and fold on several processes: DDP, or FSDP2 with --sharded. Runs on GPUs, or on CPUs with gloo.

torchrun --nproc-per-node 2 examples/distributed.py [--sharded] [--out FOLDER]
accelerate launch --multi_gpu --num_processes 2 examples/distributed.py [--sharded]
python examples/distributed.py                                    # one process, the same result
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lora2fx

STEPS, ROWS, WIDTH = 60, 32, 16
"""Optimizer steps; rows of a step, over all processes together; width of the model."""


class Block(nn.Module):
    """A residual feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, WIDTH) → the same"""
        return x + self.down(torch.relu(self.up(x)))


def base_model() -> nn.Sequential:
    """The same weights on every process: a pretrained model that is read from a file."""
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), Block())


def batch(step: int, teacher: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """All rows of a step, and what they should become."""
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step))
    with torch.no_grad():
        return x, teacher(x)


def teacher_model() -> nn.Sequential:
    """The base model with one weight moved by a matrix of rank 2."""
    teacher = base_model()
    with torch.no_grad():
        teacher[1].up.weight += torch.randn(4 * WIDTH, 2) @ torch.randn(2, WIDTH) / WIDTH
    return teacher


def start() -> tuple[int, int, torch.device]:
    """(rank, processes, device), by what torchrun and accelerate set in the environment."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    on_gpu = torch.cuda.device_count() > local
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if world > 1:
        torch.set_num_threads(1)
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    return rank, world, device


def parallel(model: nn.Module, world: int, device: torch.device, sharded: bool) -> nn.Module:
    """The adapted model, spread over the processes."""
    if world == 1:
        return model
    if not sharded:
        return DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device.type, (world,))
    for block in model.children():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main() -> None:
    """Train, compare the processes' masks, save the adapter, fold it into a fresh base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sharded", action="store_true", help="FSDP2 instead of DDP")
    parser.add_argument("--out", default=os.path.join(tempfile.gettempdir(), "lora2fx-distributed"))
    options = parser.parse_args()
    rank, world, device = start()
    teacher = teacher_model().to(device)

    method = lora2fx.LoRA2(r=4, k=4, target_k=1)  # from 24 columns over six weights down to 6
    model = lora2fx.transform(base_model().to(device), ["up", "down"], method, seed=1)
    trained = parallel(model, world, device, options.sharded)
    optimizer = torch.optim.AdamW(lora2fx.param_groups(model, lr=1e-2))
    attachment = lora2fx.attach(trained, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        x, y = (part.to(device).chunk(world)[rank] for part in batch(step, teacher))
        loss = (trained(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    attachment.check_ranks()

    folder = Path(options.out)
    if options.sharded or rank == 0:  # of a sharded model every process saves: together they gather it
        lora2fx.save(model, folder)
    if rank == 0:
        plain = lora2fx.load(base_model().to(device), folder)
        report = lora2fx.fold(plain)
        x, y = batch(STEPS, teacher)
        error = (plain(x.to(device)) - y).square().mean()
        before = (base_model().to(device)(x.to(device)) - y).square().mean()
        print(f"processes {world}, columns kept {attachment.budget}, sites {len(report.sites)}")
        print(f"error before {before:.5f}, after {error:.5f}")
    if world > 1:
        dist.barrier()  # none leaves while another still needs it
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
