"""What the processes of the distributed tests do: one model, trained whole, in parallel and sharded."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import lora2fx
from lora2fx.errors import Lora2fxError
from lora2fx.sharding import whole

STEPS, MICRO, ROWS = 12, 2, 8
"""Optimizer steps, micro-batches a step of one process, rows a step of all of them."""
SAVED = 6
METHOD = lora2fx.LoRA2(r=4, k=3, target_r=2, target_k=2, tinit=2, tfinal=4, deltaT=2)
METHODS = {
    "LoRA": lora2fx.LoRA(r=2),
    "LoRA2": METHOD,
    "AdaLoRA": lora2fx.AdaLoRA(r=4, target_r=2, tinit=2, tfinal=4, deltaT=2),
    "SoRA": lora2fx.SoRA(r=4, xi=0.5),
    "SaLoRA": lora2fx.SaLoRA(r=4, target_density=0.5),
    "ALoRA": lora2fx.ALoRA(r=2, n_prune=1, cycles=2, tinit=3, deltaT=3),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.blocks(x))


def base() -> Blocks:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Blocks().double()


def adapted(method=METHOD) -> Blocks:
    model = base()
    return lora2fx.transform(model, ["up", "down"], method, modules_to_save=["head"], seed=1, verify=False)


def shard(model: nn.Module) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)


def batches() -> torch.Tensor:
    return torch.randn(STEPS, ROWS, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def train(model, optimizer, rank=0, world=1, steps=range(STEPS)) -> None:
    """Accumulate, synchronise with the last micro-batch, clip, step."""
    for x in batches()[steps.start : steps.stop]:
        parts = x.chunk(world)[rank].chunk(MICRO)
        for index, part in enumerate(parts):
            synchronise(model, index == len(parts) - 1)
            (model(part).square().mean() / MICRO).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def synchronise(model, last: bool) -> None:
    """As DDP's no_sync and FSDP2's own."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = last
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(value.detach()).clone() for name, value in model.state_dict().items()}


def score(model: nn.Module) -> float:
    """-loss of one batch, the same on every process."""
    model.eval()
    with torch.no_grad():
        loss = model(batches()[0]).square().mean()
    model.train()
    return -float(loss)


def alone(method=METHOD) -> nn.Module:
    model = adapted(method)
    optimizer = adamw(model)
    lora2fx.attach(model, optimizer, STEPS).evaluate = partial(score, model)
    train(model, optimizer)
    return model


def refusal(call, *arguments) -> str:
    try:
        call(*arguments)
    except Lora2fxError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def parallel(rank: int) -> dict:
    """DDP, with no_sync: the state, and what folding the wrapped model leaves."""
    model = DistributedDataParallel(adapted())
    optimizer = adamw(model)
    attachment = lora2fx.attach(model, optimizer, STEPS)
    train(model, optimizer, rank, 2)
    attachment.check_ranks()
    trained = state(model.module)
    lora2fx.fold(model)
    return {"trained": trained, "folded": state(model.module)}


def sharded(rank: int, folder: str) -> dict:
    """FSDP2: trained with a checkpoint half-way, reported and saved, and what else is asked of it."""
    model = shard(adapted())
    optimizer = adamw(model)
    attachment = lora2fx.attach(model, optimizer, STEPS)
    train(model, optimizer, rank, 2, range(SAVED))
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(parts, checkpoint_id=f"{folder}/halfway")
    train(model, optimizer, rank, 2, range(SAVED, STEPS))
    attachment.check_ranks()
    report = lora2fx.report(model)
    saved = lora2fx.save(model, f"{folder}/adapter")
    written = [(Path(folder) / "adapter" / name).is_file() for name in saved.details["files"]]
    exporters = lora2fx.exporters
    return {
        "trained": state(model),
        "active": report.totals["active"],
        "rank": sum(site["rank"] or 0 for site in report.sites),
        "written": all(written),
        "bytes": saved.details["bytes"],
        "fold": refusal(lora2fx.fold, model),
        "unload": refusal(lora2fx.unload, model),
        "onnx": refusal(exporters.export_onnx, model, f"{folder}/a.onnx", (torch.ones(2, 6).double(),)),
        "safetensors": refusal(exporters.export_safetensors, model, f"{folder}/a.safetensors"),
        "again": refusal(lora2fx.transform, model, ["up"]),
        "after": state(model),
    }


def resumed(rank: int, folder: str, attach_first: bool) -> dict[str, torch.Tensor]:
    """The second half, from the checkpoint, by as many processes as there are."""
    world = dist.get_world_size()
    model = adapted()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(float(parameter.requires_grad))
    model = shard(model) if world > 1 else model
    optimizer = adamw(model)
    if attach_first:
        attachment = lora2fx.attach(model, optimizer, STEPS)
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(parts, checkpoint_id=f"{folder}/halfway")
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    if not attach_first:
        attachment = lora2fx.attach(model, optimizer, STEPS)
    assert attachment.step == SAVED
    train(model, optimizer, rank, world, range(SAVED, STEPS))
    return state(model)


def every_method(rank: int) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for name, method in METHODS.items():
        torch.manual_seed(3)
        model = shard(adapted(method))
        optimizer = adamw(model)
        lora2fx.attach(model, optimizer, STEPS).evaluate = partial(score, model)
        train(model, optimizer, rank, 2)
        found[name] = state(model)
    return found


def apart(rank: int, staged: bool) -> str:
    """Nothing averages the gradients; `staged`, each process adapts other weights, as it may."""
    model = lora2fx.transform(base(), ["up" if rank and staged else "down"], METHOD, seed=1, verify=False)
    optimizer = adamw(model)
    attachment = lora2fx.attach(model, optimizer, STEPS)
    attachment.check_ranks()
    train(model, optimizer, rank, 2)
    return refusal(attachment.check_ranks)


def flat(rank: int) -> str:
    """FSDP's first version."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(adapted(), use_orig_params=True, device_id=torch.device("cpu"))
    return refusal(lora2fx.attach, model, adamw(model), STEPS)


def trainer(rank: int, folder: str) -> dict[str, torch.Tensor]:
    """Hugging Face's Trainer, in the environment that torchrun makes; half the rows a process."""
    from transformers import Trainer

    from lora2fx.integrations.transformers import attach
    from tests import loops

    setting = loops.Setting(clip=0.5)
    model = loops.adapted(setting)
    rows = loops.ROWS // dist.get_world_size()
    arguments = loops.arguments(setting, folder, per_device_train_batch_size=rows, ddp_backend="gloo")
    driven = Trainer(model, arguments, train_dataset=loops.rows(setting))
    attach(driven)
    driven.train()
    assert arguments.world_size == dist.get_world_size() == 2
    assert isinstance(driven.model_wrapped, DistributedDataParallel)
    return state(model)


def fitted(rank: int, folder: str) -> dict[str, torch.Tensor]:
    """Lightning's DDP, in the environment that torchrun makes; each process gets every other row."""
    from lora2fx.integrations.lightning import attach
    from tests import loops

    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    setting = loops.Setting(clip=0.5)
    world, rows = dist.get_world_size(), loops.rows(setting)
    driven, module, _ = loops.lightning_parts(
        setting, folder, strategy="ddp", devices=world, use_distributed_sampler=False
    )
    attach(driven)
    # Lightning's own sampler shuffles.
    sampler = DistributedSampler(rows, shuffle=False)
    driven.fit(module, DataLoader(rows, loops.ROWS // world, sampler=sampler))
    assert driven.world_size == dist.get_world_size() == 2
    return state(module.model)
