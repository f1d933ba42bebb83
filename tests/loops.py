"""One small problem trained by four loops: plain torch, Hugging Face's Trainer and accelerate, Lightning."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import lora2fx

STEPS, MICRO, ROWS = 12, 2, 4
"""Optimizer steps, micro-batches a step, rows a micro-batch."""
METHOD = lora2fx.LoRA2(r=4, k=3, target_r=2, target_k=2, tinit=2, tfinal=4, deltaT=2)
RATE, DECAY = 0.05, 0.0  # the Trainer spares biases where there is a decay


def forget():
    """Drop all that accelerate keeps for the whole process, a loader that an earlier test left halfway among it."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@dataclass(frozen=True)
class Setting:
    """What a loop is told; `overflow` makes the loss of the fifth step infinite."""

    clip: float = 0.0
    bf16: bool = False
    checkpointed: bool = False
    compiled: bool = False
    scaled: bool = False
    fused: bool = False
    overflow: bool = False
    steps: int = STEPS

    @property
    def optimizer(self) -> dict[str, Any]:
        return {"lr": RATE, "weight_decay": DECAY, "fused": self.fused}


class Problem(nn.Module):
    """(x, y, scale) → {"loss"}, of three linear layers of which two are adapted."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.checkpointed = setting.checkpointed

    def block(self, x):
        return self.second(x).tanh() + x

    def forward(self, x, y, scale):
        x = self.first(x).tanh()
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed and self.training else self.block(x)
        return {"loss": ((self.head(x) - y).square().mean(-1) * scale).mean()}


def adapted(setting: Setting) -> Problem:
    model = lora2fx.transform(Problem(setting), ["first", "second"], METHOD, modules_to_save=["head"], seed=1)
    if setting.compiled:
        model.compile(backend="aot_eager")
    return model.train()


def rows(setting: Setting) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    count = setting.steps * MICRO * ROWS
    x, y = torch.randn(count, 6, generator=generator), torch.randn(count, 3, generator=generator)
    scale = torch.ones(count)
    if setting.overflow:
        scale[4 * MICRO * ROWS] = torch.inf
    return [{"x": x[i], "y": y[i], "scale": scale[i]} for i in range(count)]


def scaler(setting: Setting) -> torch.amp.GradScaler | None:
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000) if setting.scaled else None


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def plain(setting: Setting) -> nn.Module:
    model, scale = adapted(setting), scaler(setting)
    optimizer = torch.optim.AdamW(trained(model), **setting.optimizer)
    lora2fx.attach(model, optimizer, setting.steps, scale)
    for index, batch in enumerate(DataLoader(rows(setting), ROWS)):
        with torch.autocast("cpu", torch.bfloat16) if setting.bf16 else contextlib.nullcontext():
            loss = model(**batch)["loss"]
        loss = loss / MICRO
        (loss if scale is None else scale.scale(loss)).backward()
        if (index + 1) % MICRO:
            continue
        if setting.clip:
            nn.utils.clip_grad_norm_(model.parameters(), setting.clip)
        if scale is None:
            optimizer.step()
        else:
            scale.step(optimizer)
            scale.update()
        optimizer.zero_grad()
    return model


def arguments(setting: Setting, folder, **changes: Any):
    from transformers import TrainingArguments

    return TrainingArguments(
        str(folder),
        **{
            "use_cpu": True,
            "per_device_train_batch_size": ROWS,
            "gradient_accumulation_steps": MICRO,
            "max_steps": setting.steps,
            "learning_rate": RATE,
            "weight_decay": DECAY,
            "max_grad_norm": setting.clip,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch_fused" if setting.fused else "adamw_torch",
            "bf16": setting.bf16,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **changes,
        },
    )


def hugging_face(setting: Setting, folder) -> nn.Module:
    from transformers import Trainer

    from lora2fx.integrations.transformers import attach

    model = adapted(setting)
    trainer = Trainer(model, arguments(setting, folder), train_dataset=rows(setting))
    trainer.accelerator.scaler = scaler(setting)
    attach(trainer)
    trainer.train()
    return model


def accelerated(setting: Setting, folder) -> nn.Module:
    from accelerate import Accelerator

    from lora2fx.integrations.accelerate import attach

    model = adapted(setting)
    optimizer = torch.optim.AdamW(trained(model), **setting.optimizer)
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=MICRO, mixed_precision="bf16" if setting.bf16 else "no"
    )
    accelerator.scaler = scaler(setting)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows(setting), ROWS))
    attach(accelerator, prepared, optimizer, setting.steps)
    for batch in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch)["loss"])
            if setting.clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), setting.clip)
            optimizer.step()
            optimizer.zero_grad()
    return model


def lightning_parts(setting: Setting, folder, **changes: Any):
    """(Trainer, module, loader)"""
    import lightning.pytorch as pl
    from lightning.pytorch.plugins import MixedPrecision

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = adapted(setting)

        def training_step(self, batch, index):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.AdamW(trained(self), **setting.optimizer)

    class Scaling(MixedPrecision):
        def forward_context(self):
            return contextlib.nullcontext()

    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": setting.steps,
            "accumulate_grad_batches": MICRO,
            "gradient_clip_val": setting.clip or None,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            **({"precision": "bf16-mixed"} if setting.bf16 else {}),
            **({"plugins": [Scaling("16-mixed", "cpu", scaler(setting))]} if setting.scaled else {}),
            **changes,
        }
    )
    return trainer, Module(), DataLoader(rows(setting), ROWS)


def lightning(setting: Setting, folder) -> nn.Module:
    from lora2fx.integrations.lightning import attach

    trainer, module, loader = lightning_parts(setting, folder)
    attach(trainer)
    trainer.fit(module, loader)
    return module.model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
