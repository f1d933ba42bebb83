"""`param_groups` and `attach`: what a method asks of the optimizer, and what drives it from the optimizer's steps."""

from __future__ import annotations

from typing import Any

from torch import nn, optim
from torch.amp import GradScaler

from lora2fx.program import Program, program_of
from lora2fx.training.acceptance import refuse_partitioned
from lora2fx.training.driver import Attachment
from lora2fx.training.groups import parameter_groups
from lora2fx.training.sharing import Shared


def param_groups(
    model: nn.Module, lr: float, weight_decay: float | None = None, head_lr: float | None = None
) -> list[dict[str, Any]]:
    """What is trained in `model` as groups for the optimizer: `torch.optim.AdamW(lora2fx.param_groups(model, 1e-3))`.

    `factors` get `lr` and `weight_decay`, by default the method's (SoRA: 0.1, others 0). `gates` (λ, SoRA's g,
    SaLoRA's θ) get no decay, and the learning rate and eps that the method states. `heads` are the modules trained
    whole (`modules_to_save`), with `head_lr`, by default `lr`; their biases, and those of whatever else is trained
    (`others`), don't decay.
    The parameters are the model's own, float32 or float64; each is in one group, and empty groups are left out.

    Raises `AdapterError` where the model was not transformed.

    Examples:
        >>> import torch
        >>> import lora2fx
        >>> from torch import nn
        >>> model = lora2fx.transform(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), "0", lora2fx.SoRA(r=2))
        >>> groups = lora2fx.param_groups(model, lr=1e-3)
        >>> for group in groups:
        ...     print(group["name"], [tuple(p.shape) for p in group["params"]], group["lr"], group["weight_decay"])
        factors [(2, 8), (16, 2)] 0.001 0.1
        gates [(2,)] 0.001 0.0
        >>> optimizer = torch.optim.AdamW(groups)
    """
    program = program_of(model, "param_groups")
    saved = [program.root.get_submodule(path) for path in program.record.modules_to_save]
    heads = {parameter for module in saved for parameter in module.parameters()}
    return parameter_groups(model, lr, weight_decay, program.method.training().groups, heads, head_lr)


def attach(
    model: nn.Module,
    optimizer: optim.Optimizer,
    total_steps: int,
    scaler: GradScaler | None = None,
    share_inputs: bool = True,
) -> Attachment:
    """Drive the adapters of `model` from `optimizer`'s steps; nothing else in the training loop changes.

    `total_steps` counts optimizer steps, not batches. `scaler` is the loop's `GradScaler`, so that steps it passes
    over on overflow are counted. A resumed run attaches with the same number and goes on where the checkpoint's
    adapters are. Gradients may have any float dtype; penalty, importance and masks are float32 or float64 and bool,
    on the adapters' devices.

    `share_inputs` computes linear layers together that were seen to read the same x when the model was transformed, as
    query, key and value do; where x turns out to be another one in training, each by itself.

    Raises `AdapterError` (no adapters, attached already, adapter parameters missing from the optimizer or held in
    parts that can't be scored) and `ScheduleError` (a schedule that doesn't fit `total_steps`, an optimizer that
    can't be driven).

    Examples:
        >>> import torch
        >>> import lora2fx
        >>> from torch import nn
        >>> method = lora2fx.LoRA2(r=4, k=4, target_k=2, tinit=2, tfinal=2, deltaT=1)
        >>> model = lora2fx.transform(nn.Sequential(nn.Linear(8, 16), nn.ReLU()), "0", method)
        >>> optimizer = torch.optim.AdamW(lora2fx.param_groups(model, lr=1e-2))
        >>> attachment = lora2fx.attach(model, optimizer, total_steps=10)
        >>> for _ in range(10):
        ...     loss = model(torch.ones(4, 8)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> attachment.step, lora2fx.report(model).sites[0]["kept"]
        (10, {'lambda': 4, 'columns': 2})
    """
    program = program_of(model, "attach")
    refuse_partitioned(model)
    shared = _shared(program) if share_inputs else ()
    return Attachment(program.adapters, program.method.training(), optimizer, total_steps, scaler, shared)


def _shared(program: Program) -> Shared:
    """Linear layers that read one input, each with the adapter of the whole of it."""
    whole = [adapter for adapter in program.adapters.values() if adapter.site.columns is None]
    owners = {adapter.site.weight: (adapter, program.root.get_submodule(adapter.site.owner)) for adapter in whole}
    groups = [[owners[weight] for weight in group if weight in owners] for group in program.record.shared]
    return [{adapter: owner for adapter, owner in group if isinstance(owner, nn.Linear)} for group in groups]
